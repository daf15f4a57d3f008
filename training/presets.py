"""Named settings, and the flags that override them.

    preset's values -> the settings of the checkpoint to go on from -> explicit flags -> settings

A flag that is not given is None until here; so what stands in the preset counts unless you say
otherwise, and what you say always counts. The result is saved with the run, in run.json.
"""

import argparse
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """How one stage trains."""

    data: str  # a file, or "emoji" for the embedded world
    learning_rate: float
    batch_size: int  # rows in a micro-batch, on each rank
    train_language: str  # "all", "none", "last:N"
    steps: int | None = None  # optimizer steps; None: `epochs` decides
    epochs: float = 1
    accumulate: int = 1  # micro-batches in an optimizer step
    images: str | None = None  # directory of the pictures; None: beside the file
    max_length: int = 512  # tokens in a row, image tokens included
    projector_learning_rate: float | None = None  # None: learning_rate
    vision_learning_rate: float | None = None  # None: learning_rate
    weight_decay: float = 0.01
    warmup_ratio: float = 0.03
    clip: float = 1.0
    dtype: str = "auto"  # or "bf16", "fp32"
    save_every: int = 500
    keep: int = 3
    train_projector: bool = True
    train_vision: bool = False
    lora: bool = False


@dataclass(frozen=True)
class Preset:
    """Two towers, what joins them, and the recipe of each stage."""

    language: str  # a directory, or a name on the hub
    vision: str
    pretrain: Recipe
    sft: Recipe
    projector: str = "mlp"
    pixel_shuffle: int = 1
    vision_layer: int = -1  # -1: the tower's last layer, -2: the one before it
    system: str | None = None  # None: what the family's published template says; "": no system turn
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: tuple = ("q_proj", "k_proj", "v_proj", "o_proj",
                           "gate_proj", "up_proj", "down_proj")


EMOJI = Recipe(data="emoji", learning_rate=3e-3, batch_size=64, train_language="none", steps=500,
               max_length=256, save_every=100)
# The write-up's numbers for both stages: 3e-4, warmup 2 %, decay 0.01, batch 40, 8 epochs.
MINIMIND_DATA = Recipe(
    data="dataset/pretrain_i2t.parquet", learning_rate=3e-4, batch_size=40, train_language="none",
    epochs=8, warmup_ratio=0.02, save_every=500, keep=20)

PRESETS = {
    "emoji": Preset(
        language="dataset/emoji/language", vision="dataset/emoji/vision",
        system="",  # the little language model has never read a system turn
        pretrain=EMOJI,
        sft=replace(EMOJI, learning_rate=1e-3, train_language="all", steps=800)),
    "smollm2-dinov2": Preset(
        language="HuggingFaceTB/SmolLM2-135M-Instruct", vision="facebook/dinov2-small",
        # DINOv2's last layers are shaped by its own training task: the one before describes more.
        pixel_shuffle=2, vision_layer=-2,
        pretrain=replace(MINIMIND_DATA, batch_size=8, epochs=1, learning_rate=1e-3),
        sft=replace(MINIMIND_DATA, data="dataset/sft_i2t.parquet", batch_size=8, epochs=1,
                    train_language="all")),
    "qwen2.5-siglip": Preset(
        language="Qwen/Qwen2.5-0.5B", vision="google/siglip-base-patch16-224",
        pretrain=MINIMIND_DATA,
        sft=replace(MINIMIND_DATA, data="dataset/sft_i2t.parquet", train_language="all")),
}


def settings_of_preset(name: str, stage: str) -> dict:
    """stage: "pretrain" or "sft" -> {flag: value} of everything that a preset decides."""
    if name not in PRESETS:
        raise SystemExit(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    values = asdict(PRESETS[name])
    recipe = values[stage]
    del values["pretrain"], values["sft"]
    return {**values, **recipe, "lora_targets": list(values["lora_targets"])}


def read_flags(description: str, stage: str, arguments=None) -> argparse.Namespace:
    """The flags of both training scripts. Not given: None, so that the preset can fill it in."""
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    add("--preset", choices=PRESETS, help="named settings that all other flags override "
        "(default: emoji, or the preset of the checkpoint to start from)")
    add("--model", metavar="DIR", help="checkpoint, or run, to start from; none: the public "
        "towers and a new projector (default: " +
        ("none)" if stage == "pretrain" else "the newest in out/pretrain)"))
    add("--language", help="language model: a directory or a name on the hub")
    add("--vision", help="vision tower: a directory or a name on the hub")
    add("--vision_layer", type=int, help="whose features are used: -1 the last layer's, -2 ...")
    add("--projector", choices=("linear", "mlp"), help="what joins the two towers")
    add("--pixel_shuffle", type=int, help="n: n x n patches become one token")
    add("--system", help='system turn of conversations that have none; "" for no system turn')
    add("--data", help="training file, or emoji for the embedded world")
    add("--images", help="directory that the file's picture names are relative to")
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
    add("--dtype", choices=("auto", "bf16", "fp32"), help="numbers that the matrix products use; "
        "auto: bf16 where the hardware multiplies it natively, else fp32")
    add("--seed", type=int, default=None, help="of new weights, data order, dropout (default: 0)")
    add("--save_every", type=int, help="steps between checkpoints")
    add("--keep", type=int, help="newest checkpoints that are kept")
    add("--workers", type=int, default=None, help="processes that prepare data (default: 2)")
    add("--max_bad", type=float, default=None,
        help="share of unusable samples that stops the run (default: 0.01)")
    add("--train_projector", action=yes_no, help="train the projector")
    add("--train_language", help="all, none or last:N layers of the language model")
    add("--train_vision", action=yes_no, help="train the vision tower")
    add("--lora", action=yes_no, help="train low-rank adapters in a frozen language model")
    add("--lora_rank", type=int, help="width of the adapters")
    add("--lora_alpha", type=float, help="adapters add alpha / rank times their product")
    add("--lora_dropout", type=float, help="share of an adapter's input that is dropped")
    add("--lora_targets", nargs="+", help="names of the linear layers that get an adapter")
    add("--full_checkpoint", action=yes_no,
        help="copy the public towers into each checkpoint instead of referring to them")
    flags = parser.parse_args(arguments)
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
    others = {"seed": 0, "workers": 2, "max_bad": 0.01, "full_checkpoint": False, "model": None}
    settings = {**others, **settings_of_preset(preset, stage), **earlier, **given,
                "preset": preset}
    if "epochs" in given and "steps" not in given:
        settings["steps"] = None
    if given.get("lora") and "train_language" not in given:
        settings["train_language"] = "none"
    check(settings)
    return argparse.Namespace(**settings)


def check(settings: dict) -> None:
    """Refuse numbers that no run can use, before anything is loaded."""
    for name in ("batch_size", "accumulate", "max_length", "save_every", "keep", "pixel_shuffle",
                 "lora_rank", "learning_rate", "epochs", "clip"):
        if not settings[name] > 0:
            raise SystemExit(f"--{name} {settings[name]}: expected a number above 0")
    if settings["steps"] is not None and settings["steps"] < 1:
        raise SystemExit(f"--steps {settings['steps']}: expected at least 1")
    for name in ("warmup_ratio", "lora_dropout", "max_bad", "weight_decay", "workers"):
        if not settings[name] >= 0:
            raise SystemExit(f"--{name} {settings[name]}: expected 0 or more")
    for name in ("warmup_ratio", "lora_dropout"):
        if settings[name] >= 1:
            raise SystemExit(f"--{name} {settings[name]}: a share, so expected below 1")
