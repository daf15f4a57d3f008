"""The decoder: token ids or embeddings (B,T,D) in, hidden states (B,T,D) and logits (B,T,V) out.

One file for Llama, SmolLM2, MiniMind, Qwen-7B and Qwen2 to 3: they differ only in the facts of
LanguageConfig. The hidden states form a residual stream, to which each layer adds twice: attention
lets a token look at those before it, the MLP then treats each by itself. Both read a normalised
copy (pre-norm).

Shapes here and in every other file: B rows, T tokens, N images, P patches, K image tokens of an
image, D language width, Dv vision width, H query heads, Hkv key/value heads, hd head width,
V vocabulary.

Papers: RoPE (Su et al. 2021), RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020),
GQA (Ainslie et al. 2023), Qwen (2023), Qwen2 (2024), Qwen3 (2025).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.config import LanguageConfig
from model.rope import scaled


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32: squares of bf16 values lose too many digits."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rope_cos_sin(positions: torch.Tensor, head_dim: int, theta: float, scaling: dict | None = None):
    """Cosine and sine of the angles by which RoPE rotates the pairs (i, i + hd/2) of every head.

    positions (B,T) -> cos, sin (B,T,1,hd), float32. Pair i rotates by position / theta^(2i/hd).
    In bfloat16 position 4,001 would equal 4,000, so this is float32 whatever the model's dtype.
    """
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = scaled(1.0 / theta ** (pair / head_dim), scaling)  # (hd/2,)
    angle = positions[:, :, None, None].float() * frequency  # (B,T,1,hd/2)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate_half(x):
    """(a, b) -> (-b, a), where a and b are the two halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def apply_rope(x, cos, sin):
    """Rotate the pairs (a, b) of x (B,T,heads,hd): a cos - b sin, b cos + a sin."""
    x32 = x.float()
    return (x32 * cos + rotate_half(x32) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: each of the Hkv key/value heads serves H/Hkv query heads."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def queries_keys_values(self, x, rope):
        """x (B,T,D) -> q (B,H,T,hd), k and v (B,Hkv,T,hd); q and k carry their positions."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.num_key_value_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.num_key_value_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q, k, v, mask):
        """q (B,H,T,hd), k and v (B,Hkv,Tk,hd) -> softmax(q k^T / sqrt(hd)) v, (B,H,T,hd)"""
        groups = self.num_heads // self.num_key_value_heads
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))  # (B,H,Tk,hd)
        # Without a mask the kernel hides later tokens by itself; one new token may see them all.
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    def forward(self, x, rope, mask, cache, layer_index):
        q, k, v = self.queries_keys_values(x, rope)
        if cache is not None:
            k, v = cache.append(layer_index, k, v)  # (B,Hkv,Tk,hd): all tokens so far
        out = self.attend(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B,T,H,hd) -> (B,T,H*hd) -> (B,T,D)


class MLP(nn.Module):
    """SwiGLU: silu(gate) decides how much of each value of up passes."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, cache, layer_index):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, layer_index)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """ids (B,T) -> logits (B,T,V); or, in three steps: embed, decode, logits.

    checkpointing: activation checkpointing (Chen et al. 2016). Each layer keeps only its input for
    the backward pass and computes the rest again there, with the same dropout. So the dozen
    tensors inside a layer exist for one layer at a time; the price is a second forward pass.
    """

    checkpointing = False

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, ids):
        """ids (B,T) -> (B,T,D). A frozen table may be stored in bf16, but the residual stream has
        the dtype of the norms, float32 in training: bf16 would round small additions away."""
        return self.embed_tokens(ids).to(self.norm.weight.dtype)

    def decode(self, embeds, positions=None, mask=None, cache=None):
        """embeds (B,T,D) -> hidden states (B,T,D), after the final norm.

        positions (B,T): position of each token in its row; default: counted on from the cache.
        mask (T,Tk) or (B,1,T,Tk): bool, True where token t may look at token k, or floats that are
        added to the attention scores; default: causal. Rows padded on the right need none, since
        no token looks to its right.
        cache: a KVCache that holds the earlier tokens; these are appended.
        Raises ValueError when rows grow longer than config.context_limit.
        """
        (B, T, _), config, limit = embeds.shape, self.config, self.config.context_limit
        past = cache.length if cache is not None else 0
        if limit and past + T > limit:
            raise ValueError(f"a row of {past + T} tokens: past {limit} this model "
                             "changes RoPE and scales its queries (dynamic NTK, log-n attention), "
                             "which is not built here; cut the text or ask for fewer new tokens")
        if mask is None and past and T > 1:
            # The kernel's own causal mask starts both sequences at 0; here the keys start earlier.
            mask = torch.ones(T, past + T, dtype=torch.bool, device=embeds.device).tril(past)
        if positions is None:
            positions = torch.arange(past, past + T, device=embeds.device).expand(B, T)
        rope = rope_cos_sin(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x = embeds
        for index, layer in enumerate(self.layers):
            if self.checkpointing:
                x = checkpoint(layer, x, rope, mask, cache, index, use_reentrant=False)
            else:
                x = layer(x, rope, mask, cache, index)
        return self.norm(x)

    def logits(self, hidden):
        """hidden (...,D) -> logits (...,V). A tied head is the embedding table, transposed."""
        if self.config.tie_word_embeddings:
            return F.linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)

    def forward(self, ids):
        return self.logits(self.decode(self.embed(ids)))

    def decode_step(self, ids, cache):
        """The newest id of each row (B,), which joins the cache -> logits (B,V) of the next."""
        return self.logits(self.decode(self.embed(ids[:, None]), cache=cache)[:, -1])
