"""Settings -> everything that a run needs before its first step.

    flags -> where_to_start -> a checkpoint, or none -> assemble -> Parts: model, template,
    image processor, config;   --data -> open_training_data;   --out -> prepare_out;
    Parts -> saver -> the function that the loop calls to write a checkpoint
"""

import glob
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
from torch.utils.data import Subset

from dataset.chat import DEFAULT_SYSTEM, ChatTemplate
from dataset.images import ImageProcessor
from dataset.readers.mixture import mixture_hash, open_mixture, split_source
from dataset.tokenizer import Tokenizer
from extras.convert.published_projector import load_projector
from extras.fsdp import in_turn, load_optimizer, whole
from model.config import ProjectorConfig, VLMConfig
from model.pretrained.checkpoint import (
    CorruptCheckpointError,
    base_reference,
    checkpoints,
    find_model,
    flush_to_disk,
    newest_whole,
    own_names,
    read_config,
    read_run,
    refuse_quantized,
    save_checkpoint,
    step_of,
    tensor_names,
)
from model.pretrained.hub import resolve
from model.pretrained.load import load_checkpoint, load_language, load_vision
from model.pretrained.pickle_loader import load_plain
from model.pretrained.public_config import write_vlm_config
from model.vlm import VLM, build_model
from training.loop import Progress
from training.run_metadata import FILES

# What a run may change when it is resumed; all else would make it another run.
CHANGEABLE = ("out", "resume", "model", "preset", "language", "vision", "steps", "epochs",
              "batch_size", "accumulate", "save_every", "keep", "workers", "max_bad",
              "log_samples", "full_checkpoint", "eval_every", "eval_data", "eval_answers", "log",
              "checkpointing", "parallel", "cache_features", "cache_gb")


@dataclass
class Parts:
    model: VLM
    template: ChatTemplate
    processor: ImageProcessor
    config: dict  # config.json of the checkpoints to come
    held: set  # names of the parameters that differ from the public weights already


def where_to_start(flags, stage: str) -> tuple[Path | None, dict]:
    """-> the checkpoint to load (None: the public towers and a new projector), and the settings
    that it brings: all of its run's to resume, the model's facts alone to train on."""
    try:
        checkpoint = newest_whole(flags.out) if flags.resume else None
    except CorruptCheckpointError as error:
        raise SystemExit(f"{error}. Without --resume the run starts anew.") from error
    if checkpoint:
        earlier = {"features": "patches", "lora_from": None, "init_projector": None,
                   "fast_images": None, **template_facts(read_config(checkpoint)),
                   **read_run(checkpoint)["settings"]}
        return checkpoint, check_resumed(flags, earlier, checkpoint)
    if flags.model == "none" or (stage == "pretrain" and flags.model is None):
        return None, {}
    try:
        checkpoint = find_model(flags.model, runs=("out/pretrain",))
        refuse_quantized(checkpoint, "train on from")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"{error}; or --model none to start from the public towers") from error
    if Path(flags.out).resolve() in checkpoint.resolve().parents:
        raise SystemExit(f"the new run would write beside its own start, {checkpoint}: "
                         "give another --out, or --resume to go on with that run")
    if flags.init_projector:
        raise SystemExit(f"--init_projector {flags.init_projector}: {checkpoint} brings its own "
                         "projector; --model none starts from the public towers")
    config, run = read_config(checkpoint), read_run(checkpoint)
    facts = {"preset": run["settings"]["preset"], "system": config["system"] or "",
             **template_facts(config)}
    for name in ("projector", "pixel_shuffle", "vision_layer", "features"):
        facts[name] = config.get(name, "patches")  # the first checkpoints name no features
        if getattr(flags, name) not in (None, facts[name]):
            raise SystemExit(f"--{name} {getattr(flags, name)}: {checkpoint} was trained with "
                             f"{facts[name]}, and its projector fits nothing else")
    for part, reference in config["bases"].items():
        facts[part] = reference["name"]
    if config["lora"]:
        facts.update({f"lora_{name}": value for name, value in config["lora"].items()})
    return checkpoint, facts


def template_facts(config: dict) -> dict:
    """Which chat template a checkpoint was trained with; one from before there were several says
    nothing, and was trained with qwen2's."""
    return {"template": config.get("template", "qwen2"), "image_token": config.get("image_token")}


