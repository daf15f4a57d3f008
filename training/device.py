"""Where a model computes: which device, what has to be set there first, and how it runs out.

    --device -> choose_device -> prepare_device -> the model is moved there and used
"""

import os
from importlib.util import find_spec

import torch

HAS_EXTRAS = find_spec("extras") is not None  # without them the plain layers serve, slower
# Below this version Apple's attention kernels give wrong numbers for long prompts (pytorch issue
# 174861), so "auto" does not choose that GPU by itself.
MPS_FROM = (2, 11)
# Where a processor multiplies bf16, oneDNN compiles a kernel for each new shape. It keeps 1,024 of
# them, and PyTorch as many handles to them. Every batch has another length, so in training they
# would grow to gigabytes. 64 serve all layers of one batch.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


def choose_device(name: str = "auto") -> torch.device:
    """name: auto, cpu, cuda, cuda:1, mps. auto: the fastest that is there and computes right.
    SystemExit for one that is not there."""
    gpus = torch.cuda.device_count()
    there = {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}
    kind, _, index = name.partition(":")
    if name != "auto":
        if kind not in there or not (index or "0").isdecimal() or int(index or 0) >= there[kind]:
            have = ", ".join(kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
                             for kind, count in there.items() if count)
            raise SystemExit(f"--device {name}: this machine has {have}, as far as PyTorch "
                             f"{torch.__version__} sees; give one of them, or auto")
        return torch.device(name)
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if torch.cuda.is_available():
        return torch.device("cuda")
    mps = torch.backends.mps.is_available() and version >= MPS_FROM
    return torch.device("mps" if mps else "cpu")


def prepare_device(device: torch.device) -> None:
    """Call it once, before the first product on the device."""
    # Read when the first kernel is made; who has set one already knows why.
    for name, capacity in KERNEL_CACHES.items():
        os.environ.setdefault(name, capacity)
    # On Hopper and Blackwell torch 2.11 and later give attention to cuDNN, which plans anew, up to
    # a second, for each new shape; flash attention serves the same calls without.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cuda" and device.index is not None:
        # A CUDA graph is recorded on the current device, whatever device its tensors are on.
        torch.cuda.set_device(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU torch has a type for it; a CPU and Apple's GPUs say it in their text alone."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
