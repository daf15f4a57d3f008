"""How fast a trained model answers: here, in transformers and in llama.cpp, in the same run.

    python -m benchmarks.answer                      SmolLM2-135M + SigLIP-B/16, all sides
    python -m benchmarks.answer --model qwen --repeats 3 --sides ours-bf16 transformers-bf16
    python -m benchmarks.answer --model dinov2 --only starts          SmolLM2-135M + DINOv2-S

    random weights in the published shapes -> one step of train_pretrain.py -> a checkpoint
    checkpoint -> extras/export -> a LLaVA for transformers; GGUF for llama.cpp -> the same weights
    each side in a process of its own, all asked in turn, round after round -> a Markdown table

The question is one picture (196 tokens; DINOv2's 256) and 32 tokens of text, and 64 tokens are
answered, greedily, whatever they say. Time counts from the ready pixels to the last token;
llama.cpp gets the same number of tokens without an image. "while decoding" is what follows the
first token. The share of read bandwidth takes the bytes of the language model's matrices (of the
table only what the head reads, once) for each token, and a sum over 256 MB, measured in the same
rounds. Further: 16 questions of unequal length in one batch, about 16 pictures or about one,
against one by one; and from the start of a process to the first token of an answer.

--clock cpu counts the seconds that a processor worked, on one thread (OMP_NUM_THREADS=1): for
ratios on a machine that has other work as well. Without it the seconds are a clock's.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

import eval as script
from benchmarks.answer_sides import CLOCKS, NEW, ROWS, ROWS_NEW, TEXT, question
from benchmarks.common import Process, machine, random_weights
from dataset.chat import IMAGE
from dataset.images import ImageProcessor
from extras.preset_list import ROOT, empty_tower
from model.pretrained.save import save_language, save_vision

SMOLLM2, SIGLIP = "HuggingFaceTB/SmolLM2-135M-Instruct", "google/siglip-base-patch16-224"
MODELS = {"smollm2": (SMOLLM2, SIGLIP), "qwen": ("Qwen/Qwen2.5-0.5B", SIGLIP),
          "dinov2": (SMOLLM2, "facebook/dinov2-small")}
SIDES = ("ours-fp32", "ours-bf16", "ours-int8", "ours-int4", "transformers-fp32",
         "transformers-bf16", "llama.cpp-bf16", "llama.cpp-q8_0")
NEEDS = {"transformers": "transformers", "llama.cpp": "xllamacpp"}  # packages
PARTS = ("answers", "batches", "starts")


# ---------------------------------------------------------------- the same weights for all


def write_public(name: str, place: Path) -> None:
    """Two towers as they are published, of random numbers, with the emoji tokenizer: which of its
    words a prompt holds costs nothing, how many it holds does."""
    torch.manual_seed(0)
    language, vision = MODELS[name]
    save_language(random_weights(empty_tower(language).bfloat16()), place / "language")
    save_vision(random_weights(empty_tower(vision, -1).bfloat16()), place / "vision")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        content = (ROOT / "dataset/emoji/language" / file).read_bytes()
        (place / "language" / file).write_bytes(content)
    ImageProcessor("SiglipImageProcessor", (224, 224), None, 3, 1 / 255, (0.5,) * 3,
                   (0.5,) * 3).save(place / "vision")


def make_all(name: str, place: Path) -> None:
    """place/run, place/llava, place/bf16 and place/q8_0, through this project's own commands; and
    the question that all are asked."""
    import extras.export.__main__ as export
    import train_pretrain

    write_public(name, place)
    Image.new("RGB", (224, 224), (90, 120, 60)).save(place / "picture.png")
    (place / "rows.jsonl").write_text(json.dumps({"image": "picture.png", "conversations": [
        {"role": "user", "content": f"{IMAGE}\nWhat?"}, {"role": "assistant", "content": "A."}]}))
    run = str(place / "run")
    with contextlib.redirect_stdout(sys.stderr):
        train_pretrain.main([
            "--preset", "qwen2.5-siglip", "--language_model", str(place / "language"),
            "--vision_tower", str(place / "vision"), "--vision_feature_layer", "-2",
            "--data", str(place / "rows.jsonl"), "--image_folder", str(place), "--steps", "1",
            "--batch_size", "1", "--gradient_accumulation_steps", "1", "--num_workers", "0",
            "--system", "", "--out", run])
        export.main(["--model", run, "--out", str(place / "llava")])
        if importlib.util.find_spec("xllamacpp"):
            for dtype in ("bf16", "q8_0"):
                export.main(["--model", run, "--to", "gguf", "--dtype", dtype, "--out",
                             str(place / dtype)])
        _, template, processor = script.load_model(script.read_flags(["--device", "cpu"]), run)
    save_file({"ids": torch.tensor([question(template)]),
               "pixels": processor(Image.open(place / "picture.png"))[None]},
              place / "question.safetensors")


# ---------------------------------------------------------------- from process start


START_TRANSFORMERS = """
import sys
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
place, device = sys.argv[1:]
processor = AutoProcessor.from_pretrained(place + "/llava")
model = LlavaForConditionalGeneration.from_pretrained(place + "/llava", dtype=torch.float32)
model.to(device)
text = processor.apply_chat_template([{"role": "user", "content": "<image>\\ncat"}],
                                     add_generation_prompt=True)
