"""Public checkpoints: a directory or a name on the hub in, a filled model out; and back again.

Each family has one table of names (layouts.py), the published ones on the left and ours on the
right. Loading reads it from left to right, saving from right to left. Every tensor is accounted
for on both sides: one that we need and the file lacks, one in the file that nobody knows, or one
of another shape raises with its name. What a file holds and we knowingly leave alone is listed as
the layout's `unread`.

The files are memory-mapped and the model is built without numbers (device "meta"), so a tensor
goes straight from the file into its place: there is never a second copy of the weights.
"""

import hashlib
import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from extras.convert.minimind import is_older, minimind_config
from extras.convert.pickle_loader import TorchFile
from model.config import LanguageConfig, VisionConfig
from model.language import LanguageModel
from model.pretrained.weight_names import LAYOUTS, Layout, half_split
from model.vision import VisionTransformer

# What the weights of well-known models weigh, for the message when they cannot be fetched.
SIZES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "269 MB", "Qwen/Qwen2.5-0.5B-Instruct": "988 MB",
    "Qwen/Qwen2.5-1.5B-Instruct": "3.1 GB", "Qwen/Qwen3-0.6B": "1.5 GB",
    "Qwen/Qwen-7B-Chat": "15.4 GB",
    "google/siglip-base-patch16-224": "813 MB", "google/siglip2-base-patch16-224": "1.5 GB",
    "google/siglip-so400m-patch14-384": "3.5 GB", "google/siglip2-base-patch32-256": "1.5 GB",
    "openai/clip-vit-base-patch32": "605 MB",
    "openai/clip-vit-base-patch16": "599 MB", "openai/clip-vit-large-patch14": "1.7 GB",
    "facebook/dinov2-small": "88 MB", "facebook/dinov2-base": "346 MB",
}
WANTED_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json",
                "tokenizer*", "*.tiktoken", "vocab.json", "merges.txt", "special_tokens_map.json",
                "generation_config.json", "preprocessor_config.json"]


def load_language(name, dtype: torch.dtype | None = torch.float32) -> LanguageModel:
    """A public decoder from a directory, from MiniMind's .pth file or from the hub, in dtype.

    dtype None: as the file holds it, and then it is the mapped file itself that takes no memory
    until somebody reads it.
    """
    source = resolve(name)
    config = language_config(source)
    with torch.device("meta"):
        model = LanguageModel(config)
    held = tensor_files(source)
    layout = LAYOUTS["minimind" if is_older(held) else config.model_type]
    unread = [*layout.unread]
    if config.tie_word_embeddings:  # some files hold the table a second time, as the head
        unread.append(layout.public["lm_head"] + ".weight")
    return fill(model, source, held, layout, unread, dtype)


def language_config(source: Path) -> LanguageConfig:
    """From config.json; of MiniMind's files, which often have none, from the tensors' shapes."""
    directory = source if source.is_dir() else source.parent
    alone = not (directory / "config.json").is_file() and bool(pth_files(source))
    public = {} if alone else read_config(directory)
    if alone or public.get("model_type") in ("minimind", "minimind-v"):
        return blaming(source, minimind_config, tensor_shapes(source), public, source)
    return blaming(directory / "config.json", LanguageConfig.from_public, public)


def load_vision(name, dtype: torch.dtype | None = torch.float32, feature_layer: int = -1,
                features: str = "patches") -> VisionTransformer:
    """A public vision tower from a directory or from the hub, also out of a whole CLIP or SigLIP.

    Blocks after feature_layer are not needed for it and not read. dtype None: as in the file.
    """
    directory = resolve(name)
    config = blaming(directory / "config.json", VisionConfig.from_public, read_config(directory),
                     feature_layer, features)
    with torch.device("meta"):
        model = VisionTransformer(config)
    layout = LAYOUTS[config.model_type]
    unread = [*layout.unread]
    if feature_layer != -1:
        unread += ["post_layernorm.*", "layernorm.*"]
        unread += [f"encoder.layer*.{number}.*"  # "encoder.layers." or "encoder.layer."
                   for number in range(len(model.layers), config.num_hidden_layers)]
    return fill(model, directory, tensor_files(directory), layout, unread, dtype)


def fill(model, source: Path, held: dict[str, Path], layout: Layout, unread: list[str],
         dtype: torch.dtype | None):
    """Put the tensors that the files hold into model, which stands on the meta device."""
    wanted, prefix = public_names(model, layout), layout.prefix
    if not any(name.startswith(prefix) for name in held):
        wanted = {name.removeprefix(prefix): ours for name, ours in wanted.items()}
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - held.keys())]
    problems += [f"unknown: {name}" for name in sorted(held.keys() - wanted.keys())
                 if not any(fnmatch(name.removeprefix(prefix), u) for u in unread)]
    target, tensors = model.state_dict(), {}
    for path in sorted({held[name] for name in wanted if name in held}):
        with open_tensors(path) as file:
            for name, ours in wanted.items():
                if held.get(name) != path:
                    continue
                shape = public_shape({each: target[each] for each in ours}, layout)
                found = list(file.get_slice(name).get_shape())  # from the header: reads no data
                if found != shape:
                    problems.append(f"misshapen: {name} is {found} in the file, and config.json "
                                    f"asks for {shape}")
                elif not problems:
                    tensor = file.get_tensor(name)
                    if unusable(tensor):
                        problems.append(f"{unusable(tensor)}: {name} in {path.name}")
                        continue
                    tensor = tensor if dtype is None else tensor.to(dtype)
                    if name.rsplit(".", 2)[-2] in layout.interleaved:
                        tensor = half_split(tensor, model.config.head_dim)
                    tensors.update(unstacked(tensor, {each: target[each] for each in ours}))
    if problems:
        more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"{source}: the weights do not fit a {model.config.model_type} as "
                         "config.json describes it:\n  " + "\n  ".join(problems[:12]) + more)
    model.load_state_dict(tensors, assign=True)
    return model


