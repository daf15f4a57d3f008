"""Claims: one row through a matrix gives what F.linear gives in every way, gradients included; a
way is taken only where a measurement says that it is clearly faster; a chat says the same by it."""

import math
import time

import pytest
import torch
import torch.nn.functional as F

from extras.fast import gemv, prepare_for_inference
from extras.fast.gemv import (
    OTHER_ROUTINES,
    GEMVLinear,
    batched_gemv,
    fastest_routine,
    linear,
    routine_for,
    torch_mv,
    use_fastest_routine,
)
from model.generate import generate
from model.language import LanguageModel
from model.pretrained.public_config import read_language_config


@pytest.fixture(autouse=True)
def measured_anew():
    fastest_routine.cache_clear()
    yield
    fastest_routine.cache_clear()


@pytest.fixture
def other_way(monkeypatch):
    """The measurement has decided against F.linear, and no matrix is too small."""
    monkeypatch.setattr(gemv, "fastest_routine", lambda dtype, threads: OTHER_ROUTINES[dtype])
    monkeypatch.setattr(gemv, "SMALLEST", 1)


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96)])
@pytest.mark.parametrize("rows", [64, 48, 47, 1])  # 64, 16, 1 and 1 parts
@pytest.mark.parametrize("biased", [False, True])
def test_equals_linear(other_way, shape, rows, biased):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(rows, 96, requires_grad=True)
    bias = torch.linspace(-1, 1, rows) if biased else None
    found, wanted = linear(x, weight, bias), F.linear(x, weight, bias)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, rtol=0, atol=2e-5)
    direction = torch.randn_like(wanted)
    for mine, theirs in zip(torch.autograd.grad(found, (x, weight), direction),
                            torch.autograd.grad(wanted, (x, weight), direction)):
        assert torch.allclose(mine, theirs, rtol=0, atol=2e-5)


def test_bf16_equals_linear_but_for_rounding(other_way):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, 512).bfloat16(), torch.randn(256, 512).bfloat16()
    exact = F.linear(x.double(), weight.double())
    for way in (linear, F.linear):
        assert torch.allclose(way(x, weight).double(), exact, rtol=2**-7, atol=0.2)
    assert linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [9728, 151936, 49152, 3072, 576, 1152])
def test_every_number_of_threads_gets_parts(rows):
    """Rows of SmolLM2's and Qwen2.5-0.5B's matrices: few are divided by 6, 10, 12, 20 or 24."""
    assert math.gcd(rows, 64) == 64


def test_what_does_not_suit_goes_the_usual_way(monkeypatch):
    weight, called = torch.randn(1024, 1024), []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setitem(OTHER_ROUTINES, dtype, lambda x, w: called.append(1) or torch.mv(w, x))
    monkeypatch.setattr(gemv, "fastest_routine", lambda dtype, threads: OTHER_ROUTINES[dtype])

    def taken(x, weight) -> bool:
        called.clear()
        linear(x, weight)
        return bool(called)

    row = torch.randn(1, 1, 1024)
    assert taken(row, weight) and taken(row.bfloat16(), weight.bfloat16())
    assert not taken(torch.randn(1, 2, 1024), weight)  # two rows
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken(row.bfloat16(), weight)
    assert not taken(row.half(), weight.half())
    assert not taken(row.to("meta"), weight.to("meta"))
    assert not taken(torch.randn(1, 64), torch.randn(64, 64))  # small ones stay whole
    assert taken(torch.randn(1, 576), torch.randn(576, 576))  # SmolLM2's smallest but one
    assert routine_for(weight) is not F.linear and routine_for(weight.to("meta")) is F.linear


@pytest.mark.parametrize("faster", [False, True])
def test_layers_are_swapped_where_it_is_faster(monkeypatch, faster):
    monkeypatch.setattr(gemv, "fastest_routine",
                        lambda dtype, threads: OTHER_ROUTINES[dtype] if faster else F.linear)
    large, small = torch.nn.Linear(1024, 1024), torch.nn.Linear(16, 16)
    use_fastest_routine(torch.nn.Sequential(large, small))
    assert type(large) is (GEMVLinear if faster else torch.nn.Linear)
    assert type(small) is torch.nn.Linear


@pytest.mark.parametrize("dtype", OTHER_ROUTINES)
@pytest.mark.parametrize("usual, other, takes_other", [
    (2.0, 1.0, True), (1.0, 2.0, False), (1.1, 1.0, False)])
def test_the_measurement_decides(dtype, usual, other, takes_other, monkeypatch):
    """By a clock that each way moves on by what it is said to take."""
    now = [0.0]

    def taking(seconds):
        def way(x, weight):
            now[0] += seconds
        return way

    usual, other = taking(usual), taking(other)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(gemv.F, "linear", usual)
    monkeypatch.setitem(OTHER_ROUTINES, dtype, other)
    assert fastest_routine(dtype, 2) is (other if takes_other else usual)


@pytest.mark.parametrize("dtype", OTHER_ROUTINES)
def test_it_is_measured_once_and_never_clearly_slower(dtype):
    chosen = fastest_routine(dtype, torch.get_num_threads())
    assert chosen in (F.linear, OTHER_ROUTINES[dtype])
    assert fastest_routine.cache_info().misses == 1
    fastest_routine(dtype, torch.get_num_threads())
    assert fastest_routine.cache_info().misses == 1


def test_what_is_measured_is_what_is_called(monkeypatch):
    row, weight = torch.randn(1, 1024), torch.randn(1024, 1024)
    called = []
    monkeypatch.setitem(OTHER_ROUTINES, torch.float32,
                        lambda x, w: called.append(1) or batched_gemv(x, w))
    monkeypatch.setattr(gemv, "fastest_routine", lambda dtype, threads: F.linear)
    assert torch.equal(linear(row, weight), F.linear(row, weight)) and not called
    monkeypatch.setattr(gemv, "fastest_routine", lambda dtype, threads: OTHER_ROUTINES[dtype])
    linear(row, weight)
    assert called


def test_a_chat_says_the_same(monkeypatch):
    torch.manual_seed(0)
    model = LanguageModel(read_language_config(dict(
        model_type="qwen2", vocab_size=96, hidden_size=48, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True))).eval()
    said = list(generate(model, [5, 7, 11], None, max_new_tokens=12))
    monkeypatch.setattr(gemv, "SMALLEST", 1)
    rows = []
    monkeypatch.setattr(gemv, "fastest_routine",
                        lambda *_: lambda x, weight: rows.append(1) or batched_gemv(x, weight))
    prepare_for_inference(model, torch.device("cpu"))
    assert isinstance(model.layers[0].mlp.gate_up_proj, GEMVLinear)
    assert list(generate(model, [5, 7, 11], None, max_new_tokens=12)) == said
    assert len(rows) > 12 * 2 * 4


def test_a_vector_is_multiplied_as_a_row():
    x, weight = torch.randn(96), torch.randn(48, 96)
    assert torch.allclose(torch_mv(x, weight), F.linear(x, weight), rtol=0, atol=2e-5)
