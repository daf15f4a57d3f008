"""Several processes that train one model: who am I, sums over all ranks, and who holds what.

    torchrun's environment variables -> Distributed(rank, world_size, device)

`Distributed` is plain data parallelism (--parallel ddp): every rank holds the whole model. Torch's
DistributedDataParallel averages gradients in the backward pass of every micro-batch, and hangs
when one rank's batch has no image and so no gradient for the projector. One sum of all gradients
after a step's last micro-batch is enough here: a missing one counts as zeros, and with LoRA or a
projector there is little to send. The subclass FSDP (--parallel fsdp, extras/fsdp.py) has the same
methods; there each rank holds a share of every weight.

A rank that fails prints the reason and exits at once: the others may be waiting for it in the
middle of a sum. torchrun notices, ends them (30 seconds for those that do not react) and, with
--max_restarts, starts all of them anew.
"""

import os
import sys
import time
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from training.device import prepare_device

TIMEOUT = timedelta(minutes=30)  # rank 0 may be writing a large checkpoint: the others wait


@dataclass
class Distributed:
    rank: int  # 0..world_size-1; rank 0 writes the files and prints
    world_size: int
    device: torch.device
    weights_sum: float = 0.0  # under fsdp, of the whole model as this rank has read it

    @property
    def main(self) -> bool:
        return self.rank == 0

    # ------------------------------------------------------------ collectives

    def sum(self, *numbers) -> list[float]:
        """Add each number up over all ranks, in float64: token counts stay exact."""
        total = torch.tensor([float(number) for number in numbers], dtype=torch.float64,
                             device=self.device)
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

    def barrier(self) -> None:
        """Return when every rank has come this far."""
        if self.world_size > 1:
            dist.barrier()

    # ------------------------------------------------------------ the model

    def loading(self):
        """The context in which a rank reads the whole model; here all ranks do so at once."""
        return nullcontext()

    def place_model(self, model, settings) -> None:
        """Bring the model to this rank's device; every rank starts with the weights of rank 0."""
        model.to(self.device)
        if self.world_size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)

    def check_same_start(self, step: int) -> None:
        """SystemExit when the ranks do not begin at the same step and with the same weights."""
        starts = self.gather([f"step {step}, sum of weights {self.weights_sum}"])
        if len(set(starts)) > 1:
            raise SystemExit(f"the ranks do not start from the same point, but from {starts}. "
                             "Every machine must see the same --out, --model and weights: put them "
                             "into a directory that all machines share.")

    # ------------------------------------------------------------ in a step

    def drop_or_dummy_batch(self, batch):
        """The batch, or None where all of its rows were unusable: there is nothing to compute."""
        return batch if batch.where else None

    def all_reduce_gradients(self, parameters: list) -> None:
        """Sum every parameter's gradient over all ranks; afterwards all ranks hold the same. One
        flat float32 buffer: a single message instead of hundreds, and no rounding in bf16."""
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

    def clip_gradients(self, parameters: list, max_norm: float) -> float:
        """Scale the gradient, all parameters' laid end to end, down to the length max_norm where it
        is longer; return its length."""
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))

    # ------------------------------------------------------------ to a file and back

    def full_tensors(self, content):
        """A state dict, or any nest of dicts and lists, as a checkpoint stores it."""
        return content

    def load_optimizer(self, optimizer, state: dict) -> None:
        """Give the optimizer the state that a checkpoint stores."""
        optimizer.load_state_dict(state)


@contextmanager
def start_distributed(strategy: type[Distributed] = Distributed):
    """-> Distributed, connected to the other processes of torchrun; disconnected at the end.

    strategy: a subclass, for more than one process. Without torchrun there is one, and nothing to
    connect to.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = gpu_of_rank(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count())
    prepare_device(device)
    distributed = (strategy if world_size > 1 else Distributed)(rank, world_size, device)
    if not dist.is_torchelastic_launched():
        yield distributed
        return
    if device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        # torchrun sets this so that many processes do not fight for the cores. A fair share of
        # them does not, and is faster.
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT,
                            store=store_of_this_try(), rank=rank, world_size=world_size)
    try:
        yield distributed
    except BaseException as error:
        if world_size > 1 and not (isinstance(error, SystemExit) and error.code in (None, 0)):
            abort(error, rank)
        raise
    finally:
        dist.destroy_process_group()


def gpu_of_rank(local_rank: int, gpus: int) -> torch.device:
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
    every try gets names of its own, which over several machines are not numbered alike.
    """
    env = os.environ
    if (env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            or env.get("TORCHELASTIC_MAX_RESTARTS") == "0"):
        return None
    if env["WORLD_SIZE"] != env["LOCAL_WORLD_SIZE"]:
        raise SystemExit("--max_restarts on several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_"
                         "STORE=1 in the environment of torchrun, on each of them: else a restart "
                         "may wait for ranks of the try before")
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False,
                          timeout=TIMEOUT)
    return dist.PrefixStore(f"try_{env['TORCHELASTIC_RESTART_COUNT']}", store)


def abort(error: BaseException, rank: int) -> None:
    """Print why this rank fails, and end its process on the spot.

    The others are still waiting then, so this is the first error on the screen. Those that lose
    the connection wait a little before they record their own error for torchrun, which takes the
    earliest one for the cause.
    """
    explained = isinstance(error, SystemExit)  # its text is written for people
    message = str(error.code) if explained else "".join(traceback.format_exception(error))
    print(f"rank {rank} failed: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if "distributed" in raised_in.parts and not explained:  # the echo of another rank's error
        time.sleep(3)
    get_error_handler().record_exception(error)
    # A usual exit destroys the process group, which under nccl can wait for the others.
    os._exit(1)


def cores() -> int:
    """The cores that this process may use; a container often grants fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1
