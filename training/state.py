"""What a run has to remember: with the optimizer's state, all that an exact resume needs."""

from dataclasses import dataclass, field


@dataclass
class TrainerState:
    """How far a run has come.

    bucket and (epoch, place) are those of dataset/batching.py: they say which samples come
    next, whatever the number of ranks and the size of a batch will be.
    """

    step: int = 0  # Optimizer steps made.
    bucket: int | None = None  # Rows of the run's first micro-batch on all ranks; None: not begun.
    epoch: int = 0  # Epoch of the next sample.
    place: int = 0  # Index of the next sample in the order of that epoch.
    skipped: int = 0  # Unusable samples met so far, on all ranks.
    skip_reasons: dict = field(default_factory=dict)  # {reason: how many samples}.
    samples: int = 0  # Samples trained on.
    tokens: int = 0  # Tokens computed, padding included.
    non_padding_tokens: int = 0  # Tokens computed, padding left out.
    loss_scale: float = 2.0**16  # fp16: the loss is multiplied by it before the backward pass.
    growth_tracker: int = 0  # fp16: steps since the loss scale has changed.
    overflows: int = 0  # fp16: steps skipped because a number grew past 65,504.
