"""A linear layer: x (...,in) -> x W^T + b (...,out), as nn.Linear's; one row in the fastest way.

In a chat each new token sends one row through every matrix of the decoder. Its time is that of
reading the weights from memory, and which routine reads them fastest depends on the processor: on
an AMD EPYC (AVX2) float32 weights are read twice as fast as a batch of smaller matrices, since the
library behind F.linear takes one core there for one row; on an Intel Xeon (AVX-512) F.linear is two
to three times faster than that batch. So both are tried for some milliseconds when the first row
comes, and F.linear is left only for something that is clearly faster.
"""

import math
import time
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

SMALLEST = 2**18  # numbers in a matrix: 1 MB in float32, smaller ones lie in a core's own cache
TRIED = (4096, 1024)  # the matrix that is timed: 16 MB in float32
ROUNDS = 5
CLEARLY = 1.3  # so many times faster than F.linear: less may be chance, and rounding differs


def in_parts(x, weight):
    """x (in,), weight (out,in) -> (out,): a batch of up to 64 smaller matrices, shared by cores."""
    rows, columns = weight.shape
    parts = weight.view(math.gcd(rows, 64), -1, columns)
    return torch.bmm(parts, x.expand(len(parts), 1, columns).transpose(1, 2)).view(rows)


def as_vector(x, weight):
    """x (in,), weight (out,in) -> (out,): torch's own routine, where F.linear would ask oneDNN."""
    return torch.mv(weight, x)


OTHER_WAYS = {torch.float32: in_parts, torch.bfloat16: as_vector}


def product(x, weight, bias=None):
    """x (...,in), weight (out,in), bias (out,) or None -> (...,out): F.linear but for rounding."""
    if not is_large_row(x, weight):
        return F.linear(x, weight, bias)
    way = fastest_way(weight.dtype, torch.get_num_threads())
    if way is F.linear:
        return F.linear(x, weight, bias)
    out = way(x.reshape(-1), weight).view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias


def is_large_row(x, weight) -> bool:
    """Whether x is a single row on a CPU and the matrix is worth another way."""
    return (x.device.type == "cpu" and x.numel() == weight.shape[1] and weight.numel() >= SMALLEST
            and weight.dtype == x.dtype and weight.dtype in OTHER_WAYS)


@cache
@torch.no_grad()
def fastest_way(dtype: torch.dtype, threads: int):
    """-> F.linear, or the other way for this dtype where this machine is clearly faster with it.

    threads: how many torch uses; another number may have another answer.
    """
    weight, x = torch.ones(TRIED, dtype=dtype), torch.ones(TRIED[1], dtype=dtype)
    seconds = {F.linear: [], OTHER_WAYS[dtype]: []}
    for _ in range(ROUNDS):  # in turn, so that both meet the same moments of a busy machine
        for way in seconds:
            start = time.perf_counter()
            way(x, weight)
            seconds[way].append(time.perf_counter() - start)
    usual, other = map(min, seconds.values())
    return OTHER_WAYS[dtype] if other * CLEARLY < usual else F.linear


class Linear(nn.Linear):
    def reset_parameters(self):
        """Random numbers to begin with; none on the meta device, as noise in numbers.py says."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x):
        return product(x, self.weight, self.bias)
