"""One process of a machine opens the data; the others use what it has found.

    leader: open -> samples -> small: objects, pickled -----------------> told to the others
                            -> large: an index's numbers -> a file -----> mapped by all of them

An index says where each record of a file starts: 24 bytes a line, and the whole file has to be read
to make it. Eight processes that each made their own would read the file eight times and hold eight
indexes. Mapped from one file they are the same pages of the machine's memory, for the processes'
data workers too.

Pickle can do this by itself since protocol 5: it hands the memory of an array to whoever asks for
it, in place of writing it into the stream (PEP 574, "out-of-band data"). So it does not matter
here what the data is made of.
"""

import mmap
import os
import pickle
import tempfile
from array import array
from contextlib import suppress
from io import BytesIO
from itertools import pairwise

import numpy as np
import torch.distributed as dist


class Pickler(pickle.Pickler):
    """Python's, but Python's own arrays give their memory away too, as numpy's do."""

    def reducer_override(self, thing):
        if isinstance(thing, array):
            return np.frombuffer, (pickle.PickleBuffer(thing), thing.typecode)
        return NotImplemented


def open_once(open_data, ranks):
    """open_data() -> its result, on every rank; called by the first rank of each machine alone.

    What that one raises ends the run; the others are waiting for it then, see distributed.leave.
    """
    if ranks.world_size == 1:
        return open_data()
    leader = ranks.rank - int(os.environ.get("LOCAL_RANK", 0))  # torchrun counts machine by machine
    told = [None] * ranks.world_size
    mine = write(open_data()) if ranks.rank == leader else None
    dist.all_gather_object(told, mine)
    try:
        return read(*told[leader])
    finally:
        ranks.wait()  # mapped by all: it lives on without its name, until the last one ends
        if mine:
            with suppress(PermissionError):  # Windows lets no mapped file go
                os.unlink(mine[1])


def write(thing) -> tuple[bytes, str, list[int]]:
    """-> what `read` takes: the pickle, the file with its numbers, and where each array ends."""
    stream, buffers = BytesIO(), []
    Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(thing)
    ends = [0]
    try:
        with tempfile.NamedTemporaryFile(prefix="vlm-index-", delete=False) as file:
            for buffer in buffers:
                file.write(buffer.raw())
                ends.append(file.tell())
            file.write(b"\0")  # a file without a byte cannot be mapped
    except OSError as error:
        size = sum(buffer.raw().nbytes for buffer in buffers)
        raise SystemExit(f"cannot write the data's index, {size:,} bytes, into the directory for "
                         f"temporary files: {error}; TMPDIR names another one") from error
    return stream.getvalue(), file.name, ends


def read(stream: bytes, name: str, ends: list[int]):
    """The thing again. Its arrays are pages of the file, and cannot be written to."""
    with open(name, "rb") as file:
        numbers = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return pickle.loads(stream, buffers=[numbers[start:end] for start, end in pairwise(ends)])
