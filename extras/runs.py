"""A run's directory, read again, and the documented runs to hold it against.

    OUT/run.json, summary.json, scores.json,
        metrics.jsonl, evaluations.jsonl, answers.jsonl -> RunRecord
    docs/reference/*.jsonl -> the loss curve of the documented run of the same preset and stage

`python -m extras.runs OUT NAME` makes docs/reference/NAME.jsonl out of a run: a first line that
says which run it was, then the mean loss of every ten steps.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from training.presets import PRESETS, settings_of_preset
from training.run_metadata import read_lines, read_object

REFERENCES = Path(__file__).resolve().parent.parent / "docs" / "reference"
# What the loss curve depends on; a run that differs in one of them need not look like another.
CURVE_SETTINGS = (
    "data", "batch_size", "gradient_accumulation_steps", "steps", "epochs", "learning_rate",
    "projector_learning_rate", "warmup_ratio", "weight_decay", "max_length", "dtype",
    "train_projector", "train_language", "train_vision", "lora", "lora_rank", "lora_alpha",
    "lora_dropout", "projector", "pixel_shuffle", "overfit", "seed")


@dataclass(frozen=True)
class RunRecord:
    """A run may be killed at any moment: each file may be missing, and its last line torn."""

    out: Path
    run: dict
    summary: dict
    scores: dict
    metrics: list
    evaluations: list
    answers: list

    @property
    def settings(self) -> dict:
        return self.run.get("settings", {})

    @property
    def recipe(self) -> str:
        return f"{self.settings.get('preset')} {self.run.get('stage')}"

    @property
    def last_step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0


def read_run(out) -> RunRecord:
    """Raises FileNotFoundError when OUT holds neither a training nor eval.py's scores."""
    out = Path(out)
    if not any((out / name).exists() for name in ("metrics.jsonl", "run.json", "answers.jsonl")):
        raise FileNotFoundError(f"{out} holds neither metrics.jsonl nor run.json: give the --out "
                                "of a training, or a directory of eval.py's scores")
    return RunRecord(out, *(read_object(out / f"{name}.json")
                            for name in ("run", "summary", "scores")),
                     *(read_lines(out / f"{name}.jsonl")
                       for name in ("metrics", "evaluations", "answers")))


def mean_loss(lines: list[dict]) -> float | None:
    """Of the steps that have one; in fp16 a step that overflows has none."""
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    return sum(losses) / len(losses) if losses else None


def answers_of(run: RunRecord) -> dict:
    """{(where, question): [(step, its line), ...]}: of a training at each measurement, of scores
    once, without a step."""
    answers = {}
    for line in run.answers:
        for one in line.get("answers", [line]):
            if "answer" in one:
                key = one["where"], one["question"]
                answers.setdefault(key, []).append((line.get("step"), one))
    return answers


def marked_settings(run: RunRecord) -> dict:
    """The settings, each with what the preset says where the run was given something else."""
    preset, stage = run.settings.get("preset"), run.run.get("stage")
    expected = settings_of_preset(preset, stage) if preset in PRESETS else {}
    # Where the preset says nothing, or "auto", a run writes down what became of it.
    return {name: f"{value} (the preset: {expected[name]})"
            if expected.get(name) not in (None, "auto", value) else value
            for name, value in sorted(run.settings.items())}


# ---------------------------------------------------------------- the documented runs


def curve_settings(run: RunRecord) -> dict:
    """Of data files only the names: where they lie changes no curve."""
    kept = {name: run.settings[name] for name in CURVE_SETTINGS if name in run.settings}
    if files := kept.get("data"):
        files = [files] if isinstance(files, str) else files
        kept["data"] = " ".join(Path(file).name for file in files)
    return kept


def unlike(settings: dict, others: dict) -> dict:
    """{name: (value here, value there)} of the settings that both have, and that differ."""
    return {name: (value, others[name]) for name, value in settings.items()
            if name in others and value != others[name]}


def reference_of(run: RunRecord) -> tuple[dict, list]:
    """-> what the documented run of this preset and stage was, and its curve: of several the one
    whose settings are the most alike, ({}, []) where there is none."""
    files = [read_lines(file) for file in sorted(REFERENCES.glob("*.jsonl"))]
    return min(((about, points) for about, *points in files if about["recipe"] == run.recipe),
               key=lambda one: len(unlike(curve_settings(run), one[0]["settings"])),
               default=({}, []))


def keep_reference(run: RunRecord, name: str) -> Path:
    """Write the curve of this run where reference_of finds it."""
    lines = [{"recipe": run.recipe, "steps": run.last_step, "commit": run.run.get("commit"),
              "settings": curve_settings(run)}]
    metrics = [m for m in run.metrics if m["loss"] is not None]  # fp16 overflowed there
    for group in (metrics[i:i + 10] for i in range(0, len(metrics), 10)):
        lines.append({"step": (group[0]["step"] + group[-1]["step"]) / 2,
                      "loss": round(mean_loss(group), 4)})
    file = REFERENCES / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m extras.runs OUT NAME")
    print(keep_reference(read_run(sys.argv[1]), sys.argv[2]))
