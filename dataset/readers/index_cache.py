"""Arrays about a data file that take long to compute: once on each machine, then memory-mapped.

    file, compute -> cached -> an array, mapped: all processes and their workers share its pages

They lie in the directory for temporary files (TMPDIR names another), and may be deleted at any
time. A key names the file with its size and time of change, so a changed file has another one.
"""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

SMALL = 1 << 20  # bytes of an array; a smaller one is computed again
SMALL_FILE = 1 << 24  # bytes of a file that is read in no time


def identity(file) -> str:
    """The part of a key that stands for a file."""
    stat = os.stat(file)
    return f"{os.path.realpath(file)} {stat.st_size} {stat.st_mtime_ns}"


def path_of(key: str) -> Path:
    folder = Path(tempfile.gettempdir()) / f"vlm-index-{user()}"
    return folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.npy"


def user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0  # Windows: the directory is the user's own


def load(key: str) -> np.ndarray | None:
    path = path_of(key)
    try:
        if os.stat(path.parent).st_uid != user():
            return None  # somebody else made the directory, and may change what it holds
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError):  # not there, or torn
        return None


def store(key: str, array: np.ndarray) -> np.ndarray:
    """-> the array, mapped; as it is where it is small or there is no room for it."""
    if array.nbytes < SMALL:
        return array
    path = path_of(key)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with open(partial, "wb") as file:
            np.save(file, array)
        os.replace(partial, path)  # no process ever maps half of a file
    except OSError:
        with suppress(OSError):
            partial.unlink()
        return array
    found = load(key)
    return array if found is None else found


def cached(kind: str, file, compute) -> np.ndarray:
    """compute() -> an array about a file. Of a small file it is computed each time."""
    if os.stat(file).st_size < SMALL_FILE:
        return compute()
    key = f"{kind} {identity(file)}"
    found = load(key)
    return store(key, compute()) if found is None else found
