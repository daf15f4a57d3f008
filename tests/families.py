"""Tiny random models of every public family, and one way to compare numbers. For the tests."""

import torch
import transformers

from model.config import LanguageConfig, VisionConfig, VLMConfig
from model.language import LanguageModel
from model.projector import Projector
from model.vision import VisionTransformer
from model.vlm import VLM

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
    """A transformers tower: family is "Siglip", "CLIP" or "Dinov2"."""
    if family == "Dinov2":
        facts = {**VISION, "mlp_ratio": 2, **facts}
        del facts["intermediate_size"]
        return randomise(transformers.Dinov2Model(transformers.Dinov2Config(**facts)))
    config = getattr(transformers, family + "VisionConfig")(**{**VISION, **facts})
    return randomise(getattr(transformers, family + "VisionModel")(config))


def tiny_vlm(image_token_id: int = 60, pixel_shuffle: int = 1, projector: str = "mlp",
             tied: bool = True, seed: int = 0) -> VLM:
    """Our own whole model: pictures of 48 x 48, K = 9 tokens each (1 with pixel_shuffle 3)."""
    torch.manual_seed(seed)
    language = LanguageConfig.from_public(
        {"model_type": "qwen2", **LANGUAGE, "tie_word_embeddings": tied})
    vision = VisionConfig.from_public({"model_type": "siglip_vision_model", **VISION})
    config = VLMConfig(language, vision, projector, pixel_shuffle, image_token_id)
    vlm = VLM(config, LanguageModel(language), VisionTransformer(vision), Projector(
        projector, vision.hidden_size, language.hidden_size, pixel_shuffle))
    randomise(vlm.language)
    return vlm


def assert_close(ours, theirs, limit: float, what: str = "") -> None:
    """Equal within limit; says the largest difference either way (pytest -rP shows it)."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} != {tuple(theirs.shape)}"
    largest = (ours.double() - theirs.double()).abs().max().item()
    print(f"{what}: largest difference {largest:.2e}, limit {limit:.0e}")
    assert largest <= limit, f"{what}: largest difference {largest:.3e} > {limit:.0e}"
