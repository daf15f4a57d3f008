"""Our own checkpoint directory: saved whole or not at all, and checked before it is used.

    model.safetensors         what was trained so far: projector, adapters, unfrozen layers
    config.json               both towers' public configs, the projector, and the references to the
                              public weights that were not trained: name and sha256 of each file
    tokenizer.json, preprocessor_config.json, ...   written by the companions' own save(directory)
    run.json                  settings, versions, commit, data: how this came about
    training_state.pt         optimizer and data position, needed by --resume alone
    manifest.json             length and sha256 of each file above: a torn checkpoint is noticed

load.py makes a model of it.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from model.pretrained.files import (
    file_hashes,
    open_tensors,
    read_json,
    sha256,
    weight_files,
    write_json,
)
from model.pretrained.hub import TOWER_SETTINGS, resolve

STEP = re.compile(r"step_(\d+)")
MANIFEST = "manifest.json"
# What config.json has to say, and as what.
FACTS = {"language": dict, "vision": dict, "vision_feature_layer": int,
         "vision_feature_select": str, "projector": str, "pixel_shuffle": int,
         "image_token_id": int, "image_tokens": int, "template": str, "lora": (dict, type(None)),
         "bases": {part: {"name": str, "sha256": dict} for part in TOWER_SETTINGS}}
LORA = {"targets": list, "rank": int, "alpha": (int, float), "dropout": (int, float)}


# ---------------------------------------------------------------- config.json


def read_config(directory) -> dict:
    """config.json of a checkpoint, or an error that says what the directory is instead."""
    path = Path(directory) / "config.json"
    config = read_json(path) if path.is_file() else {}
    if "bases" not in config:
        raise FileNotFoundError(
            f"{directory} is not a checkpoint of this project (no config.json with 'bases' in "
            "it). Give a directory like out/sft/step_000800, or the run above it.")
    check_facts(config, FACTS, path)
    if config["lora"]:
        check_facts(config["lora"], LORA, path)
    return config


def check_facts(facts: dict, kinds: dict, path: Path) -> None:
    for name, kind in kinds.items():
        nested = isinstance(kind, dict)
        if name not in facts or not isinstance(facts[name], dict if nested else kind):
            raise ValueError(f"{path} has {name} = {str(facts.get(name))[:60]!r}, which no "
                             "checkpoint is saved with; the file is damaged")
        if nested:
            check_facts(facts[name], kind, path)


def refuse_quantized(directory, what: str) -> None:
    """Raise ValueError when the checkpoint's weights are quantized, which cannot be undone."""
    if bits := read_config(directory).get("quantize"):
        raise ValueError(f"{directory} holds weights in {bits}, which answer and no more: {what} "
                         "the checkpoint that it was made of")


def read_run(directory) -> dict:
    return read_json(Path(directory) / "run.json")


def tensor_names(directory) -> set[str]:
    """The parameters that a checkpoint holds: all that differ from the public weights."""
    with open_tensors(Path(directory) / "model.safetensors") as file:
        return set(file.keys())


def own_names(model) -> list[str]:
    """Parameters that no public file can supply: a checkpoint holds them, trained or not."""
    return [name for name, _ in model.named_parameters()
            if name.startswith("projector.") or name.endswith((".lora_a", ".lora_b"))]


# ---------------------------------------------------------------- saving


def save_checkpoint(out, step: int, tensors: dict, config: dict, run: dict, companions=(),
                    state: dict | None = None, keep: int = 3, copy_bases: bool = False) -> Path:
    """Write OUT/step_NNNNNN and delete all but the `keep` newest; return the new directory.

    tensors: {name in the VLM: tensor}. companions: objects that save(directory) themselves.
    Everything goes to a temporary name first and is renamed once it is safely on the disk: a
    directory called step_... is complete, whenever the machine stopped. Deleting begins with
    another name for the same reason. OSError says why nothing could be saved (a full disk, say);
    then nothing of it is left, and the older checkpoints are as they were.
    """
    out = Path(out)
    final, partial = out / f"step_{step:06}", out / f".partial_step_{step:06}"
    for left in [*out.glob(".partial_*"), *out.glob(".deleted_*")]:  # of a run that was killed
        shutil.rmtree(left)
    try:
        write_files(partial, tensors, config, run, companions, state, copy_bases)
    # safetensors and torch.save raise what they like when a write fails.
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if str(error).startswith("DataLoader worker"):  # it died just now; a signal brings it here
            raise
        raise OSError(f"cannot save {final}: {error}") from error
    if final.exists():  # the same step again, by a run that was resumed from an older one
        delete(final)
    os.rename(partial, final)
    flush_to_disk(out)
    # Never by name alone: one that is newer than this one is no reason to lose this one.
    for old in [path for path in checkpoints(out) if step_of(path) <= step][:-keep]:
        delete(old)
    return final


