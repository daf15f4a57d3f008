"""Claims: the memory that extras.memory predicts is what a run takes: part by part on the same
step with real numbers, and altogether in a fresh process."""

import json
import subprocess
import sys

import pytest
import torch

import train_sft
from benchmarks.memory import longest_batch, random_model
from extras.fast.chunked_cross_entropy import CHUNK
from extras.memory import MemoryTracker, main, planned, predict
from extras.preset_list import static_memory
from tests.tiny import ROOT, environment, make_world
from train_pretrain import backward
from training.distributed import start_distributed
from training.optim import make_optimizer

CPU = torch.device("cpu")
SMALL = ["--batch_size", "3", "--max_length", "48", "--dtype"]


def plan(stage, *flags):
    return planned("emoji", stage, list(flags), CPU)[0]


@pytest.mark.parametrize("stage, flags", [
    ("pretrain", [*SMALL, "bf16"]), ("pretrain", [*SMALL, "fp32"]),
    ("sft", [*SMALL, "fp32", "--train_vision"]),
    ("sft", [*SMALL, "bf16", "--lora", "--lora_dropout", "0.1"]),
    ("sft", [*SMALL, "fp16", "--gradient_checkpointing", "--gradient_accumulation_steps", "2"])])
def test_a_step_on_shapes_is_the_step_with_numbers(stage, flags):
    """The embedded towers in full size: what is counted without numbers is there with them."""
    predicted = predict(*plan(stage, *flags), CPU)
    config, settings, size, K = plan(stage, *flags)
    model = random_model(config, settings)
    with start_distributed() as ranks, MemoryTracker(model) as tracker:
        for _ in range(settings.gradient_accumulation_steps):
            backward(model, longest_batch(config, settings, size, K), 99, settings, ranks)
    optimizer = make_optimizer(model, settings)
    optimizer.step()
    averages = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    held = [list(model.parameters()), [p.grad for p in model.parameters() if p.grad is not None],
            averages]
    assert static_memory(model) == tuple(sum(t.numel() * t.element_size() for t in part)
                                    for part in held)
    assert (predicted.weights, predicted.gradients, predicted.optimizer) == static_memory(model)
    step = predicted.peak - predicted.weights - predicted.optimizer - predicted.gaps
    print(f"{stage} {flags}: {step:,} bytes on shapes, {tracker.most:,} with numbers")
    assert step == pytest.approx(tracker.most, rel=0.01)


def test_activations_grow_with_rows_and_fall_with_checkpointing():
    def told(*flags):
        return predict(*plan("sft", "--max_length", "64", "--dtype", "fp32", *flags), CPU)

    one, two = told("--batch_size", "4"), told("--batch_size", "8")
    assert two.activations == pytest.approx(2 * one.activations, rel=0.02)
    assert (one.weights, one.optimizer) == (two.weights, two.optimizer)
    less = told("--batch_size", "8", "--gradient_checkpointing")
    assert less.activations < two.activations / 4 and less.peak < two.peak
    assert (less.weights, less.gradients, less.optimizer) == (
        two.weights, two.gradients, two.optimizer)


def one_block(preset, rows, length):
    """The prediction for the first block of each tower."""
    flags = ["--batch_size", rows, "--max_length", length, "--dtype", "fp32", "--lora",
             "--lora_targets", "q_proj", "--gradient_checkpointing"]
    config, settings, size, K = planned(preset, "sft", flags, CPU)[0]
    for part in (config.language, config.vision):
        object.__setattr__(part, "num_hidden_layers", 1)  # the config is frozen
    return predict(config, settings, size, K, CPU)


def test_rows_longer_than_a_model_takes_are_not_counted():
    """Qwen-7B stops at 8,192 tokens."""
    assert one_block("qwen7b-clip", "1", "8192") == one_block("qwen7b-clip", "1", "9999")


def test_logits_stop_at_a_chunk():
    """151,936 words: four times the rows make no more of them."""
    def logits(rows):
        return one_block("qwen2.5-siglip", rows, "512").logits

    few, many = logits("1"), logits("4")
    hidden = 4 * 4 * (512 - 196) * 896  # the supervised positions' hidden states
    assert few > 4 * CHUNK["cpu"] / 2 and many - few < 2 * hidden


def test_the_command_predicts_and_no_run_does(tmp_path, capsys):
    main(["emoji", *SMALL, "fp32"])
    told = capsys.readouterr().out
    assert "stage one: 3 rows of 48 tokens, fp32 (as asked)" in told
    for word in ("weights", "gradients", "optimizer", "activations", "logits", "gaps", "peak"):
        assert f"\n{word} " in told and "MB" in told
    train_sft.main([*make_world(tmp_path), "--lora", "--model", "none", "--steps", "1",
                    "--out", str(tmp_path / "out")])
    assert "memory    at most" not in capsys.readouterr().out
    for wrong in ([], ["nothing"]):
        with pytest.raises(SystemExit, match="usage: python -m extras.memory PRESET"):
            main(wrong)


def test_a_fresh_process_takes_what_was_told():
    """Most memory ever held, less what was there before; benchmarks/memory.py does the larger."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "memory.py", "emoji", "sft", "--batch_size", "24",
         "--max_length", "128", "--dtype", "fp32"],
        env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["predicted"] == pytest.approx(told["measured"], rel=0.15), told
