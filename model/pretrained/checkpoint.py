"""Our own checkpoint directory: saved whole or not at all, loaded for chat or to train on.

    VLM + config + companions -> OUT/step_000100/ -> load_checkpoint -> VLM

    model.safetensors         what was trained so far: projector, adapters, opened layers
    config.json               both towers' public configs, the projector, and the references to the
                              public weights that were not trained: name and sha256 of each file
    tokenizer.json, preprocessor_config.json, ...   written by the companions' own save(directory)
    run.json                  settings, versions, commit, data: how this came about
    training_state.pt         optimizer and data position, needed by --resume alone
    manifest.json             length and sha256 of each file above: a torn checkpoint is noticed
"""

import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from extras.fast.quantize import BITS, quantize
from model.config import LanguageConfig, VisionConfig, VLMConfig
from model.language import LanguageModel
from model.lora import add_lora
from model.pretrained.hub import (
    all_tensors,
    file_hashes,
    open_tensors,
    read_json,
    resolve,
    unusable,
    weight_files,
)
from model.pretrained.manifest import TornError, check_whole, write_manifest
from model.pretrained.meta_device import meta_device
from model.projector import Projector
from model.vision import VisionTransformer
from model.vlm import VLM

ROOT = Path(__file__).resolve().parents[2]  # presets name the embedded towers relative to it
STEP = re.compile(r"step_(\d+)")
# What config.json has to say, and as what.
FACTS = {"language": dict, "vision": dict, "vision_layer": int, "projector": str,
         "pixel_shuffle": int, "image_token_id": int, "lora": (dict, type(None)), "bases": dict}
LORA = {"targets": list, "rank": int, "alpha": (int, float), "dropout": (int, float)}
BASES, BASE = ("language", "vision"), {"name": str, "sha256": dict}


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
    write_manifest(partial)
    for path in [*partial.rglob("*"), partial]:
        flush_to_disk(path)


def delete(checkpoint: Path) -> None:
    """Under another name first: half of a directory must not look like a checkpoint."""
    deleted = checkpoint.with_name(f".deleted_{checkpoint.name}")
    os.rename(checkpoint, deleted)
    shutil.rmtree(deleted)


def base_reference(name: str) -> dict:
    """What a checkpoint says about public weights that it does not hold."""
    return {"name": str(name), "sha256": file_hashes(find_base(name))}


def copied_bases(config: dict, directory: Path) -> dict:
    """Copy the public weights into the checkpoint; return the config that says so."""
    bases = {}
    for part, reference in config["bases"].items():
        source = find_base(reference["name"])
        beside = base_directory(source)
        (directory / part).mkdir()
        facts = [beside / "config.json"] if (beside / "config.json").is_file() else []  # .pth: none
        for file in [*facts, *source.glob("*.index.json"), *weight_files(source)]:
            shutil.copyfile(file, directory / part / file.name)
        bases[part] = {**reference, "copied": True}
    return {**config, "bases": bases}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """A rename can reach the disk before the file's content does; fsync puts them in order."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a directory, nor needs it
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- loading


def load_checkpoint(directory, dtype: torch.dtype | None = torch.float32,
                    language: str | None = None, vision: str | None = None) -> VLM:
    """A checkpoint directory -> the whole VLM, with its adapters in place, in evaluation mode.

    language, vision: where the public towers lie now, if not where they were in training. Their
    files must be the same to the last bit; FileNotFoundError and ValueError say what is not.
    A checkpoint in few bits (config.json has "quantize") keeps them, whatever dtype says.
    dtype None: each number as its file holds it, what was trained in float32.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors = all_tensors(directory / "model.safetensors")
    features = config.get("features", "patches")  # the first checkpoints had no choice
    with told_with(directory / "config.json"):
        language_config = LanguageConfig.from_public(config["language"])
        vision_config = VisionConfig.from_public(config["vision"], config["vision_layer"], features)
        projector = Projector(config["projector"], vision_config.hidden_size,
                              language_config.hidden_size, config["pixel_shuffle"])
    moved = {"language": language, "vision": vision}

    def tower(part, make, wanted, load):
        with meta_device():  # no memory yet: perhaps every weight is in our own file
            model = make(wanted)
            if part == "language" and config.get("quantize"):
                quantize(model, config["quantize"])
        lacking = [name for name, _ in model.named_parameters() if f"{part}.{name}" not in tensors]
        if not lacking:
            return model.to_empty(device="cpu")
        if part == "language" and config.get("quantize"):
            raise ValueError(f"{directory / 'model.safetensors'} lacks {part}.{lacking[0]} (and "
                             f"{len(lacking) - 1} more): the file is not complete, and no public "
                             f"one holds weights in {config['quantize']}")
        reference = config["bases"][part]
        base = base_of(directory, part, reference, moved[part])
        with ThreadPoolExecutor() as beside:  # one core hashes while another loads
            check = beside.submit(check_base, base, directory, part, reference)
            try:
                model = load(str(base))
            finally:
                check.result()  # a file that is not the same is the cause of whatever else is wrong
        if model.config != wanted:
            raise ValueError(f"the config.json of the {part} tower says {model.config}, but "
                             f"{directory} was trained with {wanted}: get the same release")
        return model

    model = VLM(
        VLMConfig(language_config, vision_config, config["projector"], config["pixel_shuffle"],
                  config["image_token_id"]),
        tower("language", LanguageModel, language_config,
              lambda name: LanguageModel.from_pretrained(name, dtype)),
        tower("vision", VisionTransformer, vision_config,
              lambda name: VisionTransformer.from_pretrained(
                  name, dtype, feature_layer=config["vision_layer"], features=features)),
        projector)
    if config["lora"]:
        with told_with(directory / "config.json"):
            add_lora(model.language, **config["lora"])
    put_tensors(model, tensors, directory, dtype)
    return (model if dtype is None else model.to(dtype)).eval()


