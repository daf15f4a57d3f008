"""Two ways for several processes to train one model: each with all of it, or each with a share.

    ddp    every rank holds all weights     -> own rows -> gradients -> one sum over the ranks
    fsdp   every rank holds 1/N of each     -> own rows -> 1/N of the summed gradients
           weight, gradient, statistic         (N ranks; AdamW then changes that share alone)

Training a weight takes 16 bytes: itself, its gradient and Adam's two statistics, 4 bytes each.
Seven billion of them are 112 GB, more than any one card has; eight cards with 14 GB each hold
them easily. But a layer needs its whole matrix to compute with. So under fsdp (Zhao et al. 2023,
after ZeRO, Rajbhandari et al. 2020) the ranks lend each other their shares, a block at a time:

    forward    block 1: gather its weights from all ranks, compute, forget the others' shares
               block 2: ...
    backward   last block: gather again, compute, add the gradients up over the ranks, each rank
               keeps the sum of its own share (reduce-scatter), forget the others' shares ...

The price: for each micro-batch all weights go over the wires twice and the gradients once, where
ddp sends the gradients of what is trained once for each step, and for LoRA that is next to
nothing. So: ddp as long as the model fits on each card, fsdp when it does not.

Between steps a weight is a DTensor: it has the shape of the whole, and only its share in memory.
Whoever looks at one asks either for the share (`to_local`) or for the whole (`full_tensor`, for
which all ranks must ask at the same time).

**All ranks must go through the same blocks in the same order**, whatever their rows are, or one
waits for ever for shares that nobody sends. Rows differ: see `to_compute` and VLM.dummy_image_loss.
"""

import math
import os
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dataset.batching import UNSUPERVISED, Batch
from training.precision import NUMBERS

# ---------------------------------------------------------------- before the first step


def make_mesh(settings, ranks) -> DeviceMesh | None:
    """The ranks in a row, as fully_shard wants them; None where nothing is to be shared out."""
    if settings.parallel == "ddp" or ranks.world_size == 1:
        return None
    if ranks.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise SystemExit(f"--parallel fsdp without GPUs needs torch 2.7 or newer, this is "
                         f"{torch.__version__}: use --parallel ddp, or another torch")
    return init_device_mesh(ranks.device.type, (ranks.world_size,))


@contextmanager
def in_turn(ranks, wanted: bool):
    """With `wanted`, the ranks of a machine go through the block one after the other.

    Each reads the whole model and keeps its share: eight ranks at once would need the machine's
    memory eight times.
    """
    if not wanted or ranks.world_size == 1:
        yield
        return
    turns = max(ranks.gather([int(os.environ["LOCAL_WORLD_SIZE"])]))
    for turn in range(turns):
        if turn == int(os.environ["LOCAL_RANK"]):
            yield
        ranks.wait()


