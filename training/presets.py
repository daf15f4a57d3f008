"""Named settings, and the flags that override them.

    preset's values -> the settings of the checkpoint to go on from -> explicit flags -> settings

A flag that is not given is None until here; so what stands in the preset counts unless you say
otherwise, and what you say always counts. The result is saved with the run, in run.json.
"""

import argparse
from dataclasses import asdict

from training.preset_table import PRESETS
from training.settings import PRESET, SETTINGS

OVERFIT_STEPS = 200


def settings_of_preset(name: str, stage: str) -> dict:
    """stage: "pretrain" or "sft" -> {flag: value} of everything that a preset decides."""
    if name not in PRESETS:
        raise SystemExit(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    preset = asdict(PRESETS[name])
    values = {**preset, **preset[stage]}
    # Lists, as flags give them and as run.json gives them back when a run is resumed.
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items() if name not in ("pretrain", "sft", "downloads")}


def read_flags(description: str, stage: str, arguments=None) -> argparse.Namespace:
    """The flags of both training scripts. Not given: None, so that the preset can fill it in."""
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    parser.add_argument("--list_presets", action="store_true", default=argparse.SUPPRESS, help=(
        "print the presets with their models, memory and download size, and end"))
    for setting in SETTINGS:
        setting.add_to(parser, stage)
    flags = parser.parse_args(arguments)
    if flags.data and len(flags.data) == 1:  # nothing to mix
        flags.data = flags.data[0]
    if flags.dtype == "auto":  # what every preset says; a resumed run goes on with what it chose
        flags.dtype = None
    return flags


def resolve(flags: argparse.Namespace, stage: str, earlier: dict) -> argparse.Namespace:
    """Fill in what no flag said, and refuse numbers that no run can use. earlier: settings to
    prefer to the preset's, see resume.find_start."""
    given = {name: value for name, value in vars(flags).items() if value is not None}
    preset = given.get("preset") or earlier.get("preset") or "emoji"
    defaults = {s.name: s.default for s in SETTINGS if s.default is not PRESET}
    settings = {**defaults, **settings_of_preset(preset, stage), **earlier, **given,
                "preset": preset}
    if "epochs" in given and "steps" not in given:
        settings["steps"] = None
    if "overfit" in given and not {"steps", "epochs"} & given.keys():
        settings["steps"] = OVERFIT_STEPS
    if "lora_from" in given:
        given["lora"] = settings["lora"] = True
        for name in ("lora_rank", "lora_alpha", "lora_targets"):
            if name in given:
                raise SystemExit(f"--{name}: the adapters of --lora_from {given['lora_from']} have "
                                 "their own; leave it out")
    # The two exclude each other: whichever was given puts the preset's other one out.
    if given.get("lora") and "train_language" not in given:
        settings["train_language"] = "none"
    if given.get("train_language", "none") != "none" and "lora" not in given:
        settings["lora"] = False
    for setting in SETTINGS:
        setting.check(settings[setting.name])
    if settings["eval_steps"] and not settings["overfit"] and settings["data"] != "emoji" and not (
            settings["eval_data"] or settings["eval_samples"]):
        raise SystemExit(f"--eval_steps {settings['eval_steps']}: on which samples? Give "
                         "--eval_data FILE, or --eval_samples N to set the last N of --data apart")
    return argparse.Namespace(**settings)
