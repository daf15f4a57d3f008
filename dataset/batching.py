"""Samples -> batches of rows of similar length, in an order that seed and epoch decide.

    Sample -> chat.py   -> ids, mask ----.
           -> images.py -> pixels -------+-> TokenizedSample -> collate -> Batch

Rows of similar length stand together, padded on the right (length-bucketed batching). A causal
model never looks to the right, so padding changes nothing and training needs no attention mask. To
find such rows without spoiling the shuffle, the tokens of each row are counted once, and the
shuffled epoch is cut into windows (readers/lengths.py, readers/sampler.py):

    shuffle the epoch -> cut into windows -> in each: sort by length, cut into buckets,
    shuffle the buckets -> the positions 0, 1, 2, ... of the epoch

A bucket has as many positions as the run's first micro-batch had on all ranks together, also when
the run is resumed with another: so seed and epoch fix the position of each sample. A micro-batch is
the next batch_size * world_size positions; position p belongs to rank p % world_size. Another batch
size or number of ranks cuts the same line of positions elsewhere: no sample comes twice or is left
out. A worker reads and tokenizes the rows of its own batches and nothing else.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dataset.readers.bad_sample import BadSample
from dataset.readers.lengths import RowLengths, count_tokens, name_of
from dataset.readers.sampler import EpochLayout
from dataset.readers.worker_state import WorkerState, prepare_ahead
from dataset.sample import Sample

UNSUPERVISED = -100  # the label that torch's cross entropy ignores


@dataclass
class Batch:
    """B rows of T tokens, T being the longest row.

    labels are shifted here and nowhere else: labels[b, t] is the token after ids[b, t] where that
    one is supervised, else -100; so the last position is always -100, as is all padding.
    pixels hold each distinct image once; order says which of them each run of placeholders shows.
    Images whose features are cached (extras/fast) have no pixels: order counts them after the N.
    """

    ids: torch.Tensor  # (B,T) int64
    labels: torch.Tensor  # (B,T) int64
    pixels: torch.Tensor | None  # (N,3,H,W) float32
    where: list[str]  # B times "file:line"
    lengths: list[int]  # B times the tokens before the padding
    order: torch.Tensor | None = None  # (M,) int64, each below N + F; None: as they come
    features: torch.Tensor | None = None  # (F,P,Dv)

    @property
    def supervised(self) -> int:
        return int((self.labels != UNSUPERVISED).sum())

    def each_tensor(self, change) -> "Batch":
        """The batch with change(tensor) instead of each of its tensors."""
        return replace(self, **{name: change(value) for name, value in vars(self).items()
                                if isinstance(value, torch.Tensor)})

    def to(self, device, non_blocking: bool = False) -> "Batch":
        return self.each_tensor(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """DataLoader calls this: copies to a GPU from pinned memory overlap with computation."""
        return self.each_tensor(torch.Tensor.pin_memory)


@dataclass(frozen=True)
class TokenizedSample:
    ids: Sequence[int]
    mask: Sequence[bool]  # where ids are supervised
    sample: Sample
    images: tuple[torch.Tensor, ...] = ()  # (3,H,W), read from sample.images


def collate(rows: list[TokenizedSample]) -> Batch:
    """Pad on the right and shift the labels. No rows: ids of (0,0); the other ranks have theirs."""
    lengths = [len(row.ids) for row in rows]
    ids = torch.zeros(len(rows), max(lengths, default=0), dtype=torch.int64)  # padding: any id
    labels = torch.full_like(ids, UNSUPERVISED)
    for b, row in enumerate(rows):
        ids[b, :lengths[b]] = torch.tensor(row.ids)
        target = ids[b, 1:lengths[b]]  # position t learns to predict the token at t + 1
        labels[b, :lengths[b] - 1] = target.where(torch.tensor(row.mask[1:]), UNSUPERVISED)
    shown = [image for row in rows for image in row.images]
    distinct = {id(image): image for image in shown}
    index = {key: n for n, key in enumerate(distinct)}
    return Batch(ids, labels, torch.stack([*distinct.values()]) if shown else None,
                 [row.sample.where for row in rows], lengths,
                 torch.tensor([index[id(image)] for image in shown]) if shown else None)


@dataclass(eq=False)
class Batches:
    """data -> pairs of a Batch for this rank and the BadSamples met on the way to it."""

    data: object  # len() and [i] -> Sample
    template: object  # ChatTemplate
    image_processor: object  # ImageProcessor
    batch_size: int  # rows of one rank; a micro-batch has batch_size * world_size on all of them
    max_length: int  # tokens of a row
    seed: int
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    window: int = 1024  # buckets sorted together, at most; padding falls as 1 / window
    bucket: int | None = None  # positions; of the run that is resumed, else a micro-batch
    lengths: RowLengths | None = None  # tokens of the rows of data; None: they are counted here

    def __post_init__(self):
        if len(self.data) == 0:
            raise ValueError("the data holds no samples; nothing can be learned from it")
        self.global_batch = self.batch_size * self.world_size
        lengths = self.lengths or count_tokens(self.data, self.template, self.workers)
        self.layout = EpochLayout(self.data, lengths, self.seed, self.global_batch, self.window,
                                  self.bucket)
        self.batches_per_epoch = -(-self.layout.positions // self.global_batch)
        self.worker_state = WorkerState(self.workers)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[Batch, list[BadSample]]]:
        """One epoch from batch number `skip` on; the samples before it are not read."""
        end, size = self.layout.positions, self.global_batch
        return self.load((epoch, start, min(start + size, end))
                         for start in range(skip * size, end, size))

    def load(self, micro_batches: Iterable[tuple]) -> Iterator[tuple[Batch, list[BadSample]]]:
        """micro_batches: (epoch, first position, position after the last), see layout.steps."""
        return prepare_ahead(self, micro_batches, self.workers)

    def __getitem__(self, micro_batch: tuple[int, int, int]) -> tuple[Batch, list[BadSample]]:
        epoch, start, end = micro_batch
        mine = range(start + (self.rank - start) % self.world_size, end, self.world_size)
        data, samples = self.layout.samples(epoch, mine)
        rows, bad, images = [], [], {}
        for i, number in samples:
            try:
                with self.worker_state.at(name_of(data, i)):
                    sample = data[i]
                with self.worker_state.at(sample.where):
                    rows.append(self.prepare(sample, number, images))
            except BadSample as error:
                bad.append(error)
        return self.collate(rows), bad

    def prepare(self, sample: Sample, number: int, images: dict) -> TokenizedSample:
        """number: see EpochLayout.samples. images: those that the batch has read so far."""
        try:
            # Qwen3 learns one answer of a row: each epoch another one.
            messages = self.template.training_prefix(sample.messages, number)
            ids, mask = self.template.encode_conversation(messages)
            ids, mask = self.template.truncate(ids, mask, self.max_length)
            shown = []
            for image in sample.images[:sum(message.images for message in messages)]:
                # One name for one file or the same bytes; an image that is drawn has none.
                name = image if isinstance(image, (str, bytes, Path)) else object()
                images[name] = images[name] if name in images else self.read_image(image)
                shown.append(images[name])
        except (OSError, ValueError, MemoryError) as error:
            raise BadSample(sample.where, str(error)) from error
        return TokenizedSample(ids, mask, sample, tuple(shown))

    def read_image(self, image) -> torch.Tensor:  # extras/fast/feature_cache.py has another one
        return self.image_processor.read(image)

    collate = staticmethod(collate)
