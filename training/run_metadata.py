"""What a run computes and how it went, written into its directory.

    settings, data, code, machine -> describe -> run.json of each checkpoint
    describe + when each launch began and how it ended -> OUT/run.json
    TrainerState + metrics.jsonl + evaluations.jsonl -> summarise -> OUT/summary.json

A run that is killed and resumed has several launches. One without an end was killed.
"""

import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

from model.pretrained.files import write_json
from model.pretrained.hub import ROOT
from training.distributed import cores

# What a run writes beside its checkpoints; a new run in the same OUT moves them aside.
FILES = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "run.json",
         "summary.json", "tensorboard", "answers.jsonl", "held_out", "report.html", "scores.json")


def describe(settings, stage: str, distributed, data_facts: dict, changes: list = ()) -> dict:
    """All that decides what a run computes; each checkpoint holds it.

    changes: of the settings, since the run began."""
    gpu = distributed.device.type == "cuda"
    return {"stage": stage, "settings": vars(settings), "changes": list(changes),
            "processes": distributed.world_size, "data": data_facts, "commit": commit(),
            "versions": {"python": platform.python_version(), **{
                name: version(name) for name in ("torch", "safetensors", "tokenizers")}},
            "machine": {"cpu": processor_name(), "cores": cores(), "os": platform.platform(),
                        "gpu": torch.cuda.get_device_name(distributed.device) if gpu else None}}


def commit() -> str | None:
    """The version of this code, when it lies in a git repository."""
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(["git", "describe", "--always", "--dirty", "--abbrev=40"],
                                       cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()
    return None


def processor_name() -> str:
    # Linux, where platform.processor() is the word x86_64, or nothing.
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(line.split(": ")[1].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


@contextmanager
def record_launch(out, facts: dict, state, steps: int, distributed):
    """Write OUT/run.json when training starts, and again when it ends with how it ended, an error
    included. Rank 0 writes.

    state: the training loop's, which it updates. A step whose loss was not finite is recorded as
    "not_finite_step", since a resume looks for it.
    """
    path = Path(out) / "run.json"
    launches = read_object(path).get("launches", []) if state.step else []
    launch = {"started": clock_time(), "first_step": state.step + 1, "ended": None,
              "last_step": None, "outcome": None, "not_finite_step": None}

    def write() -> None:
        if distributed.main:
            # Renamed into its place: a kill while it is written leaves the file from before.
            write_json(path.with_suffix(".partial"), {**facts, "launches": [*launches, launch]})
            os.replace(path.with_suffix(".partial"), path)

    def end(outcome: str, not_finite_step: int | None = None) -> None:
        launch.update(ended=clock_time(), last_step=state.step, outcome=outcome,
                      not_finite_step=not_finite_step)
        write()

    write()
    try:
        yield
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        step = getattr(error.__cause__, "step", None)  # of errors.NotFinite; then on all ranks
        with suppress(OSError):  # on a full disk; the error itself matters more
            end(f"{type(error).__name__}: {error}".strip(), step)
        if step:
            distributed.barrier()  # torchrun ends rank 0 when one leaves: let it write
        raise
    end("finished" if state.step >= steps else f"stopped before step {steps}")


def clock_time() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def summarise(out, state, wall_seconds: float, distributed) -> dict | None:
    """The whole run in numbers, earlier launches included; None but on rank 0. All ranks call it.

    Tokens and seconds come from metrics.jsonl, where every step stands once, whichever launch made
    it. Memory (bytes) and wall time are of this launch alone.
    """
    memory, gpu_memory = peak_memory(distributed)
    if not distributed.main:
        return None
    metrics, evaluations = (read_lines(Path(out) / name) for name in FILES[:2])
    seconds = sum(line["seconds"] for line in metrics)
    losses = [line["loss"] for line in metrics if line["loss"] is not None]
    best = min((e for e in evaluations if e["eval_loss"] is not None),
               key=lambda e: e["eval_loss"], default={})
    summary = {
        "steps": state.step, "samples_trained": state.samples,
        "samples_skipped": state.skipped, "skipped_why": state.skip_reasons,
        "tokens": state.tokens,
        "tokens_supervised": sum(line["supervised_tokens"] for line in metrics),
        "tokens_padding": state.tokens - state.non_padding_tokens,
        "tokens_useful_share": round(state.non_padding_tokens / max(1, state.tokens), 4),
        "tokens_per_second": round(state.non_padding_tokens / seconds, 1) if seconds else None,
        "training_seconds": round(seconds, 3), "wall_seconds": round(wall_seconds, 3),
        "peak_memory": memory, "peak_gpu_memory": gpu_memory,
        "overflow_steps": state.overflows,  # skipped, with fp16
        "last_loss": losses[-1] if losses else None,
        "best_loss": min(losses, default=None),
        "best_eval_loss": best.get("eval_loss"), "best_eval_step": best.get("step"),
        "last_evaluation": evaluations[-1] if evaluations else None,
    }
    write_json(Path(out) / "summary.json", summary)
    return summary


def peak_memory(distributed) -> tuple[int | None, int | None]:
    """Most bytes that any one rank's process ever held, and any one GPU (None without GPUs).

    The processes that prepare data are not in it.
    """
    own = gpu = 0
    with suppress(ImportError):  # on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, by getrusage(2)
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if distributed.device.type == "cuda":
        gpu = torch.cuda.max_memory_allocated(distributed.device)
    peaks = distributed.gather([(own, gpu)])
    return tuple(max(column) or None for column in zip(*peaks))


def read_object(path: Path) -> dict:
    """The object of a JSON file; {} where there is none."""
    return next(iter(parse_objects([text_of(path)])), {})


def read_lines(path: Path) -> list[dict]:
    """The object of each line, without lines that a kill cut in half; [] where there is no file."""
    return parse_objects(text_of(path).splitlines())


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def parse_objects(texts: list[str]) -> list[dict]:
    objects = []
    for text in texts:
        with suppress(ValueError):
            objects.append(json.loads(text))
    return [each for each in objects if isinstance(each, dict)]
