"""Layers of the core with another forward: the same results, from faster kernels or with less kept.

    Attention   kernels that share the key/value heads by themselves. The core repeats k and v, Hkv
                heads, to H of them: right everywhere, but a copy of all keys and values for each
                layer and each new token.
    MLP         two tensors are kept for the backward pass in place of three.
    RMSNorm,    one conversion to autocast's dtype for all that read a tensor. Autocast converts
    LoRALinear  what goes into a matrix product: a norm's output, float32, is read by q, k and v,
                and each of them, and each of their adapters, makes and keeps a 16-bit copy.
"""

import torch
import torch.nn.functional as F

from model.language import MLP, Attention, RMSNorm
from model.lora import LoRALinear


class SharedHeadsAttention(Attention):
    def attend(self, q, k, v, mask):
        grouped = self.num_heads != self.num_key_value_heads
        if grouped and not kernel_shares_heads(q, k, v, mask):
            return super().attend(q, k, v, mask)
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                              enable_gqa=grouped)


def kernel_shares_heads(q, k, v, mask) -> bool:
    """Whether the kernel lets several query heads read one head of keys and values by itself.

    A CPU's does. Of CUDA's only flash attention (16-bit dtypes, compute capability 8.0, no mask);
    where that cannot serve, PyTorch would write down all T x T weights rather than use another.
    Apple's is never used so: it aborts in torch 2.6 and gives wrong results in 2.8 to 2.10.
    """
    if q.device.type != "cuda":
        return q.device.type == "cpu"
    parameters = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, mask is None, True)
    return torch.backends.cuda.can_use_flash_attention(parameters)


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up, with gate and up kept for the backward pass.

    Autograd by itself keeps silu(gate) as well: a quarter of all that a layer with frozen weights
    keeps. It is computed again instead, which costs one pass over its values.
    """

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class SwiGLUMLP(MLP):
    def forward(self, x):
        return self.down_proj(SwiGLUFunction.apply(self.gate_proj(x), self.up_proj(x)))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product of x is computed: autocast's where it is on."""
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


class AutocastRMSNorm(RMSNorm):
    def forward(self, x):
        return super().forward(x).to(compute_dtype(x))


class AutocastLoRALinear(LoRALinear):
    def forward(self, x):
        low_rank = F.linear(self.dropout(x.to(compute_dtype(self.lora_a))), self.lora_a)
        out = F.linear(x, self.weight, self.bias)
        return out + (F.linear(low_rank, self.lora_b) * self.scale).to(out.dtype)


TRAINING = {Attention: SharedHeadsAttention, MLP: SwiGLUMLP, RMSNorm: AutocastRMSNorm,
            LoRALinear: AutocastLoRALinear}
