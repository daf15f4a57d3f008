"""Public checkpoints: a directory or a name on the hub in, a filled model out; and back again.

Each family has one table of names, the published ones on the left and ours on the right. Loading
reads it from left to right, saving from right to left. Every tensor is accounted for on both
sides: one that we need and the file lacks, one in the file that nobody knows, or one of another
shape raises with its name. What a file holds and we knowingly leave alone stands in UNREAD.

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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from model.config import LanguageConfig, VisionConfig
from model.language import LanguageModel
from model.vision import VisionTransformer

# A line may name one tensor, or a layer, and then stands for its weight and its bias.
LANGUAGE = {
    "model.embed_tokens": "embed_tokens",
    "model.layers.{}.input_layernorm": "layers.{}.input_layernorm",
    "model.layers.{}.self_attn.q_proj": "layers.{}.self_attn.q_proj",
    "model.layers.{}.self_attn.k_proj": "layers.{}.self_attn.k_proj",
    "model.layers.{}.self_attn.v_proj": "layers.{}.self_attn.v_proj",
    "model.layers.{}.self_attn.o_proj": "layers.{}.self_attn.o_proj",
    "model.layers.{}.self_attn.q_norm": "layers.{}.self_attn.q_norm",  # Qwen3
    "model.layers.{}.self_attn.k_norm": "layers.{}.self_attn.k_norm",  # Qwen3
    "model.layers.{}.post_attention_layernorm": "layers.{}.post_attention_layernorm",
    "model.layers.{}.mlp.gate_proj": "layers.{}.mlp.gate_proj",
    "model.layers.{}.mlp.up_proj": "layers.{}.mlp.up_proj",
    "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down_proj",
    "model.norm": "norm",
    "lm_head": "lm_head",
}
SIGLIP_AND_CLIP = {
    "vision_model.embeddings.class_embedding": "class_embedding",  # CLIP
    "vision_model.embeddings.patch_embedding": "patch_embedding",
    "vision_model.embeddings.position_embedding.weight": "position_embedding",
    "vision_model.pre_layrnorm": "pre_layernorm",  # CLIP; published with this spelling
    "vision_model.encoder.layers.{}.layer_norm1": "layers.{}.layer_norm1",
    "vision_model.encoder.layers.{}.self_attn.q_proj": "layers.{}.self_attn.q_proj",
    "vision_model.encoder.layers.{}.self_attn.k_proj": "layers.{}.self_attn.k_proj",
    "vision_model.encoder.layers.{}.self_attn.v_proj": "layers.{}.self_attn.v_proj",
    "vision_model.encoder.layers.{}.self_attn.out_proj": "layers.{}.self_attn.out_proj",
    "vision_model.encoder.layers.{}.layer_norm2": "layers.{}.layer_norm2",
    "vision_model.encoder.layers.{}.mlp.fc1": "layers.{}.fc1",
    "vision_model.encoder.layers.{}.mlp.fc2": "layers.{}.fc2",
    "vision_model.post_layernorm": "post_layernorm",  # SigLIP
}
DINOV2 = {
    "embeddings.cls_token": "class_embedding",
    "embeddings.patch_embeddings.projection": "patch_embedding",
    "embeddings.position_embeddings": "position_embedding",
    "encoder.layer.{}.norm1": "layers.{}.layer_norm1",
    "encoder.layer.{}.attention.attention.query": "layers.{}.self_attn.q_proj",
    "encoder.layer.{}.attention.attention.key": "layers.{}.self_attn.k_proj",
    "encoder.layer.{}.attention.attention.value": "layers.{}.self_attn.v_proj",
    "encoder.layer.{}.attention.output.dense": "layers.{}.self_attn.out_proj",
    "encoder.layer.{}.layer_scale1.lambda1": "layers.{}.layer_scale1",
    "encoder.layer.{}.norm2": "layers.{}.layer_norm2",
    "encoder.layer.{}.mlp.fc1": "layers.{}.fc1",
    "encoder.layer.{}.mlp.fc2": "layers.{}.fc2",
    "encoder.layer.{}.layer_scale2.lambda1": "layers.{}.layer_scale2",
    "layernorm": "post_layernorm",
}
TABLES = {
    "llama": LANGUAGE, "qwen2": LANGUAGE, "qwen3": LANGUAGE,
    "siglip_vision_model": SIGLIP_AND_CLIP, "clip_vision_model": SIGLIP_AND_CLIP,
    "dinov2": DINOV2,
}
# A model that was saved as part of a larger one has this before its names, one saved alone not.
PREFIX = {"llama": "model.", "qwen2": "model.", "qwen3": "model.",
          "siglip_vision_model": "vision_model.", "clip_vision_model": "vision_model.",
          "dinov2": ""}
# DINOv2 publishes these with axes of length 1 in front, ready to be added to a batch.
LEADING_ONES = {"embeddings.cls_token": 2, "embeddings.position_embeddings": 1}

# Known, not needed, not read. Patterns of published names without the family's PREFIX.
UNREAD = {
    "llama": ["layers.*.self_attn.rotary_emb.inv_freq"],  # a table that is computed here
    "qwen2": [],
    "qwen3": [],
    "siglip_vision_model": [
        "head.*",  # pools the patches into one vector: we want the patches
        "embeddings.position_ids", "text_model.*", "logit_scale", "logit_bias",
    ],
    "clip_vision_model": [
        "post_layernorm.*",  # normalises the class token alone, which is left out here
        "embeddings.position_ids", "text_model.*", "logit_scale",
        "visual_projection.weight", "text_projection.weight",
    ],
    "dinov2": ["embeddings.mask_token"],  # stands for hidden patches while DINOv2 is trained
}

# What the weights of well-known models weigh, for the message when they cannot be fetched.
SIZES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "269 MB", "Qwen/Qwen2.5-0.5B-Instruct": "988 MB",
    "Qwen/Qwen2.5-1.5B-Instruct": "3.1 GB", "Qwen/Qwen3-0.6B": "1.5 GB",
    "google/siglip-base-patch16-224": "813 MB", "google/siglip2-base-patch16-224": "1.5 GB",
    "openai/clip-vit-base-patch16": "599 MB", "openai/clip-vit-large-patch14": "1.7 GB",
    "facebook/dinov2-small": "88 MB", "facebook/dinov2-base": "346 MB",
}
WANTED_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json",
                "tokenizer*", "*.tiktoken", "vocab.json", "merges.txt", "special_tokens_map.json",
                "generation_config.json", "preprocessor_config.json"]


def load_language(name, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A public decoder from a directory or from the hub, its numbers in dtype."""
    directory = resolve(name)
    config = LanguageConfig.from_public(read_config(directory))
    with torch.device("meta"):
        model = LanguageModel(config)
    unread = UNREAD[config.model_type] + ["lm_head.weight"] * config.tie_word_embeddings
    return fill(model, directory, unread, dtype)


