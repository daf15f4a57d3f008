"""The micro-batches of each optimizer step, and all counting of samples.

    for step, batches in Steps(...):   step 1, 2, ..., this rank's micro-batches, ready to compute

Samples are counted on across the ends of epochs: no step is cut short there. Only the very last
step of a run may be a smaller one, when the epochs are used up.
"""

import math
from contextlib import closing
from itertools import chain

from training.errors import check_skipped
from training.log import kind_of

MAX_REASONS = 50  # counted one by one; more would be file names mistaken for reasons


class Steps:
    """From state.step on to the last step, or to the one in which `stopping` is set.

    total: steps of the whole run. ahead: how many more steps than were made would have brought a
    run of the present batch size to where this one is; 0 unless --epochs decides and the size was
    changed. Then the learning rate goes on from its point on the curve.
    """

    def __init__(self, loader, settings, state, distributed):
        """loader: the Batches of this rank."""
        self.loader, self.settings, self.state = loader, settings, state
        self.distributed = distributed
        self.on_skipped = lambda lines: None  # called with a line for each unusable sample
        self.step_size = loader.global_batch * settings.gradient_accumulation_steps  # samples
        self.total = state.step + max(0, math.ceil(self.samples_left() / self.step_size))
        done = state.epoch * loader.layout.positions + state.place
        # Rounded, so that every later resume finds the same number to the last bit.
        self.ahead = (0 if settings.steps is not None
                      else round(done / self.step_size - state.step, 6))
        self.running = None  # the generator of the loop
        self.stopping = False  # set it, and the present step is the last one
        self.batches = []  # of the present step, on this rank
        self.non_padding_tokens = 0  # of the present step, on all ranks
        self.sources = []  # of the present step: (epoch, where its samples stand) of each batch

    def samples_left(self) -> int:
        """How many samples the run still has to go, on all ranks together."""
        state, loader = self.state, self.loader
        if self.settings.steps is not None:
            return (self.settings.steps - state.step) * self.step_size
        layout = loader.layout
        buckets = math.ceil(self.settings.epochs * (layout.positions // layout.bucket))
        return buckets * layout.bucket - state.epoch * layout.positions - state.place

    def is_last(self, step: int) -> bool:
        return step == self.total or self.stopping

    def __iter__(self):
        self.running = self.generate()
        return self.running

    def close(self) -> None:
        """End the processes that prepare data, also where an error has ended the loop."""
        if self.running:
            self.running.close()

    def generate(self):
        """-> (step, this rank's micro-batches), ..."""
        state, loader = self.state, self.loader
        state.bucket = loader.layout.bucket
        start = state.epoch, state.place, self.step_size, self.samples_left()
        # The same list twice: the workers of the first are several micro-batches ahead.
        with closing(loader.load(chain.from_iterable(loader.layout.steps(*start)))) as stream:
            for step, plan in enumerate(loader.layout.steps(*start), start=state.step + 1):
                batches = self.next_batches(stream, len(plan))
                epoch, _, end = plan[-1]
                state.epoch, state.place = loader.layout.after(epoch, end)
                self.sources = [(epoch, batch.where) for (epoch, _, _), batch
                                in zip(plan, batches) if batch.where]
                batches = [self.distributed.drop_or_dummy_batch(batch) for batch in batches]
                self.batches = [batch for batch in batches if batch]
                self.count(self.batches)
                yield step, self.batches
                if self.stopping:
                    return

    def next_batches(self, stream, number: int) -> list:
        """This rank's next micro-batches; skipped samples are listed and counted."""
        batches, skipped, state = [], [], self.state
        for _ in range(number):
            batch, bad = next(stream)
            skipped += [(str(sample), kind_of(sample.reason)) for sample in bad]
            batches.append(batch)
        skipped = self.distributed.gather(skipped)
        self.on_skipped([line for line, _ in skipped])
        state.skipped += len(skipped)
        for _, reason in skipped:
            if reason not in state.skip_reasons and len(state.skip_reasons) >= MAX_REASONS:
                reason = "other reasons"
            state.skip_reasons[reason] = state.skip_reasons.get(reason, 0) + 1
        check_skipped(state, self.settings.max_skip_ratio)
        return batches

    def count(self, batches) -> None:
        samples, tokens, non_padding = map(int, self.distributed.sum(
            sum(len(batch.where) for batch in batches), sum(batch.ids.numel() for batch in batches),
            sum(sum(batch.lengths) for batch in batches)))
        self.state.samples += samples
        self.state.tokens += tokens
        self.state.non_padding_tokens += non_padding
        self.non_padding_tokens = non_padding
