"""Asked to stop (Ctrl-C, a preempted machine, a full queue): finish the step, save, go.

    SIGINT or SIGTERM -> stop.asked -> the loop, at the end of its step -> checkpoint -> exit 0

A second signal ends the process at once, as it would have without us: the last checkpoint is good.
"""

import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stop:
    asked: str | None = None  # the signal's name; only on the rank that got it


@contextmanager
def listen():
    """-> Stop, which is told of signals while the block runs."""
    stop = Stop()

    def note(number: int, frame) -> None:
        if stop.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.asked = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
