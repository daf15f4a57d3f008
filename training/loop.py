"""The one training loop: batches in, trained weights, metrics.jsonl and checkpoints out.

An optimizer step is made of `accumulate` micro-batches on each rank:

    count the supervised tokens of the whole step, over all micro-batches and ranks
    for each micro-batch: loss sum / that count -> backward, gradients pile up
    sum the gradients over the ranks -> clip -> AdamW     (fp16: unscaled first; see precision.py)

So each supervised token weighs the same, whichever micro-batch or rank it came with. A mean per
micro-batch would let the tokens of a short answer weigh more than those of a long one.

Samples are counted on across the ends of epochs: no step is cut short there. Only the very last
step of a run may be a smaller one, when the epochs are used up.
"""

import math
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain

import torch

from extras.fast.feature_cache import look
from extras.fsdp import clip_gradients, sum_gradients, to_compute
from training.log import kind_of
from training.optim import schedule, set_learning_rate
from training.precision import autocast, next_scale
from training.signal_handler import Stop

KINDS = 50  # of reasons that are counted one by one; more would be names taken for reasons
ENOUGH = 100  # samples that must have been seen before their share of bad ones is judged
FEW = 10  # bad ones that may be chance: of 100 samples two are bad in 9 % of runs where 0.5 % are


@dataclass
class Progress:
    """How far a run has come; with the optimizer's state all that a resume needs.

    block, hands and (epoch, place) are those of dataset/batching.py: they say which samples come
    next, whatever the number of ranks and the size of a batch will be.
    """

    step: int = 0  # optimizer steps made
    block: int | None = None  # what the first micro-batch was on all ranks; None: not begun
    hands: int | None = None  # the ranks that a window was dealt out to; 1: each read all of it
    epoch: int = 0
    place: int = 0
    bad: int = 0  # samples skipped so far, on all ranks
    skipped: dict = field(default_factory=dict)  # why: how many of them
    rows: int = 0  # samples trained on
    positions: int = 0  # tokens computed, padding included
    useful: int = 0  # tokens computed, padding left out
    scale: float = 2.0**16  # fp16 only: the loss is multiplied by it before the backward pass,
    calm: int = 0  # for so many steps now,
    overflows: int = 0  # and so many steps were skipped, because that was too much


class StopTraining(Exception):
    """The run cannot go on; the text says why and what to do. Checkpoints stay as they are."""


