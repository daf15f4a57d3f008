"""What a frozen vision tower saw in a picture, kept on disk until the picture comes again.

    picture -> its content -> key -> DIR/3f/a1c8... -> features (P,Dv), or None: not there yet
    features that the model has just computed -> DIR   (extras/fast/feature_cache.py)

A frozen tower says the same of the same picture in every epoch and in every run, so from the
second time on neither the picture is decoded nor the tower run. A file of its own for each
picture; whoever deletes some of them, or all, at any time, costs a run nothing but the work of
computing them again.

A key is the sha256 of the picture's content together with all that decides what is seen in it:
the tower's weights, the image processor, the kind of number. So a file can be missing, but never
be the wrong one: a changed picture, another tower or another size has other keys.
"""

import hashlib
import os
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image

STALE = 3600  # seconds after which a file that was begun is taken to be a killed run's


class FeatureFiles:
    """The features in one directory, as one tower sees the world.

    seen_by: whatever tells this tower, processor and kind of number from others. limit: bytes
    that the directory may hold; when they are used up, what is there is read and nothing more is
    written. Several processes may share a directory: each of `writers` has its share of the room.
    """

    def __init__(self, directory, seen_by: str, limit: float, writers: int = 1):
        self.directory, self.seen_by = Path(directory), seen_by
        self.room = max(0, limit - self.used()) / writers
        self.found = self.computed = self.written = 0  # pictures, as this process met them

    def used(self) -> int:
        """Bytes that are in the directory; what a killed run left half written is deleted."""
        total = 0
        for file in self.directory.glob("??/*"):
            try:
                about = file.stat()
                if file.suffix == ".partial" and time.time() - about.st_mtime > STALE:
                    file.unlink()
                else:
                    total += about.st_size
            except FileNotFoundError:  # somebody else was tidying up
                continue
        return total

    def key(self, image) -> str:
        """image: bytes of an image file, a path to one, or a PIL image. OSError: cannot be read."""
        digest = hashlib.sha256(self.seen_by.encode())
        if isinstance(image, Image.Image):
            digest.update(f"{image.mode} {image.size} ".encode() + image.tobytes())
        elif isinstance(image, bytes):
            digest.update(image)
        elif not os.path.isfile(image):  # opening a pipe would wait for ever
            raise OSError(f"there is no file {image}")
        else:
            with open(image, "rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        return self.directory / key[:2] / key[2:]  # 256 directories: one would be very long

    def read(self, key: str) -> torch.Tensor | None:
        """-> features (P,Dv), or None where there are none, or none that are whole."""
        try:
            content = self.path(key).read_bytes()
        except OSError:
            return None
        # A machine that loses its power can leave a file of the right length and of zeros.
        if len(content) < 4 or zlib.crc32(content[4:]).to_bytes(4, "little") != content[:4]:
            print(f"{self.path(key)} is torn: its picture is looked at again", file=sys.stderr)
            return None
        return safetensors.torch.load(content[4:])["features"]

    def write(self, key: str, features: torch.Tensor) -> None:
        """features (P,Dv). Under another name first: nobody ever reads half of a file."""
        content = safetensors.torch.save({"features": features.detach().cpu().contiguous()})
        content = zlib.crc32(content).to_bytes(4, "little") + content
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
