"""The language model of a chat: one-row products in its tied head, and recorded steps on a GPU."""

import torch
from torch import nn

from extras.fast.cuda_graph import CUDAGraphDecodeStep
from extras.fast.gemv import linear
from model.language import LanguageModel


class InferenceLanguageModel(LanguageModel):
    def logits(self, hidden):
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        if isinstance(self.embed_tokens, nn.Embedding):
            return linear(hidden, self.embed_tokens.weight)
        return self.embed_tokens(hidden)  # quantized, the table multiplies hidden states itself

    def decode_step(self, ids, cache):
        if not can_record(self):
            return super().decode_step(ids, cache)
        if not hasattr(cache, "graph_step"):
            cache.graph_step = self.recorded_step(cache)
        return cache.graph_step(ids)

    def recorded_step(self, cache, real=None):
        return CUDAGraphDecodeStep(self, cache, real) if can_record(self) else None


def can_record(model: LanguageModel) -> bool:
    """Whether its steps may be recorded as a CUDA graph: on a GPU; but not in the middle of
    training, where weights are converted for each product (autocast) or gathered for each step."""
    return (isinstance(model, InferenceLanguageModel) and model.norm.weight.is_cuda
            and not torch.is_autocast_enabled("cuda"))
