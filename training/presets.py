"""Named settings, and the flags that override them.

    preset's values -> the settings of the checkpoint to go on from -> explicit flags -> settings

A flag that is not given is None until here; so what stands in the preset counts unless you say
otherwise, and what you say always counts. The result is saved with the run, in run.json.
"""

import argparse
from dataclasses import asdict

from dataset.chat import FAMILIES
from extras.trackers import BOARDS
from training.preset_table import PRESETS, Preset, Recipe

OVERFIT_STEPS = 200

__all__ = ["PRESETS", "Preset", "Recipe", "read_flags", "resolve", "settings_of_preset"]


def settings_of_preset(name: str, stage: str) -> dict:
    """stage: "pretrain" or "sft" -> {flag: value} of everything that a preset decides."""
    if name not in PRESETS:
        raise SystemExit(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    values = asdict(PRESETS[name])
    values.update(values[stage])
    for part in ("pretrain", "sft", "downloads"):
        del values[part]
    # Lists, as flags give them and as run.json gives them back when a run is resumed.
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()}


class ListPresets(argparse.Action):
    """--list_presets prints and ends the program, as --help does."""

    def __call__(self, parser, flags, values, option=None):
        from extras.preset_list import list_presets  # here: it builds models to count them

        print(list_presets())
        parser.exit()


def projector_kind(text: str) -> str:
    from model.projector import PROJECTORS  # here: reading flags needs no torch

    if text not in PROJECTORS:
        raise argparse.ArgumentTypeError(f"{text!r}; there are {', '.join(PROJECTORS)}")
    return text


def read_flags(description: str, stage: str, arguments=None) -> argparse.Namespace:
    """The flags of both training scripts. Not given: None, so that the preset can fill it in."""
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    add("--preset", choices=PRESETS, help="named settings that all other flags override "
        "(default: emoji, or the preset of the checkpoint to start from)")
    add("--list_presets", action=ListPresets, nargs=0, default=argparse.SUPPRESS,
        help="print the presets with their models, memory and download size, and end")
    add("--model", metavar="DIR", help="checkpoint, or run, to start from; none: the public "
        "towers and a new projector (default: " +
        ("none)" if stage == "pretrain" else "the newest in out/pretrain)"))
    add("--language", help="language model: a directory or a name on the hub")
    add("--vision", help="vision tower: a directory or a name on the hub")
    add("--vision_layer", type=int, help="whose features are used: -1 the last layer's, -2 ...")
    add("--features", choices=("patches", "class", "pooled"), help="what of a picture is used: "
        "all patches, the class token alone, or the patches' mean")
    add("--projector", type=projector_kind, help="what joins the towers, such as linear or mlp: "
        "a kind of model/projector.py")
    add("--init_projector", metavar="FILE", help="begin with the projector of this .safetensors, "
        ".bin or .pth, by LLaVA's, transformers' or MiniMind-V's names")
    add("--pixel_shuffle", type=int, help="n: n x n patches become one token")
    add("--template", choices=FAMILIES, help="whose chat template (default: the language model's)")
    add("--image_token", metavar="TEXT", help="token, or text, that holds an image token's place "
        "(default: the template's own)")
    add("--system", help='system turn of conversations that have none; "" for no system turn')
    add("--data", nargs="+", metavar="FILE", help="training file, or emoji for the embedded "
        "world; several are mixed, and FILE:2 comes twice in an epoch")
    add("--images", help="directory that the file's picture names are relative to")
    add("--fast_images", action=yes_no, help="decode large JPEGs at a half, a quarter or an eighth "
        "and resize faster: other pixels, a little (default: as the tower's files say, exactly)")
    add("--cache_features", metavar="DIR", help="keep what the frozen vision tower sees in each "
        "picture there, and do not look again when the picture comes again; may be deleted at any "
        "time")
    add("--cache_gb", type=float, help="how large that directory may grow (default: 10)")
    add("--out", default=f"out/{stage}", help="directory of this run (default: %(default)s)")
    add("--resume", action=yes_no, default=False,
        help="go on from the newest checkpoint in --out, with that run's settings")
    add("--steps", type=int, help="optimizer steps; wins over --epochs")
    add("--epochs", type=float, help="times through the data")
    add("--batch_size", type=int, help="conversations in a micro-batch, on each process")
    add("--accumulate", type=int, help="micro-batches in an optimizer step")
    add("--max_length", type=int, help="tokens of a conversation, images included")
    add("--learning_rate", type=float, help="peak, for every part without its own")
    add("--projector_learning_rate", type=float, help="peak, for the projector")
    add("--vision_learning_rate", type=float, help="peak, for the vision tower")
    add("--weight_decay", type=float, help="for matrices; norms and biases have none")
    add("--warmup_ratio", type=float, help="share of the steps in which the rate rises")
    add("--clip", type=float, help="longest gradient; longer ones are scaled down to it")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), help="numbers that the matrix "
        "products use; auto: bf16 where the hardware multiplies it natively, else fp16 on CUDA, "
        "fp32 on a processor")
    add("--checkpointing", action=yes_no, help="keep each block's input alone for the backward "
        "pass and compute the block again there: less memory, a third more time")
    add("--parallel", choices=("ddp", "fsdp"), default=None, help="with several processes: each "
        "holds the whole model, or a share of it (default: ddp)")
    add("--seed", type=int, default=None, help="of new weights, data order, dropout (default: 0)")
    add("--save_every", type=int, help="steps between checkpoints")
    add("--keep", type=int, help="newest checkpoints that are kept")
    add("--log_samples", action=yes_no,
        help="write the places of each step's samples to OUT/samples.jsonl (default: no)")
    add("--workers", type=int, default=None, help="processes that prepare data (default: 2)")
    add("--max_bad", type=float, default=None,
        help="share of unusable samples that stops the run (default: 0.01)")
    add("--train_projector", action=yes_no, help="train the projector")
    add("--train_language", help="of the language model: all, none, its last:N or first:N "
        "layers, or both, as in first:1+last:1")
    add("--train_vision", action=yes_no, help="train the vision tower")
    add("--lora", action=yes_no, help="train low-rank adapters in a frozen language model")
    add("--lora_rank", type=int, help="width of the adapters")
    add("--lora_alpha", type=float, help="adapters add alpha / rank times their product")
    add("--lora_dropout", type=float, help="share of an adapter's input that is dropped")
    add("--lora_targets", nargs="+", help="names of the linear layers that get an adapter")
    add("--eval_every", type=int, help="steps between measurements of the loss on held-out samples "
        "(default: 0, never)")
    add("--eval_data", metavar="FILE", help="held-out samples; without it the emoji world has its "
        "own, and other --data needs --eval_samples")
    add("--eval_samples", type=int, help="of --eval_data the first so many; without it the last "
        "so many of --data, which are then never trained on")
    add("--eval_answers", type=int, metavar="N", help="at each measurement also answer the first "
        "question of N held-out samples, for OUT/report.html (default: 8; 0: none)")
    add("--overfit", type=int, metavar="N", help="train on the first N samples only, over and "
        "over: the first thing to try when a loss looks wrong (200 steps, if nothing else is said)")
    add("--log", choices=BOARDS, help="show the figures of metrics.jsonl and evaluations.jsonl "
        "there too (requirements-extra.txt)")
    add("--lora_from", metavar="DIR", help="begin with the adapters of a peft directory; it "
        "says their rank, alpha and targets")
    add("--full_checkpoint", action=yes_no,
        help="copy the public towers into each checkpoint instead of referring to them")
    flags = parser.parse_args(arguments)
    if flags.data and len(flags.data) == 1:  # nothing to mix
        flags.data = flags.data[0]
    if flags.dtype == "auto":  # what every preset says; a resumed run goes on with what it chose
        flags.dtype = None
    return flags


