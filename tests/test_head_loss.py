"""Claims: the loss in chunks is the plain one, with the plain one's gradients, in every kind of
numbers; no more logits than a chunk's are ever there; none of them is computed twice."""

import pytest
import torch
import torch.nn.functional as F
from families import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from extras.memory import Alive
from model import loss as head_loss
from model.lora import add_lora
from tests.test_checkpointing import batch, learn, trained
from training.trainable import set_requires_grad

WORDS = 61


class Widest(TorchDispatchMode):
    """The most logits that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            # What ends in V is logits or like them, but for the table (V,D) seen from its side.
            if isinstance(each, torch.Tensor) and each.shape[-1:] == (WORDS,) != each.shape:
                rows = each.numel() // WORDS
                self.largest = max(self.largest, 0 if rows == 36 else rows * WORDS)
        return out


def all_at_once(vlm):
    """The reference: all logits and one cross entropy, and autograd does the rest."""
    ids, labels, pixels = batch()
    logits = vlm.language.logits(vlm.language.decode(vlm.embed(ids, pixels)))
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad for name, p in vlm.named_parameters() if p.requires_grad}


def assert_same_gradients(ours: dict, theirs: dict, limit: float) -> None:
    assert ours.keys() == theirs.keys() and theirs
    for name, gradient in theirs.items():
        # What a key's bias adds to all of a query's scores, softmax takes out again: without RoPE
        # its gradient is zero but for rounding, so its matrix tells what is small here.
        size = theirs[name.replace("k_proj.bias", "k_proj.weight") if name.startswith("vision")
                      else name].abs().max().item()
        assert_close(ours[name] / size, gradient / size, limit, name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["projector", "all"])
def test_chunked_logits_are_the_plain_ones(monkeypatch, how, tied):
    """27 supervised positions in chunks of 4, against one product and one cross entropy."""
    vlm, plain = trained(how, tied=tied), trained(how, tied=tied)
    monkeypatch.setitem(head_loss.CHUNK, "cpu", 4 * WORDS)
    with Widest() as seen:
        loss, gradients, _ = learn(vlm)
    assert 0 < seen.largest <= 4 * WORDS
    whole, theirs = all_at_once(plain)
    assert loss == pytest.approx(whole, rel=1e-6)
    assert_same_gradients(gradients, theirs, 1e-5)


def test_a_head_with_adapters(monkeypatch):
    def adapted():
        vlm = trained("all", tied=False)
        torch.manual_seed(2)
        add_lora(vlm.language, ["lm_head"], rank=2, alpha=4)
        torch.nn.init.normal_(vlm.language.lm_head.lora_b, std=0.1)
        set_requires_grad(vlm, language="lora")
        return vlm

    monkeypatch.setitem(head_loss.CHUNK, "cpu", 4 * WORDS)
    _, gradients, _ = learn(adapted())
    assert {"language.lm_head.lora_a", "language.lm_head.lora_b"} < gradients.keys()
    assert_same_gradients(gradients, all_at_once(adapted())[1], 1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("how", ["projector", "all"])
def test_in_chunks_as_in_one_piece_under_autocast(monkeypatch, how, dtype):
    """The sums of a chunk are rounded to 16 bits before they are added: so much may differ."""
    loss, whole, _ = learn(trained(how), dtype)
    monkeypatch.setitem(head_loss.CHUNK, "cpu", 4 * WORDS)
    again, gradients, _ = learn(trained(how), dtype)
    assert again == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(gradients, whole, 3e-2)


@pytest.mark.parametrize("language", ["none", "all"])
def test_no_logits_are_computed_twice(monkeypatch, language):
    vlm = trained("projector")
    set_requires_grad(vlm, language=language)
    torch.manual_seed(0)
    hidden, labels = torch.randn(27, 36, requires_grad=True), torch.randint(0, WORDS, (27,))
    monkeypatch.setitem(head_loss.CHUNK, "cpu", 4 * WORDS)
    with FlopCounterMode(display=False) as count:
        head_loss.head_loss(vlm.language, hidden, labels).backward()
    product = 2 * 27 * 36 * WORDS
    # Forwards; backwards to the hidden states; and to the table where it learns.
    assert count.get_total_flops() == product * (3 if language == "all" else 2)


def test_two_chunks_of_numbers_stand_at_a_time(monkeypatch):
    """The logits and what the gradient is written over; nothing of the chunk before."""
    language = trained("projector").language
    hidden, labels = torch.randn(900, 36, requires_grad=True), torch.randint(0, WORDS, (900,))
    monkeypatch.setitem(head_loss.CHUNK, "cpu", 300 * WORDS)
    with Alive(language) as alive:
        head_loss.head_loss(language, hidden, labels)
    states = 4 * (900 + 900 + 2 * 300) * 36  # hidden, its gradient, and those of two chunks
    assert 2.0 <= (alive.most - states) / (4 * 300 * WORDS) < 2.3


def gradient_in_fp16(factor: float, multiplied: float) -> torch.Tensor:
    """Of the hidden states: with gradients of about 1e-3 / multiplied in the backward pass."""
    vlm = trained("projector").half()
    torch.manual_seed(0)
    hidden = torch.randn(5, 36).half().requires_grad_()
    loss = head_loss.head_loss(vlm.language, hidden, torch.arange(5), factor)
    (loss * multiplied).backward()
    return hidden.grad.float() / multiplied


def test_small_and_large_gradients_survive_fp16():
    """A mean over 2^20 tokens is scaled up, so that fp16 can hold it; a sum alone is far larger
    than what a scale was found for. factor tells which of the two it will be."""
    exact = gradient_in_fp16(1.0, 1.0)
    assert exact.abs().max() > 1e-2
    for factor in (2.0**-6, 2.0**10):
        assert_close(gradient_in_fp16(factor, factor), exact, 2e-3 * exact.abs().max().item(), "")
    # Past 65,504 the gradient must say so: the loop halves the scale when it does.
    assert not gradient_in_fp16(2.0**22, 2.0**22).isfinite().all()
    # Whatever was said, the backward pass has the last word.
    assert_close(gradient_in_fp16(4.0, 1.0), exact, 2e-3 * exact.abs().max().item(), "")


def test_a_chunk_holds_at_least_one_row(monkeypatch):
    loss = learn(trained("projector"))[0]
    monkeypatch.setitem(head_loss.CHUNK, "cpu", 1)
    assert learn(trained("projector"))[0] == pytest.approx(loss, rel=1e-6)


def test_without_gradients_the_same_loss():
    vlm = trained("projector")
    with torch.no_grad():
        told, _ = vlm(*batch())
    assert not told.requires_grad and told.item() == learn(vlm)[0]
