"""For the tests of bad input: records and damage to make, and a watch on what is done with them.

    talk, show    a record of a data file
    spoilt        a file's content with a byte changed, lost or added, many times
    Order         what a wicked pickle holds
    watched       what a piece of code does to the machine, as Python itself reports it: files
                  opened, programs started, connections made
"""

import contextlib
import os
import sys

import numpy as np


def talk(*turns, **more):
    """(role, content), ... -> a record."""
    return {"conversations": [{"role": role, "content": text} for role, text in turns], **more}


def show(image):
    """A sound conversation about a picture -> a record."""
    return talk(("user", "<image>\nWho is it?"), ("assistant", "A cat."), image=image)


def spoilt(content: bytes, count: int, seed: int):
    """The content with a byte flipped, a piece cut out, an end cut off, or noise put in."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        place = int(rng.integers(len(content)))
        size = int(rng.integers(1, 40))
        noise = rng.bytes(size)
        flipped = bytes([content[place] ^ (1 << int(rng.integers(8)))])
        yield (content[:place] + flipped + content[place + 1:],
               content[:place] + content[place + size:],
               content[:place],
               content[:place] + noise + content[place:])[number % 4]


class Order:
    """Pickles to a call, here of os.mkdir: what a wicked file would do, and worse."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


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