def check_resumed(flags, earlier: dict, checkpoint: Path) -> dict:
    for name, value in vars(flags).items():
        if name not in CHANGEABLE and value is not None and value != earlier.get(name):
            raise SystemExit(f"--{name} {value}: the run to resume, {checkpoint}, was started with "
                             f"{earlier.get(name)}. Leave the flag out, or start a new run with "
                             "another --out.")
    return earlier


def loudness(language) -> float:
    """The root mean square of the first words' embeddings: the size of the numbers that stand for
    words. Numbers that are not finite are left out: the loop reports such weights."""
    table = language.embed_tokens.weight[:4096].float()
    return table[table.isfinite()].square().mean().sqrt().item()


def assemble(settings, checkpoint: Path | None) -> Parts:
    """Load the model, and build the template and the image processor that belong to it.

    The weights are in the files' own numbers: once it is known which of them are trained,
    precision.store_weights gives each the numbers that it needs.
    """
    torch.manual_seed(settings.seed)  # of the new projector's and the adapters' first weights
    if checkpoint:
        config, held = read_config(checkpoint), tensor_names(checkpoint)
        bases = config["bases"]
        moved = {part: None if getattr(settings, part) == bases[part]["name"]
                 else getattr(settings, part) for part in bases}
        model = load_checkpoint(checkpoint, None, **moved)
        language_directory = vision_directory = checkpoint
        for part, reference in bases.items():
            place = moved[part] or (reference.get("copied") and str(checkpoint / part))
            bases[part] = {"name": place or reference["name"], "sha256": reference["sha256"]}
    else:
        language_directory = resolve(settings.language)
        vision_directory = resolve(settings.vision)
        language = load_language(language_directory, None)
        vision = load_vision(vision_directory, None, settings.vision_layer, settings.features)
        bases = {part: base_reference(getattr(settings, part)) for part in ("language", "vision")}
        held, config = set(), {"lora": None}

    tokenizer = Tokenizer.from_directory(language_directory)
    processor = ImageProcessor.from_directory(vision_directory)
    if settings.fast_images is not None:
        processor = replace(processor, fast=settings.fast_images)
    if checkpoint:
        language, vision = model.language, model.vision
    family = settings.template or language.config.model_type
    system = settings.system
    if system is None:
        system = DEFAULT_SYSTEM[family]
    K = image_tokens(vision.config.patch_size, processor.size, settings.pixel_shuffle,
                     settings.features)
    template = ChatTemplate(tokenizer, K, system or None, settings.image_token, family)
    if checkpoint:  # with another template the placeholder may be another id
        model.config = replace(model.config, image_token_id=template.image_token_id)
    else:
        projector = ProjectorConfig(settings.projector, vision.config.hidden_size,
                                    language.config.hidden_size, settings.pixel_shuffle)
        model = build_model(VLMConfig(language.config, vision.config, projector,
                                      template.image_token_id),
                            language, vision, loudness(language))
        if settings.init_projector:
            load_projector(model.projector, settings.init_projector)
    config = {
        **write_vlm_config(model.config), "image_tokens": K,
        "template": family, "image_token": template.image_token,
        "system": template.default_system, "lora": config["lora"], "bases": bases}
    return Parts(model, template, processor, config, held)


def image_tokens(patch_size: int, size: tuple[int, int], pixel_shuffle: int,
                 features: str = "patches") -> int:
    """K, for the size (H,W) that the image processor makes.

    Not for the size in the tower's config: DINOv2 was trained on 518 pixels and published with a
    processor that makes 224; its position grid is stretched to what comes in.
    """
    if features != "patches":  # one vector for the whole picture
        if pixel_shuffle > 1:
            raise ValueError(f"--features {features} makes one token of a picture, so there is "
                             f"nothing for --pixel_shuffle {pixel_shuffle} to join")
        return 1
    rows, columns = size[0] // patch_size, size[1] // patch_size
    return rows * columns // pixel_shuffle**2


