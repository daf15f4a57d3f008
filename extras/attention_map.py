"""Where a decoder looks, and what it makes of what it saw: numbers to draw, not to train on.

    embeddings (1,T,D) -> layer by layer -> the weights with which token t looks at token s
                                         -> what each token would say if this were the last layer

The fused kernel of language.py never forms the attention weights. Here they are formed again, from
each layer's own norm, projections and RoPE, in the same numbers: softmax(q k^T / sqrt(hd)) under
the causal mask, nothing left out. Only the softmax is in float32, as in the kernel. A row of
them sums to 1; weights times v is what the layer's own attention computes.

The logit lens (nostalgebraist 2020) puts the stream behind any layer through the final norm and
the head, as if no layer came after: the word that the token stands for by then. Behind the last
layer that is the model's real prediction of the next token.
"""

from math import sqrt

import torch

from model.language import Attention, LanguageModel, rope_cos_sin


def attention_weights(attention: Attention, x, rope, places=None):
    """One layer's. x (B,T,D): its normed input; rope: of positions 0..T-1; places (R,): of the
    tokens that look, default all -> (B,H,R,T) float32."""
    T = x.shape[1]
    q, k, _ = attention.queries_keys_values(x, rope)  # (B,H,T,hd), (B,Hkv,T,hd)
    k = k.repeat_interleave(attention.num_heads // attention.num_key_value_heads, dim=1)
    if places is None:
        places = torch.arange(T, device=x.device)
    q = q[:, :, places]  # (B,H,R,hd)
    scores = q.float() @ k.float().transpose(2, 3) / sqrt(attention.head_dim)  # (B,H,R,T)
    later = torch.arange(T, device=x.device) > places[:, None]  # (R,T)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


@torch.inference_mode()
def each_layer(decoder: LanguageModel, embeds, places=None):
    """Yield (weights, stream) of every layer: weights (B,H,R,T) of the tokens at `places` (R,),
    default all, and the stream behind it (B,T,D).

    One layer at a time, for all of them together would be gigabytes: 28 layers of 16 heads over
    1,000 tokens are 1.8 GB.
    """
    positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
    rope = rope_cos_sin(positions, decoder.config.head_dim, decoder.config.rope_theta)
    x = embeds
    for number, layer in enumerate(decoder.layers):
        weights = attention_weights(layer.self_attn, layer.input_layernorm(x), rope, places)
        x = layer(x, rope, None, None, number)
        yield weights, x


@torch.inference_mode()
def look(model, ids: list[int], pixels, answer: int):
    """A VLM's prompt and answer, once more -> how the answer looked back, and a logit lens.

    ids: the prompt and then the answer's `answer` tokens; pixels (N,3,H,W).
    Returns weights (answer,T), the mean over all layers and heads: row i is that of the place which
    chose token i of the answer, the one before it. And lens [(N*K,)] ids, for each layer: the
    likeliest word behind it at each image token.
    """
    decoder, device = model.language, model.language.embed_tokens.weight.device
    row = torch.tensor([ids], device=device)
    embeds = model.embed(row, pixels.to(device))  # (1,T,D)
    T = len(ids)
    choosing = torch.arange(T - answer - 1, T - 1, device=device)
    images = row[0] == model.config.image_token_id  # (T,)
    total, lens = 0, []
    for weights, stream in each_layer(decoder, embeds, choosing):
        total = total + weights[0].mean(0)  # (answer,T)
        lens.append(decoder.logits(decoder.norm(stream[0, images])).argmax(-1))  # (N*K,)
    return total / len(decoder.layers), lens
