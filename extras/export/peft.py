"""LoRA adapters as the peft library stores them: out of our model, and into it.

    adapted LanguageModel -> peft_adapter -> adapter_config.json, adapter_model.safetensors
    a directory with these two (or adapter_model.bin) -> add_peft -> the same LanguageModel, adapted

The arithmetic is the same (see lora.py), so only names change. peft names the layers as their
family publishes them, each with the path through its own wrapper in front:

    layers.0.self_attn.q_proj  .lora_a                                        ours
    base_model.model.model.layers.0.self_attn.q_proj  .lora_A.weight          peft's
"""

import re
from pathlib import Path

from torch import nn

from extras.convert.public_files import read_tensors
from extras.convert.qwen import qwen2_tensors
from extras.export.transformers import same_names
from model.language import LanguageModel
from model.lora import LoRALinear, add_lora, linear_names
from model.pretrained.families import family_of, public_names
from model.pretrained.files import read_json
from model.pretrained.meta_device import meta_device

TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# A copy of what the base holds, which peft adds when a head or a table is a target.
WHOLE = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.(weight|bias)")
# What changes the arithmetic, and the only value with which it is ours.
PLAIN = {"peft_type": "LORA", "use_dora": False, "bias": "none", "fan_in_fan_out": False,
         "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False, "modules_to_save": None,
         "layer_replication": None, "trainable_token_indices": None, "target_parameters": None,
         "alora_invocation_tokens": None}
# What says nothing of the arithmetic of a loaded adapter, or is read below.
OTHER = ("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
         "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
         "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
         "megatron_core", "peft_version", "qalora_group_size", "r", "revision", "runtime_config",
         "target_modules", "task_type", "use_rslora")
MERGE = "Merge it with peft (merge_and_unload) and give the result as --language_model"
# Ways to begin that leave the base as it is; the others store what fits a changed base alone.
BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")


def peft_adapter(language: nn.Module, lora: dict, base: str) -> tuple[dict, dict]:
    """-> adapter_config.json, {peft's name: tensor}. lora: config.json's, as add_lora got it.

    ValueError: a tensor that is neither the base's nor of an adapter: peft has no place for it.
    """
    adapters = linear_names(language, LoRALinear)
    with meta_device():
        plain = LanguageModel(language.config)
    same_names(language.state_dict(), plain.state_dict(), "this model is no adapter on its base",
               "An adapter is lora_a and lora_b of linear layers of the base. Use --to merged",
               [f"{name}.{half}" for name in adapters for half in ("lora_a", "lora_b")])
    every, tensors = published_layers(language), {}
    adapted = {public: ours for public, ours in every.items() if ours in adapters}
    for public, ours in adapted.items():
        layer = language.get_submodule(ours)
        tensors[f"base_model.model.{public}.lora_A.weight"] = layer.lora_a.detach()
        tensors[f"base_model.model.{public}.lora_B.weight"] = layer.lora_b.detach()
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": lora["rank"], "lora_alpha": lora["alpha"], "lora_dropout": lora["dropout"],
            "target_modules": short(set(adapted), every), "bias": "none", "fan_in_fan_out": False,
            "use_rslora": False, "use_dora": False, "inference_mode": True}, tensors


def published_layers(language: nn.Module) -> dict[str, str]:
    """{the family's name: our name} of every linear layer, adapted or not."""
    with meta_device():
        plain = LanguageModel(language.config)
    names = {ours: public.removesuffix(".weight") for public, ours in public_names(plain).items()}
    return {names[f"{ours}.weight"]: ours for ours in linear_names(plain)}


def short(names: set[str], every) -> list[str]:
    """["q_proj"] in place of every layer's name, where all layers of that name are meant."""
    last = {name.rsplit(".", 1)[-1] for name in names}
    meant = {name for name in every if name.rsplit(".", 1)[-1] in last}
    return sorted(last if meant == names else names)


