"""The order of an epoch: shuffled, yet such that a large Parquet file is not read over and over.

    data, random numbers -> epoch_order -> every sample's number once   -> batching.py

A row of JSON Lines is found by its place in the file, so any order costs the same. A row of a
Parquet file comes with its row group, megabytes to decode. Were rows drawn from a whole file of
4 GB, each stretch of batching.py would find some of its rows in every group and pass through all
4 GB. So a large file's groups are shuffled first, then joined to pools, and the rows of a pool are
shuffled together:

    groups     a  b  c  d  e  f      the file
    shuffled   e  b  f  a  d  c
    pools      [e  b  f] [a  d  c]   the rows of e, b and f in any order, then those of a, d and c

A stretch of this order, which one worker reads for itself, then passes through a pool or two.
WebDataset's shards and shuffle buffer do the same.
Rows of other files keep the random places that they drew; and Parquet data that is no larger than
a pool is shuffled as a whole. A single group that is larger than a pool is a pool of its own, and
each stretch passes through all of it: `python -m extras.check_data` says so, and what to do.
"""

from itertools import pairwise

import numpy as np

from dataset.readers.parquet import ParquetData, wanted_bytes

POOL = 1 << 25  # bytes of row groups that are shuffled together: a tenth of a second to read
HELD = 1 << 27  # bytes of rows that all workers of a rank may hold: 64 MB for each of two
FEWEST = 8  # blocks, however large the rows are: they have to be sorted by length


def epoch_order(data, rng: np.random.Generator) -> np.ndarray:
    """-> the numbers 0 to len(data) - 1 in an order that the random numbers decide."""
    # Every data worker of every process holds an order: 4 bytes a sample are enough for 4 billion.
    order = rng.permutation(np.arange(len(data), dtype=np.min_scalar_type(len(data))))
    groups = row_groups(data)
    if sum(size for _, size in groups) > POOL:
        pooled = np.zeros(len(data), bool)
        for numbers, _ in groups:
            pooled[numbers] = True
        order[pooled[order]] = pool_by_pool(groups, rng)
    return order


def pool_by_pool(groups: list, rng: np.random.Generator) -> np.ndarray:
    order, pool, held = [], [], 0
    for g in rng.permutation(len(groups)):
        numbers, size = groups[g]
        pool.append(numbers)
        held += size
        if held >= POOL:
            order.append(rng.permutation(np.concatenate(pool)))
            pool, held = [], 0
    if pool:
        order.append(rng.permutation(np.concatenate(pool)))
    return np.concatenate(order)


def row_groups(data) -> list[tuple[np.ndarray, int]]:
    """The row groups of all Parquet files in data, each as (numbers of its samples, bytes of
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
                    about = file.metadata.row_group(group)
                    row = wanted_bytes(about, file.columns) / about.num_rows
                    groups.append((np.arange(start, end), row * (end - start)))
        first += len(rows)
    return groups


def blocks_in_window(data, block_rows: float, most: int) -> int:
    """How many blocks, of so many rows for a rank, are read together: as many as `most`, fewer
    where the rows bring their pictures along as bytes and would fill the memory."""
    held = sum(size for _, size in row_groups(data)) / len(data) * block_rows  # of a block
    return most if held == 0 else min(most, max(FEWEST, int(HELD / held)))


def by_size(data, numbers: np.ndarray) -> np.ndarray | None:
    """The same samples, those with short records first; None where no index tells their sizes."""
    sizes = data.sizes(numbers) if hasattr(data, "sizes") else None
    # One number of size and place: sorted, equal sizes stand alike on every machine.
    return None if sizes is None else numbers[np.sort(
        sizes.astype(np.int64) << 32 | np.arange(len(numbers))) & 0xFFFFFFFF]
