"""Claims: frozen weights in bf16 change nothing and are never converted, trained ones are float32;
fp16 skips what overflows and goes on, as torch's own scaler does, on all ranks alike."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import train_pretrain
import train_sft
import training.precision
import training.resume
from dataset.batching import Batches
from model.lora import LoRALinear
from model.pretrained.checkpoint import newest_checkpoint
from model.pretrained.load import load_checkpoint, load_language, load_vision
from model.pretrained.save import save_language, save_vision
from tests.tiny import curve, make_world, metrics, torchrun
from train_pretrain import backward, load_or_build
from training.data import open_training_data
from training.inference import inference_dtype
from training.optim import choose_trainable
from training.precision import cast_weights, choose_dtype, resolve_dtype, update_loss_scale
from training.presets import read_flags, resolve
from training.steps import TrainerState

SFT = ["--lora", "--model", "none"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Towers that are published in bf16, as most are; six steps of two rows."""
    world = make_world(tmp_path_factory.mktemp("world"))
    for load, save, directory in ((load_language, save_language, world[1]),
                                  (load_vision, save_vision, world[3])):
        model = load(directory)
        save(model.to(torch.bfloat16), directory)
    return world


def run(world, out, *flags, script=train_sft):
    script.main([*world, *(SFT if script is train_sft else []), *flags, "--out", str(out)])
    return curve(out)


def weights(out):
    return load_file(newest_checkpoint(out) / "model.safetensors")


def test_frozen_in_bf16_is_bit_for_bit_frozen_in_float32(world, tmp_path, monkeypatch):
    ours = run(world, tmp_path / "bf16", "--dtype", "bf16", "--lora_dropout", "0.1")
    monkeypatch.setattr(train_pretrain, "cast_weights", lambda model, *_, **__: model.float())
    plain = run(world, tmp_path / "fp32", "--dtype", "bf16", "--lora_dropout", "0.1")
    assert ours == plain
    one, two = weights(tmp_path / "bf16"), weights(tmp_path / "fp32")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_towers_published_in_float32_are_rounded_once(tmp_path, monkeypatch):
    world = make_world(tmp_path / "world")
    ours = run(world, tmp_path / "bf16", "--dtype", "bf16")
    monkeypatch.setattr(train_pretrain, "cast_weights", lambda model, *_, **__: model.float())
    plain = run(world, tmp_path / "fp32", "--dtype", "bf16")
    for a, b in zip(ours, plain):
        assert a[1] == pytest.approx(b[1], rel=0.01), (a, b)


def stored(world, *flags, stage="sft"):
    settings = resolve(read_flags("", stage, [*world, *flags]), stage, {})
    parts = load_or_build(settings, None)
    choose_trainable(parts.model, settings, None)
    cast_weights(parts.model, settings.dtype, {"projector.fc1.weight", "projector.fc2.weight"})
    return settings, parts


