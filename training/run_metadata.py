"""What a run is and what came of it, for whoever finds its directory a year later.

    settings, data, code, machine -> describe -> run.json of each checkpoint
    describe + when each launch began and how it ended -> OUT/run.json
    Progress + metrics.jsonl + evaluations.jsonl -> summarise -> OUT/summary.json

A run that is killed and resumed has several launches. One without an end was killed: nobody was
left to write it down.
"""

import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import safetensors
import tokenizers
import torch

from model.pretrained.files import write_json
from model.pretrained.hub import ROOT
from training.distributed import cores

# What a run writes beside its checkpoints; a new run in the same OUT moves them aside.
FILES = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "run.json",
         "summary.json", "tensorboard", "answers.jsonl", "held_out", "report.html", "scores.json")


def describe(settings, stage: str, ranks, about_data: dict) -> dict:
    """All that decides what a run computes. Each checkpoint carries it along."""
    return {"stage": stage, "settings": vars(settings), "processes": ranks.world_size,
            "data": about_data, "commit": commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "safetensors": safetensors.__version__,
                         "tokenizers": tokenizers.__version__},
            "machine": machine(ranks.device)}


def commit() -> str | None:
    """The version of this code, when it lies in a git repository."""
    try:
        told = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT,
                              capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def machine(device: torch.device) -> dict:
    """Rank 0's machine. Memory in bytes, as built in: a container may grant less."""
    gpu = None
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        gpu = {"name": about.name, "memory": about.total_memory}
    return {"cpu": processor_name(), "cores": cores(), "memory": physical_memory(), "gpu": gpu,
            "os": platform.platform()}


def processor_name() -> str:
    try:  # Linux; its platform.processor() is the word x86_64, or nothing
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.split(":", 1)[1].strip() for line in file
                        if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


@contextmanager
def launch(out, facts: dict, progress, steps: int, enabled: bool):
    """Keep OUT/run.json while a run goes on: written at its start, and again at its end with how
    it ended, an error included. Only rank 0 is `enabled`.

    progress: of the training loop, which moves it on.
    """
    if not enabled:
        yield
        return
    path, launches = Path(out) / "run.json", []
    if progress.step and path.exists():
        launches = json.loads(path.read_text(encoding="utf-8")).get("launches", [])
    now = {"started": clock_time(), "first_step": progress.step + 1, "ended": None,
           "last_step": None, "outcome": None, "processes": facts["processes"],
           "commit": facts["commit"], "machine": facts["machine"]}

    def write() -> None:
        # Renamed into its place: a kill while it is written leaves the file from before.
        write_json(path.with_suffix(".partial"), {**facts, "launches": [*launches, now]})
        os.replace(path.with_suffix(".partial"), path)

    def end(outcome: str) -> None:
        now.update(ended=clock_time(), last_step=progress.step, outcome=outcome)
        write()

    write()
    try:
        yield
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        with suppress(OSError):  # on a full disk: what is to be told is the error itself
            end(f"{type(error).__name__}: {error}".strip())
        raise
    end("finished" if progress.step >= steps else f"stopped before step {steps}")


def clock_time() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def summarise(out, progress, wall_seconds: float, ranks) -> dict | None:
    """The whole run in figures, earlier launches included; None but on rank 0. All ranks call it.

    Tokens and seconds come from metrics.jsonl, where every step is written down once, whichever
    launch made it. Memory (bytes) and wall time are of this launch: nobody knows what a killed
    one had used.
    """
    memory, gpu_memory = peak_memory(ranks)
    if not ranks.main:
        return None
    metrics, evaluations = (read_lines(Path(out) / name) for name in FILES[:2])
    seconds = sum(line["seconds"] for line in metrics)
    best = min((e for e in evaluations if e["eval_loss"] is not None),
               key=lambda e: e["eval_loss"], default={})
    summary = {
        "steps": progress.step, "samples_trained": progress.rows,
        "samples_skipped": progress.bad, "skipped_why": progress.skipped,
        "tokens": progress.positions,
        "tokens_supervised": sum(line["supervised_tokens"] for line in metrics),
        "tokens_padding": progress.positions - progress.useful,
        "tokens_useful_share": round(progress.useful / max(1, progress.positions), 4),
        "tokens_per_second": round(progress.useful / seconds, 1) if seconds else None,
        "training_seconds": round(seconds, 3), "wall_seconds": round(wall_seconds, 3),
        "peak_memory": memory, "peak_gpu_memory": gpu_memory,
        "overflow_steps": progress.overflows,  # skipped, with fp16
        "last_loss": metrics[-1]["loss"] if metrics else None,
        "best_loss": min((line["loss"] for line in metrics), default=None),
        "best_eval_loss": best.get("eval_loss"), "best_eval_step": best.get("step"),
        "last_evaluation": evaluations[-1] if evaluations else None,
    }
    write_json(Path(out) / "summary.json", summary)
    return summary


def peak_memory(ranks) -> tuple[int | None, int | None]:
    """Most bytes that any one rank's process ever held, and any one GPU (None without GPUs).

    The processes that prepare data are not in it.
    """
    try:
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, by getrusage(2)
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:
        own = 0
    cuda = ranks.device.type == "cuda"
    gpu = torch.cuda.max_memory_allocated(ranks.device) if cuda else 0
    told = ranks.gather([(own, gpu)])
    return tuple(max(column) or None for column in zip(*told))


def read_lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
