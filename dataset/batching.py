"""Samples -> batches whose rows are of like length, in an order that seed and epoch decide.

    data[i] -> chat.py, images.py -> Batches.epoch -> Batch(ids, labels, pixels)   -> training

Rows of like length stand together, padded on the right. A causal model never looks to the right,
so padding changes nothing and training needs no attention mask. To find rows of like length
without spoiling the shuffle, the shuffled epoch is cut into windows of many batches:

    shuffle the epoch -> cut into windows -> in each: render texts, sort by length,
    cut into batches, shuffle the batches -> every rank takes its rows of each batch

The number of batches depends on the number of samples alone. Rows that turn out broken leave
their batch smaller, or empty, and no rank ever waits for a batch that another does not have.
"""

import bisect
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader

from dataset.formats import BadSample, Sample
from dataset.images import load_image
from dataset.whereabouts import Whereabouts

UNSUPERVISED = -100  # what torch's cross entropy ignores


@dataclass
class Batch:
    """B rows of T tokens, T being the longest row.

    labels are shifted here and nowhere else: labels[b, t] is the token after ids[b, t] where that
    one is supervised, else -100; so the last position is always -100, as is all padding.
    pixels hold the rows' pictures in the order of their placeholders; None without pictures.
    """

    ids: torch.Tensor  # (B,T) int64
    labels: torch.Tensor  # (B,T) int64
    pixels: torch.Tensor | None  # (N,3,H,W) float32
    where: list[str]  # B places, "file:line"
    lengths: list[int]  # B numbers: tokens before the padding

    @property
    def supervised(self) -> int:
        return int((self.labels != UNSUPERVISED).sum())

    @property
    def waste(self) -> int:
        """Positions that are computed for nothing."""
        return self.ids.numel() - sum(self.lengths)

    def to(self, device, non_blocking: bool = False) -> "Batch":
        def move(tensor):
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return Batch(move(self.ids), move(self.labels), move(self.pixels), self.where, self.lengths)

    def pin_memory(self) -> "Batch":
        """DataLoader calls this: copies to a GPU from pinned memory run beside the arithmetic."""
        pixels = None if self.pixels is None else self.pixels.pin_memory()
        return Batch(self.ids.pin_memory(), self.labels.pin_memory(), pixels, self.where,
                     self.lengths)


@dataclass(frozen=True)
class Row:
    """A sample whose text is rendered; its pictures are still files."""

    ids: list[int]
    mask: list[bool]
    sample: Sample
    pixels: tuple = ()  # n times (3,H,W)


