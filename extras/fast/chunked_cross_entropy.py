"""model/loss.py without computing any logits twice: the same loss, the same gradients.

    for each chunk of rows:  hidden (R,D) -> logits (R,V) -> loss
                             and at once: its gradients for the hidden states and for the head

In model/loss.py the backward pass computes each chunk's logits again, the most expensive product
of a step. Here the gradients are computed while the logits are there: the loss is a sum over rows,
and what a row adds to a gradient depends on no other row. The backward pass only rescales them.
"""

import torch
import torch.nn.functional as F

from extras.fast.layers import compute_dtype
from model import loss

# Logits that exist at a time, in float32 and twice over. 64 MB keep a processor busy. A GPU must
# read the head for each chunk, which with chunks of 256 MB is little beside the products: 4,096
# positions of 151,936 entries took an H100 14.4 ms, all of them at once 14.0 ms and 7.5 GB.
CHUNK = {"cpu": 2**24, "cuda": 2**26}


def chunked_cross_entropy(language_model, hidden, labels, device_type: str | None = None):
    """hidden (S,D), labels (S,) -> summed cross entropy of language_model.logits(hidden), float32.

    device_type: whose CHUNK is taken; default: hidden's.
    In fp16 the plain loss: gradients of the bare sum, which this one computes, can leave fp16's
    range, and only the backward pass knows the factor that a gradient scaler multiplies them by.
    """
    most = CHUNK.get(device_type or hidden.device.type, CHUNK["cpu"])
    rows = max(1, most // language_model.config.vocab_size)
    if not torch.is_grad_enabled():
        return sum(F.nll_loss(log_probs(language_model.logits(chunk)), chunk_labels,
                              reduction="sum")
                   for chunk, chunk_labels in zip(hidden.split(rows), labels.split(rows)))
    if compute_dtype(hidden) == torch.float16:
        return loss.chunked_cross_entropy(language_model, hidden, labels, most)
    tied = language_model.config.tie_word_embeddings
    head = language_model.embed_tokens if tied else language_model.lm_head
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return ChunkedCrossEntropy.apply(language_model, labels, rows, hidden, *trained)


def log_probs(logits):
    """(R,V) -> (R,V) float32: a sum over that many exponentials loses its small terms in bf16."""
    return F.log_softmax(logits, -1, dtype=torch.float32)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient in the forward pass; backward only rescales it."""

    @staticmethod
    def forward(ctx, language_model, labels, rows: int, hidden, *trained):
        total, hidden_grad, trained_grads = 0, torch.empty_like(hidden), []
        for chunk, chunk_labels, grad_out in zip(hidden.split(rows), labels.split(rows),
                                                 hidden_grad.split(rows)):
            chunk_loss, grad, *more = loss_and_gradients(language_model, chunk, chunk_labels,
                                                         trained)
            total = total + chunk_loss
            grad_out.copy_(grad)
            if trained_grads:
                torch._foreach_add_(trained_grads, more)
            else:
                trained_grads = more
        ctx.save_for_backward(hidden_grad, *trained_grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, None, None, *(saved * grad for saved in ctx.saved_tensors)


def loss_and_gradients(language_model, hidden, labels, trained):
    """hidden (R,D), labels (R,) -> loss, its gradients for hidden and for each of trained. The
    large tensors are freed when it returns, before the next chunk's are made."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        logits = language_model.logits(hidden)  # (R,V)
    probs = log_probs(logits.detach())
    total = F.nll_loss(probs, labels, reduction="sum")
    # The derivative of the loss by a logit is the token's probability, less 1 where it was the
    # label. Written over the log probabilities: these tensors are the largest of all.
    probs.exp_()
    probs[torch.arange(len(labels), device=labels.device), labels] -= 1
    # A backward pass computes in the dtypes that it finds, as it does outside of autocast.
    with torch.autocast(hidden.device.type, enabled=False):
        return total, *torch.autograd.grad(logits, [hidden, *trained], probs.to(logits.dtype))
