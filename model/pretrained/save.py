"""A tower -> config.json and model.safetensors in the form in which its family is published."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from model.language import LanguageModel
from model.pretrained.families import family_of, public_names, public_shape
from model.pretrained.files import write_json
from model.pretrained.public_config import write_config
from model.vision import VisionTransformer


def public_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """{published name: tensor}: the model in the form in which its family is published."""
    state, family = model.state_dict(), family_of(model.config.model_type)
    return {public: state[ours].reshape(public_shape(ours, state[ours], family))
            for public, ours in public_names(model).items()}


def save_language(model: LanguageModel, directory) -> None:
    """Write config.json and model.safetensors as other libraries read them."""
    save_model(directory, write_config(model.config), public_tensors(model))


def save_vision(model: VisionTransformer, directory, extra: dict | None = None) -> None:
    """Write config.json and model.safetensors as other libraries read them.

    extra: tensors {published name: tensor} that the tower itself does not hold, such as SigLIP's
    pooling head ("head.probe", ...) or CLIP's post_layernorm: loading them back leaves them alone.
    A tower with an earlier feature_layer has no later blocks to write; it loads again with that
    feature_layer only.
    """
    prefix, tensors = family_of(model.config.model_type).prefix, public_tensors(model)
    for name, tensor in (extra or {}).items():
        tensors[prefix + name.removeprefix(prefix)] = tensor
    save_model(directory, {**write_config(model.config), **optional_parts(model, tensors)}, tensors)


def optional_parts(model: VisionTransformer, tensors) -> dict[str, bool]:
    """What config.json says of tensors that some files of the family hold and some do not."""
    family = family_of(model.config.model_type)
    if family.optional is None:
        return {}
    key, beginning = family.optional
    return {key: any(name.startswith(family.prefix + beginning) for name in tensors)}


def save_model(directory, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write config.json and model.safetensors.

    Each is written under another name and then moved: a file that is memory-mapped by a loaded
    model, perhaps this very one, must never change under it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    weights, facts = directory / "model.safetensors.part", directory / "config.json.part"
    save_file(tensors, weights, metadata={"format": "pt"})  # other readers ask for the format
    write_json(facts, {**config, "torch_dtype": dtype})
    for part in (weights, facts):
        os.replace(part, part.with_suffix(""))
