"""A linear layer: x (...,in) -> x W^T + b (...,out), as nn.Linear's; one row of it faster on a CPU.

In a chat each new token sends one row through every matrix of the decoder. Its time is that of
reading the weights from memory. The library behind F.linear multiplies a matrix and a vector on one
core, and one core alone cannot read as fast as the memory gives. So the matrix is taken for a batch
of smaller ones, as many as there are threads: of a batch each core takes its share.
"""

import torch
import torch.nn.functional as F
from torch import nn

SMALLEST = 2**18  # numbers in a matrix: 1 MB in float32, smaller ones lie in a core's own cache


def product(x, weight, bias=None):
    """x (...,in), weight (out,in), bias (out,) or None -> (...,out): F.linear but for rounding."""
    threads = torch.get_num_threads()
    if not suits_batch(x, weight, threads):
        return F.linear(x, weight, bias)
    rows, columns = weight.shape
    parts = weight.view(threads, rows // threads, columns)
    column = x.reshape(1, columns).t().expand(threads, columns, 1)
    out = torch.bmm(parts, column).view(*x.shape[:-1], rows)
    return out if bias is None else out + bias


def suits_batch(x, weight, threads: int) -> bool:
    """Whether x is one row, and the weights are read by several cores."""
    return (x.numel() == weight.shape[1] and x.device.type == "cpu" and threads > 1
            and weight.dtype == x.dtype == torch.float32 and weight.numel() >= SMALLEST
            and len(weight) % threads == 0)


class Linear(nn.Linear):
    def reset_parameters(self):
        """Random numbers to begin with; none on the meta device, as noise in numbers.py says."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x):
        return product(x, self.weight, self.bias)
