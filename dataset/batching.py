"""Samples -> batches whose rows are of like length, in an order that seed and epoch decide.

    data[i] -> chat.py, images.py -> Batches.steps, .load -> Batch(ids, labels, pixels)  -> training
                features.py: instead of pixels, where --cache_features has what was seen in them

Rows of like length stand together, padded on the right. A causal model never looks to the right,
so padding changes nothing and training needs no attention mask. To find rows of like length
without spoiling the shuffle, the shuffled epoch is cut into windows of many blocks:

    shuffle the epoch -> cut into windows -> in each: render texts, sort by length,
    cut into blocks, shuffle the blocks -> the places 0, 1, 2, ... of the epoch's samples

A block is as many rows as the run's first micro-batch had on all ranks together, and it stays that
size however the run is resumed: so seed and epoch fix the place of each sample. A micro-batch is
the next batch_size * world_size places, and place p is the work of rank p % world_size. Another
batch size, or another number of ranks, cuts the same line of places at other points, and nobody is
seen twice or left out.

To sort rows, all their texts have to be read. If every worker of every rank did that for a whole
window, of which it serves a small part, more of them would hardly help. So a large window is cut
into lanes, and a lane into as many hands as the run began with ranks. Lane l fills every lanes-th
block of the window, and its hands take turns inside the block:

    blocks        0         1         2         3       ...      two lanes, two hands
    lanes         0         1         0         1       ...
    hands      0 1 0 1   0 1 0 1   0 1 0 1   0 1 0 1    ...
    ranks      0 1 0 1   0 1 0 1   0 1 0 1   0 1 0 1    ...      batches of two rows a rank
    workers     0   0     1   1     0   0     1   1     ...      two workers a rank

A DataLoader gives the batches to its workers in turn. So a worker reads what it serves and nothing
else, if the number of workers divides that of the lanes; and the order of the samples is the same
for any number of workers. What stands in one hand is sorted by its true length. What comes into one
lane is of like length from the beginning where the index of a file knows how long the records are;
elsewhere a hand is a stretch of the order that order.py made, so that the rows which one worker
reads stand near each other in a Parquet file.

Every block fills its places; where rows turn out broken, or the samples are no whole number of
blocks, some of its places are empty. So the number of batches depends on the number of samples
alone, and no rank ever waits for a batch that another does not have.
"""

import bisect
import math
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from dataset.images import load_image
from dataset.readers.formats import BadSample, Sample
from dataset.readers.order import FEWEST, blocks_in_window, by_size, epoch_order
from dataset.readers.worker_state import Whereabouts

UNSUPERVISED = -100  # what torch's cross entropy ignores
DEALT = 1 << 11  # samples from which the ranks share the reading: half a second of rendering
LANES = 16  # at most; each is read as a whole before the first of its batches comes
SORTED = 96  # blocks of a lane, if memory allows; with fewer more than 2 % would be padding
ALIKE = 48  # blocks of a lane whose rows are of like length from the beginning


