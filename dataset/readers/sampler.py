"""Which sample stands at which position of an epoch, and which worker tokenizes it.

    data, seed, epoch -> epoch_order -> the shuffled epoch -> EpochLayout: its windows and lanes
    EpochLayout.steps -> (epoch, start, end) -> WindowPlan, in a worker -> Batch   (batching.py)

batching.py sorts the rows of a window by length, and for that all their texts have to be tokenized.
If every worker of every rank did so for a whole window, of which it serves a small part, more
workers would hardly help. So a large window is cut into lanes, and each lane into as many shards
as the run had ranks when it began. Lane l fills every lanes-th bucket of the window, and its shards
take turns inside the bucket:

    bucket         0         1         2         3       ...      two lanes, two shards
    lane           0         1         0         1       ...
    shard       0 1 0 1   0 1 0 1   0 1 0 1   0 1 0 1    ...      one digit: one position
    rank        0 1 0 1   0 1 0 1   0 1 0 1   0 1 0 1    ...      batches of two rows a rank
    worker       0   0     1   1     0   0     1   1     ...      two workers a rank

A DataLoader gives the batches to its workers in turn. So a worker tokenizes what it serves and
nothing else, if the number of workers divides the number of lanes; and the order of the samples is
the same for any number of workers. The rows of one shard are sorted by their true length. The rows
of one lane are of like length beforehand where the index of a file knows how long the records are;
elsewhere a shard is a stretch of the shuffled epoch.

Every bucket keeps its positions. Where rows turn out broken, or the samples are no whole number of
buckets, some positions are empty. So the number of batches depends on the number of samples alone,
and no rank waits for a batch that another rank does not have.

A row of JSON Lines is found by its position in the file, so any order costs the same. A row of a
Parquet file comes with its row group, megabytes to decode. If rows were drawn from a whole file of
4 GB, each shard would find rows in every group and decode all 4 GB. So the groups of a large file
are shuffled first, then joined to pools, and the rows of a pool are shuffled together, as
WebDataset does with its shards and its shuffle buffer:

    groups     a  b  c  d  e  f      the file
    shuffled   e  b  f  a  d  c
    pools      [e  b  f] [a  d  c]   the rows of e, b and f in any order, then those of a, d and c

Rows of other files keep their random positions, and Parquet data no larger than a pool is shuffled
as a whole. A single group larger than a pool is a pool of its own, and each shard decodes all of
it: `python -m extras.check_data` reports it, and what to do.
"""

import bisect
import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from dataset.readers.bad_sample import BadSample
from dataset.readers.parquet import ParquetData, column_bytes

POOL = 1 << 25  # bytes of row groups that are shuffled together: a tenth of a second to read
WINDOW_BYTES = 1 << 27  # of rows that all workers of a rank may hold: 64 MB for each of two
FEWEST = 8  # buckets of a window, however large the rows are: they have to be sorted by length
SHARDED = 1 << 11  # samples from which the ranks share the work: half a second of tokenizing
LANES = 16  # at most; each is tokenized as a whole before the first of its batches comes
SORTED = 96  # buckets of a lane, if memory allows; with fewer, more than 2 % would be padding
PRESORTED = 48  # buckets of a lane whose rows are of like length beforehand


