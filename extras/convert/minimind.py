"""MiniMind's own files -> a model: a .pth that is published without a config.json.

    llm_768.pth -> names and shapes of its tensors -> minimind_config -> LanguageConfig
    names of its generation -> load_tensors -> LanguageModel: a llama, or a qwen3 for minimind-3

MiniMind (github.com/jingyaogong/minimind, and minimind-v) publishes one .pth file for a model, and
the values that describe it stand in the code of its day. Most can be read off the tensors; the
rest follows from which generation the tensors belong to, which their names tell.
"""

import re
from dataclasses import replace
from pathlib import Path

from model.config import LanguageConfig
from model.language import LanguageModel
from model.pretrained.families import LANGUAGE_FAMILIES, Family
from model.pretrained.files import open_tensors, read_json, weight_files, with_filename
from model.pretrained.load_tensors import load_tensors
from model.pretrained.public_config import check_values, refuse

# Before April 2025: the names of Llama's own first code -> ours.
OLDER = {
    "tok_embeddings": "embed_tokens",
    "layers.{}.attention_norm": "layers.{}.input_layernorm",
    "layers.{}.attention.wq": "layers.{}.self_attn.q_proj",
    "layers.{}.attention.wk": "layers.{}.self_attn.k_proj",
    "layers.{}.attention.wv": "layers.{}.self_attn.v_proj",
    "layers.{}.attention.wo": "layers.{}.self_attn.o_proj",
    "layers.{}.ffn_norm": "layers.{}.post_attention_layernorm",
    "layers.{}.feed_forward.w1": "layers.{}.mlp.gate_proj",
    "layers.{}.feed_forward.w2": "layers.{}.mlp.down_proj",
    "layers.{}.feed_forward.w3": "layers.{}.mlp.up_proj",
    "norm": "norm",
    "output": "lm_head",
}
# What MiniMind-V writes beside its language model, and tables that are computed here.
UNREAD = ("vision_proj.*", "vision_encoder.*", "freqs_cos", "freqs_sin", "pos_cis",
          "layers.*.attention.mask")
# What shapes cannot tell, by: older names? norms of q and k? width of q / width of k.
# The first two are interleaved (half_split); all tie the head to the embeddings.
GENERATIONS = {
    (True, False, 2): {"num_attention_heads": 16, "rope_theta": 1e4, "rms_norm_eps": 1e-5},  # v1
    (True, False, 4): {"num_attention_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5},  # 2
    (False, False, 4): {"num_attention_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5},  # 2
    (False, True, 2): {"num_attention_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-6},  # 3
}
OLDER_NAMES = {"n_heads": "num_attention_heads", "norm_eps": "rms_norm_eps"}  # in config.json


def load_minimind(source: Path) -> LanguageModel:
    """A .pth, or a directory that holds one, or MiniMind's config.json and pytorch_model.bin."""
    file = weight_file(source)
    with open_tensors(file) as opened:
        shapes = {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}
    config_file = file.parent / "config.json"
    public = read_json(config_file) if config_file.is_file() else {}
    with with_filename(file):
        config = minimind_config(shapes, public, file)
        check_values(vars(config), "the file")
    older = is_older(shapes)
    known = LANGUAGE_FAMILIES[config.model_type]
    family = Family(known.architecture, OLDER, unread=UNREAD) if older else replace(
        known, unread=(*known.unread, *UNREAD))
    if config.tie_word_embeddings:  # the table is stored a second time, as the head
        family = replace(family, unread=(*family.unread, "lm_head.weight", "output.weight"))
    model = load_tensors(LanguageModel, config, file, family, dtype=None)
    for layer in model.layers if older else ():
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data = half_split(projection.weight.data, config.head_dim)
    return model


def weight_file(source: Path) -> Path:
    """The one file with the weights that source is or holds; ValueError for several."""
    standard = [source / name for name in ("model.safetensors", "pytorch_model.bin")]
    files = [source] if source.is_file() else [path for path in standard if path.is_file()][:1]
    files = files or sorted(source.glob("*.pth")) or weight_files(source)
    if len(files) > 1:
        raise ValueError(f"{source} holds {len(files)} {files[0].suffix} files: give the path of "
                         f"the one to read, such as {files[0]}")
    return files[0]


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


def is_older(names) -> bool:
    """Was this file written before April 2025, under the names in OLDER?"""
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
    (vocab_size, width), (q, _), (k, _), (middle, _) = (shapes[f"{name}.weight"] for name in names)

    given = check_values({OLDER_NAMES.get(key, key): value for key, value in public.items()})
    rope = check_values(given.get("rope_parameters") or given.get("rope_scaling") or {},
                        "rope_scaling of config.json")
    refuse(public, "rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    facts = {**GENERATIONS.get((older, normed, q / k), {}), **rope,
             **{key: value for key, value in given.items() if value is not None}}
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
        vocab_size=vocab_size,
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
