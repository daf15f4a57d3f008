"""MiniMind: the shape of a model that is published without a config.json.

    llm_768.pth -> names and shapes of its tensors -> minimind_config -> LanguageConfig

MiniMind (github.com/jingyaogong/minimind, and minimind-v) publishes one .pth file for a model, and
the numbers that describe it stand in the code of its day. Most can be read off the tensors; the
rest follows from which generation the tensors belong to, and that they tell as well.
"""

import re

from model.config import LanguageConfig
from model.pretrained.public_config import check_values, refuse

# What shapes cannot tell, by: older names? norms of q and k? width of q / width of k.
# The first two are interleaved (layouts.half_split); all tie the head to the embeddings.
GENERATIONS = {
    (True, False, 2): {"num_attention_heads": 16, "rope_theta": 1e4, "rms_norm_eps": 1e-5},  # v1
    (True, False, 4): {"num_attention_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5},  # 2
    (False, False, 4): {"num_attention_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5},  # 2
    (False, True, 2): {"num_attention_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-6},  # 3
}
OLDER_NAMES = {"n_heads": "num_attention_heads", "norm_eps": "rms_norm_eps"}  # in config.json


def is_older(names) -> bool:
    """Was this file written before April 2025, under the names of layouts.MINIMIND?"""
    return "tok_embeddings.weight" in names


def minimind_config(shapes: dict[str, list[int]], public: dict, where) -> LanguageConfig:
    """{published name: shape} of a MiniMind file -> its config: "llama", or "qwen3" for minimind-3.

    public: a config.json of MiniMind's own, or {}. What it says about heads, theta and eps goes
    before the table. Raises ValueError (naming `where`) for a file of another kind.
    """
    older, normed = is_older(shapes), "model.layers.0.self_attn.q_norm.weight" in shapes
    if any(".experts." in name for name in shapes):
        raise ValueError(f"{where}: a mixture of experts; only MiniMind's dense models are "
                         "supported here (minimind-3, MiniMind2, MiniMind2-Small)")
    names = (("tok_embeddings", "layers.0.attention.wq", "layers.0.attention.wk",
              "layers.0.feed_forward.w1") if older else
             ("model.embed_tokens", "model.layers.0.self_attn.q_proj",
              "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.gate_proj"))
    missing = [f"{name}.weight" for name in names if f"{name}.weight" not in shapes]
    if missing:
        raise ValueError(f"{where}: no MiniMind language model, it lacks {missing[0]}. Another "
                         "model's weights need its config.json beside them")
    for name in names:
        if len(shapes[f"{name}.weight"]) != 2 or 0 in shapes[f"{name}.weight"]:
            raise ValueError(f"{where}: {name}.weight has the shape {shapes[f'{name}.weight']}; "
                             "expected a matrix")
    (words, width), (q, _), (k, _), (middle, _) = (shapes[f"{name}.weight"] for name in names)

    said = check_values({OLDER_NAMES.get(key, key): value for key, value in public.items()})
    rope = check_values(said.get("rope_parameters") or said.get("rope_scaling") or {},
                        "rope_scaling of config.json")
    refuse(public, "rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    facts = {**GENERATIONS.get((older, normed, q / k), {}), **rope,
             **{key: value for key, value in said.items() if value is not None}}
    if "num_attention_heads" not in facts:
        raise ValueError(
            f"{where}: q is {q} wide and k {k}: no MiniMind that is known here, so the shapes do "
            "not tell the number of heads. Put a config.json of MiniMind's beside it, with "
            "num_attention_heads, rope_theta and rms_norm_eps")
    head_dim = q // facts["num_attention_heads"]
    if not head_dim or q % head_dim or k % head_dim:
        raise ValueError(f"{where}: q is {q} wide and k {k}; {facts['num_attention_heads']} heads "
                         "cannot share that out")
    layer = re.compile(r"(?:model\.)?layers\.(\d+)\.")
    return LanguageConfig(
        model_type="qwen3" if normed else "llama",
        vocab_size=words,
        hidden_size=width,
        intermediate_size=middle,
        num_hidden_layers=1 + max(int(layer.match(name)[1]) for name in shapes
                                  if layer.match(name)),
        num_attention_heads=facts["num_attention_heads"],
        num_key_value_heads=k // head_dim,
        head_dim=head_dim,
        # Version 1 has theta in its code alone, and its files no entry for it.
        rope_theta=float(facts.get("rope_theta", 1e4 if older else 1e6)),
        rms_norm_eps=facts.get("rms_norm_eps", 1e-6 if normed else 1e-5),
        tie_word_embeddings=facts.get("tie_word_embeddings", True),
        qkv_bias=False,
        qk_norm=normed,
        max_position_embeddings=32768,
    )
