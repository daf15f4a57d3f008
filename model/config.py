"""The facts of a model, as frozen dataclasses: one for each part, and one for the whole.

The families of public models differ by the facts below and by nothing else, so the decoder
(language.py) and the vision transformer (vision.py) each exist once. Names that config.json of
transformers has as well are the same there; model/pretrained/public_config.py reads and writes it.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageConfig:
    """A decoder of the Llama line: Llama, SmolLM2, MiniMind, Qwen-7B, Qwen2, Qwen2.5, Qwen3."""

    model_type: str  # a key of LANGUAGE_FAMILIES (model/pretrained/families.py)
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # Hkv
    head_dim: int  # hd
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool  # Qwen-7B and Qwen2 add a bias to q, k and v and nowhere else
    qk_norm: bool  # Qwen3 normalises each head of q and k before RoPE
    max_position_embeddings: int
    # Qwen-7B computes otherwise in longer rows, which is not built here: they are refused.
    context_limit: int | None = None
    rope_scaling: dict | None = None  # as config.json has it; of type "llama3" (model/rope.py)

    def __post_init__(self):
        check_positive(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}: heads share keys in equal groups")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer: SigLIP, CLIP, DINOv2 or plain ViT."""

    model_type: str  # a key of VISION_FAMILIES (model/pretrained/families.py)
    hidden_size: int  # Dv
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # pixels a side that the position table was trained for
    patch_size: int
    hidden_act: str  # "gelu", "gelu_pytorch_tanh" or "quick_gelu"
    layer_norm_eps: float
    class_token: bool  # CLIP and DINOv2 put one in front of the patches; SigLIP has none
    patch_bias: bool  # CLIP's patch embedding has no bias
    pre_norm: bool  # CLIP normalises before the first block
    final_norm: bool  # after the last block; CLIP has one for its class token alone
    layer_scale: bool  # DINOv2 scales what each branch adds
    feature_layer: int = -1  # -1: after the last block; -2: after the one before it; ...
    features: str = "patches"  # or one vector: "class" (the class token), "pooled" (patches' mean)

    def __post_init__(self):
        check_positive(self, "feature_layer")
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} is larger than image_size "
                             f"{self.image_size}: there would be no patch")
        if self.features not in ("patches", "class", "pooled"):
            raise ValueError(f"features is {self.features!r}; there are 'patches', 'class' and "
                             "'pooled'")
        if self.features == "class" and not self.class_token:
            raise ValueError(f"features 'class': a {self.model_type} has no class token, its patch "
                             "0 is a patch like any other; take 'patches' or 'pooled'")
        if not -self.num_hidden_layers <= self.feature_layer <= -1:
            raise ValueError(f"feature_layer {self.feature_layer} must lie in "
                             f"-{self.num_hidden_layers}..-1 (counted from the last block)")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of "
                             f"num_attention_heads {self.num_attention_heads}: the heads share "
                             "the width equally")
        if self.hidden_act not in ("gelu", "gelu_pytorch_tanh", "quick_gelu"):
            raise ValueError(f"hidden_act is {self.hidden_act!r}; supported here are 'gelu', "
                             "'gelu_pytorch_tanh' and 'quick_gelu'")

    @property
    def patches(self) -> int:
        """P, the number of patches of an image of image_size."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ProjectorConfig:
    kind: str  # a key of PROJECTORS (model/projector.py)
    vision_width: int  # Dv
    language_width: int  # D
    pixel_shuffle: int = 1  # n: each n x n square of patches becomes one image token; 1: off

    def __post_init__(self):
        check_positive(self)


@dataclass(frozen=True)
class VLMConfig:
    """A vision tower, a projector and a language model that belong together."""

    language: LanguageConfig
    vision: VisionConfig
    projector: ProjectorConfig
    image_token_id: int  # placeholder in the ids; may lie past the vocabulary: never looked up


def check_positive(config, *except_for: str) -> None:
    for name, value in vars(config).items():
        number = type(value) in (int, float) and name not in except_for
        if number and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; expected a number above 0")
