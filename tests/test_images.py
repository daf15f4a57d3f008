"""Claim: pictures reach a tower exactly as the public processors would hand them over."""

import io
import json

import numpy as np
import pytest
import torch
from conftest import needed, shared_dir
from PIL import Image

from dataset.images import ImageProcessor, load_image

CLOSE = 1 / 255  # one step of an 8-bit channel, before the division by std: stricter than needed
SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 96, "width": 80}}
CLIP = {"image_processor_type": "CLIPImageProcessor"}
DINOV2 = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256},
          "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CONFIGS = {
    "siglip": {**SIGLIP, "size": {"height": 224, "width": 224}},
    "siglip_oblong": SIGLIP,
    "siglip2_bilinear": {**SIGLIP, "resample": 2},
    "clip": CLIP,
    "clip_numbers": {**CLIP, "size": 50, "crop_size": 31},
    "clip_crop_only": {**CLIP, "do_resize": False, "crop_size": {"height": 97, "width": 61}},
    "clip_padded": {**CLIP, "size": {"shortest_edge": 40},
                    "crop_size": {"height": 64, "width": 51}},
    "clip_no_rescale": {**CLIP, "do_rescale": False},
    "clip_no_normalize": {**CLIP, "do_normalize": False},
    "clip_other_factor": {**CLIP, "rescale_factor": 1 / 127.5},
    "dinov2": DINOV2,
}


def public_processor(config):
    """The public class that works on Pillow images without torchvision."""
    name = config["image_processor_type"]
    family = name.replace("ImageProcessor", "").lower()
    modules = [(f"transformers.models.{family}.image_processing_pil_{family}", name + "Pil"),
               (f"transformers.models.{family}.image_processing_{family}", name)]  # before 5.0
    for module, attribute in modules:
        try:
            return getattr(__import__(module, fromlist=[attribute]), attribute)(**config)
        except ImportError:
            continue
    pytest.skip("needs transformers with processors for Pillow")


def noise(width, height, mode="RGB"):
    """The hardest picture: every pixel differs from its neighbours."""
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def transparent_palette():
    image = noise(90, 70).quantize(16)
    image.info["transparency"] = 3
    return image


def sixteen_bit():
    values = np.random.default_rng(0).integers(0, 2000, (60, 80)).astype(np.uint16)
    return Image.fromarray(values)


SHAPES = {"wide": (700, 20), "tall": (20, 700), "tiny": (3, 2), "one_pixel": (1, 1),
          "odd": (97, 62), "exact": (224, 224), "almost": (223, 225)}
PICTURES = {
    **{name: noise(*size) for name, size in SHAPES.items()},
    **{mode: noise(90, 70, mode) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I")},
    "P_transparent": transparent_palette(),
    "16_bit": sixteen_bit(),
}


def largest_difference(config, image):
    theirs = public_processor(config)(image, return_tensors="np")["pixel_values"][0]
    ours = ImageProcessor.from_public(config)(load_image(image))
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    return np.abs(ours.numpy() - theirs).max()


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("config", CONFIGS)
def test_pixels_equal_the_public_processor(config, picture):
    pytest.importorskip("transformers")
    image = PICTURES[picture]
    if picture in ("LA", "RGBA", "P_transparent"):
        convert = pytest.importorskip("transformers.image_transforms").convert_to_rgb
        clear = np.array(convert(Image.new("RGBA", (1, 1), (0, 0, 0, 0))))
        if clear.max() == 0:
            pytest.skip("this transformers drops transparency; newer ones put white behind it")
    difference = largest_difference(CONFIGS[config], image)
    assert difference < CLOSE, f"largest difference {difference}"


@pytest.mark.parametrize("config", ["siglip", "clip", "dinov2"])
def test_pixels_equal_the_public_processor_on_real_photos(config):
    pytest.importorskip("transformers")
    photos = sorted(needed(shared_dir(), "data/coco128/images").glob("*.jpg"))[::6]
    worst = max(largest_difference(CONFIGS[config], Image.open(photo)) for photo in photos)
    print(f"{config}: largest difference over {len(photos)} photos {worst:.2e}")
    assert worst < CLOSE, f"largest difference {worst}"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_set_upright(orientation, tmp_path):
    corner = Image.new("RGB", (32, 16), "blue")
    corner.paste("red", (0, 0, 8, 8))  # upright: red at the top left
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}
    stored = corner.transpose(undo[orientation]) if orientation > 1 else corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    image = load_image(tmp_path / "photo.png")
    assert image.size == (32, 16)
    assert np.array_equal(np.array(image), np.array(corner)), f"orientation {orientation}"


def encoded(fmt):
    file = io.BytesIO()
    noise(120, 90).save(file, fmt)
    return file.getvalue()


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "BMP", "GIF", "TIFF"])
def test_truncated_files_raise_and_whole_ones_load(fmt, tmp_path):
    data = encoded(fmt)
    path = tmp_path / "picture"
    path.write_bytes(data)
    assert load_image(data).tobytes() == load_image(path).tobytes()  # bytes or path: no matter
    for keep in (0.99, 0.5, 0.1, 0):
        path.write_bytes(data[:int(len(data) * keep)])
        for source in (path, str(path), data[:int(len(data) * keep)]):
            with pytest.raises(OSError, match="cannot read"):
                load_image(source)


def test_a_missing_or_foreign_file_is_named(tmp_path):
    (tmp_path / "notes.jpg").write_text("no picture at all")
    for name in ("missing.jpg", "notes.jpg"):
        with pytest.raises(OSError, match=name):
            load_image(tmp_path / name)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_saved_processor_does_the_same(config, tmp_path):
    before = ImageProcessor.from_public(CONFIGS[config])
    before.save(tmp_path)
    after = ImageProcessor.from_directory(tmp_path)
    assert before == after
    image = load_image(PICTURES["odd"])
    assert torch.equal(before(image), after(image))
    assert before(image).shape[1:] == before.size
    theirs = public_processor(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    theirs = theirs(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(theirs - after(image).numpy()).max() < CLOSE


def test_older_spellings_mean_the_same():
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224,
           "do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3}
    fast = {"image_processor_type": "CLIPImageProcessorFast", "do_convert_rgb": None,
            "size": {"shortest_edge": 224, "height": None}}
    assert ImageProcessor.from_public(old) == ImageProcessor.from_public(fast)
    assert ImageProcessor.from_public(old) == ImageProcessor.from_public(CLIP)


@pytest.mark.parametrize("wrong", [
    {"image_processor_type": "Siglip2ImageProcessor"}, {},
    {**CLIP, "size": {"shortest_edge": 224, "longest_edge": 300}},
    {**CLIP, "do_center_crop": False},  # pictures of unlike sizes
])
def test_what_we_would_get_wrong_raises(wrong):
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        ImageProcessor.from_public(wrong)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        ImageProcessor.from_directory(tmp_path)
