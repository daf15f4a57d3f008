"""Claims: layers laid end to end give what they gave apart, in each kind of decoder and of numbers,
for a prompt and for steps; they take the same memory and fewer operations; a chat has them."""

import copy
from collections import Counter

import pytest
import torch
from tiny import make_runs
from torch.utils._python_dispatch import TorchDispatchMode

import eval as script
from extras.attention import each_layer
from extras.fast.fused import FusedGateUpMLP, FusedQKVAttention, fuse
from extras.fast.quantize import BITS, quantize, set_compute_dtype
from model.generate import KVCache
from model.language import LanguageModel
from model.lora import add_lora, merge_lora
from tests.test_quantize import tiny_language

KINDS = {
    "biases, as Qwen2": dict(qkv_bias=True),
    "norms of heads, as Qwen3": dict(qk_norm=True, head_dim=32),
    "neither, as Llama": dict(num_key_value_heads=1),
    "no heads shared": dict(num_key_value_heads=4),
}


def decoder(**facts) -> LanguageModel:
    """Norms and biases are random too: a 1 or a 0 would hide one that is forgotten."""
    model = tiny_language(**{**dict(hidden_size=64, head_dim=16, qkv_bias=False), **facts})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model


def both(model) -> tuple[LanguageModel, LanguageModel]:
    fused = copy.deepcopy(model)
    fuse(fused)
    for layer in fused.layers:
        assert isinstance(layer.self_attn, FusedQKVAttention)
        assert isinstance(layer.mlp, FusedGateUpMLP)
    return model, fused


@torch.inference_mode()
def answers(model):
    """-> the logits of a prompt of two rows, and of five steps of one token each"""
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    cache, told = KVCache(2, 12), []
    for part in ids.split([7, 1, 1, 1, 1, 1], dim=1):
        told.append(model.logits(model.decode(model.embed(part), cache=cache)))
    return torch.cat(told, dim=1)


@pytest.mark.parametrize("bits", [None, *BITS])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_equals_apart(kind, bits):
    apart = decoder(**KINDS[kind])
    if bits:
        quantize(apart, bits)
    apart, fused = both(apart)
    # Kernels that take x in bf16 round it to 8 bits: a last bit that differs becomes 1/256.
    most = 1e-5 if bits is None else 0.03
    wanted = answers(apart)
    assert float((answers(fused) - wanted).abs().max()) < most * float(wanted.abs().max())
    assert float(wanted.std()) > 0.3, "and it is no comparison of zeros"


def test_in_pure_bf16_too():
    apart = decoder(qk_norm=True, qkv_bias=True)
    set_compute_dtype(apart, torch.bfloat16)
    apart, fused = both(apart)
    wanted = answers(apart).float()
    assert float((answers(fused).float() - wanted).abs().max()) < 0.03 * float(wanted.abs().max())


@pytest.mark.parametrize("swapped", ["q_proj", "k_proj", "v_proj"])
def test_the_comparison_tells_a_wrong_row(swapped):
    apart, fused = both(decoder())
    weight = apart.layers[1].self_attn.get_submodule(swapped).weight
    with torch.no_grad():
        weight[[3, 4]] = weight[[4, 3]]
    wanted = answers(apart)
    assert float((answers(fused) - wanted).abs().max()) > 1e-3 * float(wanted.abs().max())


@pytest.mark.parametrize("bits", [None, *BITS])
def test_the_same_bytes(bits):
    apart = decoder(qkv_bias=True)
    if bits:
        quantize(apart, bits)
    sizes = [sum(p.numel() * p.element_size() for p in each.parameters()) for each in both(apart)]
    assert sizes[0] == sizes[1]
    assert not any(p.requires_grad for layer in both(apart)[1].layers
                   for name, p in layer.named_parameters() if "qkv" in name or "gate_up" in name)


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.asked = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.asked[function.overloadpacket.__name__] += 1
        return function(*args, **kwargs or {})


def test_fewer_operations():
    told = []
    for model in both(decoder()):
        with Counting() as counting, torch.no_grad():
            model(torch.tensor([[5]]))
        told.append(counting.asked)
    apart, fused = told
    assert apart["mm"] - fused["mm"] == 2 * 3  # in each of two layers: two of q, k, v; gate or up
    assert fused["neg"] == 2 < apart["neg"] == 4


def test_the_map_of_attention_is_the_same():
    apart, fused = both(decoder(qk_norm=True))
    embeds = apart.embed(torch.tensor([[1, 2, 3, 4, 5]]))
    for (wanted, _), (found, _) in zip(each_layer(apart, embeds), each_layer(fused, embeds)):
        assert float((found - wanted).abs().max()) < 1e-5


def test_adapters_are_refused_before_anything_is_fused():
    model = decoder()
    add_lora(model, ["v_proj"], rank=2, alpha=4.0)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.v_proj has an adapter"):
        fuse(model)
    assert not any(isinstance(layer.self_attn, FusedQKVAttention) for layer in model.layers)
    merge_lora(model)
    fuse(model)


def test_a_chat_has_them(tmp_path):
    make_runs(tmp_path)
    flags = script.read_flags(["--device", "cpu"])
    model, _, _ = script.load_model(flags, str(tmp_path / "sft"))  # its adapters merged
    assert all(isinstance(layer.self_attn, FusedQKVAttention) for layer in model.language.layers)
