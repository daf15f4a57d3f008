"""--feature_cache DIR: run a frozen vision tower once for each image, not once an epoch.

    image -> its content -> key -> DIR/3f/a1c8... -> features (P,Dv), or None: not there yet

    Batch: pixels (N,3,H,W) of new images, features (F,P,Dv) of those that were found
        -> the tower sees the new ones, they are kept -> Batch: features (N+F,P,Dv) alone

A frozen tower computes the same features of the same image in every epoch and in every run. Data
workers read them (an image whose features are there is not even decoded), the training process
writes them, since only it has the model. Each image has a file of its own; whoever deletes some of
them, or all, at any time, costs a run nothing but the work of computing them again.

A key is the sha256 of the image's content together with all that decides its features: the tower's
weights, the image processor, the dtype. So a file can be missing, but never be the wrong one.

The files hold features in the run's --dtype: in fp32 exactly what the tower computes; in bf16 and
fp16 what the projector's first product would have rounded it to anyway. (A projector with a norm
in front, norm_mlp, reads float32 without this; there the rounding can be seen in the loss.)
"""

import hashlib
import os
import sys
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image

from dataset.batching import Batch, Batches, TokenizedSample, collate
from dataset.images import load_image
from training.precision import NUMBERS, autocast

STALE = 3600  # seconds after which a file that was begun is taken to be a killed run's


def open_feature_cache(model, processor, settings, distributed) -> "FeatureCache":
    """The files of --feature_cache. SystemExit where their features would be wrong."""
    if settings.train_vision:
        raise SystemExit("--feature_cache: with --train_vision the tower learns, and its features "
                         "of the last epoch are not those of now; leave one out")
    if settings.parallel == "fsdp" and distributed.world_size > 1:
        raise SystemExit("--feature_cache: under --parallel fsdp the ranks run the tower together, "
                         "and one that found its images on disk would leave the others waiting; "
                         "use --parallel ddp, or leave the cache out")
    fingerprint = tower_fingerprint(model.vision, processor, settings.dtype)
    return FeatureCache(settings.feature_cache, fingerprint, settings.feature_cache_gb * 1e9,
                        distributed.world_size)


def tower_fingerprint(vision, processor, dtype: str) -> str:
    """All that decides an image's features, as text."""
    digest = hashlib.sha256()
    for name, tensor in vision.state_dict().items():
        content = tensor.detach().cpu().contiguous().view(torch.uint8)
        digest.update(name.encode() + content.numpy().tobytes())
    return f"{digest.hexdigest()} {vision.config} {processor} {dtype}"


@dataclass(frozen=True, eq=False)
class ImageInput:
    """An image of a row: its features, or where they are not cached yet, its pixels."""

    pixels: torch.Tensor | None = None  # (3,H,W)
    features: torch.Tensor | None = None  # (P,Dv)
    key: str | None = None  # under which to cache the features of these pixels


@dataclass
class CachedBatch(Batch):
    keys: tuple[str | None, ...] = ()  # of the N images with pixels


class CachedBatches(Batches):
    """Batches that come with the features of all their images."""

    def read_image(self, image) -> ImageInput:
        image = load_image(image) if callable(image) else image  # drawn: its pixels are the key
        key = features = None
        with suppress(OSError):  # super().read_image gives the reason
            key = self.features.key(image)
            features = self.features.read(key)
        if features is not None:
            return ImageInput(features=features)
        return ImageInput(super().read_image(image), key=key)

    @staticmethod
    def collate(rows: list[TokenizedSample]) -> CachedBatch:
        """Each distinct image once, those with pixels before those with cached features."""
        batch = collate([replace(row, images=()) for row in rows])
        shown = [image for row in rows for image in row.images]
        distinct = sorted({id(image): image for image in shown}.values(),
                          key=lambda image: image.features is not None)
        index = {id(image): n for n, image in enumerate(distinct)}
        pixels = [image.pixels for image in distinct if image.features is None]
        features = [image.features for image in distinct if image.features is not None]
        return CachedBatch(
            batch.ids, batch.labels, torch.stack(pixels) if pixels else None, batch.where,
            batch.lengths, torch.tensor([index[id(image)] for image in shown]) if shown else None,
            torch.stack(features) if features else None,
            tuple(image.key for image in distinct[:len(pixels)]))

    def load(self, micro_batches):
        for batch, bad in super().load(micro_batches):
            yield with_cached_features(self.model, batch, self.features, self.dtype), bad

    def __getstate__(self) -> dict:  # a worker gets a copy, and has no use for the model
        return {**self.__dict__, "model": None}


