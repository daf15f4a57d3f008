"""For inference: layers that read the same x become one. A decoder in, the same one out.

    q_proj (576,576), k_proj (192,576), v_proj (192,576)  ->  qkv_proj (960,576)
    gate_proj (1536,576), up_proj (1536,576)              ->  gate_up_proj (3072,576)

In a chat one row at a time goes through the decoder, and each of the hundreds of operations of a
step costs some microseconds however small it is. Fused there are fewer: one product in place of
three, and since q's heads and k's are neighbours then, RoPE rotates them together. The results are
the same, and so is the memory. In training the layers stay apart: files and adapters know them by
name, and with many rows a product takes as long as its arithmetic.
"""

import torch
import torch.nn.functional as F
from torch import nn

from extras.fast.layers import SharedHeadsAttention
from extras.fast.quantize import QuantizedLinear
from model.language import MLP, Attention, LanguageModel, RMSNorm, apply_rope
from model.lora import LoRALinear, linear_names


class FusedQKVAttention(SharedHeadsAttention):
    def __init__(self, attention: Attention):
        nn.Module.__init__(self)  # Attention's own would make random weights
        self.num_heads = attention.num_heads
        self.num_key_value_heads = attention.num_key_value_heads
        self.head_dim, self.qk_norm = attention.head_dim, attention.qk_norm
        self.qkv_proj = concatenate(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = attention.o_proj
        if self.qk_norm:
            self.norm = concatenate_norms((attention.q_norm, self.num_heads),
                                          (attention.k_norm, self.num_key_value_heads))

    def queries_keys_values(self, x, rope):
        B, T, _ = x.shape
        H, Hkv = self.num_heads, self.num_key_value_heads
        qkv = self.qkv_proj(x).view(B, T, H + Hkv + Hkv, self.head_dim)
        qk, v = qkv.split([H + Hkv, Hkv], dim=2)
        if self.qk_norm:
            qk = self.norm(qk)
        q, k = apply_rope(qk, *rope).split([H, Hkv], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class FusedGateUpMLP(MLP):
    def __init__(self, mlp: MLP):
        nn.Module.__init__(self)
        self.gate_up_proj = concatenate(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def concatenate(*layers: nn.Linear | QuantizedLinear) -> nn.Linear | QuantizedLinear:
    """Layers (out_1,in), (out_2,in), ... -> one (out_1 + out_2 + ...,in)"""
    # All that a layer has, be it weight, bias, scale or offset, has a row for each of its outputs.
    rows = {name: torch.cat([layer.get_parameter(name) for layer in layers])
            for name, _ in layers[0].named_parameters()}
    if isinstance(layers[0], QuantizedLinear):
        return QuantizedLinear(**rows)
    fused = nn.Linear(1, 1, bias="bias" in rows)  # small, since its weights are replaced
    fused.out_features, fused.in_features = rows["weight"].shape
    for name, tensor in rows.items():
        setattr(fused, name, nn.Parameter(tensor, requires_grad=False))
    return fused


def concatenate_norms(*norms: tuple[RMSNorm, int]) -> RMSNorm:
    """(norm of one head (hd,), how many heads it serves), ... -> one norm of them all (heads,hd)"""
    norm = RMSNorm(0, norms[0][0].eps)
    rows = [one.weight.expand(count, -1) for one, count in norms]
    norm.weight = nn.Parameter(torch.cat(rows), requires_grad=False)
    return norm


@torch.no_grad()
def fuse(decoder: LanguageModel) -> None:
    """In place and for good; one layer after the other, so that no second copy of all is made."""
    if adapted := linear_names(decoder, LoRALinear):
        raise ValueError(f"{adapted[0]} has an adapter: merge_lora first, a fused layer has none")
    for layer in decoder.layers:
        layer.self_attn = FusedQKVAttention(layer.self_attn)
        layer.mlp = FusedGateUpMLP(layer.mlp)
