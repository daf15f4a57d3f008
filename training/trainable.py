"""Which parameters are trained: everything else is frozen.

    VLM + what to train of each part -> requires_grad of every parameter
"""

from torch import nn

from model.lora import lora_parameters
from model.vlm import VLM


def set_requires_grad(vlm: VLM, projector: bool = True, vision: bool = False,
                      language: str = "none") -> None:
    """Train the parts that are named, and freeze everything else.

    language: "none", "all", "last:N" (its last N layers), "first:N", both joined by a plus sign
    ("first:1+last:1"), or "lora" (the adapters that add_lora put in before). Stage one is the
    default: the projector alone. ValueError for any other text.
    """
    vlm.requires_grad_(False)
    vlm.projector.requires_grad_(projector)
    vlm.vision.requires_grad_(vision)
    if language == "all":
        vlm.language.requires_grad_(True)
    elif language == "lora":
        adapters = lora_parameters(vlm.language)
        if not adapters:
            raise ValueError("language='lora', but the language model has no adapters: "
                             "call add_lora(vlm.language, ...) first")
        for parameter in adapters:
            parameter.requires_grad_(True)
    elif language != "none":
        for layers in select_layers(vlm.language.layers, language):
            layers.requires_grad_(True)


def select_layers(layers: nn.ModuleList, selection: str) -> list[nn.ModuleList]:
    """selection: "last:N", "first:N", or several of these joined by a plus sign."""
    selected = []
    for part in selection.split("+"):
        end, _, number = part.partition(":")
        N = int(number) if number.isdecimal() else 0
        if end not in ("first", "last") or not 1 <= N <= len(layers):
            raise ValueError(f"language is 'none', 'all', 'lora', 'last:N', 'first:N' or "
                             f"'first:N+last:M' with numbers from 1 to {len(layers)}, "
                             f"got {selection!r}")
        selected.append(layers[:N] if end == "first" else layers[-N:])
    return selected
