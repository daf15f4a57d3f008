"""Claims: resumed on another number of ranks, or with another batch size, a run sees the same
samples in the same order, each once an epoch; where only the split changes, so do the gradients."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

import train_pretrain
from dataset.batching import Batches
from tests.test_batching import PROCESSOR, Data, broken, many
from tests.tiny import make_world, metrics
from train_pretrain import backward, load_or_build
from training.data import open_training_data
from training.distributed import start_distributed
from training.optim import choose_trainable
from training.presets import read_flags, resolve

# (batch_size, gradient_accumulation_steps, world_size), one after the other
SAME_TOTAL = [(4, 3, 1), (2, 3, 2), (1, 4, 3), (6, 1, 2), (12, 1, 1), (1, 1, 12)]
ANY_TOTAL = [(4, 3, 1), (5, 1, 1), (2, 2, 4), (1, 1, 1), (3, 1, 5)]


@pytest.fixture(scope="module")
def template(tiny_tokenizer_dir):
    from dataset.chat import ChatTemplate
    from dataset.tokenizer import Tokenizer
    return ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), image_tokens=4)


def walk(samples, template, splits, steps, epochs, workers=0):
    """Train on nothing: `steps` steps with each split in turn, the last one to the end.

    -> of each step {epoch: [places of samples]}, all ranks together, and the bad samples.
    """
    told, bad, epoch, place, block = [], [], 0, 0, None
    for number, (batch_size, gradient_accumulation_steps, world_size) in enumerate(splits):
        ranks = [Batches(Data(samples), template, PROCESSOR, batch_size, 300, 1, rank, world_size,
                         workers, window=4, bucket=block) for rank in range(world_size)]
        block = ranks[0].layout.bucket
        left = epochs * ranks[0].layout.positions - epoch * ranks[0].layout.positions - place
        size = batch_size * gradient_accumulation_steps * world_size
        plan = list(ranks[0].layout.steps(epoch, place, size, left))
        plan = plan if number == len(splits) - 1 else plan[:steps]
        streams = [rank.load(itertools.chain.from_iterable(plan)) for rank in ranks]
        for step in plan:
            found = {}
            for micro_batch in step:
                for batch, skipped in map(next, streams):
                    found.setdefault(micro_batch[0], []).extend(batch.where)
                    bad += [(micro_batch[0], sample.where) for sample in skipped]
                    assert len(batch.where) <= batch_size
            told.append({e: sorted(where) for e, where in found.items() if where})
            epoch, place = ranks[0].layout.after(step[-1][0], step[-1][2])
    return told, bad


@pytest.mark.parametrize("count", [50, 61])
def test_the_split_changes_nothing_but_the_split(template, count):
    alone, _ = walk(many(count), template, SAME_TOTAL[:1], 0, epochs=3)
    for changed in (SAME_TOTAL, SAME_TOTAL[:1] + SAME_TOTAL[:0:-1]):
        assert walk(many(count), template, changed, 2, epochs=3)[0] == alone
    assert walk(many(count), template, SAME_TOTAL[:3], 2, epochs=3, workers=2)[0] == alone


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_each_sample_comes_once_an_epoch_whatever_is_changed(template, steps):
    """Broken ones, too, are reported once an epoch."""
    told, bad = walk(broken(), template, ANY_TOTAL, steps, epochs=3)
    unusable = [f"data:{i}" for i in (7, 9, 10, 12, 20, 40, 41)]
    for epoch in range(3):
        seen = Counter(where for step in told for where in step.get(epoch, []))
        assert seen == Counter({f"data:{i}" for i in range(60)} - set(unusable))
    assert Counter(bad) == Counter((e, where) for e in range(3) for where in unusable)


def test_the_order_stays_where_the_total_changes(template):
    """Steps of other sizes cut the same line: what came first still comes first."""
    line = [w for step in walk(many(60), template, [(1, 1, 1)], 0, epochs=2)[0]
            for where in step.values() for w in where]
    for split in ((3, 1, 1), (1, 1, 7), (5, 2, 1)):
        # The first step fixes the block: 1 row. The order is by place, so cut it the same way.
        told, _ = walk(many(60), template, [(1, 1, 1), split], 1, epochs=2)
        at = 0
        for step in told:
            where = [w for part in step.values() for w in part]
            assert sorted(where) == sorted(line[at:at + len(where)])
            at += len(where)
        assert at == len(line) == 120


def test_gradients_of_a_step_are_those_of_any_split(tmp_path):
    """Within 1e-6, in float32, over micro-batches and ranks; every part is trained."""
    flags = [*make_world(tmp_path, count=34), "--train_language", "all", "--train_vision"]
    settings = resolve(read_flags("", "pretrain", flags), "pretrain", {})
    parts = load_or_build(settings, None)
    choose_trainable(parts.model, settings, None)
    data, _ = open_training_data(settings, "pretrain")
    trained = [p for p in parts.model.parameters() if p.requires_grad]
    expected = None
    with start_distributed() as one:
        for batch_size, _, world_size in SAME_TOTAL:
            ranks = [Batches(data, parts.template, parts.processor, batch_size, 128, 0, rank,
                             world_size, bucket=4) for rank in range(world_size)]
            step = list(ranks[0].layout.steps(0, 24, 12, 24))[1]
            micro = [batch for rank in ranks for batch, _ in rank.load(step) if batch.where]
            supervised = sum(batch.supervised for batch in micro)
            parts.model.zero_grad()
            for batch in micro:
                backward(parts.model, batch, supervised, settings, one)
            found = torch.cat([p.grad.flatten() for p in trained])
            expected = found if expected is None else expected
            difference = (found - expected).abs().max().item()
            assert difference < 1e-6, f"{batch_size, world_size}: {difference}"
    assert expected.abs().max() > 1e-3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Nine blocks of 4 an epoch, steps of 12: half of 2 epochs lies inside of a step."""
    world = make_world(tmp_path_factory.mktemp("world"), count=34)
    world[world.index("--steps"):world.index("--steps") + 2] = ["--epochs", "2"]
    return [*world, "--batch_size", "4", "--gradient_accumulation_steps", "3", "--model", "none",
            "--save_steps",
            "1", "--save_total_limit", "9", "--log_samples"]


