"""What a run writes down: files of numbers for programs, lines of progress for people.

    metrics of each optimizer step -> a line of OUT/metrics.jsonl, and "step 12/400  loss 1.234"
    losses of held-out samples -> a line of OUT/evaluations.jsonl, and one on the screen
    answers to some of them -> a line of OUT/answers.jsonl
"""

import json
import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

from model.pretrained.checkpoint import newest_checkpoint
from training.messages import closing, stopped
from training.run_metadata import read_lines

LISTED_BAD = 5  # so many bad samples are shown in full; the rest are only counted


class Log:
    """Rank 0 writes; on the other ranks every method does nothing."""

    def __init__(self, settings, steps):
        """steps: of training/steps.py. Lines in the files that are later than steps.state are
        dropped: a killed run wrote some past its last checkpoint."""
        self.settings, self.steps = settings, steps
        self.out = Path(settings.out)
        self.enabled = steps.distributed.main
        self.tracker = None  # with log(values, step) and finish(), as open_tracker returns it
        self.summary = None  # of run_metadata.summarise, once the run has ended
        self.terminal = sys.stdout.isatty()
        self.started = time.monotonic()
        self.last_line = 0.0  # when the last plain line was printed
        self.first_step = steps.state.step + 1
        steps.on_skipped = self.bad_samples
        if self.enabled:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "metrics.jsonl").touch()
            for name in ("metrics", "evaluations", "answers", "samples"):
                cut_metrics(self.out / f"{name}.jsonl", steps.state.step)

    def step(self, step: int, metrics: dict) -> None:
        """The first of the loop's hooks. metrics: a line of metrics.jsonl, in this order."""
        if not self.enabled:
            return
        self.append("metrics", {"step": step, **metrics})
        self.track("train", step, metrics)
        now, total = time.monotonic(), self.steps.total
        left = (now - self.started) / (step - self.first_step + 1) * (total - step)
        loss = "overflow" if metrics["loss"] is None else f"{metrics['loss']:.3f}"
        line = (f"step {step}/{total}  loss {loss}  lr {metrics['learning_rate']:.1e}  "
                f"{metrics['tokens_per_second']:,.0f} tok/s  left {timedelta(seconds=round(left))}")
        if self.terminal:
            print(f"\r{line}\033[K", end="\n" if step == total else "", flush=True)
        elif step in (self.first_step, total) or now - self.last_line >= 10:
            self.last_line = now
            print(line, flush=True)

    def append(self, name: str, line: dict) -> None:
        """A line of OUT/NAME.jsonl, in the file at once: a killed run keeps all that it wrote."""
        if self.enabled:
            with open(self.out / f"{name}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def track(self, kind: str, step: int, numbers: dict) -> None:
        """kind: "train" or "eval"."""
        if self.tracker:
            self.tracker.log({f"{kind}/{name}": value for name, value in numbers.items()
                              if value is not None}, step=step)

    def evaluation(self, step: int, losses: dict) -> None:
        """losses: a line of evaluations.jsonl but for the step, in this order."""
        self.append("evaluations", {"step": step, **losses})
        self.track("eval", step, losses)
        right, wrong = (f"{loss:.3f}" if loss is not None else "none" for loss in
                        (losses["eval_loss"], losses["eval_loss_shuffled_images"]))
        self.say(f"step {step}/{self.steps.total}  held-out loss {right}, with wrong images {wrong}"
                 f" ({losses['samples']:,} samples, {losses['skipped']:,} unusable)")

    def answers(self, step: int, answers: dict | None) -> None:
        """answers: a line of answers.jsonl but for the step; None: nothing was asked."""
        if answers:
            self.append("answers", {"step": step, **answers})
            if "problem" in answers:
                self.say(f"step {step}/{self.steps.total}  no answers to held-out questions: "
                         f"{answers['problem']}")

    def samples(self, step: int, sources: list[tuple[int, list[str]]]) -> None:
        """--log_samples: a line for the step, or two where it reaches into the next epoch.

        sources: (epoch, where its samples stand) of each micro-batch of all ranks.
        """
        epochs = {}
        for epoch, where in sources:
            epochs.setdefault(epoch, []).extend(where)
        for epoch, where in sorted(epochs.items()):
            self.append("samples", {"step": step, "epoch": epoch, "samples": where})

    def say(self, text: str) -> None:
        if self.enabled:
            # On a terminal the line of progress is wiped first; the next step draws it again.
            print(("\r\033[K" if self.terminal else "") + text, flush=True)

    def bad_samples(self, new: list[str]) -> None:
        """Show the first few samples that were skipped; steps.state counts all."""
        for number, line in enumerate(new, start=self.steps.state.skipped + 1):
            if number <= LISTED_BAD:
                self.say(f"skipped {line}")
            elif number == LISTED_BAD + 1:
                self.say("further skipped samples are only counted")

    def finish(self, stage: str, next_command: str) -> None:
        """The last lines on the screen. All ranks call it."""
        if cache := getattr(self.steps.loader, "features", None):  # --feature_cache
            self.say(cache.summary(self.steps.distributed))
        if self.steps.state.step < self.steps.total:
            self.say(stopped(self.steps.state.step, stage, self.settings))
        elif self.enabled:
            model = "" if self.settings.out == f"out/{stage}" else f" --model {self.settings.out}"
            self.say(closing(self.summary, newest_checkpoint(self.out), next_command + model))
        if self.tracker:
            self.tracker.finish()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def cut_metrics(path: Path, last_step: int) -> None:
    """Drop the lines after last_step: a killed run wrote some past its last checkpoint.

    A line that the kill cut in half goes too. The file is replaced in one move: a kill right here
    leaves it as it was.
    """
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= last_step]
        cut = path.with_name(f".{path.name}")
        cut.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept),
                       encoding="utf-8")
        os.replace(cut, path)


def kind_of(reason: str) -> str:
    """Why a sample was skipped, without its names, numbers and quotations. So a million missing
    images are one reason and not a million."""
    for pattern, replacement in ((r"'[^']*'|\"[^\"]*\"", "'...'"),
                             (r"[^\s(]*(?:[/\\]|\w\.[a-z]{2,4}\b)[^\s:;,)]*", "FILE"),
                             (r"\d[\d.,]*(?<=\d)", "N")):
        reason = re.sub(pattern, replacement, reason)
    return reason
