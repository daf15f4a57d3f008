"""One optimizer step, made by this project and by transformers + peft: the same work for both.

    Work -> random weights in the published shapes -> ours.safetensors; a LLaVA for transformers
    Work -> batches, ids labels pixels             -> our Batch;        its dictionary of tensors
    Side(...) -> a process of its own, that makes a step when it is asked to

Each side is written as its own documentation would have it: ours as the training loop, theirs as
LlavaForConditionalGeneration with its default attention, labels given to the model and peft's
adapters. Both begin at the same weights, so their first losses must agree: the work is the same.
"""

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.common import Process, peak_bytes, random_weights
from dataset.batching import Batch
from extras.export.transformers import llava
from extras.fast import prepare_for_training
from extras.fast.feature_cache import CachedBatch, FeatureCache, with_cached_features
from extras.preset_list import LANGUAGE, VISION
from model.config import ProjectorConfig, VLMConfig
from model.pretrained.meta_device import meta_device
from model.pretrained.public_config import read_language_config, read_vision_config
from model.vlm import VLM, build_model
from train_pretrain import backward
from training.optim import choose_trainable, make_optimizer
from training.precision import NUMBERS, cast_weights

SMOLLM2, QWEN = (LANGUAGE[name] for name in ("HuggingFaceTB/SmolLM2-135M-Instruct",
                                             "Qwen/Qwen2.5-0.5B"))
SIGLIP = VISION["google/siglip-base-patch16-224"]
FEATURE_LAYER = -2  # LLaVA's; behind the last layer there would be a norm that LLaVA leaves out
LORA = {"rank": 8, "alpha": 16.0, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@dataclass(frozen=True)
class Work:
    """batches: of each row the number of its tokens, the picture's included. answer: how many of
    them are supervised at the end of each row. trained: "projector", "all" (but vision), "lora"."""

    language: dict
    vision: dict
    trained: str
    batches: tuple[tuple[int, ...], ...]
    answer: int

    @property
    def image_tokens(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    @property
    def placeholder(self) -> int:
        return self.language["vocab_size"] - 1


# ---------------------------------------------------------------- what both sides get


def empty(work: Work) -> VLM:
    language = read_language_config(work.language)
    vision = read_vision_config(work.vision, FEATURE_LAYER)
    projector = ProjectorConfig("mlp", vision.hidden_size, language.hidden_size)
    with meta_device():
        return build_model(VLMConfig(language, vision, projector, work.placeholder))


def write_weights(work: Work, directory: Path) -> None:
    """The same random numbers for both: once with our names, once as a LLaVA."""
    torch.manual_seed(0)
    model = random_weights(empty(work))
    save_file(dict(model.named_parameters()), directory / "ours.safetensors")
    side = work.vision["image_size"]
    config, tensors = llava(model, (side, side), work.placeholder)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
              directory / "model.safetensors", metadata={"format": "pt"})


def make_batch(work: Work, number: int) -> Batch:
    """Batch `number` of the work: a picture, then text; padded on the right."""
    random = torch.Generator().manual_seed(number)
    lengths, K = work.batches[number], work.image_tokens
    ids = torch.randint(0, work.placeholder, (len(lengths), max(lengths)), generator=random)
    ids[:, :K] = work.placeholder
    labels = torch.full_like(ids, -100)
    for b, length in enumerate(lengths):
        first = length - 1 - min(work.answer, length - K - 1)
        labels[b, first:length - 1] = ids[b, first + 1:length]  # shifted, as ours are
    side = work.vision["image_size"]
    pixels = torch.randn(len(lengths), 3, side, side, generator=random)
    batch = Batch(ids, labels, pixels, ["random"] * len(lengths), list(lengths))
    return batch.pin_memory() if torch.cuda.is_available() else batch  # as a loader's workers do


# ---------------------------------------------------------------- the two sides


def ours(work: Work, directory: Path, numbers: str, device, cached: bool):
    """-> step(number of the batch) -> loss. cached: features are read from disk each time."""
    model = empty(work)
    model.load_state_dict(load_file(directory / "ours.safetensors"), assign=True)
    lora = work.trained == "lora"
    settings = argparse.Namespace(
        dtype=numbers, learning_rate=1e-4, projector_learning_rate=None, weight_decay=0.0,
        vision_learning_rate=None, train_projector=True, train_vision=False, lora=lora,
        train_language="all" if work.trained == "all" else "none", lora_dropout=0.0,
        **{f"lora_{name}": value for name, value in LORA.items()})
    choose_trainable(model, settings, None)
    cast_weights(model, numbers, set())
    prepare_for_training(model)
    model.to(device).train()
    ranks = argparse.Namespace(device=device)
    files = FeatureCache(directory / "features", numbers, 1e12) if cached else None
    batches = [make_batch(work, number) for number in range(len(work.batches))]

    def loss_and_gradients(number: int):
        batch = batches[number]
        if cached:
            batch = with_cached_features(model, found(batch, files), files, numbers)
        return backward(model, batch, batch.supervised, settings, ranks)

    return step_of(loss_and_gradients, make_optimizer(model, settings))


def found(batch: Batch, files: FeatureCache) -> Batch:
    """As a data worker makes it: features where they are on disk, else pixels and their keys."""
    keys = tuple(files.key(pixels.numpy().tobytes()) for pixels in batch.pixels)
    known = [files.read(key) for key in keys]
    if any(features is None for features in known):
        return CachedBatch(**vars(batch), keys=keys)
    return replace(batch, pixels=None, features=torch.stack(known))


def theirs(work: Work, directory: Path, numbers: str, device):
    """transformers, and peft for the adapters; weights in the numbers that are asked for."""
    import transformers  # the other side's process is measured without it

    transformers.logging.set_verbosity_error()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        directory, dtype=NUMBERS[numbers])
    model.requires_grad_(False)
    if work.trained == "lora":
        import peft

        targets = rf".*language_model.*\.({'|'.join(LORA['targets'])})"
        model = peft.inject_adapter_in_model(peft.LoraConfig(
            r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=targets), model)
    for name, parameter in model.named_parameters():
        if "projector" in name or (work.trained == "all" and "vision" not in name):
            parameter.requires_grad_(True)
    model.to(device).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4,
                                  betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batches = [make_batch(work, number) for number in range(len(work.batches))]

    def loss_and_gradients(number: int):
        batch = batches[number]
        labels = torch.full_like(batch.labels, -100)
        labels[:, 1:] = batch.labels[:, :-1]  # transformers shifts them itself
        mask = torch.arange(labels.shape[1]) < torch.tensor(batch.lengths)[:, None]
        out = model(input_ids=batch.ids.to(device), attention_mask=mask.long().to(device),
                    pixel_values=batch.pixels.to(device, NUMBERS[numbers]),
                    labels=labels.to(device), use_cache=False)
        out.loss.backward()
        return out.loss.detach()

    return step_of(loss_and_gradients, optimizer)