def write_files(partial: Path, tensors: dict, config: dict, run: dict, companions,
                state: dict | None, copy_bases: bool) -> None:
    """All files of a checkpoint, safely on the disk when this returns."""
    partial.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
              partial / "model.safetensors", metadata={"format": "pt"})
    for companion in companions:
        companion.save(partial)
    if copy_bases:
        config = copied_bases(config, partial)
    write_json(partial / "config.json", config)
    write_json(partial / "run.json", run)
    if state is not None:
        torch.save(state, partial / "training_state.pt")
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    write_json(partial / MANIFEST, {
        path.relative_to(partial).as_posix():
            {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files})
    for path in [*partial.rglob("*"), partial]:
        flush_to_disk(path)


def base_reference(name: str) -> dict:
    """What a checkpoint says about public weights that it does not hold."""
    return {"name": str(name), "sha256": file_hashes(resolve(name))}


def delete(checkpoint: Path) -> None:
    """Under another name first: half of a directory must not look like a checkpoint."""
    deleted = checkpoint.with_name(f".deleted_{checkpoint.name}")
    os.rename(checkpoint, deleted)
    shutil.rmtree(deleted)


def copied_bases(config: dict, directory: Path) -> dict:
    """Copy the public weights into the checkpoint; return the config that says so."""
    bases = {}
    for part, reference in config["bases"].items():
        source = resolve(reference["name"])
        (directory / part).mkdir()
        for file in [source / "config.json", *source.glob("*.index.json"), *weight_files(source)]:
            shutil.copyfile(file, directory / part / file.name)
        bases[part] = {**reference, "copied": True}
    return {**config, "bases": bases}


def flush_to_disk(path: Path) -> None:
    """A rename can reach the disk before the file's content does; fsync puts them in order."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a directory, nor needs it
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- manifest


class CorruptCheckpointError(ValueError):
    """A checkpoint is not as it was saved; the message names the file."""


def check_whole(directory: Path) -> None:
    """Raise CorruptCheckpointError when a file is missing, cut short or changed.

    Without a manifest (delete it to edit a checkpoint by hand) nothing is checked.
    """
    manifest = Path(directory) / MANIFEST
    if not manifest.is_file():
        return
    try:
        expected = [(manifest.parent / name, facts["bytes"], facts["sha256"])
                    for name, facts in read_json(manifest).items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptCheckpointError(f"{manifest} is torn: {error!r}") from error
    for path, size, _ in expected:  # sizes first: they cost nothing
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            raise CorruptCheckpointError(
                f"{path} is torn: expected {size:,} bytes, found "
                + ("no such file" if actual is None else f"{actual:,}"))
    for path, _, digest in expected:
        if (actual := sha256(path)) != digest:
            raise CorruptCheckpointError(
                f"{path} is not what was saved: sha256 {actual[:16]}..., expected "
                f"{digest[:16]}.... If you changed it yourself, delete {manifest}")


# ---------------------------------------------------------------- finding checkpoints


def checkpoints(out) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((path for path in Path(out).glob("step_*") if STEP.fullmatch(path.name)),
                  key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(STEP.fullmatch(checkpoint.name)[1])


def newest_checkpoint(out) -> Path | None:
    return (checkpoints(out) or [None])[-1]


def newest_whole(out) -> Path | None:
    """The newest checkpoint that is as it was saved, None without any; torn ones are named.

    Raises CorruptCheckpointError when there are checkpoints, and every one of them is torn.
    """
    torn = None
    for path in reversed(checkpoints(out)):
        try:
            check_whole(path)
        except CorruptCheckpointError as error:
            print(f"passing over {path.name}: {error}", file=sys.stderr)
            torn = torn or error
        else:
            if torn:
                print(f"using {path} instead", file=sys.stderr)
            return path
    if torn:
        raise CorruptCheckpointError(f"no checkpoint in {out} is whole: {torn}")
    return None


def find_model(model: str | None, runs=("out/sft", "out/pretrain")) -> Path:
    """--model DIR -> a checkpoint, checked. DIR may be a run: its newest whole one counts.

    Without --model: the newest of the first run in `runs` that has one.
    """
    for run in runs if model is None else [model]:
        if path := newest_whole(run):
            return path
    if model is None:
        raise FileNotFoundError(f"no checkpoint in {' or '.join(runs)}: run "
                                "`torchrun train_pretrain.py` first, or give --model DIR")
    check_whole(model)
    read_config(model)  # raises when it is something else
    return Path(model)
