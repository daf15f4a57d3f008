"""Claims: every system that people built by hand runs by its preset, from files laid out as its
authors published them: both stages train, a picture is answered. Several data files are mixed by
weight in a run, and a run on them can be resumed."""

import json

import pytest

import train_pretrain
from dataset.batching import Batches
from dataset.chat import ChatTemplate
from dataset.images import ImageProcessor
from dataset.mixture import open_mixture
from dataset.tokenizer import Tokenizer
from model.checkpoint import newest_checkpoint, read_run
from tests.tiny import curve, make_world
from training.setup import matching

# ---------------------------------------------------------------- several data files


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny towers, and a second data file beside the first -> flags, the files."""
    directory = tmp_path_factory.mktemp("world")
    flags = make_world(directory, count=8)
    more = directory / "more.jsonl"
    more.write_text("".join(json.dumps({"conversations": [
        {"role": "user", "content": f"Number {i}?"}, {"role": "assistant", "content": f"{i}"}]})
        + "\n" for i in range(6)))
    at = flags.index("--data")
    return flags[:at] + flags[at + 2:], [flags[at + 1], str(more)]


def test_batches_take_the_other_half_in_the_next_epoch(world):
    flags, files = world
    language, vision = flags[1], flags[3]
    data = open_mixture([files[0], f"{files[1]}:0.5"])
    batches = Batches(data, ChatTemplate(Tokenizer.from_directory(language), 4),
                      ImageProcessor.from_directory(vision), 2, 128, seed=0)
    seen = [sorted(place for batch, bad in batches.epoch(epoch) for place in batch.where)
            for epoch in range(3)]
    assert [len(places) for places in seen] == [8 + 3] * 3
    halves = [{place for place in places if "more" in place} for places in seen]
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 6
    again = [place for batch, bad in batches.epoch(1) for place in batch.where]
    assert sorted(again) == seen[1], "an epoch is the same whenever it is asked for"


def test_a_run_on_mixed_files_is_told_and_resumed(world, tmp_path):
    flags, files = world
    data = ["--data", files[0], f"{files[1]}:0.5"]
    train_pretrain.main([*flags, *data, "--out", str(tmp_path / "whole")])
    told = read_run(newest_checkpoint(tmp_path / "whole"))["data"]
    assert told["samples"] == 11 and [about["weight"] for about in told["files"]] == [1.0, 0.5]
    assert [about["samples"] for about in told["files"]] == [8, 6]
    short = [*flags, "--steps", "3"]  # resumed in the middle: the rates are those of 6 steps
    train_pretrain.main([*short, *data, "--out", str(tmp_path / "two")])
    train_pretrain.main(["--resume", "--steps", "6", "--out", str(tmp_path / "two")])
    tokens = [[entry[-1] for entry in curve(tmp_path / run)] for run in ("whole", "two")]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 6
    with pytest.raises(SystemExit, match="was started with"):
        train_pretrain.main(["--resume", "--data", files[0], "--out", str(tmp_path / "two")])


def test_one_file_is_told_as_before_there_were_weights(world, tmp_path):
    flags, files = world
    train_pretrain.main([*flags, "--data", files[0], "--out", str(tmp_path / "out")])
    checkpoint = newest_checkpoint(tmp_path / "out")
    assert read_run(checkpoint)["data"].keys() == {"file", "bytes", "sha256", "samples"}
    # A run from before there were templates: it is resumed, and rendered as it was.
    for name, part in (("run.json", "settings"), ("config.json", None)):
        path = checkpoint / name
        content = json.loads(path.read_text())
        for fact in ("template", "image_token", "features"):
            (content[part] if part else content).pop(fact, None)
        path.write_text(json.dumps(content))
    train_pretrain.main(["--resume", "--steps", "8", "--out", str(tmp_path / "out")])
    config = json.loads((newest_checkpoint(tmp_path / "out") / "config.json").read_text())
    assert (config["template"], config["image_token"]) == ("qwen2", "<|image_pad|>")


def test_a_star_stands_for_all_the_parts_of_a_data_set(tmp_path):
    for name in ("train-1.parquet", "train-0.parquet", "test-0.parquet"):
        (tmp_path / name).touch()
    parts = [str(tmp_path / f"train-{number}.parquet") for number in (0, 1)]
    assert matching(str(tmp_path / "train-*.parquet")) == parts
    assert matching(str(tmp_path / "train-*.parquet:2")) == [f"{part}:2" for part in parts]
    assert matching("none-*.json:2") == ["none-*.json:2"]
