"""config.json -> the facts of a model, and back; what would be computed wrongly is refused.

    dict -> read_language_config -> LanguageConfig -> write_config -> dict
    dict -> read_vision_config   -> VisionConfig   -> write_config -> dict
    config.json of a checkpoint -> read_vlm_config -> VLMConfig    -> write_vlm_config -> dict

Nothing is guessed: a value of another type or size, and a variant of a family whose arithmetic is
not built here, raise ValueError with the key, the value and what is expected.
"""

import math
from dataclasses import fields

from model.config import LanguageConfig, ProjectorConfig, VisionConfig, VLMConfig
from model.pretrained.families import LANGUAGE_FAMILIES, VISION_FAMILIES, Family, family_of
from model.rope import LLAMA3

# What a value of config.json has to be, by its key; checked before anything is computed.
KINDS = {field.name: field.type for config in (LanguageConfig, VisionConfig, ProjectorConfig)
         for field in fields(config)} | {"context_limit": int, "mlp_ratio": float}
LARGEST = 1 << 24  # of an integer; the largest public vocabulary has 262,144 tokens
FEW_BITS = "weights in few bits are not read here; take the release in bf16"
MOST_LAYERS = 1000  # the deepest public decoder has 126; a million would be built for an hour


def check_values(public, what: str = "config.json") -> dict:
    """-> the dictionary without the keys whose value is null; ValueError where a value cannot be
    computed with: "32", -1, NaN, or a billion layers."""
    if not isinstance(public, dict):
        raise ValueError(f"{what} is {str(public)[:60]!r}; expected an object {{name: value}}")
    public = {name: value for name, value in public.items() if value is not None}
    for name in ("quantization_config", "compression_config"):  # the second by llm-compressor
        if method := public.get(name):
            method = method.get("quant_method") if isinstance(method, dict) else method
            raise ValueError(f"{what} has {name} ({method or 'of an unnamed method'}): {FEW_BITS}")
    for name, value in public.items():
        most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
        valid, expected = {
            int: (type(value) is int and 1 <= value <= most, f"a whole number, 1 to {most}"),
            float: (type(value) in (int, float) and 0 < value < math.inf, "a number above 0"),
            bool: (type(value) is bool, "true or false"),
        }.get(KINDS.get(name), (True, ""))
        if not valid:
            raise ValueError(f"{what} has {name} = {str(value)[:60]!r}; expected {expected}")
    return public


def refuse(public: dict, name: str, value, supported) -> None:
    """Raise when a config asks for arithmetic that is not built: better than wrong answers."""
    if value != supported:
        raise ValueError(
            f"config.json of model_type {public.get('model_type')!r} has {name} = {value!r}; "
            f"only {supported!r} is supported here")


def facts_of(public: dict, family: Family, supported: dict) -> dict:
    """config.json, with what its family implies and what its public class assumes."""
    for name, value in supported.items():
        refuse(public, name, public.get(name, value), value)
    return {**family.defaults, **public, **family.implied}


def config_of(kind: type, facts: dict):
    return kind(**{field.name: facts[field.name] for field in fields(kind) if field.name in facts})


# ---------------------------------------------------------------- decoders


def read_language_config(public: dict) -> LanguageConfig:
    public = check_values(public)
    model_type = public.get("model_type")
    if model_type not in list(LANGUAGE_FAMILIES):
        raise ValueError(f"config.json says model_type {model_type!r}; the decoder here reads "
                         f"{', '.join(LANGUAGE_FAMILIES)} (Qwen2.5 is a qwen2, SmolLM2 a llama), "
                         "and extras.convert the layouts of Qwen-7B and MiniMind")
    family = LANGUAGE_FAMILIES[model_type]
    facts, rope = facts_of(public, family, family.supported), read_rope(public)
    missing = [name for name in ("vocab_size", "hidden_size", "intermediate_size",
                                 "num_hidden_layers", "num_attention_heads") if name not in public]
    if missing:
        raise ValueError(f"config.json of model_type {model_type!r} lacks {', '.join(missing)}")
    heads = facts["num_attention_heads"]
    # 10,000 is what the public classes assume where the file is silent.
    theta = float(rope.get("rope_theta", facts.get("rope_theta", 10000)))
    return config_of(LanguageConfig, {
        "num_key_value_heads": heads, "head_dim": facts["hidden_size"] // heads,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, **facts, "rope_theta": theta,
        "rope_scaling": rope["rope_scaling"]})


