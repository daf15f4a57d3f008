"""Which sample each worker is at, for the case that it dies there.

    a worker -> with at("data.jsonl:12") -> memory that it shares with the training process
    the worker dies -> DataLoader raises -> told_by -> "process 4711 was at data.jsonl:12"

A worker that the system kills (no memory left) or that crashes inside a picture library says
nothing any more. What it wrote down beforehand is still there. An error that nobody expected in
a sample gets the sample's name in the same way.
"""

import os
import re
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import get_worker_info

WIDTH = 512  # bytes of a note; longer names are cut


class Whereabouts:
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
        except Exception as error:  # bad samples are caught inside: this is a fault of the program
            raise RuntimeError(f"{type(error).__name__} at {where}: {error}") from error

    def read(self) -> dict[int, str]:
        """{process id: where it is}"""
        texts = [bytes(note.numpy()).rstrip(b"\0").decode(errors="replace") for note in self.notes]
        return {int(pid): where for pid, _, where in (text.partition(" ") for text in texts) if pid}


def told_by(error: Exception, whereabouts: list[Whereabouts]) -> str | None:
    """What a DataLoader's error means, when it is that a worker died; else None.

    PyTorch has no type for this error, only its text. It may come at any place of the training,
    since a signal brings it.
    """
    died = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", str(error))
    if not died:
        return None
    at = {pid: where for one in whereabouts for pid, where in one.read().items()}
    lines = [f"process {pid}, which prepares data, {died[2].strip().rstrip('.')}; it was at "
             f"{at.get(int(pid), 'no sample yet')}." for pid in died[1].split(", ")]
    return " ".join([*lines, "If memory ran out (the system's log names killed processes), fewer "
                     "--workers or a smaller --batch_size help; otherwise look at that sample. The "
                     "last checkpoint is good: go on with --resume."])
