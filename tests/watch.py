"""What a piece of code does to the machine, as Python itself reports it: files opened, programs
started, connections made. For tests that claim that nothing of the kind happened."""

import contextlib
import os
import sys

STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn",
          "socket.connect", "os.startfile")
_seen = None  # the list that events go to at the moment


def _hook(event: str, arguments: tuple) -> None:
    if _seen is not None and (event in STARTS or event == "open"):
        _seen.append((event, arguments[0]))


sys.addaudithook(_hook)  # it cannot be taken away again, only be told to listen or not


class Seen(list):
    @property
    def started(self) -> list:
        return [event for event in self if event[0] != "open"]

    def opened_outside(self, folder) -> list[str]:
        """Paths opened by name that do not lie in folder, Python's own files left out."""
        own = (str(folder), sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))
        paths = [os.path.realpath(os.fsdecode(path)) for event, path in self
                 if event == "open" and isinstance(path, (str, bytes))]
        return [path for path in paths if not path.startswith(own)]


@contextlib.contextmanager
def watched():
    global _seen
    _seen = seen = Seen()
    try:
        yield seen
    finally:
        _seen = None