@pytest.mark.parametrize("dtype, low", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_what_is_trained_is_float32_and_frozen_matrices_are_not(world, dtype, low):
    _, parts = stored(world, "--lora", "--dtype", dtype)
    for name, p in parts.model.named_parameters():
        matrix = name.endswith(".weight") and p.ndim > 1 and not name.startswith("projector.")
        assert p.dtype == (low if matrix else torch.float32), name
        assert not (matrix and p.requires_grad), name
    assert any(isinstance(m, LoRALinear) and m.weight.dtype == low and
               m.lora_a.dtype == torch.float32 for m in parts.model.modules())
    _, parts = stored(world, "--train_language", "last:1", "--dtype", dtype)
    kept = {n: p.dtype for n, p in parts.model.named_parameters() if n.endswith("q_proj.weight")}
    assert kept["language.layers.1.self_attn.q_proj.weight"] == torch.float32
    assert kept["language.layers.0.self_attn.q_proj.weight"] == low
    _, parts = stored(world, "--dtype", "fp32")
    assert {p.dtype for p in parts.model.parameters()} == {torch.float32}


class Converted(TorchDispatchMode):
    """The storages that something was converted from."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.places.append(args[0].untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", [["--lora"], ["--train_language", "last:1"]])
def test_no_frozen_matrix_is_converted_in_a_step(world, flags):
    from training.distributed import start_distributed

    settings, parts = stored(world, *flags, "--dtype", "bf16")
    data, _ = open_training_data(settings, "sft")
    batch = next(b for b, _ in Batches(data, parts.template, parts.processor, 2, 128, 0).epoch(0)
                 if b.pixels is not None)
    with start_distributed() as ranks, Converted() as seen:
        backward(parts.model, batch, 10, settings, ranks)
    names = {p.untyped_storage().data_ptr(): (name, p.requires_grad, p.ndim)
             for name, p in parts.model.named_parameters()}
    told = [names[place] for place in seen.places if place in names]
    assert any(trained for _, trained, _ in told), "masters are converted, so the mode does see"
    assert not [name for name, trained, ndim in told if not trained and ndim > 1]


def test_chat_loads_what_training_in_bf16_saved(world, tmp_path):
    run(world, tmp_path, "--dtype", "bf16")
    saved = weights(tmp_path)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_checkpoint(newest_checkpoint(tmp_path), dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        for name, p in model.named_parameters():
            if name in saved:
                assert torch.equal(p, saved[name].to(dtype)), name
    held = dict(load_checkpoint(newest_checkpoint(tmp_path), None).named_parameters())
    assert held["language.embed_tokens.weight"].dtype == torch.bfloat16, "as in the file"
    assert held["projector.fc1.weight"].dtype == torch.float32


def test_what_an_earlier_stage_trained_is_not_rounded_by_passing_through(world, tmp_path):
    run(world, tmp_path / "one", "--train_language", "last:1", script=train_pretrain)
    train_sft.main([*world, "--lora", "--no-train_projector", "--dtype", "bf16", "--model",
                    str(tmp_path / "one"), "--out", str(tmp_path / "two")])
    before, after = weights(tmp_path / "one"), weights(tmp_path / "two")
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert len(same) == len(before) and len(after) > len(before)


# ---------------------------------------------------------------- fp16


def test_the_scale_follows_torchs_own_scaler(monkeypatch):
    """The same steps skipped, the same scale after each, over a sequence of overflows."""
    monkeypatch.setattr(training.precision, "GROWTH_INTERVAL", 3)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    ours = TrainerState()
    for step, overflow in enumerate([0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1]):
        before = weight.item()
        theirs.scale(weight.sum()).backward()
        if overflow:
            weight.grad.fill_(math.inf)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        update_loss_scale(ours, finite=not overflow)
        assert ours.loss_scale == theirs.get_scale(), step
        assert (weight.item() == before) == bool(overflow)


def test_fp16_stays_close_to_fp32(world, tmp_path):
    low, high = (run(world, tmp_path / dtype, "--dtype", dtype, script=train_pretrain)
                 for dtype in ("fp16", "fp32"))
    for a, b in zip(low, high):
        assert a[1] == pytest.approx(b[1], rel=0.01), (a, b)
    told = metrics(tmp_path / "fp16")
    assert [m["loss_scale"] for m in told] == [2.0**16] * 6
    assert [m["overflows"] for m in told] == [0] * 6
    assert "loss_scale" not in metrics(tmp_path / "fp32")[0]


def start_at(monkeypatch, scale):
    monkeypatch.setattr(training.resume, "TrainerState", lambda **saved: TrainerState(
        **{"loss_scale": scale, **saved}))


def test_overflow_is_skipped_counted_and_survived(world, tmp_path, monkeypatch, capsys):
    """A scale that is 16 times too large: the first steps overflow, the others train."""
    start_at(monkeypatch, 2.0**22)
    run(world, tmp_path, "--dtype", "fp16", "--save_steps", "1", "--save_total_limit", "9")
    told = metrics(tmp_path)
    skipped = [m["step"] for m in told if m["grad_norm"] is None]
    assert skipped and skipped == list(range(1, len(skipped) + 1)) and len(skipped) < 6, skipped
    assert [m["loss_scale"] for m in told] == [
        2.0**(22 - min(i, len(skipped))) for i in range(6)]
    assert told[-1]["overflows"] == len(skipped)
    assert all(math.isfinite(m["loss"]) for m in told)
    assert f"6 steps ({len(skipped)} skipped: fp16 overflowed)" in capsys.readouterr().out
    saved = [load_file(tmp_path / f"step_{step:06}" / "model.safetensors") for step in range(1, 7)]
    for step in range(2, 7):
        same = all(torch.equal(saved[step - 2][n], saved[step - 1][n]) for n in saved[0])
        assert same == (step in skipped), step
    assert all(t.isfinite().all() for t in saved[-1].values())


def test_the_scale_is_resumed(world, tmp_path, monkeypatch):
    start_at(monkeypatch, 2.0**22)
    flags = ["--dtype", "fp16", "--save_steps", "1", "--save_total_limit", "9"]
    whole = run(world, tmp_path / "whole", *flags)
    run(world, tmp_path / "cut", *flags)
    for step in range(3, 7):
        directory = tmp_path / "cut" / f"step_{step:06}"
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
    train_sft.main(["--resume", "--out", str(tmp_path / "cut")])
    assert curve(tmp_path / "cut") == whole
    scales = [[(m["loss_scale"], m["overflows"]) for m in metrics(tmp_path / name)]
              for name in ("cut", "whole")]
    assert scales[0] == scales[1]


def test_what_no_scale_helps_stops(world, tmp_path, monkeypatch):
    """A gradient that is NaN at every scale is no overflow."""
    plain = train_pretrain.backward

    def broken(model, *args):
        loss = plain(model, *args)
        model.projector.fc1.weight.grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(train_pretrain, "backward", broken)
    start_at(monkeypatch, 4.0)
    with pytest.raises(SystemExit, match="step 3: the loss is .* the gradient's length nan"):
        run(world, tmp_path, "--dtype", "fp16")
    assert [m["grad_norm"] for m in metrics(tmp_path)] == [None, None]


ONE_RANK_OVERFLOWS = """
import math, os, sys, torch, train_pretrain, train_sft
plain, calls = train_pretrain.backward, []
def backward(model, *args):
    loss = plain(model, *args)
    calls.append(loss)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        next(p for p in model.parameters() if p.requires_grad).grad[0, 0] = math.inf
    return loss
train_pretrain.backward = backward
kept = {}
def train(model, steps, *args, plain=train_pretrain.train):
    plain(model, steps, *args)
    state = steps.state
    torch.save([{n: p.detach() for n, p in model.named_parameters()}, state.loss_scale,
                state.overflows], sys.argv[1] + "/rank" + os.environ["RANK"])
train_pretrain.train = train
train_sft.main(sys.argv[2:])
"""


def test_an_overflow_on_one_rank_is_skipped_by_both(world, tmp_path):
    script = tmp_path / "overflow.py"
    script.write_text(ONE_RANK_OVERFLOWS)
    done = torchrun(["--standalone", "--nproc_per_node", "2"], script, tmp_path, *world, *SFT,
                    "--dtype", "fp16", "--steps", "3", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [m["grad_norm"] is None for m in metrics(tmp_path / "out")] == [False, True, False]
    (first, *state), (second, *other) = (torch.load(tmp_path / f"rank{rank}", weights_only=True)
                                         for rank in (0, 1))
    assert state == other == [2.0**15, 1]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name, capability, expected, why", [
    ("Tesla V100", (7, 0), "fp16", "7.0"), ("Tesla T4", (7, 5), "fp16", "7.5"),
    ("NVIDIA A100", (8, 0), "bf16", "natively"), ("NVIDIA H100", (9, 0), "bf16", "natively")])
def test_auto_on_cuda(monkeypatch, name, capability, expected, why):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation: including_emulation or capability >= (8, 0))
    dtype, told = choose_dtype("auto", torch.device("cuda", 0))
    assert dtype == expected and name in told and why in told
    assert choose_dtype("fp32", torch.device("cuda", 0)) == ("fp32", "as asked")
    # A chat takes float32 where training takes scaled fp16: it has no loss to scale.
    suits = torch.bfloat16 if expected == "bf16" else torch.float32
    assert inference_dtype(torch.device("cuda", 0), None)[0] == suits
    assert inference_dtype(torch.device("cuda", 0), "fp32") == (torch.float32, "as asked")


def test_all_ranks_take_what_rank_0_has_measured(monkeypatch, capsys):
    """Two machines, or a busy moment: "auto" may come out differently on each of them."""
    class Ranks:
        device, main = torch.device("cpu"), True

        def gather(self, items):
            return [("fp32", "measured on rank 0"), *items]

    settings = SimpleNamespace(dtype="auto")
    monkeypatch.setattr(training.precision, "bf16_speedup", lambda: 3.0)
    resolve_dtype(settings, Ranks())
    assert settings.dtype == "fp32" and "fp32: measured on rank 0" in capsys.readouterr().out
