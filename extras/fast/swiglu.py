"""SwiGLU that keeps two tensors for the backward pass in place of three."""

import torch
import torch.nn.functional as F

from model.language import MLP


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
