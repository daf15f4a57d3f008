"""Which sample stands at which position of an epoch.

    seed, epoch -> epoch_order: all samples, shuffled -> windows -> in each: sorted by length
    (lengths.py), cut into buckets, the buckets shuffled -> the positions 0, 1, 2, ...

Every bucket has the same number of positions. Where the samples are no whole number of buckets,
some positions of the last window are empty. So the number of batches depends on the number of
samples alone, and no rank waits for a batch that another rank does not have.

A line of JSON is found by its offset in the file, so any order costs the same. A row of a Parquet
file comes with its row group, megabytes to decode; in a wholly random order each batch would
decode nearly all groups. So the groups of a large file are shuffled first, then joined to pools,
and the rows of a pool are shuffled together. A worker decodes each group once and keeps it as long
as the pool lasts (a shuffle buffer):

    groups     a  b  c  d  e  f      the file
    shuffled   e  b  f  a  d  c
    pools      [e  b  f] [a  d  c]   the rows of e, b and f in any order, then those of a, d and c

Rows of other files keep their random positions, and Parquet data no larger than a pool is shuffled
as a whole. A group larger than a pool is read front to back, in slices (parquet.py), and so its
rows are shuffled among their neighbours only; `python -m extras.check_data` reports it.
"""

import bisect
from collections.abc import Iterator
from itertools import groupby

import numpy as np

from dataset.readers.lengths import locate
from dataset.readers.parquet import POOL, ParquetData

MIN_BUCKETS = 8  # of a window, however large the rows are: they have to be sorted by length


class EpochLayout:
    """The same on every rank and in every worker.

    lengths: RowLengths of the data. global_batch: rows of a micro-batch on all ranks. bucket:
    positions whose rows are of similar length; None: a micro-batch. max_buckets: at most so many
    are sorted together, in a window.
    """

    def __init__(self, data, lengths, seed: int, global_batch: int, max_buckets: int,
                 bucket: int | None = None):
        self.data, self.lengths, self.seed = data, lengths, seed
        self.global_batch, self.bucket = global_batch, bucket or global_batch
        buckets = -(-len(data) // self.bucket)  # rounded up: some positions stay empty
        self.positions = buckets * self.bucket
        most = buckets_in_window(data, self.bucket, max_buckets)
        # Windows of equal size: a small one left over would need more padding than the others.
        windows = -(-buckets // most)
        self.windows = [self.bucket * (buckets * w // windows) for w in range(windows + 1)]
        self.epoch = self.epoch_data = self.order = None  # order: the shuffled epoch
        self.window = self.placed = None  # placed: the sample at each position of this window

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

    def samples(self, epoch: int, positions: range) -> tuple[object, list[tuple[int, int]]]:
        """-> the data as it is in this epoch; of the sample at each of these positions its index,
        and how often its row has come up (lengths.locate)."""
        found = []
        for position in positions:
            window = bisect.bisect_right(self.windows, position) - 1
            self._move_to(epoch, window)
            found.append(int(self.placed[position - self.windows[window]]))
        found = np.array([i for i in found if i >= 0], np.int64)
        numbers = locate(self.epoch_data, found, epoch)[1]
        return self.epoch_data, list(zip(found.tolist(), numbers.tolist()))

    def _move_to(self, epoch: int, window: int) -> None:
        if self.epoch != epoch:
            self.epoch, self.window = epoch, None
            # A weighted mixture has other rows, and other captions, in each epoch.
            self.epoch_data = (self.data.at_epoch(epoch) if hasattr(self.data, "at_epoch")
                               else self.data)
            self.order = epoch_order(self.epoch_data, np.random.default_rng([self.seed, epoch]))
        if self.window != window:
            self.window = window
            first, end = self.windows[window:window + 2]
            samples = self.order[first:end]  # the last window has fewer samples than positions
            lengths = self.lengths.of(self.epoch_data, samples, epoch)
            by_length = samples[np.argsort(lengths, kind="stable")]
            buckets = np.full(((end - first) // self.bucket, self.bucket), -1)  # -1: empty
            for bucket, rows in zip(buckets, np.array_split(by_length, len(buckets))):
                bucket[:len(rows)] = rows
            # Short and long rows in random order.
            self.placed = np.random.default_rng([self.seed, epoch, window]).permutation(buckets)
            self.placed = self.placed.ravel()


def epoch_order(data, rng: np.random.Generator) -> np.ndarray:
    """-> the indices 0 to len(data) - 1 in an order that the random numbers decide."""
    # Every data worker of every process holds an order: at most 4 bytes a sample, up to 4 billion.
    order = rng.permutation(np.arange(len(data), dtype=np.min_scalar_type(len(data))))
    groups = row_groups(data)
    if sum(size for slices in groups for _, size in slices) > POOL:
        pooled = np.zeros(len(data), bool)
        pooled[np.concatenate([indices for slices in groups for indices, _ in slices])] = True
        order[pooled[order]] = pool_by_pool(groups, rng)
    return order


def pool_by_pool(groups: list, rng: np.random.Generator) -> np.ndarray:
    order, pool, size = [], [], 0
    for g in rng.permutation(len(groups)):
        for indices, bytes_ in groups[g]:
            pool.append(indices)
            size += bytes_
            if size >= POOL:
                order.append(rng.permutation(np.concatenate(pool)))
                pool, size = [], 0
    if pool:
        order.append(rng.permutation(np.concatenate(pool)))
    return np.concatenate(order)


def row_groups(data) -> list[list[tuple[np.ndarray, float]]]:
    """The row groups of all Parquet files in data, each as its slices: (indices of the samples,
    bytes of these samples)."""
    # A mixture's samples stand part after part; a file alone is a single part of all its rows.
    parts = getattr(data, "parts", None)
    parts = [(data, range(len(data)))] if parts is None else [(p.data, p.rows) for p in parts]
    groups, first = [], 0
    for file, rows in parts:
        if isinstance(file, ParquetData):
            # Of the sorted rows, those before a slice's end: where each slice's share ends.
            ends = first + np.searchsorted(np.asarray(rows), [piece.end for piece in file.slices])
            starts = [first, *ends[:-1]]
            shares = [(piece.group, np.arange(start, end), piece.row_bytes * (end - start))
                      for piece, start, end in zip(file.slices, starts, ends) if start < end]
            groups += [[share[1:] for share in group]
                       for _, group in groupby(shares, key=lambda share: share[0])]
        first += len(rows)
    return groups


def buckets_in_window(data, bucket: int, most: int) -> int:
    """How many buckets are sorted together: `most`, or fewer where the rows bring their images
    along and a worker would have to hold more than a pool of them."""
    size = sum(size for slices in row_groups(data) for _, size in slices) / len(data) * bucket
    return most if size == 0 else min(most, max(MIN_BUCKETS, int(POOL / size)))
