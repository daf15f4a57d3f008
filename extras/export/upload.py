"""A directory -> a model on the hub; nothing is sent before you have seen the list and said yes.

    OUT -> files_to_push: names and sizes -> (with --yes) push -> the page's address

HF_ENDPOINT names another hub; the token is huggingface_hub's (`hf auth login`, or HF_TOKEN).
"""

import os
from pathlib import Path

# Weights as safetensors alone: a pickle (.bin, .pt, .pth) can run code on whoever loads it.
ALLOWED = (".safetensors", ".json", ".jinja", ".md", ".png")


def files_to_push(directory: Path) -> list[Path]:
    """Every file of the directory. ValueError: one that should not be published."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    wrong = [path for path in files if path.suffix not in ALLOWED]
    if wrong:
        raise ValueError(f"{wrong[0]} is no file to publish: only {', '.join(ALLOWED)} go up, and "
                         "weights as safetensors alone. Take it away, or export anew")
    return files


def listing(files: list[Path], directory: Path) -> str:
    sizes = [path.stat().st_size for path in files]
    lines = [f"{size:>16,}  {path.relative_to(directory)}" for size, path in zip(sizes, files)]
    return "\n".join([*lines, f"{sum(sizes):>16,}  bytes in {len(files)} files"])


def push(directory: Path, name: str) -> str:
    """Make the repository USER/NAME where there is none, and send every file in one commit."""
    from huggingface_hub import HfApi  # here: nothing else of an export needs the network

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    api = HfApi(endpoint=endpoint)
    api.create_repo(name, exist_ok=True)
    about = api.upload_folder(repo_id=name, folder_path=directory, commit_message="Upload model")
    return about.commit_url