def step_of(loss_and_gradients, optimizer):
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step(number: int) -> float:
        loss = loss_and_gradients(number)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


# ---------------------------------------------------------------- a process for each


def count_products() -> FlopCounterMode:
    """Attention is left out: PyTorch counts it on CUDA alone, and not where heads are shared."""
    def nothing(*shapes, **facts) -> int:
        return 0

    return FlopCounterMode(display=False, custom_mapping={
        operation: nothing for operation in flop_registry if "attention" in str(operation)})


def product_rate(numbers: torch.dtype, device) -> float:
    """Floating-point operations a second in a product of two large matrices; the best of ten."""
    side = 8192 if device.type == "cuda" else 1024
    a, best = torch.randn(side, side, device=device, dtype=numbers), 0.0
    for _ in range(10):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def serve(side: str, threads: int) -> None:
    """In the side's own process. Each line of stdin is a job to get ready for, or the number of the
    batch to make a step with; each is answered by a line. count: the floating-point operations of
    the step's products with weights are counted too, and how fast one large product is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    step = None
    for line in sys.stdin:
        message = json.loads(line)
        if "work" in message:
            step = None  # let the last model go, and its memory
            gc.collect()
            with suppress(OSError, AttributeError):  # Linux's C library
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            numbers = message["numbers"]
            given = Work(**message["work"]), Path(message["directory"]), numbers, device
            step = theirs(*given) if side == "theirs" else ours(*given, side == "cached")
            peak_bytes(reset=True)
            answer = peak_bytes()
        else:
            counter = count_products() if message["count"] else nullcontext()
            began, busy = time.perf_counter(), time.process_time()
            with counter:
                loss = step(message["step"])  # a number, so a GPU has done its work by then
            answer = {"seconds": time.perf_counter() - began, "loss": loss,
                      "busy": time.process_time() - busy, "peak": peak_bytes()}
            if message["count"]:
                answer |= {"flops": counter.get_total_flops(),
                           "rate": product_rate(NUMBERS[numbers], device)}
        print(json.dumps(answer), flush=True)


class Side(Process):
    """A side's process, as seen from outside."""

    def __init__(self, side: str, threads: int):
        super().__init__("-m", "benchmarks.sides", side, str(threads), OMP_NUM_THREADS=str(threads))

    def begin(self, work: Work, directory: str, numbers: str) -> int:
        """-> bytes that it holds before the first step."""
        return self.ask({"work": vars(work), "directory": directory, "numbers": numbers})

    def step(self, number: int, count: bool = False) -> dict:
        return self.ask({"step": number, "count": count})

    def round(self, work: Work, count: bool = False) -> list[dict]:
        return [self.step(number, count) for number in range(len(work.batches))]


def race(sides: list[tuple[str, Work]], numbers: str, rounds: int, threads: int) -> list[dict]:
    """sides: what each is ("ours", "cached", "theirs") and its Work, whose weights are the same.
    -> of each {"seconds", "busy": [round], sums over its batches; "peak"; "loss": the first;
    "flops": operations of a round's products with weights; "rate": such a second, in a large one}.

    In turns, one round of each at a time: whatever else the machine does slows all of them. A round
    before the first one warms up and counts operations, and is not timed.
    """
    with tempfile.TemporaryDirectory() as directory:
        write_weights(sides[0][1], Path(directory))
        running = [Side(side, threads) for side, _ in sides]
        results = [{"seconds": [], "busy": []} for _ in sides]
        for (side, work), process, one in zip(sides, running, results):
            process.begin(work, directory, numbers)
            if side == "cached":  # the first epoch: features are computed, and kept on disk
                one["loss"] = process.round(work)[0]["loss"]
        for turn in range(-1, rounds):
            for (_, work), process, one in zip(sides, running, results):
                steps = process.round(work, count=turn < 0)
                one.setdefault("loss", steps[0]["loss"])
                one["peak"] = steps[-1]["peak"]
                if turn < 0:
                    one["flops"] = sum(step["flops"] for step in steps)
                    one["rate"] = max(step["rate"] for step in steps)
                    continue
                for name in ("seconds", "busy"):
                    one[name].append(sum(step[name] for step in steps))
        for process in running:
            process.end()
    return results


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
