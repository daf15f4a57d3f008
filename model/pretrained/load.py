"""Weights -> models: public towers, and checkpoints of our own. The models do not know this file.

    load_language, load_vision: a directory or a name on the hub -> config.json -> an empty model
        -> the tensors of its weight files, by the family's names
    load_checkpoint: our directory -> towers (from there, or public ones) + what was trained -> VLM
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from model.config import LanguageConfig, VisionConfig
from model.language import LanguageModel
from model.lora import add_lora
from model.pretrained.checkpoint import own_names, read_config
from model.pretrained.families import LANGUAGE_FAMILIES, VISION_FAMILIES, public_names
from model.pretrained.files import all_tensors, file_hashes, read_json, with_filename
from model.pretrained.hub import ROOT, TOWER_SETTINGS, resolve
from model.pretrained.load_tensors import load_tensors, unusable
from model.pretrained.meta_device import meta_device
from model.pretrained.public_config import (
    read_language_config,
    read_vision_config,
    read_vlm_config,
)
from model.vision import VisionTransformer
from model.vlm import VLM, build_model


def load_language(name, dtype: torch.dtype | None = torch.float32) -> LanguageModel:
    """A public decoder from a directory or from the hub, in dtype.

    dtype None: as the file holds it, and then it is the mapped file itself, which takes no memory
    until it is read.
    """
    directory = resolve(name)
    public = read_public(directory)
    with with_filename(directory / "config.json"):
        config = read_language_config(public)
    family = LANGUAGE_FAMILIES[config.model_type]
    if config.tie_word_embeddings:  # some files hold the table a second time, as the head
        family = replace(family, unread=(*family.unread, "lm_head.weight"))
    return load_tensors(LanguageModel, config, directory, family, dtype)


def load_vision(name, dtype: torch.dtype | None = torch.float32, feature_layer: int = -1,
                features: str = "patches") -> VisionTransformer:
    """A public vision tower from a directory or from the hub, also out of a whole CLIP or SigLIP.

    Blocks after feature_layer are not needed for it and not read. dtype None: as in the file.
    """
    directory = resolve(name)
    public = read_public(directory)
    with with_filename(directory / "config.json"):
        config = read_vision_config(public, feature_layer, features)
    family = VISION_FAMILIES[config.model_type]
    if feature_layer != -1:
        with meta_device():
            whole = VisionTransformer(replace(config, feature_layer=-1))
        family = replace(family, unread=(*family.unread, *(
            name.removeprefix(family.prefix) for name in public_names(whole, family))))
    return load_tensors(VisionTransformer, config, directory, family, dtype)


def read_public(directory: Path) -> dict:
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it says what the weights beside it are")
    return read_json(path)


def load_checkpoint(directory, dtype: torch.dtype | None = torch.float32,
                    language: str | None = None, vision: str | None = None) -> VLM:
    """A checkpoint directory -> the whole VLM, with its adapters in place, in evaluation mode.

    language, vision: where the public towers are now, if not where they were in training. Their
    files must be the same to the last bit; FileNotFoundError and ValueError say what is not.
    A quantized checkpoint (config.json has "quantize") stays so, whatever dtype says.
    dtype None: each weight as its file holds it, trained ones in float32.
    """
    directory = Path(directory)
    config, file = read_config(directory), directory / "config.json"
    tensors = all_tensors(directory / "model.safetensors")
    with with_filename(file):
        vlm_config = read_vlm_config(config)
    towers = {part: load_tower(part, getattr(vlm_config, part), config, tensors, directory,
                               moved, dtype)
              for part, moved in (("language", language), ("vision", vision))}
    with with_filename(file):
        model = build_model(vlm_config, **towers)
        if config["lora"]:
            add_lora(model.language, **config["lora"])
    put_tensors(model, tensors, directory, dtype)
    return (model if dtype is None else model.to(dtype)).eval()


def load_tower(part: str, expected: LanguageConfig | VisionConfig, config: dict, tensors: dict,
               directory: Path, moved: str | None, dtype: torch.dtype | None):
    """The tower `part`: empty where our own file holds every weight of it, else out of the public
    files that the checkpoint refers to, which must be those that it was trained with."""
    quantized = part == "language" and config.get("quantize")
    with meta_device():
        model = (LanguageModel if part == "language" else VisionTransformer)(expected)
        if quantized:
            from extras.fast.quantize import quantize  # here: only quantized checkpoints need it

            quantize(model, quantized)
    missing = [name for name, _ in model.named_parameters() if f"{part}.{name}" not in tensors]
    if not missing:
        return model.to_empty(device="cpu")
    if quantized:
        raise ValueError(f"{directory / 'model.safetensors'} lacks {part}.{missing[0]} (and "
                         f"{len(missing) - 1} more): the file is not complete, and no public "
                         f"one holds weights in {quantized}")
    reference = config["bases"][part]
    base = find_base(directory, part, reference, moved)
    with ThreadPoolExecutor() as executor:  # one core hashes while another loads
        check = executor.submit(check_base, base, directory, part, reference)
        try:
            model = (load_language(base, dtype) if part == "language" else load_vision(
                base, dtype, expected.feature_layer, expected.features))
        finally:
            check.result()  # a file that is not the same is the cause of whatever else is wrong
    if model.config != expected:
        raise ValueError(f"the config.json of the {part} tower says {model.config}, but "
                         f"{directory} was trained with {expected}: get the same release")
    return model


def put_tensors(model, tensors: dict, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Put the checkpoint's tensors into the model, which must have a parameter for each.

    dtype: of fractions; None: as the file holds them.
    """
    parameters, file = dict(model.named_parameters()), directory / "model.safetensors"
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            shape = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise ValueError(f"{file}: {name} has shape {tuple(tensor.shape)}, the model has "
                             f"{shape}")
        integers = not parameters[name].is_floating_point()  # of a quantized matrix
        problem = "" if integers else unusable(tensor)
        if integers and tensor.dtype != parameters[name].dtype:
            problem = f"{tensor.dtype}, expected {parameters[name].dtype}"
        if problem:
            raise ValueError(f"{file}: {name} holds {problem}")
        # Not copied into what is there: a base in bf16 would round what was trained in float32.
        # Nor the mapped file itself, which may be deleted (--save_total_limit): copied once.
        final = tensor.dtype if integers or dtype is None else dtype
        parameters[name].data = tensor.to(final, copy=True)
    missing = [name for name in own_names(model) if name not in tensors]
    if missing:
        raise ValueError(f"{file} lacks {missing[0]} (and {len(missing) - 1} more): the file is "
                         "not complete")


