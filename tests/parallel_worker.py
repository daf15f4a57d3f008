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

from dataset.batching import Batches
from extras.fast import prepare_for_training
from extras.fast.chunked_cross_entropy import CHUNK
from extras.fsdp import FSDP
from train_pretrain import backward, load_or_build, train
from training.data import open_training_data
from training.distributed import Distributed, start_distributed
from training.optim import choose_trainable, make_optimizer
from training.precision import cast_weights
from training.presets import read_flags, resolve
from training.steps import Steps, TrainerState

CASES = {
    "projector": [],
    "everything": ["--train_language", "all", "--train_vision"],
    "lora": ["--lora", "--lora_rank", "2", "--train_language", "none"],  # 2 rows, on 4 distributed
    "half": ["--lora", "--train_language", "none", "--train_vision", "--dtype", "bf16",
             "--gradient_checkpointing"],
    "scaled": ["--lora", "--train_language", "none", "--dtype", "fp16"],  # as on a V100
}
BATCH = 4
# How many distributed, which way, what is trained.
RUNS = [(2, way, case) for way in ("ddp", "fsdp") for case in CASES]
RUNS += [(4, way, case) for way in ("ddp", "fsdp") for case in ("everything", "lora")]
SCALE = 1024.0  # of fp16's loss: far from what overflows here
LONGEST = 0.05  # gradients of the first step are cut down to this


def prepare(distributed, flags):
    settings = resolve(read_flags("", "pretrain", flags), "pretrain", {})
    parts = load_or_build(settings, None)
    choose_trainable(parts.model, settings, None)
    cast_weights(parts.model, settings.dtype, set())
    parts.model.set_checkpointing(settings.gradient_checkpointing)
    prepare_for_training(parts.model)
    data, _ = open_training_data(settings, "pretrain")
    batches = Batches(data, parts.template, parts.processor, settings.batch_size,
                      settings.max_length, settings.seed, distributed.rank, distributed.world_size)
    distributed.place_model(parts.model, settings)
    return settings, parts.model, batches


def first_gradients(distributed, flags) -> dict:
    """Of the first step: summed over micro-batches and distributed, then cut to LONGEST."""
    settings, model, batches = prepare(distributed, flags)
    micro = [batch for batch,
             _ in itertools.islice(batches.epoch(0), settings.gradient_accumulation_steps)]
    micro = [batch for batch in map(distributed.drop_or_dummy_batch, micro) if batch]
    supervised, = distributed.sum(sum(batch.supervised for batch in micro))
    scale = SCALE if settings.dtype == "fp16" else 1.0
    for batch in micro:
        backward(model, batch, supervised, settings, distributed, scale)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    distributed.all_reduce_gradients([*named.values()])
    for parameter in named.values():
        parameter.grad.div_(scale)
    summed = distributed.full_tensors({name: p.grad.clone() for name, p in named.items()})
    norm = distributed.clip_gradients([*named.values()], LONGEST)
    return {"gradients": summed, "norm": norm,
            "clipped": distributed.full_tensors({name: p.grad for name, p in named.items()}),
            "frozen": [name for name, p in model.named_parameters()
                       if not p.requires_grad and p.grad is not None],
            "rows": distributed.gather([len(batch.where) for batch in micro]),
            "pictures": distributed.gather([0 if batch.order is None else len(batch.order)
                                      for batch in micro])}


def two_steps(distributed, flags) -> dict:
    """-> the first gradients; the weights and the optimizer after two steps from the same start."""
    told = first_gradients(distributed, flags)
    settings, model, batches = prepare(distributed, [*flags, "--steps", "2"])
    optimizer = make_optimizer(model, settings)
    steps = Steps(batches, settings, TrainerState(loss_scale=SCALE), distributed)
    train(model, steps, optimizer, settings, distributed, [])
    own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel()
              for p in model.parameters())
    weights, state = (distributed.full_tensors(content) for content in
                      (dict(model.named_parameters()), optimizer.state_dict()))
    return {**told, "weights": weights, "optimizer": state, "numbers": distributed.gather([own])}


def one_rank(rank: int, number: int, port: int, directory: str, flags: list) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number),
                      LOCAL_WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    torch.set_num_threads(1)
    CHUNK["cpu"] = 2**12  # a few rows at a time; one process alone takes all
    with start_distributed() as plain:
        for _, way, case in [run for run in RUNS if run[0] == number]:
            distributed = {"ddp": Distributed, "fsdp": FSDP}[way](rank, number, plain.device)
            told = two_steps(distributed, [*flags, "--batch_size", str(BATCH // number),
                                           *CASES[case], "--parallel", way])
            if distributed.main:
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
