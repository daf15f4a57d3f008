"""What --list_presets prints: each preset's models counted, its memory and its downloads.

    published_models.json -> models on the "meta" device: shapes without values -> parameters
    parameters, and which of them each stage trains -> memory; published sizes -> download

published_models.json holds of each config.json what gives a model its shape. "pixels": a side of
the image that the published processor makes, if not image_size. Nothing is fetched or measured.
"""

import argparse
from functools import cache
from pathlib import Path

from model.config import ProjectorConfig, VLMConfig
from model.language import LanguageModel
from model.pretrained.files import read_json
from model.pretrained.hub import GIGABYTES, ROOT
from model.pretrained.meta_device import meta_device
from model.pretrained.public_config import read_language_config, read_vision_config
from model.vision import VisionTransformer
from model.vlm import VLM, build_model
from training.optim import choose_trainable
from training.preset_table import PRESETS, Preset

LANGUAGE, VISION = read_json(Path(__file__).with_name("published_models.json")).values()
COLUMNS = "{:<18}{:>14}{:>13}   {:<16}{:>14}{:>19}"
NOTES = """\
language, vision: parameters that are loaded, exact. Projector: kind and image tokens.
memory, GB: weights, gradients and optimizer state of stage one and stage two on each device, in
  float32; python -m extras.memory PRESET predicts all that a step needs.
download, GB: models + data, as published. "?": more data than that, of a size that its authors do
  not say. python -m extras.download PRESET prints the size, file by file, before it fetches."""


def facts(name: str, table: dict) -> dict:
    """The config facts of a public model, or of one in this repository."""
    return table.get(name) or read_json(ROOT / name / "config.json")


def image_tokens(preset: Preset) -> int:
    """K: how many positions of the language model an image takes."""
    if preset.vision_feature_select != "patches":
        return 1
    vision = facts(preset.vision_tower, VISION)
    side = vision.get("pixels", vision["image_size"]) // vision["patch_size"]
    return side * side // preset.pixel_shuffle**2


def empty_tower(name: str, feature_layer: int | None = None, features: str = "patches"):
    """A language model; with a feature_layer, a vision tower. Without values: no memory."""
    with meta_device():
        if feature_layer is None:
            return LanguageModel(read_language_config(facts(name, LANGUAGE)))
        return VisionTransformer(read_vision_config(facts(name, VISION), feature_layer, features))


def empty_model(preset: Preset) -> VLM:
    """The whole model in full size."""
    language = empty_tower(preset.language_model)
    vision = empty_tower(preset.vision_tower, preset.vision_feature_layer,
                         preset.vision_feature_select)
    projector = ProjectorConfig(preset.projector, vision.config.hidden_size,
                                language.config.hidden_size, preset.pixel_shuffle)
    with meta_device():
        return build_model(VLMConfig(language.config, vision.config, projector, image_token_id=0),
                           language, vision)


def download_size(name: str) -> float:
    """Bytes of a model's published weights; 0 for what lies in this repository."""
    return 1e9 * GIGABYTES.get(name, 0)


def static_memory(model) -> tuple[int, int, int]:
    """-> bytes of the weights as they are stored, of their gradients, of AdamW's averages."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights, 4 * trained, 8 * trained  # AdamW keeps two float32 averages


def format_bytes(size: float) -> str:
    """2.5e8 -> "250.0 MB", 2.5e9 -> "2.50 GB"; 1 MB is 1,000,000 bytes."""
    for unit, factor, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if size >= factor:
            return f"{size / factor:,.{digits}f} {unit}"
    return f"{size:.0f} bytes"


@cache
def costs(name: str) -> dict:
    """Parameters of each tower, and bytes of memory in each stage."""
    preset, sums = PRESETS[name], {}
    for stage in ("pretrain", "sft"):
        model = empty_model(preset)
        for part in ("language", "vision"):
            sums[part] = sum(p.numel() for p in getattr(model, part).parameters())
        settings = argparse.Namespace(**{**vars(preset), **vars(getattr(preset, stage))})
        choose_trainable(model, settings, None)
        sums[stage] = sum(static_memory(model))
    return sums


def list_presets() -> str:
    """Two lines for each preset: its figures, and the names of its models."""
    def gigabytes(size: float) -> str:  # small models need two digits
        return f"{size / 1e9:.2f}" if size < 1e9 else f"{size / 1e9:.1f}"

    lines = [COLUMNS.format("preset", "language", "vision", "projector", "memory", "download")]
    for name, preset in PRESETS.items():
        sums, download = costs(name), "in the repository"
        if models := download_size(preset.language_model) + download_size(preset.vision_tower):
            data = [part.gigabytes for part in preset.downloads]
            download = (f"{gigabytes(models)} + {gigabytes(1e9 * sum(filter(None, data)))}"
                        + " ?" * (None in data))
        lines += [COLUMNS.format(
            name, f"{sums['language']:,}", f"{sums['vision']:,}", f"{preset.projector}, "
            f"{image_tokens(preset)}", f"{gigabytes(sums['pretrain'])}, {gigabytes(sums['sft'])}",
            download), f"  {preset.language_model} + {preset.vision_tower}"]
    return "\n".join([*lines, "", NOTES])


if __name__ == "__main__":
    print(list_presets())