@contextmanager
def told_with(file: Path):
    """What is wrong inside is wrong in this file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def put_tensors(model, tensors: dict, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Put the checkpoint's tensors in the model's place; every one must have its place there.

    dtype: of fractions; None: as the file holds them.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            found = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise ValueError(f"{directory / 'model.safetensors'}: {name} has shape "
                             f"{tuple(tensor.shape)}, the model has {found}")
        whole_numbers = not parameters[name].is_floating_point()  # of a quantized matrix
        problem = "" if whole_numbers else unusable(tensor)
        if whole_numbers and tensor.dtype != parameters[name].dtype:
            problem = f"{tensor.dtype}, expected {parameters[name].dtype}"
        if problem:
            raise ValueError(f"{directory / 'model.safetensors'}: {name} holds {problem}")
        # Not copied into what is there: a base in bf16 would round what was trained in float32.
        # Nor the mapped file itself, which --keep may delete: copied once, in the wanted dtype.
        wanted = tensor.dtype if whole_numbers or dtype is None else dtype
        parameters[name].data = tensor.to(wanted, copy=True)
    missing = [name for name in own_names(model) if name not in tensors]
    if missing:
        raise ValueError(f"{directory / 'model.safetensors'} lacks {missing[0]}"
                         f" (and {len(missing) - 1} more): the file is not complete")


def own_names(model) -> list[str]:
    """Parameters that no public file can supply: a checkpoint holds them, trained or not."""
    return [name for name, _ in model.named_parameters()
            if name.startswith("projector.") or name.endswith((".lora_a", ".lora_b"))]


def read_config(directory) -> dict:
    """config.json of a checkpoint, or an error that says what the directory is instead."""
    path = Path(directory) / "config.json"
    config = read_json(path) if path.is_file() else {}
    if "bases" not in config:
        raise FileNotFoundError(
            f"{directory} is not a checkpoint of this project (no config.json with 'bases' in "
            "it). Give a directory like out/sft/step_000800, or the run above it.")
    check_facts(config, FACTS, path)
    check_facts(config["bases"], dict.fromkeys(BASES, dict), path)
    for part in BASES:
        check_facts(config["bases"][part], BASE, path)
    if config["lora"]:
        check_facts(config["lora"], LORA, path)
    if config.get("quantize") not in (None, *BITS):
        raise ValueError(f"{path} has quantize = {config['quantize']!r}; expected one of "
                         f"{', '.join(BITS)}")
    return config


def refuse_quantized(directory, what: str) -> None:
    """Raise ValueError when the checkpoint's numbers are rounded to few bits, for good."""
    if bits := read_config(directory).get("quantize"):
        raise ValueError(f"{directory} holds weights in {bits}, which answer and no more: {what} "
                         "the checkpoint that it was made of")


