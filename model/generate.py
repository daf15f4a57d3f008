"""Answering: a prompt's token ids and pixels in, new token ids out one at a time, then text.

    prefill   ids (1,T), pixels -> decoder -> logits (1,V); the cache keeps keys and values
    decode    the newest id (1,) -> decoder, which looks back into the cache -> logits (1,V)
    sample    logits (V,) -> the next id;   stream   ids -> TextStreamer -> text

Without the cache, each new token would send the whole row through the decoder again.
"""

from dataclasses import dataclass

import torch

from model.language import LanguageModel

REPLACEMENT_CHARACTER = "\ufffd"  # what decoding makes of bytes that are no character


class KVCache:
    """The keys and values of all tokens so far, of every layer.

    capacity: the most tokens that it will hold. All memory is allocated at once: concatenating
    would copy all earlier tokens for each new one.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.num_layers, self.capacity = num_layers, capacity
        self.length = 0  # tokens that every layer holds
        self.store = None  # (layers,2,B,Hkv,capacity,hd), made at the first append

    def append(self, layer: int, k, v):
        """k, v (B,Hkv,T,hd) of one layer -> all its keys and values (B,Hkv,Tk,hd).

        The last layer advances `length`; nobody reads what an interrupted step wrote beyond it.
        """
        if self.store is None:
            self.store = k.new_empty(self.num_layers, 2, *k.shape[:2], self.capacity, k.shape[3])
        end = self.length + k.shape[2]
        keys, values = self.store[layer]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        if layer == self.num_layers - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]


@dataclass(frozen=True)
class GenerationConfig:
    max_new_tokens: int = 256
    stop_ids: tuple = ()  # each of them ends the answer and is not part of it
    temperature: float = 0.0  # 0: always the likeliest token (greedy)
    top_k: int = 0  # sample from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens that together reach this probability
    repetition_penalty: float = 1.0  # above 1: less repetition
    generator: torch.Generator | None = None  # on the CPU: one seed, the same answer on any device


def apply_repetition_penalty(logits, ids: list[int], penalty: float):
    """Make each token of ids less likely, once however often it occurs (CTRL, Keskar et al. 2019):
    positive logits are divided by the penalty, negative ones multiplied. logits (V,) -> (V,)"""
    # An image placeholder's id may lie past the vocabulary.
    used = torch.tensor(sorted({i for i in ids if i < len(logits)}), device=logits.device,
                        dtype=torch.long)
    values = logits[used]
    return logits.index_put((used,), torch.where(values > 0, values / penalty, values * penalty))


def sampling_probs(logits, temperature: float, top_k: int, top_p: float):
    """logits (V,) -> probabilities (V,), first cut to the top_k likeliest tokens (0: all), then to
    the fewest that together reach top_p (nucleus sampling, Holtzman et al. 2019)."""
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    probs, order = logits.softmax(-1).sort(descending=True, stable=True)
    likelier = probs.cumsum(-1) - probs  # the total probability of all likelier tokens
    keep = likelier < top_p
    keep[0] = True
    probs = probs * keep
    return torch.zeros_like(probs).scatter(0, order, probs / probs.sum())


def sample_token(logits, ids: list[int], config: GenerationConfig) -> int:
    """logits (V,), all ids so far -> the next id."""
    logits = logits.float()
    if config.repetition_penalty != 1.0:
        logits = apply_repetition_penalty(logits, ids, config.repetition_penalty)
    if config.temperature == 0:
        return int(logits.argmax())
    probs = sampling_probs(logits, config.temperature, config.top_k, config.top_p).cpu()
    return int(torch.multinomial(probs, 1, generator=config.generator))


def language_model_of(model) -> LanguageModel:
    """A language model alone can chat too, without images."""
    return model if isinstance(model, LanguageModel) else model.language


def embed(model, ids, pixels):
    """ids (B,T), pixels (N,3,H,W) or None -> (B,T,D)"""
    if pixels is not None and isinstance(model, LanguageModel):
        raise ValueError("this is a language model alone: it takes no images")
    return model.embed(ids) if pixels is None else model.embed(ids, pixels)


def room_left(model: LanguageModel, length: int) -> int:
    """Tokens that may follow a prompt of `length` tokens: later positions were never trained."""
    limit = model.config.max_position_embeddings
    if not 0 < length < limit:
        raise ValueError(f"the prompt has {length} tokens; this model takes 1 to {limit - 1}: "
                         "shorten it, or start the conversation anew")
    return limit - length


@torch.inference_mode()
def generate(model, ids: list[int], pixels=None, prefix_cache=None, **config):
    """Yield new token ids until a stop id, max_new_tokens or the last trained position.

    model: a VLM, or a LanguageModel for text alone. ids: the prompt. pixels (N,3,H,W): its images
    in order. config: as GenerationConfig. prefix_cache: see extras/fast/prefix_cache.py.
    """
    language_model, config, ids = language_model_of(model), GenerationConfig(**config), list(ids)
    device = language_model.embed_tokens.weight.device
    capacity = len(ids) + min(config.max_new_tokens, room_left(language_model, len(ids)))
    pixels = None if pixels is None else pixels.to(device)
    cache = KVCache(language_model.config.num_hidden_layers, capacity)
    if prefix_cache is not None:
        pixels = prefix_cache.reuse(model, ids, pixels, cache)
    embeds = embed(model, torch.tensor([ids[cache.length:]], device=device), pixels)  # (1,T,D)
    logits = language_model.logits(language_model.decode(embeds, cache=cache)[:, -1])  # (1,V)
    while len(ids) < capacity:
        token = sample_token(logits[0], ids, config)
        if token in config.stop_ids:
            return
        ids.append(token)
        yield token
        if len(ids) < capacity:
            logits = language_model.decode_step(torch.tensor([token], device=device), cache)


class TextStreamer:
    """Token ids one at a time -> pieces of text.

    A byte-level tokenizer cuts one Chinese character or emoji into up to four tokens. Decoded too
    early they give replacement characters, so they wait until the character is complete."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.length = tokenizer, [], 0  # length: characters returned

    def add(self, token: int) -> str:
        """-> the text that is certain after this token: perhaps none."""
        self.ids.append(token)
        return self._new(self.tokenizer.decode(self.ids).rstrip(REPLACEMENT_CHARACTER))

    def end(self) -> str:
        """-> what was held back and can no longer be completed."""
        return self._new(self.tokenizer.decode(self.ids))

    def _new(self, text: str) -> str:
        piece, self.length = text[self.length:], max(self.length, len(text))
        return piece
