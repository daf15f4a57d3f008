"""Where a run starts, and what it writes so that it can be resumed from there.

    flags -> read_settings -> settings, and the checkpoint to start from
    --out, checkpoint -> restore -> TrainerState, and the optimizer as it was
    ModelBundle, optimizer, TrainerState -> save -> OUT/step_NNNNNN
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from model.pretrained.checkpoint import (
    CorruptCheckpointError,
    checkpoints,
    find_model,
    flush_to_disk,
    newest_whole,
    read_config,
    read_run,
    refuse_quantized,
    save_checkpoint,
    step_of,
)
from model.pretrained.hub import TOWER_SETTINGS
from model.pretrained.pickle_loader import load_plain
from training.errors import StopTraining
from training.presets import read_flags, resolve
from training.run_metadata import FILES, read_object
from training.settings import CHANGES_CURVE, FREE, ON_RESUME
from training.steps import TrainerState
from training.writable import check_directory, free_name


@dataclass(frozen=True)
class Start:
    stage: str  # "pretrain" or "sft": which recipe of the preset counts
    arguments: list[str]  # of the command line
    checkpoint: Path | None  # to start from; None: the public towers and a new projector
    changes: list[dict]  # of settings since the run began, each with the first step made with it


def read_settings(stage: str, description: str, arguments=None, start_from=()) -> tuple:
    """-> the settings of the run, and its Start.

    description: the script's docstring. start_from: runs whose newest checkpoint is taken when no
    flag says otherwise.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = read_flags(description, stage, arguments)
    if "list_presets" in flags:
        from extras.preset_list import list_presets  # here: it builds models to count them

        print(list_presets())
        sys.exit(0)
    try:
        check_directory("--out", flags.out)
        checkpoint, earlier = find_start(flags, start_from)
    except (CorruptCheckpointError, FileNotFoundError) as error:
        raise SystemExit(f"cannot start: {error}. Without --resume the run starts anew, with "
                         "--model none from the public towers") from error
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot start: {error}") from error
    settings = resolve(flags, stage, earlier)
    # On a first start there is nothing to resume: the run starts from another run's checkpoint.
    settings.resume = checkpoint is not None and checkpoint.parent == Path(settings.out)
    if settings.report_to:
        from extras.trackers import check_installed  # here: a tracker is an extra

        check_installed(settings.report_to)
    changes = find_changes(settings, read_run(checkpoint)) if settings.resume else []
    return settings, Start(stage, arguments, checkpoint, changes)


def find_start(flags, start_from=()) -> tuple[Path | None, dict]:
    """-> the checkpoint to load, or None, and the settings that it brings: all of its run's to
    resume, the model's facts alone to train on."""
    if flags.resume and (checkpoint := newest_whole(flags.out)):
        return checkpoint, settings_of_run(flags, checkpoint)
    if flags.model == "none" or (flags.model is None and not start_from):
        return None, {}
    checkpoint = find_model(flags.model, runs=start_from)
    refuse_quantized(checkpoint, "train on from")
    if Path(flags.out).resolve() in checkpoint.resolve().parents:
        raise ValueError(f"the new run would write beside its own start, {checkpoint}: give "
                         "another --out, or --resume to go on with that run")
    return checkpoint, model_facts(flags, checkpoint)


def settings_of_run(flags, checkpoint: Path) -> dict:
    """The settings of the run to resume. ValueError where a flag would make it another run."""
    run, earlier = read_object(Path(flags.out) / "run.json"), read_run(checkpoint)["settings"]
    # What was changed after this checkpoint was saved still holds.
    earlier |= {name: value for name, value in run.get("settings", {}).items()
                if ON_RESUME.get(name) == CHANGES_CURVE}
    stops = [launch.get("not_finite_step") or 0 for launch in run.get("launches", [])]
    allowed = [FREE]
    if max(stops, default=0) > step_of(checkpoint):  # a loss that was not finite stopped it
        allowed.append(CHANGES_CURVE)
    for name, value in vars(flags).items():
        if value not in (None, earlier.get(name)) and ON_RESUME[name] not in allowed:
            raise ValueError(f"--{name} {value}: the run to resume, {checkpoint}, was started with "
                             f"{earlier.get(name)}. Leave the flag out, or start a new run with "
                             "another --out.")
    return earlier


