"""What tests/test_parallel.py runs beside itself, all in one go: starting processes costs seconds.

    parallel_worker.py DIRECTORY FLAGS...

Forks 2 and 4 ranks, as torchrun would start them, which share the rows of batches of 4. For each
of RUNS, DIRECTORY gets NUMBER_WAY_CASE.pt, what `two_steps` returns. The test calls the same
function in one process to compare. A process joins its group once and no more: through the same
store it could find an address of the time before, and wait there for ever.
"""

import itertools
import multiprocessing
import os
import socket
import sys

import torch
from torch.distributed.tensor import DTensor

import training.loop
from dataset.batching import Batches
from extras.fast import prepare_for_training
from extras.fast.chunked_cross_entropy import CHUNK
from extras.fsdp import (
    clip_gradients,
    make_mesh,
    spread,
    sum_gradients,
    to_compute,
    whole,
)
from tests.ranks_worker import Quiet
from training.distributed import start_ranks
from training.loop import Progress, backward
from training.optim import choose_trained, make_optimizer
from training.precision import store_weights
from training.presets import read_flags, resolve
from training.setup import assemble, open_training_data

CASES = {
    "projector": [],
    "everything": ["--train_language", "all", "--train_vision"],
    "lora": ["--lora", "--lora_rank", "2", "--train_language", "none"],  # 2 rows, on 4 ranks
    "half": ["--lora", "--train_language", "none", "--train_vision", "--dtype", "bf16",
             "--checkpointing"],
    "scaled": ["--lora", "--train_language", "none", "--dtype", "fp16"],  # as on a V100
}
BATCH = 4
# How many ranks, which way, what is trained.
RUNS = [(2, way, case) for way in ("ddp", "fsdp") for case in CASES]
RUNS += [(4, way, case) for way in ("ddp", "fsdp") for case in ("everything", "lora")]
SCALE = 1024.0  # of fp16's loss: far from what overflows here
LONGEST = 0.05  # gradients of the first step are cut down to this


def prepare(ranks, flags):
    settings = resolve(read_flags("", "pretrain", flags), "pretrain", {})
    parts = assemble(settings, None)
    choose_trained(parts.model, settings, None)
    store_weights(parts.model, settings.dtype, set())
    parts.model.set_checkpointing(settings.checkpointing)
    prepare_for_training(parts.model)
    data, _ = open_training_data(settings, "captions")
    batches = Batches(data, parts.template, parts.processor, settings.batch_size,
                      settings.max_length, settings.seed, ranks.rank, ranks.world_size)
    spread(parts.model, make_mesh(settings, ranks), settings, ranks)
    return settings, parts.model, batches


def first_gradients(ranks, flags) -> dict:
    """Of the first step: summed over micro-batches and ranks, then cut to LONGEST."""
    settings, model, batches = prepare(ranks, flags)
    micro = [batch for batch, _ in itertools.islice(batches.epoch(0), settings.accumulate)]
    micro = [batch for batch in (to_compute(batch, settings) for batch in micro) if batch]
    supervised, = ranks.sum(sum(batch.supervised for batch in micro))
    scale = SCALE if settings.dtype == "fp16" else 1.0
    for batch in micro:
        backward(model, batch, supervised, settings, ranks, scale)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sum_gradients([*named.values()], ranks)
    torch._foreach_div_([p.grad for p in named.values()], scale)
    summed = whole({name: p.grad.clone() for name, p in named.items()}, ranks)
    norm = clip_gradients([*named.values()], LONGEST, ranks)
    return {"gradients": summed, "norm": norm,
            "clipped": whole({name: p.grad for name, p in named.items()}, ranks),
            "frozen": [name for name, p in model.named_parameters()
                       if not p.requires_grad and p.grad is not None],
            "rows": ranks.gather([len(batch.where) for batch in micro]),
            "pictures": ranks.gather([0 if batch.order is None else len(batch.order)
                                      for batch in micro])}


def two_steps(ranks, flags) -> dict:
    """-> the first gradients; the weights and the optimizer after two steps from the same start."""
    told = first_gradients(ranks, flags)
    settings, model, batches = prepare(ranks, [*flags, "--steps", "2"])
    optimizer = make_optimizer(model, settings)
    training.loop.train(model, batches, optimizer, settings, ranks, Quiet(), lambda *_: None,
                        Progress(scale=SCALE))
    own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel()
              for p in model.parameters())
    return {**told, "weights": whole(dict(model.named_parameters()), ranks),
            "optimizer": whole(optimizer.state_dict(), ranks), "numbers": ranks.gather([own])}


def one_rank(rank: int, number: int, port: int, directory: str, flags: list) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number),
                      LOCAL_WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    torch.set_num_threads(1)
    CHUNK["cpu"] = 2**12  # a few rows at a time; one process alone takes all
    with start_ranks() as ranks:
        for _, way, case in [run for run in RUNS if run[0] == number]:
            told = two_steps(ranks, [*flags, "--batch_size", str(BATCH // number), *CASES[case],
                                     "--parallel", way])
            if ranks.main:
                torch.save(told, f"{directory}/{number}_{way}_{case}.pt")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main():
    directory, *flags = sys.argv[1:]
    for number in sorted({number for number, _, _ in RUNS}):
        port, context = free_port(), multiprocessing.get_context("fork")
        processes = [context.Process(target=one_rank, args=(rank, number, port, directory, flags))
                     for rank in range(number)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{number} processes: {[p.exitcode for p in processes]}")


if __name__ == "__main__":
    main()
