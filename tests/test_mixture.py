"""Claim: a weight is how often each sample of a file comes in an epoch, fairly and repeatably."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from test_formats import (  # noqa: F401
    CAPTIONS,
    content,
    folder,
    write_challenger,
    write_lines,
    write_parquet,
)

from dataset.readers.formats import BadSample, open_data
from dataset.readers.mixture import open_mixture, split_source
from training.data import data_hash, mixture_hash


def write(path, count, name):
    return write_lines(path, *[{"messages": [{"role": "user", "content": f"{name}{i}"}]}
                               for i in range(count)])


def said(data):
    return [sample.messages[0].content for sample in data]


def test_weights_are_read_and_windows_paths_stay_whole(tmp_path):
    for source, expected in {
            "a.json": ("a.json", 1), "a.json:2": ("a.json", 2), "a.json:0.5": ("a.json", 0.5),
            "a:b/c.json:.25": ("a:b/c.json", 0.25), "C:\\data\\x.json": ("C:\\data\\x.json", 1),
            "C:\\data\\x.json:3": ("C:\\data\\x.json", 3), "C:/x.parquet:1": ("C:/x.parquet", 1),
    }.items():
        assert split_source(source) == expected
    for source in ("a.json:0", "a.json:-1", "a.json:0.0"):
        with pytest.raises(ValueError, match=f"{source}: the weight is .*; expected more than 0"):
            split_source(source)
    with pytest.raises(FileNotFoundError, match="a.json:x"):
        open_mixture(["a.json:x"])
    with pytest.raises(ValueError, match="expected FILE or FILE:WEIGHT"):
        open_mixture([])


def test_one_file_alone_is_that_file(tmp_path):
    file = write(tmp_path / "a", 7, "a")
    mixed, alone = open_mixture([str(file)]), open_data(file)
    assert len(mixed) == 7
    assert [(s.messages, s.where) for s in mixed] == [(s.messages, s.where) for s in alone]
    assert mixed[-1].where == f"{file}:7"


def test_whole_weights_repeat_and_fractions_draw(tmp_path):
    a, b = write(tmp_path / "a", 10, "a"), write(tmp_path / "b", 40, "b")
    mixed = open_mixture([f"{a}:2", f"{b}:0.25"], seed=3)
    assert len(mixed) == 30
    counts = Counter(said(mixed))
    assert all(counts[f"a{i}"] == 2 for i in range(10))
    drawn = [text for text in counts if text[0] == "b"]
    assert len(drawn) == 10 and drawn == sorted(drawn, key=lambda t: int(t[1:]))  # front to back
    assert drawn != [f"b{i}" for i in range(10)]  # a draw, not the file's beginning
    assert said(open_mixture([f"{a}:2", f"{b}:0.25"], seed=3)) == said(mixed)
    assert said(pickle.loads(pickle.dumps(mixed))) == said(mixed)
    assert said(open_mixture([f"{a}:2", f"{b}:0.25"], seed=4)) != said(mixed)
    assert len(open_mixture([f"{a}:0.001"])) == 1


@pytest.mark.parametrize("weight,epochs", [(0.25, 4), (1.5, 2), (0.3, 10), (2, 1)])
def test_what_an_epoch_leaves_out_comes_in_the_next(tmp_path, weight, epochs):
    file = write(tmp_path / "a", 20, "a")
    mixed = open_mixture([f"{file}:{weight}"])
    counts = Counter()
    for epoch in range(epochs):
        at = mixed.at_epoch(epoch)
        assert len(at) == len(mixed) == weight * 20
        counts.update(said(at))
    assert set(counts.values()) == {weight * epochs} and len(counts) == 20
    assert said(mixed) == said(mixed.at_epoch(0))  # asking for another epoch moved nothing


@pytest.mark.parametrize("weights", [("1", "1"), ("1.5", "0.3"), ("2", "1")])
def test_each_sample_of_an_epoch_tells_its_row(tmp_path, weights):
    """Whatever an epoch takes of the files: the lengths of the rows are counted once."""
    records = [{"messages": [{"role": "user", "content": "x" * i}]} for i in range(30)]
    write_lines(tmp_path / "a", *records[:20])
    (tmp_path / "b").write_text(json.dumps(records[20:], indent=1))
    sources = [f"{tmp_path / name}:{weight}" for name, weight in zip("ab", weights)]
    rows = open_mixture(sources).everything()
    assert len(rows) == 30
    seen = Counter()
    for epoch in range(3):
        data = open_mixture(sources).at_epoch(epoch)
        numbers = np.random.default_rng(0).permutation(len(data)).astype(np.uint8)
        found, passes = data.locate(numbers)
        seen.update(zip(found.tolist(), passes.tolist()))
        assert [rows[row].where for row in found] == [data[int(i)].where for i in numbers]
    assert set(seen.values()) == {1}, "in each pass a row comes once"
    apart = open_mixture(sources, apart=6)
    assert len(apart.everything()) == 24
    assert apart.everything().locate(np.arange(24))[0].tolist() == list(range(24))
    assert apart.set_apart().locate(np.arange(6))[0].tolist() == list(range(6))


def test_captions_go_round_with_the_passes(folder):  # noqa: F811
    write_challenger(folder, 6)
    five = {caption.strip() for caption in CAPTIONS}
    mixed = open_mixture([str(folder / "ai.json")])
    epochs = [[s.messages[1].content for s in mixed.at_epoch(e)] for e in range(5)]
    assert all(set(drawn) == five for drawn in zip(*epochs))
    at_once = open_mixture([f"{folder / 'ai.json'}:5"])
    assert Counter(s.messages[1].content for s in at_once) == dict.fromkeys(five, 6)
    assert [content(at_once[i]) for i in range(30)] == [content(at_once[i]) for i in range(30)]


def test_broken_rows_keep_their_own_files_name(tmp_path):
    a, b = write(tmp_path / "a", 3, "a"), write_lines(tmp_path / "b", {"messages": []})
    mixed = open_mixture([str(a), f"{b}:2"])
    for i in (3, 4):
        with pytest.raises(BadSample, match=f"{b}:1: 'messages' must be"):
            mixed[i]
    with pytest.raises(IndexError):
        mixed[5]


def test_pictures_are_found_and_empty_files_add_nothing(folder):  # noqa: F811
    (folder / "sub").mkdir()
    write_lines(folder / "sub" / "x", {"image": "a.png",
                                       "messages": [{"role": "user", "content": "u"}]})
    (folder / "none").write_text("[]")
    mixed = open_mixture([str(folder / "none"), str(folder / "sub" / "x")], folder)
    assert len(mixed) == 1 and mixed[0].images == (folder / "a.png",)


def test_every_files_hash_weight_and_size_are_told(tmp_path):
    a, b = write(tmp_path / "a", 3, "a"), write(tmp_path / "b", 5, "b")
    told = mixture_hash(open_mixture([f"{a}:2", str(b)]))
    assert told == [{**data_hash(a), "weight": 2.0, "samples": 3},
                    {**data_hash(b), "weight": 1.0, "samples": 5}]
    json.dumps(told)