given = processor(text=text, images=Image.open(place + "/picture.png"), return_tensors="pt")
print(model.generate(**given.to(device), do_sample=False, max_new_tokens=1)[0, -1])
"""


def starts(place: Path, repeats: int, clock: str, device: str) -> None:
    def start(*command: str) -> float:
        began = os.times()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True,
                       env={**os.environ, "HF_HUB_OFFLINE": "1"})
        spent = [ended - before for before, ended in zip(began, os.times())]
        return spent[4] if clock == "wall" else spent[2] + spent[3]  # of children, user and system

    ours = ("eval.py", "--model", f"{place}/run", "--image", f"{place}/picture.png", "--prompt",
            "cat", "--max_new_tokens", "1", "--dtype", "fp32", "--device", device)
    theirs = ("-c", START_TRANSFORMERS, str(place), device)
    pairs = [(start(*ours), start(*theirs)) for _ in range(repeats)]
    ratio = statistics.median(o / t for o, t in pairs)
    print(f"process start to first token: ours {min(o for o, _ in pairs):.1f} s, "
          f"transformers {min(t for _, t in pairs):.1f} s: {ratio:.2f} of it")


# ---------------------------------------------------------------- the whole


def measure(sides: dict[str, Process], repeats: int) -> tuple[dict, float]:
    """Round after round, each side once: -> {side: [seconds of tokens]}, bytes a second."""
    asked, read = {name: [] for name in sides}, []
    for number in range(repeats):
        for name, side in sides.items():
            asked[name].append(side.ask("ask"))
        read.append(next(iter(sides.values())).ask("bandwidth"))
        print(f"round {number + 1} of {repeats}", file=sys.stderr, flush=True)
    return asked, max(read)


def table(asked: dict, weights: dict[str, int], read: float) -> str:
    """weights: of each side the bytes that a token reads. read: bytes a second."""
    lines = ["| side | seconds (median; least to most) | first token | tokens/s while decoding | "
             "of read bandwidth |", "| --- | --- | --- | --- | --- |"]
    for name, rounds in asked.items():
        totals = sorted(times[-1] for times in rounds)
        first = statistics.median(times[0] for times in rounds)
        rate = statistics.median((NEW - 1) / (times[-1] - times[0]) for times in rounds)
        share = f"{weights[name] * rate / read:.0%}" if weights[name] else "-"
        lines.append(f"| {name} | {statistics.median(totals):.2f} ({totals[0]:.2f} to "
                     f"{totals[-1]:.2f}) | {first:.2f} | {rate:.1f} | {share} |")
    return "\n".join(lines)


def ratios(asked: dict) -> str:
    """Of whole answers, and of decoding; the median of each round's own ratio, since what else
    the machine did changes from round to round."""
    lines = []
    for ours_, peer in (("ours-bf16", "transformers-bf16"), ("ours-fp32", "transformers-fp32"),
                        ("ours-bf16", "transformers-fp32"), ("ours-bf16", "llama.cpp-bf16"),
                        ("ours-int8", "llama.cpp-q8_0"), ("ours-int8", "ours-fp32"),
                        ("ours-int4", "ours-fp32"), ("ours-int8", "ours-bf16")):
        if ours_ in asked and peer in asked:
            pairs = list(zip(asked[peer], asked[ours_]))
            whole = statistics.median(p[-1] / o[-1] for p, o in pairs)
            steps = statistics.median((p[-1] - p[0]) / (o[-1] - o[0]) for p, o in pairs)
            lines.append(f"{ours_} against {peer}: {whole:.2f}x, decoding alone {steps:.2f}x")
    return "\n".join(lines)


def batches(sides: dict[str, Process], repeats: int) -> None:
    for name, side in sides.items():
        if name.startswith("ours"):
            rounds = [side.ask("batch") for _ in range(repeats)]
            one, many, alone = (statistics.median(each) for each in zip(*rounds))
            print(f"{name}: {ROWS} answers of {ROWS_NEW} tokens, one by one {alone:.1f} s; in one "
                  f"batch {many:.1f} s ({alone / many:.2f}x), about one picture {one:.1f} s "
                  f"({alone / one:.2f}x)", flush=True)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answer", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", choices=MODELS, default="smollm2")
    add("--repeats", type=int, default=5)
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--only", nargs="+", choices=PARTS, default=list(PARTS))
    add("--place", type=Path, help="keep the files here, or use those there")
    add("--clock", choices=CLOCKS, default="wall")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        place = (flags.place or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "question.safetensors").exists():
            make_all(flags.model, place)
        names = [name for name in flags.sides if name.startswith("ours")
                 or importlib.util.find_spec(NEEDS[name.rpartition("-")[0]])]
        print(f"{machine(torch.get_num_threads(), *NEEDS.values())}; load "
              f"{os.getloadavg()[0]:.1f}; seconds of {flags.clock}\n")
        if {"answers", "batches"} & set(flags.only):
            sides, weights = {}, {}
            for name in names:  # one after the other: all at once, with all cores each, get nowhere
                sides[name] = Process("-m", "benchmarks.answer_sides", name, str(place),
                                      flags.clock, flags.device)
                weights[name] = sides[name].ask("read")
            if "answers" in flags.only:
                asked, read = measure(sides, flags.repeats)
                print(f"{' + '.join(MODELS[flags.model])}: {TEXT} tokens and a picture asked, "
                      f"{NEW} answered; memory is read at {read / 1e9:.1f} GB/s\n\n"
                      f"{table(asked, weights, read)}\n\n{ratios(asked)}")
            if "batches" in flags.only:
                batches(sides, min(flags.repeats, 3))
            for side in sides.values():
                side.end()
        if "starts" in flags.only and "transformers-fp32" in names:
            starts(place, flags.repeats, flags.clock, flags.device)


if __name__ == "__main__":
    main()