def add_peft(language: nn.Module, directory, dropout: float = 0.0) -> dict:
    """Put the adapters of a peft directory into the model -> its LoRA settings, as for add_lora.

    ValueError: an adapter that computes something else, or fits another model.
    """
    directory = Path(directory)
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file() and weights.with_suffix(".bin").is_file():  # of peft before 0.7
        weights = weights.with_suffix(".bin")
    for file in (directory / "adapter_config.json", weights):
        if not file.is_file():
            raise ValueError(f"{directory} lacks {file.name}: expected a directory that peft's "
                             "save_pretrained wrote")
    config = read_json(directory / "adapter_config.json")
    for name in [name for name in config if name not in OTHER]:  # also one that is newer than this
        plain = PLAIN.get(name)
        if (config[name] or plain) != plain:
            raise ValueError(f"{directory}: adapter_config.json has {name} = {config[name]!r}; "
                             f"only {plain!r} is supported here. {MERGE}")
    if config.get("init_lora_weights", True) not in BEGINNINGS:
        raise ValueError(f"{directory}: init_lora_weights = {config['init_lora_weights']!r} "
                         "changes the base weights: save it with peft's option "
                         "path_initial_model_for_weight_conversion, as a plain adapter")
    rank, alpha = config["r"], float(config["lora_alpha"])
    if config.get("use_rslora"):  # rank-stabilised: alpha / sqrt(rank) in place of alpha / rank
        alpha *= rank**0.5
    every = published_layers(language)
    tensors = qwen2_tensors(read_tensors(weights))
    pairs = read_pairs(tensors, every, language, directory)
    targets = short({every[public] for public in pairs}, every.values())
    add_lora(language, targets, rank, alpha, dropout)
    for public, pair in pairs.items():
        layer = language.get_submodule(every[public])
        for half, own in {"A": layer.lora_a, "B": layer.lora_b}.items():
            if half not in pair or pair[half].shape != own.shape:
                actual = tuple(pair[half].shape) if half in pair else "missing"
                raise ValueError(f"{directory}: lora_{half} of {public} is {actual}; rank {rank} "
                                 f"and this model ask for {tuple(own.shape)}")
            own.data.copy_(pair[half])
    return {"targets": targets, "rank": rank, "alpha": alpha, "dropout": dropout}


def read_pairs(tensors: dict, every: dict, language, directory) -> dict[str, dict]:
    """peft's tensors -> {the family's name of a layer: {"A": tensor, "B": tensor}}."""
    prefix, pairs, whole = family_of(language.config.model_type).prefix, {}, []
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name)
        public = match and (match[1] if match[1] in every else prefix + match[1])
        if public in every:
            pairs.setdefault(public, {})[match[2]] = tensor
        elif not match and (copy := WHOLE.fullmatch(name)):
            if not is_copy(tensor, f"{copy[1].removeprefix(prefix)}.{copy[2]}", language):
                whole.append(copy[1].rsplit(".", 1)[-1])
        elif match and match[1] == "lm_head":  # merged, it would change the table as well
            raise ValueError(f"{directory}: {name}: the head of this model is its embedding table "
                             "(tie_word_embeddings), which takes no adapter of its own. Train the "
                             "adapter without lm_head, or on a base that is not tied")
        else:
            there = sorted({each.rsplit(".", 1)[-1] for each in every})
            raise ValueError(f"{directory}: {name} is no LoRA matrix of a linear layer of this "
                             f"{language.config.model_type} with {len(language.layers)} layers; "
                             f"there are: {', '.join(there)}. {MERGE}")
    if whole:
        raise ValueError(f"{directory}: the adapter holds whole weights as well "
                         f"({', '.join(whole)}), which are not those of this model. {MERGE}")
    return pairs


def is_copy(tensor, ours: str, language) -> bool:
    """Whether the model holds the same weight. A tied head is the embedding table."""
    if ours == "lm_head.weight" and language.config.tie_word_embeddings:
        ours = "embed_tokens.weight"
    own = language.state_dict().get(ours)
    return own is not None and own.shape == tensor.shape and own.equal(tensor.to(own.dtype))
