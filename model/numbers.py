"""Numbers: in which of them a product will be computed, and the random ones to begin with."""

import torch


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """x's own dtype; or autocast's, where it is on: it converts what goes into a product.

    Whoever knows that several layers read the same tensor converts it once with this. Left to
    autocast, each of them makes and keeps a copy of its own.
    """
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


def noise(*size: int, std: float) -> torch.Tensor:
    """Random numbers to begin with. None on the meta device, where models are made before their
    weights are read: there is no memory for them, and PyTorch would load its compiler, which takes
    seconds."""
    empty = torch.empty(size)
    return empty if empty.is_meta else empty.normal_(0.0, std)
