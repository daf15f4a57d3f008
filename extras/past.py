"""A run's directory, read again: files of figures -> PastRun, for whoever draws or compares runs.

    OUT/run.json, summary.json, scores.json,
        metrics.jsonl, evaluations.jsonl, answers.jsonl -> PastRun

A run may have been killed at any moment, so every file may be missing, and the last line of one
may be torn: what is there is used.

`python -m extras.past RUN [NAME]` makes the reference curve of a documented recipe out of a run
of it: docs/reference/NAME.jsonl (PRESET_STAGE, if not given), a first line that says which run it
was, then the mean loss of every ten steps. report.py draws it behind the curve of later runs of
that preset and stage; of several, the one whose settings are the most alike.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from training.presets import PRESETS, settings_of_preset

REFERENCES = Path(__file__).resolve().parent.parent / "docs" / "reference"
TOGETHER = 10  # steps that become one point of a reference curve
# What the curve depends on; a run that differs in one of them need not look like the reference.
COMPARED = ("data", "batch_size", "accumulate", "steps", "epochs", "learning_rate",
            "projector_learning_rate", "warmup_ratio", "weight_decay", "max_length", "dtype",
            "train_projector", "train_language", "train_vision", "lora", "lora_rank", "lora_alpha",
            "lora_dropout", "projector", "pixel_shuffle", "overfit", "seed")


@dataclass(frozen=True)
class PastRun:
    out: Path
    run: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)
    metrics: list = field(default_factory=list)
    evaluations: list = field(default_factory=list)
    answers: list = field(default_factory=list)

    @property
    def settings(self) -> dict:
        return self.run.get("settings", {})

    @property
    def last_step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def outcome(self) -> str:
        launches = self.run.get("launches")
        if not launches:
            return "unknown: there is no run.json"
        return launches[-1]["outcome"] or "no end was written: it goes on, or it was killed"


def read_past(out) -> PastRun:
    """Raises FileNotFoundError when OUT holds no run."""
    out = Path(out)
    if not any((out / name).exists() for name in ("metrics.jsonl", "run.json")):
        raise FileNotFoundError(f"{out} holds neither metrics.jsonl nor run.json: give the --out "
                                "of a training run")
    return PastRun(out, *(read_object(out / f"{name}.json")
                          for name in ("run", "summary", "scores")),
                   *(read_whole_lines(out / f"{name}.jsonl")
                     for name in ("metrics", "evaluations", "answers")))


def read_object(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_whole_lines(path: Path) -> list[dict]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for text in lines:
        try:
            found.append(json.loads(text))
        except ValueError:  # torn by a kill
            continue
    return [line for line in found if isinstance(line, dict) and "step" in line]


def recipe_of(past: PastRun) -> str:
    return f"{past.settings.get('preset')} {past.run.get('stage')}"


def compared(past: PastRun) -> dict:
    """The run's settings that COMPARED names; of data files the names, wherever they lie."""
    found = {name: past.settings[name] for name in COMPARED if name in past.settings}
    if isinstance(files := found.get("data"), str | list):
        names = [Path(file).name for file in ([files] if isinstance(files, str) else files)]
        found["data"] = " ".join(names)
    return found


def reference_of(past: PastRun) -> tuple[dict, list] | None:
    """-> what the recipe's documented run was, and its curve; None where none is kept."""
    kept = []
    for file in sorted(REFERENCES.glob("*.jsonl")):
        about, *curve = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        if about["recipe"] == recipe_of(past):
            kept.append((about, curve))
    return min(kept, key=lambda one: len(unlike(compared(past), one[0]["settings"])), default=None)


def unlike(settings: dict, others: dict) -> dict:
    """{name: (this one's, the other's)} of what COMPARED names and both of them say."""
    return {name: (settings[name], others[name]) for name in COMPARED
            if name in settings and name in others and settings[name] != others[name]}


def unlike_preset(past: PastRun) -> dict:
    """{setting: the preset's value} where this run was told otherwise."""
    preset, stage = past.settings.get("preset"), past.run.get("stage")
    if preset not in PRESETS or stage not in ("pretrain", "sft"):
        return {}
    return {name: value for name, value in settings_of_preset(preset, stage).items()
            if name in past.settings and past.settings[name] != value
            # Where the preset says nothing, or "auto", a run writes down what became of it.
            and value not in (None, "auto")}


def means(metrics: list[dict], together: int = TOGETHER) -> list[dict]:
    """The mean loss of every so many steps, at the middle one."""
    metrics = [m for m in metrics if m["loss"] is not None]  # fp16 overflowed there
    groups = [metrics[i:i + together] for i in range(0, len(metrics), together)]
    return [{"step": (group[0]["step"] + group[-1]["step"]) / 2,
             "loss": round(sum(m["loss"] for m in group) / len(group), 4)} for group in groups]


def keep_reference(past: PastRun, name: str | None = None) -> Path:
    """Write the curve of this run where reference_of finds it."""
    about = {"recipe": recipe_of(past), "steps": past.last_step, "commit": past.run.get("commit"),
             "settings": compared(past)}
    file = REFERENCES / f"{name or recipe_of(past).replace(' ', '_')}.jsonl"
    lines = [about, *means(past.metrics)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


if __name__ == "__main__":
    print(keep_reference(read_past(sys.argv[1]), *sys.argv[2:3]))
