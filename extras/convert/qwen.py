"""Qwen-7B's own layout, the first Qwen's -> Qwen2's: the same arithmetic under other names.

    config.json of model_type "qwen" -> qwen2_config  -> config.json of model_type "qwen2"
    {its name: tensor}               -> qwen2_tensors -> {Qwen2's name: the same tensor}
"""

import re

import torch

from model.pretrained.public_config import check_values, refuse

# Where one published matrix holds several of Qwen2's, stacked, the right side lists them in order.
NAMES = {
    "wte": ["model.embed_tokens"],
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.w1": ["mlp.up_proj"],
    "mlp.w2": ["mlp.gate_proj"],  # w2, not w1, goes through the silu
    "mlp.c_proj": ["mlp.down_proj"],
    "ln_f": ["model.norm"],
}
TENSOR = re.compile(rf"(.*?)(?:transformer\.)?(?:h\.(\d+)\.)?({'|'.join(map(re.escape, NAMES))})"
                    r"\.((?:lora_[AB]\.(?:default\.)?)?(?:weight|bias))")
# Of early releases: tables that are computed here, and a causal mask.
UNREAD = re.compile(r"(transformer\.)?(rotary_emb\.inv_freq"
                    r"|h\.\d+\.attn\.(rotary_emb\.inv_freq|masked_bias|bias))")
SUPPORTED = {"rotary_pct": 1.0, "no_bias": True, "scale_attn_weights": True}


def qwen2_config(public: dict) -> dict:
    """ValueError: what Qwen2 would compute otherwise.

    In a row of more than seq_length tokens (8,192; 2,048 in the first release) Qwen-7B stretches
    RoPE (use_dynamic_ntk) and scales the queries by the logarithm of their position
    (use_logn_attn), when it generates; not in training. That is not built: context_limit makes the
    decoder refuse such a row.
    """
    public = check_values(public)
    missing = [name for name in ("vocab_size", "hidden_size", "intermediate_size",
                                 "num_hidden_layers", "num_attention_heads") if name not in public]
    if missing:
        raise ValueError(f"config.json of model_type 'qwen' lacks {', '.join(missing)}: is it of "
                         "the first release (n_embd, n_layer, ...)? Get the current one of "
                         "Qwen/Qwen-7B-Chat")
    head_dim = public["hidden_size"] // public["num_attention_heads"]
    for name, value in {**SUPPORTED, "kv_channels": head_dim}.items():
        refuse(public, name, public.get(name, value), value)
    longest = public.get("seq_length", 8192)
    limited = public.get("use_dynamic_ntk", True) or public.get("use_logn_attn", True)
    if not limited:
        longest = public.get("max_position_embeddings", longest)
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "vocab_size": public["vocab_size"], "hidden_size": public["hidden_size"],
        # The file gives the width of w1 and w2 together.
        "intermediate_size": public["intermediate_size"] // 2,
        "num_hidden_layers": public["num_hidden_layers"],
        "num_attention_heads": public["num_attention_heads"],
        "num_key_value_heads": public["num_attention_heads"],
        "hidden_act": "silu", "rms_norm_eps": public.get("layer_norm_epsilon", 1e-6),
        "rope_theta": public.get("rotary_emb_base", 10000),
        "max_position_embeddings": longest, "context_limit": longest if limited else None,
        "tie_word_embeddings": False}  # its code has a head of its own in any case


def qwen2_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Also of a LoRA adapter by peft: its B is stacked as the matrix is, its A goes to each part.

    A name that is not Qwen-7B's stays as it is: the loader, which accounts for every tensor,
    refuses what it does not know.
    """
    renamed = {}
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name)
        if not match:
            renamed.update({} if UNREAD.fullmatch(name) else {name: tensor})
            continue
        before, layer, published, last = match.groups()
        names = NAMES[published]
        parts = [tensor] * len(names) if "lora_A" in last else tensor.chunk(len(names))
        layer = f"model.layers.{layer}." if layer else ""
        renamed.update({f"{before}{layer}{ours}.{last}": part
                        for ours, part in zip(names, parts)})
    return renamed
