"""Our VLM -> the tensors and the config.json of a LlavaForConditionalGeneration of transformers.

    vision     public names; positions of the image size; its last norm as one more block
    projector  linear_1, act, linear_2
    language   public names; a row for the placeholder

LLaVA (Liu et al. 2023) is the form that most engines read. It always takes the patches as they
leave a block, BEFORE the tower's last norm, and sends them through two linear layers. What this
form can express is exported exactly; what it cannot is refused with the reason, never approximated.
Every tensor of the model is exported, or refused by its name: a tensor that is silently left out
would make a model that answers differently.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from model.config import LanguageConfig, VisionConfig
from model.language import LanguageModel
from model.lora import LoRALinear, linear_names
from model.pretrained.meta_device import meta_device
from model.pretrained.public_config import write_config
from model.pretrained.save import optional_parts, public_tensors
from model.vision import VisionTransformer
from model.vlm import VLM

# How much larger than its input the output of the block is that replaces the last norm. A power
# of two, so that multiplying and dividing by it rounds nothing.
NORM_GAIN = 2.0**30
# What LLaVA can express: towers, decoders, and kinds of projector with the layers of each. All
# else is refused.
LLAVA_TOWERS = ("siglip_vision_model", "clip_vision_model", "dinov2")
LLAVA_DECODERS = ("llama", "qwen2", "qwen3")
LLAVA_PROJECTORS = {"linear": ("fc1",), "mlp": ("fc1", "fc2")}
NO_LLAVA = "this model cannot be expressed as a LLaVA"
LLAVA_TAKES = ("LLaVA takes both towers as their config.json describes them, and a projector "
               "linear (fc1) or mlp (fc1, fc2). Serve it with eval.py, or export it with --to "
               "merged")


def llava(vlm: VLM, size: tuple[int, int], image_token_id: int) -> tuple[dict, dict]:
    """-> config.json, {public name: tensor}.

    vlm: with plain layers (merge_lora first). size: (H,W) that the image processor makes.
    image_token_id: the placeholder's id in the exported tokenizer. ValueError: why LLaVA cannot
    express this model.
    """
    check_exportable(vlm, size)
    vision, gain = llava_vision(vlm.vision, size)
    language = llava_language(vlm.language, image_token_id + 1)
    tensors = {f"language_model.{name}": tensor
               for name, tensor in public_tensors(language).items()}
    tensors.update({f"vision_tower.{name}": tensor
                    for name, tensor in public_tensors(vision).items()})
    tensors.update(llava_projector(vlm.projector, gain))
    vision_config = {**write_config(vision.config), **optional_parts(vision, ())}
    text_config = write_config(language.config)
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "text_config": text_config, "vision_config": vision_config,
        "image_token_index": image_token_id, "image_seq_length": vision.config.patches,
        "projector_hidden_act": "linear" if vlm.config.projector.kind == "linear" else "gelu",
        "multimodal_projector_bias": True, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if vision.config.class_token else "full",
        "tie_word_embeddings": language.config.tie_word_embeddings}
    return config, tensors


def check_exportable(vlm: VLM, size: tuple[int, int]) -> None:
    features, projector = vlm.vision.config.features, vlm.config.projector
    kind, tower = projector.kind, vlm.vision.config.model_type
    refuse(vlm, {
        f"a {tower} tower: it takes {', '.join(LLAVA_TOWERS)}": tower not in LLAVA_TOWERS,
        f"--pixel_shuffle {projector.pixel_shuffle}: LLaVA's projector takes one patch at a "
        "time, and this one several": projector.pixel_shuffle > 1,
        f"--projector {kind}: LLaVA's projector is {' or '.join(LLAVA_PROJECTORS)}, with no norm "
        "in front": kind not in LLAVA_PROJECTORS,
        f"--vision_feature_select {features}: LLaVA takes all patches, with the class token or "
        "without, and never one vector": features != "patches",
        f"images of {size[0]} x {size[1]} pixels: LLaVA's towers have one image_size for both "
        "sides": size[0] != size[1]}, LLAVA_PROJECTORS.get(kind), NO_LLAVA, LLAVA_TAKES)


def refuse(vlm: VLM, reasons: dict[str, bool], layers, refusal: str, takes: str) -> None:
    """ValueError with the first reason that holds, or with the name of a tensor without a place.

    layers: of the form's projector. refusal, takes: what the message says before and behind it.
    """
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{refusal}: {reason}. {takes}")
    account_for(vlm, [f"{layer}.{last}" for layer in layers for last in ("weight", "bias")],
                refusal, takes)


def account_for(vlm: VLM, projector: Iterable[str], refusal: str, takes: str) -> None:
    """ValueError with the name of a tensor of the model that the exported form cannot hold.

    projector: names of the tensors that the form's projector is made of. The towers are those that
    their config describes; LoRA adapters count as the layers that they are merged into.
    """
    with meta_device():
        towers = {"language": LanguageModel(vlm.language.config),
                  "vision": VisionTransformer(vlm.vision.config)}
    known = [f"{part}.{name}" for part, tower in towers.items() for name in tower.state_dict()]
    known += [f"projector.{name}" for name in projector]
    adapters = [f"language.{name}.{half}" for name in linear_names(vlm.language, LoRALinear)
                for half in ("lora_a", "lora_b")]
    same_names(vlm.state_dict(), known, refusal, takes, adapters)


def same_names(names, known, refusal: str, takes: str, allowed=()) -> None:
    """ValueError with the first of names that is not known, or the first known one that is missing.
    allowed: names that may be there as well."""
    names, known = dict.fromkeys(names), dict.fromkeys(known)
    over = [name for name in names if name not in known and name not in set(allowed)]
    if wrong := over or [name for name in known if name not in names]:
        more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
        what = "holds a tensor without a place there" if over else "lacks a tensor"
        raise ValueError(f"{refusal}: it {what}, {wrong[0]}{more}. {takes}")


# ---------------------------------------------------------------- the language model


def llava_language(language: LanguageModel, rows: int) -> LanguageModel:
    """The same decoder as a family that transformers has, with at least `rows` tokens."""
    config, state = language.config, language.state_dict()
    if config.model_type not in LLAVA_DECODERS:
        raise ValueError(f"a {config.model_type} has no form there: the decoders that can be "
                         f"exported are {', '.join(LLAVA_DECODERS)}")
    if rows > config.vocab_size:
        # A placeholder past the table: its row is overwritten by the image, but the head reads
        # it too. As the mean of all rows its logit is the mean of all logits: never the largest.
        for name in {"embed_tokens.weight", "lm_head.weight"} & state.keys():
            table = state[name]
            mean = table.float().mean(0, keepdim=True).to(table.dtype)
            state[name] = torch.cat([table, mean.expand(rows - len(table), -1)])
        config = replace(config, vocab_size=rows)
    return filled(LanguageModel, config, state)


def filled(kind, config: LanguageConfig | VisionConfig, state: dict) -> nn.Module:
    with meta_device():
        model = kind(config)
    same_names(state, model.state_dict(), "this model cannot be expressed as a "
               f"{config.model_type}", "Its config.json does not describe it")
    model.load_state_dict(state, assign=True)
    return model


# ---------------------------------------------------------------- the vision tower


def llava_vision(vision: VisionTransformer, size: tuple[int, int]):
    """The same tower, its features read behind its last block -> tower, gain of its output.

    Blocks behind our feature layer are gone already. The position table is stretched once and for
    all to the image size, as the tower would stretch it for each of them: not every engine can.
    """
    config, state = vision.config, dict(vision.state_dict())
    own = state["position_embedding"] = stretched(vision, size)
    layers, gain = len(vision.layers), 1.0
    if vision.final_norm:
        state.update(norm_as_block(vision, f"layers.{layers}."))
        layers, gain = layers + 1, NORM_GAIN
    # LLaVA's classes want this norm's weights and never use them.
    width = config.hidden_size
    state["post_layernorm.weight"] = torch.ones(width, dtype=own.dtype)
    state["post_layernorm.bias"] = torch.zeros(width, dtype=own.dtype)
    config = replace(config, image_size=size[0], num_hidden_layers=layers, feature_layer=-1,
                     final_norm=True)
    return filled(VisionTransformer, config, state), gain


def stretched(vision: VisionTransformer, size: tuple[int, int]) -> torch.Tensor:
    """The position table for images of this size, the class token's row in front as before."""
    rows, columns = (pixels // vision.config.patch_size for pixels in size)
    own = vision.position_embedding[:int(vision.config.class_token)]
    return torch.cat([own, vision.positions(rows, columns)[0]]).detach()


def norm_as_block(vision: VisionTransformer, prefix: str) -> dict[str, torch.Tensor]:
    """The tower's last norm as an encoder block: {name: tensor}.

    A block computes x + fc2(act(fc1(norm(x)))) once its attention says nothing. We want norm(x):

        z = norm(x)                        the block's second norm takes the last norm's weights
        fc1 = [I; -I], fc2 = c [I, -I]     c (act(z) - act(-z)) = c z: true of every GELU, because
                                           z f(z) + z f(-z) = z where f is a sigmoid or a Gauss sum
        out = x + c z

    With c = 2^30 the x beside it is smaller than the rounding of c z, and the projector divides
    by c: exact to the last digit or two of float32 (and of bfloat16; float16 ends at 65,504).
    """
    config, norm = vision.config, vision.post_layernorm
    width, middle = config.hidden_size, config.intermediate_size
    if middle < 2 * width:
        raise ValueError(f"{NO_LLAVA}: the vision tower's last norm becomes one more block, which "
                         f"needs an MLP of 2 x {width}, and this tower's has {middle}. Train with "
                         "--vision_feature_layer -2, or export it with --to merged")
    like = vision.layers[0].state_dict()
    block = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    block["layer_norm1.weight"] += 1
    for scale in ("layer_scale1", "layer_scale2"):  # DINOv2
        if scale in block:
            block[scale] += 1
    block["layer_norm2.weight"], block["layer_norm2.bias"] = norm.weight, norm.bias
    identity = torch.eye(width, dtype=norm.weight.dtype, device=norm.weight.device)
    block["fc1.weight"][:2 * width] = torch.cat([identity, -identity])
    block["fc2.weight"][:, :2 * width] = NORM_GAIN * torch.cat([identity, -identity], dim=1)
    return {prefix + name: tensor.detach() for name, tensor in block.items()}


# ---------------------------------------------------------------- the projector


def llava_projector(projector: nn.Module, gain: float) -> dict[str, torch.Tensor]:
    """linear_2(act(linear_1(x))): a single linear layer is followed by one that changes nothing."""
    first, second = projector.fc1, getattr(projector, "fc2", None)
    D, like = first.out_features, first.weight
    return {
        "multi_modal_projector.linear_1.weight": first.weight / gain,
        "multi_modal_projector.linear_1.bias": first.bias,
        "multi_modal_projector.linear_2.weight":
            second.weight if second is not None else torch.eye(D).to(like),
        "multi_modal_projector.linear_2.bias":
            second.bias if second is not None else torch.zeros(D).to(like)}
