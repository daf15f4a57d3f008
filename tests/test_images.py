"""Claim: pictures reach a tower exactly as the public processors would hand them over;
--approximate_resize changes them by a bounded amount, and is kept."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
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
    (tmp_path / "notes.jpg").write_text("no image at all")
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
    {**CLIP, "do_center_crop": False},  # images of unlike sizes
])
def test_what_we_would_get_wrong_raises(wrong):
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        ImageProcessor.from_public(wrong)


@pytest.mark.parametrize("family", ["Siglip", "CLIP"])
def test_a_processor_as_transformers_5_saves_it_is_read(family, tmp_path, tiny_tokenizer_dir):
    """The image processor lies in processor_config.json alone."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_tokenizer_dir / "tokenizer.json"))
    config = {**(SIGLIP if family == "Siglip" else CLIP), "image_mean": [0.1, 0.2, 0.3]}
    theirs = public_processor(config)
    getattr(transformers, f"{family}Processor")(theirs, tokenizer).save_pretrained(tmp_path)
    if (tmp_path / "preprocessor_config.json").exists():
        pytest.skip("transformers before 5 writes a file of its own")
    ours = ImageProcessor.from_directory(tmp_path)
    assert ours == ImageProcessor.from_public(config)
    image = load_image(PICTURES["odd"])
    expected = theirs(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(expected - ours(image).numpy()).max() < CLOSE
    # Where both lie, transformers takes this one; and the other where this one holds none.
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CONFIGS["clip_numbers"]))
    assert ImageProcessor.from_directory(tmp_path) == ours
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert ImageProcessor.from_directory(tmp_path).resize == 50


@pytest.mark.parametrize("content, words", [
    ('{"processor_class": "SiglipProcessor"}', "preprocessor_config.json is missing, and so is p"),
    ("{", "processor_config.json: Expecting"), ("7", "processor_config.json: "),
    ("[]", "preprocessor_config.json is missing, and so is processor_config.json with an"),
    ('{"image_processor": null}', "processor_config.json: .*holds no object"),
    ('{"image_processor": {"image_processor_type": "X"}}', "processor_config.json: .*is for 'X'")])
def test_a_processor_config_without_the_steps_is_refused(content, words, tmp_path):
    (tmp_path / "processor_config.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        ImageProcessor.from_directory(tmp_path)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        ImageProcessor.from_directory(tmp_path)


# ---------------------------------------------------------------- fast


def photo(width, height, orientation=1):
    """A JPEG of soft shapes with a little noise."""
    rng = np.random.default_rng(width)
    soft = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC)
    noisy = (np.asarray(soft) + rng.normal(0, 4, (height, width, 3))).clip(0, 255)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(noisy.astype(np.uint8)).save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


def steps_apart(config, source):
    """Fast against exact: differences in steps of an 8-bit channel, (3,H,W)."""
    exact = ImageProcessor.from_public(config)
    fast = replace(exact, fast=True)
    both = [processor(load_image(source, processor.draft)) for processor in (exact, fast)]
    assert both[0].shape == both[1].shape and both[1].dtype == torch.float32
    std = torch.tensor(exact.std)[:, None, None]
    return ((both[0] - both[1]) * std * 255).abs()


@pytest.mark.parametrize("config", ["siglip", "siglip_oblong", "siglip2_bilinear", "clip",
                                    "clip_crop_only", "dinov2"])
def test_fast_without_a_draft_is_a_step_or_two_apart(config):
    """Pure noise: each of the two passes, along rows and columns, rounds in its own way."""
    for name in ("odd", "exact", "wide", "RGBA"):
        apart = steps_apart(CONFIGS[config], PICTURES[name])
        assert apart.max() < 2.01 and apart.mean() < 0.02, f"{name}: {apart.max()} steps of 255"


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1920, 1080), (300, 300)])
@pytest.mark.parametrize("config", ["siglip", "siglip_oblong", "clip", "dinov2"])
def test_fast_photos_are_near(config, size):
    apart = steps_apart(CONFIGS[config], photo(*size))
    print(f"{config} {size}: mean {apart.mean():.2f}, worst {apart.max():.0f} steps of 255")
    assert apart.mean() < 1.5 and apart.max() < 24


def test_real_photos_stay_near_when_fast():
    """Of 320 pixels at the most: the small tower drafts them."""
    photos = sorted(needed(shared_dir(), "data/coco128/images").glob("*.jpg"))[::6]
    small = {**SIGLIP, "size": {"height": 96, "width": 96}}
    means = [steps_apart(small, file).mean().item() for file in photos]
    print(f"means over {len(photos)} photos: {np.mean(means):.2f}, worst {max(means):.2f} of 255")
    assert np.mean(means) < 3 and max(means) < 8


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_draft_is_smaller_and_never_too_small(orientation):
    for width, height in ((640, 480), (447, 2000), (448, 449), (4000, 3000), (100, 80)):
        image = load_image(photo(width, height, orientation), 224)
        stored = image.size if orientation == 1 else image.size[::-1]
        shorter = min(width, height)
        halvings = [n for n in (8, 4, 2, 1) if shorter // n >= 224 or n == 1][0]
        assert stored == (-(-width // halvings), -(-height // halvings))
    assert load_image(photo(640, 480)).size == (640, 480), "whole, unless a draft is asked for"


def test_fast_is_kept_and_others_are_exact(tmp_path):
    exact = ImageProcessor.from_public(CLIP)
    assert not exact.fast and exact.draft is None
    fast = replace(exact, fast=True)
    fast.save(tmp_path)
    assert ImageProcessor.from_directory(tmp_path) == fast and fast.draft == 224
    public_processor(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    exact.save(tmp_path)
    assert "fast" not in (tmp_path / "preprocessor_config.json").read_text()
    assert replace(ImageProcessor.from_public(CONFIGS["clip_crop_only"]), fast=True).draft is None
