"""What a run tells: two files of figures for machines, lines of progress for people.

    each optimizer step's figures -> a line of OUT/metrics.jsonl, and "step 12/400  loss 1.234"
    each measurement on held-out samples -> a line of OUT/evaluations.jsonl, and one to read
    the answers to some of them -> a line of OUT/answers.jsonl
"""

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import torch.distributed as dist

from extras.trackers import open_board
from model.pretrained.checkpoint import checkpoints
from training.presets import settings_of_preset

LISTED_BAD = 5  # so many bad samples are shown in full; the rest are only counted


class Log:
    """Rank 0 writes; on the other ranks every method does nothing."""

    def __init__(self, settings, steps: int, progress, enabled: bool):
        """progress: how far the run had come before; its later lines in the file are dropped."""
        self.steps, self.enabled = steps, enabled
        self.terminal = sys.stdout.isatty()
        self.started = time.monotonic()
        self.last_line = 0.0  # when the last plain line was printed
        self.first_step, self.bad = progress.step + 1, progress.bad
        if enabled:
            self.out = Path(settings.out)
            self.out.mkdir(parents=True, exist_ok=True)
            for name in ("metrics", "evaluations", "answers", "samples"):
                cut_metrics(self.out / f"{name}.jsonl", progress.step)
            self.file = open(self.out / "metrics.jsonl", "a", encoding="utf-8")
            self.board, self.close_board = open_board(settings, self.first_step)

    def step(self, step: int, figures: dict) -> None:
        """figures: the values of metrics.jsonl but the step's number, in their order."""
        if not self.enabled:
            return
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()  # a killed run keeps every step that it has made
        self.board("train", step, figures)
        now = time.monotonic()
        left = (now - self.started) / (step - self.first_step + 1) * (self.steps - step)
        loss = "overflow" if figures["loss"] is None else f"{figures['loss']:.3f}"
        line = (f"step {step}/{self.steps}  loss {loss}  "
                f"lr {figures['learning_rate']:.1e}  "
                f"{figures['tokens_per_second']:,.0f} tok/s  left {clock(left)}")
        if self.terminal:
            print(f"\r{line}\033[K", end="\n" if step == self.steps else "", flush=True)
        elif step in (self.first_step, self.steps) or now - self.last_line >= 10:
            self.last_line = now
            print(line, flush=True)

    def evaluation(self, step: int, figures: dict) -> None:
        """figures: the values of evaluations.jsonl but the step's number, in their order."""
        if not self.enabled:
            return
        with open(self.out / "evaluations.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        self.board("eval", step, figures)
        right, wrong = (f"{loss:.3f}" if loss is not None else "none" for loss in
                        (figures["eval_loss"], figures["eval_loss_wrong_picture"]))
        unusable = f", {figures['skipped']:,} unusable" if figures["skipped"] else ""
        self.say(f"step {step}/{self.steps}  held-out loss {right}, with wrong pictures {wrong} "
                 f"({figures['samples']:,} samples{unusable})")

    def answers(self, step: int, told: dict | None) -> None:
        """told: the values of answers.jsonl but the step's number; None: nothing was asked."""
        if not self.enabled or told is None:
            return
        with open(self.out / "answers.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **told}, ensure_ascii=False) + "\n")
        if "problem" in told:
            self.say(f"step {step}/{self.steps}  no answers to held-out questions: "
                     f"{told['problem']}")

    def samples(self, step: int, micro_batches: list[tuple[int, list[str]]]) -> None:
        """--log_samples: a line for the step, or two where it reaches into the next epoch.

        micro_batches: (epoch, places of its samples) of each, of all ranks.
        """
        if not self.enabled:
            return
        epochs = {}
        for epoch, where in micro_batches:
            epochs.setdefault(epoch, []).extend(where)
        with open(self.out / "samples.jsonl", "a", encoding="utf-8") as file:
            for epoch, where in sorted(epochs.items()):
                line = {"step": step, "epoch": epoch, "samples": where}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def say(self, text: str) -> None:
        if self.enabled:
            # On a terminal the line of progress is wiped first; the next step draws it again.
            print(("\r\033[K" if self.terminal else "") + text, flush=True)

    def close(self) -> None:
        if self.enabled:
            self.file.close()
            self.close_board()

    def bad_samples(self, new: list[str]) -> None:
        """Show the first few samples that were skipped; count all."""
        for number, line in enumerate(new, start=self.bad + 1):
            if number <= LISTED_BAD:
                self.say(f"skipped {line}")
            elif number == LISTED_BAD + 1:
                self.say("further skipped samples are only counted")
        self.bad += len(new)

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
    """Why a sample was skipped, without what is peculiar to it: names, numbers, quotations. So a
    million missing pictures are one reason and not a million."""
    for pattern, instead in ((r"'[^']*'|\"[^\"]*\"", "'...'"),
                             (r"[^\s(]*(?:[/\\]|\w\.[a-z]{2,4}\b)[^\s:;,)]*", "FILE"),
                             (r"\d[\d.,]*(?<=\d)", "N")):
        reason = re.sub(pattern, instead, reason)
    return reason


def clock(seconds: float) -> str:
    """151 -> "2:31", 3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def introduction(model, optimizer, settings, data, batches, steps: int, ranks) -> str:
    """What is about to happen, in a few lines."""
    lines = []
    for part in ("language", "projector", "vision"):
        parameters = list(getattr(model, part).parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        lines.append(f"{part:<10}{sum(p.numel() for p in parameters):>14,} parameters, "
                     f"{f'{trained:,} trained' if trained else 'frozen'}")
    rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(
        group["peak"] for group in optimizer.param_groups))
    files = settings.data if isinstance(settings.data, list) else [settings.data]
    rows = settings.batch_size * settings.accumulate * ranks.world_size
    lines += [
        f"data      {len(data):,} samples from {' '.join(files)}, "
        f"{batches.batches_per_epoch:,} batches in an epoch",
        f"run       {steps:,} steps of {rows} samples ({settings.batch_size} x "
        f"{settings.accumulate} accumulated x {ranks.world_size} processes)",
        f"settings  preset {settings.preset}, peak learning rate {rates}, {settings.dtype} on "
        f"{ranks.device}, seed {settings.seed}, to {settings.out}",
    ]
    if settings.overfit:
        lines.append(
            f"overfit   these {len(data):,} samples only, over and over: the loss should fall to "
            "nearly 0; if it does not, the fault is not in the rest of the data"
            + ("; held-out samples are not looked at" if settings.eval_every else ""))
    return "\n".join(lines)


def stopped(progress, stage: str, settings) -> str:
    """After a signal: what is there, and the command that goes on from it."""
    program, where = started_with()
    return (f"asked to stop: step {progress.step} is finished and saved. To go on{where}:\n"
            f"{program} train_{stage}.py --resume --out {shlex.quote(str(settings.out))}")


def started_with() -> tuple[str, str]:
    """The program that starts a script as this run was started, and where, if that is to be said.
    """
    if not dist.is_torchelastic_launched():
        return "python", ""
    program, nodes = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}", ""
    if os.environ["GROUP_WORLD_SIZE"] != "1":
        program += f" --nnodes {os.environ['GROUP_WORLD_SIZE']}"
        nodes = ", on each machine and with the --rdzv flags of before"
    return program, nodes


def way_out(settings, stage: str, arguments: list[str]) -> str:
    """After a loss that is not finite: the commands that go on. arguments: of this launch."""
    program, where = started_with()
    script, there = f"{program} train_{stage}.py", checkpoints(settings.out)
    resume = f"{script} --resume --out {shlex.quote(str(settings.out))}"
    start = resume if there else f"{script} {shlex.join(arguments)}"
    rates = [f"--learning_rate {lower_rate(settings, stage, 'learning_rate'):g}"]
    for part in ("projector", "vision"):
        name = f"{part}_learning_rate"
        if getattr(settings, name) is not None and getattr(settings, f"train_{part}"):
            rates.append(f"--{name} {lower_rate(settings, stage, name):g}")
    commands = f"a lower learning rate{where}: {start} {' '.join(rates)}"
    if settings.dtype != "fp32":
        commands += f" or in float32: {start} --dtype fp32"
    if not there:
        return ("There is no checkpoint yet. If the samples are sound, start again with "
                + commands)
    further = "there is no older one, so start the run anew, with a lower --learning_rate"
    if len(there) > 1:
        last, aside = (shlex.quote(str(path)) for path in
                       (there[-1], there[-1].with_name(f"bad_{there[-1].name}")))
        further = f"leave it out, and the same goes on from {there[-2].name}: mv {last} {aside}"
    return (f"The last checkpoint is good: {there[-1]}. If the samples are sound, go on from it "
            f"with {commands} (--clip and --warmup_ratio may change too). If it then stops here "
            f"again, the weights of that checkpoint are the reason; {further}")


def lower_rate(settings, stage: str, name: str) -> float:
    """A tenth, or the preset's if that is lower still."""
    usual = settings_of_preset(settings.preset, stage)[name]
    tenth = getattr(settings, name) / 10
    return tenth if usual is None else min(tenth, usual)


def closing(summary: dict, checkpoint: Path, next_command: str) -> str:
    """The figures of OUT/summary.json for people."""
    s, seen = summary, summary["samples_trained"] + summary["samples_skipped"]
    overflows = (f" ({s['overflow_steps']:,} skipped: fp16 overflowed)" if s["overflow_steps"]
                 else "")
    lines = [
        f"{s['steps']:,} steps{overflows}, {s['samples_trained']:,} samples trained on in "
        f"{clock(s['wall_seconds'])}",
        f"{s['samples_skipped']:,} of {seen:,} samples skipped as unusable",
        *(f"    {count:,} x {reason}" for reason, count in
          sorted(s["skipped_why"].items(), key=lambda pair: -pair[1])),
        f"{s['tokens']:,} tokens, {s['tokens_supervised']:,} supervised, "
        f"{s['tokens_useful_share']:.1%} useful, the rest padding; "
        f"{s['tokens_per_second'] or 0:,.0f} a second",
        "most memory " + ", ".join(
            f"{s[name] / 1e9:,.2f} GB {where}" for name, where in
            (("peak_memory", "in a process"), ("peak_gpu_memory", "on a GPU")) if s[name]),
    ]
    if s["last_loss"] is not None:
        lines.append(f"last loss {s['last_loss']:.3f}, lowest of a step {s['best_loss']:.3f}")
    if s["best_eval_loss"] is not None:
        wrong = s["last_evaluation"]["eval_loss_wrong_picture"]
        lines.append(f"best held-out loss {s['best_eval_loss']:.3f} at step {s['best_eval_step']}, "
                     f"at last {s['last_evaluation']['eval_loss']:.3f}"
                     + (f", with wrong pictures {wrong:.3f}" if wrong is not None else ""))
    return "\n".join([*lines, f"checkpoint: {checkpoint}", f"next: {next_command}"])
