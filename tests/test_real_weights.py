"""Claim: on real public weights too, logits and features are those of the public classes.

Needs the real weights ($VLM_WEIGHTS or ../weights); skipped where there are none.
"""

import math

import pytest
import torch
import transformers
from conftest import needed, weights_dir
from families import assert_close

from dataset.tokenizer import Tokenizer
from model.pretrained.load import load_language, load_vision

TEXT = ("The cat sat on the mat and looked out of the window. It was raining, and the streets "
        "of the city were empty. The capital of France is Paris, and the capital of Italy is")


@pytest.fixture(scope="module")
def smollm2():
    directory = needed(weights_dir(), "smollm2")
    return directory, load_language(directory).requires_grad_(False)


@torch.no_grad()
def test_smollm2_logits_equal_the_public_implementation(smollm2):
    directory, ours = smollm2
    theirs = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([Tokenizer.from_directory(directory).encode(TEXT)])
    assert_close(ours(ids), theirs(ids).logits, 2e-4, "SmolLM2-135M")


@torch.no_grad()
def test_smollm2_reads_text_far_better_than_chance(smollm2):
    """The check that the weights are there at all: a random model's loss is ln V = 10.8."""
    directory, ours = smollm2
    ids = torch.tensor([Tokenizer.from_directory(directory).encode(TEXT)])
    loss = torch.nn.functional.cross_entropy(ours(ids)[0, :-1], ids[0, 1:]).item()
    print(f"loss of SmolLM2-135M on a plain English text: {loss:.2f}")
    assert loss < 0.4 * math.log(ours.config.vocab_size)


@pytest.mark.parametrize("size, layer", [
    ((224, 224), -1), ((224, 224), -2), ((224, 224), -4), ((224, 308), -1), ((518, 518), -1)])
@torch.no_grad()
def test_dinov2_features_equal_the_public_implementation(size, layer):
    directory = needed(weights_dir(), "dinov2s")
    theirs = transformers.Dinov2Model.from_pretrained(directory, dtype=torch.float32)
    ours = load_vision(directory, feature_layer=layer)
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    out = theirs(pixels, output_hidden_states=True)
    expected = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
    assert ours(pixels).shape[1] == (size[0] // 14) * (size[1] // 14)
    assert_close(ours(pixels), expected[:, 1:], 2e-4, f"DINOv2-S {size}, layer {layer}")
