"""The families of public models: what is particular to each, in one place.

    model_type of config.json -> LANGUAGE_FAMILIES or VISION_FAMILIES -> facts and tensor names

A new family is an entry in one of the two, and a table of names.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import nn


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


# Published name -> ours. A line names one tensor, or a layer, and then stands for its weight and
# its bias. Read from left to right to load (load.py), from right to left to save (save.py).
LANGUAGE = {"lm_head": "lm_head", **{f"model.{name}": name for name in (  # Llama, Qwen2, Qwen3
    "embed_tokens", "layers.{}.input_layernorm", "layers.{}.self_attn.q_proj",
    "layers.{}.self_attn.k_proj", "layers.{}.self_attn.v_proj", "layers.{}.self_attn.o_proj",
    "layers.{}.self_attn.q_norm", "layers.{}.self_attn.k_norm",  # Qwen3
    "layers.{}.post_attention_layernorm", "layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj",
    "layers.{}.mlp.down_proj", "norm")}}
SIGLIP_AND_CLIP = {
    "vision_model.embeddings.class_embedding": "class_embedding",  # CLIP
    "vision_model.embeddings.patch_embedding": "patch_embedding",
    "vision_model.embeddings.position_embedding.weight": "position_embedding",
    "vision_model.pre_layrnorm": "pre_layernorm",  # CLIP; published with this spelling
    "vision_model.encoder.layers.{}.layer_norm1": "layers.{}.layer_norm1",
    "vision_model.encoder.layers.{}.self_attn.q_proj": "layers.{}.self_attn.q_proj",
    "vision_model.encoder.layers.{}.self_attn.k_proj": "layers.{}.self_attn.k_proj",
    "vision_model.encoder.layers.{}.self_attn.v_proj": "layers.{}.self_attn.v_proj",
    "vision_model.encoder.layers.{}.self_attn.out_proj": "layers.{}.self_attn.out_proj",
    "vision_model.encoder.layers.{}.layer_norm2": "layers.{}.layer_norm2",
    "vision_model.encoder.layers.{}.mlp.fc1": "layers.{}.fc1",
    "vision_model.encoder.layers.{}.mlp.fc2": "layers.{}.fc2",
    "vision_model.post_layernorm": "post_layernorm",  # SigLIP; of CLIP for its class token
}
DINOV2 = {
    "embeddings.cls_token": "class_embedding",
    "embeddings.patch_embeddings.projection": "patch_embedding",
    "embeddings.position_embeddings": "position_embedding",
    "encoder.layer.{}.norm1": "layers.{}.layer_norm1",
    "encoder.layer.{}.attention.attention.query": "layers.{}.self_attn.q_proj",
    "encoder.layer.{}.attention.attention.key": "layers.{}.self_attn.k_proj",
    "encoder.layer.{}.attention.attention.value": "layers.{}.self_attn.v_proj",
    "encoder.layer.{}.attention.output.dense": "layers.{}.self_attn.out_proj",
    "encoder.layer.{}.layer_scale1.lambda1": "layers.{}.layer_scale1",
    "encoder.layer.{}.norm2": "layers.{}.layer_norm2",
    "encoder.layer.{}.mlp.fc1": "layers.{}.fc1",
    "encoder.layer.{}.mlp.fc2": "layers.{}.fc2",
    "encoder.layer.{}.layer_scale2.lambda1": "layers.{}.layer_scale2",
    "layernorm": "post_layernorm",
}

VIT = {f"vit.{public}": ours for public, ours in {
    "embeddings.cls_token": "class_embedding",
    "embeddings.patch_embeddings.projection": "patch_embedding",
    "embeddings.position_embeddings": "position_embedding",
    "encoder.layer.{}.layernorm_before": "layers.{}.layer_norm1",
    "encoder.layer.{}.attention.attention.query": "layers.{}.self_attn.q_proj",
    "encoder.layer.{}.attention.attention.key": "layers.{}.self_attn.k_proj",
    "encoder.layer.{}.attention.attention.value": "layers.{}.self_attn.v_proj",
    "encoder.layer.{}.attention.output.dense": "layers.{}.self_attn.out_proj",
    "encoder.layer.{}.layernorm_after": "layers.{}.layer_norm2",
    "encoder.layer.{}.intermediate.dense": "layers.{}.fc1",
    "encoder.layer.{}.output.dense": "layers.{}.fc2",
    "layernorm": "post_layernorm"}.items()}

PLAIN = {"use_sliding_window": False, "hidden_act": "silu", "mlp_bias": False}

LANGUAGE_FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", LANGUAGE, "model.",
        implied={"qkv_bias": False, "qk_norm": False},
        defaults={"max_position_embeddings": 2048},
        supported={**PLAIN, "attention_bias": False},
        # The embeddings a second time, where they are tied; and a table that is computed here.
        unread=("lm_head.weight", "layers.*.self_attn.rotary_emb.inv_freq")),
    "qwen2": Family(  # also Qwen2.5
        "Qwen2ForCausalLM", LANGUAGE, "model.",
        implied={"qkv_bias": True, "qk_norm": False},
        defaults={"max_position_embeddings": 32768}, supported=PLAIN, unread=("lm_head.weight",)),
    "qwen3": Family(
        "Qwen3ForCausalLM", LANGUAGE, "model.",
        implied={"qkv_bias": False, "qk_norm": True},
        defaults={"max_position_embeddings": 32768, "head_dim": 128},
        supported={**PLAIN, "attention_bias": False}, unread=("lm_head.weight",)),
}
VIT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 224}
VISION_FAMILIES = {
    "siglip_vision_model": Family(  # also SigLIP2 of a fixed resolution
        "SiglipVisionModel", SIGLIP_AND_CLIP, "vision_model.",
        implied={"class_token": False, "patch_bias": True, "pre_norm": False,
                 "final_norm": True, "layer_scale": False},
        defaults={**VIT_BASE, "intermediate_size": 3072, "patch_size": 16,
                  "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
        unread=("head.*",  # pools the patches into one vector
                "embeddings.position_ids", "text_model.*", "logit_scale", "logit_bias"),
        optional=("vision_use_head", "head.")),
    "clip_vision_model": Family(
        "CLIPVisionModel", SIGLIP_AND_CLIP, "vision_model.",
        implied={"class_token": True, "patch_bias": False, "pre_norm": True,
                 "final_norm": False,  # it has one for its class token: patches never pass it
                 "layer_scale": False},
        defaults={**VIT_BASE, "intermediate_size": 3072, "patch_size": 32,
                  "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        unread=("post_layernorm.*", "embeddings.position_ids", "text_model.*", "logit_scale",
                "visual_projection.weight", "text_projection.weight")),
    "dinov2": Family(
        "Dinov2Model", DINOV2,
        implied={"class_token": True, "patch_bias": True, "pre_norm": False,
                 "final_norm": True, "layer_scale": True},
        defaults={**VIT_BASE, "mlp_ratio": 4, "patch_size": 14, "hidden_act": "gelu",
                  "layer_norm_eps": 1e-6},
        supported={"use_swiglu_ffn": False, "qkv_bias": True},
        unread=("embeddings.mask_token",),  # for masked patches, in its training
        leading_ones={"class_embedding": 2, "position_embedding": 1},
        optional=("use_mask_token", "embeddings.mask_token")),
    "vit": Family(  # as google/vit-base-patch16-224, with its classifier or without
        "ViTModel", VIT, "vit.",
        implied={"class_token": True, "patch_bias": True, "pre_norm": False,
                 "final_norm": True, "layer_scale": False},
        defaults={**VIT_BASE, "intermediate_size": 3072, "patch_size": 16, "hidden_act": "gelu",
                  "layer_norm_eps": 1e-12},
        supported={"qkv_bias": True}, unread=("pooler.*", "classifier.*"),
        leading_ones={"class_embedding": 2, "position_embedding": 1}),
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
