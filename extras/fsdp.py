"""--parallel fsdp: every rank holds a share of the model (Zhao et al. 2023, after ZeRO, 2020).

    ddp    every rank holds all weights     -> own rows -> gradients -> one sum over the ranks
    fsdp   every rank holds 1/N of each     -> own rows -> 1/N of the summed gradients
           weight, gradient, statistic         (N ranks; AdamW then changes that share alone)

Training a weight takes 16 bytes: itself, its gradient and Adam's two statistics, 4 bytes each.
Seven billion of them are 112 GB, more than one card has; eight cards hold 14 GB each easily. But a
layer needs its whole matrix to compute with. So the ranks lend each other their shares, a block at
a time:

    forward    block 1: gather its weights from all ranks, compute, forget the others' shares
               block 2: ...
    backward   last block: gather again, compute, add the gradients up over the ranks, each rank
               keeps the sum of its own share (reduce-scatter), forget the others' shares ...

The price: for each micro-batch all weights go over the wires twice and the gradients once, where
ddp sends the gradients of what is trained once for each step. So: ddp as long as the model fits on
each card, fsdp when it does not.

Between steps a weight is a DTensor: it has the shape of the whole, and only its share in memory
(`to_local`); `full_tensor` makes the whole, when all ranks ask at the same time.

**All ranks must go through the same blocks in the same order**, whatever their rows are, or one
waits for ever for shares that nobody sends. Rows differ: see `drop_or_dummy_batch`.
"""

import math
import os
from contextlib import contextmanager
from functools import cached_property

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dataset.batching import UNSUPERVISED, Batch
from training.distributed import Distributed
from training.precision import NUMBERS


class FSDP(Distributed):
    def __post_init__(self):
        if self.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise SystemExit(f"--parallel fsdp without GPUs needs torch 2.7 or newer, this is "
                             f"{torch.__version__}: use --parallel ddp, or another torch")

    @cached_property
    def mesh(self):  # the ranks in a row
        return init_device_mesh(self.device.type, (self.world_size,))

    # ------------------------------------------------------------ the model

    @contextmanager
    def loading(self):
        """One rank of a machine after the other: each reads the whole model and keeps its share,
        and eight at once would need the machine's memory eight times."""
        self.mesh  # noqa: B018, made here by all ranks together, before the first turn
        turns = max(self.gather([int(os.environ["LOCAL_WORLD_SIZE"])]))
        for turn in range(turns):
            if turn == int(os.environ["LOCAL_RANK"]):
                yield
            self.barrier()

    def place_model(self, model, settings) -> None:
        """Keep this rank's share of every weight. Frozen ones, most of what there is to save, are
        sharded like the others; they get no gradient, so none is sent."""
        self.weights_sum = sum(float(p.detach().sum(dtype=torch.float64))
                               for p in model.parameters())
        # The language model's blocks, most of all there is, are sent and multiplied in 16 bits.
        # What a rank keeps, and the sums of gradients, have 32: torch 2.6 wants one dtype in a
        # unit, frozen or not. Inputs stay as they are: RoPE's angles would not survive in bf16.
        policy = MixedPrecisionPolicy(param_dtype=NUMBERS[settings.dtype],
                                      reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.language.layers:
            fully_shard(block.float(), mesh=self.mesh, mp_policy=policy)
        # The rest has 32 bits: LayerNorm wants weights like its input, and the residual stream
        # begins at the embedding table.
        for block in model.vision.layers:
            fully_shard(block.float(), mesh=self.mesh)
        # All that is in no block is one unit, gathered when the step begins.
        fully_shard(model.float(), mesh=self.mesh)
        model.force_vision_forward = True

    # ------------------------------------------------------------ in a step

    def drop_or_dummy_batch(self, batch: Batch) -> Batch:
        """The others count on this rank's shares. So without a usable row it computes one token
        without a label: the loss is zero, and the gradient too."""
        if batch.where:
            return batch
        ids = torch.zeros(1, 1, dtype=torch.int64)
        return Batch(ids, torch.full_like(ids, UNSUPERVISED), None, [], [])

    def all_reduce_gradients(self, parameters: list) -> None:
        """fully_shard has summed them up, and divided by the number of ranks."""
        for parameter in parameters:
            parameter.grad.to_local().mul_(self.world_size)

    def clip_gradients(self, parameters: list, max_norm: float) -> float:
        """Each rank knows its shares alone; squares add up."""
        shares = [parameter.grad.to_local() for parameter in parameters]
        square, = self.sum(float(torch.nn.utils.get_total_norm(shares)) ** 2)
        norm = math.sqrt(square)
        if norm > max_norm:
            for share in shares:
                share.mul_(max_norm / (norm + 1e-6))  # as torch's own clip_grad_norm_ does
        return norm

    # ------------------------------------------------------------ to a file and back

    def full_tensors(self, content):
        """With every sharded tensor put together, so that a checkpoint does not know how many
        ranks wrote it. All ranks must call it; rank 0 gets the tensors, on the CPU, the others
        None in their place."""
        if isinstance(content, dict):
            return {name: self.full_tensors(value) for name, value in content.items()}
        if isinstance(content, (list, tuple)):
            return type(content)(self.full_tensors(value) for value in content)
        if not isinstance(content, DTensor):
            return content
        full = content.detach().full_tensor()  # one at a time: never the whole on each device
        return full.cpu() if self.main else None

    def load_optimizer(self, optimizer, state: dict) -> None:
        """Of each tensor this rank's share, cut along the first dimension as its parameter is.
        Where there are more ranks than rows, the last ranks hold nothing."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, tensors in state["state"].items():
            for name, tensor in tensors.items():
                if tensor.ndim:  # the count of steps is one number, the same everywhere
                    shares = tensor.chunk(self.world_size)
                    tensors[name] = torch.zeros_like(parameters[index])
                    if self.rank < len(shares):
                        tensors[name].to_local().copy_(shares[self.rank])
        optimizer.load_state_dict(state)
