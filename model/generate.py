"""Answering: a prompt's token ids and pixels -> new token ids, one at a time.

The prompt goes through the decoder once (prefill) and leaves its keys and values in a cache; after
that each new token costs one position only. `generate` yields ids for a chat, `generate_batch`
answers many prompts at once, greedily, for scoring.
"""

import torch

from model.language import LanguageModel
from model.step import KVCache, RecordedStep, Step


class Past:
    """What the answers of a conversation leave to the next one: prompts begin alike, and what
    the decoder made of that beginning, with its pictures, need not be computed again."""

    def __init__(self):
        self.cache = None
        self.ids, self.pixels = [], ()  # what the cache holds, and perhaps one token more

    def shared(self, ids: list[int], pixels, placeholder: int | None) -> tuple[int, int]:
        """The tokens, and pictures among them, with which this prompt begins as the last one did.

        ids, pixels: of the new prompt. Its last token is never shared: the next one follows from
        it. Nor is a part of a picture. Two pictures are the same if their pixels are.
        """
        held = 0 if self.cache is None else min(self.cache.length, len(self.ids), len(ids) - 1)
        same = next((i for i in range(held) if ids[i] != self.ids[i]), held)
        places = [place for place, token in enumerate(ids) if token == placeholder]
        N = 0 if pixels is None else len(pixels)
        if not places:
            return same, 0
        if N == 0 or len(places) % N:
            return min(same, places[0]), 0  # embed will say what does not fit
        K, seen = len(places) // N, 0
        while (seen < min(N, len(self.pixels)) and places[seen * K + K - 1] < same
               and torch.equal(pixels[seen], self.pixels[seen])):
            seen += 1
        return (same if seen == N else min(same, places[seen * K])), seen


def penalise(logits, seen: list[int], penalty: float):
    """Make every token that stands in `seen` less likely (CTRL, Keskar et al. 2019).

    A positive logit is divided by the penalty, a negative one multiplied: both go down. Each token
    is punished once, however often it occurred.
    """
    # A placeholder for pictures may lie past the vocabulary; it can never be chosen anyway.
    seen = torch.tensor(sorted({i for i in seen if i < logits.shape[-1]}), device=logits.device,
                        dtype=torch.long)
    logits = logits.clone()
    chosen = logits[seen]
    logits[seen] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits


def distribution(logits, temperature: float, top_k: int, top_p: float):
    """logits (V,) -> probabilities (V,): flattened or sharpened, then cut to the likeliest tokens.

    top_k keeps the k likeliest (0: all). top_p keeps the smallest set of likeliest tokens that
    together reach the share p (nucleus sampling, Holtzman et al. 2019).
    """
    logits = logits / temperature
    if 0 < top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities  # what the likelier tokens reach without it
    keep = before < top_p
    keep[0] = True
    probabilities = probabilities * keep
    return torch.zeros_like(probabilities).scatter(0, order, probabilities / probabilities.sum())


def choose(logits, seen: list[int], temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
           generator=None) -> int:
    """The next token: the likeliest when temperature is 0, else drawn by chance. logits (V,)."""
    logits = logits.float()
    if repetition_penalty != 1.0:
        logits = penalise(logits, seen, repetition_penalty)
    if temperature == 0:
        return int(logits.argmax())
    probabilities = distribution(logits, temperature, top_k, top_p).cpu()  # one seed, any device
    return int(torch.multinomial(probabilities, 1, generator=generator))


def decoder_of(model) -> LanguageModel:
    """A language model alone can chat too; it just sees no pictures."""
    return model if isinstance(model, LanguageModel) else model.language


def embed(model, ids, pixels):
    """ids (B,T), pixels (N,3,H,W) or None -> (B,T,D)"""
    if not isinstance(model, LanguageModel):
        return model.embed(ids, pixels)
    if pixels is not None:
        raise ValueError("this is a language model alone: it takes no pictures")
    return model.embed(ids)


def step_of(model, cache: KVCache, real=None) -> Step:
    """What takes one token of each row further. real: as Step takes it.

    Recorded on a GPU; but not where the decoder's weights are converted for each product
    (autocast) or gathered for each step (fsdp), as in the middle of training.
    """
    decoder = decoder_of(model)
    fixed = (decoder.norm.weight.is_cuda and not torch.is_autocast_enabled("cuda")
             and not getattr(model, "force_vision_forward", False))
    return (RecordedStep if fixed else Step)(decoder, cache, real)


