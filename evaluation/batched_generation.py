"""The greedy answers to many prompts at once, for scoring.

    prompts -> shared prefixes, once each -> the rest of every prompt -> tokens for all rows at once
"""

import torch

from model.generate import KVCache, embed, language_model_of, room_left


class BatchedDecodeStep:
    """One step of all rows: the newest id of each (B,) -> logits (B,V) of the next.

    real (B,capacity) bool: True where a row has a token, those to come included, False at padding.
    """

    # The share of rows that must go on. A finished row costs as much as the others; to leave it
    # out copies the cache, which costs about what a step does.
    min_kept = 0.75

    def __init__(self, decoder, cache: KVCache, real):
        self.decoder, self.cache, self.real = decoder, cache, real

    def __call__(self, ids):
        hidden = decode_rows(self.decoder, ids[:, None], [], self.real, self.cache)  # (B,1,D)
        return self.decoder.logits(hidden[:, -1])

    def keep_rows(self, rows) -> None:
        """rows: indices of the rows of the batch that go on."""
        self.real = self.real[rows]
        self.cache.store = self.cache.store[:, :, rows]


@torch.inference_mode()
def generate_batch(model, prompts: list[list[int]], pixels: list, max_new_tokens: int,
                   stop_ids) -> list[list[int]]:
    """The greedy answer to each prompt, all at once, without the stop token.

    pixels: for each prompt (N,3,H,W) or None. Prompts that begin alike up to the end of their
    images, given as the same tensor, are questions about one thing: their prefix goes through the
    decoder once for all of them. Prefixes and rests are padded on the LEFT, so that all rows write
    their next token at the same index; the positions are those without padding, which the mask
    hides.

        ids  . a b | . c | x      positions  0 0 1 | 1 2 | 3      visible  . 1 1 | . 1 | 1
             d e f | g h | y                 0 1 2 | 3 4 | 5               1 1 1 | 1 1 | 1
    """
    decoder = language_model_of(model)
    device = decoder.embed_tokens.weight.device
    placeholder = getattr(model.config, "image_token_id", None)
    max_new_tokens = min(max_new_tokens, room_left(decoder, max(map(len, prompts))))
    cuts, firsts, owner = shared_prefixes(
        prompts, pixels, placeholder, decoder.config.max_position_embeddings - max_new_tokens)
    # Any id but the image placeholder will do: the mask hides it.
    padding = 1 if placeholder == 0 else 0
    prefixes = pad_left([prompts[i][:cuts[i]] for i in firsts], padding, device)  # (G,P)
    rests = pad_left([ids[cut:] for ids, cut in zip(prompts, cuts)], padding, device)  # (B,R)
    P, T = prefixes.shape[1], prefixes.shape[1] + rests.shape[1]

    cut, length = (torch.tensor(each, device=device)[:, None] for each in (
        cuts, [len(ids) for ids in prompts]))  # (B,1)
    index = torch.arange(T + max_new_tokens, device=device)
    # (B,T+new) True where a row has a token
    real = torch.where(index < P, index >= P - cut, index >= T - (length - cut))

    cache = KVCache(decoder.config.num_hidden_layers, T + max_new_tokens)
    if P:
        decode_rows(model, prefixes, [pixels[i] for i in firsts], real[firsts], cache)
        cache.store = cache.store[:, :, torch.tensor(owner, device=device)]
        pixels = []
    hidden = decode_rows(model, rests, pixels, real, cache)  # (B,R,D)
    # extras/fast may have put a decoder here that records its steps.
    recorded = getattr(decoder, "recorded_step", lambda *_: None)(cache, real)
    step = recorded or BatchedDecodeStep(decoder, cache, real)
    return decode_all(step, decoder.logits(hidden[:, -1]), max_new_tokens, stop_ids)


def decode_all(step, logits, max_new_tokens: int, stop_ids) -> list[list[int]]:
    """logits (B,V) after each prompt -> the answers. Rows that have ended are left out of later
    steps when enough of them are."""
    answers, ended = [[] for _ in logits], set()  # ended: indices of prompts
    going = list(range(len(logits)))  # the prompt that each row of the batch answers
    for left in reversed(range(max_new_tokens)):
        tokens = logits.argmax(-1)  # (rows,)
        for prompt, token in zip(going, tokens.tolist()):
            if token in stop_ids:
                ended.add(prompt)
            elif prompt not in ended:
                answers[prompt].append(token)
        rows = [row for row, prompt in enumerate(going) if prompt not in ended]
        if not rows or not left:
            break
        if len(rows) <= step.min_kept * len(going):
            going = [going[row] for row in rows]
            rows = torch.tensor(rows, device=tokens.device)
            tokens = tokens[rows]
            step.keep_rows(rows)
        logits = step(tokens)
    return answers


def shared_prefixes(prompts, pixels, placeholder: int | None, limit: int):
    """-> for each prompt the length of its shared prefix; for each prefix the index of a prompt
    that has it; for each prompt the index of its prefix.

    No prompt has one (0) where nothing is gained: where all differ, or where the longest prefix
    and the longest rest, of different prompts perhaps, take more than `limit` tokens.
    """
    cuts, firsts, owner, known = [], [], [], {}
    for number, (ids, images) in enumerate(zip(prompts, pixels)):
        ends = [position + 1 for position, token in enumerate(ids) if token == placeholder]
        cut = ends[-1] if ends and images is not None else 0
        key = (id(images), *ids[:cut]) if cut else number
        if key not in known:
            known[key] = len(firsts)
            firsts.append(number)
        cuts.append(cut)
        owner.append(known[key])
    longest = max(cuts) + max(len(ids) - cut for ids, cut in zip(prompts, cuts))
    if len(firsts) == len(prompts) or longest > limit:
        return [0] * len(prompts), [], []
    return cuts, firsts, owner


def pad_left(rows: list[list[int]], padding: int, device) -> torch.Tensor:
    """-> (B,T)"""
    T = max(map(len, rows), default=0)
    return torch.tensor([[padding] * (T - len(row)) + list(row) for row in rows],
                        dtype=torch.long, device=device).view(len(rows), T)


def decode_rows(model, ids, pixels: list, real, cache: KVCache):
    """ids (B,T), after what the cache holds -> hidden (B,T,D), and the cache holds them too.

    real (B,T or more): of everything, the cache included; see generate_batch.
    """
    past, end = cache.length, cache.length + ids.shape[1]
    positions = (real[:, :end].cumsum(1) - 1).clamp(min=0)[:, past:]  # (B,T)
    index = torch.arange(end, device=ids.device)
    causal = index[past:, None] >= index  # (T,Tk)
    # Padding looks at itself: a softmax over nothing would be NaN, and NaN spreads.
    itself = index[past:, None] == index
    mask = (causal & real[:, None, None, :end]) | itself  # (B,1,T,Tk)
    given = [p for p in pixels if p is not None]
    embeds = embed(model, ids, torch.cat(given).to(ids.device) if given else None)  # (B,T,D)
    return language_model_of(model).decode(embeds, positions, mask, cache)
