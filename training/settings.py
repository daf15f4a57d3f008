"""Every setting of a run, one row each: its flag, help, type, range, default, and what a resume may
do with it.

Flags, checks, run.json and resumes iterate over SETTINGS. What a preset decides is a field of
Preset or Recipe too (preset_table.py).
"""

import operator
from argparse import ArgumentTypeError, BooleanOptionalAction
from dataclasses import dataclass
from typing import Any

from dataset.families import CHAT_FAMILIES
from training.preset_table import PRESETS
from training.schedules import SCHEDULES

# What may be changed where a run is resumed.
FIXED = "fixed"  # nothing: it would be another run
FREE = "free"  # no step computes anything else because of it
# It changes the curve, and is the way out of a loss that is not finite: it may change where a run
# is resumed from before a step at which that had stopped it, and nowhere else.
CHANGES_CURVE = "changes_curve"


def projector_kind(name: str) -> str:
    from model.projector import PROJECTORS  # here: reading flags needs no torch

    if name not in PROJECTORS:
        raise ArgumentTypeError(f"{name!r}; there are {', '.join(PROJECTORS)}")
    return name


TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio")  # extras/trackers.py

PRESET = object()  # the default stands in the preset (preset_table.py)


@dataclass(frozen=True)
class Setting:
    """A row of SETTINGS. above, at_least, below: the range; None: no limit."""

    name: str
    on_resume: str
    help: str
    type: Any = str  # bool: the flag has a --no- form
    default: Any = PRESET  # {"stage": value} where the two stages differ
    choices: Any = None
    metavar: str | None = None
    several: bool = False  # takes one value or more
    above: float | None = None
    at_least: float | None = None
    below: float | None = None

    def add_to(self, parser, stage: str) -> None:
        """The flag. Not given: None, so that the preset can fill it in."""
        default = self.default[stage] if isinstance(self.default, dict) else None
        kind = {"type": self.type, "choices": self.choices, "metavar": self.metavar,
                "nargs": "+" if self.several else None}
        if self.type is bool:
            kind = {"action": BooleanOptionalAction}
        parser.add_argument(f"--{self.name}", help=self.help, default=default, **kind)

    def check(self, value) -> None:
        """SystemExit for a number that no run can use. None is no number: nothing is said."""
        limits = ((self.above, "above", operator.gt), (self.at_least, "at least", operator.ge),
                  (self.below, "below", operator.lt))
        for limit, words, fits in limits:
            if None not in (value, limit) and not fits(value, limit):
                raise SystemExit(f"--{self.name} {value}: expected a number {words} {limit:g}")


