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
rounds.

--clock cpu counts the seconds that a processor worked, on one thread (OMP_NUM_THREADS=1): for
ratios on a machine that has other work as well. Without it the seconds are a clock's.

Further: 16 questions of unequal length in one batch, about 16 pictures or about one, against one by
one; from the start of a process to the first token of an answer, against transformers; how many
greedy tokens of an answer change in fewer bits does not depend on time: docs/benchmarks.md has it.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from PIL import Image

from dataset.chat import IMAGE, Message
from extras.preset_list import LANGUAGE, ROOT, VISION
from model.pretrained.meta_device import meta_device
from model.pretrained.public_config import read_language_config, read_vision_config
from training.precision import NUMBERS

SMOLLM2, SIGLIP = "HuggingFaceTB/SmolLM2-135M-Instruct", "google/siglip-base-patch16-224"
MODELS = {"smollm2": (SMOLLM2, SIGLIP), "qwen": ("Qwen/Qwen2.5-0.5B", SIGLIP),
          "dinov2": (SMOLLM2, "facebook/dinov2-small")}
SIDES = ("ours-fp32", "ours-bf16", "ours-int8", "ours-int4", "transformers-fp32",
         "transformers-bf16", "llama.cpp-bf16", "llama.cpp-q8_0")
PARTS = ("answers", "batches", "starts")
TEXT, NEW = 32, 64  # tokens of the question beside its picture, and of the answer
ROWS, ROWS_NEW = 16, 32
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
now = time.perf_counter  # --clock chooses


# ---------------------------------------------------------------- the same weights for all


def write_public(name: str, place: Path) -> None:
    """Two towers as they are published, of random numbers, with the emoji tokenizer: which of its
    words a prompt holds costs nothing, how many it holds does."""
    from model.language import LanguageModel
    from model.pretrained.save import save_language, save_vision
    from model.vision import VisionTransformer

    torch.manual_seed(0)
    language, vision = MODELS[name]
    for part, facts, make, save in (
            ("language", LANGUAGE[language],
             lambda f: LanguageModel(read_language_config(f)), save_language),
            ("vision", VISION[vision],
             lambda f: VisionTransformer(read_vision_config(f)), save_vision)):
        with meta_device():
            model = make(facts)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        for weight_name, parameter in model.named_parameters():
            norm = "norm" in weight_name and weight_name.endswith("weight")
            torch.nn.init.normal_(parameter, float(norm), 0.02)
        save(model, place / part)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (place / "language" / file).write_bytes((ROOT / "dataset/emoji/language" /
                                                 file).read_bytes())
    (place / "vision" / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 224, "width": 224},
        "resample": 3, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3}))


def make_all(name: str, place: Path) -> None:
    """place/run, place/llava, place/bf16 and place/q8_0, through this project's own commands."""
    import extras.export.__main__ as export
    import train_pretrain

    write_public(name, place)
    Image.new("RGB", (224, 224), (90, 120, 60)).save(place / "picture.png")
    (place / "rows.jsonl").write_text(json.dumps({"image": "picture.png", "conversations": [
        {"role": "user", "content": f"{IMAGE}\nWhat?"}, {"role": "assistant", "content": "A."}]}))
    with contextlib.redirect_stdout(sys.stderr):
        train_pretrain.main([
            "--preset", "qwen2.5-siglip", "--language_model", str(place / "language"),
            "--vision_tower", str(place / "vision"), "--vision_feature_layer", "-2", "--data",
            str(place / "rows.jsonl"), "--image_folder", str(place), "--steps", "1", "--batch_size",
            "1",
            "--gradient_accumulation_steps", "1", "--num_workers", "0", "--system", "", "--out",
            str(place / "run")])
        export.main(["--model", str(place / "run"), "--out", str(place / "llava")])
        if importlib.util.find_spec("xllamacpp"):
            for dtype in ("bf16", "q8_0"):
                export.main(["--model", str(place / "run"), "--to", "gguf", "--dtype", dtype,
                             "--out", str(place / dtype)])


def question(template, fewer: int = 0) -> list[int]:
    """The ids of a question: one picture, and TEXT - fewer tokens of words and marks."""
    def ids(words: int) -> list[int]:
        return template.encode_prompt([Message("user", f"{IMAGE}\n" + " cat" * words)])

    length = template.image_tokens + TEXT - fewer
    words = length - len(ids(0))
    if words < 0:
        raise ValueError(f"the marks around a question take {len(ids(0))} tokens, more than the "
                         f"{length} that it is to have")
    while len(ids(words)) > length:
        words -= 1
    return ids(words)


# ---------------------------------------------------------------- one side each