def read_rope(public: dict) -> dict:
    """transformers 5 moved rope_theta into rope_parameters; older files have it at the top."""
    rope = public.get("rope_parameters") or public.get("rope_scaling") or {}
    rope = check_values(rope, "rope_parameters of config.json")
    refuse(public, "partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    return {**rope, "rope_scaling": read_scaling(rope)}


def read_scaling(rope: dict) -> dict | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json has rope_type = {kind!r}; only 'default' and 'llama3' are "
                         "computed here")
    if kind == "default":
        return None
    scaling = {name: rope.get(name) for name in LLAMA3}
    for name, value in scaling.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"config.json has rope_type 'llama3' with {name} = {value!r}; "
                             "expected a number above 0")
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(f"config.json has high_freq_factor = {scaling['high_freq_factor']}; "
                         f"expected more than low_freq_factor, {scaling['low_freq_factor']}")
    return {"rope_type": kind, **scaling}


# ---------------------------------------------------------------- vision transformers


def read_vision_config(public: dict, feature_layer: int = -1,
                       features: str = "patches") -> VisionConfig:
    """public: config.json of the tower alone, or of a whole SigLIP or CLIP."""
    public = check_values(public)
    model_type = public.get("model_type")
    if f"{model_type}_vision_model" in VISION_FAMILIES:  # the published files hold both towers
        public = check_values(public.get("vision_config") or {}, "vision_config of config.json")
        model_type += "_vision_model"
    if model_type not in list(VISION_FAMILIES):
        raise ValueError(
            f"config.json says model_type {model_type!r}; the vision transformer here reads "
            f"{', '.join(VISION_FAMILIES)}, also out of a whole 'clip' or 'siglip' (also SigLIP2 "
            "of a fixed resolution); 'siglip2' is SigLIP2's NaFlex, for images of any shape")
    family = VISION_FAMILIES[model_type]
    facts = facts_of(public, family, {"num_channels": 3, **family.supported})
    if "mlp_ratio" in family.defaults:  # DINOv2
        facts["intermediate_size"] = int(facts["hidden_size"] * facts["mlp_ratio"])
    return config_of(VisionConfig, {
        **facts, "model_type": model_type, "feature_layer": feature_layer, "features": features,
        "final_norm": facts["final_norm"] or features == "class"})


# ---------------------------------------------------------------- back


def write_config(config: LanguageConfig | VisionConfig) -> dict:
    """The config.json of a directory that other libraries can load."""
    family = family_of(config.model_type)
    public = {"architectures": [family.architecture], **{
        name: value for name, value in vars(config).items() if value is not None
        and name not in (*family.implied, "feature_layer", "features")}}
    if isinstance(config, LanguageConfig):
        return {**public, "hidden_act": "silu"}
    if "mlp_ratio" in family.defaults:
        middle, width = public.pop("intermediate_size"), config.hidden_size
        if middle % width:
            raise ValueError(f"a {config.model_type} needs an intermediate_size ({middle}) that is "
                             f"a multiple of hidden_size ({width})")
        public["mlp_ratio"] = middle // width
    return {"num_channels": 3, **public}


# ---------------------------------------------------------------- checkpoints of our own


def read_vlm_config(config: dict) -> VLMConfig:
    check_values({"pixel_shuffle": config["pixel_shuffle"]})
    language = read_language_config(config["language"])
    vision = read_vision_config(config["vision"], config["vision_feature_layer"],
                                config["vision_feature_select"])
    projector = ProjectorConfig(config["projector"], vision.hidden_size, language.hidden_size,
                                config["pixel_shuffle"])
    return VLMConfig(language, vision, projector, config["image_token_id"])


def write_vlm_config(config: VLMConfig) -> dict:
    """The model's part of a checkpoint's config.json, as read_vlm_config reads it."""
    return {"model_type": "vlm", "language": write_config(config.language),
            "vision": write_config(config.vision),
            "vision_feature_layer": config.vision.feature_layer,
            "vision_feature_select": config.vision.features, "projector": config.projector.kind,
            "pixel_shuffle": config.projector.pixel_shuffle,
            "image_token_id": config.image_token_id}
