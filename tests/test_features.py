"""Claims: a picture is looked at once in a batch, and with --feature_cache once in a run; neither
changes what is learned; whatever happens to the files on disk, only time is lost."""

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset.images
import train_pretrain
import train_sft
from dataset.batching import TokenizedSample
from dataset.images import ImageProcessor
from dataset.readers.formats import Sample
from extras.fast.feature_cache import (
    CachedBatches,
    FeatureCache,
    ImageInput,
    tower_fingerprint,
)
from model.pretrained.checkpoint import newest_checkpoint
from tests.test_training import gradients, prepare
from tests.tiny import COLOURS, make_world, metrics
from train_pretrain import backward
from training.distributed import start_distributed

NUMBERS = ("step", "loss", "grad_norm", "supervised_tokens")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 rows, 16 of them with one of 4 pictures; two epochs in batches of 4."""
    return [*make_world(tmp_path_factory.mktemp("world")), "--batch_size", "4", "--steps", "12"]


def losses(world, out, *flags):
    train_pretrain.main([*world, "--out", str(out), *flags])
    return [[line[name] for name in NUMBERS] for line in metrics(out)]


def close(one, other, within=1e-6):
    """Relative: these losses are near 28, where neighbouring float32 numbers are 2e-6 apart."""
    worst = max(abs(a - b) / max(1, abs(a)) for x, y in zip(one, other, strict=True)
                for a, b in zip(x, y))
    assert worst <= within, f"largest difference {worst}"


def files(directory):
    return sorted(path for path in Path(directory).glob("??/*"))


# ---------------------------------------------------------------- once in a batch


@pytest.mark.parametrize("trained", [[], ["--train_vision", "--train_language", "all"]])
def test_a_picture_that_comes_twice_is_looked_at_once(world, trained):
    """Loss and gradients are those of looking each time."""
    settings, parts, batches = prepare([*world, "--batch_size", "16", *trained])
    batch = next(b for b, _ in batches.epoch(0) if b.order is not None and len(b.order) > 4)
    assert len(batch.pixels) == len(COLOURS) < len(batch.order)
    seen = []
    hook = parts.model.vision.register_forward_hook(lambda _, x, out: seen.append(len(out)))
    told = []
    with start_distributed() as ranks:
        for pixels, order in ((batch.pixels, batch.order), (batch.pixels[batch.order], None)):
            batch.pixels, batch.order = pixels, order
            parts.model.zero_grad()
            loss = backward(parts.model, batch, batch.supervised, settings, ranks)
            told.append((float(loss), gradients(parts.model)))
    hook.remove()
    assert seen == [len(COLOURS), len(pixels)]
    assert abs(told[0][0] - told[1][0]) < 1e-6
    difference = (told[0][1] - told[1][1]).abs().max().item()
    assert difference < 1e-6, f"largest gradient difference {difference}"


def test_order_counts_on_from_new_pictures_to_known_ones():
    a, b = ImageInput(torch.zeros(3, 2, 2), key="a"), ImageInput(torch.ones(3, 2, 2), key="b")
    c, d = ImageInput(features=torch.zeros(4, 5)), ImageInput(features=torch.ones(4, 5))
    rows = [TokenizedSample([1, 2], [False, True], Sample((), (), "here"), pictures)
            for pictures in ((c, a), (), (b, a, d, c))]
    batch = CachedBatches.collate(rows)
    assert batch.order.tolist() == [2, 0, 1, 0, 3, 2] and batch.keys == ("a", "b")
    assert batch.pixels.mean((1, 2, 3)).tolist() == [0, 1]
    assert batch.features.mean((1, 2)).tolist() == [0, 1]
    moved = batch.to("cpu")
    assert torch.equal(moved.order, batch.order) and moved.keys == batch.keys


# ---------------------------------------------------------------- once in a run


def nobody_opens(*_):
    raise AssertionError("a picture was opened although its features are known")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_cache_changes_nothing(world, tmp_path, monkeypatch, capsys, dtype):
    flags, cache = ["--dtype", dtype], tmp_path / "cache"
    plain = losses(world, tmp_path / "plain", *flags)
    flags += ["--feature_cache", str(cache)]
    capsys.readouterr()
    close(plain, losses(world, tmp_path / "first", *flags))
    told = capsys.readouterr().out
    assert len(files(cache)) == len(COLOURS) and f"in {cache}, " in told and "not kept" not in told
    # A worker reads ahead of the loop that writes, so it may miss what is there a moment later.
    with monkeypatch.context() as patch:
        patch.setattr(dataset.images, "load_image", nobody_opens)
        close(plain, losses(world, tmp_path / "second", *flags, "--num_workers", "1"))
    assert "0 computed" in capsys.readouterr().out
    # Stage two with adapters, from the first stage's checkpoint: the tower is still the same.
    shutil.rmtree(tmp_path / "second")
    stage_two = [*world, "--dtype", dtype, "--lora", "--model", str(tmp_path / "first"),
                 "--eval_steps", "6", "--eval_samples", "6"]
    with monkeypatch.context() as patch:
        patch.setattr(dataset.images, "load_image", nobody_opens)
        train_sft.main([*stage_two, *flags, "--out", str(tmp_path / "second")])
    train_sft.main([*stage_two, "--out", str(tmp_path / "plain_second")])
    both = [[[line[name] for name in NUMBERS] for line in metrics(tmp_path / out)]
            for out in ("second", "plain_second")]
    close(*both)
    evaluated = [json.loads(line) for out in ("second", "plain_second") for line in
                 (tmp_path / out / "evaluations.jsonl").read_text().splitlines()]
    for one, other in zip(evaluated[:2], evaluated[2:], strict=True):
        assert one["eval_loss_shuffled_images"] == pytest.approx(other["eval_loss_shuffled_images"])
        assert one["eval_loss"] == pytest.approx(other["eval_loss"])


def test_torn_files_are_noticed_and_made_anew(world, tmp_path, capfd):
    cache = tmp_path / "cache"
    flags = ["--feature_cache", str(cache)]
    plain = losses(world, tmp_path / "plain", *flags)
    whole = {file: file.read_bytes() for file in files(cache)}
    cut, zeros, empty, flipped = whole
    cut.write_bytes(whole[cut][:-10])
    zeros.write_bytes(bytes(len(whole[zeros])))
    empty.write_bytes(b"")
    flipped.write_bytes(whole[flipped][:-1] + bytes([whole[flipped][-1] ^ 1]))
    close(plain, losses(world, tmp_path / "again", *flags))
    told = capfd.readouterr().err
    assert all(f"{file} is torn" in told for file in whole)
    assert {file: file.read_bytes() for file in files(cache)} == whole


def test_it_may_be_deleted_at_any_time(world, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    plain = losses(world, tmp_path / "plain")
    write = FeatureCache.write

    def and_delete(self, key, features):
        write(self, key, features)
        shutil.rmtree(cache)

    monkeypatch.setattr(FeatureCache, "write", and_delete)
    close(plain, losses(world, tmp_path / "deleted", "--feature_cache", str(cache)))
    assert not files(cache)


def test_it_grows_no_larger_than_it_may(world, tmp_path, capsys):
    cache = tmp_path / "cache"
    plain = losses(world, tmp_path / "plain", "--feature_cache", str(cache))
    one = files(cache)[0].stat().st_size
    shutil.rmtree(cache)
    limit = 2.5 * one
    flags = ["--feature_cache", str(cache), "--feature_cache_gb", str(limit / 1e9)]
    capsys.readouterr()
    close(plain, losses(world, tmp_path / "small", *flags))
    assert len(files(cache)) == 2 and sum(f.stat().st_size for f in files(cache)) <= limit
    assert "were not kept, --feature_cache_gb" in capsys.readouterr().out
    close(plain, losses(world, tmp_path / "again", *flags))
    assert len(files(cache)) == 2, "what is there counts"


def test_a_full_disk_does_not_end_the_run(world, tmp_path, capfd):
    (tmp_path / "cache").write_text("a file where the directory should be")
    plain = losses(world, tmp_path / "plain")
    close(plain, losses(world, tmp_path / "out", "--feature_cache", str(tmp_path / "cache")))
    assert capfd.readouterr().err.count("cannot keep features") == 1


def test_what_a_killed_run_left_is_deleted_later(tmp_path):
    old, new = (tmp_path / "ab" / f"{name}.1.partial" for name in ("old", "new"))
    old.parent.mkdir()
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert FeatureCache(tmp_path, "", 100).room == 96
    assert not old.exists() and new.exists()


def write_and_read(directory, number):
    """One of several processes at once -> features that were found, of the one picture."""
    kept, found = FeatureCache(directory, "tower", 1e6), []
    key = kept.key(b"picture")
    for _ in range(50):
        found.append(kept.read(key))
        kept.write(key, torch.full((16, 24), 7.0))
    return [features.tolist() for features in found if features is not None]


def test_processes_that_share_it_never_see_half_a_file(tmp_path, capfd):
    with ProcessPoolExecutor(3) as pool:
        found = sum(pool.map(partial(write_and_read, tmp_path), range(3)), [])
    assert len(found) > 100 and all(each == [[7.0] * 24] * 16 for each in found)
    assert len(files(tmp_path)) == 1 and "torn" not in capfd.readouterr().err


# ---------------------------------------------------------------- whose features


def test_a_key_is_the_content_and_who_looks(tmp_path):
    image = Image.new("RGB", (4, 4), "red")
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content)
    files, other = FeatureCache(tmp_path, "tower", 0), FeatureCache(tmp_path, "other tower", 0)
    assert files.key(str(tmp_path / "a.png")) == files.key(tmp_path / "b.png") == files.key(content)
    assert files.key(content) != other.key(content)
    drawn = [files.key(Image.new("RGB", size, colour)) for size, colour in
             (((4, 4), "red"), ((2, 8), "red"), ((4, 4), "blue"))]
    assert drawn[0] == files.key(image) and len(set(drawn)) == 3
    (tmp_path / "a.png").write_bytes(content[:-1])
    assert files.key(tmp_path / "a.png") != files.key(content), "a changed file is another picture"


def test_another_tower_or_processor_is_another_tower_fingerprint(world):
    _, parts, _ = prepare(world)
    vision, processor = parts.model.vision, parts.processor
    told = [tower_fingerprint(vision, processor, "fp32"),
            tower_fingerprint(vision, processor, "bf16"),
            tower_fingerprint(vision, replace(processor, fast=True), "fp32"),
            tower_fingerprint(vision, replace(processor, mean=(0.5, 0.5, 0.4)), "fp32")]
    with torch.no_grad():
        next(vision.parameters()).view(-1)[0] += 1e-3
    told.append(tower_fingerprint(vision, processor, "fp32"))
    assert len(set(told)) == 5


def test_drawn_scenes_are_kept_too(tmp_path):
    flags = ["--steps", "2", "--batch_size", "2", "--num_workers", "0", "--save_steps", "2",
             "--dtype", "fp32", "--overfit", "2"]
    told = [losses(flags, tmp_path / name, *cache) for name, cache in (
        ("plain", []), ("cached", ["--feature_cache", str(tmp_path / "cache")]))]
    close(*told)
    assert len(files(tmp_path / "cache")) == 2


@pytest.mark.parametrize("flags, reason", [
    (["--train_vision"], "--train_vision the tower learns"),
    (["--feature_cache_gb", "-1"], "--feature_cache_gb -1.0: expected a number above 0")])
def test_where_it_would_lie_it_is_refused(world, tmp_path, flags, reason):
    with pytest.raises(SystemExit, match=reason):
        losses(world, tmp_path / "out", "--feature_cache", str(tmp_path / "cache"), *flags)
    assert not (tmp_path / "out").exists()


def test_a_broken_picture_is_told_as_without_the_cache(world, tmp_path):
    """Its file cannot be read at all, or not as a picture."""
    lines = Path(world[5]).read_text().splitlines()
    broken = tmp_path / "broken.png"
    broken.write_bytes((Path(world[5]).parent / "red.png").read_bytes()[:40])
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([line.replace('"red.png"', f'"{broken.name}"') for line in lines]))
    for name in ("green", "blue", "white"):
        shutil.copy(Path(world[5]).parent / f"{name}.png", tmp_path)
    told = []
    for cache in ([], ["--feature_cache", str(tmp_path / "cache")]):
        out = tmp_path / f"out{len(told)}"
        losses(world, out, "--data", str(data), "--max_skip_ratio", "1", *cache)
        told.append(json.loads((out / "summary.json").read_text())["skipped_why"])
    assert told[0] == told[1] and sum(told[0].values()) > 0
    assert len(files(tmp_path / "cache")) == 3


def test_fast_images_reach_the_pixels_and_the_checkpoint(tmp_path):
    world = make_world(tmp_path / "world")
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "world" / "red.png")
    plain, fast = losses(world, tmp_path / "a"), losses(world, tmp_path / "b",
                                                        "--approximate_resize")
    kept = json.loads((newest_checkpoint(tmp_path / "b") / "preprocessor_config.json").read_text())
    assert plain != fast and kept["approximate_resize"] is True
    train_sft.main([*world, "--model", str(tmp_path / "b"), "--out", str(tmp_path / "c")])
    assert ImageProcessor.from_directory(newest_checkpoint(tmp_path / "c")).fast
    train_sft.main([*world, "--model", str(tmp_path / "b"), "--out", str(tmp_path / "d"),
                    "--no-approximate_resize"])
    assert not ImageProcessor.from_directory(newest_checkpoint(tmp_path / "d")).fast
