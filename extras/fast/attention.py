"""Grouped-query attention in kernels that share the key/value heads by themselves.

The core repeats k and v, Hkv heads, to H of them: right everywhere, but a copy of all keys and
values for each layer and each new token. Some kernels read one head for several query heads.
"""

import torch
import torch.nn.functional as F

from model.language import Attention


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