def check_facts(found: dict, kinds: dict, path: Path) -> None:
    for name, kind in kinds.items():
        if name not in found or not isinstance(found[name], kind):
            raise ValueError(f"{path} has {name} = {str(found.get(name))[:60]!r}, which no "
                             "checkpoint is saved with; the file is damaged")


def tensor_names(directory) -> set[str]:
    """The parameters that a checkpoint holds: all that differ from the public weights."""
    with open_tensors(Path(directory) / "model.safetensors") as file:
        return set(file.keys())


def read_run(directory) -> dict:
    return read_json(Path(directory) / "run.json")


# ---------------------------------------------------------------- public weights


def find_base(name) -> Path:
    """A tower's directory, or MiniMind's .pth file: as given, else relative to the project, else
    from the hub."""
    for path in (Path(name), ROOT / name):
        if path.is_dir() or (path.suffix == ".pth" and path.is_file()):
            return path
    return Path(resolve(str(name)))


def base_directory(base: Path) -> Path:
    """Where the small files of a tower lie, such as its tokenizer's: a .pth has them beside it."""
    return base.parent if base.is_file() else base


def base_of(directory: Path, part: str, reference: dict, moved: str | None) -> Path:
    """The directory of the public weights that this checkpoint stands on, or an error."""
    name = moved or (directory / part if reference.get("copied") else reference["name"])
    try:
        return find_base(name)
    except Exception as error:
        raise FileNotFoundError(
            f"{stands_on(directory, part, reference)}, and {str(name)!r} was found neither here, "
            f"nor in {ROOT}, nor on the hub ({error}). Put the directory back, or say where it is "
            f"now with --{part} DIR."
        ) from error


def check_base(base: Path, directory: Path, part: str, reference: dict) -> None:
    """Raise where a file of base is missing, or not the one that was trained with."""
    found = file_hashes(base)
    for file, expected in reference["sha256"].items():
        if found.get(file) != expected:
            raise ValueError(
                f"{stands_on(directory, part, reference)}, but {base / file} differs from the file "
                f"it was trained with: sha256 {str(found.get(file))[:16]}..., expected "
                f"{expected[:16]}.... Get the same release of {reference['name']}, or give "
                f"another place with --{part} DIR.")


def stands_on(directory: Path, part: str, reference: dict) -> str:
    return f"{directory} stands on the {part} weights of {reference['name']!r}"


# ---------------------------------------------------------------- finding checkpoints


def checkpoints(out) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in Path(out).glob("step_*") if STEP.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(STEP.fullmatch(checkpoint.name)[1])


def newest_checkpoint(out) -> Path | None:
    return (checkpoints(out) or [None])[-1]


def newest_whole(out) -> Path | None:
    """The newest checkpoint that is as it was saved, None without any; torn ones are named.

    Raises TornError when there are checkpoints, and every one of them is torn.
    """
    torn = None
    for path in reversed(checkpoints(out)):
        try:
            check_whole(path)
        except TornError as error:
            print(f"passing over {path.name}: {error}", file=sys.stderr)
            torn = torn or error
            continue
        if torn:
            print(f"using {path} instead", file=sys.stderr)
        return path
    if torn:
        raise TornError(f"no checkpoint in {out} is whole: {torn}")
    return None


def find_model(model: str | None, runs=("out/sft", "out/pretrain")) -> Path:
    """--model DIR -> a checkpoint, checked. DIR may be a run: its newest whole one counts.

    Without --model: the newest of the first run in `runs` that has one.
    """
    if model is None:
        for run in runs:
            if path := newest_whole(run):
                return path
        raise FileNotFoundError(f"no checkpoint in {' or '.join(runs)}: run "
                                "`torchrun train_pretrain.py` first, or give --model DIR")
    if path := newest_whole(model):
        return path
    check_whole(model)
    read_config(model)  # raises when it is something else
    return Path(model)
