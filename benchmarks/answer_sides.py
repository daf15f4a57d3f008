"""What each side of benchmarks/answer.py does, in a process of its own.

    python -m benchmarks.answer_sides SIDE PLACE CLOCK DEVICE

    checkpoint, LLaVA or GGUF of the same weights -> loaded once -> each line of stdin is the name
    of what is asked, and is answered by a line of JSON: the seconds that it took
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import eval as script
from dataset.chat import IMAGE, Message
from evaluation.batched_generation import generate_batch
from model.generate import generate
from training.precision import NUMBERS

TEXT, NEW = 32, 64  # tokens of the question beside its picture, and of the answer
ROWS, ROWS_NEW = 16, 32
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
now = time.perf_counter  # or another of CLOCKS


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


def ours(place: Path, numbers: str, device: str) -> dict:
    """-> what can be asked of this side; "ask": seconds of each token; "read": what one token
    reads of the weights, in bytes."""
    flags = ["--dtype", numbers] if numbers in NUMBERS else ["--quantize", numbers]
    model, template, _ = script.load_model(script.read_flags(["--device", device, *flags]),
                                           str(place / "run"))
    given = load_file(place / "question.safetensors")
    ids, pixels = given["ids"][0].tolist(), given["pixels"]

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

    def read() -> int:
        tied = model.language.config.tie_word_embeddings
        return sum(p.nbytes for name, p in model.language.named_parameters()
                   if p.ndim > 1 and (tied or not name.startswith("embed_tokens")))

    return {"ask": ask, "batch": batch, "read": read}


def transformers(place: Path, numbers: str, device: str) -> dict:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        place / "llava", dtype=NUMBERS[numbers]).eval().to(device)
    given = load_file(place / "question.safetensors", device)
    given = {"input_ids": given["ids"], "attention_mask": torch.ones_like(given["ids"]),
             "pixel_values": given["pixels"].to(model.dtype)}

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

    return {"ask": ask}


def llama_cpp(place: Path, numbers: str, device: str) -> dict:
    """Asked twice, for one token and for all of them; what it remembers of a prompt is not used."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(place / numbers / "language.gguf")
    parameters.n_ctx, parameters.n_parallel = 512, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = (
        torch.get_num_threads())
    server = xllamacpp.Server(parameters)
    length = load_file(place / "question.safetensors")["ids"].shape[1]
    ids = [i % 1000 for i in range(length)]

    def seconds(tokens: int) -> float:
        began = now()
        answer = server.handle_completions({
            "prompt": ids, "n_predict": tokens, "temperature": 0, "ignore_eos": True,
            "cache_prompt": False})
        timings = (answer if isinstance(answer, dict) else json.loads(answer))["timings"]
        assert (timings["prompt_n"], timings["predicted_n"]) == (length, tokens), timings
        return now() - began

    return {"ask": lambda: [seconds(1), seconds(NEW)]}


def bandwidth(device: str) -> float:
    """Bytes a second that a sum reads; the best of three."""
    numbers, best = torch.ones(64 * 2**20, device=device), 0.0
    for _ in range(3):
        began = now()
        numbers.sum().item()
        best = max(best, numbers.nbytes / (now() - began))
    return best


def serve(side: str, place: Path, device: str) -> None:
    name, _, numbers = side.rpartition("-")
    make = {"ours": ours, "transformers": transformers, "llama.cpp": llama_cpp}[name]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    known = {"read": lambda: 0, "bandwidth": lambda: bandwidth(device),
             **make(place, numbers, device)}
    known["ask"]()  # the first one finds its buffers
    for line in sys.stdin:
        print(json.dumps(known[json.loads(line)]()), file=out, flush=True)


if __name__ == "__main__":
    side, place, clock, device = sys.argv[1:]
    now = CLOCKS[clock]
    serve(side, Path(place), device)
