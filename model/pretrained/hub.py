"""A name -> files: a local directory as it is, a name on the hub fetched (once) into its cache.

    "Qwen/Qwen2.5-0.5B" -> resolve -> a directory with config.json, weights and small files
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # presets name the embedded towers relative to it
# Which setting, and flag, names the public weights of each part.
TOWER_SETTINGS = {"language": "language_model", "vision": "vision_tower"}
# Published weight files of well-known models, in gigabytes (1e9 bytes).
GIGABYTES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 0.269, "Qwen/Qwen2.5-0.5B": 0.988,
    "Qwen/Qwen2.5-0.5B-Instruct": 0.988, "Qwen/Qwen2.5-1.5B-Instruct": 3.09,
    "Qwen/Qwen3-0.6B": 1.50,  # the tied table twice, as the head too
    "Qwen/Qwen-7B-Chat": 15.4, "jingyaogong/MiniMind2-Small": 0.103,
    "jingyaogong/minimind-3": 0.128,  # computed: two bytes of each parameter
    "google/siglip-base-patch16-224": 0.813, "google/siglip2-base-patch16-224": 1.50,
    "google/siglip-so400m-patch14-384": 3.51, "google/siglip2-base-patch32-256": 1.50,
    "jingyaogong/siglip2-base-p32-256-ve": 0.189,
    "openai/clip-vit-base-patch32": 0.605, "openai/clip-vit-base-patch16": 0.599,
    "openai/clip-vit-large-patch14": 1.71,
    "facebook/dinov2-small": 0.088, "facebook/dinov2-base": 0.346,
}
WANTED_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json",
                "tokenizer*", "*.tiktoken", "vocab.json", "merges.txt", "special_tokens_map.json",
                "generation_config.json", "preprocessor_config.json", "processor_config.json"]
# Read where a model is not published as safetensors; where it is, these hold the same again.
PICKLE_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def resolve(name) -> Path:
    """The directory of a name: local, as it is or relative to the project; else on the hub, fetched
    (once) into its cache: "owner/model". MiniMind's .pth has a name too, its path or
    "owner/model/file.pth".

    HF_ENDPOINT (a mirror), HF_HUB_OFFLINE and HF_HOME work as everywhere. FileNotFoundError says
    what to download and where to put it.
    """
    path = Path(name).expanduser()
    for local in (path, ROOT / path):
        if local.is_dir() or (local.is_file() and local.suffix == ".pth"):
            return public(local)
    name = str(name)
    form = r"[\w-][\w.-]*/[\w.-]+/[\w.-]+" if name.endswith(".pth") else r"[\w-][\w.-]*(/[\w.-]+)?"
    if not re.fullmatch(form, name):  # no name on the hub
        raise FileNotFoundError(f"there is no directory {path}, and no .pth file")
    try:
        path = fetch(name)
    except Exception as error:  # offline, unknown, refused, full disk: the way out is the same
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        size = GIGABYTES.get(name, 0)
        size = f" ({size:.1f} GB)" if size >= 1 else f" ({1000 * size:.0f} MB)" if size else ""
        files = f"config.json, the model*.safetensors{size} and the tokenizer or preprocessor files"
        repository, files = name.rsplit("/", 1) if name.endswith(".pth") else (name, files)
        raise FileNotFoundError(
            f"{name!r} is no local directory, and fetching it from {endpoint} failed: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}\n"
            f"Download {files} of {endpoint}/{repository}/tree/main into a directory and pass the "
            "path instead, or set HF_ENDPOINT to a mirror (such as HF_ENDPOINT=https://hf-mirror.com)"
        ) from error
    return public(path)


def public(path: Path) -> Path:
    """path, or the public files made of it (once) where its layout is one of extras.convert."""
    try:
        from extras.convert.public_files import converted  # here: public files need no extras
    except ModuleNotFoundError as error:
        if not error.name.startswith("extras"):
            raise
        return path
    return converted(path)


def fetch(name: str) -> Path:
    """Download what is needed of a name on the hub, unless it is in the cache already."""
    from huggingface_hub import hf_hub_download, snapshot_download  # local directories need none

    if name.endswith(".pth"):
        return Path(hf_hub_download(*name.rsplit("/", 1)))
    directory = Path(snapshot_download(name, allow_patterns=WANTED_FILES))
    if not list(directory.glob("*.safetensors")):
        snapshot_download(name, allow_patterns=PICKLE_FILES)
    return directory
