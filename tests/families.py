"""Tiny random models of every public family, and one way to compare numbers. For the tests."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from model.config import ProjectorConfig, VLMConfig
from model.pretrained.public_config import read_language_config, read_vision_config
from model.vlm import VLM, build_model

# Odd numbers on purpose: a swapped axis cannot go unnoticed.
LANGUAGE = {
    "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 61, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2,
}
VISION = {
    "hidden_size": 36, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 48, "patch_size": 16,
}


def randomise(model, std: float = 0.15):
    """Public classes begin with biases 0 and norms 1, which would hide one that is forgotten."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator) * std
            p.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


def public_language(family: str, **facts):
    """A transformers model: family is "Qwen2", "Qwen3" or "Llama"."""
    config = getattr(transformers, family + "Config")(**{**LANGUAGE, **facts})
    return randomise(getattr(transformers, family + "ForCausalLM")(config))


def public_vision(family: str, **facts):
    """A transformers tower: family is "Siglip", "CLIP", "Dinov2" or "ViT"."""
    if family == "Dinov2":
        facts = {**VISION, "mlp_ratio": 2, **facts}
        del facts["intermediate_size"]
        return randomise(transformers.Dinov2Model(transformers.Dinov2Config(**facts)))
    if family == "ViT":
        return randomise(transformers.ViTModel(transformers.ViTConfig(**{**VISION, **facts})))
    config = getattr(transformers, family + "VisionConfig")(**{**VISION, **facts})
    return randomise(getattr(transformers, family + "VisionModel")(config))


def random_tensors(shapes: dict, std: float = 0.15) -> dict[str, torch.Tensor]:
    """{name: shape} -> {name: tensor}; norms around 1, as in a trained model."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * std + ("norm" in name or "ln_" in name)
            for name, shape in shapes.items()}


# The words of Qwen/Qwen-7B-Chat's config.json, with small numbers.
QWEN = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": 36,
    "intermediate_size": 100, "kv_channels": 6, "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192, "no_bias": True, "num_attention_heads": 6,
    "num_hidden_layers": 2, "rotary_emb_base": 10000, "rotary_pct": 1.0, "seq_length": 8192,
    "scale_attn_weights": True, "tie_word_embeddings": False, "tokenizer_class": "QWenTokenizer",
    "use_dynamic_ntk": True, "use_logn_attn": True, "use_flash_attn": "auto", "vocab_size": 61,
}


def save_qwen(directory, **facts) -> tuple[dict, dict]:
    """Write a tiny Qwen-7B under its published names -> (its tensors, its config.json)."""
    public = {**QWEN, **facts}
    words, width = public["vocab_size"], public["hidden_size"]
    middle = public["intermediate_size"] // 2
    shapes = {"transformer.wte.weight": (words, width), "transformer.ln_f.weight": (width,),
              "lm_head.weight": (words, width)}
    for number in range(public["num_hidden_layers"]):
        shapes.update({f"transformer.h.{number}.{name}": shape for name, shape in {
            "ln_1.weight": (width,), "ln_2.weight": (width,),
            "attn.c_attn.weight": (3 * width, width), "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width), "mlp.w1.weight": (middle, width),
            "mlp.w2.weight": (middle, width), "mlp.c_proj.weight": (width, middle)}.items()})
    tensors = random_tensors(shapes)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(public))
    return tensors, public


# What differs between the generations of MiniMind: heads, key/value heads.
MINIMIND = {"v1": (16, 8), "2 older": (8, 2), "2": (8, 2), "3": (8, 4)}


def minimind_shapes(generation: str, words: int = 61, width: int = 64, middle: int = 50,
                    layers: int = 2) -> dict[str, tuple]:
    """{published name: shape} of a MiniMind's .pth; "v1" and "2 older" have the older names."""
    heads, keys = MINIMIND[generation]
    narrow, head_dim = width // heads * keys, width // heads
    if generation in ("v1", "2 older"):
        shapes = {"tok_embeddings.weight": (words, width), "norm.weight": (width,),
                  "output.weight": (words, width)}
        layer = {"attention.wq": (width, width), "attention.wk": (narrow, width),
                 "attention.wv": (narrow, width), "attention.wo": (width, width),
                 "attention_norm": (width,), "ffn_norm": (width,),
                 "feed_forward.w1": (middle, width), "feed_forward.w2": (width, middle),
                 "feed_forward.w3": (middle, width)}
        where = "layers."
    else:
        shapes = {"model.embed_tokens.weight": (words, width), "model.norm.weight": (width,),
                  "lm_head.weight": (words, width)}
        layer = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (narrow, width),
                 "self_attn.v_proj": (narrow, width), "self_attn.o_proj": (width, width),
                 "input_layernorm": (width,), "post_attention_layernorm": (width,),
                 "mlp.gate_proj": (middle, width), "mlp.down_proj": (width, middle),
                 "mlp.up_proj": (middle, width)}
        if generation == "3":
            layer.update({"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)})
        where = "model.layers."
    shapes.update({f"{where}{number}.{name}.weight": shape for number in range(layers)
                   for name, shape in layer.items()})
    return shapes


def save_minimind(path, generation: str, **sizes) -> dict[str, torch.Tensor]:
    """Write a tiny MiniMind as its .pth -> the tensors in it."""
    tensors = random_tensors(minimind_shapes(generation, **sizes))
    head, table = (("output", "tok_embeddings") if "output.weight" in tensors else
                   ("lm_head", "model.embed_tokens"))
    tensors[f"{head}.weight"] = tensors[f"{table}.weight"]  # one and the same, stored twice
    torch.save(tensors, path)
    return tensors


def tiny_vlm(image_token_id: int = 60, pixel_shuffle: int = 1, projector: str = "mlp",
             tied: bool = True, seed: int = 0) -> VLM:
    """Our own whole model: pictures of 48 x 48, K = 9 tokens each (1 with pixel_shuffle 3)."""
    torch.manual_seed(seed)
    language = read_language_config(
        {"model_type": "qwen2", **LANGUAGE, "tie_word_embeddings": tied})
    vision = read_vision_config({"model_type": "siglip_vision_model", **VISION})
    joined = ProjectorConfig(projector, vision.hidden_size, language.hidden_size, pixel_shuffle)
    vlm = build_model(VLMConfig(language, vision, joined, image_token_id))
    randomise(vlm.language)
    return vlm


def assert_close(ours, theirs, limit: float, what: str = "") -> None:
    """Equal within limit; says the largest difference either way (pytest -rP shows it)."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} != {tuple(theirs.shape)}"
    largest = (ours.double() - theirs.double()).abs().max().item()
    print(f"{what}: largest difference {largest:.2e}, limit {limit:.0e}")
    assert largest <= limit, f"{what}: largest difference {largest:.3e} > {limit:.0e}"
