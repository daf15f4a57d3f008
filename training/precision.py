"""Which numbers a run uses: what the matrix products compute in, and what each weight is kept in.

    --dtype, the hardware -> choose_dtype -> "bf16", "fp16" or "fp32"
    model, what is trained -> store_weights: trained float32, frozen matrices in that dtype
    each forward pass -> autocast;   fp16's gradients -> next_scale

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
CALM = 2000  # steps without overflow after which the scale of fp16's loss is doubled


def choose_dtype(wanted: str, device: torch.device) -> tuple[str, str]:
    """wanted: "auto", "bf16", "fp16" or "fp32" -> what is used, and why, in a few words."""
    if wanted != "auto":
        return wanted, "as asked"
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


def store_weights(model, dtype: str, keep: set[str]) -> None:
    """Give every weight the numbers that it is kept in for the whole run.

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


def next_scale(scale: float, calm: int, overflow: bool) -> tuple[float, int]:
    """After a step in fp16 -> the scale of the next one, and the steps since the last change.

    Gradients below 6e-8 are zero in fp16, so the loss is multiplied before the backward pass and
    the gradients divided after it (powers of two, which rounds nothing). How far is found by
    trial: doubled after CALM good steps, halved when a gradient grew past 65,504, or a number of
    the forward pass did, and so every gradient. That step is skipped. The rule is
    torch.amp.GradScaler's; here its state is two numbers of Progress, and every rank comes
    to the same answer, because each looks at the gradients summed over all.
    """
    if overflow:
        return scale / 2, 0
    return (scale * 2, 0) if calm + 1 == CALM else (scale, calm + 1)
