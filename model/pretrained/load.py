"""Weights -> models: public towers, and checkpoints of our own. The models do not know this file.

    load_language, load_vision: a directory or a name on the hub -> config.json -> an empty model
        -> the tensors of its weight files, by the family's names
    load_checkpoint: our directory -> towers (from there, or public ones) + what was trained -> VLM

Every tensor is accounted for on both sides: one that is needed and missing, one in the file that
nobody knows, one of another shape or of no finite fractions raises with its name. What a file
holds and is knowingly left alone is listed as the family's `unread`.

The files are memory-mapped and a model is built under meta_device, so a tensor goes straight
from the file to where it belongs: there is never a second copy of the weights.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch

from model.config import LanguageConfig, VisionConfig
from model.language import LanguageModel
from model.lora import add_lora
from model.pretrained.checkpoint import own_names, read_config
from model.pretrained.families import family_of, public_names, public_shape
from model.pretrained.files import (
    all_tensors,
    file_hashes,
    open_tensors,
    read_json,
    weight_files,
    with_filename,
)
from model.pretrained.hub import ROOT, TOWER_SETTINGS, resolve
from model.pretrained.meta_device import meta_device
from model.pretrained.public_config import (
    FEW_BITS,
    read_language_config,
    read_vision_config,
    read_vlm_config,
)
from model.vision import VisionTransformer
from model.vlm import VLM, build_model

# Ends of names beside weights in few bits: GPTQ and AWQ, bitsandbytes, fp8, compressed-tensors.
QUANTIZED = (".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB", ".weight_scale",
             ".weight_scale_inv", ".weight_packed")

# ---------------------------------------------------------------- public towers


def load_language(name, dtype: torch.dtype | None = torch.float32) -> LanguageModel:
    """A public decoder from a directory or from the hub, in dtype.

    dtype None: as the file holds it, and then it is the mapped file itself, which takes no memory
    until it is read.
    """
    directory = resolve(name)
    config = read_public(directory, read_language_config)
    return load_tensors(LanguageModel, config, directory, dtype)


def load_vision(name, dtype: torch.dtype | None = torch.float32, feature_layer: int = -1,
                features: str = "patches") -> VisionTransformer:
    """A public vision tower from a directory or from the hub, also out of a whole CLIP or SigLIP.

    Blocks after feature_layer are not needed for it and not read. dtype None: as in the file.
    """
    directory = resolve(name)
    config = read_public(directory, read_vision_config, feature_layer, features)
    with meta_device():
        whole = VisionTransformer(replace(config, feature_layer=-1))
    return load_tensors(VisionTransformer, config, directory, dtype, unread=[*public_names(whole)])


def read_public(directory: Path, read, *options):
    path = directory / "config.json"
    if (directory / "adapter_config.json").is_file():
        raise ValueError(f"{directory} holds an adapter of peft (adapter_config.json), which would "
                         "not be used: give its base as --language_model and the directory as "
                         "--lora_from, or merge the two with peft (merge_and_unload)")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it says what the weights beside it are")
    public = read_json(path)
    with with_filename(path):
        return read(public, *options)


def load_tensors(kind: type, config, source: Path, dtype: torch.dtype | None, unread=()):
    """A model of this kind and config, with the tensors of the weight files of source.

    unread: public names that are left alone, beside the family's.
    """
    family = family_of(config.model_type)
    unread = [*family.unread, *(name.removeprefix(family.prefix) for name in unread)]
    files, held = {}, {}
    for path in weight_files(source):
        with open_tensors(path) as file:
            files.update(dict.fromkeys(file.keys(), path))
    if quantized := [name for name in files if name.endswith(QUANTIZED)]:
        raise ValueError(f"{files[quantized[0]]} has {quantized[0]}: {FEW_BITS}")
    tied = getattr(config, "tie_word_embeddings", False)
    if tied and has_own_head(files, family.prefix):
        print(f"{source}: config.json ties the head to the embedding table, but the file has "
              "another one, lm_head.weight: it is used, as in transformers", file=sys.stderr)
        config = replace(config, tie_word_embeddings=False)
    with meta_device():
        model = kind(config)
    expected, prefix = public_names(model), family.prefix
    if not any(name.startswith(prefix) for name in files):
        expected = {name.removeprefix(prefix): ours for name, ours in expected.items()}
    if tied and "lm_head.weight" in files:  # of its two names a file may hold this one alone
        table = next(name for name, ours in expected.items() if ours == "embed_tokens.weight")
        if table not in files:
            expected["lm_head.weight"] = expected.pop(table)
    for path in weight_files(source):
        with open_tensors(path) as file:
            held.update({name: file.get_tensor(name) for name in file.keys() if name in expected})
    problems = [f"missing: {name}" for name in sorted(expected.keys() - files.keys())]
    problems += [f"unknown: {name}" for name in sorted(files.keys() - expected.keys())
                 if not any(fnmatch(name.removeprefix(prefix), pattern) for pattern in unread)]
    state, tensors = model.state_dict(), {}
    for name, tensor in held.items():
        ours = expected[name]
        shape = public_shape(ours, state[ours], family)
        if list(tensor.shape) != shape:
            problems.append(f"misshapen: {name} is {list(tensor.shape)} in the file, and "
                            f"config.json asks for {shape}")
        elif not problems:  # else its numbers need not be read
            if reason := unusable(tensor):
                problems.append(f"{reason}: {name} in {files[name].name}")
            else:
                tensors[ours] = tensor.to(dtype or tensor.dtype).view(state[ours].shape)
    if problems:
        more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"{source}: the weights do not fit a {model.config.model_type} as "
                         "config.json describes it:\n  " + "\n  ".join(problems[:12]) + more)
    model.load_state_dict(tensors, assign=True)
    return model


def has_own_head(files: dict[str, Path], prefix: str) -> bool:
    """Whether the file holds a head that is not the embedding table a second time. What training
    or merge_and_unload leaves of a head has the config.json of the base."""
    pair = []
    for name in ("lm_head.weight", f"{prefix}embed_tokens.weight", "embed_tokens.weight"):
        if name in files:
            with open_tensors(files[name]) as file:
                pair.append(file.get_tensor(name))
    if "lm_head.weight" not in files or len(pair) < 2:
        return False
    if pair[0].dtype != pair[1].dtype:
        pair = [tensor.float() for tensor in pair]
    return not torch.equal(*pair)


def unusable(tensor: torch.Tensor) -> str:
    """Why it cannot be a weight; "" if it can. Reads the tensor once, which loading it would do."""
    if not tensor.is_floating_point():
        return f"no plain fractions but {str(tensor.dtype).removeprefix('torch.')}"
    # A NaN or an infinity comes through a sum. (The smallest dtypes cannot be summed.)
    wide = tensor.float() if tensor.itemsize < 2 else tensor
    return "" if wide.sum(dtype=torch.float32).isfinite() else "not finite"


# ---------------------------------------------------------------- checkpoints of our own


def load_checkpoint(directory, dtype: torch.dtype | None = torch.float32,
                    language: str | None = None, vision: str | None = None) -> VLM:
    """A checkpoint directory -> the whole VLM, with its adapters in place, in evaluation mode.

    language, vision: where the public towers are now, if not where they were in training. Their
    files must be the same to the last bit; FileNotFoundError and ValueError say what is not.
    A quantized checkpoint (config.json has "quantize") stays so, whatever dtype says.
    dtype None: each weight as its file holds it, trained ones in float32.
    """
    directory = Path(directory)
    config, file = read_config(directory), directory / "config.json"
    tensors = all_tensors(directory / "model.safetensors")
    with with_filename(file):
        vlm_config = read_vlm_config(config)
    towers = {part: load_tower(part, getattr(vlm_config, part), config, tensors, directory,
                               moved, dtype)
              for part, moved in (("language", language), ("vision", vision))}
    with with_filename(file):
        model = build_model(vlm_config, **towers)
        if config["lora"]:
            add_lora(model.language, **config["lora"])
    put_tensors(model, tensors, directory, dtype)
    return (model if dtype is None else model.to(dtype)).eval()


def load_tower(part: str, expected: LanguageConfig | VisionConfig, config: dict, tensors: dict,
               directory: Path, moved: str | None, dtype: torch.dtype | None):
    """The tower `part`: empty where our own file holds every weight of it, else out of the public
    files that the checkpoint refers to, which must be those that it was trained with."""
    quantized = part == "language" and config.get("quantize")
    with with_filename(directory / "config.json"), meta_device():
        model = (LanguageModel if part == "language" else VisionTransformer)(expected)
        if quantized:
            from extras.fast.quantize import quantize  # here: only quantized checkpoints need it

            quantize(model, quantized)
    missing = [name for name, _ in model.named_parameters() if f"{part}.{name}" not in tensors]
    if not missing:
        return model.to_empty(device="cpu")
    if quantized:
        raise ValueError(f"{directory / 'model.safetensors'} lacks {part}.{missing[0]} (and "
                         f"{len(missing) - 1} more): the file is not complete, and no public "
                         f"one holds weights in {quantized}")
    reference = config["bases"][part]
    base = find_base(directory, part, reference, moved)
    with ThreadPoolExecutor() as executor:  # one core hashes while another loads
        check = executor.submit(check_base, base, directory, part, reference)
        try:
            model = (load_language(base, dtype) if part == "language" else load_vision(
                base, dtype, expected.feature_layer, expected.features))
        finally:
            check.result()  # a file that is not the same is the cause of whatever else is wrong
    if model.config != expected:
        raise ValueError(f"the config.json of the {part} tower says {model.config}, but "
                         f"{directory} was trained with {expected}: get the same release")
    return model


def put_tensors(model, tensors: dict, directory: Path, dtype: torch.dtype | None) -> None:
    """Put the checkpoint's tensors into the model, which must have a parameter for each.

    dtype: of fractions; None: as the file holds them.
    """
    parameters, file = dict(model.named_parameters()), directory / "model.safetensors"
    for name, tensor in tensors.items():
        ours = parameters.get(name)
        if ours is None or ours.shape != tensor.shape:
            shape = "no such parameter" if ours is None else tuple(ours.shape)
            raise ValueError(f"{file}: {name} has shape {tuple(tensor.shape)}, the model has "
                             f"{shape}")
        integers = not ours.is_floating_point()  # of a quantized matrix
        problem = unusable(tensor) if not integers else (
            tensor.dtype != ours.dtype and f"{tensor.dtype}, expected {ours.dtype}")
        if problem:
            raise ValueError(f"{file}: {name} holds {problem}")
        # Not copied into what is there: a base in bf16 would round what was trained in float32.
        # Nor the mapped file itself, which may be deleted (--save_total_limit): copied once.
        final = tensor.dtype if integers or dtype is None else dtype
        ours.data = tensor.to(final, copy=True)
    missing = [name for name in own_names(model) if name not in tensors]
    if missing:
        raise ValueError(f"{file} lacks {missing[0]} (and {len(missing) - 1} more): the file is "
                         "not complete")


def find_base(directory: Path, part: str, reference: dict, moved: str | None) -> Path:
    """The directory of the public weights that this checkpoint refers to, or an error."""
    name = moved or (directory / part if reference.get("copied") else reference["name"])
    try:
        return resolve(name)
    except Exception as error:
        raise FileNotFoundError(wrong_base(
            directory, part, reference, f"{str(name)!r} was found neither here, nor in {ROOT}, nor "
            f"on the hub ({error})")) from error


def check_base(base: Path, directory: Path, part: str, reference: dict) -> None:
    """Raise where a file of base is missing, or not the one that was trained with."""
    hashes = file_hashes(base)
    for file, expected in reference["sha256"].items():
        if hashes.get(file) != expected:
            raise ValueError(wrong_base(
                directory, part, reference, f"{base / file} differs from the file it was trained "
                f"with: sha256 {str(hashes.get(file))[:16]}..., expected {expected[:16]}..."))


def wrong_base(directory: Path, part: str, reference: dict, problem: str) -> str:
    return (f"{directory} stands on the {part} weights of {reference['name']!r}, and {problem}. "
            f"Get the same release, or say where it is now with --{TOWER_SETTINGS[part]} DIR.")
