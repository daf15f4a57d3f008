"""MiniMind's own layouts -> the public one of a llama, or for minimind-3 of a qwen3.

    names and shapes of its tensors -> minimind_config  -> LanguageConfig
    {its name: tensor}              -> minimind_tensors -> {public name: tensor}

MiniMind (github.com/jingyaogong/minimind, and minimind-v) publishes one .pth file for a model, and
the values that describe it stand in the code of its day. Most can be read off the tensors; the
rest follows from which generation the tensors belong to, which their names tell.
"""

import re

from model.config import LanguageConfig
from model.pretrained.public_config import check_values, read_language_config, read_rope

# Before April 2025: the names of Llama's own first code -> the public ones.
OLDER = {
    "tok_embeddings": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "norm": "model.norm",
    "output": "lm_head",
}
TENSOR = re.compile(rf"(layers\.\d+\.)?({'|'.join(map(re.escape, OLDER))})\.weight")
# What MiniMind-V writes beside its language model, and tables that are computed here.
UNREAD = re.compile(r"(model\.)?(vision_proj\..*|vision_encoder\..*|freqs_cos|freqs_sin|pos_cis"
                    r"|layers\.\d+\.attention\.mask)")
# What shapes cannot tell, by: older names? norms of q and k? width of q / width of k.
# The first two are interleaved (half_split); all tie the head to the embeddings.
GENERATIONS = {
    (True, False, 2): {"num_attention_heads": 16, "rope_theta": 1e4, "rms_norm_eps": 1e-5},  # v1
    (True, False, 4): {"num_attention_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5},  # 2
    (False, False, 4): {"num_attention_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5},  # 2
    (False, True, 2): {"num_attention_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-6},  # 3
}
OLDER_NAMES = {"n_heads": "num_attention_heads", "norm_eps": "rms_norm_eps"}  # in config.json


def minimind_tensors(tensors: dict, config: LanguageConfig) -> dict:
    """A name that is not MiniMind's stays as it is: the loader, which accounts for every tensor,
    refuses what it does not know."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            tensor = half_split(tensor, config.head_dim)
        if not UNREAD.fullmatch(name):
            renamed[public_name(name)] = tensor
    return renamed


def public_name(name: str) -> str:
    match = TENSOR.fullmatch(name)
    return f"{'model.' + match[1] if match[1] else ''}{OLDER[match[2]]}.weight" if match else name


def half_split(weight, head_dim: int):
    """Move the rows of q or k (heads*hd,D) from RoPE's interleaved order to the split one.

    RoPE rotates pairs of elements, and nothing in it says which two make a pair. Llama's first code
    pairs neighbours, (0,1), (2,3), ...; the files of transformers pair each element of a head's
    first half with one of its second half, (0,hd/2), (1,hd/2+1), ..., as language.py does:

        interleaved   a0 b0 a1 b1 a2 b2
        split         a0 a1 a2 b0 b1 b2

    q and k are permuted alike, and their products do not depend on the order: nothing else changes.
    """
    rows, width = weight.shape
    pairs = weight.view(rows // head_dim, head_dim // 2, 2, width)  # head, pair, a or b
    return pairs.transpose(1, 2).reshape(rows, width)


def minimind_config(shapes: dict[str, list[int]], public: dict) -> LanguageConfig:
    """{its name: shape} of a MiniMind file -> its config: "llama", or "qwen3" for minimind-3.

    public: a config.json of MiniMind's own, or {}. What it says about heads, theta and eps goes
    before the table. ValueError: a file of another kind.
    """
    older = "tok_embeddings.weight" in shapes  # written before April 2025
    shapes = {public_name(name): shape for name, shape in shapes.items()}
    normed = "model.layers.0.self_attn.q_norm.weight" in shapes
    if any(".experts." in name for name in shapes):
        raise ValueError("a mixture of experts; only MiniMind's dense models are supported here "
                         "(minimind-3, MiniMind2, MiniMind2-Small)")
    sizes = []
    for name in ("embed_tokens", "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj",
                 "layers.0.mlp.gate_proj"):
        name = f"model.{name}.weight"
        if name not in shapes:
            raise ValueError(f"no MiniMind language model, it lacks {name}. Another model's "
                             "weights need its config.json beside them")
        if len(shapes[name]) != 2 or 0 in shapes[name]:
            raise ValueError(f"{name} has the shape {list(shapes[name])}; expected a matrix")
        sizes.append(shapes[name])
    (vocab_size, width), (q, _), (k, _), (middle, _) = sizes

    given = check_values({OLDER_NAMES.get(key, key): value for key, value in public.items()})
    rope = read_rope(given)
    facts = {**GENERATIONS.get((older, normed, q / k), {}), **rope, **given}
    if "num_attention_heads" not in facts:
        raise ValueError(
            f"q is {q} wide and k {k}: no MiniMind that is known here, so the shapes do "
            "not tell the number of heads. Put a config.json of MiniMind's beside it, with "
            "num_attention_heads, rope_theta and rms_norm_eps")
    head_dim = q // facts["num_attention_heads"]
    if not head_dim or q % head_dim or k % head_dim:
        raise ValueError(f"q is {q} wide and k {k}; {facts['num_attention_heads']} heads cannot "
                         "share that out")
    layers = [int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")]
    return read_language_config({
        "model_type": "qwen3" if normed else "llama", "vocab_size": vocab_size,
        "hidden_size": width, "intermediate_size": middle, "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": facts["num_attention_heads"], "num_key_value_heads": k // head_dim,
        "head_dim": head_dim, "max_position_embeddings": 32768,
        # Version 1 has theta in its code alone, and its files no entry for it.
        "rope_theta": facts.get("rope_theta", 1e4 if older else 1e6),
        "rope_scaling": rope["rope_scaling"],
        "rms_norm_eps": facts.get("rms_norm_eps", 1e-6 if normed else 1e-5),
        "tie_word_embeddings": facts.get("tie_word_embeddings", True)})
