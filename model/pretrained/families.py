"""The families of public models: what is particular to each, in one place.

    model_type of config.json -> LANGUAGE_FAMILIES or VISION_FAMILIES -> facts and tensor names

A new family is an entry here and a table in weight_names.py.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import nn

from model.pretrained import weight_names


@dataclass(frozen=True)
class Family:
    architecture: str  # the class in transformers
    names: dict  # published name -> our name
    # A model that was saved as part of a larger one has this before its names, one saved alone not.
    prefix: str = ""
    implied: dict = field(default_factory=dict)  # facts that follow from the family
    defaults: dict = field(default_factory=dict)  # of the public class, where config.json is silent
    supported: dict = field(default_factory=dict)  # the only value of these that is computed here
    # Known and not needed: patterns of published names without the prefix.
    unread: tuple = ()
    # Published with so many axes of length 1 in front, ready to be added to a batch: by our names,
    # because the published ones may have the prefix or not.
    leading_ones: dict = field(default_factory=dict)
    # config.json says whether the file holds these: its key, and how their names begin.
    optional: tuple[str, str] | None = None


PLAIN = {"use_sliding_window": False, "hidden_act": "silu", "mlp_bias": False}

LANGUAGE_FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", weight_names.LANGUAGE, "model.",
        implied={"qkv_bias": False, "qk_norm": False},
        defaults={"max_position_embeddings": 2048},
        supported={**PLAIN, "attention_bias": False},
        # The embeddings a second time, where they are tied; and a table that is computed here.
        unread=("lm_head.weight", "layers.*.self_attn.rotary_emb.inv_freq")),
    "qwen2": Family(  # also Qwen2.5
        "Qwen2ForCausalLM", weight_names.LANGUAGE, "model.",
        implied={"qkv_bias": True, "qk_norm": False},
        defaults={"max_position_embeddings": 32768}, supported=PLAIN, unread=("lm_head.weight",)),
    "qwen3": Family(
        "Qwen3ForCausalLM", weight_names.LANGUAGE, "model.",
        implied={"qkv_bias": False, "qk_norm": True},
        defaults={"max_position_embeddings": 32768, "head_dim": 128},
        supported={**PLAIN, "attention_bias": False}, unread=("lm_head.weight",)),
}
VIT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 224}
VISION_FAMILIES = {
    "siglip_vision_model": Family(  # also SigLIP2 of a fixed resolution
        "SiglipVisionModel", weight_names.SIGLIP_AND_CLIP, "vision_model.",
        implied={"class_token": False, "patch_bias": True, "pre_norm": False,
                 "final_norm": True, "layer_scale": False},
        defaults={**VIT_BASE, "intermediate_size": 3072, "patch_size": 16,
                  "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
        unread=("head.*",  # pools the patches into one vector
                "embeddings.position_ids", "text_model.*", "logit_scale", "logit_bias"),
        optional=("vision_use_head", "head.")),
    "clip_vision_model": Family(
        "CLIPVisionModel", weight_names.SIGLIP_AND_CLIP, "vision_model.",
        implied={"class_token": True, "patch_bias": False, "pre_norm": True,
                 "final_norm": False,  # it has one for its class token: patches never pass it
                 "layer_scale": False},
        defaults={**VIT_BASE, "intermediate_size": 3072, "patch_size": 32,
                  "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        unread=("post_layernorm.*", "embeddings.position_ids", "text_model.*", "logit_scale",
                "visual_projection.weight", "text_projection.weight")),
    "dinov2": Family(
        "Dinov2Model", weight_names.DINOV2,
        implied={"class_token": True, "patch_bias": True, "pre_norm": False,
                 "final_norm": True, "layer_scale": True},
        defaults={**VIT_BASE, "mlp_ratio": 4, "patch_size": 14, "hidden_act": "gelu",
                  "layer_norm_eps": 1e-6},
        supported={"use_swiglu_ffn": False, "qkv_bias": True},
        unread=("embeddings.mask_token",),  # for masked patches, in its training
        leading_ones={"class_embedding": 2, "position_embedding": 1},
        optional=("use_mask_token", "embeddings.mask_token")),
}


def family_of(model_type: str) -> Family:
    return LANGUAGE_FAMILIES.get(model_type) or VISION_FAMILIES[model_type]


def public_names(model: nn.Module) -> dict[str, str]:
    """{published name: our name} for every tensor of model."""
    model_type = model.config.model_type
    table = {ours: public for public, ours in family_of(model_type).names.items()}
    names = {ours: name_by_table(ours, table) for ours in model.state_dict()}
    for ours in [ours for ours, public in names.items() if public is None]:
        raise ValueError(f"{ours} has no published name in a {model_type}; adapters must be merged "
                         "(merge_lora) before a model is saved so")
    return {public: ours for ours, public in names.items()}


def name_by_table(ours: str, table: dict[str, str]) -> str | None:
    """"layers.3.fc1.bias" by the line "layers.{}.fc1": "blk.{}.up" -> "blk.3.up.bias"; or None."""
    number = re.search(r"(?<=layers\.)\d+", ours)
    pattern = re.sub(r"(?<=layers\.)\d+", "{}", ours)
    layer, _, last = pattern.rpartition(".")
    if pattern in table:
        public = table[pattern]
    elif layer in table and last in ("weight", "bias"):
        public = f"{table[layer]}.{last}"
    else:
        return None
    return public.format(number and number[0])


def public_shape(ours: str, tensor: torch.Tensor, family: Family) -> list[int]:
    """Of the tensor in a published file."""
    return [1] * family.leading_ones.get(ours, 0) + list(tensor.shape)
