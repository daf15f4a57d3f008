"""What --list_presets prints: each preset's models counted, its memory and its downloads.

    config facts -> models on the "meta" device, which have shapes and no numbers -> parameters
    parameters, and which of them each stage trains -> memory; published sizes -> download

Nothing is fetched and nothing is measured: counts are exact, memory is memory.py's arithmetic, in
float32. What the layers keep for the backward pass comes on top, and grows with batch and length.
"""

import argparse
from functools import cache

import torch

from extras.memory import standing
from model.config import ProjectorConfig, VLMConfig
from model.language import LanguageModel
from model.pretrained.files import read_json
from model.pretrained.hub import GIGABYTES, ROOT
from model.pretrained.public_config import read_language_config, read_vision_config
from model.vision import VisionTransformer
from model.vlm import VLM, build_model
from training.optim import choose_trained
from training.preset_table import PRESETS, Preset

# Published config.json facts, as far as they give a model its shape. "bytes" of one weight, where
# the size of the published files is not known (GIGABYTES of model/pretrained/hub.py).
LANGUAGE = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": dict(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True),
    "Qwen/Qwen2.5-0.5B": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864,
        num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B-Instruct": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960,
        num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        tie_word_embeddings=True),
    "Qwen/Qwen3-0.6B": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072,
        num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        tie_word_embeddings=True),
    "Qwen/Qwen-7B-Chat": dict(
        model_type="qwen", vocab_size=151936, hidden_size=4096, intermediate_size=22016,
        num_hidden_layers=32, num_attention_heads=32, kv_channels=128, no_bias=True,
        tie_word_embeddings=False),
    "jingyaogong/MiniMind2-Small": dict(
        model_type="llama", vocab_size=6400, hidden_size=512, intermediate_size=1408,
        num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
        tie_word_embeddings=True),
    "jingyaogong/minimind-3": dict(
        model_type="qwen3", vocab_size=6400, hidden_size=768, intermediate_size=2432,
        num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=96,
        tie_word_embeddings=True, bytes=2),
}
# "pixels": a side of the picture that the published processor makes, if not image_size. The files
# of CLIP and SigLIP hold a text tower too.
VISION = {
    "facebook/dinov2-small": dict(
        model_type="dinov2", hidden_size=384, num_hidden_layers=12, num_attention_heads=6,
        image_size=518, patch_size=14, pixels=224),
    "google/siglip-base-patch16-224": dict(
        model_type="siglip_vision_model", hidden_size=768, intermediate_size=3072,
        num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=16),
    "openai/clip-vit-large-patch14": dict(
        model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096,
        num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=14),
    "openai/clip-vit-base-patch32": dict(
        model_type="clip_vision_model", hidden_size=768, intermediate_size=3072,
        num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=32),
    "openai/clip-vit-base-patch16": dict(
        model_type="clip_vision_model", hidden_size=768, intermediate_size=3072,
        num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=16),
    "jingyaogong/siglip2-base-p32-256-ve": dict(
        model_type="siglip_vision_model", hidden_size=768, intermediate_size=3072,
        num_hidden_layers=12, num_attention_heads=12, image_size=256, patch_size=32),
}

COLUMNS = "{:<18}{:>14}{:>13}   {:<16}{:>14}{:>19}"
NOTES = """\
language, vision: parameters that are loaded, exact. Projector: kind and image tokens.
memory, GB: weights, gradients and optimizer state of stage one and stage two on each device, in
  float32; python -m extras.memory PRESET tells all that a step needs.
download, GB: models + data, as published. "~": a model's is computed, from its parameters.
  "?": more data than that, of a size that its authors do not say.
  python -m extras.download PRESET tells the size, file by file, before it fetches anything."""


def facts(name: str, table: dict) -> dict:
    """The config facts of a public model, or of one in this repository."""
    if name in table:
        return table[name]
    return read_json(ROOT / name / "config.json")


def image_tokens(preset: Preset) -> int:
    """K: what a picture costs the language model."""
    if preset.features != "patches":
        return 1
    vision = facts(preset.vision, VISION)
    side = vision.get("pixels", vision["image_size"]) // vision["patch_size"]
    return side * side // preset.pixel_shuffle**2


def empty_model(preset: Preset) -> VLM:
    """The whole model in full size, without numbers: it takes no memory."""
    language = read_language_config(facts(preset.language, LANGUAGE))
    vision = read_vision_config(facts(preset.vision, VISION), preset.vision_layer, preset.features)
    projector = ProjectorConfig(preset.projector, vision.hidden_size, language.hidden_size,
                                preset.pixel_shuffle)
    with torch.device("meta"):
        return build_model(VLMConfig(language, vision, projector, image_token_id=0))


def empty_tower(name: str, feature_layer: int | None = None, features: str = "patches"):
    """A language model; with a feature_layer, a vision tower."""
    with torch.device("meta"):
        if feature_layer is None:
            return LanguageModel(read_language_config(facts(name, LANGUAGE)))
        return VisionTransformer(read_vision_config(facts(name, VISION), feature_layer,
                                                          features))


def count(module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


@cache
def costs(name: str) -> dict:
    """Parameters of each part; bytes of memory in each stage; bytes of models and of data to
    download, as far as they are known."""
    preset = PRESETS[name]
    model = empty_model(preset)
    told = {part: count(getattr(model, part)) for part in ("language", "vision", "projector")}
    for stage in ("pretrain", "sft"):
        recipe = getattr(preset, stage)
        model = empty_model(preset)
        choose_trained(model, argparse.Namespace(**{**vars(preset), **vars(recipe)}), None)
        told[stage] = sum(standing(model))
    told["models"] = download_size(preset.language) + download_size(preset.vision)
    told["data"] = sum(1e9 * part.gigabytes for part in preset.downloads if part.gigabytes)
    return told


def download_size(name: str) -> float:
    """Bytes of a model's published weights; 0 for what lies in this repository."""
    if name in GIGABYTES:
        return 1e9 * GIGABYTES[name]
    published = {**LANGUAGE, **VISION}.get(name)
    if published is None:
        return 0
    return published["bytes"] * count(empty_tower(name, None if name in LANGUAGE else -1))


def gigabytes(size: float) -> str:
    """1.6e10 -> "16.0"; small models need two places."""
    return f"{size / 1e9:.2f}" if size < 1e9 else f"{size / 1e9:.1f}"


def list_presets() -> str:
    """Two lines for each preset: its figures, and the names of its models."""
    lines = [COLUMNS.format("preset", "language", "vision", "projector", "memory", "download")]
    for name, preset in PRESETS.items():
        told = costs(name)
        joined = f"{preset.projector}, {image_tokens(preset)}"
        memory = f"{gigabytes(told['pretrain'])}, {gigabytes(told['sft'])}"
        download = "in the repository"
        if told["models"]:
            computed = any("bytes" in facts(tower, {**LANGUAGE, **VISION})
                           for tower in (preset.language, preset.vision))
            unknown = any(part.gigabytes is None for part in preset.downloads)
            download = (f"{'~' * computed}{gigabytes(told['models'])} + "
                        f"{gigabytes(told['data'])}{' ?' * unknown}")
        lines += [COLUMNS.format(name, f"{told['language']:,}", f"{told['vision']:,}", joined,
                                 memory, download),
                  f"  {preset.language} + {preset.vision}"]
    return "\n".join([*lines, "", NOTES])
