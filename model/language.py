"""The decoder: token ids or embeddings (B,T,D) in, hidden states (B,T,D) and logits (B,T,V) out.

One file for Llama, SmolLM2, MiniMind, Qwen-7B, Qwen2, Qwen2.5 and Qwen3: they differ by the facts
in LanguageConfig only. Each layer adds two things to the stream: attention (tokens look at earlier
tokens) and a gated MLP (each token thinks for itself).

Papers: RoPE (Su et al. 2021), RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020),
GQA (Ainslie et al. 2023), Qwen (2023), Qwen2 (2024), Qwen3 (2025).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from extras.fast.one_row import Linear, product
from model.config import LanguageConfig
from model.numbers import noise, product_dtype


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32: squares of bf16 numbers lose too many digits."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        # Converted here once for all that read it, such as q, k and v.
        return (self.weight * wide.to(x.dtype)).to(product_dtype(x))


def rope_table(positions: torch.Tensor, head_dim: int, theta: float):
    """The angles by which RoPE turns the pairs (i, i + hd/2) of every head.

    positions (B,T) -> cos, sin (B,T,1,hd), float32. Pair i turns by position / theta^(2i/hd):
    in bfloat16 position 4,001 would equal 4,000, so this is computed in float32 whatever the
    model's dtype. The first half of sin is negative, as rotate wants it.
    """
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[:, :, None, None].float() * (1.0 / theta ** (pair / head_dim))  # (B,T,1,hd/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (a, b) = (x[i], x[i + hd/2]) of x (B,T,heads,hd) by its angle: a becomes
    a cos - b sin, and b becomes b cos + a sin. Each number times cos, its partner times sin."""
    wide = x.float()
    return (wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def kernel_shares_heads(q, k, v, mask) -> bool:
    """Whether the kernel lets several query heads read one head of keys and values by itself.

    A CPU's does. Of CUDA's only flash attention (16-bit numbers, compute capability 8.0, no mask);
    where that cannot serve, PyTorch would write down all T x T weights rather than use another.
    Apple's is not asked: it aborts in torch 2.6 and gives wrong numbers in 2.8 to 2.10.
    """
    if q.device.type != "cuda":
        return q.device.type == "cpu"
    use = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, mask is None, True)
    return torch.backends.cuda.can_use_flash_attention(use)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share Hkv heads of keys and values."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.qkv_bias
        self.q_proj = Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = Linear(width, self.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(width, self.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = Linear(self.num_heads * self.head_dim, width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def heads(self, x, rope):
        """x (B,T,D) -> q (B,H,T,hd), k and v (B,Hkv,T,hd), q and k turned to their places"""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.num_key_value_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.num_key_value_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, rope, mask, cache, layer):
        q, k, v = self.heads(x, rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B,Hkv,Tk,hd): all tokens so far
        grouped = self.num_heads != self.num_key_value_heads
        if grouped and not kernel_shares_heads(q, k, v, mask):
            times = self.num_heads // self.num_key_value_heads
            k, v = (t.repeat_interleave(times, dim=1) for t in (k, v))  # (B,H,Tk,hd)
            grouped = False
        # Without a mask the kernel hides later tokens by itself; one new token may see them all.
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B,T,H,hd) -> (B,T,H*hd) -> (B,T,D)


class Gated(torch.autograd.Function):
    """silu(gate) * up, with two tensors kept for the backward pass.

    Left to itself autograd keeps three, silu(gate) as well: a quarter of all that a layer with
    frozen weights keeps. It is computed again instead, which costs one pass over its numbers.
    """

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def gated(gate, up):
    """silu(gate) * up; where nothing goes back there is nothing to keep"""
    return Gated.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate) * up


class MLP(nn.Module):
    """SwiGLU: one linear layer proposes, another opens or closes the gate."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def gate_and_up(self, x):
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x):
        return self.down_proj(gated(*self.gate_and_up(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """ids (B,T) -> logits (B,T,V); or, in three steps: embed, decode, logits.

    checkpointing: for the backward pass keep what goes into each layer, and compute the layer a
    second time there, with the same dropout (Chen et al. 2016). Of the dozen tensors that a layer
    makes of its input only one layer's are there at a time; the price is a second forward pass.
    """

    checkpointing = False

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(
            noise(config.vocab_size, config.hidden_size, std=1.0), freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, ids):
        # In training a frozen table is bf16. The stream that all layers add to is float32 all the
        # same, as the norms are: small contributions would be rounded away in it.
        return self.embed_tokens(ids).to(self.norm.weight.dtype)  # (B,T) -> (B,T,D)

    def decode(self, embeds, positions=None, mask=None, cache=None):
        """embeds (B,T,D) -> hidden states (B,T,D), after the final norm.

        positions (B,T): place of each token in its row; default: counted on from the cache.
        mask (B,1,T,Tk) bool, True where token t may look at token k, or numbers that are added to
        the scores; default: causal. Rows padded on the right need none, since no token looks to
        its right.
        cache: a KVCache that holds the earlier tokens and takes in these.
        Raises when rows grow longer than config.context_limit.
        """
        B, T, _ = embeds.shape
        past = cache.length if cache is not None else 0
        limit = self.config.context_limit
        if limit and past + T > limit:
            raise ValueError(f"a row of {past + T} tokens: past {limit} a {self.config.model_type} "
                             "changes RoPE and scales its queries (dynamic NTK, log-n attention), "
                             "which is not built here; cut the text or ask for fewer new tokens")
        if mask is None and past and T > 1:
            # The kernel's own causal mask starts both sequences at 0; here the keys start earlier.
            mask = torch.ones(T, past + T, dtype=torch.bool, device=embeds.device).tril(past)
        if positions is None:
            positions = torch.arange(past, past + T, device=embeds.device).expand(B, T)
        rope = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        x = embeds
        for number, layer in enumerate(self.layers):
            if self.checkpointing:
                x = checkpoint(layer, x, rope, mask, cache, number, use_reentrant=False)
            else:
                x = layer(x, rope, mask, cache, number)
        return self.norm(x)

    def logits(self, hidden):
        """hidden (...,D) -> logits (...,V); a tied head reads the embedding table backwards."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        if isinstance(self.embed_tokens, nn.Embedding):
            return product(hidden, self.embed_tokens.weight)
        return self.embed_tokens(hidden)  # in fewer bits (quantize.py) the table does it itself

    def forward(self, ids):
        return self.logits(self.decode(self.embed(ids)))
