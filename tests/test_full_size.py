"""Claim: the benchmark's step is a step of the project's own run, on shapes without weights."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

import train_pretrain
import train_sft
from benchmarks import full_size
from extras.preset_list import LANGUAGE, VISION
from tests.tiny import ROOT, environment
from training.preset_table import PRESETS

ROW = re.compile(r"\| `(.+)` \| (\w+) \| ([\d,]+) \| (\d+) x (\d+) \| (\w+) \| (\d+\.\d) \| "
                 r"(\d+\.\d) GB \|")


@pytest.fixture
def twin(monkeypatch):
    """qwen3-clip, but tiny."""
    monkeypatch.setitem(LANGUAGE, "words", dict(
        model_type="qwen3", vocab_size=1600, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        tie_word_embeddings=True))
    monkeypatch.setitem(VISION, "eyes", dict(
        model_type="clip_vision_model", hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, image_size=32, patch_size=8))
    monkeypatch.setitem(PRESETS, "twin", replace(PRESETS["qwen3-clip"], language_model="words",
                                                 vision_tower="eyes"))


@pytest.mark.parametrize("stage,trained,row", [
    ("pretrain", 24 * 32 + 32 + 32 * 32 + 32, 16 + 40),
    # and adapters of rank 8 on q, k, v, o of two layers: 32 wide, k and v 16
    ("sft", 24 * 32 + 32 + 32 * 32 + 32 + 2 * 8 * (64 + 48 + 48 + 64), 16 + 160)])
def test_a_step_of_the_tiny_twin(twin, stage, trained, row, capsys):
    script = {"pretrain": train_pretrain, "sft": train_sft}[stage]
    before = script.load_or_build, train_pretrain.save
    full_size.main(["--here", "--presets", "twin", "--stages", stage, "--batch_size", "3",
                    "--dtype", "fp32"])
    told = ROW.fullmatch(capsys.readouterr().out.strip()).groups()
    assert told[:6] == ("twin", stage, f"{trained:,}", "3", str(row), "fp32")
    assert float(told[7]) > 0.1, "a process with torch in it holds more"
    assert (script.load_or_build, train_pretrain.save) == before


def test_the_command_as_it_is_typed(monkeypatch, capsys):
    done = subprocess.run([sys.executable, "-m", "benchmarks.full_size", "--presets", "emoji",
                           "--stages", "pretrain"], cwd=ROOT, env=environment(),
                          capture_output=True, text=True)
    head, line, told = done.stdout.strip().splitlines()
    assert f"{head}\n{line}" == full_size.HEAD and head.count("|") == told.count("|")
    assert ROW.fullmatch(told), told
    monkeypatch.setattr(full_size, "free_bytes", lambda: 10**6)
    full_size.main(["--presets", "qwen3-clip"])
    assert capsys.readouterr().out.count("GB before the first layer runs, 0.0 GB are free") == 2


def test_what_is_needed_follows_the_flags():
    """1.5 billion trained numbers of 16 bytes; or frozen ones of 2, and a few adapters."""
    whole, adapters = (full_size.needed_bytes("qwen2.5-1.5b-clip", "sft",
                                              ["--dtype", "bf16", *more])
                       for more in ([], ["--lora"]))
    assert whole > 16 * 1_543_714_304 > 6 * adapters > 6 * 2 * 1_543_714_304
