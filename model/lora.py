"""LoRA: train two thin matrices beside a frozen one: a module in, the same module adapted, out.

A linear layer W (out,in) stays as it is; what is learned is added beside it as B @ A, with A
(rank,in) and B (out,rank):

    x ──┬── W ──────────────────────┬──> W x + (alpha / rank) B A x
        └── dropout ── A ── B ──────┘

For a 576 x 576 matrix, rank 16 learns 2 * 16 * 576 = 18,432 numbers in place of 331,776.
B begins at zero, so that an adapted model starts as exactly the model that it adapts.

Paper: LoRA (Hu et al. 2021).
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from extras.fast.one_row import Linear
from model.numbers import product_dtype
from model.pretrained.families import LANGUAGE_FAMILIES


class LoRALinear(nn.Module):
    """Takes the place of an nn.Linear. weight and bias keep their names, so a name table or a
    checkpoint that knows the plain layer knows this one too."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        # float32 even beside bf16 weights: an optimizer step changes a number by about the
        # learning rate, 1e-4 of itself or less, and bf16 keeps only 8 bits (steps of 1/256), so
        # the change would be rounded away. The frozen weights take no steps and can stay small.
        place = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, **place))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, **place))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear itself begins
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, x):
        x_like_a = x.to(product_dtype(self.lora_a))
        thin = F.linear(self.dropout(x_like_a), self.lora_a)  # (...,rank)
        out = F.linear(x, self.weight, self.bias)
        return out + (F.linear(thin, self.lora_b) * self.scale).to(out.dtype)

    @torch.no_grad()
    def merged(self) -> Linear:
        """A plain layer with W + scale * B A: summed in float32, then rounded once to W's dtype."""
        rows, columns = self.weight.shape
        linear = Linear(columns, rows, bias=self.bias is not None, device="meta")
        total = self.weight.float() + self.scale * (self.lora_b @ self.lora_a)
        linear.weight = nn.Parameter(total.to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


def linear_names(module: nn.Module, kind: type = nn.Linear) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, kind)]


def add_lora(module: nn.Module, targets: list[str], rank: int, alpha: float,
             dropout: float = 0.0) -> list[str]:
    """Wrap every linear layer of module whose dotted name ends in one of targets.

    targets: such as ["q_proj", "v_proj"], or longer, "layers.0.mlp.up_proj"; or the names in the
    published files, such as Qwen-7B's ["c_attn", "w1", "w2"]. Returns the names of the wrapped
    layers. Raises when a target fits no layer: a typo would train nothing.

    Where one published matrix is several layers here (c_attn: q, k and v), these share one A and
    have a B each. Stacked, the three B are the B of an adapter on the published matrix: the same
    arithmetic and the same count, rank * (in + 3 out). Only the dropout is drawn for each of them.
    """
    if rank < 1:
        raise ValueError(f"the rank of LoRA must be 1 or more, got {rank}")
    linears, published = linear_names(module), published_names(module)
    groups = []  # of layers that share one A; mostly of a single layer
    for target in targets:
        matches = [[name] for name in linears if f".{name}".endswith(f".{target}")]
        matches = matches or [ours for public, ours in published.items()
                              if f".{public}".endswith(f".{target}")]
        if not matches:
            there = sorted({name.rsplit(".", 1)[-1] for name in [*linears, *published]})
            done = ", which has LoRA already" if linear_names(module, LoRALinear) else ""
            raise ValueError(
                f"LoRA target {target!r} (of {targets}) fits no linear layer of this "
                f"{type(module).__name__}{done}; there are: {', '.join(there) or 'none'}"
            )
        groups += matches
    wrapped = []
    for group in groups:
        adapters = []
        for name in group:
            if name not in wrapped:
                adapter = LoRALinear(module.get_submodule(name), rank, alpha, dropout)
                if adapters:
                    adapter.lora_a = adapters[0].lora_a
                replace(module, name, adapter)
                adapters.append(adapter)
                wrapped.append(name)
    return wrapped


def published_names(module: nn.Module) -> dict[str, list[str]]:
    """{name of a linear layer in the family's files: our names}; {} for a module of no family."""
    layout = LANGUAGE_FAMILIES.get(getattr(getattr(module, "config", None), "model_type", None))
    names = {}
    for ours in linear_names(module) if layout else []:
        public = layout.public.get(re.sub(r"(?<=layers\.)\d+", "{}", ours), ours)
        number = re.search(r"(?<=layers\.)\d+", ours)
        names.setdefault(public.format(number and number[0]), []).append(ours)
    return names


def merge_lora(module: nn.Module) -> dict[str, LoRALinear]:
    """Put W + scale * B A in the place of every adapted layer: plain layers again, no cost left.

    Returns what was taken out. It holds the untouched W, so that unmerge_lora restores the model
    bit for bit; subtracting B A again would leave rounding behind. Drop it when the merge is for
    good, and the memory is free.
    """
    adapters = {name: module.get_submodule(name) for name in linear_names(module, LoRALinear)}
    for name, adapter in adapters.items():
        replace(module, name, adapter.merged())
    return adapters


def unmerge_lora(module: nn.Module, adapters: dict[str, LoRALinear]) -> None:
    """Undo merge_lora: put back the layers that it returned."""
    for name, adapter in adapters.items():
        replace(module, name, adapter)


def replace(module: nn.Module, name: str, part: nn.Module) -> None:
    """Set the submodule with a dotted name."""
    parent, _, last = name.rpartition(".")
    part.train(module.training)
    setattr(module.get_submodule(parent), last, part)


def lora_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The thin matrices of every adapted layer."""
    return [p for name, p in module.named_parameters()
            if name.endswith((".lora_a", ".lora_b"))]


def trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """{name: tensor} of what is being trained: all that an adapter file has to hold."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
