"""One row through a linear layer, a matrix-vector product (GEMV), in this machine's fastest way.

    x (...,in) -> x W^T + b (...,out), as nn.Linear's

In a chat each new token sends one row through every matrix of the decoder. It takes the time of
reading the weights from memory, and which routine reads them fastest depends on the processor: on
an AMD EPYC (AVX2) float32 weights are read twice as fast as a batch of smaller matrices, since the
library behind F.linear takes one core there for one row; on an Intel Xeon (AVX-512) F.linear is two
to three times faster than that batch. So both are timed for some milliseconds, and F.linear is left
only for something that is clearly faster.
"""

import math
import time
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

SMALLEST = 2**18  # weights of a matrix: 1 MB in float32; smaller ones lie in a core's own cache
TIMED_SHAPE = (4096, 1024)  # of the matrix that is timed: 16 MB in float32
ROUNDS = 5
SPEEDUP = 1.3  # so many times faster than F.linear: less may be chance, and rounding differs


def batched_gemv(x, weight):
    """x (in,), weight (out,in) -> (out,): a batch of up to 64 smaller matrices, shared by cores."""
    rows, columns = weight.shape
    parts = weight.view(math.gcd(rows, 64), -1, columns)
    return torch.bmm(parts, x.expand(len(parts), 1, columns).transpose(1, 2)).view(rows)


def torch_mv(x, weight):
    """x (in,), weight (out,in) -> (out,): torch's own routine, where F.linear would take oneDNN."""
    return torch.mv(weight, x)


OTHER_ROUTINES = {torch.float32: batched_gemv, torch.bfloat16: torch_mv}


def linear(x, weight, bias=None):
    """x (...,in), weight (out,in), bias (out,) or None -> (...,out): F.linear but for rounding."""
    one_row = x.numel() == weight.shape[1] and x.dtype == weight.dtype
    routine = routine_for(weight) if one_row else F.linear
    if routine is F.linear:
        return F.linear(x, weight, bias)
    out = routine(x.reshape(-1), weight).view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias


def routine_for(weight):
    """What multiplies this matrix by a single row fastest."""
    if (weight.device.type != "cpu" or weight.numel() < SMALLEST
            or weight.dtype not in OTHER_ROUTINES):
        return F.linear
    return fastest_routine(weight.dtype, torch.get_num_threads())


@cache
@torch.no_grad()
def fastest_routine(dtype: torch.dtype, threads: int):
    """-> F.linear, or the other routine for this dtype where this machine is clearly faster with
    it. threads: how many torch uses; another number may have another answer."""
    weight = torch.ones(TIMED_SHAPE, dtype=dtype)
    x = torch.ones(TIMED_SHAPE[1], dtype=dtype)
    seconds = {F.linear: [], OTHER_ROUTINES[dtype]: []}
    for _ in range(ROUNDS):  # in turn, so that both meet the same moments of a busy machine
        for routine in seconds:
            start = time.perf_counter()
            routine(x, weight)
            seconds[routine].append(time.perf_counter() - start)
    usual, other = map(min, seconds.values())
    return OTHER_ROUTINES[dtype] if other * SPEEDUP < usual else F.linear


class GEMVLinear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def use_fastest_routine(module: nn.Module) -> None:
    """Swap the linear layers for which this machine has something faster than F.linear. The others
    stay: in small models the questions that `linear` asks take a tenth of a step."""
    for layer in module.modules():
        if type(layer) is nn.Linear and routine_for(layer.weight) is not F.linear:
            layer.__class__ = GEMVLinear
