"""Which dtype the matrix products compute in, and in which each weight is stored.

    --dtype, the hardware -> choose_dtype -> "bf16", "fp16" or "fp32"
    model, what is trained -> cast_weights: trained float32, frozen matrices in that dtype
    each forward pass -> autocast;   fp16's loss and gradients -> LossScaler

bf16 has float32's range with 8 bits of precision, fp16 11 bits and a range that ends at 65,504.
Both halve the memory of activations and at least double the speed, on hardware made for them.
Other hardware takes them too, and converts to float32 and back for every product: four times
*slower* than float32 on a processor with AVX-512 but without its bf16 instructions.

Paper: mixed precision training (Micikevicius et al. 2018).
"""

import time
from functools import cache

import torch
import torch.nn.functional as F

CLEARLY = 1.2  # so many times faster than float32: less is not worth the digits
NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROWTH_INTERVAL = 2000  # steps without overflow after which the loss scale is doubled


def choose_dtype(dtype: str, device: torch.device) -> tuple[str, str]:
    """dtype: "auto", "bf16", "fp16" or "fp32" -> what is used, and why, in a few words."""
    if dtype != "auto":
        return dtype, "as asked"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{name} multiplies it natively"
        major, minor = torch.cuda.get_device_capability(device)
        return "fp16", (f"{name} has compute capability {major}.{minor}, and bf16 needs 8.0; with "
                        "scaled gradients")
    if device.type == "mps":
        return "fp32", "Apple's GPUs compute 16 bits wrongly"
    times = bf16_speedup()
    if times > CLEARLY:
        return "bf16", f"its products are {times:.1f} times as fast as float32's here"
    return "fp32", f"bf16 products are {times:.1f} times as fast here"


def settle_dtype(settings, distributed) -> None:
    """--dtype auto -> settings.dtype. It may be measured: all ranks take rank 0's choice."""
    choice = choose_dtype(settings.dtype, distributed.device)
    settings.dtype, reason = distributed.gather([choice])[0]
    distributed.print(f"dtype     {settings.dtype}: {reason}")


@cache
@torch.no_grad()
def bf16_speedup() -> float:
    """How many times faster this processor multiplies bf16 than float32, measured in some
    milliseconds. That it has the instructions is not enough: with AMX they are several times
    faster, with AVX-512 alone they can be slower, and without any torch converts each number.
    """
    rows, width = 128, 1024
    inputs = [(torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype))
              for dtype in (torch.float32, torch.bfloat16)]
    seconds, threads = ([], []), torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several threads only measure their waiting
    try:
        for _ in range(4):  # in turn, so that both meet the same moments
            for taken, (x, weight) in zip(seconds, inputs):
                start = time.perf_counter()
                F.linear(x, weight)
                taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(seconds[0]) / min(seconds[1])


def autocast(dtype: str, device: torch.device):
    """The context in which a forward pass computes its matrix products in dtype.

    Norms, softmax, the loss and the trained weights stay float32: an update of 1/1000 of a weight
    would vanish in bf16's 8 bits.
    """
    return torch.autocast(device.type, NUMBERS[dtype], enabled=dtype != "fp32")


def cast_weights(model, dtype: str, keep: set[str]) -> None:
    """Give every weight the dtype in which it is stored for the whole run.

    What is trained: float32, the master copy that takes small steps. Frozen matrices: dtype, half
    the memory, and nothing to convert at every step; published weights are bf16 mostly, and lose
    nothing. Frozen vectors and position tables: float32; they are few, and so the streams that
    they are added to stay float32.

    keep: names of frozen weights that stay float32, because a checkpoint saves them: what an
    earlier stage has trained must not be rounded by passing through this one.
    """
    for name, parameter in model.named_parameters():
        matrix = name.endswith(".weight") and parameter.ndim > 1
        low = matrix and not parameter.requires_grad and name not in keep
        parameter.data = parameter.data.to(NUMBERS[dtype] if low else torch.float32)


def first_unfit(named, dtype: str, distributed) -> str | None:
    """The first weight that is not finite in dtype, with its value; None when all are. Every rank
    gets the same answer. named: (name, parameter), ..."""
    greatest, unfit = torch.finfo(NUMBERS[dtype]).max, []
    for name, parameter in named:
        tensor = distributed.local_tensor(parameter.detach())
        if not tensor.numel():
            continue
        low, high = (float(value) for value in tensor.aminmax())  # NaN, if one of them is
        value = low if -low > high else high
        if not abs(value) <= greatest:
            unfit.append(f"{name} holds {value:.3g}, and {dtype} ends at {greatest:,.6g}")
            break
    return next(iter(distributed.gather(unfit)), None)


class LossScaler:
    """fp16: multiply the loss before the backward pass, divide the gradients after it.

    Gradients below 6e-8 are zero in fp16. The scale, a power of two, rounds nothing, and is found
    by trial: doubled after GROWTH_INTERVAL good steps, halved when a gradient, or a number of the
    forward pass, grew past 65,504; that step is skipped. The rule and the methods are those of
    torch.amp.GradScaler. That class decides by the gradients which its own process holds: under
    fsdp these are a share, and one rank would skip a step that another one takes. Here step() is
    given the decision, made from sums over all ranks. The state is in TrainerState, so a
    checkpoint has it.
    """

    def __init__(self, state, enabled: bool):
        """enabled: in fp16. Else the scale is 1 and no step is skipped."""
        self.state, self.enabled, self.finite = state, enabled, True

    @property
    def factor(self) -> float:
        return self.state.loss_scale if self.enabled else 1.0

    def scale(self, loss):
        return loss * self.factor

    def unscale_(self, parameters) -> None:
        if self.enabled:
            torch._foreach_div_([parameter.grad for parameter in parameters], self.factor)

    def can_lower(self) -> bool:
        """At the latest with a scale of 1, after 16 such steps in a row from where it starts, a
        loss that is not finite is no overflow."""
        return self.factor > 1

    def step(self, optimizer, finite: bool) -> None:
        """finite: whether loss and gradients are, on all ranks."""
        self.finite = finite
        if finite:
            optimizer.step()

    def update(self) -> dict:
        """After step(): choose the next scale -> this step's metrics, none but in fp16."""
        if not self.enabled:
            return {}
        state, scale = self.state, self.state.loss_scale
        state.growth_tracker += 1
        if not self.finite:
            state.loss_scale, state.growth_tracker = scale / 2, 0
            state.overflows += 1
        elif state.growth_tracker == GROWTH_INTERVAL:
            state.loss_scale, state.growth_tracker = scale * 2, 0
        return {"loss_scale": scale, "overflows": state.overflows}


UNSCALED = LossScaler(None, enabled=False)
