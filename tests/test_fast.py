"""Claims: what extras/fast puts in place of the plain core computes the same: losses, gradients and
greedy tokens; parameters keep their names; and the core works without extras/, evaluation/ and
benchmarks/."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from families import tiny_vlm

from extras.fast import INFERENCE, TRAINING, prepare_for_inference, prepare_for_training
from model.generate import generate
from model.lora import add_lora, merge_lora
from tests.test_checkpointing import batch, learn, trained
from tests.tiny import ROOT
from training import inference

CPU = torch.device("cpu")


def fast_training(vlm):
    prepare_for_training(vlm)
    return vlm


@pytest.mark.parametrize("how", ["projector", "lora", "all", "last:1"])
def test_losses_and_gradients_of_training(how):
    plain, fast = trained(how), trained(how)
    fast.load_state_dict(plain.state_dict())
    loss, gradients, kept = learn(plain)
    fast_loss, fast_gradients, kept_by_fast = learn(fast_training(fast))
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert fast_gradients.keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        size = gradients[name.replace("k_proj.bias", "k_proj.weight")].norm()
        assert (fast_gradients[name] - gradient).norm() <= 1e-6 * size, name
    assert kept_by_fast < kept, "less is kept for the backward pass"


@pytest.mark.parametrize("dtype, limit", [("bf16", 6e-2), ("fp16", 1e-2)])
def test_under_autocast_they_differ_by_rounding_alone(dtype, limit):
    plain, fast = trained("lora"), trained("lora")
    fast.load_state_dict(plain.state_dict())
    loss, gradients, kept = learn(plain, dtype)
    fast_loss, fast_gradients, kept_by_fast = learn(fast_training(fast), dtype)
    assert fast_loss == pytest.approx(loss, rel=1e-3)
    for name, gradient in gradients.items():
        assert (fast_gradients[name] - gradient).norm() <= limit * gradient.norm(), name
    assert kept_by_fast < kept


def test_everything_is_swapped_and_keeps_its_name():
    vlm = trained("lora")
    names = [name for name, _ in vlm.named_parameters()]
    prepare_for_training(vlm)
    assert [name for name, _ in vlm.named_parameters()] == names
    kinds = {type(part) for part in vlm.language.modules()}
    assert kinds >= set(TRAINING.values()) and not kinds & TRAINING.keys()


@pytest.mark.parametrize("facts", [{}, {"tied": False}])
@pytest.mark.parametrize("adapted", [False, True])
def test_greedy_tokens_of_inference(adapted, facts):
    plain = tiny_vlm(**facts).eval()
    for parameter in plain.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    if adapted:
        add_lora(plain.language, ["q_proj", "down_proj"], rank=2, alpha=4)
        for name, p in plain.language.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(p, std=0.1)
    fast = copy.deepcopy(plain)
    merge_lora(fast.language)
    prepare_for_inference(fast, CPU)
    kinds = {type(part) for part in fast.language.modules()}
    assert kinds >= set(INFERENCE.values()) and not kinds & INFERENCE.keys()
    ids, _, pixels = batch(1)
    tokens = list(generate(plain, ids[0].tolist(), pixels, max_new_tokens=40))
    assert list(generate(fast, ids[0].tolist(), pixels, max_new_tokens=40)) == tokens
    assert len(set(tokens)) > 3, "a model that repeats one token would prove nothing"


CORE_ALONE = """
import sys

class Deleted:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("extras", "evaluation", "benchmarks"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Deleted())
import torch
from model.pretrained.public_config import read_language_config
from model.generate import generate
from model.language import LanguageModel
from model.lora import add_lora, merge_lora
from model.loss import chunked_cross_entropy
from model.vision import VisionTransformer

model = LanguageModel(read_language_config(dict(
    model_type="qwen2", vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1)))
add_lora(model, ["q_proj"], 2, 4)
ids = torch.arange(6)[None]
chunked_cross_entropy(model, model.decode(model.embed(ids))[0], ids[0]).backward()
merge_lora(model)
print(len(list(generate(model, [1, 2, 3], max_new_tokens=4))))
"""


def test_the_models_work_alone():
    done = subprocess.run([sys.executable, "-c", CORE_ALONE], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == "4", done.stdout + done.stderr


def test_a_package_that_is_missing_inside_the_extras_is_an_error(monkeypatch):
    """Only where extras/ itself is not there the plain layers serve, without a word."""
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "extras.fast":
                raise ModuleNotFoundError("No module named 'gone'", name="gone")

    monkeypatch.delitem(sys.modules, "extras.fast", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="gone"):
        inference.prepare_model(tiny_vlm(), torch.device("cpu"), torch.float32, None)
