"""Every on-disk format -> samples: the one entrance for a file.

    a file -> open_data -> data[i] -> Sample(messages, images, where, tags)   -> batching.py

The content of a file decides its format, not its name:

    JSON Lines, a JSON array, COCO's annotations    json_files.py
    Parquet                                         parquet.py

The keys of a record decide its layout: sample.py lists them. Only an index is held in memory: a
row is read when it is used, so a broken one raises BadSample and leaves the others intact. Several
files, each with a weight: mixture.py.
"""

from pathlib import Path

from dataset.readers.bad_sample import BadSample, MissingImage
from dataset.readers.json_files import BYTE_ORDER_MARK, open_json
from dataset.readers.parquet import ParquetData
from dataset.readers.record_images import ImageFolder
from dataset.sample import Sample

__all__ = ["BadSample", "MissingImage", "Sample", "open_data"]


def open_data(file, images_dir=None, follow_links: bool = False):
    """A data file -> an object with len() and [i] -> Sample, which raises BadSample.

    images_dir: what the image names in the file start from; default: where the file lies.
    follow_links: symbolic links in that directory may lead out of it.
    Raises FileNotFoundError, or ValueError for a file that cannot be read at all.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no data file {file}; expected a .jsonl, .json or .parquet")
    images_dir = ImageFolder(Path(images_dir or file.parent), follow_links)
    with open(file, "rb") as opened:
        head = opened.read(4096)
    first = head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    if head.startswith(b"PAR1"):
        return ParquetData(file, images_dir)
    if first in (b"{", b"["):
        return open_json(file, images_dir, first)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is git-lfs's note where the data lies, not the data; "
                         "fetch it with git lfs pull")
    raise ValueError(f"{file} starts with {head[:20]!r}; expected JSON Lines (a '{{' first), "
                     "a JSON array ('[') or Parquet ('PAR1')")
