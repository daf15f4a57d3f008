"""How fast pictures become numbers here, and how many of them a GPU asks for.

    python -m benchmarks.images

    a made-up photo, JPEG, 640 x 480 -> load_image, ImageProcessor -> pictures a second on one core
                       -> the same with --approximate_resize, and by how much its pixels differ
                       -> transformers' own processor for Pillow, if it is installed
    a preset's parameters, image tokens -> operations for a picture -> pictures a second on one GPU
                                                                    -> the --num_workers that takes

The second half is arithmetic, nothing is measured. For a picture with its conversation of TEXT
tokens, of which ANSWER are supervised, it counts the matrix products:

    through a weight      2 operations for a token forward, 2 back to the token's gradient, and 2
                          to the weight's own gradient where it is trained
    attention             4 x tokens x width in a layer for a token forward, twice that back
    a frozen tower        forward only: nothing before it learns
    a frozen decoder      forward and back: the projector before it learns
    the table of words    only as the head, and only where a token is supervised

A GPU that does so many operations in a second at the share of its peak that training reaches takes
GPU / operations pictures. For small models that is more than any GPU really takes: they are held
up by the starting of many small computations. So it is what the workers must deliver at most.
"""

import argparse
import io
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.images import ImageProcessor, load_image
from extras.preset_list import VISION, empty_model, facts, image_tokens
from training.optim import choose_trainable
from training.preset_table import PRESETS

TEXT, ANSWER = 64, 32  # tokens of question, answer and template; those that are supervised
GPU = 989e12 * 0.4  # operations a second: one H100 SXM in bf16 as published, 40 % of it reached
SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 224, "width": 224}}


def photo(width: int = 640, height: int = 480) -> bytes:
    """A JPEG with soft shapes and a little noise: as hard to decode as a photo of its size."""
    rng = np.random.default_rng(0)
    soft = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(soft) + rng.normal(0, 8, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def public_processor():
    """transformers' SigLIP processor that works on Pillow images; None where it is not installed.
    """
    try:
        from transformers.models.siglip import image_processing_pil_siglip as module
    except ImportError:
        return None
    return module.SiglipImageProcessorPil(**SIGLIP)


def pictures_per_second(make, pictures: int) -> float:
    """In a second of one core: what other programs take in the meantime does not count."""
    began = time.process_time()
    for _ in range(pictures):
        make()
    return pictures / (time.process_time() - began)


def measure(pictures: int, rounds: int = 5) -> dict[str, float]:
    """-> pictures a second: ours exact, with --approximate_resize, and the public processor where
    it is installed. The best of several rounds, in turns, so that other work slows them alike."""
    torch.set_num_threads(1)  # as a DataLoader does in its workers
    data, public = photo(), public_processor()
    exact = ImageProcessor.from_public(SIGLIP)
    fast = replace(exact, fast=True)
    ways = {"exact": lambda: exact(load_image(data)),
            "--approximate_resize": lambda: fast(load_image(data, fast.draft))}
    if public:
        ways["transformers"] = lambda: public(Image.open(io.BytesIO(data)).convert("RGB"),
                                              return_tensors="pt")
    best = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, make in ways.items():
            best[name] = max(best[name], pictures_per_second(make, pictures))
    return best


def steps_apart(files) -> tuple[float, float]:
    """Exact and fast: the mean difference of a pixel in steps of 255, and the mean over the
    pictures of each one's largest."""
    exact = ImageProcessor.from_public(SIGLIP)
    fast = replace(exact, fast=True)
    apart = [(exact(load_image(file)) - fast(load_image(file, fast.draft))).abs() * 127.5
             for file in files]
    return (sum(float(each.mean()) for each in apart) / len(apart),
            sum(float(each.max()) for each in apart) / len(apart))


def operations(name: str, stage: str, text: int = TEXT, answer: int = ANSWER) -> float:
    """Of one picture and its conversation, forward and backward."""
    preset = PRESETS[name]
    model = empty_model(preset)
    settings = {**vars(preset), **vars(getattr(preset, stage))}
    choose_trainable(model, argparse.Namespace(**settings), None)
    public, c = facts(preset.vision_tower, VISION), model.config.language
    side = public.get("pixels", public["image_size"]) // public["patch_size"]
    K, T = image_tokens(preset), image_tokens(preset) + text
    table_trained = model.language.embed_tokens.weight.requires_grad
    return (
        through(model.vision, side * side, len(model.vision.layers), public["hidden_size"],
                back=any(p.requires_grad for p in model.vision.parameters()))
        + through(model.projector, K, back=True)
        + through(model.language.layers, T, c.num_hidden_layers,
                  c.num_attention_heads * c.head_dim, back=True)
        + 2 * c.vocab_size * c.hidden_size * answer * (2 + table_trained))


def through(module, tokens: int, layers: int = 0, width: int = 0, back: bool = False) -> float:
    """Operations of a tower on so many tokens; layers and width of its attention."""
    matrices = [p for name, p in module.named_parameters()
                if p.ndim > 1 and "position" not in name]  # positions are added
    weights = sum(p.numel() for p in matrices)
    trained = sum(p.numel() for p in matrices if p.requires_grad)
    return (2 * tokens * (weights * (2 if back else 1) + trained)
            + 4 * layers * width * tokens**2 * (3 if back else 1))


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.images", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, default=40, help="in each of five rounds")
    parser.add_argument("--gpu", type=float, default=GPU, help="operations a second that training "
                        "reaches (default: %(default).3g, an H100 at 40 %% of its bf16 peak)")
    parser.add_argument("--photos", metavar="DIR",
                        help="measure the difference of --approximate_resize "
                        "on these (default: on the made-up one)")
    flags = parser.parse_args(arguments)
    speeds = measure(flags.pictures)
    print("JPEG 640 x 480 -> 224 x 224, normalised, pictures a second on one core:")
    for name, speed in speeds.items():
        public = speeds.get("transformers")
        beside = f", {speed / public:.2f} x transformers" if public else ""
        print(f"{name:<14}{speed:>6,.0f}{beside}")
    files = [*Path(flags.photos).iterdir()] if flags.photos else [photo()]
    mean, largest = steps_apart(files)
    print(f"--approximate_resize changes a pixel by {mean:.2f} steps of 255 on average, the most "
          f"changed "
          f"one of a picture by {largest:.0f} ({len(files)} pictures)")
    print(f"\none picture and {TEXT} tokens of text; a GPU of {flags.gpu:.3g} operations a second")
    print(f"{'preset':<20}{'stage':<10}{'operations':>12}{'pictures/s':>12}{'workers':>9}")
    for name in PRESETS:
        for stage in ("pretrain", "sft"):
            needed = flags.gpu / operations(name, stage)
            print(f"{name:<20}{stage:<10}{operations(name, stage):>12.2e}{needed:>12,.0f}"
                  f"{math.ceil(needed / speeds['exact']):>9,}")


if __name__ == "__main__":
    main()