def load_vision(name, dtype: torch.dtype = torch.float32,
                feature_layer: int = -1) -> VisionTransformer:
    """A public vision tower from a directory or from the hub, also out of a whole CLIP or SigLIP.

    Blocks after feature_layer are not needed for it and not read.
    """
    directory = resolve(name)
    config = VisionConfig.from_public(read_config(directory), feature_layer)
    with torch.device("meta"):
        model = VisionTransformer(config)
    unread = list(UNREAD[config.model_type])
    if feature_layer != -1:
        unread += ["post_layernorm.*", "layernorm.*"]
        unread += [f"encoder.layer*.{number}.*"  # "encoder.layers." or "encoder.layer."
                   for number in range(len(model.layers), config.num_hidden_layers)]
    return fill(model, directory, unread, dtype)


def fill(model, directory: Path, unread: list[str], dtype: torch.dtype):
    """Put the tensors of directory into model, which stands on the meta device."""
    family, held = model.config.model_type, tensor_files(directory)
    wanted = public_names(model)
    prefix = PREFIX[family]
    if not any(name.startswith(prefix) for name in held):
        wanted = {name.removeprefix(prefix): ours for name, ours in wanted.items()}
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - held.keys())]
    problems += [f"unknown: {name}" for name in sorted(held.keys() - wanted.keys())
                 if not any(fnmatch(name.removeprefix(prefix), u) for u in unread)]
    target, tensors = model.state_dict(), {}
    for path in sorted({held[name] for name in wanted if name in held}):
        with safe_open(path, framework="pt") as file:
            for name, ours in wanted.items():
                if held.get(name) != path:
                    continue
                shape = public_shape(name.removeprefix(prefix), target[ours])
                found = list(file.get_slice(name).get_shape())  # from the header: reads no data
                if found != shape:
                    problems.append(f"misshapen: {name} is {found} in the file, and config.json "
                                    f"asks for {shape}")
                elif not problems:
                    tensors[ours] = file.get_tensor(name).to(dtype).reshape(target[ours].shape)
    if problems:
        more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"{directory}: the weights do not fit a {family} as config.json "
                         "describes it:\n  " + "\n  ".join(problems[:12]) + more)
    model.load_state_dict(tensors, assign=True)
    return model


