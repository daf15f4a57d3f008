"""Claims: the loss in chunks, plain and fast, is one cross entropy of all logits, with its
gradients, in every dtype; no more logits than a chunk's exist at a time; the fast one computes none
twice."""

import pytest
import torch
import torch.nn.functional as F
from families import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from extras.fast import chunked_cross_entropy as fast_loss
from extras.memory import MemoryTracker
from model import loss as plain_loss
from model.lora import add_lora
from tests.test_checkpointing import batch, learn, trained
from training.optim import set_requires_grad

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


@pytest.fixture(params=["plain", "fast"])
def chunks_of(request, monkeypatch):
    """-> a function that limits the logits of a chunk; the test runs with either loss."""
    def limit(logits: int):
        monkeypatch.setattr(plain_loss, "CHUNK", logits)
        monkeypatch.setitem(fast_loss.CHUNK, "cpu", logits)

    if request.param == "fast":
        monkeypatch.setattr("model.vlm.chunked_cross_entropy", fast_loss.chunked_cross_entropy)
    return limit


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
def test_chunked_logits_are_the_plain_ones(chunks_of, how, tied):
    """27 supervised positions in chunks of 4, against one product and one cross entropy."""
    vlm, plain = trained(how, tied=tied), trained(how, tied=tied)
    chunks_of(4 * WORDS)
    with Widest() as seen:
        loss, gradients, _ = learn(vlm)
    assert 0 < seen.largest <= 4 * WORDS
    whole, theirs = all_at_once(plain)
    assert loss == pytest.approx(whole, rel=1e-6)
    assert_same_gradients(gradients, theirs, 1e-5)


def test_a_head_with_adapters(chunks_of):
    def adapted():
        vlm = trained("all", tied=False)
        torch.manual_seed(2)
        add_lora(vlm.language, ["lm_head"], rank=2, alpha=4)
        torch.nn.init.normal_(vlm.language.lm_head.lora_b, std=0.1)
        set_requires_grad(vlm, language="lora")
        return vlm

    chunks_of(4 * WORDS)
    _, gradients, _ = learn(adapted())
    assert {"language.lm_head.lora_a", "language.lm_head.lora_b"} < gradients.keys()
    assert_same_gradients(gradients, all_at_once(adapted())[1], 1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("how", ["projector", "all"])
def test_in_chunks_as_in_one_piece_under_autocast(chunks_of, how, dtype):
    """The sums of a chunk are rounded to 16 bits before they are added: so much may differ."""
    loss, whole, _ = learn(trained(how), dtype)
    chunks_of(4 * WORDS)
    again, gradients, _ = learn(trained(how), dtype)
    assert again == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(gradients, whole, 3e-2)


@pytest.mark.parametrize("language", ["none", "all"])
def test_no_logits_are_computed_twice(monkeypatch, language):
    vlm = trained("projector")
    set_requires_grad(vlm, language=language)
    torch.manual_seed(0)
    hidden, labels = torch.randn(27, 36, requires_grad=True), torch.randint(0, WORDS, (27,))
    monkeypatch.setitem(fast_loss.CHUNK, "cpu", 4 * WORDS)
    with FlopCounterMode(display=False) as count:
        fast_loss.chunked_cross_entropy(vlm.language, hidden, labels).backward()
    product = 2 * 27 * 36 * WORDS
    # Forwards; backwards to the hidden states; and to the table where it learns.
    assert count.get_total_flops() == product * (3 if language == "all" else 2)


def test_two_chunks_of_numbers_stand_at_a_time(monkeypatch):
    """The logits and what the gradient is written over; nothing of the chunk before."""
    language = trained("projector").language
    hidden, labels = torch.randn(900, 36, requires_grad=True), torch.randint(0, WORDS, (900,))
    monkeypatch.setitem(fast_loss.CHUNK, "cpu", 300 * WORDS)
    with MemoryTracker(language) as alive:
        fast_loss.chunked_cross_entropy(language, hidden, labels)
    states = 4 * (900 + 900 + 2 * 300) * 36  # hidden, its gradient, and those of two chunks
    assert 2.0 <= (alive.most - states) / (4 * 300 * WORDS) < 2.3


def gradient_in_fp16(loss_function, scale: float) -> torch.Tensor:
    """Of the hidden states, when the loss is scaled before the backward pass."""
    vlm = trained("projector").half()
    torch.manual_seed(0)
    hidden = torch.randn(5, 36).half().requires_grad_()
    loss = loss_function(vlm.language, hidden, torch.arange(5))
    (loss * scale).backward()
    return hidden.grad.float() / scale


@pytest.mark.parametrize("loss_function", [plain_loss.chunked_cross_entropy,
                                           fast_loss.chunked_cross_entropy])
def test_small_and_large_gradients_survive_fp16(loss_function):
    """A mean over 2^20 tokens is scaled up, so that fp16 can hold it; a sum alone is far larger
    than what a scale was found for."""
    exact = gradient_in_fp16(loss_function, 1.0)
    assert exact.abs().max() > 1e-2
    for scale in (2.0**-6, 2.0**10):
        assert_close(gradient_in_fp16(loss_function, scale), exact,
                     2e-3 * exact.abs().max().item(), "")
    # Past 65,504 the gradient must say so: the loop halves the scale when it does.
    assert not gradient_in_fp16(loss_function, 2.0**22).isfinite().all()


def test_a_chunk_holds_at_least_one_row(chunks_of):
    loss = learn(trained("projector"))[0]
    chunks_of(1)
    assert learn(trained("projector"))[0] == pytest.approx(loss, rel=1e-6)


def test_without_gradients_the_same_loss(chunks_of):
    vlm = trained("projector")
    with torch.no_grad():
        loss, _ = vlm(*batch())
    assert not loss.requires_grad and loss.item() == learn(vlm)[0]
