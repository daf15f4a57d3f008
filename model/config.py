"""What a model is made of, as plain numbers: a public config.json -> frozen dataclasses.

Every family that we can load differs from the others only by the facts below, so the decoder
(language.py) and the vision transformer (vision.py) each exist once and ask these facts.
"""

import math
from dataclasses import dataclass

# What a number of config.json has to be, by its name; checked before anything is computed.
WHOLE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
         "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "image_size",
         "patch_size", "seq_length", "kv_channels")
REAL = ("rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rotary_emb_base",
        "mlp_ratio")
SWITCH = ("tie_word_embeddings", "use_dynamic_ntk", "use_logn_attn")
LARGEST = 1 << 24  # of a whole number; the largest public vocabulary has 262,144 words
MOST_LAYERS = 1000  # the deepest public decoder has 126; a million would be built for an hour


@dataclass(frozen=True)
class LanguageConfig:
    """A decoder of the Llama line (Llama, SmolLM2, MiniMind, Qwen-7B, Qwen2, Qwen2.5, Qwen3)."""

    model_type: str  # "qwen" (the first one, Qwen-7B), "qwen2", "qwen3" or "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool  # Qwen-7B and Qwen2 add a bias to q, k, v and nowhere else
    qk_norm: bool  # Qwen3 normalises each head of q and k before RoPE
    max_position_embeddings: int
    # Qwen-7B: in a row of more tokens it computes otherwise (see read_qwen): we stop there.
    context_limit: int | None = None

    def __post_init__(self):
        check_values(vars(self))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}: heads share keys in equal groups"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")

    @classmethod
    def from_public(cls, public: dict) -> "LanguageConfig":
        """Read the dictionary of a public config.json; raise on a variant we would get wrong."""
        public = check_values(public)
        model_type = public.get("model_type")
        if model_type == "qwen":
            return cls(**read_qwen(public))
        if model_type not in ("qwen2", "qwen3", "llama"):
            raise ValueError(
                f"config.json says model_type {model_type!r}; the decoder here reads 'qwen' "
                "(Qwen-7B), 'qwen2' (also Qwen2.5), 'qwen3' and 'llama' (also SmolLM2)"
            )
        # transformers 5 moved rope_theta into rope_parameters; older files have it at the top.
        rope = public.get("rope_parameters") or public.get("rope_scaling") or {}
        rope = check_values(rope, "rope_parameters of config.json")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        default_theta = 10000.0  # what the three public config classes assume when it is absent
        refuse(public, "rope_type", rope_type, "default")
        refuse(public, "partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
        refuse(public, "hidden_act", public.get("hidden_act", "silu"), "silu")
        refuse(public, "use_sliding_window", public.get("use_sliding_window", False), False)
        refuse(public, "mlp_bias", public.get("mlp_bias", False), False)
        if model_type != "qwen2":
            refuse(public, "attention_bias", public.get("attention_bias", False), False)
        require(public, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads")
        heads = public["num_attention_heads"]
        return cls(
            model_type=model_type,
            vocab_size=public["vocab_size"],
            hidden_size=public["hidden_size"],
            intermediate_size=public["intermediate_size"],
            num_hidden_layers=public["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=public.get("num_key_value_heads") or heads,
            # Qwen3's class assumes 128 where the file is silent, the others share the width out.
            head_dim=public.get("head_dim") or (
                128 if model_type == "qwen3" else public["hidden_size"] // heads),
            rope_theta=float(rope.get("rope_theta", public.get("rope_theta", default_theta))),
            rms_norm_eps=public.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=public.get("tie_word_embeddings", False),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            max_position_embeddings=public.get(
                "max_position_embeddings", 2048 if model_type == "llama" else 32768),
        )

    def to_public(self) -> dict:
        """The config.json of a directory that other libraries can load."""
        if self.model_type == "qwen":
            return write_qwen(self)
        names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}
        implied = ("qkv_bias", "qk_norm", "context_limit")  # by model_type
        public = {key: value for key, value in vars(self).items() if key not in implied}
        return {"architectures": [names[self.model_type] + "ForCausalLM"], **public,
                "hidden_act": "silu"}


def read_qwen(public: dict) -> dict:
    """The facts of Qwen-7B's config.json, which has words of its own for most of them.

    In a row of more than seq_length tokens (8,192; 2,048 in the first release) Qwen-7B stretches
    RoPE (use_dynamic_ntk) and scales the queries by the logarithm of their place (use_logn_attn),
    when it generates; not in training. That is not built here: such a row is refused.
    """
    if "hidden_size" not in public:
        raise ValueError("config.json of model_type 'qwen' has no hidden_size: it is of the first "
                         "release (n_embd, n_layer, ...). Get the current one of Qwen/Qwen-7B-Chat")
    require(public, "vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    heads, width = public["num_attention_heads"], public["hidden_size"]
    refuse(public, "rotary_pct", public.get("rotary_pct", 1.0), 1.0)
    refuse(public, "no_bias", public.get("no_bias", True), True)
    refuse(public, "scale_attn_weights", public.get("scale_attn_weights", True), True)
    refuse(public, "kv_channels", public.get("kv_channels", 128), width // heads)
    stretches = public.get("use_dynamic_ntk", True) or public.get("use_logn_attn", True)
    return {
        "model_type": "qwen",
        "vocab_size": public["vocab_size"],
        "hidden_size": width,
        # The file gives the width of w1 and w2 together.
        "intermediate_size": public["intermediate_size"] // 2,
        "num_hidden_layers": public["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "rope_theta": float(public.get("rotary_emb_base", 10000)),
        "rms_norm_eps": public.get("layer_norm_epsilon", 1e-6),
        "tie_word_embeddings": False,  # the published code has a head of its own in any case
        "qkv_bias": True,
        "qk_norm": False,
        "max_position_embeddings": public.get("max_position_embeddings", 8192),
        "context_limit": public.get("seq_length", 8192) if stretches else None,
    }


def write_qwen(config: LanguageConfig) -> dict:
    return {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen",
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": 2 * config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "kv_channels": config.head_dim,
        "layer_norm_epsilon": config.rms_norm_eps, "no_bias": True, "scale_attn_weights": True,
        "rotary_emb_base": config.rope_theta, "rotary_pct": 1.0,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.context_limit or config.max_position_embeddings,
        "use_dynamic_ntk": config.context_limit is not None,
        "use_logn_attn": config.context_limit is not None,
        "tie_word_embeddings": False, "tokenizer_class": "QWenTokenizer",
    }


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer: SigLIP, CLIP or DINOv2."""

    model_type: str  # "siglip_vision_model", "clip_vision_model" or "dinov2"
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # pixels a side that the position grid was trained for
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
        check_values(vars(self))
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
            raise ValueError(
                f"feature_layer {self.feature_layer} must lie in "
                f"-{self.num_hidden_layers}..-1 (counted from the last block)"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}: the heads share the width out"
            )
        if self.hidden_act not in ("gelu", "gelu_pytorch_tanh", "quick_gelu"):
            raise ValueError(f"hidden_act is {self.hidden_act!r}; supported here are 'gelu', "
                             "'gelu_pytorch_tanh' and 'quick_gelu'")

    @classmethod
    def from_public(cls, public: dict, feature_layer: int = -1,
                    features: str = "patches") -> "VisionConfig":
        """Read a public config.json: of the tower alone, or of a whole SigLIP or CLIP."""
        public = check_values(public)
        model_type = public.get("model_type")
        if model_type in ("siglip", "clip"):  # the published files hold both towers
            public = check_values(public.get("vision_config") or {}, "vision_config of config.json")
            model_type += "_vision_model"
        if model_type not in ("siglip_vision_model", "clip_vision_model", "dinov2"):
            raise ValueError(
                f"config.json says model_type {model_type!r}; the vision transformer here reads "
                "'siglip' (also SigLIP2 of a fixed resolution), 'siglip_vision_model', 'clip', "
                "'clip_vision_model' and 'dinov2'; 'siglip2' is SigLIP2's NaFlex, for pictures of "
                "any shape"
            )
        refuse(public, "num_channels", public.get("num_channels", 3), 3)
        siglip, clip = model_type.startswith("siglip"), model_type.startswith("clip")
        if not (siglip or clip):
            refuse(public, "use_swiglu_ffn", public.get("use_swiglu_ffn", False), False)
            refuse(public, "qkv_bias", public.get("qkv_bias", True), True)
        # The published files leave out what equals the class's default: these are the defaults.
        hidden_size = public.get("hidden_size", 768)
        mlp_ratio = public.get("mlp_ratio", 4)
        return cls(
            model_type=model_type,
            hidden_size=hidden_size,
            intermediate_size=public.get(
                "intermediate_size", 3072 if siglip or clip else int(hidden_size * mlp_ratio)),
            num_hidden_layers=public.get("num_hidden_layers", 12),
            num_attention_heads=public.get("num_attention_heads", 12),
            image_size=public.get("image_size", 224),
            patch_size=public.get("patch_size", 16 if siglip else 32 if clip else 14),
            hidden_act=public.get(
                "hidden_act", "gelu_pytorch_tanh" if siglip else "quick_gelu" if clip else "gelu"),
            layer_norm_eps=public.get("layer_norm_eps", 1e-5 if clip else 1e-6),
            class_token=not siglip,
            patch_bias=not clip,
            pre_norm=clip,
            final_norm=not clip or features == "class",
            layer_scale=not (siglip or clip),
            feature_layer=feature_layer,
            features=features,
        )

    def to_public(self) -> dict:
        """The config.json of a directory that other libraries can load."""
        names = {"siglip_vision_model": "SiglipVisionModel",
                 "clip_vision_model": "CLIPVisionModel", "dinov2": "Dinov2Model"}
        public = {key: getattr(self, key) for key in (
            "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "image_size", "patch_size", "hidden_act", "layer_norm_eps")}
        if self.model_type == "dinov2":
            if self.intermediate_size % self.hidden_size:
                raise ValueError(f"a DINOv2 needs an intermediate_size ({self.intermediate_size}) "
                                 f"that is a multiple of hidden_size ({self.hidden_size})")
            public["mlp_ratio"] = self.intermediate_size // self.hidden_size
        return {"architectures": [names[self.model_type]], "num_channels": 3, **public}

    @property
    def patches(self) -> int:
        """P, the number of patches of a picture of image_size."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class VLMConfig:
    """A vision tower, a projector and a language model that belong together."""

    language: LanguageConfig
    vision: VisionConfig
    projector: str  # "linear", "mlp" or "norm_mlp"
    pixel_shuffle: int  # n: each n x n square of patches becomes one language token
    image_token_id: int  # placeholder in the ids; may lie past the vocabulary: never looked up


def check_values(public, what: str = "config.json") -> dict:
    """-> the dictionary without the names that have no value; ValueError where one is no number
    that could be computed with: "32", -1, NaN, or a billion layers."""
    if not isinstance(public, dict):
        raise ValueError(f"{what} is {str(public)[:60]!r}; expected an object {{name: value}}")
    public = {name: value for name, value in public.items() if value is not None}
    for name, value in public.items():
        most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
        for names, fine, expected in (
                (WHOLE, type(value) is int and 1 <= value <= most, f"a whole number, 1 to {most}"),
                (REAL, type(value) in (int, float) and 0 < value < math.inf, "a number above 0"),
                (SWITCH, type(value) is bool, "true or false")):
            if name in names and not fine:
                raise ValueError(f"{what} has {name} = {str(value)[:60]!r}; expected {expected}")
    return public


def require(public: dict, *names: str) -> None:
    missing = [name for name in names if name not in public]
    if missing:
        raise ValueError(f"config.json of model_type {public.get('model_type')!r} lacks "
                         f"{', '.join(missing)}")


def refuse(public: dict, name: str, found, supported) -> None:
    """Raise when a config asks for arithmetic that we do not do: better than wrong answers."""
    if found != supported:
        raise ValueError(
            f"config.json of model_type {public.get('model_type')!r} has {name} = {found!r}; "
            f"only {supported!r} is supported here"
        )