def open_training_data(settings, kind: str):
    """--data -> samples, and what run.json says about them. kind: "captions" or "chat", the half
    of the embedded world that this stage learns from."""
    if settings.data == "emoji":
        from dataset.emoji.world import EmojiData  # here: other data has no use for it

        data, about = EmojiData(kind), {"file": "emoji", "kind": kind}
    else:
        apart = settings.eval_samples or 0
        data = open_files("data", settings, apart=0 if settings.eval_data else apart)
        about = mixture_hash(data)
        # One file of weight 1 is told as before there were weights: such runs can be resumed.
        alone = {name: value for name, value in about[0].items()
                 if (name, value) != ("weight", 1.0)}
        about = {"files": about} if len(about) > 1 else alone
    if settings.overfit:  # Subset has no epochs: a mixture stands still, each caption stays
        data = Subset(data, range(min(settings.overfit, len(data))))
    return data, {**about, "samples": len(data)}


def open_files(flag: str, settings, apart: int = 0):
    """The files that --data or --eval_data names, mixed."""
    named = getattr(settings, flag)
    files = named if isinstance(named, list) else [named]
    try:
        return open_mixture([name for file in files for name in matching(file)],
                            settings.images, settings.seed, apart)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"--{flag} {' '.join(files)}: {error}") from error


def matching(source: str) -> list[str]:
    """"part-*.parquet:2" -> each such file with ":2", in the order of their names. What fits no
    file stays as it is, and opening it says so."""
    file, _ = split_source(source)
    weight = source.removeprefix(file)
    return [found + weight for found in sorted(glob.glob(file))] or [source]


def prepare_out(settings, ranks, checkpoint: Path | None, optimizer, about_data: dict) -> Progress:
    """Resume: restore the optimizer and return how far the run had come.

    Otherwise move what an earlier run left in OUT aside: nobody's training is overwritten.
    """
    out = Path(settings.out)
    ranks.wait()  # every rank has looked for its start by now
    if settings.resume and checkpoint and checkpoint.parent == out:
        run = read_run(checkpoint)
        if run["data"] != about_data:
            raise SystemExit(f"{checkpoint} was made on {run['data']}, this is {about_data}: "
                             "the data order would not go on where it stopped")
        if ranks.main:  # torn ones are kept to be looked at, where nobody resumes from them
            for torn in [path for path in checkpoints(out) if step_of(path) > step_of(checkpoint)]:
                torn.rename(free_name(out, f"torn_{torn.name}"))
        with in_turn(ranks, wanted=settings.parallel == "fsdp"):
            # As data alone: nothing of it runs.
            state = load_plain(checkpoint / "training_state.pt")
            load_optimizer(optimizer, state["optimizer"])
        return progress_of(state["progress"], run)
    written = [out / name for name in FILES]
    if ranks.main and (checkpoints(out) or any(path.exists() for path in written)):
        earlier = free_name(out, "earlier")
        earlier.mkdir()
        for path in [*checkpoints(out), *written]:
            if path.exists():
                path.rename(earlier / path.name)
        print(f"an earlier run was moved to {earlier}")
    ranks.wait()
    return Progress()


def free_name(out: Path, name: str) -> Path:
    """OUT/NAME_1, or with the first number that is free: one in between may have been deleted."""
    return next(path for number in count(1) if not (path := out / f"{name}_{number}").exists())


def progress_of(saved: dict, run: dict) -> Progress:
    """Checkpoints once counted micro-batches of their own size where places are counted now."""
    if "batch" in saved:
        block = run["settings"]["batch_size"] * run["processes"]
        saved = {**saved, "block": block, "place": saved["batch"] * block}
        del saved["batch"]
    return Progress(**{"hands": 1, **saved})  # and every rank once read whole windows


def saver(parts: Parts, settings, ranks, facts: dict):
    """-> save(step, state), as the loop wants it: every rank calls it, and rank 0 writes.

    facts: record.describe's.
    """
    trained = {name for name, p in parts.model.named_parameters() if p.requires_grad}
    changed = parts.held | trained | set(own_names(parts.model))

    def save(step: int, state: dict) -> None:
        tensors = whole({name: p for name, p in parts.model.named_parameters()
                         if name in changed}, ranks)
        state = whole(state, ranks)
        if not ranks.main:
            return
        metrics = Path(settings.out) / "metrics.jsonl"
        if metrics.exists():  # no checkpoint of a step whose line the machine has not yet written
            flush_to_disk(metrics)
        save_checkpoint(settings.out, step, tensors, parts.config, {"step": step, **facts},
                        (parts.template.tokenizer, parts.processor), state, settings.keep,
                        settings.full_checkpoint)

    return save
