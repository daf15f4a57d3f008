"""One process of a machine opens the data; the others share it.

    leader: open -> samples -> small: objects, pickled ---------------> sent to the others
                            -> large: the arrays of an index -> a file -> mapped by all of them

An index says where each record of a file starts: 24 bytes a line, and the whole file has to be read
to make it. Eight processes that each made their own would read the file eight times and hold eight
indexes. Mapped from one file they are the same pages of the machine's memory, for the processes'
data workers too.

Pickle can do this since protocol 5: it hands out the memory of an array instead of writing it into
the stream (PEP 574, "out-of-band data"). So it does not matter here what the data is made of.
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

    def reducer_override(self, value):
        if isinstance(value, array):
            return np.frombuffer, (pickle.PickleBuffer(value), value.typecode)
        return NotImplemented


def load_on_local_leader(open_data, distributed):
    """open_data() -> its result, on every rank; called by the first rank of each machine alone.

    What that one raises ends the run; the others are waiting for it then, see distributed.abort.
    """
    if distributed.world_size == 1:
        return open_data()
    # torchrun counts the ranks machine by machine.
    leader = distributed.rank - int(os.environ.get("LOCAL_RANK", 0))
    results = [None] * distributed.world_size
    mine = write(open_data()) if distributed.rank == leader else None
    dist.all_gather_object(results, mine)
    try:
        return read(*results[leader])
    finally:
        # Mapped by all of them, the file lives on without its name until the last one ends.
        distributed.barrier()
        if mine:
            with suppress(PermissionError):  # Windows lets no mapped file go
                os.unlink(mine[1])


def write(value) -> tuple[bytes, str, list[int]]:
    """-> what `read` takes: the pickle, the file with its arrays, and where each array ends."""
    stream, buffers = BytesIO(), []
    Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
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
    """The value again. Its arrays are pages of the file, and cannot be written to."""
    with open(name, "rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return pickle.loads(stream, buffers=[content[start:end] for start, end in pairwise(ends)])