def ours(place: Path, numbers: str, device: str):
    """-> ask() -> seconds of each token, and what one token reads of the weights, in bytes."""
    import eval as script
    from evaluation.batched_generation import generate_batch
    from model.generate import generate

    flags = ["--dtype", numbers] if numbers in NUMBERS else ["--quantize", numbers]
    flags = script.read_flags(["--device", device, *flags])
    model, template, processor = script.load_model(flags, str(place / "run"))
    ids, pixels = question(template), processor(Image.open(place / "picture.png"))[None]
    read = sum(p.nbytes for name, p in model.language.named_parameters() if p.ndim > 1
               and not (name.startswith("embed_tokens")
                        and not model.language.config.tie_word_embeddings))

    def ask() -> list[float]:
        clock = [now()]
        for _ in generate(model, ids, pixels, max_new_tokens=NEW):
            clock.append(now())
        return [later - clock[0] for later in clock[1:]]

    def batch() -> list[float]:
        """Seconds of 16 questions about one picture in one batch, about 16, and one by one."""
        prompts, clock = [question(template, row) for row in range(ROWS)], [now()]
        for shown in ([pixels] * ROWS, [pixels.clone() for _ in range(ROWS)]):
            generate_batch(model, prompts, shown, ROWS_NEW, ())
            clock.append(now())
        for prompt in prompts:
            list(generate(model, prompt, pixels, max_new_tokens=ROWS_NEW))
        clock.append(now())
        return [later - earlier for earlier, later in zip(clock, clock[1:])]

    return ask, batch, read


def transformers(place: Path, numbers: str, device: str):
    from transformers import LlavaForConditionalGeneration

    from dataset.images import ImageProcessor

    model = LlavaForConditionalGeneration.from_pretrained(
        place / "llava", dtype=NUMBERS[numbers]).eval().to(device)
    template = template_of(place)
    ids = torch.tensor([question(template)])
    pixels = ImageProcessor.from_directory(place / "llava")(Image.open(place / "picture.png"))
    given = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids, device=device),
             "pixel_values": pixels[None].to(device, model.dtype)}

    class Clock:  # what generate calls a streamer: put gets the prompt, then each token
        def put(self, tokens):
            self.times.append(now())

        def end(self):
            pass

    def ask() -> list[float]:
        clock = Clock()
        clock.times, began = [], now()
        model.generate(**given, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
                       eos_token_id=[], pad_token_id=0, streamer=clock)
        return [later - began for later in clock.times[1:]]

    return ask, None, 0


def template_of(place: Path):
    from dataset.chat import ChatTemplate
    from dataset.tokenizer import Tokenizer
    from model.pretrained.checkpoint import find_model, read_config

    checkpoint = find_model(str(place / "run"))
    config = read_config(checkpoint)
    return ChatTemplate(Tokenizer.from_directory(checkpoint), config["image_tokens"],
                        config["system"], config["image_token"], config["template"])


def llama_cpp(place: Path, numbers: str, device: str):
    """Asked twice, for one token and for all of them; what it remembers of a prompt is not used."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(place / numbers / "language.gguf")
    parameters.n_ctx, parameters.n_parallel = 512, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = (
        torch.get_num_threads())
    server = xllamacpp.Server(parameters)
    ids = [i % 1000 for i in range(len(question(template_of(place))))]

    def seconds(tokens: int) -> float:
        began = now()
        answer = server.handle_completions({
            "prompt": ids, "n_predict": tokens, "temperature": 0, "ignore_eos": True,
            "cache_prompt": False})
        timings = (answer if isinstance(answer, dict) else json.loads(answer))["timings"]
        assert (timings["prompt_n"], timings["predicted_n"]) == (len(ids), tokens), timings
        return now() - began

    def ask() -> list[float]:
        return [seconds(1), seconds(NEW)]

    return ask, None, 0


def bandwidth(device: str) -> float:
    """Bytes a second that a sum reads; the best of three."""
    numbers, best = torch.ones(64 * 2**20, device=device), 0.0
    for _ in range(3):
        began = now()
        numbers.sum().item()
        best = max(best, numbers.nbytes / (now() - began))
    return best


def serve(side: str, place: Path, device: str) -> None:
    """Answer each line on stdin, "ask" or "batch" or "read", with a line of JSON on stdout."""
    name, _, numbers = side.rpartition("-")
    make = {"ours": ours, "transformers": transformers, "llama.cpp": llama_cpp}[name]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    ask, batch, read = make(place, numbers, device)
    ask()  # the first one finds its buffers
    print(json.dumps({"read": read}), file=out, flush=True)
    known = {"ask": ask, "batch": batch, "bandwidth": lambda: bandwidth(device)}
    for line in sys.stdin:
        print(json.dumps(known[line.strip()]()), file=out, flush=True)


# ---------------------------------------------------------------- from process start


START_OURS = """
import runpy, sys
place, device = sys.argv[1:]
sys.argv = ["eval.py", "--model", place + "/run", "--image", place + "/picture.png", "--prompt",
            "cat", "--max_new_tokens", "1", "--dtype", "fp32", "--device", device]
runpy.run_path("eval.py", run_name="__main__")
"""
START_TRANSFORMERS = """
import sys
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
processor = AutoProcessor.from_pretrained(sys.argv[1] + "/llava")
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1] + "/llava", dtype=torch.float32)
model.to(sys.argv[2])
text = processor.apply_chat_template([{"role": "user", "content": "<image>\\ncat"}],
                                     add_generation_prompt=True)