def public_names(model: nn.Module) -> dict[str, str]:
    """{published name: our name} for every tensor of model."""
    table = {ours: public for public, ours in TABLES[model.config.model_type].items()}
    names = {}
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
        names[public.format(number.group()) if number else public] = ours
    return names


def public_shape(name: str, tensor: torch.Tensor) -> list[int]:
    return [1] * LEADING_ONES.get(name, 0) + list(tensor.shape)


def save_language(model: LanguageModel, directory) -> None:
    """Write config.json and model.safetensors as other libraries read them."""
    tensors = {public: model.state_dict()[ours] for public, ours in public_names(model).items()}
    save(directory, model.config.to_public(), tensors)


def save_vision(model: VisionTransformer, directory, extra: dict | None = None) -> None:
    """Write config.json and model.safetensors as other libraries read them.

    extra: tensors {published name: tensor} that the tower itself does not hold, such as SigLIP's
    pooling head ("head.probe", ...) or CLIP's post_layernorm: loading them back leaves them alone.
    A tower with an earlier feature_layer has no later blocks to write; it loads again with that
    feature_layer only.
    """
    state, prefix = model.state_dict(), PREFIX[model.config.model_type]
    tensors = {public: state[ours].reshape(public_shape(public, state[ours]))
               for public, ours in public_names(model).items()}
    config = model.config.to_public()
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
    return json.loads(path.read_text(encoding="utf-8"))


def weight_files(directory) -> list[Path]:
    """The safetensors files of a public directory: one, or the shards that its index names."""
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(shards))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)}; weights are read from model.safetensors or "
            "from the shards of model.safetensors.index.json (pytorch_model.bin is not read: "
            "such a file can run code)"
        )
    return [directory / name for name in names]


def tensor_files(directory: Path) -> dict[str, Path]:
    """{tensor name: the file that holds it}, from the files' own headers."""
    held = {}
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            held.update(dict.fromkeys(file.keys(), path))
    return held


def file_hashes(directory) -> dict[str, str]:
    """{file name: sha256} of the weight files; about a second for each gigabyte."""
    hashes = {}
    for path in weight_files(directory):
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        hashes[path.name] = digest.hexdigest()
    return hashes


def resolve(name) -> Path:
    """A local directory as it is; else a name on the hub, fetched (once) into its cache.

    HF_ENDPOINT (a mirror), HF_HUB_OFFLINE and HF_HOME work as everywhere.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    name = str(name)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):  # no hub name has this form
        raise FileNotFoundError(f"there is no directory {path}")
    try:
        from huggingface_hub import snapshot_download  # here: a local directory needs no hub

        return Path(snapshot_download(name, allow_patterns=WANTED_FILES))
    except Exception as error:  # offline, unknown, refused, full disk: the way out is the same
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        size = f" ({SIZES[name]})" if name in SIZES else ""
        raise FileNotFoundError(
            f"{name!r} is no local directory, and fetching it from {endpoint} failed: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}\n"
            f"Download config.json, the model*.safetensors{size} and the tokenizer or preprocessor "
            f"files of {endpoint}/{name}/tree/main into a directory and pass its path instead, "
            "or set HF_ENDPOINT to a mirror (such as HF_ENDPOINT=https://hf-mirror.com)"
        ) from error