def resolve(flags: argparse.Namespace, stage: str, earlier: dict) -> argparse.Namespace:
    """Fill in what no flag said.

    earlier: settings to prefer to the preset's: of the run to resume, or of the checkpoint that
    is trained on (the model's facts alone).
    """
    given = {name: value for name, value in vars(flags).items() if value is not None}
    preset = given.get("preset") or earlier.get("preset") or "emoji"
    others = {"seed": 0, "workers": 2, "max_bad": 0.01, "full_checkpoint": False, "model": None,
              "eval_every": 0, "eval_data": None, "eval_samples": None, "eval_answers": 8,
              "overfit": None,
              "log": None, "log_samples": False, "lora_from": None,
              "init_projector": None, "parallel": "ddp",
              "fast_images": None, "cache_features": None, "cache_gb": 10.0}
    settings = {**others, **settings_of_preset(preset, stage), **earlier, **given,
                "preset": preset}
    if "epochs" in given and "steps" not in given:
        settings["steps"] = None
    if "overfit" in given and not {"steps", "epochs"} & given.keys():
        settings["steps"] = OVERFIT_STEPS
    if "lora_from" in given:
        given["lora"] = settings["lora"] = True
        said = [name for name in ("lora_rank", "lora_alpha", "lora_targets") if name in given]
        if said:
            raise SystemExit(f"--{said[0]}: the adapters of --lora_from {given['lora_from']} have "
                             "their own; leave it out")
    # The two exclude each other: whichever was asked for puts the preset's other one out.
    if given.get("lora") and "train_language" not in given:
        settings["train_language"] = "none"
    if given.get("train_language", "none") != "none" and "lora" not in given:
        settings["lora"] = False
    check(settings)
    return argparse.Namespace(**settings)


def check(settings: dict) -> None:
    """Refuse numbers that no run can use, before anything is loaded."""
    for name in ("batch_size", "accumulate", "max_length", "save_every", "keep", "pixel_shuffle",
                 "lora_rank", "learning_rate", "epochs", "clip", "cache_gb"):
        if not settings[name] > 0:
            raise SystemExit(f"--{name} {settings[name]}: expected a number above 0")
    for name in ("steps", "eval_samples", "overfit"):
        if settings[name] is not None and settings[name] < 1:
            raise SystemExit(f"--{name} {settings[name]}: expected at least 1")
    if settings["eval_every"] and not settings["overfit"] and settings["data"] != "emoji" and not (
            settings["eval_data"] or settings["eval_samples"]):
        raise SystemExit(f"--eval_every {settings['eval_every']}: on which samples? Give "
                         "--eval_data FILE, or --eval_samples N to set the last N of --data apart")
    for name in ("warmup_ratio", "lora_dropout", "max_bad", "weight_decay", "workers",
                 "eval_every", "eval_answers"):
        if not settings[name] >= 0:
            raise SystemExit(f"--{name} {settings[name]}: expected 0 or more")
    for name in ("warmup_ratio", "lora_dropout"):
        if settings[name] >= 1:
            raise SystemExit(f"--{name} {settings[name]}: a share, so expected below 1")
