"""Which dtype the matrix products compute in, and in which each weight is stored.

    --dtype, the hardware -> choose_dtype -> "bf16", "fp16" or "fp32"
    model, what is trained -> cast_weights: trained float32, frozen matrices in that dtype
    each forward pass -> autocast;   fp16's loss scale after each step -> update_loss_scale

bf16 has float32's range with 8 bits of precision, fp16 11 bits and a range that ends at 65,504.
Both halve the memory of activations and at least double the speed, on hardware made for them.
Other hardware converts to float32 and back for every product, four times *slower* than float32.

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
        return "fp16", f"{name} has compute capability {major}.{minor}, and bf16 needs 8.0"
    if device.type == "mps":
        return "fp32", "Apple's GPUs compute 16 bits wrongly"
    times = bf16_speedup()
    if times > CLEARLY:
        return "bf16", f"its products are {times:.1f} times as fast as float32's here"
    return "fp32", f"bf16 products are {times:.1f} times as fast here"


def resolve_dtype(settings, distributed) -> None:
    """--dtype auto -> settings.dtype. It may be measured: all ranks take rank 0's choice."""
    choice = choose_dtype(settings.dtype, distributed.device)
    settings.dtype, reason = distributed.gather([choice])[0]
    if distributed.main:
        print(f"dtype     {settings.dtype}: {reason}", flush=True)


@cache
@torch.no_grad()
def bf16_speedup() -> float:
    """How many times faster this processor multiplies bf16 than float32, measured in some
    milliseconds: its instructions do not tell, with AVX-512 alone they can be slower."""
    inputs = [(torch.ones(128, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype))
              for dtype in (torch.float32, torch.bfloat16)]
    seconds, threads = ([], []), torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several threads only measure their waiting
    for _ in range(10):  # in turn, so that both meet the same moments
        for measured, (x, weight) in zip(seconds, inputs):
            start = time.perf_counter()
            F.linear(x, weight)
            measured.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return min(seconds[0]) / min(seconds[1])


def autocast(dtype: str, device: torch.device):
    """The context in which a forward pass computes its matrix products in dtype. Norms, softmax,
    the loss and the trained weights stay float32: an update of 1/1000 of a weight would vanish in
    bf16's 8 bits."""
    return torch.autocast(device.type, NUMBERS[dtype], enabled=dtype != "fp32")


def cast_weights(model, dtype: str, keep: set[str]) -> None:
    """Give every weight the dtype in which it is stored for the whole run.

    What is trained: float32, the master copy that takes small steps. Frozen matrices: dtype, half
    the memory, and nothing to convert at every step. Frozen vectors and position tables: float32;
    they are few, and so the streams that they are added to stay float32. keep: names of frozen
    weights that stay float32: what an earlier stage has trained must not be rounded by this one.
    """
    for name, parameter in model.named_parameters():
        matrix = name.endswith(".weight") and parameter.ndim > 1
        low = matrix and not parameter.requires_grad and name not in keep
        parameter.data = parameter.data.to(NUMBERS[dtype] if low else torch.float32)


def first_nonfinite_weight(named, dtype: str, distributed) -> str | None:
    """The first weight that is not finite in dtype, with its value; None when all are. Every rank
    gets the same answer. named: (name, parameter), ..."""
    greatest, found = torch.finfo(NUMBERS[dtype]).max, []
    for name, parameter in named:
        tensor = parameter.detach()
        if hasattr(tensor, "to_local"):  # under fsdp: this rank's share, which may be empty
            tensor = tensor.to_local()
        low, high = (float(value) for value in tensor.aminmax()) if tensor.numel() else (0.0, 0.0)
        value = low if -low > high else high  # NaN, if one of them is
        if not abs(value) <= greatest:
            found.append(f"{name} holds {value:.3g}, and {dtype} ends at {greatest:,.6g}")
            break
    return next(iter(distributed.gather(found)), None)


def update_loss_scale(state, finite: bool) -> dict:
    """After each step in fp16: choose state.loss_scale for the next -> this step's metrics.

    Gradients below 6e-8 are zero in fp16. So the loss is multiplied before the backward pass, and
    the gradients are divided after it. The scale, a power of two, rounds nothing, and is found by
    trial: doubled after GROWTH_INTERVAL good steps, halved when a number grew past 65,504; that
    step is skipped. The rule is torch.amp.GradScaler's. That class decides by the gradients of its
    own process, under fsdp a share; `finite` is made from sums over all ranks.
    """
    scale = state.loss_scale
    state.growth_tracker += 1
    if not finite:
        state.loss_scale, state.growth_tracker = scale / 2, 0
        state.overflows += 1
    elif state.growth_tracker == GROWTH_INTERVAL:
        state.loss_scale, state.growth_tracker = scale * 2, 0
    return {"loss_scale": scale, "overflows": state.overflows}
