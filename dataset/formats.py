"""Every on-disk format -> Sample.

    a file -> open_data -> data[i] -> Sample(messages, images, where, tags)   -> batching.py

Three formats, told apart by what is in the file, not by its name:

    JSON Lines   {"conversations": [{"role": "user", "content": "<image>\\nWho?"}, ...],
                  "image": "cat.jpg"}                       one a line, as minimind-v has them
    JSON array   [{"conversations": [{"from": "human", "value": "<image>\\nWho?"}, ...],
                   "image": "cat.jpg"}, ...]                as LLaVA has them
    Parquet      columns `conversations` (JSON text) and `image_bytes` (one picture or a list)

Either spelling of a turn may stand in any of the three. Nothing but an index is held in memory:
a row is read when it is asked for, so a broken one raises BadSample, and hurts no other.
"""

import bisect
import hashlib
import json
import os
import re
from array import array
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import pyarrow.parquet as pq

from dataset.chat import IMAGE, Message

ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's words; all others are taken as they are
TAGS = ("kind", "language")  # optional, for scores by kind and by language


@dataclass(frozen=True)
class Sample:
    messages: tuple  # of Message
    images: tuple  # each a path, bytes, a PIL.Image or a function that draws one; as the markers
    where: str  # "file:line", for whoever has to repair it
    tags: dict = field(default_factory=dict)  # e.g. {"kind": "count", "language": "en"}


class BadSample(Exception):
    """A row or a picture that cannot be used: where it stands, and what is wrong with it."""

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)  # both, so that it can be pickled by a loader's worker
        self.where, self.reason = where, reason

    def __str__(self):
        return f"{self.where}: {self.reason}"


def open_data(file, images_dir=None):
    """A data file -> an object with len() and [i] -> Sample, which raises BadSample.

    images_dir: what the picture names in a JSON file start from; default: where the file lies.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no data file {file}; expected a .jsonl, .json or .parquet")
    with open(file, "rb") as opened:
        head = opened.read(4096)
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]  # some editors put a mark in front
    if head.startswith(b"PAR1"):
        return ParquetData(file)
    if first in (b"{", b"["):
        index = index_lines if first == b"{" else index_array
        return JsonData(file, Path(images_dir or file.parent), *index(file))
    raise ValueError(f"{file} starts with {head[:20]!r}; expected JSON Lines (a '{{' first), "
                     "a JSON array ('[') or Parquet ('PAR1')")


def data_hash(file) -> dict:
    """What run.json says about the data: name, bytes, sha256. Reads the whole file once."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return {"file": str(file), "bytes": Path(file).stat().st_size, "sha256": digest.hexdigest()}


class JsonData:
    """JSON Lines or a JSON array: both are pieces of a file, each piece one JSON object."""

    def __init__(self, file: Path, images_dir: Path, starts: array, sizes: array, lines: array):
        self.file, self.images_dir = file, images_dir
        self.starts, self.sizes, self.lines = starts, sizes, lines

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Sample:
        i = range(len(self))[i]  # IndexError past the end, which is what ends a for loop
        where = f"{self.file}:{self.lines[i]}"
        if self.lines[-1] < len(self):  # an array written without line breaks: count entries
            where += f" entry {i + 1}"
        # Opened anew each time: processes that shared one open file would move each other's place.
        with open(self.file, "rb") as opened:
            opened.seek(self.starts[i])
            text = opened.read(self.sizes[i])
        try:
            record = json.loads(text)
        except ValueError as error:  # not JSON, or not UTF-8
            raise BadSample(where, f"not JSON: {error}") from error
        if not isinstance(record, dict):
            raise BadSample(where, f"expected an object, found {str(record)[:40]!r}")
        images = [self.images_dir / name for name in image_names(record.get("image"), where)]
        for path in images:
            if not os.path.isfile(path):
                raise BadSample(where, f"no picture {path}; is the image directory right?")
        return to_sample(record, images, where)