def room_left(decoder: LanguageModel, length: int) -> int:
    """Tokens that may follow a prompt of `length`; past the trained positions all turns to noise"""
    limit = decoder.config.max_position_embeddings
    if not 0 < length < limit:
        raise ValueError(f"the prompt has {length} tokens; this model takes 1 to {limit - 1}: "
                         "shorten it, or start the conversation anew")
    return limit - length


@torch.inference_mode()
def generate(model, ids: list[int], pixels=None, max_new_tokens: int = 256, stop_ids=(),
             temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
             repetition_penalty: float = 1.0, generator: torch.Generator | None = None,
             past: Past | None = None):
    """Yield new token ids until one of stop_ids (not yielded), max_new_tokens or the last position.

    model: a VLM, or a LanguageModel for text alone. ids: the prompt. pixels (N,3,H,W): its
    pictures in order. generator: a CPU generator, to draw the same answer again. past: what the
    last answer left, and this one leaves; without it everything is computed anew.
    """
    decoder, past = decoder_of(model), past or Past()
    device = decoder.embed_tokens.weight.device
    ids = list(ids)
    room = room_left(decoder, len(ids))
    pixels = None if pixels is None else pixels.to(device)
    start, seen = past.shared(ids, pixels, getattr(model.config, "image_token_id", None))
    unseen = None if pixels is None or seen == len(pixels) else pixels[seen:]
    embeds = embed(model, torch.tensor([ids[start:]], device=device), unseen)  # (1,T-start,D)
    max_new_tokens = min(max_new_tokens, room)
    capacity = len(ids) + max_new_tokens
    cache = (past.cache or KVCache(decoder.config.num_hidden_layers, 0)).longer(start, capacity)
    past.cache, past.ids, past.pixels = cache, ids, () if pixels is None else pixels
    step, logits = None, None  # logits (1,V)
    for _ in range(max_new_tokens):
        if step is None:
            logits = decoder.logits(decoder.decode(embeds, cache=cache)[:, -1])
            step = step_of(model, cache)
        else:
            logits = step(torch.tensor(ids[-1:], device=device))
        token = choose(logits[0], ids, temperature, top_k, top_p, repetition_penalty, generator)
        if token in stop_ids:
            return
        ids.append(token)
        yield token


@torch.inference_mode()
def generate_batch(model, prompts: list[list[int]], pixels: list, max_new_tokens: int,
                   stop_ids) -> list[list[int]]:
    """The greedy answer to each prompt, all at once, without the stop token.

    pixels: for each prompt (N,3,H,W) or None. Prompts that begin alike up to the end of their
    pictures, given as the same tensor, are questions about one thing: their beginning goes through
    the decoder once for all of them. Beginnings and rests are padded on the LEFT, so that all rows
    write their next token at the same place; the positions say where a row really is, and the mask
    hides the padding.

        ids  . a b | . c | x      positions  0 0 1 | 1 2 | 3      looks at  . 1 1 | . 1 | 1
             d e f | g h | y                 0 1 2 | 3 4 | 5                1 1 1 | 1 1 | 1
    """
    decoder = decoder_of(model)
    device = decoder.embed_tokens.weight.device
    placeholder = getattr(model.config, "image_token_id", None)
    max_new_tokens = min(max_new_tokens, room_left(decoder, max(map(len, prompts))))
    cuts, firsts, owner = shared_beginnings(
        prompts, pixels, placeholder, decoder.config.max_position_embeddings - max_new_tokens)
    # Any id but the picture's placeholder will do: the mask hides these places.
    padding = 1 if placeholder == 0 else 0
    begins = padded([prompts[i][:cuts[i]] for i in firsts], padding, device)  # (G,P)
    rests = padded([ids[cut:] for ids, cut in zip(prompts, cuts)], padding, device)  # (B,R)
    P, T = begins.shape[1], begins.shape[1] + rests.shape[1]

    cut, length = (torch.tensor(each, device=device)[:, None] for each in (
        cuts, [len(ids) for ids in prompts]))  # (B,1)
    place = torch.arange(T + max_new_tokens, device=device)
    # (B,T+new) True where a row has a token
    real = torch.where(place < P, place >= P - cut, place >= T - (length - cut))
    positions = (real.cumsum(1) - 1).clamp(min=0)  # (B,T+new)

    cache = KVCache(decoder.config.num_hidden_layers, T + max_new_tokens)
    if P:
        prefill(model, begins, [pixels[i] for i in firsts], positions[firsts], real[firsts], cache)
        cache.keep_rows(torch.tensor(owner, device=device))
        pixels = []
    hidden = prefill(model, rests, pixels, positions, real, cache)  # (B,R,D)
    step, logits = step_of(model, cache, real), decoder.logits(hidden[:, -1])  # (B,V)
    answers, ended = [[] for _ in prompts], set()  # ended: numbers of prompts
    going = list(range(len(prompts)))  # the prompt that each row of the batch answers
    for left in reversed(range(max_new_tokens)):
        tokens = logits.argmax(-1)  # (rows,)
        ended |= take(tokens.tolist(), going, answers, ended, stop_ids)
        rows = [row for row, prompt in enumerate(going) if prompt not in ended]
        if not rows or not left:
            break
        if len(rows) <= step.enough * len(going):  # leave those behind that have ended
            going = [going[row] for row in rows]
            rows = torch.tensor(rows, device=device)
            tokens = tokens[rows]
            step.keep_rows(rows)
        logits = step(tokens)
    return answers


