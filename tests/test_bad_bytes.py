"""Claim: whatever byte of a file is changed, lost or added, reading it ends in a result of the
right form, in a skipped sample or in one error of the kinds that the commands turn into a message.

Each file is spoilt a few dozen times in ways drawn from a fixed seed. What can be noticed is:
a PNG has checksums, a public weight file has none, and a JPEG or a text may say something else.
"""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bad import spoilt, watched
from PIL import Image
from safetensors.torch import load_file
from tiny import make_pair

from dataset.images import ImageProcessor, load_image
from dataset.readers.formats import BadSample, open_data
from dataset.tokenizer import Tokenizer
from model.pretrained.load import load_language, load_vision
from model.pretrained.pickle_loader import load_plain

TOLD = (ValueError, FileNotFoundError)  # what the commands catch and print


def jsonl(folder) -> bytes:
    turns = [{"role": "user", "content": "<image>\nWho?"}, {"role": "assistant", "content": "é"}]
    line = json.dumps({"conversations": turns, "image": "a.png"}, ensure_ascii=False)
    return "\n".join([line] * 3).encode()


def array(folder) -> bytes:
    return b"[" + jsonl(folder).replace(b"\n", b",\n") + b"]"


def coco(folder) -> bytes:
    return json.dumps({"info": {}, "images": [{"id": 3, "file_name": "a.png"}],
                       "annotations": [{"image_id": 3, "caption": "A cat."}] * 2}).encode()


def parquet(compression):
    def make(folder) -> bytes:
        turns = [[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]] * 4
        file = io.BytesIO()
        pq.write_table(pa.table({"conversations": turns, "image": [picture("PNG")] * 4}), file,
                       row_group_size=2, compression=compression)
        return file.getvalue()
    return make


def picture(format) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


DATA = [("JSON Lines", jsonl, 120), ("a JSON array", array, 80), ("COCO", coco, 80),
        ("Parquet", parquet("snappy"), 160), ("Parquet, not compressed", parquet("none"), 80)]


@pytest.mark.parametrize("name, make, count", DATA, ids=[case[0] for case in DATA])
def test_data(tmp_path, name, make, count):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file, outcomes = tmp_path / "data", {"used": 0, "skipped": 0, "refused": 0}
    with watched() as seen:
        for content in spoilt(make(tmp_path), count, seed=1):
            file.write_bytes(content)
            try:
                data = open_data(file)
            except TOLD as error:
                assert str(file) in str(error)
                outcomes["refused"] += 1
                continue
            assert len(data) < 1000
            for i in range(len(data)):
                try:
                    sample = data[i]
                    [load_image(image) for image in sample.images]
                    assert all(isinstance(m.content, str) for m in sample.messages)
                    assert sum(m.images for m in sample.messages) == len(sample.images)
                    outcomes["used"] += 1
                except BadSample as bad:
                    assert bad.where.startswith(f"{file}:") and str(bad).isprintable()
                    outcomes["skipped"] += 1
                except OSError as error:  # of load_image: batching makes a BadSample of it
                    assert "cannot read" in str(error)
                    outcomes["skipped"] += 1
    print(name, outcomes)
    assert outcomes["used"] and outcomes["skipped"], outcomes
    assert not seen.started and not seen.opened_outside(tmp_path)


PICTURES = [("PNG", 120), ("JPEG", 120), ("GIF", 60), ("WEBP", 60), ("BMP", 40), ("TIFF", 80)]


@pytest.mark.parametrize("format, count", PICTURES, ids=[case[0] for case in PICTURES])
def test_pictures(format, count):
    whole = picture(format)
    expected, same, refused, other = load_image(whole).tobytes(), 0, 0, 0
    processor = ImageProcessor.from_public({"image_processor_type": "CLIPImageProcessor"})
    with watched() as seen:
        for content in spoilt(whole, count, seed=2):
            try:
                image = load_image(content)
                assert image.mode == "RGB" and min(image.size) > 0
                if image.tobytes() == expected:
                    same += 1
                else:
                    other += 1
                    assert processor(image).shape == (3, 224, 224)
            except OSError as error:
                assert "cannot read an image of" in str(error)
                refused += 1
            except ValueError as error:
                assert "would be resized to" in str(error)
                refused += 1
    print(format, f"{refused} refused, {same} the same, {other} another picture")
    assert refused and not seen.started
    assert format != "PNG" or not other, "its checksums tell"


# What a directory holds, how it is read, and the file that is spoilt.
FILES = [
    ("safetensors", "language", "model.safetensors", load_language, 80),
    ("config of a decoder", "language", "config.json", load_language, 120),
    ("config of a tower", "vision", "config.json", load_vision, 120),
    ("tokenizer", "language", "tokenizer.json", Tokenizer.from_directory, 80),
    ("settings of the processor", "vision", "preprocessor_config.json",
     ImageProcessor.from_directory, 80),
    ("pytorch_model.bin", "language", "pytorch_model.bin", load_language, 60),
    ("the same, from before 2020", "language", "old.bin", load_language, 40),
]


@pytest.mark.parametrize("name, part, file, load, count", FILES, ids=[case[0] for case in FILES])
def test_public_directories(tmp_path, name, part, file, load, count):
    make_pair(tmp_path)
    directory = tmp_path / part
    path, whole = directory / file, None
    if file.endswith(".bin"):
        held = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        path = directory / "pytorch_model.bin"
        torch.save(held, path, _use_new_zipfile_serialization=file != "old.bin")
    whole, fine, refused = path.read_bytes(), 0, 0
    edges = whole if len(whole) < 4000 else whole[:3000] + whole[-1000:]  # where the structure is
    middle = whole[3000:-1000] if len(whole) >= 4000 else b""
    for content in spoilt(edges, count, seed=3):
        path.unlink()  # never change a file that a model may still be mapped from
        path.write_bytes(content[:3000] + middle + content[3000:])
        with watched() as seen:
            try:
                load(directory)
                fine += 1
            except TOLD as error:
                assert str(directory) in str(error)
                refused += 1
        assert not seen.started
    print(name, f"{refused} refused, {fine} of the right form")
    assert refused


def test_a_training_state(tmp_path):
    path = tmp_path / "training_state.pt"
    torch.save({"step": 3, "moments": {0: torch.ones(5)}, "groups": [{"lr": 0.1}]}, path)
    refused = 0
    for content in spoilt(path.read_bytes(), 120, seed=4):
        path.unlink()
        path.write_bytes(content)
        with watched() as seen:
            try:
                load_plain(path)
            except TOLD as error:
                assert str(path) in str(error)
                refused += 1
        assert not seen.started
    assert refused > 60
