"""A picture -> the numbers that a vision tower was trained on.

    path, bytes or PIL image -> load_image -> RGB -> ImageProcessor -> (3,H,W) float32

Each tower's preprocessor_config.json says what its training did: resize, cut out the middle,
scale 0..255 to 0..1, subtract a mean, divide by a spread. We do the same steps in the same order
with the same library (Pillow), because a tower fed in another way sees worse and nothing warns:
bilinear for bicubic, or a forgotten mean, cost accuracy in silence.

`fast` trades that exactness for three times the speed: a JPEG is decoded at a half, a quarter or
an eighth of its size (the decoder then computes fewer pixels of each block of 8 x 8), never smaller
than what is asked for, and PyTorch resizes the rest.

A picture file comes from strangers. What becomes of the odd ones, as in the public processors:

    CMYK, YCbCr, palette, 1 bit   converted to RGB by Pillow
    16 or 32 bits of grey         values above 255 become white; 16 bits of colour lose 8
    transparent                   white behind it
    turned by EXIF                set upright, as exif_transpose does; EXIF that is broken: as it is
    animated, several pages       the first one
    damaged, too large, no photo  OSError: SVG, PDF, PostScript, a pipe, a directory, a bomb
"""

import contextlib
import importlib
import io
import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# What pictures are published in. Pillow knows forty more formats, and for one of them, EPS, it
# starts another program (Ghostscript) that runs what the file says. To load them all would take a
# tenth of a second of every start.
for plugin in ("Avif", "Bmp", "Gif", "Ico", "Jpeg", "Jpeg2K", "Mpo", "Png", "Ppm", "Tiff", "WebP"):
    with contextlib.suppress(ImportError):  # an older Pillow has no AVIF
        importlib.import_module(f"PIL.{plugin}ImagePlugin")
FORMATS = tuple({"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO",
                 "ICO"} & Image.OPEN.keys())
MOST_PIXELS = 89_478_485  # 256 MB of RGB; Pillow's own limit, see open_image
LONGEST_EDGE = 4096  # of what a tower is fed with; none takes a quarter of it
TORCH_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers; PyTorch has no others
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What a published file leaves out is the default of its class; DINOv2 publishes as "Bit".
CLIP_DEFAULTS = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True,
                 "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
DEFAULTS = {
    "SiglipImageProcessor": {"size": {"height": 224, "width": 224}, "do_center_crop": False,
                             "image_mean": HALF, "image_std": HALF},
    "CLIPImageProcessor": CLIP_DEFAULTS,
    "BitImageProcessor": CLIP_DEFAULTS,
}


def load_image(source, draft: int | None = None) -> Image.Image:
    """A path, the bytes of an image file, a PIL image, or a function that draws one -> upright RGB.

    draft: pixels that the shorter edge must keep at least; a larger JPEG may be decoded smaller.
    Transparency becomes white. A damaged or truncated file raises OSError: Pillow could fill the
    missing part with grey, and the model would learn to describe what it cannot see. So does one
    of more than MOST_PIXELS: a file of 1 KB can unfold to gigabytes.
    """
    name = f"a picture of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        if callable(source):
            source = source()
        if not isinstance(source, Image.Image):
            source = open_image(source, draft)
        image = upright(source)
        image.load()  # of a PIL image nobody may have read more than the header yet
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError as error:  # its own text names a Python object, not the reason
        raise OSError(f"cannot read {name}: no image format that Pillow knows") from error
    except Exception as error:  # a broken file makes Pillow raise half a dozen different types
        raise OSError(f"cannot read {name}: {error or type(error).__name__}") from error