def unusable(tensor: torch.Tensor) -> str:
    """Why it cannot be a weight; "" if it can. Reads the tensor once, which loading it would do."""
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_floating_point():
        return f"no plain fractions but {str(tensor.dtype).removeprefix('torch.')}"
    # A NaN or an infinity comes through a sum. (The smallest dtypes cannot be summed.)
    wide = tensor.float() if tensor.itemsize < 2 else tensor
    return "" if wide.sum(dtype=torch.float32).isfinite() else "not finite"


def unstacked(tensor: torch.Tensor, target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut a published tensor into those of ours that are stacked in it; mostly it is just one.

    The parts are views: still the mapped file itself, and no copy of it.
    """
    parts = tensor.flatten().split([each.numel() for each in target.values()])
    return {ours: part.view(each.shape) for (ours, each), part in zip(target.items(), parts)}


def public_names(model: nn.Module, layout: Layout) -> dict[str, list[str]]:
    """{published name: our names} for every tensor of model; several of ours where they are
    stacked in one published matrix."""
    table, names = layout.public, {}
    for ours in model.state_dict():
        number = re.search(r"(?<=layers\.)\d+", ours)
        pattern = re.sub(r"(?<=layers\.)\d+", "{}", ours)
        layer, _, last = pattern.rpartition(".")
        if pattern in table:
            public = table[pattern]
        elif layer in table and last in ("weight", "bias"):
            public = f"{table[layer]}.{last}"
        else:
            raise ValueError(f"{ours} has no published name in a {model.config.model_type}; "
                             "adapters must be merged (merge_lora) before a model is saved so")
        # A model lists q, k and v in this order, and so does the layout that stacks them.
        names.setdefault(public.format(number.group()) if number else public, []).append(ours)
    return names


def public_shape(stacked: dict[str, torch.Tensor], layout: Layout) -> list[int]:
    """{our name: tensor} of all that one published tensor holds -> its shape in the file."""
    first, *_ = stacked
    rows = sum(len(tensor) for tensor in stacked.values())
    return [1] * layout.leading_ones.get(first, 0) + [rows, *stacked[first].shape[1:]]


def public_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """{published name: tensor}: the model in the form in which its family is published."""
    state, tensors, layout = model.state_dict(), {}, LAYOUTS[model.config.model_type]
    for public, ours in public_names(model, layout).items():
        stacked = {each: state[each] for each in ours}
        tensor = torch.cat([*stacked.values()]) if len(stacked) > 1 else stacked[ours[0]]
        tensors[public] = tensor.reshape(public_shape(stacked, layout))
    return tensors


def save_language(model: LanguageModel, directory) -> None:
    """Write config.json and model.safetensors as other libraries read them."""
    save(directory, model.config.to_public(), public_tensors(model))


def save_vision(model: VisionTransformer, directory, extra: dict | None = None) -> None:
    """Write config.json and model.safetensors as other libraries read them.

    extra: tensors {published name: tensor} that the tower itself does not hold, such as SigLIP's
    pooling head ("head.probe", ...) or CLIP's post_layernorm: loading them back leaves them alone.
    A tower with an earlier feature_layer has no later blocks to write; it loads again with that
    feature_layer only.
    """
    prefix = LAYOUTS[model.config.model_type].prefix
    tensors, config = public_tensors(model), model.config.to_public()
    for name, tensor in (extra or {}).items():
        tensors[prefix + name.removeprefix(prefix)] = tensor
    if model.config.model_type == "siglip_vision_model":
        config["vision_use_head"] = any(name.startswith(prefix + "head.") for name in tensors)
    if model.config.model_type == "dinov2":
        config["use_mask_token"] = "embeddings.mask_token" in tensors
    save(directory, config, tensors)


def save(directory, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Each file is written beside its place and then moved there: a file that is memory-mapped by
    a loaded model, perhaps this very one, must never change under it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    unfinished = directory / "model.safetensors.part"
    save_file(tensors, unfinished, metadata={"format": "pt"})  # other readers ask for the format
    os.replace(unfinished, directory / "model.safetensors")
    unfinished = directory / "config.json.part"
    unfinished.write_text(json.dumps({**config, "torch_dtype": dtype}, indent=2) + "\n",
                          encoding="utf-8")
    os.replace(unfinished, directory / "config.json")


def read_config(directory: Path) -> dict:
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it says what the weights beside it are")
    return read_json(path)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; fetch the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {str(content)[:40]!r}; expected an object {{name: value}}")
    return content


def blaming(path: Path, read, *arguments):
    """read(*arguments), with the file's name before whatever is wrong in what was read from it."""
    try:
        return read(*arguments)
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def shards(index: Path) -> list[str]:
    """The files that an index names. They lie beside it: no name may lead elsewhere."""
    places = read_json(index).get("weight_map")
    if (not places or not isinstance(places, dict)
            or not all(isinstance(place, str) for place in places.values())):
        raise ValueError(f"{index} has no 'weight_map' of {{tensor: file}}; fetch it again")
    for name, file in places.items():
        if Path(file).name != file or "\\" in file:
            raise ValueError(f"{index}: the file of {name} is {file!r}; expected a file beside the "
                             "index, nothing else is opened")
    return sorted(set(places.values()))


def weight_files(source) -> list[Path]:
    """The files with the weights of a public directory: one, or the shards that an index names.

    safetensors first; where none are, pytorch_model.bin; then a single .pth, MiniMind's form. A
    path of such a file stands for itself.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    names = []
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = source / f"{single}.index.json"
        if index.is_file():
            names = shards(index)
        elif (source / single).is_file():
            names = [single]
        if names:
            break
    names = names or [path.name for path in pth_files(source)]
    missing = [name for name in names if not (source / name).is_file()]
    if missing or not names:
        raise FileNotFoundError(
            f"{source} lacks {', '.join(missing) or 'model.safetensors'}; weights are read from "
            "model.safetensors or pytorch_model.bin, from the shards that an index "
            "(model.safetensors.index.json) names, or from a .pth of MiniMind's")
    return [source / name for name in names]


def pth_files(source: Path) -> list[Path]:
    """The one .pth file that source is or holds, or nothing; two are a question to the caller."""
    found = [source] if source.is_file() else sorted(source.glob("*.pth"))
    if len(found) > 1:
        raise ValueError(f"{source} holds {len(found)} .pth files: give the path of the one to "
                         f"read, such as {found[0]}")
    return found


def open_tensors(path: Path):
    """One file with weights, to be used in `with`: keys(), get_slice(name), get_tensor(name)."""
    if path.suffix != ".safetensors":
        return TorchFile(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}. It may be cut short: "
                         "compare its size, download it again") from error


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def tensor_files(source: Path) -> dict[str, Path]:
    """{tensor name: the file that holds it}, from the files' own headers."""
    held = {}
    for path in weight_files(source):
        with open_tensors(path) as file:
            held.update(dict.fromkeys(file.keys(), path))
    return held


def tensor_shapes(source: Path) -> dict[str, list[int]]:
    shapes = {}
    for path in weight_files(source):
        with open_tensors(path) as file:
            shapes.update({name: list(file.get_slice(name).get_shape()) for name in file.keys()})
    return shapes


def file_hashes(source) -> dict[str, str]:
    """{file name: sha256} of the weight files; about a second for each gigabyte."""
    hashes = {}
    for path in weight_files(source):
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        hashes[path.name] = digest.hexdigest()
    return hashes


def resolve(name) -> Path:
    """A local directory, or .pth file, as it is; else a name on the hub, fetched (once) into its
    cache: "owner/model", or "owner/model/file.pth" for one file of many.

    HF_ENDPOINT (a mirror), HF_HUB_OFFLINE and HF_HOME work as everywhere.
    """
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".pth"):
        return path
    name = str(name)
    form = r"[\w-][\w.-]*/[\w.-]+/[\w.-]+" if name.endswith(".pth") else r"[\w-][\w.-]*(/[\w.-]+)?"
    if not re.fullmatch(form, name):  # no name on the hub
        raise FileNotFoundError(f"there is no directory {path}, and no .pth file")
    try:
        return fetch(name)
    except Exception as error:  # offline, unknown, refused, full disk: the way out is the same
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        size = f" ({SIZES[name]})" if name in SIZES else ""
        files = f"config.json, the model*.safetensors{size} and the tokenizer or preprocessor files"
        repository, files = name.rsplit("/", 1) if name.endswith(".pth") else (name, files)
        raise FileNotFoundError(
            f"{name!r} is no local directory, and fetching it from {endpoint} failed: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}\n"
            f"Download {files} of {endpoint}/{repository}/tree/main into a directory and pass the "
            "path instead, or set HF_ENDPOINT to a mirror (such as HF_ENDPOINT=https://hf-mirror.com)"
        ) from error


def fetch(name: str) -> Path:
    """Download what is needed of a name on the hub, unless it lies in the cache already."""
    from huggingface_hub import hf_hub_download, snapshot_download  # local directories need none

    if name.endswith(".pth"):
        return Path(hf_hub_download(*name.rsplit("/", 1)))
    directory = Path(snapshot_download(name, allow_patterns=WANTED_FILES))
    if not list(directory.glob("*.safetensors")):  # many publish both: then this one is enough
        snapshot_download(name, allow_patterns=["pytorch_model*.bin",
                                                "pytorch_model.bin.index.json"])
    return directory
