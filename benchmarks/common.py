"""What several benchmarks need: random weights, the most memory that was held, a process that
answers, the machine in words."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from extras.preset_list import ROOT
from training.run_metadata import processor_name


def random_weights(model):
    """Of a model on the meta device, in place: as large as weights are, those of norms about 1."""
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name and parameter.ndim == 1), 0.02)
    return model


def peak_bytes(reset: bool = False) -> int:
    """The most memory that this process held since the last reset."""
    if torch.cuda.is_available():
        most = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return most
    if reset:  # Linux: forget the peak of loading
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


class Process:
    """A Python program that answers each line of JSON on its stdin with one on its stdout."""

    def __init__(self, *arguments: str, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment})

    def ask(self, message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with {self.process.wait()}; its reason stands above")
        return json.loads(line)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def machine(threads: int, *packages: str) -> str:
    def found(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    gpu = f"{torch.cuda.get_device_name()}; " if torch.cuda.is_available() else ""
    return (f"{gpu}{processor_name()}, {torch.backends.cpu.get_cpu_capability()}, "
            f"{os.cpu_count()} cores, {threads} threads; {platform.system()}, Python "
            f"{platform.python_version()}, " + ", ".join(map(found, ("torch", *packages))))
