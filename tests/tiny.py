"""A tiny public-format pair of towers and a tiny data file, made in a temporary directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import tokenizers
import torch
from PIL import Image

import train_pretrain
import train_sft
from model.language import LanguageModel
from model.pretrained.public_config import read_language_config, read_vision_config
from model.pretrained.save import save_language, save_vision
from model.vision import VisionTransformer

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"red": (220, 30, 30), "green": (20, 180, 40), "blue": (30, 60, 220),
           "white": (240, 240, 240)}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>"]


def make_tokenizer(directory: Path) -> int:
    """A byte-level BPE without merges; returns its size."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(directory / "tokenizer.json"))
    return backend.get_vocab_size()


def make_pair(directory: Path) -> tuple[str, str]:
    """Write language/ and vision/; return their paths."""
    language, vision = directory / "language", directory / "vision"
    language.mkdir(parents=True)
    vision.mkdir()
    size = make_tokenizer(language)
    torch.manual_seed(1)
    save_language(LanguageModel(read_language_config({
        "model_type": "qwen2", "vocab_size": size, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "max_position_embeddings": 512})), language)
    save_vision(VisionTransformer(read_vision_config({
        "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8})),
        vision)
    (vision / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16},
        "resample": 3, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3}))
    return str(language), str(vision)


def make_data(directory: Path, count: int = 24, text_only: int = 3) -> str:
    """JSON Lines about one-coloured pictures; every text_only-th sample has no image."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 18), colour).save(directory / f"{name}.png")
    lines = []
    for i in range(count):
        name = list(COLOURS)[i % len(COLOURS)]
        record = {"conversations": [
            {"role": "user", "content": "<image>\nWhich colour?"},
            {"role": "assistant", "content": f"It is {name}" + "!" * (i % 5)}],
            "image": f"{name}.png"}
        if text_only and i % text_only == 0:
            record = {"conversations": [{"role": "user", "content": "Hello"},
                                        {"role": "assistant", "content": "Hi" * (1 + i % 3)}]}
        lines.append(json.dumps(record))
    file = directory / "data.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def make_world(directory: Path, **facts) -> list[str]:
    """Towers and data; returns the flags that name them and keep a run small and exact."""
    language, vision = make_pair(directory)
    return ["--language_model", language, "--vision_tower", vision, "--data",
            make_data(directory, **facts),
            "--batch_size", "2", "--steps", "6", "--save_steps", "3", "--dtype", "fp32",
            "--num_workers", "0", "--learning_rate", "0.01", "--max_length", "128"]


def make_runs(directory: Path) -> Path:
    """Both stages on tiny towers, a few steps each, in directory/pretrain and directory/sft."""
    flags = make_world(directory)
    towers, rest = flags[:4], flags[4:]
    train_pretrain.main([*towers, *rest, "--out", str(directory / "pretrain")])
    train_sft.main([*rest, "--lora", "--model", str(directory / "pretrain"),
                    "--out", str(directory / "sft")])
    return directory


def environment() -> dict:
    """For subprocesses: one thread each, and no torchrun variables of the process above."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(options: list, *command, timeout: int = 1200,
             **variables) -> subprocess.CompletedProcess:
    """variables: of the environment."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, *map(str, command)],
        env={**environment(), **variables}, capture_output=True, text=True, timeout=timeout)


def metrics(out) -> list[dict]:
    lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def curve(out) -> list[tuple]:
    """What must be bit-identical between two runs: all but the clock's figures."""
    return [(m["step"], m["loss"], m["grad_norm"], m["learning_rate"], m["supervised_tokens"])
            for m in metrics(out)]