class ParquetData:
    """Rows of a Parquet file. A row group is the least that can be read, so the latest is kept:
    reading rows in order reads each group once."""

    def __init__(self, file: Path):
        parquet = pq.ParquetFile(file)
        self.file = file
        self.columns = [name for name in ("conversations", "image_bytes", *TAGS)
                        if name in parquet.schema_arrow.names]
        if "conversations" not in self.columns:
            raise ValueError(f"{file} has the columns {', '.join(parquet.schema_arrow.names)}; "
                             "expected 'conversations' (JSON text) and 'image_bytes'")
        groups = range(parquet.num_row_groups)
        sizes = [parquet.metadata.row_group(group).num_rows for group in groups]
        self.ends = list(accumulate(sizes))
        self.kept = (None, None)  # number of a row group, its rows

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> Sample:
        i = range(len(self))[i]  # IndexError past the end, which is what ends a for loop
        where = f"{self.file}:{i + 1}"
        group = bisect.bisect_right(self.ends, i)
        try:
            rows = self._group(group)
            record = {name: rows[name][i - self.ends[group]].as_py() for name in self.columns}
            if isinstance(record["conversations"], str):
                record["conversations"] = json.loads(record["conversations"])
        except (ValueError, OSError) as error:  # pyarrow's errors and JSON's are ValueErrors
            raise BadSample(where, f"cannot read the row: {error}") from error
        images = record.get("image_bytes") or []
        images = images if isinstance(images, list) else [images]
        if not all(isinstance(image, bytes) and image for image in images):
            raise BadSample(where, "image_bytes holds something that is not a picture's bytes")
        return to_sample(record, images, where)

    def _group(self, group: int):
        if self.kept[0] != group:
            self.kept = (None, None)  # let the old rows go before the new ones come
            # Opened anew, and read by this thread alone: both survive a loader's fork.
            table = pq.ParquetFile(self.file).read_row_group(
                group, columns=self.columns, use_threads=False)
            self.kept = (group, table)
        return self.kept[1]

    def __getstate__(self):
        return {**self.__dict__, "kept": (None, None)}  # a worker reads its own rows


def index_lines(file: Path) -> tuple[array, array, array]:
    """JSON Lines -> start, size and line number of every line that is not empty."""
    starts, sizes, lines = array("q"), array("q"), array("q")
    start = 0
    with open(file, "rb") as opened:
        for number, line in enumerate(opened, 1):
            mark = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
            if line[mark:].strip():
                starts.append(start + mark)
                sizes.append(len(line) - mark)
                lines.append(number)
            start += len(line)
    return starts, sizes, lines


def index_array(file: Path) -> tuple[array, array, array]:
    """JSON array -> start, size and line number of every entry.

    An array has no line ends to go on from after a mistake, so one mistake spoils the file.
    """
    starts, sizes, lines = array("q"), array("q"), array("q")
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    # Bytes that are not UTF-8 are carried through, so that they spoil their own entry alone.
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    place, start, line = 0, 0, 1  # the same spot counted in characters, bytes and lines

    def advance(to: int) -> None:
        nonlocal place, start, line
        start += len(text[place:to].encode("utf-8", "surrogateescape"))
        line += text.count("\n", place, to)
        place = to

    advance(text.index("[") + 1)
    while True:
        advance(gap.match(text, place).end())
        if text[place:place + 1] == "]":
            return starts, sizes, lines
        try:
            end = decode(text, place)[1]
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{error.lineno}: not JSON: {error.msg}; an array cannot be "
                             "read past a mistake, one object a line (JSON Lines) can") from error
        starts.append(start)
        lines.append(line)
        advance(end)
        sizes.append(start - starts[-1])


def image_names(found, where: str) -> list[str]:
    """"a.jpg", "a.jpg, b.jpg" or ["a.jpg", "b.jpg"] -> names; nothing -> none."""
    names = found.split(",") if isinstance(found, str) else found or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadSample(where, f"'image' is {str(found)[:60]!r}; expected a name or several")
    return [name.strip() for name in names if name.strip()]


def to_sample(record: dict, images: list, where: str) -> Sample:
    """One record, of whichever format -> Sample with as many <image> markers as pictures."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        raise BadSample(where, "'conversations' must be a list of turns, each an object with "
                               f"role and content (or from and value); found {str(turns)[:60]!r}")
    try:
        messages = []
        for turn in turns:
            role = turn.get("role", turn.get("from"))
            messages.append(Message(ROLES.get(role, role), turn.get("content", turn.get("value"))))
    except (ValueError, TypeError) as error:
        raise BadSample(where, str(error)) from error
    markers = sum(message.images for message in messages)
    if images and not markers:  # some data sets leave the marker out: the picture comes first
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise BadSample(where, "a picture, but no user turn that could show it")
        text = f"{IMAGE}\n" * len(images) + messages[first].content
        messages[first] = Message("user", text)
        markers = len(images)
    if markers != len(images):
        raise BadSample(where, f"{markers} {IMAGE} markers for {len(images)} pictures; "
                               "each picture needs its own")
    tags = {name: record[name] for name in TAGS if record.get(name) is not None}
    return Sample(tuple(messages), tuple(images), where, tags)
