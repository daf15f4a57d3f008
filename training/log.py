"""What a run writes down: files of numbers for programs, lines of progress for people.

    metrics of each optimizer step -> a line of OUT/metrics.jsonl, and "step 12/400  loss 1.234"
    losses of held-out samples -> a line of OUT/evaluations.jsonl, and one on the screen
    answers to some of them -> a line of OUT/answers.jsonl
"""

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import torch.distributed as dist

from model.pretrained.checkpoint import checkpoints, newest_checkpoint
from training.presets import settings_of_preset

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
                        (losses["eval_loss"], losses["eval_loss_wrong_picture"]))
        unusable = f", {losses['skipped']:,} unusable" if losses["skipped"] else ""
        self.say(f"step {step}/{self.steps}  held-out loss {right}, with wrong pictures {wrong} "
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
        if cache := self.run.loader.features:
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


def clock(seconds: float) -> str:
    """151 -> "2:31", 3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def introduction(model, optimizer, settings, steps, facts: dict) -> str:
    """What is about to happen, in a few lines. facts: of run_metadata.describe."""
    lines, distributed, data = [], steps.distributed, facts["data"]["samples"]
    for part in ("language", "projector", "vision"):
        parameters = list(getattr(model, part).parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        lines.append(f"{part:<10}{sum(p.numel() for p in parameters):>14,} parameters, "
                     f"{f'{trained:,} trained' if trained else 'frozen'}")
    peaks = ", ".join(f"{peak:g}" for peak in dict.fromkeys(
        group["peak"] for group in optimizer.param_groups))
    files = settings.data if isinstance(settings.data, list) else [settings.data]
    lines += [
        f"data      {data:,} samples from {' '.join(files)}, "
        f"{steps.loader.batches_per_epoch:,} batches in an epoch",
        f"run       {steps.total:,} steps of {steps.step_size} samples ({settings.batch_size} x "
        f"{settings.accumulate} accumulated x {distributed.world_size} processes)",
        f"settings  preset {settings.preset}, peak learning rate {peaks}, {settings.dtype} on "
        f"{distributed.device}, seed {settings.seed}, to {settings.out}",
    ]
    if settings.overfit:
        lines.append(
            f"overfit   these {data:,} samples only, over and over: the loss should fall to "
            "nearly 0; if it does not, the fault is not in the rest of the data"
            + ("; held-out samples are not looked at" if settings.eval_every else ""))
    lines += ["changed   from step {from_step}: {setting} is {now}, before it was {before}".format(
        **change) for change in facts["changes"]]
    return "\n".join(lines)


def stopped(step: int, stage: str, settings) -> str:
    """After a signal: which step is saved, and the command that goes on from it."""
    program, where = started_with()
    return (f"asked to stop: step {step} is finished and saved. To go on{where}:\n"
            f"{program} train_{stage}.py --resume --out {shlex.quote(str(settings.out))}")


def started_with() -> tuple[str, str]:
    """The program that starts a script as this run was started, and where, on several machines."""
    if not dist.is_torchelastic_launched():
        return "python", ""
    program, nodes = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}", ""
    if os.environ["GROUP_WORLD_SIZE"] != "1":
        program += f" --nnodes {os.environ['GROUP_WORLD_SIZE']}"
        nodes = ", on each machine and with the --rdzv flags of before"
    return program, nodes


def way_out(settings, start) -> str:
    """After a loss that is not finite: the commands that go on. start: of resume.read_settings."""
    program, where = started_with()
    script, saved = f"{program} train_{start.stage}.py", checkpoints(settings.out)
    resume = f"{script} --resume --out {shlex.quote(str(settings.out))}"
    command = resume if saved else f"{script} {shlex.join(start.arguments)}"
    rates = [f"--learning_rate {lower_rate(settings, start.stage, 'learning_rate'):g}"]
    for part in ("projector", "vision"):
        name = f"{part}_learning_rate"
        if getattr(settings, name) is not None and getattr(settings, f"train_{part}"):
            rates.append(f"--{name} {lower_rate(settings, start.stage, name):g}")
    commands = f"a lower learning rate{where}: {command} {' '.join(rates)}"
    if settings.dtype != "fp32":
        commands += f" or in float32: {command} --dtype fp32"
    if not saved:
        return ("There is no checkpoint yet. If the samples are sound, start again with "
                + commands)
    further = "there is no older one, so start the run anew, with a lower --learning_rate"
    if len(saved) > 1:
        last, aside = (shlex.quote(str(path)) for path in
                       (saved[-1], saved[-1].with_name(f"bad_{saved[-1].name}")))
        further = f"leave it out, and the same goes on from {saved[-2].name}: mv {last} {aside}"
    return (f"The last checkpoint is good: {saved[-1]}. If the samples are sound, go on from it "
            f"with {commands} (--clip and --warmup_ratio may change too). If it then stops here "
            f"again, the weights of that checkpoint are the reason; {further}")


def lower_rate(settings, stage: str, name: str) -> float:
    """A tenth, or the preset's if that is lower still."""
    usual = settings_of_preset(settings.preset, stage)[name]
    tenth = getattr(settings, name) / 10
    return tenth if usual is None else min(tenth, usual)


def closing(summary: dict, checkpoint: Path, next_command: str) -> str:
    """OUT/summary.json for people."""
    s, met = summary, summary["samples_trained"] + summary["samples_skipped"]
    overflows = (f" ({s['overflow_steps']:,} skipped: fp16 overflowed)" if s["overflow_steps"]
                 else "")
    lines = [
        f"{s['steps']:,} steps{overflows}, {s['samples_trained']:,} samples trained on in "
        f"{clock(s['wall_seconds'])}",
        f"{s['samples_skipped']:,} of {met:,} samples skipped as unusable",
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
