"""Claims: the benchmark measures the real path and prints its figures; its arithmetic counts the
operations that training really makes."""

import argparse

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import images
from dataset.images import load_image
from extras.preset_list import empty_model
from training.optim import choose_trainable
from training.preset_table import PRESETS


def counted(stage: str, **changes) -> float:
    """Operations of one emoji picture with 64 tokens of text, as PyTorch counts them."""
    preset = PRESETS["emoji"]
    model = empty_model(preset).to_empty(device="cpu")
    settings = {**vars(preset), **vars(getattr(preset, stage)), **changes}
    choose_trainable(model, argparse.Namespace(**settings), None)
    K = images.image_tokens(preset)
    ids = torch.ones(1, K + images.TEXT, dtype=torch.int64)
    ids[0, :K] = 0  # empty_model's placeholder
    labels = torch.full_like(ids, -100)
    labels[0, -images.ANSWER:] = 1
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss, _ = model(ids, labels, torch.zeros(1, 3, 96, 96))
        loss.backward()
    return counter.get_total_flops()


def test_every_preset_has_its_figures():
    for name in PRESETS:
        for stage in ("pretrain", "sft"):
            assert images.operations(name, stage) > 1e8, (name, stage)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_the_arithmetic_is_what_training_does(stage):
    expected, told = counted(stage), images.operations("emoji", stage)
    print(f"{stage}: {told:.3e} by arithmetic, {expected:.3e} counted: {told / expected:.3f}")
    assert told == pytest.approx(expected, rel=0.05)


def test_the_command_prints_both_halves(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(images, "PRESETS", {"emoji": PRESETS["emoji"]})
    (tmp_path / "a.jpg").write_bytes(images.photo(300, 200))
    images.main(["--pictures", "1", "--photos", str(tmp_path)])
    told = capsys.readouterr().out
    assert "pictures a second on one core" in told and "workers" in told
    assert told.count("\nemoji ") == 2 and "(1 pictures)" in told
    assert load_image(images.photo()).size == (640, 480)
