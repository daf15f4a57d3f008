"""The language model's loss: hidden states (S,D), labels (S,) -> the summed cross entropy.

    for each chunk of R rows:  hidden (R,D) -> logits (R,V) -> loss, and the logits are freed
    in the backward pass:      the chunk's logits again -> its gradients

With a vocabulary of 150,000 the logits are the largest tensor of a step: 4,000 tokens times 151,936
entries are 2.4 GB in float32, and cross entropy and its backward pass need several tensors of that
size. In chunks at most CHUNK logits exist at a time. The backward pass needs them again, so
activation checkpointing computes each chunk's a second time.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 2**24  # logits that exist at a time: 64 MB in float32, enough to keep a processor busy


def chunked_cross_entropy(language_model, hidden, labels, most: int | None = None):
    """hidden (S,D), labels (S,) -> summed cross entropy of language_model.logits(hidden), float32.

    most: logits that exist at a time; default CHUNK. A sum, not a mean: the training loop divides
    by the supervised tokens of the whole step.
    """
    rows = max(1, (most or CHUNK) // language_model.config.vocab_size)
    total = torch.zeros((), device=hidden.device)
    for chunk, chunk_labels in zip(hidden.split(rows), labels.split(rows)):
        total = total + checkpoint(chunk_loss, language_model, chunk, chunk_labels,
                                   use_reentrant=False)
    return total


def chunk_loss(language_model, hidden, labels):
    """hidden (R,D), labels (R,) -> summed cross entropy"""
    logits = language_model.logits(hidden)  # (R,V)
    # In float32, because a sum over that many exponentials loses its small terms in bf16.
    return F.cross_entropy(logits.float(), labels, reduction="sum")