class EpochLayout:
    """Where an epoch is cut: the same on every rank and in every epoch.

    global_batch: rows of a micro-batch on all ranks. bucket: positions whose rows are of like
    length. shards: ranks that share the tokenizing. (None: as a run that begins now has them.)
    window: at most so many buckets are sorted together.
    """

    def __init__(self, data, global_batch: int, world_size: int, window: int,
                 bucket: int | None = None, shards: int | None = None):
        self.global_batch, bucket = global_batch, bucket or global_batch
        buckets = -(-len(data) // bucket)  # rounded up: the last ones have empty positions
        self.bucket, self.positions = bucket, buckets * bucket
        self.shards = shards or (world_size if len(data) >= SHARDED else 1)
        most = buckets_in_window(data, bucket / self.shards, window)
        # Windows of equal size: a small one left over would need more padding than the others.
        windows = -(-buckets // most)
        self.windows = [bucket * (buckets * w // windows) for w in range(windows + 1)]
        if most < window:  # little memory: sharing the work is worth more than less padding
            fewest = max(FEWEST, most // LANES)
        else:
            fewest = SORTED if by_size(data, np.arange(1)) is None else PRESORTED
        # A power of two, as most numbers of workers are.
        self.lanes = 1 << int(math.log2(max(1, min(LANES, buckets // windows // fewest))))

    def steps(self, epoch: int, start: int, size: int, left: float) -> Iterator[list[tuple]]:
        """Cut the line of positions into optimizer steps of `size` positions, from (epoch, start)
        on, until `left` positions are used up. A step is a list of micro-batches (epoch, first
        position, position after the last). It goes on across the end of an epoch; a micro-batch
        does not.
        """
        while left > 0:
            step, missing = [], int(min(size, left))
            left -= missing
            while missing:
                end = min(start + min(self.global_batch, missing), self.positions)
                step.append((epoch, start, end))
                missing -= end - start
                epoch, start = self.after(epoch, end)
            yield step

    def after(self, epoch: int, end: int) -> tuple[int, int]:
        """(epoch, position) that follows a micro-batch which ends before position `end`."""
        return (epoch + 1, 0) if end == self.positions else (epoch, end)


class WindowPlan:
    """The data set of a DataLoader: [epoch, start, end] -> (Batch of this rank, list[BadSample]).

    Each worker holds a copy. It tokenizes the rows of a lane when it comes to the lane's first
    batch in a window, and keeps them until it comes to the next window.
    """

    def __init__(self, batches):
        """batches: Batches, which know the data, the rank, and what to do with a sample."""
        self.batches = batches
        self.epoch = self.window = None  # what the next four belong to
        self.data = self.order = None  # of the epoch
        self.lanes = {}  # {lane: its samples} of the window, those that are not tokenized yet
        self.rows, self.skipped = {}, []  # {position: row}, [(position, BadSample)]

    def __getitem__(self, micro_batch: tuple[int, int, int]):
        epoch, start, end = micro_batch
        layout, rows, bad = self.batches.layout, [], []
        while start < end:  # once, except where a micro-batch reaches over the end of a bucket
            bucket = start // layout.bucket
            window = bisect.bisect_right(layout.windows, start) - 1
            self._move_to(epoch, window, bucket % layout.lanes)
            last = min(end, (bucket + 1) * layout.bucket)
            bad += [sample for position, sample in self.skipped if start <= position < last]
            rows += [self.rows[p] for p in range(start, last) if p in self.rows]
            start = last
        return self.batches.make_batch(rows, bad)

    def _move_to(self, epoch: int, window: int, lane: int) -> None:
        b = self.batches
        if self.epoch != epoch:
            # A weighted mixture has other rows, and other captions, in each epoch.
            self.data = b.data.at_epoch(epoch) if hasattr(b.data, "at_epoch") else b.data
            self.order = epoch_order(self.data, np.random.default_rng([b.seed, epoch]))
        if (self.epoch, self.window) != (epoch, window):
            self.epoch, self.window = epoch, window
            self.rows, self.skipped = {}, []  # free the old window before the new one comes
            self.lanes = self._lanes()
        if lane in self.lanes:
            self._tokenize_lane(lane, self.lanes.pop(lane))

    def _buckets(self, lane: int) -> range:
        """First positions of the buckets of the window that a lane fills."""
        layout = self.batches.layout
        first, end = layout.windows[self.window:self.window + 2]
        skip = (lane - first // layout.bucket) % layout.lanes
        return range(first + skip * layout.bucket, end, layout.lanes * layout.bucket)

    def _lanes(self) -> dict[int, list[np.ndarray]]:
        """The window's samples -> {lane: [sample indices of each shard]}."""
        b, layout = self.batches, self.batches.layout
        first, end = layout.windows[self.window:self.window + 2]
        samples = self.order[first:end]  # the last window has fewer samples than positions
        by_length = by_size(self.data, samples)
        lanes, position, shards = {}, 0, layout.shards
        # Short and long lanes in random order.
        rng = np.random.default_rng([b.seed, self.epoch, self.window])
        for lane in rng.permutation(layout.lanes):
            start, position = position, position + len(self._buckets(lane)) * layout.bucket
            start, stop = (len(samples) * p // (end - first) for p in (start, position))
            if by_length is None:
                cuts = [start + (stop - start) * shard // shards for shard in range(shards + 1)]
                lanes[int(lane)] = [samples[i:j] for i, j in pairwise(cuts)]
            else:  # in turn, so that no rank's rows are longer than another's
                lanes[int(lane)] = [by_length[start + shard:stop:shards]
                                    for shard in range(shards)]
        return lanes

    def _tokenize_lane(self, lane: int, shards: list[np.ndarray]) -> None:
        """Tokenize this rank's shards of a lane -> self.rows and self.skipped.

        Broken samples are reported by the first rank that reads them, spread over the positions of
        their lane, so that the share of bad samples among those met so far is the true one.
        """
        b, layout, buckets = self.batches, self.batches.layout, self._buckets(lane)
        count = len(buckets)
        mixed = list(range(count))  # short and long buckets in random order
        rng = np.random.default_rng([b.seed, self.epoch, self.window * layout.lanes + lane])
        rng.shuffle(mixed)
        # Position p belongs to rank p % world_size and to shard p % shards, so a rank has every
        # step-th shard, and ranks that are step apart tokenize the same ones.
        skipped, step = [], math.gcd(layout.shards, b.world_size)
        for shard in range(b.rank % step, layout.shards, step):
            rows, bad = self._tokenize(sorted(shards[shard].tolist()))
            if b.rank < step:
                skipped += bad
            # Spread what is left evenly over the buckets.
            for start, bucket in zip(buckets, mixed):
                part = rows[len(rows) * bucket // count:len(rows) * (bucket + 1) // count]
                positions = range(start + shard, start + layout.bucket, layout.shards)
                self.rows |= {position: row for position, row in zip(positions, part)
                              if position % b.world_size == b.rank}
        for n, sample in enumerate(skipped):
            bucket, offset = divmod(count * layout.bucket * n // len(skipped), layout.bucket)
            self.skipped.append((buckets[bucket] + offset, sample))

    def _tokenize(self, indices: list[int]) -> tuple[list, list[BadSample]]:
        """-> rows sorted by length, and the samples that cannot be used.

        Files are read front to back. That order also settles ties between equal lengths.
        """
        b, rows, bad = self.batches, [], []
        for i in indices:
            with b.worker_state.at(name_of(self.data, i)):
                try:
                    rows.append(b.tokenize(self.data, i, self.epoch))
                except BadSample as error:
                    bad.append(error)
        return sorted(rows, key=lambda row: len(row.ids)), bad


def name_of(data, i: int) -> str:
    """Where sample i stands, without reading it."""
    return data.where(i) if hasattr(data, "where") else f"sample {i}"


def epoch_order(data, rng: np.random.Generator) -> np.ndarray:
    """-> the indices 0 to len(data) - 1 in an order that the random numbers decide."""
    # Every data worker of every process holds an order: 4 bytes a sample are enough for 4 billion.
    order = rng.permutation(np.arange(len(data), dtype=np.min_scalar_type(len(data))))
    groups = row_groups(data)
    if sum(size for _, size in groups) > POOL:
        pooled = np.zeros(len(data), bool)
        for indices, _ in groups:
            pooled[indices] = True
        order[pooled[order]] = pool_by_pool(groups, rng)
    return order


def pool_by_pool(groups: list, rng: np.random.Generator) -> np.ndarray:
    order, pool, size = [], [], 0
    for g in rng.permutation(len(groups)):
        pool.append(groups[g][0])
        size += groups[g][1]
        if size >= POOL:
            order.append(rng.permutation(np.concatenate(pool)))
            pool, size = [], 0
    if pool:
        order.append(rng.permutation(np.concatenate(pool)))
    return np.concatenate(order)


def row_groups(data) -> list[tuple[np.ndarray, int]]:
    """The row groups of all Parquet files in data, each as (indices of its samples, bytes of
    these samples)."""
    # A mixture's samples stand part after part; a file alone is a single part of all its rows.
    parts = getattr(data, "parts", None)
    parts = [(data, range(len(data)))] if parts is None else [(p.data, p.rows) for p in parts]
    groups, first = [], 0
    for file, rows in parts:
        if isinstance(file, ParquetData):
            # Of the sorted rows, those before a group's end: where each group's share ends.
            ends = first + np.searchsorted(np.asarray(rows), file.ends)
            for group, (start, end) in enumerate(pairwise([first, *ends])):
                if start < end:
                    metadata = file.metadata.row_group(group)
                    row = column_bytes(metadata, file.columns) / metadata.num_rows
                    groups.append((np.arange(start, end), row * (end - start)))
        first += len(rows)
    return groups


def buckets_in_window(data, bucket_rows: float, most: int) -> int:
    """How many buckets, of so many rows for a rank, are sorted together: `most`, or fewer where
    the rows bring their images along as bytes and would fill the memory."""
    size = sum(size for _, size in row_groups(data)) / len(data) * bucket_rows  # of a bucket
    return most if size == 0 else min(most, max(FEWEST, int(WINDOW_BYTES / size)))


def by_size(data, indices: np.ndarray) -> np.ndarray | None:
    """The same samples, those with short records first; None where no index knows their sizes."""
    sizes = data.sizes(indices) if hasattr(data, "sizes") else None
    # One number of size and position: sorted, equal sizes stand alike on every machine.
    return None if sizes is None else indices[np.sort(
        sizes.astype(np.int64) << 32 | np.arange(len(indices))) & 0xFFFFFFFF]