class Batches:
    """data -> per epoch, pairs of a Batch for this rank and the BadSamples met on the way to it.

    batch_size: rows for one rank; a global batch has batch_size * world_size.
    window: at most so many global batches are sorted together. Waste falls as 1 / window; the
    price is that a window's texts are rendered (0.4 ms a row) before its first batch comes, and
    that this rank's rows of it wait in memory, with their pictures where those are bytes.
    Broken texts are reported by rank 0 alone, with the first batch of their window, and broken
    pictures by the rank that wanted them: the ranks' lists add up to each bad sample once.
    """

    def __init__(self, data, template, image_processor, batch_size: int, max_length: int,
                 seed: int, rank: int = 0, world_size: int = 1, workers: int = 0,
                 window: int = 256):
        if len(data) == 0:
            raise ValueError("the data holds no samples; nothing can be learned from it")
        self.data, self.template, self.image_processor = data, template, image_processor
        self.max_length, self.seed, self.workers = max_length, seed, workers
        self.rank, self.world_size = rank, world_size
        self.global_batch = batch_size * world_size
        self.whereabouts = Whereabouts(workers)
        # Windows of equal size: a small one left over would waste more than the others.
        count = self.batches_per_epoch
        windows = -(-count // window)
        self.windows = [count * w // windows for w in range(windows + 1)]  # their first batches

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.data) // self.global_batch)  # rounded up: the last may be smaller

    def epoch(self, epoch: int, skip: int = 0):
        """Iterate over (Batch, list[BadSample]), from batch number `skip` on.

        Resuming costs nothing for the windows before it: their samples are not even read.
        """
        return iter(DataLoader(
            EpochOrder(self, epoch), batch_size=None, sampler=range(skip, self.batches_per_epoch),
            num_workers=self.workers, collate_fn=as_it_is, pin_memory=torch.cuda.is_available(),
            # A loader draws a number from torch's global generator unless it has its own, and
            # dropout would then differ between a resumed run and an uninterrupted one.
            generator=torch.Generator()))


def as_it_is(item):
    return item  # the DataLoader only carries: batches are made by EpochOrder


class EpochOrder:
    """One epoch as a list of batches; a DataLoader's worker holds a copy and asks by number.

    Each worker renders the texts of a whole window and keeps it while it serves batches from it.
    So the order is the same for any number of workers.
    """

    def __init__(self, batches: Batches, epoch: int):
        self.batches, self.epoch = batches, epoch
        # Files mixed by weight show other parts of themselves, and other captions, in each epoch.
        mixed = hasattr(batches.data, "at_epoch")
        self.data = batches.data.at_epoch(epoch) if mixed else batches.data
        self.order = np.random.default_rng([batches.seed, epoch]).permutation(len(batches.data))
        self.planned = None  # number of the window that the next two belong to
        self.plan, self.refused = [], []

    def __getitem__(self, number: int) -> tuple[Batch, list[BadSample]]:
        b = self.batches
        window = bisect.bisect_right(b.windows, number) - 1
        place = number - b.windows[window]
        if self.planned != window:
            self.plan, self.refused = self._plan(window)
            self.planned = window
        bad = list(self.refused) if place == 0 and b.rank == 0 else []
        rows = []
        for row in self.plan[place]:
            with b.whereabouts.at(row.sample.where):
                try:
                    pixels = [b.image_processor(load_image(image)) for image in row.sample.images]
                    rows.append(Row(row.ids, row.mask, row.sample, tuple(pixels)))
                except (OSError, ValueError, MemoryError) as error:
                    bad.append(BadSample(row.sample.where, str(error)))
        return collate(rows), bad

    def _plan(self, window: int) -> tuple[list[list[Row]], list[BadSample]]:
        """Read and render a window -> for each of its batches, the rows of this rank."""
        b = self.batches
        first, end = b.windows[window:window + 2]
        chosen = self.order[first * b.global_batch:end * b.global_batch]
        # Files are read front to back; the sort by index also settles ties between equal lengths.
        rows, refused = [], []
        for i in sorted(chosen.tolist()):
            with b.whereabouts.at(place_of(self.data, i)):
                try:
                    sample = self.data[i]
                except BadSample as bad:
                    refused.append(bad)
                    continue
                try:
                    # Qwen3 learns one answer of a row: in the next epoch it is another one's turn.
                    messages = b.template.lesson(sample.messages, self.epoch + i)
                    shown = sum(message.images for message in messages)
                    sample = replace(sample, messages=tuple(messages), images=sample.images[:shown])
                    ids, mask = b.template.render(messages)
                    rows.append(Row(*b.template.fit(ids, mask, b.max_length), sample))
                except ValueError as error:
                    refused.append(BadSample(sample.where, str(error)))
        rows.sort(key=lambda row: len(row.ids))
        # Spread what is left evenly over the promised number of batches, then mix long and short.
        count = end - first
        plan = [rows[len(rows) * i // count:len(rows) * (i + 1) // count] for i in range(count)]
        np.random.default_rng([b.seed, self.epoch, window]).shuffle(plan)
        return [batch[b.rank::b.world_size] for batch in plan], refused


def place_of(data, i: int) -> str:
    """Where sample i stands, without reading it."""
    return data.place(i) if hasattr(data, "place") else f"sample {i}"


def collate(rows: list[Row]) -> Batch:
    """Pad on the right and shift the labels. No rows: ids of (0,0), so that ranks stay in step."""
    lengths = [len(row.ids) for row in rows]
    longest = max(lengths, default=0)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)  # padding may be any id: never seen
    labels = torch.full_like(ids, UNSUPERVISED)
    for b, row in enumerate(rows):
        ids[b, :lengths[b]] = torch.tensor(row.ids)
        target = ids[b, 1:lengths[b]]  # position t learns to say the token at t + 1
        labels[b, :lengths[b] - 1] = target.where(torch.tensor(row.mask[1:]), UNSUPERVISED)
    pixels = [picture for row in rows for picture in row.pixels]
    return Batch(ids, labels, torch.stack(pixels) if pixels else None,
                 [row.sample.where for row in rows], lengths)
