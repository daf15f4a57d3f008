"""Ctrl-C, a preempted machine, a full queue: finish the step, save, end with exit status 0.

    SIGINT or SIGTERM -> stop_requested() -> the loop, at the end of its step -> checkpoint

A second signal ends the process at once, as it would have without this module: the last checkpoint
is good.
"""

import os
import signal
from contextlib import contextmanager

_received: list[int] = []  # signals, on the rank that got them alone


def stop_requested() -> bool:
    return bool(_received)


@contextmanager
def handle_signals():
    """While the block runs, the first signal only asks the loop to stop."""
    def note(number: int, frame) -> None:
        if _received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()