def shared_beginnings(prompts, pixels, placeholder: int | None, limit: int):
    """-> for each prompt how many of its tokens are such a beginning; the number of a prompt with
    each beginning that there is; for each prompt which of these is its own.

    No prompt has one (0) where nothing is gained: where all differ, or where the longest beginning
    and the longest rest, of different prompts perhaps, take more than `limit` tokens.
    """
    cuts, firsts, owner, known = [], [], [], {}
    for number, (ids, shown) in enumerate(zip(prompts, pixels)):
        ends = [place + 1 for place, token in enumerate(ids) if token == placeholder]
        cut = ends[-1] if ends and shown is not None else 0
        key = (id(shown), *ids[:cut]) if cut else number
        if key not in known:
            known[key] = len(firsts)
            firsts.append(number)
        cuts.append(cut)
        owner.append(known[key])
    longest = max(cuts) + max(len(ids) - cut for ids, cut in zip(prompts, cuts))
    if len(firsts) == len(prompts) or longest > limit:
        return [0] * len(prompts), [], []
    return cuts, firsts, owner


def padded(rows: list[list[int]], padding: int, device) -> torch.Tensor:
    """-> (B,T), each row on the right"""
    T = max(map(len, rows), default=0)
    return torch.tensor([[padding] * (T - len(row)) + list(row) for row in rows],
                        dtype=torch.long, device=device).view(len(rows), T)


def prefill(model, ids, pixels: list, positions, real, cache: KVCache):
    """ids (B,T), after what the cache holds -> hidden (B,T,D), and the cache holds them too.

    positions, real (B,T or more): of all places, those in the cache included; see generate_batch.
    """
    past, end = cache.length, cache.length + ids.shape[1]
    place = torch.arange(end, device=ids.device)
    causal = place[past:, None] >= place  # (T,Tk)
    # A padding place looks at itself: a softmax over nothing would be NaN, and NaN spreads.
    itself = place[past:, None] == place
    mask = (causal & real[:, None, None, :end]) | itself  # (B,1,T,Tk)
    given = [p for p in pixels if p is not None]
    embeds = embed(model, ids, torch.cat(given).to(ids.device) if given else None)  # (B,T,D)
    return decoder_of(model).decode(embeds, positions[:, past:end], mask, cache)


def take(tokens: list[int], going: list[int], answers: list[list[int]], ended: set, stop_ids):
    """Add each row's token to its prompt's answer -> the prompts that have ended with it."""
    stopped = {prompt for token, prompt in zip(tokens, going) if token in stop_ids}
    for token, prompt in zip(tokens, going):
        if prompt not in ended | stopped:
            answers[prompt].append(token)
    return stopped
