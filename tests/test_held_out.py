"""Claims: held-out samples are never trained on, the same for every resume and number of ranks;
measuring them changes no bit of the training and tells whether the model looks; --overfit learns
a few samples by heart."""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as chat
import train_pretrain
import train_sft
from dataset.batching import Batches
from dataset.readers.mixture import open_mixture
from model.pretrained.checkpoint import newest_checkpoint
from tests.test_mixture import said, write
from tests.test_resume import Killed, die_in_step, same_weights
from tests.test_training import prepare
from tests.tiny import ROOT, curve, make_data, make_world, metrics, torchrun
from training.data import open_held_out, open_training_data
from training.distributed import start_distributed
from training.presets import read_flags, resolve
from training.validation import ShuffledImages, eval_losses


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """Another file of the same kind."""
    directory = tmp_path_factory.mktemp("unseen")
    return ["--eval_data", make_data(directory, count=10)]


def evaluations(out):
    path = Path(out) / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_measuring_changes_no_bit_of_the_training(world, unseen, tmp_path, monkeypatch):
    """With dropout, which draws random numbers in every step; with workers and without."""
    flags = [*world, "--model", "none", "--lora", "--lora_dropout", "0.3"]
    generators = []

    def losses(*arguments):
        def state():
            return (torch.get_rng_state().tolist(), random.getstate(),
                    str(np.random.get_state()))

        before = state()
        told = eval_losses(*arguments)
        generators.append(before == state())
        return told

    monkeypatch.setattr("training.hooks.eval_losses", losses)
    train_sft.main([*flags, "--out", str(tmp_path / "off")])
    train_sft.main([*flags, *unseen, "--eval_steps", "1", "--out", str(tmp_path / "on")])
    assert generators == [True] * 6
    assert curve(tmp_path / "on") == curve(tmp_path / "off")
    assert same_weights(tmp_path / "on", tmp_path / "off")
    assert not (tmp_path / "off" / "evaluations.jsonl").exists()
    assert list(metrics(tmp_path / "on")[0]) == list(metrics(tmp_path / "off")[0])
    told = evaluations(tmp_path / "on")
    assert [line["step"] for line in told] == [1, 2, 3, 4, 5, 6]
    assert list(told[0])[:3] == ["step", "eval_loss", "eval_loss_shuffled_images"]
    assert [line["samples"] for line in told] == [10] * 6


def test_the_loss_is_the_mean_over_all_supervised_tokens(world, unseen, tmp_path):
    """Against a sum by hand, row by row, with each row's own picture and with the next one's."""
    flags = [*world, *unseen, "--eval_steps", "6"]
    settings, parts, batches = prepare(flags)
    data, _ = open_training_data(settings, "pretrain")
    held_out = open_held_out(settings, "pretrain", data)
    with start_distributed() as ranks:
        told = eval_losses(parts.model, [
            Batches(samples, parts.template, parts.processor, 4, 128, 0)
            for samples in (held_out, ShuffledImages(held_out))], settings, ranks)
    assert parts.model.training, "training goes on with dropout"
    for name, samples in (("eval_loss", held_out),
                          ("eval_loss_shuffled_images", ShuffledImages(held_out))):
        total = count = 0
        for batch, _ in Batches(samples, parts.template, parts.processor, 1, 128, 0).epoch(0):
            loss, tokens = parts.model(batch.ids, batch.labels, batch.pixels, batch.order)
            total, count = total + loss.item(), count + tokens.item()
        assert told[name] == pytest.approx(total / count, abs=1e-5), name
    assert told["eval_loss"] != told["eval_loss_shuffled_images"]


def test_wrong_pictures_are_other_pictures_and_text_stays(world, unseen):
    data = open_mixture([unseen[1]])
    wrong = ShuffledImages(data)
    assert len(wrong) == len(data) == 10
    for i in range(10):
        assert wrong[i].messages == data[i].messages
        assert len(wrong[i].images) == len(data[i].images)
        assert not set(wrong[i].images) & set(data[i].images), "another picture, not another copy"


