"""What a run says to people: before it begins, when it ends, when it stops.

    settings, model, TrainerState, summary -> a few lines of text
"""

import math
import os
import shlex
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from model.pretrained.checkpoint import checkpoints
from training.presets import settings_of_preset


def introduction(model, optimizer, settings, steps, facts: dict) -> str:
    """What is about to happen. facts: of run_metadata.describe."""
    lines, distributed, data = [], steps.distributed, facts["data"]["samples"]
    for part in ("language", "projector", "vision"):
        parameters = list(getattr(model, part).parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        lines.append(f"{part:<10}{sum(p.numel() for p in parameters):>14,} parameters, "
                     f"{trained:,} trained")
    peaks = ", ".join(f"{peak:g}" for peak in dict.fromkeys(
        group["peak"] for group in optimizer.param_groups))
    files = settings.data if isinstance(settings.data, list) else [settings.data]
    lines += [
        f"data      {data:,} samples from {' '.join(files)}, "
        f"{steps.loader.batches_per_epoch:,} batches in an epoch",
        f"run       {steps.total:,} steps of {steps.step_size} samples ({settings.batch_size} x "
        f"{settings.gradient_accumulation_steps} accumulated x {distributed.world_size} processes)",
        f"settings  preset {settings.preset}, peak learning rate {peaks}, {settings.dtype} on "
        f"{distributed.device}, seed {settings.seed}, to {settings.out}"]
    if settings.overfit:
        lines.append(f"overfit   these {data:,} samples only, over and over: the loss should fall "
                     "to nearly 0; if it does not, the fault is not in the rest of the data; "
                     "held-out samples are not looked at")
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
    program, machines = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}", ""
    if os.environ["GROUP_WORLD_SIZE"] != "1":
        program += f" --nnodes {os.environ['GROUP_WORLD_SIZE']}"
        machines = ", on each machine and with the --rdzv flags of before"
    return program, machines


def way_out(settings, start) -> str:
    """After a loss that is not finite: the commands that go on. start: of resume.read_settings."""
    program, where = started_with()
    script, saved = f"{program} train_{start.stage}.py", checkpoints(settings.out)
    command = (f"{script} --resume --out {shlex.quote(str(settings.out))}" if saved
               else f"{script} {shlex.join(start.arguments)}")
    commands = f"a lower learning rate{where}: {command} {lower_rates(settings, start.stage)}"
    if settings.dtype != "fp32":
        commands += f" or in float32: {command} --dtype fp32"
    if not saved:
        return f"There is no checkpoint yet. If the samples are sound, start again with {commands}"
    further = "there is no older one, so start the run anew, with a lower --learning_rate"
    if len(saved) > 1:
        last, aside = (shlex.quote(str(path)) for path in
                       (saved[-1], saved[-1].with_name(f"bad_{saved[-1].name}")))
        further = f"leave it out, and the same goes on from {saved[-2].name}: mv {last} {aside}"
    return (f"The last checkpoint is good: {saved[-1]}. If the samples are sound, go on from it "
            f"with {commands} (--max_grad_norm and --warmup_ratio may change too). If it then "
            f"stops here again, the weights of that checkpoint are the reason; {further}")


def lower_rates(settings, stage: str) -> str:
    """Flags: a tenth of each learning rate, or the preset's if that is lower still."""
    usual, flags = settings_of_preset(settings.preset, stage), []
    for name in ("learning_rate", "projector_learning_rate", "vision_learning_rate"):
        if (rate := getattr(settings, name)) is not None:
            flags.append(f"--{name} {min(rate / 10, usual[name] or math.inf):g}")
    return " ".join(flags)


def closing(summary: dict, checkpoint: Path, next_command: str) -> str:
    """The most of OUT/summary.json for people."""
    s, met = summary, summary["samples_trained"] + summary["samples_skipped"]
    overflows = f" ({s['overflow_steps']:,} skipped: fp16 overflowed)" * bool(s["overflow_steps"])
    lines = [
        f"{s['steps']:,} steps{overflows}, {s['samples_trained']:,} samples trained on in "
        f"{timedelta(seconds=round(s['wall_seconds']))}",
        f"{s['samples_skipped']:,} of {met:,} samples skipped as unusable",
        *(f"    {count:,} x {reason}" for reason, count in
          sorted(s["skipped_why"].items(), key=lambda pair: -pair[1])),
        f"{s['tokens']:,} tokens, {s['tokens_useful_share']:.1%} useful, the rest padding; "
        f"{s['tokens_per_second'] or 0:,.0f} a second"]
    for title, key in (("last loss", "last_loss"), ("best held-out loss", "best_eval_loss")):
        if s[key] is not None:
            lines.append(f"{title} {s[key]:.3f}")
    return "\n".join([*lines, f"checkpoint: {checkpoint}", f"next: {next_command}"])
