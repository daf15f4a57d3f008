"""Several data files, each with a weight -> one data set.

    ["a.json:2", "b.parquet:0.5"] -> open_mixture -> data[i] -> Sample   -> batching.py

A weight says how often each sample of a file comes in an epoch. Think of a file as an endless line
of passes: all its samples, all of them again, and so on. With weight w and n samples, an epoch
takes the next w * n positions of that line:

    weight 2     |pass 0|pass 1|            two whole passes, the next epoch takes passes 2 and 3
    weight 0.5   |pass|                     half a pass, the next epoch takes its other half
    weight 1.5   |pass 0|pas                one and a half

A pass that an epoch takes only a part of is shuffled first (by the seed), so the part is a fair
draw; and the rest of it is not lost, it comes in the next epoch. Where an image has several
captions, each pass shows the next one.

For measuring, the last samples of each file can be set apart: then a pass goes without them.
"""

import bisect
import re
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from dataset.readers.formats import open_data
from dataset.readers.index_cache import identity
from dataset.sample import Sample


@dataclass(frozen=True)
class Source:
    file: str
    weight: float
    data: object  # what open_data returns
    rows: range  # of it, what counts here

    @property
    def samples_per_epoch(self) -> int:
        return max(round(self.weight * len(self.rows)), min(1, len(self.rows)))


@dataclass(frozen=True)
class Part:
    """What an epoch takes of one pass through one file."""

    file: str
    data: object
    number: int  # of the pass
    rows: object  # sorted numbers of the rows, a range where it is all of them

    def __len__(self) -> int:
        return len(self.rows)


class Mixture:
    """len() and [i] -> Sample, as of a single file. It stays at epoch 0, the same sample at each i;
    `at_epoch` gives another one."""

    def __init__(self, sources: list[Source], seed: int, epoch: int = 0):
        self.sources, self.seed, self.epoch = sources, seed, epoch
        self.parts = [part for number in range(len(sources)) for part in self._parts(number)]
        self.ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> Sample:
        part, row = self._find(i)
        return part.data.sample(row, caption_index=part.number)

    def where(self, i: int) -> str:
        """Where sample i stands, without reading it."""
        part, row = self._find(i)
        return f"{part.file}, sample {row + 1}"

    def everything(self) -> "Mixture":
        """Every sample that counts once, file after file: what `locate` numbers."""
        return Mixture([replace(source, weight=1.0) for source in self.sources], self.seed)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """-> the index in `everything` of each of these samples, and in which pass it comes."""
        ends = accumulate((len(source.rows) for source in self.sources), initial=0)
        shift = {id(source.data): end - source.rows.start
                 for source, end in zip(self.sources, ends)}
        part_of = np.searchsorted(self.ends, samples, side="right")
        rows, passes = np.zeros((2, len(samples)), np.int64)
        for number in np.unique(part_of):
            part, inside = self.parts[number], part_of == number
            n = samples[inside].astype(np.int64) - (self.ends[number] - len(part))  # in the part
            n = part.rows.start + n if isinstance(part.rows, range) else part.rows[n]
            rows[inside], passes[inside] = shift[id(part.data)] + n, part.number
        return rows, passes

    def fingerprint(self) -> str:
        """Changes when one of the files does; two mixtures of one fingerprint hold the same."""
        return str([(identity(source.file), source.rows) for source in self.sources])

    def _find(self, i: int) -> tuple[Part, int]:
        i = range(len(self))[i]  # IndexError past the end, which is what ends a for loop
        number = bisect.bisect_right(self.ends, i)
        part = self.parts[number]
        return part, int(part.rows[i - self.ends[number] + len(part)])

    def at_epoch(self, epoch: int) -> "Mixture":
        """The same files at another epoch: as many samples, other captions, other parts."""
        return Mixture(self.sources, self.seed, epoch)

    def set_apart(self) -> "Mixture":
        """The samples that `open_mixture` set apart: each once, whatever its file's weight."""
        return Mixture([Source(source.file, 1.0, source.data,
                               range(source.rows.stop, len(source.data)))
                        for source in self.sources], self.seed)

    def _parts(self, number: int):
        source = self.sources[number]
        size, count = len(source.rows), source.samples_per_epoch
        start, end = self.epoch * count, (self.epoch + 1) * count  # on the endless line
        while start < end:
            this_pass, first = divmod(start, size)
            last = min(first + end - start, size)
            rows = source.rows
            if last - first < size:
                rng = np.random.default_rng([self.seed, number, this_pass])
                # Sorted again: files are read front to back, and batching shuffles anyway.
                rows = source.rows.start + np.sort(rng.permutation(size)[first:last])
            yield Part(source.file, source.data, this_pass, rows)
            start += last - first


def open_mixture(sources: list[str], images_dir=None, seed: int = 0, apart: int = 0,
                 follow_links: bool = False) -> Mixture:
    """["FILE", "FILE:WEIGHT", ...] -> one data set. images_dir and follow_links: see open_data.

    apart: so many samples are left out, see `set_apart`: the last ones of each file, by its share
    of all samples. They depend on nothing else, so every process and every resume agrees.
    """
    if not sources:
        raise ValueError("no data file was given; expected FILE or FILE:WEIGHT")
    split = [split_source(source) for source in sources]
    opened = [open_data(file, images_dir, follow_links) for file, _ in split]
    ends = [0, *accumulate(map(len, opened))]
    if apart and apart >= ends[-1]:
        raise ValueError(f"{apart:,} samples are to be set apart, but there are only {ends[-1]:,}; "
                         "expected fewer, so that some are left to train on")
    kept = [len(data) - (apart * end // ends[-1] - apart * start // ends[-1] if apart else 0)
            for data, start, end in zip(opened, ends, ends[1:])]
    return Mixture([Source(file, weight, data, range(rows))
                    for (file, weight), data, rows in zip(split, opened, kept)], seed)


def split_source(source: str) -> tuple[str, float]:
    """"a.json:2" -> ("a.json", 2.0), "a.json" -> ("a.json", 1.0). Only a number behind the last
    colon is a weight, so C:\\data\\a.json stays in one piece."""
    match = re.fullmatch(r"(.+):([-+]?\d*\.?\d+)", source)
    if not match:
        return source, 1.0
    file, weight = match[1], float(match[2])
    if weight <= 0:
        raise ValueError(f"{source}: the weight is {match[2]}; expected more than 0, how often "
                         "each sample comes in an epoch. Leave the file out if it is not wanted.")
    return file, weight