def test_a_model_that_has_learned_to_look_loses_with_wrong_pictures(world, unseen, tmp_path):
    train_sft.main([*world, *unseen, "--model", "none", "--train_language", "all", "--steps", "80",
                    "--batch_size", "8", "--eval_steps", "40", "--save_steps", "500",
                    "--out", str(tmp_path)])
    told = evaluations(tmp_path)
    print(told)
    assert told[-1]["eval_loss_shuffled_images"] > 2 * told[-1]["eval_loss"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    best = min(told, key=lambda line: line["eval_loss"])
    assert (summary["best_eval_loss"], summary["best_eval_step"]) == (
        best["eval_loss"], best["step"])
    assert summary["last_evaluation"] == told[-1]


def test_set_apart_is_never_trained_on_and_nothing_is_lost(tmp_path):
    """Two files with weights, one of which is taken in parts: over all epochs, over all ranks."""
    a, b = write(tmp_path / "a", 30, "a"), write(tmp_path / "b", 10, "b")
    mixed = open_mixture([f"{a}:0.5", f"{b}:2"], seed=1, apart=8)
    apart = said(mixed.set_apart())
    assert apart == [f"a{i}" for i in range(24, 30)] + ["b8", "b9"], "by share, the last ones"
    counts = Counter()
    for epoch in range(4):
        counts.update(said(mixed.at_epoch(epoch)))
    assert not counts.keys() & set(apart)
    assert {**counts} == {**{f"a{i}": 2 for i in range(24)}, **{f"b{i}": 8 for i in range(8)}}
    assert said(open_mixture([f"{a}:0.5", f"{b}:2"], seed=2, apart=8).set_apart()) == apart
    with pytest.raises(ValueError, match="40 samples are to be set apart, but there are only 40"):
        open_mixture([str(a), str(b)], apart=40)


def test_set_apart_does_not_depend_on_measuring(world, tmp_path):
    """--eval_samples alone decides what is trained on; a resume measures the same samples."""
    flags = [*world, "--eval_samples", "6"]
    for every in ("0", "2"):
        train_pretrain.main([*flags, "--eval_steps", every, "--out", str(tmp_path / every)])
    assert curve(tmp_path / "0") == curve(tmp_path / "2")
    run = json.loads((tmp_path / "2" / "run.json").read_text())
    assert run["data"]["samples"] == 18
    assert {line["samples"] for line in evaluations(tmp_path / "2")} == {6}


def test_a_killed_run_measures_as_if_it_had_not_been_killed(world, tmp_path, monkeypatch):
    flags = [*world, "--eval_samples", "6", "--eval_steps", "2"]
    train_pretrain.main([*flags, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, 5)  # measured at 2 and 4, saved at 3
        train_pretrain.main([*flags, "--out", str(tmp_path / "killed")])
    train_pretrain.main(["--resume", "--out", str(tmp_path / "killed")])
    assert evaluations(tmp_path / "killed") == evaluations(tmp_path / "whole")
    assert [line["step"] for line in evaluations(tmp_path / "killed")] == [2, 4, 6]
    with pytest.raises(SystemExit, match="--eval_samples 5: .*started with 6"):
        train_pretrain.main(["--resume", "--eval_samples", "5", "--out", str(tmp_path / "killed")])


def test_two_ranks_measure_what_one_does(world, unseen, tmp_path):
    """The very first measurement, before the ranks' rounding can part: a rate of almost 0."""
    flags = [*world, *unseen, "--eval_steps", "1", "--steps", "1", "--learning_rate", "1e-9"]
    train_pretrain.main([*flags, "--out", str(tmp_path / "one")])
    done = torchrun(["--standalone", "--nproc_per_node", "2"], ROOT / "train_pretrain.py", *flags,
                    "--batch_size", "1", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stdout + done.stderr
    (one,), (two,) = evaluations(tmp_path / "one"), evaluations(tmp_path / "two")
    assert two == pytest.approx(one, abs=1e-5)


def test_emoji_measures_scenes_that_nobody_trains_on(tmp_path):
    for stage in ("pretrain", "sft"):
        settings = resolve(read_flags("", stage, ["--eval_steps", "5"]), stage, {})
        data, _ = open_training_data(settings, stage)
        held_out = open_held_out(settings, stage, data)
        assert len(held_out) == 256
        numbers = [int(held_out[i].where.split("scene ")[1][:-1]) for i in (0, 255)]
        last = int(data[len(data) - 1].where.split("scene ")[1][:-1])
        assert numbers == [last + 1, last + 256] and numbers[1] < 10**9, "no test scenes either"
    train_pretrain.main(["--steps", "1", "--batch_size", "2", "--num_workers", "0", "--eval_steps",
                         "1",
                         "--eval_samples", "4", "--out", str(tmp_path)])
    told, = evaluations(tmp_path)
    assert told["samples"] == 4 and told["eval_loss_shuffled_images"] > 0


def test_broken_samples_are_counted_and_none_at_all_is_no_number(world, tmp_path, capsys):
    lines = Path(world[5]).read_text().splitlines()
    file = tmp_path / "held.jsonl"
    flags = [*world, "--eval_data", str(file), "--image_folder", str(Path(world[5]).parent),
             "--steps",
             "1", "--eval_steps", "1", "--out", str(tmp_path / "out")]
    for content, expected in ((["{broken", *lines[:5]], (5, 1)), ([lines[0]], (1, 0)),
                              (["{broken"], (0, 1))):
        file.write_text("\n".join(content))
        train_pretrain.main(flags)
        told, = evaluations(tmp_path / "out")
        assert (told["samples"], told["skipped"]) == expected
        assert (told["eval_loss"] is None) == (expected[0] == 0)
        text_only = content == [lines[0]]
        assert (told["eval_loss_shuffled_images"] is None) == (text_only or expected[0] == 0)
    assert "held-out loss none" in capsys.readouterr().out


def test_which_samples_must_be_said(world, tmp_path):
    for flags, message in (
        (["--eval_steps", "2"], "--eval_steps 2: on which samples"),
        (["--eval_steps", "2", "--eval_samples", "24"], "--data .*24 samples are to be set apart"),
        (["--eval_steps", "2", "--eval_data", "none.json"], "--eval_data none.json: no data file"),
    ):
        with pytest.raises(SystemExit, match=message):
            train_pretrain.main([*world, *flags, "--out", str(tmp_path)])


def test_overfit_learns_a_few_samples_by_heart(world, tmp_path, capsys):
    """Four samples, all of the little model: its loss falls to nearly 0, and it says what it has
    learned and no more: a model that was not taught to end would go on to the 64th token."""
    flags = [*world, "--model", "none", "--train_language", "all", "--overfit", "4",
             "--eval_steps", "50", "--batch_size", "4", "--save_steps", "500"]
    position = flags.index("--steps")
    del flags[position:position + 2]
    train_sft.main([*flags, "--out", str(tmp_path)])
    told, losses = capsys.readouterr().out, [m["loss"] for m in metrics(tmp_path)]
    assert len(losses) == 200, "unless something else is said"
    assert losses[0] > 3 and losses[-1] < 0.01, (losses[0], losses[-1])
    assert "overfit   these 4 samples only" in told and "held-out samples are not looked" in told
    assert not (tmp_path / "evaluations.jsonl").exists()
    assert newest_checkpoint(tmp_path).name == "step_000200"
    chat.main(["--model", str(tmp_path), "--image", str(Path(world[5]).parent / "green.png"),
               "--prompt", "Which colour?", "--max_new_tokens", "64"])
    assert capsys.readouterr().out == "It is green!\n"


def test_overfit_takes_the_first_samples_in_every_epoch(world):
    """A mixture would show other samples in each epoch; here it stands still. Epochs repeat."""
    flags = ["--data", f"{world[5]}:0.5", "--overfit", "5", "--epochs", "3", "--batch_size", "2"]
    settings = resolve(read_flags("", "sft", flags), "sft", {})
    assert settings.steps is None and settings.epochs == 3
    data, about = open_training_data(settings, "sft")
    assert about["samples"] == 5 and not hasattr(data, "at_epoch")
    assert [s.where for s in data] == [s.where for s in open_mixture([f"{world[5]}:0.5"])][:5]
    more = argparse.Namespace(**{**vars(settings), "overfit": 100})
    assert len(open_training_data(more, "sft")[0]) == 12, "no more than there are"
