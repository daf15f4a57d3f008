"""The one training loop: batches in, trained weights, metrics.jsonl and checkpoints out.

An optimizer step is made of `accumulate` micro-batches on each rank:

    count the supervised tokens of the whole step, over all micro-batches and ranks
    for each micro-batch: loss sum / that count -> backward, gradients pile up
    sum the gradients over the ranks -> clip -> AdamW

So each supervised token weighs the same, whichever micro-batch or rank it came with. A mean per
micro-batch would let the tokens of a short answer weigh more than those of a long one.

Micro-batches are counted on across the ends of epochs: no step is cut short there. Only the very
last step of a run may be a smaller one, when the epochs are used up.
"""

import math
import time
from dataclasses import asdict, dataclass, field

import torch

from training.log import kind_of
from training.optim import schedule, set_learning_rate

KINDS = 50  # of reasons that are counted one by one; more would be names taken for reasons
ENOUGH = 100  # samples that must have been seen before their share of bad ones is judged


@dataclass
class Progress:
    """How far a run has come; with the optimizer's state all that a resume needs."""

    step: int = 0  # optimizer steps made
    epoch: int = 0  # where the next micro-batch lies
    batch: int = 0
    bad: int = 0  # samples skipped so far, on all ranks
    skipped: dict = field(default_factory=dict)  # why: how many of them
    rows: int = 0  # samples trained on
    positions: int = 0  # tokens computed, padding included
    useful: int = 0  # tokens computed, padding left out


class StopTraining(Exception):
    """The run cannot go on; the text says why and what to do. Checkpoints stay as they are."""


def micro_batches_of_run(settings, batches) -> float:
    """With --epochs, the micro-batches of the whole run on each rank; with --steps, no limit."""
    if settings.steps is not None:
        return math.inf
    return math.ceil(settings.epochs * batches.batches_per_epoch)


def steps_of_run(settings, batches) -> int:
    if settings.steps is not None:
        return settings.steps
    return math.ceil(micro_batches_of_run(settings, batches) / settings.accumulate)


def endless(batches, epoch: int, batch: int):
    """(Batch, bad samples, epoch and number of the batch after it), epoch after epoch."""
    while True:
        for micro, bad in batches.epoch(epoch, skip=batch):
            batch += 1
            at_end = batch == batches.batches_per_epoch
            yield micro, bad, ((epoch + 1, 0) if at_end else (epoch, batch))
        epoch, batch = epoch + 1, 0


def train(model, batches, optimizer, settings, ranks, log, save, progress: Progress,
          held_out=None) -> Progress:
    """Train from progress.step to the last step.

    save(step, state) writes a checkpoint, on every save_every-th step and after the last.
    held_out: what is measured on every eval_every-th step and after the last, see held_out.py.
    """
    steps, limit = steps_of_run(settings, batches), micro_batches_of_run(settings, batches)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    stream = endless(batches, progress.epoch, progress.batch)
    model.train()
    for step in range(progress.step + 1, steps + 1):
        began = time.monotonic()
        number = min(settings.accumulate, limit - (step - 1) * settings.accumulate)
        micro = take(stream, int(number), settings, ranks, log, progress)
        positions = sum(batch.ids.numel() for batch in micro)
        useful = sum(sum(batch.lengths) for batch in micro)
        supervised, rows, positions, useful = ranks.sum(
            sum(batch.supervised for batch in micro), sum(len(batch.where) for batch in micro),
            positions, useful)

        # Dropout's noise follows from seed, step and rank alone, as the data order follows from
        # seed and epoch: a resumed run draws the same, and there is no generator state to save.
        torch.manual_seed((settings.seed * 1_000_003 + step) * 4099 + ranks.rank)
        losses = [backward(model, batch, max(supervised, 1), settings, ranks) for batch in micro]
        loss, = ranks.sum(sum(float(loss) for loss in losses))
        ranks.sum_gradients(trained)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, settings.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise StopTraining(not_finite(step, loss, norm, micro, losses, ranks))
        rate = set_learning_rate(optimizer, schedule(step, steps, settings.warmup_ratio))
        optimizer.step()
        optimizer.zero_grad()

        progress.step, progress.rows = step, progress.rows + int(rows)
        progress.positions += int(positions)
        progress.useful += int(useful)
        seconds = time.monotonic() - began
        log.step(step, {
            "loss": loss, "grad_norm": norm, "learning_rate": rate,
            "supervised_tokens": int(supervised), "tokens_per_second": round(useful / seconds, 1),
            "seconds": round(seconds, 4)})
        if held_out and (step % settings.eval_every == 0 or step == steps):
            log.evaluation(step, held_out.losses(model, settings, ranks))
        if step % settings.save_every == 0 or step == steps:
            check_bad(progress, settings, at_end=step == steps)
            state = {"progress": asdict(progress), "optimizer": optimizer.state_dict()}
            if ranks.main:
                save(step, state)
            ranks.wait()  # else a rank could be gone, or far ahead, before the files are there
    return progress