def find_base(directory: Path, part: str, reference: dict, moved: str | None) -> Path:
    """The directory of the public weights that this checkpoint refers to, or an error."""
    name = moved or (directory / part if reference.get("copied") else reference["name"])
    try:
        return resolve(name)
    except Exception as error:
        raise FileNotFoundError(
            f"{refers_to(directory, part, reference)}, and {str(name)!r} was found neither here, "
            f"nor in {ROOT}, nor on the hub ({error}). Put the directory back, or say where it is "
            f"now with --{TOWER_SETTINGS[part]} DIR.") from error


def check_base(base: Path, directory: Path, part: str, reference: dict) -> None:
    """Raise where a file of base is missing, or not the one that was trained with."""
    hashes = file_hashes(base)
    for file, expected in reference["sha256"].items():
        if hashes.get(file) != expected:
            raise ValueError(
                f"{refers_to(directory, part, reference)}, but {base / file} differs from the file "
                f"it was trained with: sha256 {str(hashes.get(file))[:16]}..., expected "
                f"{expected[:16]}.... Get the same release of {reference['name']}, or give "
                f"another place with --{TOWER_SETTINGS[part]} DIR.")


def refers_to(directory: Path, part: str, reference: dict) -> str:
    return f"{directory} stands on the {part} weights of {reference['name']!r}"