given = processor(text=text, images=Image.open(sys.argv[1] + "/picture.png"), return_tensors="pt")
given = given.to(sys.argv[2])
print(model.generate(**given, do_sample=False, max_new_tokens=1)[0, -1])
"""


def start(code: str, place: Path, clock: str, device: str) -> float:
    def spent() -> float:
        import resource  # here: Windows has none

        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return now() if clock == "wall" else children.ru_utime + children.ru_stime

    began = spent()
    subprocess.run([sys.executable, "-c", code, str(place), device], cwd=ROOT, check=True,
                   capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return spent() - began


# ---------------------------------------------------------------- the whole


class Side:
    """A process that answers when it is asked."""

    def __init__(self, name: str, place: Path, clock: str, device: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.answer", "--serve", name, "--place", str(place),
             "--clock", clock, "--device", device], cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE)
        self.read = self.hear()["read"]  # when it is ready: bytes of weights for each token

    def hear(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side ended; its reason stands above")
        return json.loads(line)

    def ask(self, what: str = "ask"):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.hear()


def measure(sides: dict, repeats: int) -> tuple[dict, float]:
    """Round after round, each side once: -> {side: [seconds of tokens]}, bytes a second."""
    asked, read = {name: [] for name in sides}, []
    for number in range(repeats):
        for name, side in sides.items():
            asked[name].append(side.ask())
        read.append(next(iter(sides.values())).ask("bandwidth"))
        print(f"round {number + 1} of {repeats}", file=sys.stderr, flush=True)
    return asked, max(read)


def table(asked: dict, sides: dict, read: float) -> str:
    lines = ["| side | seconds (median; least to most) | first token | tokens/s while decoding | "
             "of read bandwidth |", "| --- | --- | --- | --- | --- |"]
    for name, rounds in asked.items():
        totals = sorted(times[-1] for times in rounds)
        first = statistics.median(times[0] for times in rounds)
        rate = statistics.median((NEW - 1) / (times[-1] - times[0]) for times in rounds)
        share = f"{sides[name].read * rate / read:.0%}" if sides[name].read else "-"
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


def machine(device: str) -> str:
    def found(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    gpu = f"{torch.cuda.get_device_name(device)}; " if device.startswith("cuda") else ""
    return (f"{gpu}{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
            f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; load "
            f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
            + ", ".join(map(found, ("torch", "transformers", "xllamacpp"))))


def answers(model: str, sides: dict[str, Side], repeats: int) -> None:
    asked, read = measure(sides, repeats)
    print(f"{' + '.join(MODELS[model])}: {TEXT} tokens and a picture asked, {NEW} answered; memory "
          f"is read at {read / 1e9:.1f} GB/s\n\n{table(asked, sides, read)}\n\n{ratios(asked)}")


def batches(sides: dict[str, Side], repeats: int) -> None:
    for name, side in sides.items():
        if name.startswith("ours"):
            rounds = [side.ask("batch") for _ in range(repeats)]
            one, many, alone = (statistics.median(each) for each in zip(*rounds))
            print(f"{name}: {ROWS} answers of {ROWS_NEW} tokens, one by one {alone:.1f} s; in one "
                  f"batch {many:.1f} s ({alone / many:.2f}x), about one picture {one:.1f} s "
                  f"({alone / one:.2f}x)", flush=True)


def starts(place: Path, repeats: int, *how) -> None:
    pairs = [(start(START_OURS, place, *how), start(START_TRANSFORMERS, place, *how))
             for _ in range(repeats)]
    ratio = statistics.median(o / t for o, t in pairs)
    print(f"process start to first token: ours {min(o for o, _ in pairs):.1f} s, "
          f"transformers {min(t for _, t in pairs):.1f} s: {ratio:.2f} of it")


def main(arguments=None) -> None:
    global now
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answer", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--place", type=Path, help="keep the files here, or use those there")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags = parser.parse_args(arguments)
    now = CLOCKS[flags.clock]
    if flags.serve:
        serve(flags.serve, flags.place, flags.device)
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = (flags.place or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "llava").exists():
            make_all(flags.model, place)
        here = {"transformers": "transformers", "llama.cpp": "xllamacpp"}
        names = [name for name in flags.sides if name.startswith("ours")
                 or importlib.util.find_spec(here[name.rpartition("-")[0]])]
        print(f"{machine(flags.device)}; seconds of {flags.clock}\n")
        if {"answers", "batches"} & set(flags.only):
            # One after the other: eight at once, with all cores each, get nowhere.
            sides = {name: Side(name, place, flags.clock, flags.device) for name in names}
            if "answers" in flags.only:
                answers(flags.model, sides, flags.repeats)
            if "batches" in flags.only:
                batches(sides, min(flags.repeats, 3))
            for side in sides.values():
                side.process.kill()
        if "starts" in flags.only and "transformers-fp32" in names:
            starts(place, flags.repeats, flags.clock, flags.device)


if __name__ == "__main__":
    main()