def take(stream, number: int, settings, ranks, log, progress) -> list:
    """The next micro-batches of this rank; bad samples on the way are told and counted."""
    micro, skipped = [], []
    for _ in range(number):
        batch, bad, (progress.epoch, progress.batch) = next(stream)
        skipped += [(str(sample), kind_of(sample.reason)) for sample in bad]
        if batch.where:  # every row of a batch may have been a bad one
            micro.append(batch)
    skipped = ranks.gather(skipped)
    log.bad_samples([line for line, _ in skipped])
    progress.bad += len(skipped)
    for _, reason in skipped:
        if reason not in progress.skipped and len(progress.skipped) >= KINDS:
            reason = "other reasons"
        progress.skipped[reason] = progress.skipped.get(reason, 0) + 1
    check_bad(progress, settings)
    return micro


def backward(model, batch, supervised: float, settings, ranks) -> torch.Tensor:
    """Add one micro-batch's share to the gradients; return its share of the step's loss."""
    batch = batch.to(ranks.device, non_blocking=True)
    # Autocast computes matrix products in bf16 and keeps the trained weights, norms and the loss
    # in float32: an update of 1/1000 of a weight would vanish in bf16's 8 bits.
    with torch.autocast(ranks.device.type, torch.bfloat16, enabled=settings.dtype == "bf16"):
        loss_sum, _ = model(batch.ids, batch.labels, batch.pixels)
    loss = loss_sum / supervised
    loss.backward()
    return loss.detach()  # not .item(): that would make a GPU wait after every micro-batch


def check_bad(progress: Progress, settings, at_end: bool = False) -> None:
    """Stop when too many samples are unusable: most likely --images or the format is wrong."""
    seen = progress.rows + progress.bad
    if (at_end or seen >= ENOUGH) and progress.bad > settings.max_bad * seen:
        raise StopTraining(
            f"{progress.bad:,} of {seen:,} samples were unusable ({progress.bad / seen:.1%}), "
            f"more than --max_bad {settings.max_bad:g} allows; the first ones are listed above. "
            "Repair the data or check --images and --max_length; or allow more with --max_bad.")


def not_finite(step: int, loss: float, norm: float, micro, losses, ranks) -> str:
    """Say which samples made the loss infinite or NaN, as far as this rank knows."""
    guilty = [batch for batch, own in zip(micro, losses) if not math.isfinite(float(own))]
    if not math.isfinite(norm) and math.isfinite(loss):
        guilty = micro  # the loss was fine, some derivative was not: any of them may have done it
    lines = [where for batch in guilty for where in batch.where]
    return (f"step {step}: the loss is {loss:g} and the gradient's length {norm:g}. Rank "
            f"{ranks.rank} was at these samples: "
            f"{', '.join(lines) or 'none that was not finite, look at the other ranks'}. Weights "
            "were not changed, and the last checkpoint is good. If the samples are sound, a lower "
            "--learning_rate or --dtype fp32 helps; then go on with --resume.")
