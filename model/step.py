"""One step of an answer: the last token of each row in, the logits of the next one out.

    tokens (B,) -> embedding (B,1,D) -> decoder; the cache takes them in -> logits (B,V)

On a GPU the step is recorded once and played again for each further token. A step is a thousand
kernels or more of a few microseconds each, and Python needs longer to ask for one than the GPU to
run it. A CUDA graph is the list of them with all their addresses, and asks for them all at once. So
nothing in it may hang on a number that only Python knows: the place of the new token is a tensor,
and all of the cache is looked at, with a mask over what is not yet written.
"""

import torch


class KVCache:
    """The keys and values of every token so far, for every layer, in one piece of memory.

    capacity: tokens that it has room for. An answer knows beforehand how long it can grow, so the
    memory is asked for once: joining two tensors at each token would copy the whole past for every
    word.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.num_layers, self.capacity = num_layers, capacity
        self.length = 0  # tokens that all layers hold
        self.store = None  # (layers,2,B,Hkv,capacity,hd), keys and values; made at the first append

    def append(self, layer: int, k, v):
        """Take in k, v (B,Hkv,T,hd) of one layer; return all its keys and values (B,Hkv,Tk,hd).

        The layers append in order, so the last one completes the step and moves `length` on: what
        an interrupted step has written is beyond it, and nobody reads it.
        """
        end = self.length + k.shape[2]
        if self.store is None:
            B, Hkv, _, hd = k.shape
            self.store = k.new_empty(self.num_layers, 2, B, Hkv, self.capacity, hd)
        keys, values = self.store[layer]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        if layer == self.num_layers - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def longer(self, length: int, capacity: int) -> "KVCache":
        """Another cache with the first `length` tokens of this one, and room for `capacity`."""
        other = KVCache(self.num_layers, capacity)
        if length:
            other.store = self.store.new_empty(*self.store.shape[:4], capacity,
                                               self.store.shape[5])
            other.store[..., :length, :] = self.store[..., :length, :]
            other.length = length
        return other

    def keep_rows(self, rows) -> None:
        """rows: numbers of the rows of the batch that go on."""
        self.store = self.store[:, :, rows]


class Step:
    """real (B,capacity) bool: the places that hold a token of the row, those to come included;
    None: every place does."""

    # The share of rows that must go on. A row that has ended costs as much as the others; to leave
    # it behind copies the cache, which costs about what a step does.
    enough = 0.75

    def __init__(self, decoder, cache: KVCache, real=None):
        self.decoder, self.cache, self.real = decoder, cache, real

    def __call__(self, tokens):
        end, positions, mask = self.cache.length + 1, None, None
        if self.real is not None:
            positions = self.real[:, :end].sum(1, keepdim=True) - 1  # (B,1)
            mask = self.real[:, None, None, :end]  # (B,1,1,Tk)
        embeds = self.decoder.embed(tokens[:, None])  # (B,1,D)
        return self.decoder.logits(self.decoder.decode(embeds, positions, mask, self.cache)[:, -1])

    def keep_rows(self, rows) -> None:
        """rows: numbers of the rows of the batch that go on."""
        self.real = self.real[rows]
        self.cache.keep_rows(rows)


class FixedPlace:
    """The cache as a recorded step sees it: a token's keys and values go where a tensor says."""

    length = 0

    def __init__(self, store, place):
        self.store, self.place = store, place

    def append(self, layer: int, k, v):
        keys, values = self.store[layer]  # (B,Hkv,capacity,hd)
        keys.index_copy_(2, self.place, k)
        values.index_copy_(2, self.place, v)
        return keys, values


class RecordedStep(Step):
    """The first call runs the step as it is, which loads whatever libraries it needs; the second
    one records it."""

    enough = 0.4  # to leave rows behind is to record anew, which costs about ten steps

    def __init__(self, decoder, cache: KVCache, real=None):
        super().__init__(decoder, cache, real)
        self.prepare()

    def prepare(self) -> None:
        """Make the tensors whose addresses the recording will hold."""
        store, past, capacity = self.cache.store, self.cache.length, self.cache.capacity
        store[..., past:, :] = 0  # unwritten memory may be NaN, and NaN times a weight of 0 is NaN
        B, device = store.shape[2], store.device
        real = self.real
        if real is None:
            real = torch.ones(B, capacity, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(B, dtype=torch.long, device=device)
        self.place = torch.tensor([past], device=device)
        self.positions = real[:, :past].sum(1, keepdim=True)  # (B,1)
        written = real & (torch.arange(capacity, device=device) < past)
        # What is added to a score: 0, or -inf where nobody may look. Every layer would make it of
        # True and False anew.
        self.mask = torch.where(written, 0.0, -torch.inf).to(store.dtype)[:, None, None]
        self.graph, self.logits, self.calls = None, None, 0

    def run(self):
        self.mask.index_fill_(3, self.place, 0.0)  # (B,1,1,capacity)
        embeds = self.decoder.embed(self.tokens[:, None])  # (B,1,D)
        hidden = self.decoder.decode(embeds, self.positions, self.mask,
                                     FixedPlace(self.cache.store, self.place))
        self.place += 1
        self.positions += 1
        return self.decoder.logits(hidden[:, -1])

    def __call__(self, tokens):
        self.tokens.copy_(tokens)
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
        super().keep_rows(rows)
        self.prepare()
