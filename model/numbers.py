"""In which numbers a matrix product will be computed: a tensor in, a dtype out."""

import torch


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """x's own dtype; or autocast's, where it is on: it converts what goes into a product.

    Whoever knows that several layers read the same tensor converts it once with this. Left to
    autocast, each of them makes and keeps a copy of its own.
    """
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype
