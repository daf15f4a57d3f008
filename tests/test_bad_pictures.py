"""Claim: a picture file is shown as the tables say, pixel for pixel, or refused in one sentence;
none of them crashes, hangs, fills the memory or starts a program."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from bad import watched
from PIL import Image

from dataset.batching import Batches
from dataset.chat import ChatTemplate
from dataset.images import MOST_PIXELS, ImageProcessor, load_image
from dataset.readers.formats import open_data
from dataset.tokenizer import Tokenizer

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def stored(image, format, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def plain(colour="red", size=(8, 8), mode="RGB"):
    return Image.new(mode, size, colour)


def png(width, height, depth, kind, *rows, extra=b"") -> bytes:
    """A PNG by hand, for what Pillow does not write. kind: 0 grey, 2 colour."""
    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    lines = b"".join(b"\0" + row for row in rows)  # 0: this line is stored as it is
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra
            + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def animated(format, **options) -> bytes:
    """Red, then blue."""
    return stored(plain(), format, save_all=True, append_images=[plain("blue")], **options)


def turned(format, orientation) -> bytes:
    """Two pixels, red and blue, and the note that a camera was held otherwise."""
    image = plain(size=(16, 8))
    image.paste("blue", (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored(image, format, exif=exif, **({"quality": 100} if format == "JPEG" else {}))


def paletted(transparent: bool) -> bytes:
    image = plain().quantize(4)
    image.paste(1, (4, 0, 8, 8))
    image.putpalette([255, 0, 0, 0, 0, 255])
    return stored(image, "PNG", **({"transparency": 1} if transparent else {}))


def shades(*values) -> bytes:
    return stored(Image.fromarray(np.array([values], np.uint16)), "PNG")


def halves(left, right):
    """Eight by eight, two colours side by side."""
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:, :4], picture[:, 4:] = left, right
    return picture


whole = stored(plain(), "PNG")
# ---------------------------------------------------------------- shown

SHOWN = [  # name, file, the pixels: one colour for all of them, or rows of colours
    ("one pixel", stored(plain(size=(1, 1)), "PNG"), RED),
    ("a BMP", stored(plain(), "BMP"), RED),
    ("a TIFF", stored(plain(), "TIFF"), RED),
    ("a PPM", stored(plain(), "PPM"), RED),
    ("a WebP without loss", stored(plain(), "WEBP", lossless=True), RED),
    ("1 bit", stored(plain(1, mode="1"), "PNG"), WHITE),
    ("grey", stored(plain(77, mode="L"), "PNG"), (77, 77, 77)),
    ("palette", paletted(False), halves(RED, BLUE)),
    ("palette, one entry transparent", paletted(True), halves(RED, WHITE)),
    ("grey, transparent", stored(plain((9, 0), mode="LA"), "PNG"), WHITE),
    ("half transparent", stored(plain((255, 0, 0, 128), mode="RGBA"), "PNG"), (255, 127, 127)),
    ("CMYK", stored(plain((0, 255, 255, 0), mode="CMYK"), "TIFF"), RED),
    ("CMYK with black", stored(plain((0, 0, 0, 255), mode="CMYK"), "TIFF"), BLACK),
    ("CMYK in a JPEG", stored(plain((0, 0, 0, 255), mode="CMYK"), "JPEG"), BLACK),
    ("16 bits of grey", shades(0, 9, 255, 256, 65535), [[(g,) * 3 for g in (0, 9, 255, 255, 255)]]),
    ("16 bits of colour", png(2, 1, 16, 2, bytes([171, 205, 18, 52, 0, 255] * 2)), (171, 18, 0)),
    ("2 bits of grey", png(4, 1, 2, 0, bytes([0b00011011])),
     [[(g, g, g) for g in (0, 85, 170, 255)]]),
    ("an animated GIF", animated("GIF"), RED),
    ("an animated WebP", animated("WEBP", lossless=True), RED),
    ("an animated PNG", animated("PNG"), RED),
    ("a TIFF of two pages", animated("TIFF"), RED),
    ("upside down", turned("PNG", 3), [[BLUE] * 8 + [RED] * 8] * 8),
    ("a quarter turned", turned("PNG", 6), [[RED] * 8] * 8 + [[BLUE] * 8] * 8),
    ("three quarters turned", turned("WEBP", 8), None),
    ("a turned JPEG", turned("JPEG", 6), None),
    ("no such turn", turned("PNG", 77), [[RED] * 8 + [BLUE] * 8] * 8),
    ("broken EXIF in a PNG", stored(plain(), "PNG", exif=b"Exif\0\0no EXIF"), RED),
    ("broken EXIF in a WebP", stored(plain(), "WEBP", lossless=True, exif=b"Exif\0\0\0"), RED),
    ("something behind the end", whole + b"<?php ?>", RED),
    ("only the first of two rows", png(1, 2, 8, 2, bytes(RED)), [[RED], [BLACK]]),  # so does Pillow
    ("300 times as long as wide", stored(plain(size=(1, 300)), "PNG"), RED),
]


@pytest.mark.parametrize("name, data, expected", SHOWN, ids=[case[0] for case in SHOWN])
def test_an_odd_picture_is_shown_as_the_table_says(tmp_path, name, data, expected):
    (tmp_path / "wrong extension.txt").write_bytes(data)
    with watched() as seen:
        from_bytes, from_file = load_image(data), load_image(tmp_path / "wrong extension.txt")
    assert from_bytes.mode == from_file.mode == "RGB" and not seen.started
    found = np.array(from_bytes)
    assert np.array_equal(found, np.array(from_file))
    if expected is None:  # with loss: red above blue after the turn, or below
        assert found.shape == (16, 8, 3)
        top, bottom = found[2:6].reshape(-1, 3).mean(0), found[10:14].reshape(-1, 3).mean(0)
        red, blue = (top, bottom) if name == "a turned JPEG" else (bottom, top)
        assert red[0] > 240 > 15 > red[2] and blue[2] > 240 > 15 > blue[0]
        return
    expected = np.broadcast_to(np.array(expected, np.uint8), found.shape)
    assert np.array_equal(found, expected), f"{found[0, 0]} and not {expected[0, 0]}"


# ---------------------------------------------------------------- refused

photo = stored(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")
gif_bomb = bytearray(stored(plain(), "GIF"))
gif_bomb[6:10] = b"\xff\xff\xff\xff"  # 65,535 x 65,535
no_width = bytearray(stored(plain(), "BMP"))
no_width[18:22] = bytes(4)
bad_sum = bytearray(whole)
bad_sum[-20] ^= 1  # in the pixels, whose checksum follows
round_tiff = bytearray(stored(plain(), "TIFF"))
round_tiff[4:8] = struct.pack("<I", 1 << 30)  # the directory lies behind the end
text_bomb = zlib.compress(bytes(100_000_000), 9)
CHUNK = struct.pack(">I", len(text_bomb) + 3) + b"zTXta\0\0" + text_bomb + struct.pack(
    ">I", zlib.crc32(b"zTXta\0\0" + text_bomb))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
EPS = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
       b"(%pipe%touch ran) (w) file closefile\n%%EOF\n")
UNKNOWN, SHORT, ANY = "no image format that Pillow knows", "truncated|broken|no image format", ""

REFUSED = [  # name, file, what the message says
    ("empty", b"", UNKNOWN),
    ("one byte", b"\x89", UNKNOWN),
    ("zeros", bytes(1000), UNKNOWN),
    ("words", b"no image at all", UNKNOWN),
    ("a web page", b"<!DOCTYPE html><html>404 Not Found</html>", UNKNOWN),
    ("JSON", b'{"error": "rate limit"}', UNKNOWN),
    ("a git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\n", UNKNOWN),
    ("a compressed picture", zlib.compress(whole), UNKNOWN),
    ("an SVG with a script", SVG, UNKNOWN),
    ("a PDF", b"%PDF-1.7\n1 0 obj\n", UNKNOWN),
    ("PostScript", EPS, UNKNOWN),
    ("a Windows metafile", b"\xd7\xcd\xc6\x9a" + bytes(100), UNKNOWN),
    ("a program", b"\x7fELF" + bytes(100), UNKNOWN),
    ("a pickle", b"\x80\x04cposix\nsystem\n(S'touch ran'\ntR.", UNKNOWN),
    ("the name of a PNG", b"\x89PNG\r\n\x1a\n", UNKNOWN + "|truncated"),
    ("half a PNG", photo[:0] + stored(Image.effect_noise((64, 64), 80), "PNG")[:2000], SHORT),
    ("half a JPEG", photo[:len(photo) // 2], SHORT),
    ("half a GIF", stored(Image.effect_noise((64, 64), 80), "GIF")[:2000], SHORT),
    ("half a WebP", stored(Image.effect_noise((64, 64), 80), "WEBP")[:900], ANY),
    ("half a BMP", stored(plain(), "BMP")[:100], SHORT),
    ("half a TIFF", stored(plain(size=(64, 64)), "TIFF")[:6000], ANY),
    ("half a TIFF, compressed", stored(Image.effect_noise((64, 64), 80), "TIFF",
                                       compression="tiff_lzw")[:2000], ANY),
    ("a JPEG's head alone", photo[:300], ANY),
    ("a wrong checksum", bytes(bad_sum), ANY),
    ("no pixels", png(8, 8, 8, 2), SHORT),
    ("no width", png(0, 8, 8, 2), UNKNOWN),
    ("no width in a BMP", bytes(no_width), ANY),
    ("a TIFF without a directory", bytes(round_tiff), ANY),
    ("20,000 x 20,000", png(20_000, 20_000, 8, 2, bytes(99)), r"400000000 pixels\) exceeds"),
    ("10,000 x 10,000", png(10_000, 10_000, 8, 2, bytes(99)), r"100000000 pixels\) exceeds"),
    ("2,147,483,647 x 2,147,483,647", png(2**31 - 1, 2**31 - 1, 8, 2), "pixels.* exceeds limit of"),
    ("a GIF of 65,535 x 65,535", bytes(gif_bomb), "exceeds limit of"),
    ("100 MB of text in 100 KB", png(8, 8, 8, 2, *[bytes(24)] * 8, extra=CHUNK), "too large"),
]


@pytest.mark.parametrize("name, data, words", REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_no_picture_is_refused_in_one_sentence(tmp_path, monkeypatch, name, data, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for source, called in ((data, f"an image of {len(data)} bytes"), (path, str(path))):
        with watched() as seen, pytest.raises(OSError) as caught:
            load_image(source)
        caught.match(f"cannot read .*({words})")
        assert called in str(caught.value) and len(str(caught.value)) < 1000
        assert not seen.started and not seen.opened_outside(tmp_path)
    assert os.listdir() == ["picture.png"]


NO_FILES = ["directory", "pipe", "round", "nothing", "/dev/zero", "a\0b"]


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_never_opened(tmp_path, name):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "round").symlink_to("round")
    with watched() as seen, pytest.raises(OSError, match="there is no such file"):
        load_image(tmp_path / name)
    assert not seen


def test_the_largest_picture_that_is_read_is_pillows_own_limit():
    assert MOST_PIXELS == Image.MAX_IMAGE_PIXELS


# ---------------------------------------------------------------- the settings of the processor

CLIP = {"image_processor_type": "CLIPImageProcessor"}
SETTINGS = [  # name, what preprocessor_config.json holds, what the message says
    ("not JSON", "{", "Expecting property name"),
    ("empty", "", "Expecting value"),
    ("a list", "[]", "holds no object"),
    ("100,000 lists deep", "[" * 100_000, "recursion"),
    ("no class", {}, "an unnamed class"),
    ("the class is a number", {"image_processor_type": 7}, "is for '7'; supported are"),
    ("size is a text", {**CLIP, "size": "224"}, "has the size {'size': '224'}; expected a number"),
    ("size is negative", {**CLIP, "size": -1}, "has size = -1; expected 1 to 4096 pixels"),
    ("size is zero", {**CLIP, "size": {"shortest_edge": 0}}, "has size = 0; expected 1 to 4096"),
    ("size is a billion", {**CLIP, "size": 10**9}, "has size = 1000000000; expected 1 to 4096"),
    ("size is a fraction", {**CLIP, "size": {"height": 1.5, "width": 2}}, r"size = \(1.5, 2\)"),
    ("crop is a billion", {**CLIP, "crop_size": 10**9}, "has crop_size = .*; expected 1 to 4096"),
    ("no such filter", {**CLIP, "resample": 99}, "has resample = 99; expected a filter of"),
    ("filter by name", {**CLIP, "resample": "bicubic"}, "has resample = 'bicubic'"),
    ("rescale is a text", {**CLIP, "rescale_factor": "1/255"}, "rescale_factor = '1/255'; exp"),
    ("rescale is zero", {**CLIP, "rescale_factor": 0}, "rescale_factor = 0; expected a numb"),
    ("mean of two", {**CLIP, "image_mean": [0.5, 0.5]}, "has image_mean = .*; expected three numb"),
    ("mean is a number", {**CLIP, "image_mean": 0.5}, "has image_mean = .*; expected three num"),
    ("mean is NaN", '{"image_processor_type": "CLIPImageProcessor", "image_mean": [NaN, 0, 0]}',
     r"has image_mean = \(nan, 0, 0\)"),
    ("std of zero", {**CLIP, "image_std": [0.5, 0, 0.5]}, "image_std = .* three numbers above 0"),
    ("unlike sizes", {**CLIP, "do_center_crop": False}, "cannot share a batch"),
]


@pytest.mark.parametrize("name, content, words", SETTINGS, ids=[case[0] for case in SETTINGS])
def test_settings_that_no_picture_fits_are_refused_by_file(tmp_path, name, content, words):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=words) as caught:
        ImageProcessor.from_directory(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")


# ---------------------------------------------------------------- on the way to a batch


def test_refused_pictures_are_skipped_with_their_line_and_the_others_trained_on(
        tmp_path, tiny_tokenizer_dir):
    """A hair's breadth would be enlarged to 224 x 20,160,000; in one batch with a sound one."""
    files = {"good.png": whole, "cut.jpg": photo[:900], "bomb.png": REFUSED[-5][1],
             "thin.png": stored(plain(size=(1, 90_000)), "PNG")}
    lines = []
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        lines.append(json.dumps({"image": name, "caption": "A cat."}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), image_tokens=4)
    batches = Batches(open_data(tmp_path / "data.jsonl"), template,
                      ImageProcessor.from_public(CLIP), 4, 256, seed=0)
    (batch, bad), = batches.epoch(0)
    assert batch.where == [f"{tmp_path}/data.jsonl:1"] and batch.pixels.shape == (1, 3, 224, 224)
    told = {b.where.rsplit(":")[-1]: b.reason for b in bad}
    assert "truncated" in told["2"] and "exceeds limit" in told["3"]
    assert "1 x 90000 would be resized to 224 x 20160000, more than 89,478,485 pixels" in told["4"]
