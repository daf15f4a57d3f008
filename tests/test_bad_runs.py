"""Claim: a whole run over data of which a little is bad ends with the right counts, one over data
of which much is bad stops, and a broken start is one line and no traceback."""

import io
import json
import os
import shutil

import pytest
import torch
from bad import Order, show, spoilt, talk
from PIL import Image
from tiny import make_world

import train_pretrain
from model.pretrained.checkpoint import newest_checkpoint
from model.pretrained.files import file_hashes
from model.pretrained.load import load_checkpoint

# Ten samples of 2,000 are half a percent: name, line, and what is said of it.
BAD = [
    ("cut", b'{"conversations": [{"role": "user"', "not JSON"),
    ("no UTF-8", b'{"conversations": "\xff"}', "utf-8"),
    ("a wrong role", json.dumps(talk(("robot", "x"))).encode(), "unknown role"),
    ("an empty answer", json.dumps(talk(("user", "u"), ("assistant", ""))).encode(), "is empty"),
    ("no answer", json.dumps(talk(("user", "u"))).encode(), "no supervised token"),
    ("out of the folder", json.dumps(show("../secret.png")).encode(), "leads out of the image"),
    ("a pipe", json.dumps(show("pipe.png")).encode(), "directory, pipe or device"),
    ("a cut picture", json.dumps(show("cut.jpg")).encode(), "cannot read"),
    ("a bomb", json.dumps(show("bomb.gif")).encode(), "exceeds limit"),
    ("50 pictures", json.dumps(talk(("user", "<image>" * 50), ("assistant", "x"),
                                    image=["white.png"] * 50)).encode(), "part of an image"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    return directory, make_world(directory)


def with_bad(world, tmp_path, good: int, bad: list) -> list[str]:
    """The world's flags with a data file of so many good lines and the bad ones among them."""
    directory, flags = world
    noise, bomb = io.BytesIO(), io.BytesIO()
    Image.effect_noise((64, 64), 80).save(noise, "JPEG")
    (directory / "cut.jpg").write_bytes(noise.getvalue()[:900])
    Image.new("L", (8, 8)).save(bomb, "GIF")
    (directory / "bomb.gif").write_bytes(bomb.getvalue()[:6] + b"\xff" * 4 + bomb.getvalue()[10:])
    if not (directory / "pipe.png").exists():
        os.mkfifo(directory / "pipe.png")
    sound = (directory / "data.jsonl").read_bytes().splitlines()
    lines = [sound[i % len(sound)] for i in range(good)]
    for number, line in enumerate(bad):
        lines.insert((number * 37 + 5) % len(lines), line)
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    return [*flags, "--data", str(tmp_path / "data.jsonl"), "--image_folder", str(directory),
            "--out", str(tmp_path / "out")]


def test_half_a_percent_of_bad_samples_is_skipped_and_counted(world, tmp_path, capfd):
    flags = with_bad(world, tmp_path, 1990, [line for _, line, _ in BAD])
    flags[flags.index("--steps"):flags.index("--steps") + 2] = ["--epochs", "1"]
    train_pretrain.main([*flags, "--batch_size", "100", "--save_steps", "100", "--num_workers",
                         "2"])
    told, errors = capfd.readouterr()
    assert "10 of 2,000 samples skipped as unusable" in told
    assert told.count("skipped ") >= 5 and "further skipped samples are only counted" in told
    assert "Traceback" not in told + errors
    assert newest_checkpoint(tmp_path / "out") is not None


def test_each_of_them_is_named_with_its_line(world, tmp_path, capfd):
    for start in (0, 5):  # five are listed
        chosen = BAD[start:start + 5]
        flags = with_bad(world, tmp_path, 40, [line for _, line, _ in chosen])
        train_pretrain.main([*flags, "--batch_size", "45", "--steps", "1", "--max_skip_ratio",
                             "0.5"])
        told = capfd.readouterr().out
        skipped = [line for line in told.splitlines() if line.startswith("skipped ")]
        assert len(skipped) == 5 and all("data.jsonl:" in line for line in skipped)
        for _, _, words in chosen:
            assert any(words in line for line in skipped), (words, skipped)


def test_more_than_max_bad_stops_the_run(world, tmp_path):
    flags = with_bad(world, tmp_path, 180, [line for _, line, _ in BAD] * 2)
    with pytest.raises(SystemExit,
                       match=r"\d+ of \d+ samples were unusable.*--max_skip_ratio 0.09"):
        train_pretrain.main([*flags, "--batch_size", "50", "--steps", "4", "--max_skip_ratio",
                             "0.09"])


# ---------------------------------------------------------------- a broken start

STARTS = [  # what is done to the world's copy, what the command says; nothing is run
    ("a cut tower", "vision/model.safetensors", lambda b: b[:999], "model.safetensors cannot be"),
    ("a wrong config", "language/config.json", lambda b: b.replace(b"32", b'"32"', 1), "expected"),
    ("a broken tokenizer", "language/tokenizer.json", lambda b: b[:999], "tokenizer.json cannot"),
    ("broken settings", "vision/preprocessor_config.json", lambda b: b[:30], "processor_config.js"),
    ("NaN in a tower", "language/model.safetensors", lambda b: b[:-4] + b"\xff" * 4, "not finite"),
]


@pytest.mark.parametrize("name, file, change, words", STARTS, ids=[case[0] for case in STARTS])
def test_a_broken_start_is_told_in_a_line(world, tmp_path, name, file, change, words):
    directory, flags = world
    shutil.copytree(directory, tmp_path / "copy", ignore=shutil.ignore_patterns("*.png"))
    path = tmp_path / "copy" / file
    path.write_bytes(change(path.read_bytes()))
    moved = [flag.replace(str(directory / "language"), str(tmp_path / "copy" / "language")).replace(
        str(directory / "vision"), str(tmp_path / "copy" / "vision")) for flag in flags]
    with pytest.raises(SystemExit, match=f"(?s)cannot build the model: .*{words}"):
        train_pretrain.main([*moved, "--out", str(tmp_path / "out")])


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    """A small one, with adapters; without what tells torn files, as the first ones were."""
    out = tmp_path_factory.mktemp("run") / "out"
    train_pretrain.main([*world[1], "--lora", "--steps", "1", "--out", str(out)])
    found = newest_checkpoint(out)
    (found / "manifest.json").unlink()
    return found


def test_a_training_state_that_would_run_code_stops_the_resumed_run(world, checkpoint, tmp_path):
    shutil.copytree(checkpoint.parent, tmp_path / "out")
    state = tmp_path / "out" / checkpoint.name / "training_state.pt"
    torch.save({"optimizer": Order(os.mkdir, str(tmp_path / "ran"))}, state)
    with pytest.raises(SystemExit, match="training_state.pt holds more than"):
        train_pretrain.main([*world[1], "--lora", "--steps", "2", "--resume", "--out",
                             str(tmp_path / "out")])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("right, wrong, told", [
    ('"gate_proj"', '"gate_pron"', "LoRA target 'gate_pron'"),
    ('"patches"', '"patchas"', "features is 'patchas'"),
    ('"mlp"', '"mlq"', "'mlq'"),
    ('"silu"', '"sila"', "sila")])
def test_what_a_checkpoint_cannot_be_is_told_with_its_file(checkpoint, tmp_path, right, wrong,
                                                           told):
    directory = tmp_path / "step_000001"
    shutil.copytree(checkpoint, directory)
    file = directory / "config.json"
    assert right in file.read_text()
    file.write_text(file.read_text().replace(right, wrong))
    with pytest.raises(ValueError, match=told) as error:
        load_checkpoint(directory)
    assert str(file) in str(error.value)


def test_a_byte_of_a_checkpoint_gives_an_error_or_a_model(checkpoint, tmp_path):
    """config.json and the head of model.safetensors, of a checkpoint without a manifest."""
    directory = tmp_path / "step_000001"
    shutil.copytree(checkpoint, directory)
    refused = {}
    for name, count in (("config.json", 50), ("model.safetensors", 20)):
        whole = (directory / name).read_bytes()
        head = whole[:3000]
        for content in spoilt(head, count, seed=5):
            (directory / name).unlink()
            (directory / name).write_bytes(content + whole[3000:])
            try:
                model = load_checkpoint(directory)
                assert all(p.isfinite().all() for p in model.parameters())
            except (ValueError, FileNotFoundError) as error:
                assert str(directory) in str(error) or "config.json" in str(error), error
                refused[name] = refused.get(name, 0) + 1
        (directory / name).write_bytes(whole)
    print(refused)
    assert min(refused.values()) > 10
    assert file_hashes(directory) == file_hashes(checkpoint)
