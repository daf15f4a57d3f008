"""One real optimizer step of each stage, at full size, without the weights.

    python -m benchmarks.full_size                          every preset but qwen7b-clip
    python -m benchmarks.full_size --presets qwen3-clip --batch_size 4 --dtype fp32
    python -m benchmarks.full_size --presets qwen2.5-1.5b-clip --stages sft --lora

    preset -> models in their published shapes, random numbers -> the scripts -> a Markdown row

How long a step takes and how much memory it needs depends on the shapes alone, so nothing is
downloaded. Everything else is the project's own run: template, batching, autocast, loss, backward
pass, clipping, AdamW. Each row of the table comes from a process of its own, whose peak is the
most that this process ever held.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import train_pretrain
import train_sft
from benchmarks.common import random_weights
from dataset.chat import ChatTemplate
from dataset.images import ImageProcessor
from dataset.tokenizer import Tokenizer
from extras.memory import as_trained, planned
from extras.preset_list import ROOT, VISION, empty_model, facts, image_tokens, static_memory
from training.bundle import ModelBundle
from training.preset_table import PRESETS

STAGES = {"pretrain": (16, 24), "sft": (32, 128)}  # words (and tokens) of question and answer
TOO_LARGE = ("qwen7b-clip",)  # 15 GB of weights in bf16, 31 GB in fp32
HEAD = ("| preset | stage | trained | rows x tokens | numbers | seconds | peak memory |\n"
        "| --- | --- | --- | --- | --- | --- | --- |")


def random_parts(settings, checkpoint=None) -> ModelBundle:
    """What train_pretrain.build makes of public weights, of random numbers in the same shapes."""
    torch.manual_seed(settings.seed)
    # The emoji tokenizer stands in for the model's own: which of its words a row holds costs
    # nothing, how many it holds does. So each is one token, and so is each image token.
    tokenizer = Tokenizer.from_directory(ROOT / "dataset/emoji/language")
    template = ChatTemplate(tokenizer, image_tokens(settings), family="qwen2")
    model = empty_model(settings)
    for tower in (model.language, model.vision):
        tower.bfloat16()  # as most are published; cast_weights starts from there
    random_weights(model)
    model.config = replace(model.config, image_token_id=template.image_token_id)
    vision = facts(settings.vision_tower, VISION)
    side = vision.get("pixels", vision["image_size"])
    processor = ImageProcessor("SiglipImageProcessor", (side, side), None, 3, 1 / 255, (0.5,) * 3,
                               (0.5,) * 3)
    return ModelBundle(model, template, processor, bases={})


def write_rows(directory: Path, stage: str, rows: int) -> Path:
    """A picture with a question and an answer, as long as they usually are in this stage."""
    Image.new("RGB", (640, 480), (90, 120, 60)).save(directory / "picture.jpg")
    question, answer = (" cat" * words for words in STAGES[stage])
    line = json.dumps({"image": "picture.jpg", "conversations": [
        {"role": "user", "content": f"<image>\n{question}"},
        {"role": "assistant", "content": answer}]})
    file = directory / "rows.jsonl"
    file.write_text(f"{line}\n" * rows, encoding="utf-8")
    return file


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # here: Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def one_step(preset: str, stage: str, flags: list[str], batch_size: int) -> str:
    """Make the step here and now -> its row of the table."""
    seen = {}

    def parts_of(settings, checkpoint):
        seen["parts"] = random_parts(settings)
        return seen["parts"]

    with tempfile.TemporaryDirectory() as temporary:
        file = write_rows(Path(temporary), stage, batch_size)
        # The two ends of a run are exchanged: where the weights come from, where they go.
        script = {"pretrain": train_pretrain, "sft": train_sft}[stage]
        script.load_or_build, keep_load = parts_of, script.load_or_build
        train_pretrain.save, keep_save = lambda *given: None, train_pretrain.save
        try:
            with contextlib.redirect_stdout(sys.stderr):
                script.main([
                    "--preset", preset, "--model", "none", "--data", str(file),
                    "--image_folder", temporary, "--out", f"{temporary}/out", "--steps", "1",
                    "--batch_size", str(batch_size), "--gradient_accumulation_steps", "1",
                    "--max_length", "512" if preset == "emoji" else "2048",
                    "--num_workers", "0", *flags])
        finally:
            script.load_or_build, train_pretrain.save = keep_load, keep_save
        step = json.loads(Path(f"{temporary}/out/metrics.jsonl").read_text().splitlines()[0])
    model, template = seen["parts"].model, seen["parts"].template
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    words = sum(STAGES[stage]) + template.image_tokens
    return (f"| `{preset}` | {stage} | {trained:,} | {batch_size} x {words} | "
            f"{flags[flags.index('--dtype') + 1]} | {step['seconds']:.1f} | "
            f"{peak_bytes() / 1e9:.1f} GB |")


def needed_bytes(preset: str, stage: str, flags: list[str]) -> int:
    """What stands in memory whatever the rows are: weights, gradients, AdamW's averages."""
    (config, settings, *_), _ = planned(preset, stage, flags, torch.device("cpu"))
    return sum(static_memory(as_trained(config, settings)))


def free_bytes() -> int:
    """What is left of the device's memory; where the system does not tell, all of it counts."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024 * int(line.split()[1])
    return 1 << 62


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_size", description=__doc__.split("\n\n")[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, metavar="PRESET",
                        default=[name for name in PRESETS if name not in TOO_LARGE])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--batch_size", type=int, default=1, help="rows of the step (%(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--here", action="store_true", help="in this very process: its peak is "
                        "then that of the largest step so far")
    flags, others = parser.parse_known_args(arguments)  # the others are train_sft.py's own
    if not flags.here:
        print(HEAD, flush=True)
    for preset in flags.presets:
        for stage in flags.stages:
            numbers = ["--dtype", flags.dtype, *others]
            if flags.here:
                print(one_step(preset, stage, numbers, flags.batch_size), flush=True)
                continue
            needed = needed_bytes(preset, stage, numbers)
            if needed > free_bytes():
                print(f"| `{preset}` | {stage} | needs {needed / 1e9:.1f} GB before the first "
                      f"layer runs, {free_bytes() / 1e9:.1f} GB are free | | | | |", flush=True)
                continue
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.full_size", "--here", "--presets", preset,
                 "--stages", stage, "--batch_size", str(flags.batch_size), *numbers],
                cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                text=True)
            if done.returncode:  # killed for its memory, say: the others go on
                reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
                print(f"| `{preset}` | {stage} | ended with {done.returncode} after "
                      f"{time.monotonic() - began:.0f} s: {reason[:200]} | | | | |", flush=True)
            else:
                print(done.stdout, end="", flush=True)


if __name__ == "__main__":
    main()