@dataclass
class Batch:
    """B rows of T tokens, T being the longest row.

    labels are shifted here and nowhere else: labels[b, t] is the token after ids[b, t] where that
    one is supervised, else -100; so the last position is always -100, as is all padding.
    pixels hold each distinct picture once; order says which of them each run of placeholders
    shows. Both are None without pictures. Pictures whose features are known come without pixels:
    order counts on from the N pictures with pixels to the F known ones.
    """

    ids: torch.Tensor  # (B,T) int64
    labels: torch.Tensor  # (B,T) int64
    pixels: torch.Tensor | None  # (N,3,H,W) float32
    where: list[str]  # B places, "file:line"
    lengths: list[int]  # B numbers: tokens before the padding
    order: torch.Tensor | None = None  # (M,) int64, each below N + F; None: as they come
    features: torch.Tensor | None = None  # (F,P,Dv)
    keys: tuple[str | None, ...] = ()  # of the N: under which their features are to be kept

    @property
    def supervised(self) -> int:
        return int((self.labels != UNSUPERVISED).sum())

    @property
    def waste(self) -> int:
        """Positions that are computed for nothing."""
        return self.ids.numel() - sum(self.lengths)

    def each_tensor(self, change) -> "Batch":
        """The batch with change(tensor) in the place of each of its tensors."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in held.items()
                                if isinstance(value, torch.Tensor)})

    def to(self, device, non_blocking: bool = False) -> "Batch":
        return self.each_tensor(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """DataLoader calls this: copies to a GPU from pinned memory run beside the arithmetic."""
        return self.each_tensor(torch.Tensor.pin_memory)


@dataclass(frozen=True, eq=False)
class Picture:
    """What the model gets of a picture: pixels to look at, or features if they are known."""

    pixels: torch.Tensor | None = None  # (3,H,W)
    features: torch.Tensor | None = None  # (P,Dv)
    key: str | None = None  # under which the features of pixels are to be kept


@dataclass(frozen=True)
class Row:
    """A sample whose text is rendered; its pictures are still files."""

    ids: Sequence[int]
    mask: Sequence[bool]
    sample: Sample
    pictures: tuple[Picture, ...] = ()


class Batches:
    """data -> pairs of a Batch for this rank and the BadSamples met on the way to it.

    batch_size: rows for one rank; a micro-batch has batch_size * world_size on all of them.
    block: rows of like length that stand together; of the run that is resumed, else a micro-batch.
    hands: the ranks that share the reading; of the run that is resumed, else see above.
    window: at most so many blocks are shared out together. Waste falls as 1 / window; the price is
    that the rows wait in memory, and that a lane's texts are rendered (0.1 to 0.3 ms a row) before
    the first of its batches comes. Where rows bring their pictures along as bytes, it has fewer.
    Broken texts are reported by the first rank that reads them, spread over the batches of their
    window, so that the share of bad samples among those seen so far is the true one; broken
    pictures by the rank that wanted them. So the ranks' lists add up to each bad sample once.
    features: FeatureFiles where features of pictures may be found; None: every picture is opened.
    """

    def __init__(self, data, template, image_processor, batch_size: int, max_length: int,
                 seed: int, rank: int = 0, world_size: int = 1, workers: int = 0,
                 window: int = 1024, block: int | None = None, features=None,
                 hands: int | None = None):
        if len(data) == 0:
            raise ValueError("the data holds no samples; nothing can be learned from it")
        self.data, self.template, self.image_processor = data, template, image_processor
        self.features = features
        self.max_length, self.seed, self.workers = max_length, seed, workers
        self.rank, self.world_size = rank, world_size
        self.global_batch = batch_size * world_size
        self.whereabouts = Whereabouts(workers)
        self.block = block or self.global_batch
        blocks = -(-len(data) // self.block)  # rounded up: the last ones have empty places
        self.places = blocks * self.block  # of an epoch
        self.hands = hands or (world_size if len(data) >= DEALT else 1)
        room = blocks_in_window(data, self.block / self.hands, window)
        # Windows of equal size: a small one left over would waste more than the others.
        windows = -(-blocks // room)
        self.windows = [self.block * (blocks * w // windows) for w in range(windows + 1)]
        if room < window:  # little memory: to share the reading is worth more than to sort well
            fewest = max(FEWEST, room // LANES)
        else:
            fewest = SORTED if by_size(data, np.arange(1)) is None else ALIKE
        # A power of two, as most numbers of workers are.
        self.lanes = 1 << int(math.log2(max(1, min(LANES, blocks // windows // fewest))))

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.places // self.global_batch)

    def steps(self, epoch: int, place: int, size: int, left: float) -> Iterator[list[tuple]]:
        """Cut the line of places into optimizer steps of `size` places, from (epoch, place) on,
        until `left` places are used up. A step is a list of micro-batches (epoch, first place,
        place after the last). It goes on across the end of an epoch; a micro-batch does not.
        """
        while left > 0:
            step, wanted = [], int(min(size, left))
            left -= wanted
            while wanted:
                end = min(place + min(self.global_batch, wanted), self.places)
                step.append((epoch, place, end))
                wanted -= end - place
                epoch, place = self.after(epoch, end)
            yield step

    def after(self, epoch: int, end: int) -> tuple[int, int]:
        """(epoch, place) that follows a micro-batch which ends before place `end`."""
        return (epoch + 1, 0) if end == self.places else (epoch, end)

    def epoch(self, epoch: int, skip: int = 0):
        """Iterate over (Batch, list[BadSample]) of one epoch, from batch number `skip` on."""
        size = self.global_batch
        return self.load((epoch, place, min(place + size, self.places))
                         for place in range(skip * size, self.places, size))

    def load(self, micro_batches: Iterable[tuple]) -> Iterator[tuple[Batch, list[BadSample]]]:
        """Make the micro-batches that `steps` names, several ahead of time by --workers.

        Resuming costs nothing for the windows before: their samples are not even read.
        """
        loader = iter(DataLoader(
            Order(self), batch_size=None, sampler=micro_batches, num_workers=self.workers,
            collate_fn=as_it_is, pin_memory=torch.cuda.is_available(),
            worker_init_fn=outlive_signals,
            # A loader draws a number from torch's global generator unless it has its own, and
            # dropout would then differ between a resumed run and an uninterrupted one.
            generator=torch.Generator()))
        while True:
            try:
                made = next(loader)
            except StopIteration:
                return
            except (EOFError, ConnectionError):
                # A worker died with batches on their way to us. A loader leaves no batch out:
                # asked again, it waits for the first of them, and then says whose it was.
                continue
            yield made


def as_it_is(item):
    return item  # the DataLoader only carries: batches are made by Order


def outlive_signals(_) -> None:
    """Who stops a run (Ctrl-C, torchrun, Slurm, systemd) signals its workers too, but training
    still needs them to finish its step. It ends them itself; the alarm is for the case that it
    cannot any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


