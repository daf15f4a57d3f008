"""An image -> the tensor that a vision tower was trained on.

    path, bytes or PIL image -> load_image -> RGB -> ImageProcessor -> (3,H,W) float32

Each tower's preprocessor_config.json records what its training did: resize, crop the middle, scale
0..255 to 0..1, subtract a mean, divide by a standard deviation. We do the same steps in the same
order with the same library (Pillow), because a tower fed in another way sees worse without any
warning: bilinear for bicubic, or a forgotten mean, silently costs accuracy.

`fast` trades that exactness for more than twice the speed: a JPEG is decoded at a half, a quarter
or an eighth of its size (the decoder then computes fewer pixels of each block of 8 x 8), never
smaller than the resize needs, and PyTorch resizes the rest.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dataset.readers import preprocessor_config
from dataset.readers.image_file import MOST_PIXELS, load_image

TORCH_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers; PyTorch has no others


@dataclass(frozen=True)
class ImageProcessor:
    """The steps of one preprocessor_config.json, in their order; None leaves a step out."""

    kind: str  # the public class name, for save()
    resize: int | tuple[int, int] | None  # shortest edge, or (height, width)
    crop: tuple[int, int] | None  # (height, width) of the middle
    resample: int  # Pillow's number of the filter: 2 bilinear, 3 bicubic
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fast: bool = False  # see above; no public file has it

    def __post_init__(self):
        preprocessor_config.check(self)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every image that comes out."""
        return self.crop or self.resize

    @property
    def draft(self) -> int | None:
        """What load_image may decode to: the longest edge of the resize, whichever way the image
        lies."""
        if not self.fast or self.resize is None:
            return None
        return max(self.resize) if isinstance(self.resize, tuple) else self.resize

    @classmethod
    def from_directory(cls, path) -> "ImageProcessor":
        file, public = preprocessor_config.find(path)
        try:
            return cls.from_public(public)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_public(cls, public: dict) -> "ImageProcessor":
        """Read the dictionary of a preprocessor_config.json, in its older spellings too."""
        return cls(**preprocessor_config.parse(public))

    def save(self, directory) -> None:
        """Write a preprocessor_config.json that other libraries read as we do."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(preprocessor_config.to_public(self), indent=2) + "\n"
        (Path(directory) / "preprocessor_config.json").write_text(text, encoding="utf-8")

    def read(self, source) -> torch.Tensor:
        """What load_image takes -> (3,H,W) float32. Raises OSError, ValueError or MemoryError."""
        return self(load_image(source, self.draft))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB -> (3,H,W) float32."""
        if self.resize is not None:
            height, width = fit_size(image, self.resize)
            if height * width > MOST_PIXELS:  # one pixel wide and very long
                raise ValueError(f"an image of {image.width} x {image.height} would be resized to "
                                 f"{width} x {height}, more than {MOST_PIXELS:,} pixels")
            pixels = self.resized(image, height, width)
        else:
            pixels = as_tensor(image)
        if self.crop is not None:
            pixels = crop_centre(pixels, *self.crop)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        mean = torch.tensor(self.mean)[:, None, None]
        std = torch.tensor(self.std)[:, None, None]
        # In place: a fresh tensor for each of the three costs as much as the arithmetic.
        return pixels.mul_(self.rescale).sub_(mean).div_(std)

    def resized(self, image: Image.Image, height: int, width: int) -> torch.Tensor:
        """-> (3,height,width), 0..255."""
        if not self.fast or self.resample not in TORCH_FILTERS:
            return as_tensor(image.resize((width, height), resample=self.resample))
        # The same filter with 16-bit weights where Pillow has 32: a step of 255 apart, seldom two.
        return F.interpolate(as_tensor(image)[None], (height, width), antialias=True,
                             mode=TORCH_FILTERS[self.resample])[0]


def as_tensor(image: Image.Image) -> torch.Tensor:
    """RGB -> (3,H,W) uint8, the three numbers of a pixel side by side in memory as they were."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def fit_size(image: Image.Image, resize) -> tuple[int, int]:
    """(height, width) after the resize. The longer edge is rounded down, as in public."""
    if isinstance(resize, tuple):
        return resize
    width, height = image.size
    if width <= height:
        return int(resize * height / width), resize
    return resize, int(resize * width / height)


def crop_centre(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(3,H,W) -> the middle, black around it where the image is smaller."""
    # An odd margin cannot be halved: `//` rounds down also below zero, so a crop takes the extra
    # pixel from the right and bottom, padding adds it at the left and top. The public code agrees.
    top = (pixels.shape[1] - height) // 2
    left = (pixels.shape[2] - width) // 2
    # A border of less than nothing is cut away.
    return F.pad(pixels, (-left, width - pixels.shape[2] + left,
                          -top, height - pixels.shape[1] + top))
