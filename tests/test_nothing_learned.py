"""Claims: numbers that mean nothing are not written down, and a run that cannot learn says so: a
step without a usable row, parts that get no gradient, rows longer than the model's positions."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train_pretrain
import train_sft
from model.pretrained.checkpoint import newest_checkpoint
from tests.tiny import make_world, metrics


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def lines(world) -> list[str]:
    return Path(world[world.index("--data") + 1]).read_text(encoding="utf-8").splitlines()


def flags(world, tmp_path, records, *more) -> list[str]:
    (tmp_path / "data.jsonl").write_text("\n".join(records), encoding="utf-8")
    folder = str(Path(world[world.index("--data") + 1]).parent)
    return [*world, "--data", str(tmp_path / "data.jsonl"), "--image_folder", folder,
            "--out", str(tmp_path / "out"), "--save_steps", "1", "--save_total_limit", "99", *more]


def weights(tmp_path, step: int) -> dict:
    return load_file(tmp_path / "out" / f"step_{step:06}" / "model.safetensors")


def test_a_step_without_a_usable_row_has_no_loss_and_moves_nothing(world, tmp_path):
    good = next(line for line in lines(world) if "image" in json.loads(line))
    records = [good, "{", good, "{", good, "{", good, "{"]
    train_pretrain.main(flags(world, tmp_path, records, "--batch_size", "1", "--steps", "8",
                              "--max_skip_ratio", "1", "--gradient_accumulation_steps", "1"))
    rows = metrics(tmp_path / "out")
    empty = [row["step"] for row in rows if row["supervised_tokens"] == 0]
    assert len(rows) == 8 and len(empty) == 4
    for row in rows:
        assert (row["loss"] is None) == (row["step"] in empty), row
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert all(value != 0 for name, value in summary.items() if "loss" in name), summary
    for step in (step for step in empty if step > 1):
        before, after = weights(tmp_path, step - 1), weights(tmp_path, step)
        assert all(before[name].equal(after[name]) for name in before), step
    learned = next(step for step in range(2, 9) if step not in empty)
    before, after = weights(tmp_path, learned - 1), weights(tmp_path, learned)
    assert not all(before[name].equal(after[name]) for name in before)


def test_a_run_whose_parts_get_no_gradient_stops(world, tmp_path):
    """Stage one on text alone; the same text trains a language model."""
    text = [json.dumps({"messages": [{"role": "user", "content": "u"}, {
        "role": "assistant", "content": f"word {i}"}]}) for i in range(8)]
    for steps, told in (("50", "steps 1 to 20"), ("3", "steps 1 to 3")):
        with pytest.raises(SystemExit, match=f"{told}: what is trained gets no gradient, and no "
                                             "sample of the last step shows an image"):
            train_pretrain.main(flags(world, tmp_path, text, "--steps", steps))
    train_sft.main(flags(world, tmp_path, text, "--steps", "3", "--model", "none", "--lora"))
    # Some steps of text alone are no reason to stop.
    mixed = text[:3] + [line for line in lines(world) if "image" in json.loads(line)][:1]
    train_pretrain.main(flags(world, tmp_path, mixed, "--steps", "8", "--batch_size", "1"))
    assert {row["grad_norm"] == 0 for row in metrics(tmp_path / "out")} == {True, False}


def test_rows_past_the_trained_positions_are_refused_before_the_first_step(world, tmp_path):
    language = Path(world[world.index("--language_model") + 1])
    limit = json.loads((language / "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(SystemExit, match=f"--max_length {limit + 1}: the language model was "
                                         f"trained for {limit} positions.*give --max_length "
                                         f"{limit} or less"):
        train_pretrain.main(flags(world, tmp_path, lines(world), "--max_length", str(limit + 1)))
    assert newest_checkpoint(tmp_path / "out") is None
    train_pretrain.main(flags(world, tmp_path, lines(world), "--max_length", str(limit),
                              "--steps", "1"))


@pytest.mark.parametrize("seed", ["-1", str(2**31), "1.5"])
def test_a_seed_that_is_none(world, tmp_path, seed, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_pretrain.main(flags(world, tmp_path, lines(world), "--seed", seed))
    assert "--seed" in f"{stopped.value} {capsys.readouterr().err}"


def test_squares_of_patches_that_do_not_fit(world, tmp_path):
    with pytest.raises(SystemExit, match="cannot build the model: --pixel_shuffle 7: an image "
                                         "makes . x . patches.*divides both"):
        train_pretrain.main(flags(world, tmp_path, lines(world), "--pixel_shuffle", "7"))
