"""LanguageModel.decode_step on a GPU, recorded once and replayed for each further token.

    ids (B,) -> embedding (B,1,D) -> decoder; the cache takes them in -> logits (B,V)

A step is a thousand kernels or more of a few microseconds each, and Python needs longer to launch
one than the GPU to run it. A CUDA graph is the list of them with all their addresses, and launches
them all at once. So nothing in it may depend on a number that only Python knows: the position of
the new token is a tensor, and attention covers the whole cache, with a mask over what is not yet
written.
"""

import weakref

import torch

from model.generate import KVCache


class StaticKVCache:
    """The cache as a recorded step sees it: a tensor says where keys and values are written."""

    length = 0

    def __init__(self, store, index):
        self.store, self.index = store, index

    def append(self, layer: int, k, v):
        keys, values = self.store[layer]  # (B,Hkv,capacity,hd)
        keys.index_copy_(2, self.index, k)
        values.index_copy_(2, self.index, v)
        return keys, values


class CUDAGraphDecodeStep:
    """The first call runs the step as it is, which loads whatever libraries it needs; the second
    one records it.

    real (B,capacity) bool: True where a row has a token, those to come included; None: everywhere.
    """

    min_kept = 0.4  # see keep_rows: recording anew costs about ten steps

    def __init__(self, decoder, cache: KVCache, real=None):
        # The cache may own this step: a circle would keep its memory until Python's next
        # collection of garbage.
        self.decoder, self.cache, self.real = decoder, weakref.proxy(cache), real
        self.prepare()

    def prepare(self) -> None:
        """Make the tensors whose addresses the recording will hold."""
        store, past, capacity = self.cache.store, self.cache.length, self.cache.capacity
        store[..., past:, :] = 0  # unwritten memory may be NaN, and NaN times a weight of 0 is NaN
        B, device = store.shape[2], store.device
        real = self.real
        if real is None:
            real = torch.ones(B, capacity, dtype=torch.bool, device=device)
        self.ids = torch.zeros(B, dtype=torch.long, device=device)
        self.index = torch.tensor([past], device=device)
        self.positions = real[:, :past].sum(1, keepdim=True)  # (B,1)
        written = real & (torch.arange(capacity, device=device) < past)
        # Added to a score: 0, or -inf where nobody may look. Every layer would make it of True and
        # False anew.
        self.mask = torch.where(written, 0.0, -torch.inf).to(store.dtype)[:, None, None]
        self.graph, self.logits, self.calls = None, None, 0

    def run(self):
        self.mask.index_fill_(3, self.index, 0.0)  # (B,1,1,capacity)
        embeds = self.decoder.embed(self.ids[:, None])  # (B,1,D)
        hidden = self.decoder.decode(embeds, self.positions, self.mask,
                                     StaticKVCache(self.cache.store, self.index))
        self.index += 1
        self.positions += 1
        return self.decoder.logits(hidden[:, -1])

    def __call__(self, ids):
        self.ids.copy_(ids)
        if self.calls == 0:
            self.logits = self.run()
        else:
            if self.calls == 1:
                self.record()
            self.graph.replay()
        self.calls += 1
        self.cache.length += 1
        return self.logits

    def record(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, which may be pinning memory for the next batch, may go on.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = self.run()

    def keep_rows(self, rows) -> None:
        """rows: indices of the rows of the batch that go on."""
        self.real = self.real[rows]
        self.cache.store = self.cache.store[:, :, rows]
        self.prepare()
