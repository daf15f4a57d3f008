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
from pathlib import Path

from model.pretrained.checkpoint import newest_checkpoint
from training.messages import clock, closing, stopped

LISTED_BAD = 5  # so many bad samples are shown in full; the rest are only counted


class Log:
    """Rank 0 writes; on the other ranks every method does nothing.

    listeners: functions of ("train" or "eval", step, numbers), such as a tracker's. closers: called
    when the run ends.
    """

    def __init__(self, settings, steps):
        """steps: of training/steps.py. Lines in the files that are later than steps.state are
        dropped: a killed run wrote some past its last checkpoint."""
        state = steps.state
        self.settings, self.run, self.steps = settings, steps, steps.total
        self.enabled = steps.distributed.main
        steps.on_skipped = self.bad_samples
        self.summary = None  # of run_metadata.summarise, once the run has ended
        self.listeners, self.closers = [], []
        self.terminal = sys.stdout.isatty()
        self.started = time.monotonic()
        self.last_line = 0.0  # when the last plain line was printed
        self.first_step, self.bad = state.step + 1, state.skipped
        if self.enabled:
            self.out = Path(settings.out)
            self.out.mkdir(parents=True, exist_ok=True)
            for name in ("metrics", "evaluations", "answers", "samples"):
                cut_metrics(self.out / f"{name}.jsonl", state.step)
            self.file = open(self.out / "metrics.jsonl", "a", encoding="utf-8")

    def step(self, step: int, metrics: dict) -> None:
        """The first of the loop's hooks. metrics: a line of metrics.jsonl, in this order."""
        if not self.enabled:
            return
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()  # a killed run keeps every step that it has made
        self.notify("train", step, metrics)
        now = time.monotonic()
        left = (now - self.started) / (step - self.first_step + 1) * (self.steps - step)
        loss = "overflow" if metrics["loss"] is None else f"{metrics['loss']:.3f}"
        line = (f"step {step}/{self.steps}  loss {loss}  "
                f"lr {metrics['learning_rate']:.1e}  "
                f"{metrics['tokens_per_second']:,.0f} tok/s  left {clock(left)}")
        if self.terminal:
            print(f"\r{line}\033[K", end="\n" if step == self.steps else "", flush=True)
        elif step in (self.first_step, self.steps) or now - self.last_line >= 10:
            self.last_line = now
            print(line, flush=True)

    def notify(self, kind: str, step: int, numbers: dict) -> None:
        for listener in self.listeners:
            listener(kind, step, numbers)

    def append(self, name: str, line: dict) -> None:
        """A line of OUT/NAME.jsonl."""
        if self.enabled:
            with open(self.out / f"{name}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def evaluation(self, step: int, losses: dict) -> None:
        """losses: a line of evaluations.jsonl but for the step, in this order."""
        if not self.enabled:
            return
        self.append("evaluations", {"step": step, **losses})
        self.notify("eval", step, losses)
        right, wrong = (f"{loss:.3f}" if loss is not None else "none" for loss in
                        (losses["eval_loss"], losses["eval_loss_shuffled_images"]))
        unusable = f", {losses['skipped']:,} unusable" if losses["skipped"] else ""
        self.say(f"step {step}/{self.steps}  held-out loss {right}, with wrong images {wrong} "
                 f"({losses['samples']:,} samples{unusable})")

    def answers(self, step: int, answers: dict | None) -> None:
        """answers: a line of answers.jsonl but for the step; None: nothing was asked."""
        if answers is None:
            return
        self.append("answers", {"step": step, **answers})
        if "problem" in answers:
            self.say(f"step {step}/{self.steps}  no answers to held-out questions: "
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

    def close(self) -> None:
        if self.enabled:
            self.file.close()
            for close in self.closers:
                close()

    def bad_samples(self, new: list[str]) -> None:
        """Show the first few samples that were skipped; count all."""
        for number, line in enumerate(new, start=self.bad + 1):
            if number <= LISTED_BAD:
                self.say(f"skipped {line}")
            elif number == LISTED_BAD + 1:
                self.say("further skipped samples are only counted")
        self.bad += len(new)

    def finish(self, stage: str, next_command: str) -> None:
        """The last lines on the screen. All ranks call it."""
        if cache := getattr(self.run.loader, "features", None):  # --feature_cache
            self.say(cache.summary(self.run.distributed))
        if self.run.state.step < self.steps:
            self.say(stopped(self.run.state.step, stage, self.settings))
        elif self.enabled:
            out = self.settings.out
            model = "" if out == f"out/{stage}" else f" --model {out}"
            self.say(closing(self.summary, newest_checkpoint(out), next_command + model))
        self.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def cut_metrics(path: Path, last_step: int) -> None:
    """Drop the lines after last_step: a killed run wrote some past its last checkpoint.

    A line that the kill cut in half goes too. The file is replaced in one move: a kill right here
    leaves it as it was.
    """
    if not path.exists():
        return
    kept, lines = [], path.read_text(encoding="utf-8").splitlines(keepends=True)
    for line in lines:
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= last_step:
                kept.append(line)
        except ValueError:
            continue
    if len(kept) == len(lines):
        return
    cut = path.with_name(f".{path.name}")
    cut.write_text("".join(kept), encoding="utf-8")
    os.replace(cut, path)


def kind_of(reason: str) -> str:
    """Why a sample was skipped, without its names, numbers and quotations. So a million missing
    images are one reason and not a million."""
    for pattern, replacement in ((r"'[^']*'|\"[^\"]*\"", "'...'"),
                             (r"[^\s(]*(?:[/\\]|\w\.[a-z]{2,4}\b)[^\s:;,)]*", "FILE"),
                             (r"\d[\d.,]*(?<=\d)", "N")):
        reason = re.sub(pattern, replacement, reason)
    return reason
