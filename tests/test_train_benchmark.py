"""Claims: both sides of the benchmark do the same work; what it prints is what it measured."""

import json

import pytest
import torch

from benchmarks import growth, sides, train
from benchmarks.sides import Work

LANGUAGE = dict(model_type="qwen2", vocab_size=97, hidden_size=32, intermediate_size=48,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                tie_word_embeddings=True, max_position_embeddings=256)
VISION = dict(model_type="siglip_vision_model", hidden_size=24, intermediate_size=48,
              num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16)
CPU = torch.device("cpu")


def tiny(trained):
    """Two batches, the second with padding."""
    return Work(LANGUAGE, VISION, trained, ((12, 12), (20, 9, 14)), answer=5)


@pytest.mark.parametrize("trained", ["projector", "all", "lora"])
def test_both_sides_learn_the_same(trained, tmp_path):
    """The loss of the next step too: gradients, clipping and AdamW are the same. Adapters begin
    with other random numbers, so theirs agree in the first step alone."""
    pytest.importorskip("peft")
    work = tiny(trained)
    sides.write_weights(work, tmp_path)
    steps = [sides.theirs(work, tmp_path, "fp32", CPU),
             sides.ours(work, tmp_path, "fp32", CPU, cached=False),
             sides.ours(work, tmp_path, "fp32", CPU, cached=True)]
    order = [0] if trained == "lora" else [0, 1, 0, 1]
    told = [[step(number) for number in order] for step in steps]
    for ours in told[1:]:
        assert ours == pytest.approx(told[0], abs=2e-5), told
    if trained != "lora":
        assert abs(told[0][0] - told[0][2]) > 1e-5, "something was learned in between"


def test_operations_are_counted_and_a_share_of_the_peak_is_told():
    """By hand: a product of (m,k) and (k,n) is m*k*n multiplications and as many additions. Frozen
    weights need half of a backward pass, supervised positions alone a head, cached features no
    vision tower."""
    works = [("ours", tiny("projector")), ("cached", tiny("projector")), ("ours", tiny("all"))]
    ours, cached, everything = sides.race(works, "fp32", 1, 1)
    tokens, answers, patches = 2 * 12 + 3 * 20, 4 * 5 + 4, 5 * 4  # padding counts; one answer is 4
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # q, o; k, v; gate, up, down
    language = 2 * (tokens * 2 * layer + answers * 32 * 97)  # forward, and back to its input
    projector = patches * (2 * 24 * 32 + 3 * 32 * 32)  # nothing below it wants a gradient
    assert cached["flops"] == 2 * (language + projector)
    weights = tokens * 2 * layer + answers * 32 * 97  # gradients of the weights
    assert everything["flops"] - ours["flops"] == 2 * weights
    assert ours["flops"] > cached["flops"] and min(ours["rate"], cached["rate"]) > 1e8


def test_the_mix_has_the_same_rows_on_both_sides():
    like, as_they_come = train.length_mix(16, 4)
    rows = [sorted(sum(work.batches, ())) for work in (like, as_they_come)]
    assert rows[0] == rows[1] and len(rows[0]) == 16
    assert all(216 <= length <= 496 for length in rows[0])

    def waste(work):
        return sum(max(batch) * len(batch) - sum(batch) for batch in work.batches)

    assert waste(like) < waste(as_they_come)


def test_the_commands_print_their_tables(monkeypatch, capsys, tmp_path):
    pytest.importorskip("peft")
    monkeypatch.setattr(train, "WORKS", {"projector": tiny("projector")})
    train.main(["--works", "projector", "--rounds", "1", "--threads", "1", "--numbers", "fp32"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "| fp32 |" in line]
    assert [row[3].strip() for row in rows] == ["theirs", "ours", "cached"]
    assert rows[0][4] == rows[1][4] == rows[2][4], "the first losses"
    assert rows[0][10].strip() == rows[0][11].strip() == "1.00"

    monkeypatch.setattr(growth, "work_at", lambda axis, value: tiny("projector"))
    monkeypatch.setattr(growth, "POINTS", {axis: values[:1] for axis, values in
                                           [*growth.POINTS.items()][:2]})
    growth.main(["--steps", "1", "--out", str(tmp_path / "growth.png"),
                 "--axes", *growth.POINTS])
    told = capsys.readouterr().out
    assert [*json.loads(told.splitlines()[0])] == ["tokens of a row", "ours", "theirs"]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