SETTINGS = (
    Setting("preset", FREE, "named settings that all other flags override (default: emoji, or the "
            "preset of the checkpoint to start from)", default=None, choices=PRESETS),
    Setting("model", FREE, "checkpoint, or run, to start from; none: the public towers and a new "
            "projector (default: none in stage one, the newest in out/pretrain in stage two)",
            default=None, metavar="DIR"),
    # The model.
    Setting("language_model", FREE, "language model: a directory or a name on the hub"),
    Setting("vision_tower", FREE, "vision tower: a directory or a name on the hub"),
    Setting("vision_feature_layer", FIXED, "whose features are used: -1 the last layer's, -2 ...",
            int),
    Setting("vision_feature_select", FIXED, "what of an image is used: all patches, the class "
            "token alone, or the patches' mean", choices=("patches", "class", "pooled")),
    Setting("projector", FIXED, "what joins the two towers", projector_kind),
    Setting("pretrained_projector", FIXED, "begin with the projector of this .safetensors, .bin or "
            ".pth, by LLaVA's, transformers' or MiniMind-V's names", default=None, metavar="FILE"),
    Setting("pixel_shuffle", FIXED, "n: n x n patches become one token", int, above=0),
    Setting("template", FIXED, "whose chat template (default: the language model's)",
            choices=CHAT_FAMILIES),
    Setting("image_token", FIXED, "token, or text, that holds an image token's position (default: "
            "the template's own)", metavar="TEXT"),
    Setting("system", FIXED, 'system turn of conversations that have none; "" for no system turn'),
    # The data.
    Setting("data", FREE, "training file, or emoji for the embedded world; several are mixed, and "
            "FILE:2 comes twice in an epoch", metavar="FILE", several=True),
    Setting("image_folder", FREE, "directory that the file's image names are relative to"),
    Setting("follow_links", FREE, "symbolic links in it are yours and may lead out of it", bool,
            default=False),
    Setting("approximate_resize", FIXED, "decode large JPEGs at a half, a quarter or an eighth and "
            "resize faster: slightly other pixels (default: as the tower's files say, exactly)",
            bool, default=None),
    Setting("feature_cache", FREE, "keep the frozen vision tower's features of each image there, "
            "and read them when the image comes again; may be deleted at any time", default=None,
            metavar="DIR"),
    Setting("feature_cache_gb", FREE, "how large that directory may grow (default: 10)", float,
            default=10.0, above=0),
    # The run.
    Setting("out", FREE, "directory of this run (default: %(default)s)",
            default={"pretrain": "out/pretrain", "sft": "out/sft"}),
    Setting("resume", FREE, "go on from the newest checkpoint in --out, with that run's settings",
            bool, default=False),
    Setting("steps", FREE, "optimizer steps; wins over --epochs", int, at_least=1),
    Setting("epochs", FREE, "times through the data", float, above=0),
    Setting("batch_size", FREE, "conversations in a micro-batch, on each process", int, above=0),
    Setting("gradient_accumulation_steps", FREE, "micro-batches in an optimizer step", int,
            above=0),
    Setting("max_length", FIXED, "tokens of a conversation, images included", int, above=0),
    # The optimizer.
    Setting("learning_rate", CHANGES_CURVE, "peak, for every part without its own", float, above=0),
    Setting("projector_learning_rate", CHANGES_CURVE, "peak, for the projector", float, above=0),
    Setting("vision_learning_rate", CHANGES_CURVE, "peak, for the vision tower", float, above=0),
    Setting("weight_decay", FIXED, "for matrices; norms and biases have none", float, at_least=0),
    Setting("warmup_ratio", CHANGES_CURVE, "share of the steps in which the learning rate rises",
            float, at_least=0, below=1),
    Setting("schedule", FIXED, "how the learning rate falls after the warmup (default: cosine)",
            default="cosine", choices=SCHEDULES),
    Setting("max_grad_norm", CHANGES_CURVE, "longest gradient; longer ones are scaled down to it",
            float, above=0),
    Setting("dtype", CHANGES_CURVE, "of the matrix products; auto: bf16 on a GPU that has it and "
            "on a processor that is faster in it, else fp16 on CUDA, fp32 elsewhere",
            choices=("auto", "bf16", "fp16", "fp32")),
    Setting("gradient_checkpointing", FREE, "keep each block's input alone for the backward pass "
            "and compute the block again there: less memory, a third more time", bool),
    Setting("parallel", FREE, "with several processes: each holds the whole model, or a share of "
            "it (default: ddp)", default="ddp", choices=("ddp", "fsdp")),
    Setting("seed", FIXED, "of new weights, data order, dropout (default: 0)", int, default=0,
            at_least=0, below=2**31),
    # Checkpoints and workers.
    Setting("save_steps", FREE, "steps between checkpoints", int, above=0),
    Setting("save_total_limit", FREE, "newest checkpoints that are kept", int, above=0),
    Setting("log_samples", FREE, "write where each step's samples stand to OUT/samples.jsonl "
            "(default: no)", bool, default=False),
    Setting("num_workers", FREE, "processes that prepare data (default: 2)", int, default=2,
            at_least=0),
    Setting("max_skip_ratio", FREE, "share of unusable samples that stops the run (default: 0.01)",
            float, default=0.01, at_least=0),
    # What is trained.
    Setting("train_projector", FIXED, "train the projector", bool),
    Setting("train_language", FIXED, "of the language model: all, none, its last:N or first:N "
            "layers, or both, as in first:1+last:1"),
    Setting("train_vision", FIXED, "train the vision tower", bool),
    Setting("lora", FIXED, "train low-rank adapters in a frozen language model", bool),
    Setting("lora_rank", FIXED, "width of the adapters", int, above=0),
    Setting("lora_alpha", FIXED, "adapters add alpha / rank times their product", float),
    Setting("lora_dropout", FIXED, "share of an adapter's input that is dropped", float, at_least=0,
            below=1),
    Setting("lora_targets", FIXED, "names of the linear layers that get an adapter", several=True),
    # What is measured and shown.
    Setting("eval_steps", FREE, "steps between measurements of the loss on held-out samples "
            "(default: 0, never)", int, default=0, at_least=0),
    Setting("eval_data", FREE, "held-out samples; without it the emoji world has its own, and "
            "other --data needs --eval_samples", default=None, metavar="FILE"),
    Setting("eval_samples", FIXED, "of --eval_data the first so many; without it the last so many "
            "of --data, which are then never trained on", int, default=None, at_least=1),
    Setting("eval_answers", FREE, "at each measurement also answer the first question of N "
            "held-out samples, for OUT/report.html (default: 8; 0: none)", int, default=8,
            metavar="N", at_least=0),
    Setting("overfit", FIXED, "train on the first N samples only, over and over: the first thing "
            "to try when a loss looks wrong (200 steps, if nothing else is said)", int,
            default=None, metavar="N", at_least=1),
    Setting("report_to", FREE, "show the figures of metrics.jsonl and evaluations.jsonl there too "
            "(requirements-extra.txt)", default=None, choices=TRACKERS),
    Setting("lora_from", FIXED, "begin with the adapters of a peft directory; it says their rank, "
            "alpha and targets", default=None, metavar="DIR"),
    Setting("full_checkpoint", FREE, "copy the public towers into each checkpoint instead of "
            "referring to them", bool, default=False),
)

ON_RESUME = {setting.name: setting.on_resume for setting in SETTINGS}
