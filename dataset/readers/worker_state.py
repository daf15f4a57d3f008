"""The processes that prepare data: what they survive, and which sample each is at when it dies.

    a worker -> with at("data.jsonl:12") -> memory that it shares with the training process
    the worker dies -> DataLoader raises -> explain -> "process 4711 was at data.jsonl:12"

A worker that the system kills (no memory left) or that crashes inside an image library can report
nothing. What it wrote down beforehand is still there. An unexpected error in a sample gets the
sample's name in the same way.
"""

import os
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from dataset.readers.bad_sample import BadSample

WIDTH = 512  # bytes of a note; longer names are cut


class WorkerState:
    """One note for each of a loader's workers."""

    def __init__(self, workers: int):
        # Shared however workers are started: a fork inherits it, a spawned process is handed it.
        self.notes = torch.zeros(max(workers, 1), WIDTH, dtype=torch.uint8).share_memory_()

    @contextmanager
    def at(self, where: str):
        """What happens inside, happens at this sample."""
        worker = get_worker_info()
        if worker is not None:
            text = f"{os.getpid()} {where}".encode(errors="replace")[:WIDTH].ljust(WIDTH, b"\0")
            self.notes[worker.id].numpy()[:] = np.frombuffer(text, np.uint8)
        try:
            yield
        except BadSample:
            raise
        except Exception as error:  # a fault of the program
            raise RuntimeError(f"{type(error).__name__} at {where}: {error}") from error

    def read(self) -> dict[int, str]:
        """{process id: the sample it is at}"""
        texts = [bytes(note.numpy()).rstrip(b"\0").decode(errors="replace") for note in self.notes]
        return {int(pid): where for pid, _, where in (text.partition(" ") for text in texts) if pid}


def prepare_ahead(dataset, indices: Iterable, workers: int) -> Iterator:
    """-> dataset[index] for each index, several ahead of time where there are workers.

    A worker that dies is reported by the DataLoader's RuntimeError, see `explain`.
    """
    batches = iter(DataLoader(
        dataset, batch_size=None, sampler=indices, num_workers=workers,
        pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_stop_signals,
        # A loader draws from torch's global generator unless it has its own, and dropout would
        # then differ between a resumed run and an uninterrupted one.
        generator=torch.Generator()))
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (EOFError, ConnectionError):
            # A worker died while it sent batches. A loader leaves no batch out: at the next call
            # it waits for the first of them, and then reports which worker died.
            continue
        yield batch


def ignore_stop_signals(_worker: int) -> None:
    """Whatever stops a run (Ctrl-C, torchrun, Slurm, systemd) signals its workers too, but training
    still needs them to finish its step, and ends them itself. The alarm is for the case that it
    no longer can."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def explain(error: Exception, states: list[WorkerState]) -> str | None:
    """What a DataLoader's error means, when it is that a worker died; else None.

    PyTorch has no type for this error, only its text. It may come at any line of the training,
    since a signal brings it.
    """
    died = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", str(error))
    if not died:
        return None
    at = {pid: where for state in states for pid, where in state.read().items()}
    lines = [f"process {pid}, which prepares data, {died[2].strip().rstrip('.')}; it was at "
             f"{at.get(int(pid), 'no sample yet')}." for pid in died[1].split(", ")]
    return " ".join([*lines, "If memory ran out (the system's log names killed processes), fewer "
                     "--num_workers or a smaller --batch_size help; otherwise look at that sample. "
                     "The "
                     "last checkpoint is good: go on with --resume."])
