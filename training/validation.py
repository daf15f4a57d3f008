"""The loss on samples that are never trained on: does the model learn, and does it look?

    --eval_data FILE                     its first --eval_samples N, or all
    --data emoji                         the scenes that follow the last one of the training
    other --data with --eval_samples N   its last N samples, which training then leaves out

    held-out samples -> batches, with their own pictures and with another sample's
                     -> mean loss of a supervised token, over all ranks -> evaluations.jsonl

A falling training loss can mean that answers are learned by heart; then the held-out loss rises.
And both can fall while the model only learns how answers usually sound. A model that looks is
worse off with a wrong picture: the gap between the two losses is what the picture tells it.

Which samples are set apart follows from the files and N alone, so it is the same after a resume
and on any number of ranks: of several files each gives its last ones, as many as its share of the
samples. They are apart as samples; where a picture has several rows, another may be trained on.
A measurement draws no random numbers and changes no weight: training goes on as if there were none.
"""

from dataclasses import replace

import torch
from torch.utils.data import Subset

from dataset.batching import Batches
from dataset.readers.formats import BadSample
from extras.fsdp import to_compute
from training.loop import forward
from training.setup import open_files

EMOJI_SAMPLES = 256  # scenes, when --eval_samples does not say how many


class HeldOut:
    """The held-out samples, ready to be measured as often as wanted."""

    def __init__(self, data, make_batches, answers=None):
        """data: len() and [i] -> Sample. make_batches: data -> Batches for this rank.
        answers: an Answers that asks some of them, see answers.py."""
        self.data, self.answers = data, answers
        self.right, self.wrong = make_batches(data), make_batches(ShuffledImages(data))

    def losses(self, model, settings, ranks) -> dict:
        """-> what stands in a line of evaluations.jsonl, but for the step. All ranks call it."""
        right, rows, pictures, bad = mean_loss(model, self.right, settings, ranks)
        wrong = mean_loss(model, self.wrong, settings, ranks)[0] if pictures else None
        return {"eval_loss": right, "eval_loss_wrong_picture": wrong, "samples": rows,
                "skipped": bad}


class ShuffledImages:
    """The same samples, each with the images of those that follow it, in a circle.

    Text without images stays as it is, so that both losses are over the same tokens. When there
    is no other image at all, a sample with images raises BadSample.
    """

    def __init__(self, data, may_lend=lambda sample, other: True):
        """data: len() and [i] -> Sample, or an evaluation's Question. may_lend: whether a sample
        may get the images of the other one."""
        self.data, self.may_lend = data, may_lend

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int):
        sample, others = self.data[i], []
        for step in range(1, len(self)):
            if len(others) >= len(sample.images):
                break
            try:
                following = self.data[(i + step) % len(self)]
            except BadSample:
                continue
            if self.may_lend(sample, following):
                others += [image for image in following.images if image not in sample.images]
        if len(others) < len(sample.images):
            raise BadSample(sample.where, "no other picture to show in the place of its own")
        return replace(sample, images=tuple(others[:len(sample.images)]))


@torch.no_grad()
def mean_loss(model, batches: Batches, settings, ranks) -> tuple[float | None, int, int, int]:
    """-> mean loss of a supervised token (None without any), samples, pictures, and samples that
    could not be used; over all ranks. Divided once, so each token weighs the same, as in training.
    """
    total = tokens = rows = pictures = skipped = 0
    model.eval()  # no dropout: it would be noise, and draw from the generator of the training
    try:
        for batch, bad in batches.epoch(0):  # always the same order, so always the same batches
            skipped += len(bad)
            batch = to_compute(batch, settings)
            if not batch:
                continue
            loss, count = forward(model, batch, settings, ranks, batches.features)
            total, tokens = total + float(loss), tokens + int(count)
            rows += len(batch.where)
            pictures += 0 if batch.order is None else len(batch.order)
    finally:
        model.train()
    total, tokens, *counts = ranks.sum(total, tokens, rows, pictures, skipped)
    return total / tokens if tokens else None, *map(int, counts)


def open_held_out(settings, kind: str, data):
    """-> the held-out samples, or None when nothing is measured.

    kind: the half of the embedded world. data: what is trained on.
    """
    if not settings.eval_every or settings.overfit:
        return None
    if settings.eval_data:
        found = open_files("eval_data", settings)
        return Subset(found, range(min(settings.eval_samples or len(found), len(found))))
    if settings.data == "emoji":
        from dataset.emoji.world import EmojiData  # here: other data has no use for it

        number = settings.eval_samples or EMOJI_SAMPLES
        # Not the test scenes: who looks at them while training chooses what suits them.
        following = range(len(data), len(data) + number)
        return Subset(EmojiData(kind, following.stop), following)
    return data.set_apart()