def places_left(settings, batches, progress: Progress) -> int:
    """How many places the run still has to go, on all ranks together."""
    if settings.steps is not None:
        return (settings.steps - progress.step) * places_of_step(settings, batches)
    blocks = math.ceil(settings.epochs * (batches.places // batches.block))
    return blocks * batches.block - progress.epoch * batches.places - progress.place


def places_of_step(settings, batches) -> int:
    return batches.global_batch * settings.accumulate


def steps_of_run(settings, batches, progress: Progress) -> int:
    left = places_left(settings, batches, progress)
    return progress.step + max(0, math.ceil(left / places_of_step(settings, batches)))


def steps_ahead(settings, batches, progress: Progress) -> float:
    """With --epochs: how many more steps than were made would have brought a run of the present
    batch size to where this one is. 0 unless the size was changed; then the learning rate goes on
    from its place on the curve."""
    if settings.steps is not None:
        return 0
    done = progress.epoch * batches.places + progress.place
    # Rounded, so that every later resume finds the same number to the last bit.
    return round(done / places_of_step(settings, batches) - progress.step, 6)


def train(model, batches, optimizer, settings, ranks, log, save, progress: Progress,
          held_out=None, stop: Stop | None = None) -> Progress:
    """Train from progress.step to the last step, or to the end of the one where stop is asked.

    save(step, state) writes a checkpoint, on every save_every-th step and after the last; all
    ranks call it, since under fsdp each of them holds a share of what is written.
    held_out: what is measured on every eval_every-th step and after the last, see held_out.py.
    """
    steps = steps_of_run(settings, batches, progress)
    ahead = steps_ahead(settings, batches, progress)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    progress.block, progress.hands = batches.block, batches.hands

    def to_come():
        return batches.steps(progress.epoch, progress.place, places_of_step(settings, batches),
                             places_left(settings, batches, progress))

    # The same list twice: the workers of the first are several micro-batches ahead of the loop.
    with closing(batches.load(chain.from_iterable(to_come()))) as stream:
        model.train()
        for step, places in enumerate(to_come(), start=progress.step + 1):
            began = time.monotonic()
            micro = take(stream, len(places), settings, ranks, log, progress)
            epoch, _, end = places[-1]
            progress.epoch, progress.place = batches.after(epoch, end)
            if settings.log_samples:
                log.samples(step, ranks.gather([(epoch, batch.where) for (epoch, _, _), batch
                                                in zip(places, micro) if batch.where]))
            micro = [batch for batch in (to_compute(batch, settings) for batch in micro) if batch]
            positions = sum(batch.ids.numel() for batch in micro)
            useful = sum(sum(batch.lengths) for batch in micro)
            supervised, rows, positions, useful = ranks.sum(
                sum(batch.supervised for batch in micro),
                sum(len(batch.where) for batch in micro), positions, useful)

            # Dropout's noise follows from seed, step and rank alone, as the data order follows
            # from seed and epoch: a resumed run draws the same, and there is no generator state
            # to save.
            torch.manual_seed((settings.seed * 1_000_003 + step) * 4099 + ranks.rank)
            half = settings.dtype == "fp16"
            scale = progress.scale if half else 1.0
            losses = [backward(model, batch, max(supervised, 1), settings, ranks, scale,
                               batches.features)
                      for batch in micro]
            # One rank alone may have got the signal; by this sum all stop after the same step.
            loss, stopping = ranks.sum(sum(float(loss) for loss in losses),
                                       bool(stop and stop.asked))
            sum_gradients(trained, ranks)
            if half:
                torch._foreach_div_([parameter.grad for parameter in trained], scale)
            norm = clip_gradients(trained, settings.clip, ranks)
            # Both numbers are sums over all ranks: all of them skip the same steps.
            overflow = half and math.isfinite(loss) and not math.isfinite(norm) and scale > 1
            if not (math.isfinite(loss) and (math.isfinite(norm) or overflow)):
                raise StopTraining(not_finite(step, loss, norm, micro, losses, ranks))
            rate = set_learning_rate(optimizer,
                                     schedule(step + ahead, steps + ahead, settings.warmup_ratio))
            if not overflow:
                optimizer.step()
            optimizer.zero_grad()
            if half:
                progress.scale, progress.calm = next_scale(scale, progress.calm, overflow)
                progress.overflows += overflow

            progress.step, progress.rows = step, progress.rows + int(rows)
            progress.positions += int(positions)
            progress.useful += int(useful)
            seconds = time.monotonic() - began
            log.step(step, {
                "loss": loss, "grad_norm": None if overflow else norm, "learning_rate": rate,
                "supervised_tokens": int(supervised),
                "tokens_per_second": round(useful / seconds, 1), "seconds": round(seconds, 4),
                **({"loss_scale": scale, "overflows": progress.overflows} if half else {})})
            if held_out and (step % settings.eval_every == 0 or step == steps):
                log.evaluation(step, held_out.losses(model, settings, ranks))
                if held_out.answers:
                    log.answers(step, held_out.answers.ask(model, settings, ranks))
            if step % settings.save_every == 0 or step == steps or stopping:
                check_bad(progress, settings, at_end=step == steps)
                save_checked(save, step, progress, optimizer, ranks)
            if stopping:
                break
    return progress


def take(stream, number: int, settings, ranks, log, progress) -> list:
    """The micro-batches of the next step, of this rank; bad samples are told and counted."""
    micro, skipped = [], []
    for _ in range(number):
        batch, bad = next(stream)
        skipped += [(str(sample), kind_of(sample.reason)) for sample in bad]
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


def save_checked(save, step: int, progress: Progress, optimizer, ranks) -> None:
    """Rank 0 writes the checkpoint; all ranks learn whether it is there, and go on or stop."""
    problem = None
    try:
        save(step, {"progress": asdict(progress), "optimizer": optimizer.state_dict()})
    except OSError as error:
        problem = error
    # Also a barrier: else a rank could be gone, or far ahead, before the files are there.
    if ranks.sum(problem is not None) != [0.0]:
        raise StopTraining(f"{problem or 'rank 0 could not save'}. The older checkpoints are as "
                           "they were; make room, then go on with --resume.") from problem


def backward(model, batch, supervised: float, settings, ranks, scale: float = 1.0,
             files=None) -> torch.Tensor:
    """Add one micro-batch's share to the gradients, scale times as large; return its share of the
    step's loss."""
    loss_sum, _ = forward(model, batch, settings, ranks, files, scale / supervised)
    loss = loss_sum / supervised
    (loss * scale).backward()
    return loss.detach()  # not .item(): that would make a GPU wait after every micro-batch


def forward(model, batch, settings, ranks, files=None,
            factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """-> summed loss, supervised tokens. files: where features of pictures are kept, or None.
    factor: what the loss will be multiplied by, see model/loss.py."""
    batch = batch.to(ranks.device, non_blocking=True)
    with autocast(settings.dtype, ranks.device):
        if files:
            batch = look(model, batch, files, settings.dtype)
        images = batch.pixels if batch.features is None else batch.features
        return model(batch.ids, batch.labels, images, batch.order, factor)


def check_bad(progress: Progress, settings, at_end: bool = False) -> None:
    """Stop when too many samples are unusable: most likely --images or the format is wrong."""
    seen = progress.rows + progress.bad
    enough = at_end or (seen >= ENOUGH and progress.bad >= FEW)
    if enough and progress.bad > settings.max_bad * seen:
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
