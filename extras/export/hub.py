"""An exported directory -> a model on the hub: its card (README.md), and the upload.

    checkpoint, scores.json and metrics.jsonl of its run -> model_card.md, filled in -> README.md
    OUT -> files_to_push: names and sizes -> (with --yes) push -> the page's address

Nothing is sent before the list was shown and --yes given. The card says what is known: a licence
that is not in the list is "not known here", and of a path only its last name is shown.
HF_ENDPOINT names another hub; the token is huggingface_hub's (`hf auth login`, or HF_TOKEN).
"""

import os
from pathlib import Path

from model.pretrained.checkpoint import read_config, read_run
from model.pretrained.files import read_json

# Weights as safetensors alone: a pickle (.bin, .pt, .pth) can run code on whoever loads it.
ALLOWED = (".safetensors", ".json", ".jinja", ".md", ".png")
CURVE = "loss.png"
# As known when this was written: check the page before you publish. Others are not listed here.
APACHE = (
    "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct", "google/siglip-base-patch16-224",
    "google/siglip2-base-patch16-224", "google/siglip-so400m-patch14-384", "facebook/dinov2-small",
    "facebook/dinov2-base", "dataset/emoji/language", "dataset/emoji/vision")


def model_card(checkpoint: Path, form: str, name: str) -> str:
    """form: "transformers", "merged" or "peft". name: USER/NAME on the hub -> README.md."""
    from huggingface_hub import ModelCard, ModelCardData  # here: only --push needs the hub

    config, run = read_config(checkpoint), read_run(checkpoint)
    bases = {part: public_name(reference["name"]) for part, reference in config["bases"].items()}
    metadata = ModelCardData(
        library_name="peft" if form == "peft" else "transformers",
        pipeline_tag="text-generation" if form == "peft" else "image-text-to-text",
        base_model=[base for base in bases.values() if base.count("/") == 1] or None)
    files = run["data"].get("files") or [run["data"]]
    return str(ModelCard.from_template(
        metadata, str(Path(__file__).with_name("model_card.md")), form=form, name=name,
        config=config, run=run, settings=run["settings"], bases=bases, apache=APACHE,
        data=", ".join(f"`{Path(about['file']).name}`" for about in files),
        scores=scores_of(checkpoint), curve=CURVE if metrics_of(checkpoint) else None)) + "\n"


def public_name(name: str) -> str:
    """A name on the hub, or of the embedded towers, as it is; of any other path its last part."""
    on_hub = name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()
    return name if name in APACHE or on_hub else Path(name).name


def metrics_of(checkpoint: Path) -> Path | None:
    """What the run wrote at each step, if the checkpoint is still in its run."""
    file = checkpoint.parent / "metrics.jsonl"
    return file if file.is_file() else None


def scores_of(checkpoint: Path) -> dict:
    """scores.json of the checkpoint, of its run, or of the directory that the run is in."""
    for directory in (checkpoint, *list(checkpoint.parents)[:2]):
        if (directory / "scores.json").is_file():
            return read_json(directory / "scores.json")
    return {}


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
    from huggingface_hub import HfApi  # here: only --push needs the hub

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)
    api.create_repo(name, exist_ok=True)
    return api.upload_folder(repo_id=name, folder_path=directory,
                             commit_message="Upload model").commit_url
