"""How many tokens each row has, counted once, so that rows of similar length can stand together.

    data -> every row tokenized, by all workers of all ranks -> RowLengths -> sampler.py

Counting reads every row once before the first step, thousands a second and worker, and opens no
image file (what stands in a Parquet row is read along). The counts of large files are kept on the
machine (index_cache.py), so the next run has them.

Most rows have one length. Where a row teaches one answer (Qwen3), each epoch another one, it has
one for each of them. A row of several captions has the length of its first: where another one is
shown, there is a little more padding. A row that cannot be read gets the length of some other row,
so that bad rows are met all through an epoch and not in one batch.
"""

import numpy as np

from dataset.readers import index_cache
from dataset.readers.bad_sample import BadSample
from dataset.readers.worker_state import WorkerState, prepare_ahead

SPAN = 1000  # rows that a worker counts at a time
MANY = 50_000  # rows whose counting takes so long that it is announced, and kept


class RowLengths:
    """The lengths of n rows: counts (n,), how many lengths each row has; values, the lengths in
    tokens, row after row."""

    def __init__(self, counts: np.ndarray, values: np.ndarray):
        several = len(values) > len(counts)
        self.counts = counts if several else None
        self.first = np.cumsum(counts) - counts if several else None
        known = values[values > 0]
        bad = np.flatnonzero(values == 0)
        if len(bad) and len(known):
            values = values.copy()
            values[bad] = known[np.random.default_rng(0).integers(0, len(known), len(bad))]
        self.values = values

    def of(self, data, samples: np.ndarray, epoch: int) -> np.ndarray:
        """Tokens of these samples of data as it is in this epoch."""
        rows, numbers = locate(data, samples, epoch)
        if self.counts is None:
            return self.values[rows]
        return self.values[self.first[rows] + numbers % self.counts[rows]]


def locate(data, samples: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """-> the row of each of these samples, and a number that grows by one each time that the row
    comes up: what takes turns in a row (chat.py) starts at another point in each row."""
    if hasattr(data, "locate"):  # a mixture, in which a row can come several times an epoch
        rows, passes = data.locate(samples)
        return rows, rows + passes
    rows = samples.astype(np.int64)
    return rows, rows + epoch


class TokenCounter:
    """The data set of a DataLoader: (first row, row after the last) -> counts, values."""

    def __init__(self, data, template, workers: int):
        self.data, self.template, self.worker_state = data, template, WorkerState(workers)

    def __getitem__(self, span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        lengths = []
        for i in range(*span):
            with self.worker_state.at(name_of(self.data, i)):
                lengths.append(self.lengths(i))
        return (np.array([len(several) for several in lengths], np.int32),
                np.array([length for several in lengths for length in several], np.int32))

    def lengths(self, i: int) -> list[int]:
        """Of row i; 0 where it cannot be read. The reason is reported when it comes up."""
        try:
            messages = self.data[i].messages
            return [len(self.template.encode_conversation(prefix)[0])
                    for prefix in self.template.training_prefixes(messages)]
        except (BadSample, ValueError):
            return [0]


def count_tokens(data, template, workers: int = 0, distributed=None) -> RowLengths:
    """distributed: the ranks, each of which counts its share; None: this process counts alone."""
    data = data.everything() if hasattr(data, "everything") else data
    n, key = len(data), None
    if n > MANY and hasattr(data, "fingerprint"):
        key = f"lengths {data.fingerprint()} {template.fingerprint()}"
    kept = index_cache.load(key) if key else None
    if distributed is None:
        rank, world_size = 0, 1
    else:
        rank, world_size = distributed.rank, distributed.world_size
        if distributed.sum(kept is None) != [0.0]:  # some machine has none: count together
            kept = None
    if kept is None:
        if distributed and distributed.main and n > MANY:
            print(f"counting the tokens of {n:,} samples", flush=True)
        start, end = n * rank // world_size, n * (rank + 1) // world_size
        spans = [(first, min(first + SPAN, end)) for first in range(start, end, SPAN)]
        counter = TokenCounter(data, template, workers)
        share = list(prepare_ahead(counter, spans, min(workers, len(spans))))
        counts, values = (np.concatenate([np.empty(0, np.int32), *(part[k] for part in share)])
                          for k in (0, 1))
        if distributed:  # the shares in the order of the ranks, which is the order of the rows
            shares = distributed.gather([(counts, values)])
            counts, values = (np.concatenate([share[k] for share in shares]) for k in (0, 1))
        kept = np.concatenate([counts, values])
        kept = index_cache.store(key, kept) if key else kept
    return RowLengths(kept[:n], kept[n:])


def name_of(data, i: int) -> str:
    """Where sample i stands, without reading it."""
    return data.where(i) if hasattr(data, "where") else f"sample {i}"