def use_cache(loader: Batches, cache: "FeatureCache", model, dtype: str) -> Batches:
    loader.__class__ = CachedBatches
    loader.features, loader.model, loader.dtype = cache, model, dtype
    return loader


@torch.no_grad()
def with_cached_features(model, batch: CachedBatch, cache: "FeatureCache", dtype: str) -> Batch:
    """The batch with the features of all its images; those that are new are written to disk.

    All are in the memory of the CPU: a step's micro-batches are collected before the first of them
    is computed, and a GPU need hold the features of one alone.
    """
    known = [] if batch.features is None else [batch.features]
    cache.found += sum(map(len, known))
    if batch.pixels is None:
        return batch
    device = next(model.parameters()).device
    with autocast(dtype, device):
        # Rounded before they are used, so that it makes no difference whether they were found.
        new = model.vision_features(batch.pixels.to(device, non_blocking=True))  # (N,P,Dv)
        new = new.to(NUMBERS[dtype]).cpu()
    cache.computed += len(new)
    for key, features in zip(batch.keys, new, strict=True):
        if key:
            cache.write(key, features)
    return replace(batch, pixels=None, features=torch.cat([new, *known]), keys=())


class FeatureCache:
    """The features in one directory, as one tower computes them.

    fingerprint: distinguishes this tower, processor and dtype from others. limit: bytes that the
    directory may hold; when they are used up, what is there is read and nothing more is written.
    Several processes may share a directory: each of `writers` has its share of the room.
    """

    def __init__(self, directory, fingerprint: str, limit: float, writers: int = 1):
        self.directory, self.fingerprint = Path(directory), fingerprint
        self.found = self.computed = self.written = 0  # images, in this process
        used = 0
        for file in self.directory.glob("??/*"):
            with suppress(FileNotFoundError):  # another process has just deleted it
                stat = file.stat()
                if file.suffix == ".partial" and time.time() - stat.st_mtime > STALE:
                    file.unlink()
                else:
                    used += stat.st_size
        self.room = max(0, limit - used) / writers

    def key(self, image) -> str:
        """image: bytes of an image file, a path to one, or a PIL image. OSError: cannot be read."""
        if isinstance(image, Image.Image):
            image = f"{image.mode} {image.size} ".encode() + image.tobytes()
        elif not isinstance(image, bytes):
            if not os.path.isfile(image):  # opening a pipe would wait for ever
                raise OSError(f"there is no file {image}")
            image = Path(image).read_bytes()
        return hashlib.sha256(self.fingerprint.encode() + image).hexdigest()

    def path(self, key: str) -> Path:
        return self.directory / key[:2] / key[2:]  # 256 directories: one would be very long

    def read(self, key: str) -> torch.Tensor | None:
        """-> features (P,Dv), or None where there are none, or none that are whole."""
        try:
            content = self.path(key).read_bytes()
        except OSError:
            return None
        # A machine that loses its power can leave a file of the right length and of zeros.
        if len(content) < 4 or checksum(content[4:]) != content[:4]:
            print(f"{self.path(key)} is torn: its features are computed again", file=sys.stderr)
            return None
        return safetensors.torch.load(content[4:])["features"]

    def write(self, key: str, features: torch.Tensor) -> None:
        """features (P,Dv). Under another name first: no process ever reads half of a file."""
        content = safetensors.torch.save({"features": features.contiguous()})
        content = checksum(content) + content
        if len(content) > self.room:
            self.room = 0  # later ones are not smaller
            return
        path = self.path(key)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            os.replace(partial, path)
        except OSError as error:  # a full disk is no reason to stop a training
            print(f"cannot keep features in {self.directory}: {error}; from here on they are "
                  "computed and not kept", file=sys.stderr)
            with suppress(OSError):
                partial.unlink()
            self.room = 0
            return
        self.room -= len(content)
        self.written += 1

    def summary(self, distributed) -> str:
        """What the cache saved, over all ranks and since the start of this process."""
        found, computed, written = map(int, distributed.sum(self.found, self.computed,
                                                            self.written))
        full = "" if written == computed else (f"; {computed - written:,} were not kept, "
                                               "--feature_cache_gb is used up or the disk is full")
        return (f"features  of {found + computed:,} images {found:,} were found in "
                f"{self.directory}, {computed:,} computed{full}")


def checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")