def spread(model, mesh: DeviceMesh | None, settings, ranks) -> float | None:
    """Bring the model to the ranks' devices: all of it, or with a mesh each rank's share of it.

    With a mesh every rank cuts its share out of what it has read itself; the sum of all weights
    is returned, so that check_same_start can tell whether they have read the same.

    Frozen weights are shared out like the others: they are most of what there is to save, and
    the frozen language model is needed whole only for the moment in which a gradient passes
    through it. They get no gradient, so none is sent.
    """
    if mesh is None:
        model.to(ranks.device)
        ranks.copy_from_main(model.parameters())
        return None
    total = sum(float(p.detach().sum(dtype=torch.float64)) for p in model.parameters())
    # The language model's blocks, most of all there is, are sent and multiplied in 16 bits. What a
    # rank keeps, and the sums of gradients, have 32. Inputs stay as they are: RoPE's angles would
    # not survive in bf16. torch 2.6 wants one kind of number in a unit, so frozen shares have 32
    # bits as well: a share is small.
    policy = MixedPrecisionPolicy(param_dtype=NUMBERS[settings.dtype], reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in model.language.layers:
        fully_shard(block.float(), mesh=mesh, mp_policy=policy)
    # The rest comes in 32 bits: LayerNorm wants weights like its input, and the stream that the
    # blocks add to begins at the embedding table.
    for block in model.vision.layers:
        fully_shard(block.float(), mesh=mesh)
    # All that is in no block is one unit, gathered when the step begins: embedding table, head,
    # projector, first and last layers of the towers.
    fully_shard(model.float(), mesh=mesh)
    model.force_vision_forward = True
    return total


def check_same_start(step: int, weights_sum: float | None, ranks) -> None:
    """Stop when the ranks do not begin at the same step with the same weights."""
    told = ranks.gather([f"step {step}" + (f", weights that add up to {weights_sum}"
                                           if weights_sum is not None else "")])
    if len(set(told)) > 1:
        lines = "\n".join(f"  rank {rank}: {line}" for rank, line in enumerate(told))
        raise SystemExit(f"the ranks do not start from the same point:\n{lines}\nEvery machine "
                         "must see the same --out, --model and weights: put them into a directory "
                         "that all machines share.")


# ---------------------------------------------------------------- in a step


def to_compute(batch: Batch, settings) -> Batch | None:
    """Every row of a batch may have been unusable. Then there is nothing to do: None.

    But under fsdp the others count on this rank's shares, so it computes one token that nobody
    asks for: the loss is zero, and the gradient too.
    """
    if batch.where:
        return batch
    if settings.parallel == "ddp":
        return None
    ids = torch.zeros(1, 1, dtype=torch.int64)
    return Batch(ids, torch.full_like(ids, UNSUPERVISED), None, [], [])


def shared_out(parameters: list) -> bool:
    return isinstance(parameters[0], DTensor)


def sum_gradients(parameters: list, ranks) -> None:
    """After the last micro-batch: make every gradient the sum over all ranks."""
    if not shared_out(parameters):
        ranks.sum_gradients(parameters)
        return
    for parameter in parameters:  # fully_shard has added up, and divided by the number of ranks
        parameter.grad.to_local().mul_(ranks.world_size)


def clip_gradients(parameters: list, longest: float, ranks) -> float:
    """Scale the gradient down to the length `longest` where it is longer; return its length.

    The length is that of all gradients of all parameters laid end to end. Under fsdp each rank
    knows its shares alone; squares add up.
    """
    if not shared_out(parameters):
        return float(torch.nn.utils.clip_grad_norm_(parameters, longest))
    shares = [parameter.grad.to_local() for parameter in parameters]
    square, = ranks.sum(float(torch.nn.utils.get_total_norm(shares)) ** 2)
    norm = math.sqrt(square)
    if norm > longest:
        for share in shares:
            share.mul_(longest / (norm + 1e-6))  # as torch's own clip_grad_norm_ does
    return norm


# ---------------------------------------------------------------- to a file and back


def whole(content, ranks):
    """A state dict, or any nest of dicts and lists, with every shared-out tensor put together.

    All ranks must call it. Rank 0 gets the result, on the CPU, and the others only lend their
    shares: they get None in the place of such a tensor. So a checkpoint does not know how many
    ranks wrote it, nor which way.
    """
    if isinstance(content, dict):
        return {name: whole(value, ranks) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(whole(value, ranks) for value in content)
    if not isinstance(content, DTensor):
        return content
    full = content.detach().full_tensor()  # one tensor at a time: never the whole on each device
    return full.cpu() if ranks.main else None


def load_optimizer(optimizer, state: dict) -> None:
    """Give the optimizer the state that whole() put together; of each tensor, this rank's share."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, held in state["state"].items():
        if isinstance(parameters[number], DTensor):
            for name, tensor in held.items():
                if tensor.ndim:  # the count of steps is one number, the same everywhere
                    held[name] = share_of(tensor, parameters[number])
    optimizer.load_state_dict(state)


def share_of(tensor: torch.Tensor, parameter: DTensor) -> DTensor:
    """This rank's share of a whole tensor, cut like the parameter: along the first dimension.

    Where there are more ranks than rows, the last ranks hold nothing.
    """
    mesh, share = parameter.device_mesh, torch.zeros_like(parameter)
    parts, mine = tensor.chunk(mesh.size()), mesh.get_local_rank()
    if mine < len(parts):
        share.to_local().copy_(parts[mine])
    return share
