"""A picture -> the numbers that a vision tower was trained on.

    path, bytes or PIL image -> load_image -> RGB -> ImageProcessor -> (3,H,W) float32

Each tower's preprocessor_config.json says what its training did: resize, cut out the middle,
scale 0..255 to 0..1, subtract a mean, divide by a spread. We do the same steps in the same order
with the same library (Pillow), because a tower fed in another way sees worse and nothing warns:
bilinear for bicubic, or a forgotten mean, cost accuracy in silence.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

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


def load_image(source) -> Image.Image:
    """A path, the bytes of an image file, a PIL image, or a function that draws one -> upright RGB.

    Transparency becomes white. A damaged or truncated file raises OSError: Pillow could fill the
    missing part with grey, and the model would learn to describe what it cannot see.
    """
    name = f"a picture of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        if callable(source):
            source = source()
        if not isinstance(source, Image.Image):
            source = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image = ImageOps.exif_transpose(source)  # cameras store the turn, not turned pixels
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except UnidentifiedImageError as error:  # its own text names a Python object, not the reason
        raise OSError(f"cannot read {name}: no image format that Pillow knows") from error
    except Exception as error:  # a broken file makes Pillow raise half a dozen different types
        raise OSError(f"cannot read {name}: {error}") from error


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

    def __post_init__(self):
        if self.crop is None and not isinstance(self.resize, tuple):
            raise ValueError("preprocessor_config.json neither crops nor resizes to a fixed height "
                             "and width; pictures of unlike sizes cannot share a batch")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every picture that comes out."""
        return self.crop or self.resize

    @classmethod
    def from_directory(cls, path) -> "ImageProcessor":
        file = Path(path) / "preprocessor_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; it says how the vision tower wants its "
                                    "pictures, and is published beside its weights")
        return cls.from_public(json.loads(file.read_text(encoding="utf-8")))

    @classmethod
    def from_public(cls, public: dict) -> "ImageProcessor":
        """Read the dictionary of a preprocessor_config.json, in its older spellings too."""
        kind = public.get("image_processor_type") or public.get("feature_extractor_type") or ""
        kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
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
                   tuple(facts["image_mean"]) if normalize else (0.0, 0.0, 0.0),
                   tuple(facts["image_std"]) if normalize else (1.0, 1.0, 1.0))

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
            image = image.resize((width, height), resample=self.resample)
        if self.crop is not None:
            image = crop_centre(image, *self.crop)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3,H,W), 0..255
        mean = torch.tensor(self.mean)[:, None, None]
        std = torch.tensor(self.std)[:, None, None]
        return ((pixels * self.rescale - mean) / std).contiguous()


def read_size(size) -> int | tuple[int, int]:
    """224, {"shortest_edge": 224} or {"height": .., "width": ..} -> int or (height, width)."""
    if isinstance(size, int):
        return size
    found = {key: value for key, value in size.items() if value is not None}
    if set(found) == {"shortest_edge"}:
        return found["shortest_edge"]
    if set(found) == {"height", "width"}:
        return found["height"], found["width"]
    raise ValueError(f"preprocessor_config.json has the size {size}; expected a number, "
                     "shortest_edge alone, or height and width")


def fit_size(image: Image.Image, resize) -> tuple[int, int]:
    """(height, width) after the resize. The longer edge is rounded down, as in public."""
    if isinstance(resize, tuple):
        return resize
    width, height = image.size
    if width <= height:
        return int(resize * height / width), resize
    return resize, int(resize * width / height)


def crop_centre(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle, black around it where the picture is smaller."""
    # An odd margin cannot be halved: `//` rounds down also below zero, so a crop takes the extra
    # pixel from the right and bottom, padding adds it at the left and top. The public code agrees.
    top = (image.height - height) // 2
    left = (image.width - width) // 2
    return image.crop((left, top, left + width, top + height))
