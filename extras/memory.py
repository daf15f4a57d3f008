"""How much memory a run will take at most, predicted before anything is loaded.

    python -m extras.memory qwen2.5-siglip --batch_size 8 --lora --gradient_checkpointing

    settings, config facts -> the model, shapes without values -> Memory -> a small table

    weights       4 bytes each; frozen matrices 2 bytes, where a run computes in bf16 or fp16
    gradients     4 bytes for each trained parameter
    optimizer     8 bytes: AdamW keeps two averages of each trained parameter's gradient
    activations   what each block keeps until the backward pass comes back to it: in proportion to
                  rows x tokens x layers. --gradient_checkpointing: a block keeps its input
    logits        vocabulary x positions, at most CHUNK of them (chunked_cross_entropy.py), twice

The first three are a sum over the parameters. The last two are counted on the model's own code: one
step is made with tensors that have a shape and no values (FakeTensorMode), and each operation's
results are added when they are made and subtracted when they are freed. Left out: Python and
PyTorch themselves (a third of a GB on a processor), what kernels use while they run, and the buffer
of one gradient sum where several processes train.
"""

import argparse
import sys
import weakref
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from extras.fast import prepare_for_training
from extras.fast.chunked_cross_entropy import chunked_cross_entropy
from extras.preset_list import VISION, empty_model, facts, format_bytes, image_tokens, static_memory
from model.pretrained.checkpoint import own_names
from model.pretrained.meta_device import meta_device
from model.vlm import VLM, build_model
from training.optim import choose_trainable
from training.precision import autocast, cast_weights, choose_dtype
from training.presets import PRESETS, read_flags, resolve

# On a processor, of what comes and goes in a step: Linux's malloc keeps freed tensors up to 32 MB,
# and the next ones seldom fit. 15 to 35 % more than the tensors, measured with benchmarks/memory.py
# (6 % when malloc was told to keep none, MALLOC_MMAP_THRESHOLD_=65536). A GPU's figure is that of
# torch.cuda.max_memory_allocated, which counts tensors alone.
GAPS = 0.25


class Memory(NamedTuple):
    """Bytes on each device. Not all of them are there at one time: activations go as gradients
    come, so the peak is less than the sum."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept for the backward pass when the decoder has come to its end
    logits: int  # on top of them while the head computes
    gaps: int  # freed memory between them, which the allocator keeps
    peak: int


def predict(config, settings, size: tuple[int, int], K: int, device: torch.device) -> Memory:
    """config: a VLMConfig. size: (H,W) of the images, K: tokens of one. Of the largest batch there
    can be on one process: every row has an image and is max_length long."""
    model = as_trained(config, settings)
    weights, gradients, optimizer = static_memory(model)
    activations, logits, peak = step_of(model.train(), settings, size, K, device.type)
    step = max(peak, gradients)
    gaps = round(step * GAPS) if device.type == "cpu" else 0
    return Memory(weights, gradients, optimizer, activations, logits, gaps,
                  weights + optimizer + step + gaps)


def as_trained(config, settings) -> VLM:
    """The model as a run has it, with adapters, frozen parts and each weight's dtype, on the "meta"
    device: shapes without values."""
    with meta_device():
        model = build_model(config)
    choose_trainable(model, argparse.Namespace(**{**vars(settings), "lora_from": None}), None)
    cast_weights(model, settings.dtype, set(own_names(model)))
    model.set_checkpointing(settings.gradient_checkpointing)
    prepare_for_training(model)
    return model


class MemoryTracker(TorchDispatchMode):
    """Bytes of all tensors that were made in this context and are not freed: now, and at most.

    model's weights are left out: they were there before, and a view of one takes no memory.
    """

    def __init__(self, model):
        super().__init__()
        self.now = self.most = 0
        self.known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor):
                self.add(each.untyped_storage())
        return out

    def add(self, storage) -> None:
        """Several tensors can be views of one storage, which counts once."""
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


def step_of(model, settings, size, K: int, kind: str) -> tuple[int, int, int]:
    """Go through one optimizer step on shapes -> bytes kept for the backward pass, bytes that the
    head adds to them, and the most at any time; gradients count, weights do not.

    The shapes are those of the CPU's kernels, whatever the run will use: so it needs no GPU.
    kind: of device that it will use, "cpu" or "cuda".
    """
    device, language = torch.device("cpu"), model.config.language
    B, T = settings.batch_size, max(settings.max_length, K + 1)
    T = min(T, language.context_limit or T)  # longer rows are refused
    if not any(p.requires_grad for p in model.vision.parameters()):
        model.vision.layers = model.vision.layers[:1]  # they keep nothing: one is as good as all
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        model.to_empty(device=device)
        with MemoryTracker(model) as tracker:
            # The second micro-batch finds gradients there; the others are like it.
            for _ in range(min(settings.gradient_accumulation_steps, 2)):
                before = tracker.now
                pixels = torch.empty(B, 3, *size, device=device)
                ids = torch.empty(B, T - K, dtype=torch.int64, device=device)
                with autocast(settings.dtype, device):
                    text = model.language.embed(ids)  # (B,T-K,D)
                    images = model.encode_images(pixels)  # (B,K,D)
                    embeds = torch.cat([images.to(text.dtype), text], dim=1)  # (B,T,D)
                    hidden = model.language.decode(embeds)
                    del images, text, embeds
                    # (S,D), copied as in the model: no more than these can be supervised
                    supervised = hidden[:, K:].clone().flatten(0, 1)
                    activations, earlier = tracker.now - before, tracker.most
                    tracker.most = tracker.now
                    loss = chunked_cross_entropy(model.language, supervised,
                                                 ids.flatten() % language.vocab_size,
                                                 device_type=kind)
                    del hidden, supervised
                logits = tracker.most - tracker.now
                tracker.most = max(earlier, tracker.most)
                loss.backward()
                del loss
    return activations, max(logits, 0), tracker.most


def table(columns: dict[str, Memory]) -> str:
    """{heading: Memory} -> lines."""
    rows = [("", *columns)]
    for name in Memory._fields:
        rows.append((name, *(format_bytes(getattr(memory, name)) for memory in columns.values())))
    return "\n".join(f"{name:<14}" + "".join(f"{cell:>14}" for cell in cells)
                     for name, *cells in rows)


def planned(preset: str, stage: str, flags: list[str], device: torch.device):
    """-> predict's arguments from a preset and flags: config, settings, size, K; and why dtype."""
    settings = resolve(read_flags(__doc__, stage, ["--preset", preset, *flags]), stage, {})
    settings.dtype, why = choose_dtype(settings.dtype, device)
    try:
        config, vision = empty_model(settings).config, facts(settings.vision_tower, VISION)
    except FileNotFoundError as error:
        raise SystemExit(f"{error}: the shapes of a model that no preset names are read from its "
                         "config.json, so give its directory") from error
    side = vision.get("pixels", vision["image_size"])
    return (config, settings, (side, side), image_tokens(settings)), why


def main(arguments=None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in PRESETS:
        raise SystemExit("usage: python -m extras.memory PRESET, then flags as in training; "
                         f"PRESET is one of {', '.join(PRESETS)}")
    device, columns = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
    for stage, heading in (("pretrain", "stage one"), ("sft", "stage two")):
        plan, why = planned(arguments[0], stage, arguments[1:], device)
        columns[heading] = predict(*plan, device)
        settings = plan[1]
        print(f"{heading}: {settings.batch_size} rows of {settings.max_length} tokens, "
              f"{settings.dtype} ({why})")
    print(table(columns))
    print("peak: not all of it is there at once; Python and PyTorch come on top")


if __name__ == "__main__":
    main()
