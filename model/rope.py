"""Llama-3's RoPE scaling, by which a model that was trained on short rows goes on to long ones.

Pair i of a head turns by an angle of frequency f_i from one position to the next, a full turn every
2 pi / f_i positions. Pairs that turned many times within the rows of the first training are left as
they are; pairs that never came round are slowed down by `factor`; those between are mixed.
"""

import math

import torch

# Of config.json's rope_scaling. original_max_position_embeddings: the rows of the first training.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def scaled(frequency: torch.Tensor, scaling: dict | None) -> torch.Tensor:
    """frequency (hd/2,) -> (hd/2,)"""
    if scaling is None:
        return frequency
    factor, low, high, length = (scaling[name] for name in LLAMA3)
    turns = length * frequency / (2 * math.pi)  # (hd/2,)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as it is, 0: slowed down
    return frequency * (kept + (1 - kept) / factor)