def model_facts(flags, checkpoint: Path) -> dict:
    """What a checkpoint says about its model, for a new run that begins with it."""
    if flags.pretrained_projector:
        raise ValueError(f"--pretrained_projector {flags.pretrained_projector}: {checkpoint} "
                         "brings its own projector; --model none starts from the public towers")
    config = read_config(checkpoint)
    facts = {"preset": read_run(checkpoint)["settings"]["preset"], "system": config["system"] or "",
             "template": config["template"], "image_token": config["image_token"]}
    for name in ("projector", "pixel_shuffle", "vision_feature_layer", "vision_feature_select"):
        facts[name] = config[name]
        if getattr(flags, name) not in (None, facts[name]):
            raise ValueError(f"--{name} {getattr(flags, name)}: {checkpoint} was trained with "
                             f"{facts[name]}, and its projector fits nothing else")
    for part, reference in config["bases"].items():
        facts[TOWER_SETTINGS[part]] = reference["name"]
    for name, value in (config["lora"] or {}).items():
        facts[f"lora_{name}"] = value
    return facts


def find_changes(settings, run: dict) -> list[dict]:
    """What of the curve's settings was changed since the run began, for run.json. The last ones
    are those of this very resume. run: of the checkpoint."""
    before, now = run["settings"], vars(settings)
    return run["changes"] + [
        {"from_step": run["step"] + 1, "setting": name, "before": before[name], "now": now[name]}
        for name in before
        if ON_RESUME.get(name) == CHANGES_CURVE and before[name] != now[name]]


def restore(settings, start: Start, optimizer, data_facts: dict, distributed) -> TrainerState:
    """Resume: load the optimizer and return how far the run had come. Otherwise move what an
    earlier run left in OUT aside: nobody's training is overwritten."""
    out, checkpoint = Path(settings.out), start.checkpoint
    distributed.barrier()  # every rank has looked for its start by now
    if not settings.resume:
        if distributed.main:
            move_aside(out, [*checkpoints(out), *(out / name for name in FILES)])
        distributed.barrier()
        return TrainerState()
    run = read_run(checkpoint)
    if content_of(run["data"]) != content_of(data_facts):
        raise SystemExit(f"cannot go on: {checkpoint} was made on {run['data']}, this is "
                         f"{data_facts}: the data order would not go on where it stopped")
    if distributed.main:  # torn ones are kept to be looked at, where nobody resumes from them
        for torn in [path for path in checkpoints(out) if step_of(path) > step_of(checkpoint)]:
            torn.rename(free_name(out, f"torn_{torn.name}"))
    with distributed.loading():
        try:
            saved = load_plain(checkpoint / "training_state.pt")
            peaks = [group["peak"] for group in optimizer.param_groups]
            distributed.load_optimizer(optimizer, saved["optimizer"])
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak"] = peak  # the settings', which may have changed since
            if start.changes != run["changes"]:
                # With another dtype or learning rate the loss scale is searched for anew: it may
                # have fallen to 1 before the run stopped.
                del saved["trainer"]["loss_scale"], saved["trainer"]["growth_tracker"]
            return TrainerState(**saved["trainer"])
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"cannot go on: {checkpoint / 'training_state.pt'} does not fit this "
                             f"run: {error}") from error


def content_of(facts: dict) -> dict:
    """What training/data.py says about the data, but for where a file lies: its sha256 tells that
    it is the same."""
    if "files" in facts:
        return {**facts, "files": list(map(content_of, facts["files"]))}
    return {name: value for name, value in facts.items()
            if name != "file" or "sha256" not in facts}


def move_aside(out: Path, paths: list[Path]) -> None:
    """Into OUT/earlier_N, if any of them is there."""
    paths = [path for path in paths if path.exists()]
    if paths:
        earlier = free_name(out, "earlier")
        earlier.mkdir()
        for path in paths:
            path.rename(earlier / path.name)
        print(f"an earlier run was moved to {earlier}")


def save(bundle, optimizer, state: TrainerState, settings, facts: dict, distributed) -> None:
    """Write OUT/step_NNNNNN. Every rank calls it, since under fsdp each holds a share of what rank
    0 writes; all go on, or raise StopTraining. facts: run_metadata.describe's."""
    names, problem = bundle.saved_names(), None
    tensors = distributed.full_tensors(
        {name: p for name, p in bundle.model.named_parameters() if name in names})
    training_state = {"trainer": asdict(state),
                      "optimizer": distributed.full_tensors(optimizer.state_dict())}
    if distributed.main:
        try:
            # First the lines of its steps, then the checkpoint.
            flush_to_disk(Path(settings.out) / "metrics.jsonl")
            save_checkpoint(settings.out, state.step, tensors, bundle.config,
                            {"step": state.step, **facts},
                            (bundle.template.tokenizer, bundle.processor), training_state,
                            settings.save_total_limit, settings.full_checkpoint)
        except OSError as error:
            problem = error
    # Also a barrier: else a rank could be gone, or far ahead, before the files are there.
    if distributed.sum(problem is not None) != [0.0]:
        raise StopTraining(f"{problem or 'rank 0 could not save'}. The older checkpoints are as "
                           "they were; make room, then go on with --resume.") from problem
