"""The loss on samples that are never trained on: does the model learn, and does it use the image?

    --eval_data FILE                     its first --eval_samples N, or all
    --data emoji                         the scenes that follow the last one of the training
    other --data with --eval_samples N   its last N samples, which training then leaves out

    held-out samples -> batches, with their own images and with another sample's
                     -> mean loss of a supervised token, over all ranks -> evaluations.jsonl

A falling training loss can mean that answers are memorised; then the held-out loss rises. And both
can fall while the model only learns how answers usually sound. A model that uses the image is
worse off with a wrong one: the gap between the two losses is what the image contributes.

Which samples are set apart follows from the files and N alone: of several files each gives its last
ones, as many as its share of the samples. Where an image has several rows, another may be trained
on. A measurement draws no random numbers and changes no weight.
"""

from contextlib import suppress
from dataclasses import replace

import torch

from dataset.batching import Batches
from dataset.readers.formats import BadSample
from training.precision import autocast


class ShuffledImages:
    """The same samples, each with the images of those that follow it, in a circle.

    Text without images stays as it is, so that both losses are over the same tokens. When there
    is no other image at all, a sample with images raises BadSample. may_lend: whether a sample, or
    an evaluation's question, may get the images of the other one.
    """

    def __init__(self, data, may_lend=lambda sample, other: True):
        self.data, self.may_lend = data, may_lend

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int):
        sample, others = self.data[i], []
        for step in range(1, len(self)):
            if len(others) >= len(sample.images):
                break
            with suppress(BadSample):
                following = self.data[(i + step) % len(self)]
                if self.may_lend(sample, following):
                    others += [image for image in following.images if image not in sample.images]
        if len(others) < len(sample.images):
            raise BadSample(sample.where, "no other image to show in the place of its own")
        return replace(sample, images=tuple(others[:len(sample.images)]))


def eval_losses(model, loaders: list[Batches], settings, distributed) -> dict:
    """loaders: of the samples with their own images, and with others'. -> a line of
    evaluations.jsonl, but for the step. All ranks call it."""
    loss, samples, images, skipped = mean_loss(model, loaders[0], settings, distributed)
    wrong = mean_loss(model, loaders[1], settings, distributed)[0] if images else None
    return {"eval_loss": loss, "eval_loss_shuffled_images": wrong, "samples": samples,
            "skipped": skipped}


@torch.no_grad()
def mean_loss(model, loader: Batches, settings, distributed) -> tuple[float | None, int, int, int]:
    """-> mean loss of a supervised token (None without any), samples, images, and samples that
    could not be used; over all ranks. Each token weighs the same, as in training."""
    total = tokens = samples = num_images = skipped = 0
    model.eval()  # no dropout: it would be noise, and draw from the generator of the training
    try:
        for batch, bad in loader.epoch(0):  # always the same order, so always the same batches
            skipped += len(bad)
            batch = distributed.drop_or_dummy_batch(batch)
            if not batch:
                continue
            batch = batch.to(distributed.device, non_blocking=True)
            with autocast(settings.dtype, distributed.device):
                inputs = batch.pixels if batch.features is None else batch.features
                loss, count = model(batch.ids, batch.labels, inputs, batch.order)
            total, tokens = total + float(loss), tokens + int(count)
            samples += len(batch.where)
            num_images += 0 if batch.order is None else len(batch.order)
    finally:
        model.train()
    total, tokens, *counts = distributed.sum(total, tokens, samples, num_images, skipped)
    return total / tokens if tokens else None, *map(int, counts)
