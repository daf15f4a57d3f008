"""The micro-batches of each optimizer step, and all counting of samples.

    for step, batches in Steps(...):   step 1, 2, ..., this rank's micro-batches, ready to compute

Samples are counted on across the ends of epochs: no step is cut short there. Only the very last
step of a run may be a smaller one, when the epochs are used up.
"""

import math
from dataclasses import dataclass, field
from itertools import chain, tee

from training.errors import check_skipped
from training.log import kind_of

MAX_REASONS = 50  # counted one by one; more would be file names mistaken for reasons


@dataclass
class TrainerState:
    """How far a run has come: with the optimizer's state, all that an exact resume needs. bucket,
    epoch and position (see dataset/batching.py) say which samples come next, whatever the
    number of ranks and the size of a batch will be."""

    step: int = 0  # Optimizer steps made.
    bucket: int | None = None  # Rows of the run's first micro-batch on all ranks; None: not begun.
    epoch: int = 0  # Epoch of the next sample.
    position: int = 0  # Of the next sample, in the order of that epoch.
    skip_reasons: dict = field(default_factory=dict)  # {reason: unusable samples, on all ranks}.
    samples: int = 0  # Samples trained on.
    tokens: int = 0  # Tokens computed, padding included.
    non_padding_tokens: int = 0  # Tokens computed, padding left out.
    loss_scale: float = 2.0**16  # fp16: the loss is multiplied by it before the backward pass.
    growth_tracker: int = 0  # fp16: steps since the loss scale has changed.
    overflows: int = 0  # fp16: steps skipped because a number grew past 65,504.

    @property
    def skipped(self) -> int:
        return sum(self.skip_reasons.values())


class Steps:
    """From state.step on to the last step, or to the one in which `stopping` is set.

    total: steps of the whole run. ahead: how many more steps than were made would have brought a
    run of the present batch size to this position; 0 unless --epochs decides and the size was
    changed. Then the learning rate goes on from its point on the curve.
    """

    def __init__(self, loader, settings, state, distributed):  # loader: the Batches of this rank
        self.loader, self.settings, self.state = loader, settings, state
        self.distributed, layout = distributed, loader.layout
        self.on_skipped = lambda lines: None  # called with a line for each unusable sample
        self.step_size = loader.global_batch * settings.gradient_accumulation_steps  # samples
        done = state.epoch * layout.positions + state.position
        if settings.steps is not None:
            left = (settings.steps - state.step) * self.step_size  # samples, on all ranks together
            self.ahead = 0
        else:
            buckets = math.ceil(settings.epochs * (layout.positions // layout.bucket))
            left = buckets * layout.bucket - done
            # Rounded, so that every later resume finds the same number to the last bit.
            self.ahead = round(done / self.step_size - state.step, 6)
        self.total = state.step + max(0, math.ceil(left / self.step_size))
        self.stopping = False  # set it, and the present step is the last one
        # Of the present step: on this rank, on all ranks, and (epoch, where its samples stand).
        self.batches, self.non_padding_tokens, self.sources = [], 0, []
        state.bucket = layout.bucket
        # The workers that load are several micro-batches ahead.
        self.plans, ahead = tee(layout.steps(state.epoch, state.position, self.step_size, left))
        self.stream = loader.load(chain.from_iterable(ahead))

    def __iter__(self):
        """-> (step, this rank's micro-batches), ..."""
        state = self.state
        for step, plan in enumerate(self.plans, start=state.step + 1):
            batches = self.next_batches(len(plan))
            epoch, _, end = plan[-1]
            state.epoch, state.position = self.loader.layout.after(epoch, end)
            self.sources = [(epoch, batch.where) for (epoch, _, _), batch
                            in zip(plan, batches) if batch.where]
            batches = [self.distributed.drop_or_dummy_batch(batch) for batch in batches]
            self.batches = [batch for batch in batches if batch]
            samples, tokens, self.non_padding_tokens = map(int, self.distributed.sum(
                sum(len(batch.where) for batch in self.batches),
                sum(batch.ids.numel() for batch in self.batches),
                sum(sum(batch.lengths) for batch in self.batches)))
            state.samples += samples
            state.tokens += tokens
            state.non_padding_tokens += self.non_padding_tokens
            yield step, self.batches
            if self.stopping:
                return

    def next_batches(self, number: int) -> tuple:
        """This rank's next micro-batches; skipped samples are listed and counted."""
        batches, bad = zip(*(next(self.stream) for _ in range(number)))
        skipped = self.distributed.gather([(str(sample), kind_of(sample.reason))
                                           for samples in bad for sample in samples])
        self.on_skipped([line for line, _ in skipped])
        reasons = self.state.skip_reasons
        for _, reason in skipped:
            if reason not in reasons and len(reasons) >= MAX_REASONS:
                reason = "other reasons"
            reasons[reason] = reasons.get(reason, 0) + 1
        check_skipped(self.state, self.settings.max_skip_ratio)
        return batches

    def close(self) -> None:
        """End the processes that prepare data, also where an error has ended the loop."""
        self.stream.close()
