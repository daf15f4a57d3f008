"""LoRA: train two thin matrices beside a frozen one: a module in, the same module adapted, out.

A linear layer W (out,in) stays as it is; what is learned is added beside it as B @ A, with A
(rank,in) and B (out,rank):

    x ──┬── W ──────────────────────┬──> W x + (alpha / rank) B A x
        └── dropout ── A ── B ──────┘

For a 576 x 576 matrix, rank 16 trains 2 * 16 * 576 = 18,432 weights in place of 331,776.
B starts at zero, so an adapted model starts as exactly the model that it adapts.

Paper: LoRA (Hu et al. 2021).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LoRALinear(nn.Module):
    """Replaces an nn.Linear. weight and bias keep their names, so checkpoints fit both."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        linear.requires_grad_(False)
        # float32 even beside bf16 weights: an optimizer step changes a weight by about the
        # learning rate, 1e-4 of itself or less, and bf16 keeps only 8 bits (steps of 1/256), so
        # the change would be rounded away. The frozen weights take no steps and can stay small.
        options = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, **options))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear itself starts
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, x):
        low_rank = F.linear(self.dropout(x.to(self.lora_a.dtype)), self.lora_a)  # (...,rank)
        out = F.linear(x, self.weight, self.bias)
        return out + (F.linear(low_rank, self.lora_b) * self.scale).to(out.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with W + scale * B A: summed in float32, then rounded once to W's dtype."""
        linear = nn.Linear(1, 1, bias=False)  # small, since its random weight is replaced
        linear.out_features, linear.in_features = self.weight.shape
        total = self.weight.float() + self.scale * (self.lora_b @ self.lora_a)
        linear.weight = nn.Parameter(total.to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


def linear_names(module: nn.Module, kind: type = nn.Linear) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, kind)]


def add_lora(module: nn.Module, targets: list[str], rank: int, alpha: float,
             dropout: float = 0.0) -> list[str]:
    """Wrap every linear layer of module whose dotted name ends in one of targets, such as "q_proj"
    or "layers.0.mlp.up_proj"; return their names. ValueError when a target fits no layer: a typo
    would train nothing."""
    if rank < 1:
        raise ValueError(f"the rank of LoRA must be 1 or more, got {rank}")
    linears, names = linear_names(module), {}  # a dict keeps the order and drops doubles
    for target in targets:
        matches = [name for name in linears if f".{name}".endswith(f".{target}")]
        if not matches:
            endings = sorted({name.rsplit(".", 1)[-1] for name in linears})
            adapted = ", which has LoRA already" if linear_names(module, LoRALinear) else ""
            raise ValueError(f"LoRA target {target!r} (of {targets}) fits no linear layer of this "
                             f"{type(module).__name__}{adapted}; there are: "
                             f"{', '.join(endings) or 'none'}")
        names.update(dict.fromkeys(matches))
    for name in names:
        adapter = LoRALinear(module.get_submodule(name), rank, alpha, dropout)
        module.set_submodule(name, adapter.train(module.training))
    return list(names)


def merge_lora(module: nn.Module) -> None:
    """Replace every adapted layer by a plain one with W + scale * B A: no cost at inference."""
    for name in linear_names(module, LoRALinear):
        module.set_submodule(name, module.get_submodule(name).merged())


def lora_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The thin matrices of every adapted layer."""
    return [p for name, p in module.named_parameters() if name.endswith((".lora_a", ".lora_b"))]
