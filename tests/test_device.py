"""Claims: the device that is chosen computes right; what has to be set there is set; a chat takes
the dtype that the hardware multiplies; running out of memory is a sentence that says what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as script
import train_pretrain
import train_sft
import training.precision
from extras.fast import prepare_for_inference
from extras.fast.layers import kernel_shares_heads
from extras.fast.quantize import is_quantized
from model.language import LanguageModel
from model.pretrained.public_config import read_language_config
from tests.tiny import ROOT, make_world
from training.device import (
    KERNEL_CACHES,
    choose_device,
    is_out_of_memory,
    prepare_device,
)
from training.inference import inference_dtype
from training.precision import bf16_speedup


@pytest.fixture
def untouched(monkeypatch):
    """What prepare_device changes for the whole process is put back."""
    for name in KERNEL_CACHES:
        monkeypatch.delenv(name, raising=False)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("cuda, mps, version, expected", [
    (True, False, "2.13.0+cu130", "cuda"), (False, True, "2.11.0", "mps"),
    (False, True, "2.13.0", "mps"), (False, True, "2.10.1", "cpu"), (False, True, "2.6.0", "cpu"),
    (False, False, "2.13.0+cpu", "cpu"), (True, True, "2.6.0", "cuda"),
    (False, True, "3.0.0a0+git12", "mps")])
def test_auto_chooses_a_device_that_computes_right(cuda, mps, version, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "__version__", version)
    assert choose_device().type == choose_device("auto").type == expected
    if mps:
        assert choose_device("mps").type == "mps", "who asks for a device by name gets it"


def test_the_graph_is_recorded_on_the_device_that_was_named(untouched, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    prepare_device(torch.device("cuda:1"))
    assert current == [torch.device("cuda:1")]
    prepare_device(torch.device("cuda")), prepare_device(torch.device("cpu"))
    assert len(current) == 1


def test_attention_never_goes_to_cudnn(untouched):
    torch.backends.cuda.enable_cudnn_sdp(True)
    prepare_device(torch.device("cpu"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_onednn_keeps_few_kernels_unless_the_user_says_otherwise(untouched, monkeypatch):
    prepare_device(torch.device("cpu"))
    assert {name: os.environ[name] for name in KERNEL_CACHES} == KERNEL_CACHES
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    prepare_device(torch.device("cpu"))
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"


def test_both_stages_and_the_chat_prepare_their_device(untouched, tmp_path, monkeypatch):
    world = make_world(tmp_path / "world")
    for main in (train_pretrain.main, train_sft.main):
        monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
        main([*world, "--steps", "1", "--out", str(tmp_path / main.__module__),
              *(["--model", str(tmp_path / "train_pretrain"), "--lora"]
                if main is train_sft.main else [])])
        assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    flags = script.read_flags(["--model", str(tmp_path / "train_sft"), "--device", "cpu"])
    script.load_model(flags, flags.model)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"


def test_apple_gpus_refuse_16_bits():
    with pytest.raises(ValueError, match="--device mps computes wrongly in .*--dtype fp32"):
        inference_dtype(torch.device("mps"), "bf16")
    for device, name, dtype in (("mps", "fp32", torch.float32), ("cuda", "bf16", torch.bfloat16),
                                ("cpu", "bf16", torch.bfloat16)):
        assert inference_dtype(torch.device(device), name) == (dtype, "as asked")


def test_the_chat_refuses_16_bits_on_mps_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="eval.py: --device mps computes wrongly in bfloat16"):
        script.main(["--device", "mps", "--dtype", "bf16", "--prompt", "x"])
    assert inference_dtype(torch.device("mps"), None)[0] == torch.float32


class OnDevice:
    """As much of a tensor as the question of heads looks at."""

    def __init__(self, kind):
        self.device = torch.device(kind)


@pytest.mark.parametrize("kind, shares", [("cpu", True), ("mps", False), ("xpu", False)])
def test_only_the_cpu_and_flash_attention_share_heads(kind, shares):
    """Apple's kernels abort or give wrong numbers when asked for grouped heads."""
    t = OnDevice(kind)
    assert kernel_shares_heads(t, t, t, None) is shares


# ---------------------------------------------------------------- the dtype of a chat


