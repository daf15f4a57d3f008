"""Several processes that train one model: who am I, and sums over all of us.

    torchrun's environment variables -> Ranks(rank, world_size, device) -> sums over all ranks

With `--parallel ddp` every rank holds the whole model, as under PyTorch's DistributedDataParallel,
but its wrapper is not used. That one averages gradients behind the scenes, in the backward pass of
every micro-batch, and hangs when one rank's batch has no image and so no gradient for the
projector. We need less: one sum of all gradients for each optimizer step, after its last
micro-batch. A rank that has nothing to say about a parameter brings zeros to that sum. What the
wrapper would gain is that it sends while it still computes; with LoRA or a projector there is
little to send. `--parallel fsdp`, where every rank holds a share, is in parallel.py.

A rank that fails tells why, and leaves at once without a word to the others: they may be waiting
for it in the middle of a sum, and would keep it waiting too. torchrun sees it leave, ends them (30
seconds for those that do not react) and, with --max_restarts, starts all anew.
"""

import os
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from training.device import prepare_device

# Others wait so long for a rank that lives but does not come: it may be rank 0, which is writing
# a large checkpoint. A rank that has died is noticed within seconds all the same, by torchrun.
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    rank: int  # 0..world_size-1; rank 0 writes the files and speaks
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, *numbers) -> list[float]:
        """Add each number up over all ranks, in float64: token counts stay exact."""
        # Apple's GPUs have no float64, and without a GPU device the sum is done on the CPU.
        device = self.device if self.device.type == "cuda" else "cpu"
        total = torch.tensor([float(number) for number in numbers],
                             dtype=torch.float64, device=device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, items: list) -> list:
        """The lists of all ranks, joined. Costs next to nothing when all are empty."""
        if self.world_size == 1 or self.sum(len(items)) == [0.0]:
            return items
        lists = [None] * self.world_size
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def sum_gradients(self, parameters) -> None:
        """Add every parameter's gradient up over all ranks; afterwards all ranks hold the same.

        One flat float32 buffer: a single message instead of hundreds, and no rounding in bf16.
        """
        for parameter in parameters:
            if parameter.grad is None:  # no image in this rank's batches, say
                parameter.grad = torch.zeros_like(parameter)
        if self.world_size == 1:
            return
        flat = torch.cat([parameter.grad.float().flatten() for parameter in parameters])
        dist.all_reduce(flat)
        parts = flat.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts):
            parameter.grad.copy_(part.view_as(parameter))

    def copy_from_main(self, parameters) -> None:
        """Give every rank the weights of rank 0, so that all start from the same point."""
        if self.world_size > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, src=0)

    def wait(self) -> None:
        """Return when every rank has come this far."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def start_ranks():
    """Read torchrun's environment, connect to the other processes; disconnect at the end.

    Without torchrun there is one process and nothing to connect to. A bare `torchrun script.py`
    starts one process too, and then the process group is made all the same.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = own_gpu(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count())
    prepare_device(device)
    if not dist.is_torchelastic_launched():
        yield Ranks(rank, world_size, device)
        return
    if device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        # torchrun sets this so that many processes do not fight for the cores. One process alone
        # would train on one core at half speed or less: give each its fair share instead.
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE,
                            store=store_of_this_try(), rank=rank, world_size=world_size)
    try:
        yield Ranks(rank, world_size, device)
    except BaseException as error:
        if world_size > 1 and not (isinstance(error, SystemExit) and error.code in (None, 0)):
            leave(error, rank)
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def own_gpu(local_rank: int, gpus: int) -> torch.device:
    """Each process of a machine has a GPU to itself: nccl refuses two on one."""
    if local_rank >= gpus:
        raise SystemExit(
            f"torchrun started {os.environ.get('LOCAL_WORLD_SIZE')} processes on this machine, and "
            f"PyTorch sees {gpus} GPU{'s' if gpus > 1 else ''} for them, one each: give "
            f"--nproc_per_node {gpus}; or set CUDA_VISIBLE_DEVICES= (empty), to train on the "
            "processor")
    return torch.device("cuda", local_rank)


def store_of_this_try() -> dist.Store | None:
    """Where the ranks find each other's addresses; None: where torch looks for it by itself.

    With --max_restarts, torchrun keeps one store for all its tries. A rank that is early would
    read the address that a dead one has left there, and wait for it (pytorch issue 135712). So
    every try gets names of its own. Over several machines their numbers of tries are not the same;
    there torchrun must be told to make a new store each time.
    """
    environment = os.environ
    if (environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            or environment.get("TORCHELASTIC_MAX_RESTARTS") == "0"):
        return None
    if environment["WORLD_SIZE"] != environment["LOCAL_WORLD_SIZE"]:
        raise SystemExit("--max_restarts on several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_"
                         "STORE=1 in the environment of torchrun, on each of them: else a restart "
                         "may wait for ranks of the try before")
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]),
                          is_master=False, timeout=PATIENCE)
    return dist.PrefixStore(f"try_{environment['TORCHELASTIC_RESTART_COUNT']}", store)


def leave(error: BaseException, rank: int) -> None:
    """Say why this rank fails, and end its process on the spot.

    Said while the others are still waiting, so it is the first error on the screen; those that
    then lose the connection come after it. They stay a little longer before they leave their error
    for torchrun, which takes the earliest one for the cause: a rank that the system has killed
    leaves none, and counts from when torchrun finds it gone.
    """
    plain = isinstance(error, SystemExit)  # its text is written for people
    told = str(error.code) if plain else "".join(traceback.format_exception(error))
    print(f"rank {rank} failed: {told}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    lost = "distributed" in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts
    if lost and not plain:  # raised by a collective: most likely the echo of another rank's error
        time.sleep(3)
    get_error_handler().record_exception(error)
    # A usual exit would take leave of the process group, which under nccl can wait for the others.
    os._exit(1)


def cores() -> int:
    """The cores that this process may use; a container often grants fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
