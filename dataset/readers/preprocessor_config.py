"""preprocessor_config.json <-> the steps of an ImageProcessor, in older spellings too.

    a directory -> find -> the file, and the object in it
    {"image_processor_type": ..., "size": ...} -> parse -> {"resize": ..., "mean": ..., ...}
    ImageProcessor -> to_public -> a dictionary that other libraries read as we do
"""

import json
import math
from pathlib import Path

from PIL import Image

LONGEST_EDGE = 4096  # of an image as a tower takes it; none takes a quarter of it
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


def find(directory) -> tuple[Path, dict]:
    """transformers 5 writes the image processor into processor_config.json, beside what its
    processor has else, and no preprocessor_config.json. Where both lie it takes the first."""
    file = Path(directory) / "preprocessor_config.json"
    newer = file.with_name("processor_config.json")
    for path in filter(Path.is_file, (newer, file)):
        try:
            public = json.loads(path.read_text(encoding="utf-8"))
            if path == file:
                return file, public
            if "image_processor" in public:
                return newer, public["image_processor"]
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error
    raise FileNotFoundError(f"{file} is missing, and so is {newer.name} with an 'image_processor'; "
                            "it says how the vision tower wants its images, and is published "
                            "beside its weights")


def parse(public: dict) -> dict:
    """A preprocessor_config.json -> the fields of ImageProcessor. Raises ValueError."""
    if not isinstance(public, dict):
        raise ValueError("preprocessor_config.json holds no object {name: value}")
    kind = public.get("image_processor_type") or public.get("feature_extractor_type") or ""
    kind = str(kind).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    if kind not in DEFAULTS:
        raise ValueError(f"preprocessor_config.json is for {kind or 'an unnamed class'!r}; "
                         f"supported are {', '.join(DEFAULTS)}")
    values = {**DEFAULTS[kind], **{key: v for key, v in public.items() if v is not None}}
    resize = crop = None
    if values.get("do_resize", True):
        resize = read_size(values["size"])
    if values["do_center_crop"]:
        crop = read_size(values["crop_size"])
        crop = (crop, crop) if isinstance(crop, int) else crop
    rescale = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    normalize = values.get("do_normalize", True)
    return {"kind": kind, "resize": resize, "crop": crop, "rescale": rescale,
            "resample": values.get("resample", Image.Resampling.BICUBIC),
            "mean": as_tuple(values["image_mean"]) if normalize else (0.0, 0.0, 0.0),
            "std": as_tuple(values["image_std"]) if normalize else (1.0, 1.0, 1.0),
            "fast": values.get("approximate_resize", False) is True}


def to_public(processor) -> dict:
    """ImageProcessor -> the object of a preprocessor_config.json."""
    public = {
        "image_processor_type": processor.kind, "do_convert_rgb": True,
        "do_resize": processor.resize is not None, "resample": int(processor.resample),
        "do_center_crop": processor.crop is not None,
        "do_rescale": True, "rescale_factor": processor.rescale,
        "do_normalize": True, "image_mean": processor.mean, "image_std": processor.std,
    }
    if processor.fast:  # our own key, which other libraries pass over
        public["approximate_resize"] = True
    if isinstance(processor.resize, tuple):
        public["size"] = dict(zip(("height", "width"), processor.resize))
    elif processor.resize is not None:
        public["size"] = {"shortest_edge": processor.resize}
    if processor.crop is not None:
        public["crop_size"] = dict(zip(("height", "width"), processor.crop))
    return public


def check(processor) -> None:
    """ValueError where a value cannot be computed with."""
    edges = f"1 to {LONGEST_EDGE} pixels"
    for name, value, valid, expected in (
        ("size", processor.resize, are_edges(processor.resize), edges),
        ("crop_size", processor.crop, are_edges(processor.crop), edges),
        ("resample", processor.resample, processor.resample in range(6),
         "a filter of Pillow's, 0 to 5"),
        ("rescale_factor", processor.rescale, are_numbers([processor.rescale], 1, above=0),
         "a number above 0"),
        ("image_mean", processor.mean, are_numbers(processor.mean, 3), "three numbers"),
        ("image_std", processor.std, are_numbers(processor.std, 3, above=0),
         "three numbers above 0"),
    ):
        if not valid:
            raise ValueError(f"preprocessor_config.json has {name} = {value!r}; "
                             f"expected {expected}")
    if processor.crop is None and not isinstance(processor.resize, tuple):
        raise ValueError("preprocessor_config.json neither crops nor resizes to a fixed height "
                         "and width; images of unlike sizes cannot share a batch")


def read_size(size) -> int | tuple[int, int]:
    """224, {"shortest_edge": 224} or {"height": .., "width": ..} -> int or (height, width)."""
    if isinstance(size, int):
        return size
    size = size if isinstance(size, dict) else {"size": size}
    values = {key: value for key, value in size.items() if value is not None}
    if set(values) == {"shortest_edge"}:
        return values["shortest_edge"]
    if set(values) == {"height", "width"}:
        return values["height"], values["width"]
    raise ValueError(f"preprocessor_config.json has the size {size}; expected a number, "
                     "shortest_edge alone, or height and width")


def as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def are_edges(size) -> bool:
    return size is None or all(
        type(edge) is int and 1 <= edge <= LONGEST_EDGE for edge in as_tuple(size))


def are_numbers(values: list, count: int, above: float = -math.inf) -> bool:
    return len(values) == count and all(
        type(n) in (int, float) and above < n < math.inf for n in values)