def test_bf16_is_timed_against_float32(monkeypatch):
    """By a clock that each product moves on by what it is said to take."""
    now, cost = [0.0], {torch.float32: 2.0, torch.bfloat16: 0.5}

    def linear(x, weight):
        now[0] += cost[x.dtype]

    monkeypatch.setattr(training.precision.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(training.precision.F, "linear", linear)
    bf16_speedup.cache_clear()
    assert bf16_speedup() == 4.0
    assert bf16_speedup.cache_info().misses == 1
    bf16_speedup.cache_clear()


@pytest.mark.parametrize("native", [True, False])
def test_a_chat_takes_bf16_where_the_processor_is_faster_in_it(native, monkeypatch):
    monkeypatch.setattr(training.precision, "bf16_speedup", lambda: 2.0 if native else 0.5)
    cpu = torch.device("cpu")
    dtype, why = inference_dtype(cpu, None)
    assert dtype == (torch.bfloat16 if native else torch.float32)
    assert why == ("its products are 2.0 times as fast as float32's here" if native else
                   "bf16 products are 0.5 times as fast here")
    assert inference_dtype(cpu, "fp32")[0] == torch.float32
    # bf16 weights: multiplied as they are, or read as bf16 and multiplied in float32.
    model = LanguageModel(read_language_config(dict(
        model_type="qwen2", vocab_size=32, hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)))
    prepare_for_inference(model, cpu, torch.bfloat16)
    assert is_quantized(model) is not native
    assert model.norm.weight.dtype == (torch.bfloat16 if native else torch.float32)


def test_stats_tell_the_dtype_and_why(tmp_path, capsys):
    world = make_world(tmp_path / "world")
    train_pretrain.main([*world, "--steps", "1", "--out", str(tmp_path / "run")])
    capsys.readouterr()
    for flags, expected in (([], f"dtype: {told(inference_dtype(torch.device('cpu'), None))}"),
                            (["--dtype", "fp32"], "dtype: float32 (as asked)")):
        script.main(["--model", str(tmp_path / "run"), "--device", "cpu", "--prompt", "x",
                     "--max_new_tokens", "2", "--stats", *flags])
        assert expected in capsys.readouterr().err.splitlines()


def told(dtype_and_why) -> str:
    return f"{str(dtype_and_why[0]).removeprefix('torch.')} ({dtype_and_why[1]})"


# ---------------------------------------------------------------- out of memory


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't "
                  "allocate memory: you tried to allocate 80 bytes."), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"), True),
    (MemoryError(), True), (ValueError("x"), False),
    (RuntimeError("shape '[2]' is invalid for input of size 3"), False)])
def test_out_of_memory_is_known_on_every_device(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_real_allocation_that_fails_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("size, said", [
    (4, "--batch_size 2 --gradient_accumulation_steps 2 takes the same samples in each step"),
    (3, "--batch_size 2 --gradient_accumulation_steps 2 takes about as many samples"),
    (1, "What helps: --gradient_checkpoint")])
def test_training_says_what_makes_a_step_smaller(size, said, tmp_path, monkeypatch):
    world = make_world(tmp_path / "world")

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("train_pretrain.backward", fail)
    flags = [*world, "--batch_size", str(size), "--gradient_accumulation_steps", "1", "--out",
             str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        train_pretrain.main(flags)
    text = str(stopped.value)
    assert "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB." in text and said in text
    assert "--resume" not in text, "there is no checkpoint to go on from"
    assert "`python -m extras.memory emoji` with the flags of this run predicts" in text
    monkeypatch.undo()
    train_pretrain.main([*flags, "--steps", "2", "--save_steps", "2"])
    monkeypatch.setattr("train_pretrain.backward", fail)
    with pytest.raises(SystemExit, match="--resume goes on from the last checkpoint"):
        train_pretrain.main([*flags, "--steps", "4", "--resume"])


def test_another_error_stays_a_traceback(tmp_path, monkeypatch):
    world = make_world(tmp_path / "world")

    def fail(*_, **__):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr("train_pretrain.backward", fail)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        train_pretrain.main([*world, "--out", str(tmp_path / "run")])


def test_eval_says_what_takes_less_memory(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(script, "load_model", fail)
    with pytest.raises(SystemExit, match="out of memory.*\n.*--quantize int8"):
        script.main(["--prompt", "x"])


def test_memory_does_not_grow_with_the_number_of_shapes():
    """Where the processor multiplies bf16, oneDNN compiles a kernel for each new shape."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor's bf16 products do not go through oneDNN")
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux says how much memory a process holds now")
    code = """
import os, resource, sys, torch, torch.nn.functional as F
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.pop(name, None)
if sys.argv[1] == "bounded":
    from training.device import prepare_device
    prepare_device(torch.device("cpu"))
w = torch.randn(256, 256).bfloat16()
def held(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6
for n in range(1, 65): F.linear(torch.randn(n, 256).bfloat16(), w)
before = held()
for n in range(65, 500): F.linear(torch.randn(n, 256).bfloat16(), w)
print(held() - before)
"""
    grown = {how: float(subprocess.run([sys.executable, "-c", code, how], cwd=ROOT, check=True,
                                       capture_output=True, text=True).stdout)
             for how in ("bounded", "free")}
    assert grown["bounded"] < grown["free"] / 4, grown


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "gpu", "mps", "cpu:1", "cuda:x", "tpu", ""])
def test_a_device_that_is_not_there_is_a_sentence(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"--device {name}: this machine has cpu, as far as"):
        choose_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(SystemExit, match="--device cuda:2: this machine has cpu, cuda:0 to cuda:1"):
        choose_device("cuda:2")
