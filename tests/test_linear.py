"""Claims: a row taken through parts of a matrix gives what F.linear gives, gradients included; only
one float32 row on a CPU with several threads goes that way; a chat says the same words by it."""

import pytest
import torch
import torch.nn.functional as F

from model import linear
from model.config import LanguageConfig
from model.generate import generate
from model.language import LanguageModel
from model.linear import Linear, product, suits_batch


@pytest.fixture(params=[2, 3])
def threads(request, monkeypatch):
    """So many threads, as far as linear.py knows, and no matrix is too small."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    monkeypatch.setattr(linear, "SMALLEST", 1)
    return request.param


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96)])
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 48)])
def test_equals_linear(threads, shape, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(48, 96, requires_grad=True)
    assert suits_batch(x, weight, threads)
    found, wanted = product(x, weight, bias), F.linear(x, weight, bias)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, rtol=0, atol=2e-5)
    direction = torch.randn_like(wanted)
    for mine, theirs in zip(torch.autograd.grad(found, (x, weight), direction),
                            torch.autograd.grad(wanted, (x, weight), direction)):
        assert torch.allclose(mine, theirs, rtol=0, atol=2e-5)


def test_what_does_not_suit_goes_the_usual_way(threads):
    row, weight = torch.randn(1, 1, 96), torch.randn(48, 96)
    assert suits_batch(row, weight, threads)
    assert not suits_batch(torch.randn(1, 2, 96), weight, threads)  # two rows
    assert not suits_batch(row.bfloat16(), weight.bfloat16(), threads)
    assert not suits_batch(row, weight, 1)
    assert not suits_batch(row.to("meta"), weight.to("meta"), threads)
    odd = torch.randn(47, 96)  # no threads of these share 47 rows
    assert not suits_batch(row, odd, threads)
    assert torch.equal(product(row, odd), F.linear(row, odd))


def test_small_matrices_stay_whole():
    assert not suits_batch(torch.randn(1, 64), torch.randn(64, 64), 2)
    assert suits_batch(torch.randn(1, 576), torch.randn(576, 576), 2)  # SmolLM2's smallest but one


def test_a_chat_says_the_same(threads, monkeypatch):
    torch.manual_seed(0)
    model = LanguageModel(LanguageConfig.from_public(dict(
        model_type="qwen2", vocab_size=96, hidden_size=48, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True))).eval()
    assert isinstance(model.layers[0].mlp.up_proj, Linear)
    in_parts, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *each: in_parts.append(1) or bmm(*each))
    said = list(generate(model, [5, 7, 11], None, max_new_tokens=12))
    assert len(in_parts) > 12 * 2 * 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert list(generate(model, [5, 7, 11], None, max_new_tokens=12)) == said
