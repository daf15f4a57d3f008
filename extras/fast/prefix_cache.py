"""What the answers of a conversation leave to the next one.

Prompts of one conversation begin alike: the keys and values of that beginning, images included,
need not be computed again.
"""

import torch


class PrefixCache:
    """Give the same one to each `generate` of a conversation."""

    def __init__(self):
        self.cache = None  # the KVCache of the last answer
        self.ids, self.pixels = [], ()  # what it holds, and perhaps one token more

    def reuse(self, model, ids: list[int], pixels, cache):
        """Copy the keys and values of what ids and the last prompt begin with into cache, which is
        new and empty -> the pixels of the images after it, or None.

        The list ids will be read again at the next prompt: the answer's ids are appended to it.
        """
        placeholder = getattr(model.config, "image_token_id", None)
        length, images = self.shared_prefix(ids, pixels, placeholder)
        if length:
            old = self.cache.store
            cache.store = old.new_empty(*old.shape[:4], cache.capacity, old.shape[5])
            cache.store[..., :length, :] = old[..., :length, :]
            cache.length = length
        self.cache, self.ids, self.pixels = cache, ids, () if pixels is None else pixels
        return None if pixels is None or images == len(pixels) else pixels[images:]

    def shared_prefix(self, ids: list[int], pixels, placeholder: int | None) -> tuple[int, int]:
        """The number of tokens, and of images among them, that this prompt shares with the last.

        Its last token is never shared, since the next one follows from it; nor is a part of an
        image. Two images are the same if their pixels are.
        """
        held = 0 if self.cache is None else min(self.cache.length, len(self.ids), len(ids) - 1)
        same = next((i for i in range(held) if ids[i] != self.ids[i]), held)
        positions = [position for position, token in enumerate(ids) if token == placeholder]
        N = 0 if pixels is None else len(pixels)
        if not positions:
            return same, 0
        if N == 0 or len(positions) % N:
            return min(same, positions[0]), 0  # VLM.embed will say what does not fit
        K, images = len(positions) // N, 0
        while (images < min(N, len(self.pixels)) and positions[images * K + K - 1] < same
               and torch.equal(pixels[images], self.pixels[images])):
            images += 1
        return (same if images == N else min(same, positions[images * K])), images
