"""One conversion to autocast's dtype for all that read a tensor.

Autocast converts what goes into a matrix product: a norm's output, float32, is read by q, k and v,
and each of them, and each of their adapters, makes and keeps a 16-bit copy of its own. Converted
once by whoever makes the tensor, it is one copy for all.
"""

import torch
import torch.nn.functional as F

from model.language import RMSNorm
from model.lora import LoRALinear


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