def stopped_after(world, out, steps):
    """A run of which the checkpoints after `steps` are lost."""
    import shutil
    train_pretrain.main([*world, "--out", str(out)])
    for path in out.glob("step_*"):
        if int(path.name[5:]) > steps:
            shutil.rmtree(path)


def samples(out):
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return [(line["step"], line["epoch"], sorted(line["samples"])) for line in lines]


def test_a_run_goes_on_with_another_split(world, tmp_path):
    train_pretrain.main([*world, "--out", str(tmp_path / "whole")])
    stopped_after(world, tmp_path / "out", 2)
    train_pretrain.main(["--resume", "--out", str(tmp_path / "out"), "--batch_size", "2",
                         "--gradient_accumulation_steps", "6", "--num_workers", "1"])
    assert samples(tmp_path / "out") == samples(tmp_path / "whole")
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "out"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["supervised_tokens"] == other["supervised_tokens"]
        assert one["learning_rate"] == other["learning_rate"]


def test_a_run_goes_on_with_another_total(world, tmp_path):
    """Steps of 5 instead of 12: more of them are left, and the learning rate goes on smoothly."""
    stopped_after(world, tmp_path / "out", 2)
    train_pretrain.main(["--resume", "--out", str(tmp_path / "out"), "--batch_size", "5",
                         "--gradient_accumulation_steps", "1"])
    told = samples(tmp_path / "out")
    for epoch in (0, 1):
        seen = Counter(where for _, e, part in told if e == epoch for where in part)
        assert len(seen) == 34 and set(seen.values()) == {1}
    steps = metrics(tmp_path / "out")
    assert [m["step"] for m in steps] == list(range(1, 2 + 1 + -(-(72 - 24) // 5)))
    rates = [m["learning_rate"] for m in steps]
    assert rates[-1] == pytest.approx(0.001) and np.all(np.diff(rates[1:]) < 0)
    # 24 of 72 places are done: as far as 4.8 steps of 5 lead, of 14.4; the first one is the warmup,
    # and the next step is the first of ten more.
    share = (24 / 5 + 1 - 1) / (24 / 5 + 10 - 1)
    assert rates[2] / 0.01 == pytest.approx(0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * share)))
