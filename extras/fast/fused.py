"""For answering: layers that read the same x, laid end to end. A decoder in, the same one out.

    q_proj (576,576), k_proj (192,576), v_proj (192,576)  ->  qkv_proj (960,576)
    gate_proj (1536,576), up_proj (1536,576)              ->  gate_up_proj (3072,576)

In a chat one row at a time goes through the decoder, and each of the hundreds of things that a step
asks for costs some microseconds however small it is. So fewer are asked for: one product in place
of three, and since q's heads and k's are neighbours then, they are turned in one go. The numbers
are the same, and so is the memory. In training the layers stay apart: there they have names that
files and adapters know, and of many rows a product takes as long as its arithmetic.
"""

import torch
from torch import nn

from extras.fast.one_row import Linear
from extras.fast.quantize import FewBits
from model.language import MLP, Attention, LanguageModel, RMSNorm, rotate
from model.lora import LoRALinear, linear_names


class JoinedAttention(Attention):
    def __init__(self, attention: Attention):
        nn.Module.__init__(self)  # Attention's own would make random weights
        self.num_heads = attention.num_heads
        self.num_key_value_heads = attention.num_key_value_heads
        self.head_dim, self.qk_norm = attention.head_dim, attention.qk_norm
        self.qkv_proj = end_to_end(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = attention.o_proj
        if self.qk_norm:
            self.norm = norm_of_heads((attention.q_norm, self.num_heads),
                                      (attention.k_norm, self.num_key_value_heads))

    def heads(self, x, rope):
        B, T, _ = x.shape
        H, Hkv = self.num_heads, self.num_key_value_heads
        all_heads = self.qkv_proj(x).view(B, T, H + Hkv + Hkv, self.head_dim)
        qk, v = all_heads.split([H + Hkv, Hkv], dim=2)
        if self.qk_norm:
            qk = self.norm(qk)
        q, k = rotate(qk, *rope).split([H, Hkv], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class JoinedMLP(MLP):
    def __init__(self, mlp: MLP):
        nn.Module.__init__(self)
        self.gate_up_proj = end_to_end(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj

    def gate_and_up(self, x):
        return self.gate_up_proj(x).chunk(2, dim=-1)


def end_to_end(*layers: Linear | FewBits) -> Linear | FewBits:
    """Layers (out_1,in), (out_2,in), ... -> one (out_1 + out_2 + ...,in)"""
    # All that a layer has, be it weight, bias, scale or offset, has a row for each of its outputs.
    rows = {name: torch.cat([layer.get_parameter(name) for layer in layers])
            for name, _ in layers[0].named_parameters()}
    if isinstance(layers[0], FewBits):
        return FewBits(**rows)
    columns, count = layers[0].in_features, len(rows["weight"])
    joined = Linear(columns, count, bias="bias" in rows, device="meta")
    for name, tensor in rows.items():
        setattr(joined, name, nn.Parameter(tensor, requires_grad=False))
    return joined


def norm_of_heads(*norms: tuple[RMSNorm, int]) -> RMSNorm:
    """(norm of one head (hd,), how many heads it serves), ... -> one norm of them all (heads,hd)"""
    norm = RMSNorm(0, norms[0][0].eps)
    rows = [one.weight.expand(count, -1) for one, count in norms]
    norm.weight = nn.Parameter(torch.cat(rows), requires_grad=False)
    return norm


@torch.no_grad()
def join(decoder: LanguageModel) -> None:
    """In place and for good; one layer after the other, so that no second copy of all is made."""
    if adapted := linear_names(decoder, LoRALinear):
        raise ValueError(f"{adapted[0]} has an adapter: merge_lora first, a joined layer has none")
    for layer in decoder.layers:
        layer.self_attn = JoinedAttention(layer.self_attn)
        layer.mlp = JoinedMLP(layer.mlp)
