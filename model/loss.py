"""The decoder's head and its loss: hidden states (S,D), labels (S,) -> the summed cross entropy.

    for each chunk of rows:  hidden (R,D) -> logits (R,V) -> loss
                             and at once back: its gradients of the hidden states and of the head

With 150,000 words the logits are the largest tensors of a step: 4,000 positions of 151,936 words
are 2.4 GB in float32, and the backward pass wants them several times. So no more than CHUNK of them
are there at a time. Left to the backward pass, a chunk's gradients would need its logits again, and
with them the dearest product of the step. So they are computed while the logits are there: the loss
is a sum over rows, and what a row adds to a gradient depends on no other row.
"""

import torch
import torch.nn.functional as F

# Logits that exist at a time, in float32 and twice over. 64 MB keep a processor busy. A GPU must
# read the head for each chunk, which with chunks of 256 MB is little beside the products: 4,096
# positions of 151,936 words took an H100 14.4 ms, all of them at once 14.0 ms and 7.5 GB.
CHUNK = {"cpu": 2**24, "cuda": 2**26}


def head_loss(language, hidden, labels, factor: float = 1.0, device: str | None = None):
    """hidden (S,D), labels (S,) -> summed cross entropy of language.logits(hidden), float32.

    factor: what the loss will be multiplied by before its backward pass. In float32 it changes
    nothing; but fp16 cannot hold gradients that are as small, or as large, as those of the bare
    sum, so they are computed with it from the start.
    device: whose CHUNK is taken; default: hidden's.
    """
    most = CHUNK.get(device or hidden.device.type, CHUNK["cpu"])
    rows = max(1, most // language.config.vocab_size)
    if not torch.is_grad_enabled():
        return sum(F.nll_loss(log_probabilities(language.logits(chunk)), asked, reduction="sum")
                   for chunk, asked in zip(hidden.split(rows), labels.split(rows)))
    head = language.embed_tokens if language.config.tie_word_embeddings else language.lm_head
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return HeadLoss.apply(language, labels, rows, factor, hidden, *trained)


def log_probabilities(logits):
    """(R,V) -> (R,V) float32, because a sum over that many words loses its small terms in bf16."""
    return F.log_softmax(logits, -1, dtype=torch.float32)


class HeadLoss(torch.autograd.Function):
    """The loss whose backward pass has been made in its forward pass, but for one number."""

    @staticmethod
    def forward(ctx, language, labels, rows: int, factor: float, hidden, *trained):
        total, of_hidden, of_trained = 0, torch.empty_like(hidden), []
        for chunk, asked, place in zip(hidden.split(rows), labels.split(rows),
                                       of_hidden.split(rows)):
            loss, found, *more = one_chunk(language, chunk, asked, factor, trained)
            total = total + loss
            place.copy_(found)
            if of_trained:
                torch._foreach_add_(of_trained, more)
            else:
                of_trained = more
        ctx.factor = factor
        ctx.save_for_backward(of_hidden, *of_trained)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rest = grad / ctx.factor  # 1 where the loss was multiplied as it was said
        return None, None, None, None, *(found * rest for found in ctx.saved_tensors)


def one_chunk(language, hidden, labels, factor: float, trained):
    """hidden (R,D), labels (R,) -> loss, its gradients of hidden and of each of trained, times
    factor. What is large is gone when it returns, before the next chunk's is made."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        logits = language.logits(hidden)  # (R,V)
    logs = log_probabilities(logits.detach())
    loss = F.nll_loss(logs, labels, reduction="sum")
    # The derivative of the loss by a logit: the word's probability, less 1 where it was the answer.
    # Written over what it is made of: these tensors are the largest of all.
    slope = logs.exp_()
    slope[torch.arange(len(labels), device=labels.device), labels] -= 1
    slope = slope.mul_(factor).to(logits.dtype)
    # A backward pass takes the numbers that it finds, as it does outside of autocast.
    with torch.autocast(hidden.device.type, enabled=False):
        return loss, *torch.autograd.grad(logits, [hidden, *trained], slope)