class Order:
    """All epochs as one line of places; a DataLoader's worker holds a copy and asks for a piece.

    A worker renders its rank's rows of a lane when it comes to the lane's first batch in a window,
    and keeps them until it comes to the next window.
    """

    def __init__(self, batches: Batches):
        self.batches = batches
        self.epoch = self.window = None  # what the next three belong to
        self.data = self.order = None  # of the epoch
        self.lanes = {}  # of the window: {lane: its samples}, those that were not yet read
        self.plan, self.refused = {}, []  # of the window's other lanes

    def __getitem__(self, micro_batch: tuple[int, int, int]) -> tuple[Batch, list[BadSample]]:
        epoch, place, end = micro_batch
        b, planned, bad = self.batches, [], []
        while place < end:  # once, but for a micro-batch that reaches over the end of a block
            block = place // b.block
            self._turn_to(epoch, bisect.bisect_right(b.windows, place) - 1, block % b.lanes)
            last = min(end, (block + 1) * b.block)
            bad += [sample for p, sample in self.refused if place <= p < last]
            planned += [self.plan[p] for p in range(place, last) if p in self.plan]
            place = last
        rows, opened = [], {}
        for row in planned:
            with b.whereabouts.at(row.sample.where):
                try:
                    pictures = [self._open(image, opened) for image in row.sample.images]
                    rows.append(replace(row, pictures=tuple(pictures)))
                except (OSError, ValueError, MemoryError) as error:
                    bad.append(BadSample(row.sample.where, str(error)))
        return collate(rows), bad

    def _open(self, image, opened: dict) -> Picture:
        """A picture of the micro-batch, opened once however many rows show it."""
        b = self.batches
        # Two rows of one file, or of the same bytes; what is drawn has no name to go by.
        name = image if isinstance(image, (str, bytes, Path)) else id(image)
        if name in opened:
            return opened[name]
        key = features = None
        if b.features:
            image = load_image(image) if callable(image) else image  # drawn: known by its pixels
            with suppress(OSError):  # load_image says it better, with the reason
                key = b.features.key(image)
                features = b.features.read(key)
        if features is None:
            processor = b.image_processor
            opened[name] = Picture(processor(load_image(image, processor.draft)), key=key)
        else:
            opened[name] = Picture(features=features)
        return opened[name]

    def _turn_to(self, epoch: int, window: int, lane: int) -> None:
        b = self.batches
        if self.epoch != epoch:
            # Files mixed by weight show other parts of themselves, and other captions, each time.
            self.data = b.data.at_epoch(epoch) if hasattr(b.data, "at_epoch") else b.data
            self.order = epoch_order(self.data, np.random.default_rng([b.seed, epoch]))
        if (self.epoch, self.window) != (epoch, window):
            self.epoch, self.window = epoch, window
            self.plan, self.refused = {}, []  # let the old window go before the new one comes
            self.lanes = self._deal()
        if lane in self.lanes:
            self._plan(lane, self.lanes.pop(lane))

    def _blocks(self, lane: int) -> range:
        """Where the blocks of the window start that a lane fills."""
        b = self.batches
        first, end = b.windows[self.window:self.window + 2]
        return range(first + (lane - first // b.block) % b.lanes * b.block, end, b.lanes * b.block)

    def _deal(self) -> dict[int, list[np.ndarray]]:
        """The window's samples -> {lane: those of each hand}."""
        b = self.batches
        first, end = b.windows[self.window:self.window + 2]
        samples = self.order[first:end]  # the last window has fewer of them than places
        sorted_ = by_size(self.data, samples)
        lanes, place = {}, 0
        # Short and long lanes in any order.
        for lane in np.random.default_rng([b.seed, self.epoch, self.window]).permutation(b.lanes):
            start, place = place, place + len(self._blocks(lane)) * b.block
            start, stop = (len(samples) * p // (end - first) for p in (start, place))
            if sorted_ is None:
                cuts = [start + (stop - start) * hand // b.hands for hand in range(b.hands + 1)]
                lanes[int(lane)] = [samples[i:j] for i, j in pairwise(cuts)]
            else:  # every hand a fair draw: no rank's rows shall be longer than another's
                lanes[int(lane)] = [sorted_[start + hand:stop:b.hands] for hand in range(b.hands)]
        return lanes

    def _plan(self, lane: int, hands: list[np.ndarray]) -> None:
        """Read and render this rank's hands of a lane -> plan, {place: row}, and refused: what
        could not be used, each with the place at which this rank tells it."""
        b, blocks = self.batches, self._blocks(lane)
        count = len(blocks)
        # Mix long and short: the block that stands at each place.
        mixed = list(range(count))
        np.random.default_rng([b.seed, self.epoch, self.window * b.lanes + lane]).shuffle(mixed)
        # Place p is rank p % world_size's, and of hand p % hands: of every apart-th one.
        refused, apart = [], math.gcd(b.hands, b.world_size)
        for hand in range(b.rank % apart, b.hands, apart):
            rows, broken = self._read(sorted(hands[hand].tolist()))
            if b.rank < apart:  # other ranks read the same ones
                refused += broken
            # Spread what is left evenly over the promised number of blocks.
            for start, block in zip(blocks, mixed):
                taken = rows[len(rows) * block // count:len(rows) * (block + 1) // count]
                places = range(start + hand, start + b.block, b.hands)
                self.plan |= {place: row for place, row in zip(places, taken)
                              if place % b.world_size == b.rank}
        for number, sample in enumerate(refused):
            block, place = divmod(count * b.block * number // len(refused), b.block)
            self.refused.append((blocks[block] + place, sample))

    def _read(self, numbers: list[int]) -> tuple[list[Row], list[BadSample]]:
        """Read and render samples -> rows by length, and what could not be used."""
        # Files are read front to back; the sort by index also settles ties between equal lengths.
        b, rows, refused = self.batches, [], []
        for i in numbers:
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
                    ids, mask = b.template.fit(*b.template.render(messages), b.max_length)
                    # As numbers, a fifth of a list's size, and without the text: rows have to wait.
                    rows.append(Row(np.array(ids, np.int32), np.array(mask),
                                    replace(sample, messages=())))
                except ValueError as error:
                    refused.append(BadSample(sample.where, str(error)))
        return sorted(rows, key=lambda row: len(row.ids)), refused


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
    shown = [picture for row in rows for picture in row.pictures]
    # Each once; those that are to be looked at stand before those whose features are known.
    distinct = sorted({id(picture): picture for picture in shown}.values(),
                      key=lambda picture: picture.features is not None)
    number = {id(picture): n for n, picture in enumerate(distinct)}
    new = [picture for picture in distinct if picture.features is None]
    known = [picture.features for picture in distinct if picture.features is not None]
    return Batch(ids, labels, torch.stack([p.pixels for p in new]) if new else None,
                 [row.sample.where for row in rows], lengths,
                 torch.tensor([number[id(picture)] for picture in shown]) if shown else None,
                 torch.stack(known) if known else None,
                 tuple(picture.key for picture in new))
