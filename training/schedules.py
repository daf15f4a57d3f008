"""Learning-rate schedules: the share of the peak for optimizer step 1..steps.

A further schedule is a function here and its row in SCHEDULES.
"""

import math


def cosine(step: float, steps: float, warmup_ratio: float) -> float:
    """A straight line up over the first warmup_ratio of the run (Adam's statistics are still
    noise), then half a cosine down to 10 % of the peak at the last step."""
    warmup = math.ceil(warmup_ratio * steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)  # 0..1
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES = {"cosine": cosine}