def open_image(source, draft: int | None = None) -> Image.Image:
    """A path or bytes -> the whole first frame. draft: see load_image."""
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif not os.path.isfile(source):  # opening a pipe would wait for ever
        raise OSError("there is no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Pillow copes with; nobody could do anything
        # Pillow raises at twice its limit and between the two only warns.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(source, formats=FORMATS)
        if draft:
            image.draft(None, (draft, draft))  # of formats other than JPEG it changes nothing
        image.load()
    return image


def upright(image: Image.Image) -> Image.Image:
    """Cameras store the turn beside the pixels, in EXIF, and not turned pixels."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image  # exif_transpose would copy it
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that nobody can read; of the pixels it says nothing
        return image


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
        edges = f"1 to {LONGEST_EDGE} pixels"
        for name, found, fine, expected in (
            ("size", self.resize, self.resize is None or are_edges(self.resize), edges),
            ("crop_size", self.crop, self.crop is None or are_edges(self.crop), edges),
            ("resample", self.resample, self.resample in range(6), "a filter of Pillow's, 0 to 5"),
            ("rescale_factor", self.rescale, are_numbers([self.rescale], 1, above=0),
             "a number above 0"),
            ("image_mean", self.mean, are_numbers(self.mean, 3), "three numbers"),
            ("image_std", self.std, are_numbers(self.std, 3, above=0), "three numbers above 0"),
        ):
            if not fine:
                raise ValueError(f"preprocessor_config.json has {name} = {found!r}; "
                                 f"expected {expected}")
        if self.crop is None and not isinstance(self.resize, tuple):
            raise ValueError("preprocessor_config.json neither crops nor resizes to a fixed height "
                             "and width; pictures of unlike sizes cannot share a batch")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every picture that comes out."""
        return self.crop or self.resize

    @property
    def draft(self) -> int | None:
        """What load_image may decode to: the longest edge wanted, whichever way the picture lies.
        """
        return max(as_tuple(self.resize)) if self.fast and self.resize is not None else None

    @classmethod
    def from_directory(cls, path) -> "ImageProcessor":
        file = Path(path) / "preprocessor_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; it says how the vision tower wants its "
                                    "pictures, and is published beside its weights")
        try:
            return cls.from_public(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_public(cls, public: dict) -> "ImageProcessor":
        """Read the dictionary of a preprocessor_config.json, in its older spellings too."""
        if not isinstance(public, dict):
            raise ValueError("preprocessor_config.json holds no object {name: value}")
        kind = public.get("image_processor_type") or public.get("feature_extractor_type") or ""
        kind = str(kind).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
        if kind not in DEFAULTS:
            raise ValueError(f"preprocessor_config.json is for {kind or 'an unnamed class'!r}; "
                             f"supported are {', '.join(DEFAULTS)}")
        given = {key: value for key, value in public.items() if value is not None}
        facts = {**DEFAULTS[kind], **given}
        resize = crop = None
        if facts.get("do_resize", True):
            resize = read_size(facts["size"])
        if facts["do_center_crop"]:
            crop = read_size(facts["crop_size"])
            crop = (crop, crop) if isinstance(crop, int) else crop
        normalize = facts.get("do_normalize", True)
        rescale = facts.get("rescale_factor", 1 / 255) if facts.get("do_rescale", True) else 1.0
        return cls(kind, resize, crop, facts.get("resample", Image.Resampling.BICUBIC), rescale,
                   as_tuple(facts["image_mean"]) if normalize else (0.0, 0.0, 0.0),
                   as_tuple(facts["image_std"]) if normalize else (1.0, 1.0, 1.0),
                   facts.get("fast_images", False) is True)

    def save(self, directory) -> None:
        """Write a preprocessor_config.json that other libraries read as we do."""
        square = isinstance(self.resize, tuple)
        size = dict(zip(("height", "width"), self.resize)) if square else {
            "shortest_edge": self.resize}
        public = {
            "image_processor_type": self.kind, "do_convert_rgb": True,
            "do_resize": self.resize is not None, "resample": int(self.resample),
            "do_center_crop": self.crop is not None,
            "do_rescale": True, "rescale_factor": self.rescale,
            "do_normalize": True, "image_mean": self.mean, "image_std": self.std,
        }
        if self.fast:  # our own word, which other libraries pass over
            public["fast_images"] = True
        if self.resize is not None:
            public["size"] = size
        if self.crop is not None:
            public["crop_size"] = dict(zip(("height", "width"), self.crop))
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(public, indent=2) + "\n"
        (Path(directory) / "preprocessor_config.json").write_text(text, encoding="utf-8")

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB -> (3,H,W) float32."""
        if self.resize is not None:
            height, width = fit_size(image, self.resize)
            if height * width > MOST_PIXELS:  # a hair's breadth, enlarged along with its length
                raise ValueError(f"a picture of {image.width} x {image.height} would be resized to "
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


def read_size(size) -> int | tuple[int, int]:
    """224, {"shortest_edge": 224} or {"height": .., "width": ..} -> int or (height, width)."""
    if isinstance(size, int):
        return size
    size = size if isinstance(size, dict) else {"size": size}
    found = {key: value for key, value in size.items() if value is not None}
    if set(found) == {"shortest_edge"}:
        return found["shortest_edge"]
    if set(found) == {"height", "width"}:
        return found["height"], found["width"]
    raise ValueError(f"preprocessor_config.json has the size {size}; expected a number, "
                     "shortest_edge alone, or height and width")


def as_tuple(found) -> tuple:
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def are_edges(size) -> bool:
    return all(type(edge) is int and 1 <= edge <= LONGEST_EDGE for edge in as_tuple(size))


def are_numbers(found: list, count: int, above: float = -math.inf) -> bool:
    return len(found) == count and all(
        type(n) in (int, float) and above < n < math.inf for n in found)


def fit_size(image: Image.Image, resize) -> tuple[int, int]:
    """(height, width) after the resize. The longer edge is rounded down, as in public."""
    if isinstance(resize, tuple):
        return resize
    width, height = image.size
    if width <= height:
        return int(resize * height / width), resize
    return resize, int(resize * width / height)


def crop_centre(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(3,H,W) -> the middle, black around it where the picture is smaller."""
    # An odd margin cannot be halved: `//` rounds down also below zero, so a crop takes the extra
    # pixel from the right and bottom, padding adds it at the left and top. The public code agrees.
    top = (pixels.shape[1] - height) // 2
    left = (pixels.shape[2] - width) // 2
    # A border of less than nothing is cut away.
    return F.pad(pixels, (-left, width - pixels.shape[2] + left,
                          -top, height - pixels.shape[1] + top))
