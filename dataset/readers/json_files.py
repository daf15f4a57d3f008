"""JSON Lines, JSON arrays and COCO's annotation files -> samples, one record in memory at a time.

    a file -> an index: where each record starts, its size, its line -> data[i] -> Sample

    JSON Lines   one object a line
    JSON array   [{...}, {...}, ...], with line breaks or without
    COCO         {"info": ..., "images": [{"id": 9, "file_name": "9.jpg"}, ...],
                  "annotations": [{"image_id": 9, "caption": "A cat."}, ...]}

The index costs 24 bytes a record; a parsed record would cost thousands. So opening reads the file
once from front to back, and a record is read again, alone, when it is asked for.
"""

import json
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataset.sample import TEXT_KEYS, BadSample, Sample, refuse_unread, shown, to_sample

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it in front of a text
WINDOW = 1 << 20  # characters of a file that JsonWalk holds at a time
DECODE = json.JSONDecoder().raw_decode
BETWEEN = re.compile("[\ufeff\\s,:]*")  # what may stand between two values, or before the first
LONGEST = 1 << 26  # no honest record is longer; past it a mistake is a mistake, not a cut end


@dataclass
class Pieces:
    """The records of a file: where they are, not what they say."""

    file: Path
    starts: array = field(default_factory=lambda: array("q"))  # in bytes
    sizes: array = field(default_factory=lambda: array("q"))
    lines: array = field(default_factory=lambda: array("q"))  # counted from 1

    def append(self, start: int, size: int, line: int) -> None:
        self.starts.append(start)
        self.sizes.append(size)
        self.lines.append(line)

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, i: int) -> str:
        """"file:line", and the number of the entry where the line alone does not tell it."""
        where = f"{self.file}:{self.lines[i]}"
        shared = self.lines[i] in [*self.lines[max(i - 1, 0):i], *self.lines[i + 1:i + 2]]
        return f"{where} entry {i + 1}" if shared else where

    def read(self, i: int) -> dict:
        # Opened anew each time: processes that shared one open file would move each other's place.
        with open(self.file, "rb") as opened:
            opened.seek(self.starts[i])
            text = opened.read(self.sizes[i])
        try:
            record = json.loads(text.decode("utf-8-sig"))  # as bytes it may pass for UTF-16
        except json.JSONDecodeError as error:  # its own text counts lines from the record's start
            raise BadSample(self.where(i), f"not JSON: {error.msg} at character {error.pos + 1} "
                                           "of the record") from error
        except (ValueError, RecursionError) as error:  # not UTF-8, or nested without end
            raise BadSample(self.where(i), f"not JSON: {error}") from error
        if not isinstance(record, dict):
            raise BadSample(self.where(i), f"expected an object, found {shown(record)}")
        return record


class JsonData:
    """JSON Lines or a JSON array: a sample is a piece of the file."""

    def __init__(self, pieces: Pieces, images_dir: Path):
        self.pieces, self.images_dir = pieces, images_dir

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> Sample:
        return self.sample(i)

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Bytes of these records: about how long their texts are, known without reading them."""
        return np.asarray(self.pieces.sizes)[numbers]

    def sample(self, i: int, draw: int = 0) -> Sample:
        """draw: which of several captions, see records.py."""
        i = range(len(self))[i]  # IndexError past the end, which is what ends a for loop
        return to_sample(self.pieces.read(i), self.images_dir, self.pieces.where(i), i, draw)


class CocoData:
    """COCO captions: a sample is an annotation, so every caption is learned in each epoch, under
    its own line number. (One of five per picture is a mixture's weight 0.2 away.)"""

    def __init__(self, file: Path, images_dir: Path):
        self.images_dir = images_dir
        self.annotations, self.images = Pieces(file), Pieces(file)
        ids = array("q")
        for key, value, start, size, line in walk_object(file):
            if key == "annotations":
                self.annotations.append(start, size, line)
            if key == "images":
                if not isinstance(value, dict) or not is_id(value.get("id")):
                    raise ValueError(f"{file}:{line}: an image without a number as its 'id': "
                                     f"{shown(value)}")
                self.images.append(start, size, line)
                ids.append(value["id"])
        if not len(self.images) or not len(self.annotations):
            raise ValueError(f"{file} has {len(self.images)} images and {len(self.annotations)} "
                             "annotations; expected COCO captions with both (captions_*.json)")
        self.order = np.argsort(ids)  # place in the file of the image with the n-th smallest id
        self.ids = np.array(ids)[self.order]

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, i: int) -> Sample:
        return self.sample(i)

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        return np.asarray(self.annotations.sizes)[numbers]

    def sample(self, i: int, draw: int = 0) -> Sample:
        i = range(len(self))[i]
        return to_sample(self.record(i), self.images_dir, self.annotations.where(i), i, draw)

    def record(self, i: int) -> dict:
        """Annotation i and its picture's name: {"caption": "A cat.", "image": ["9.jpg"]}."""
        where, annotation = self.annotations.where(i), self.annotations.read(i)
        if "caption" not in annotation:
            raise BadSample(where, "the annotation has no 'caption'; boxes and key points cannot "
                                   "be learned here, take captions_*.json")
        number = annotation.get("image_id")
        place = np.searchsorted(self.ids, number) if is_id(number) else len(self.ids)
        if place == len(self.ids) or self.ids[place] != number:
            raise BadSample(where, f"image_id {str(number)[:60]} is none of the file's "
                                   f"{len(self.ids)} images")
        image = self.images.read(self.order[place])
        if not isinstance(image.get("file_name"), str):
            raise BadSample(where, f"image {number} has no 'file_name' "
                                   f"({self.images.where(self.order[place])})")
        refuse_unread(annotation, ("caption",), where, [Path(image["file_name"])])
        return {"caption": annotation["caption"], "image": [image["file_name"]]}


def is_id(value) -> bool:
    return isinstance(value, int) and abs(value) < 1 << 63  # what an index of numbers can hold


def open_json(file: Path, images_dir: Path, first: bytes):
    """first: the character that the file begins with, "{" or "["."""
    if first == b"[":
        return JsonData(index_array(file), images_dir)
    if is_coco(file):
        return CocoData(file, images_dir)
    return JsonData(index_lines(file), images_dir)


def index_lines(file: Path) -> Pieces:
    """JSON Lines: every line that is not empty is a piece. Nothing is parsed."""
    pieces, start = Pieces(file), 0
    with open(file, "rb") as opened:
        for number, line in enumerate(opened, 1):
            mark = len(BYTE_ORDER_MARK) if start == 0 and line.startswith(BYTE_ORDER_MARK) else 0
            if line[mark:].strip():
                pieces.append(start + mark, len(line) - mark, number)
            start += len(line)
    return pieces


def index_array(file: Path) -> Pieces:
    """JSON array: every entry is a piece.

    An array has no line ends to go on from after a mistake, so one mistake spoils the file.
    """
    pieces = Pieces(file)
    with JsonWalk(file) as walk:
        walk.peek()
        for _, start, size, line in walk.entries():
            pieces.append(start, size, line)
        if walk.peek():  # two arrays, one after the other: half of the data would be lost unseen
            raise ValueError(f"{file}:{walk.line}: something follows the end of the array; "
                             "expected one array, or one object a line (JSON Lines)")
    return pieces


def is_coco(file: Path) -> bool:
    """A file that starts with "{": does its first object look like COCO, or like a row of JSON
    Lines? Decided by the first telling key, so usually within the first hundred bytes."""
    try:
        for key, *_ in walk_object(file):
            if key in TEXT_KEYS:
                return False
            if key in ("info", "licenses", "annotations", "categories"):
                return True
    except ValueError:  # a broken first line of JSON Lines, which must not spoil the others
        pass
    return False


def walk_object(file: Path):
    """The first object of a file -> (key, value, start, size, line), arrays entry by entry."""
    with JsonWalk(file) as walk:
        walk.peek()
        walk.step()  # over the "{"
        while walk.peek() != "}":
            key, _, size, line = walk.value()
            if walk.peek() != "[":
                yield key, *walk.value()
                continue
            for entry in walk.entries():
                yield key, *entry


class JsonWalk:
    """A JSON file value by value, through a window that moves on: a file of any size opens with
    a few megabytes. Commas and colons between the values are passed over as if they were spaces.
    """

    def __init__(self, file: Path):
        self.file = file
        # Bytes that are not UTF-8 are carried through, so that they spoil their own entry alone.
        self.opened = open(file, encoding="utf-8", errors="surrogateescape", newline="")
        self.text, self.place = "", 0  # the window, and how far in it we are
        self.start, self.line = 0, 1  # the same spot in the file: bytes before it, its line

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.opened.close()

    def peek(self) -> str:
        """Go to the next value or bracket -> its first character; "" at the end of the file."""
        while True:
            self._advance(BETWEEN.match(self.text, self.place).end())
            if self.place < len(self.text) or not self._read():
                return self.text[self.place:self.place + 1]

    def step(self) -> None:
        self._advance(self.place + 1)

    def entries(self):
        """At a "[": -> (value, start, size, line) of each entry, up to and over the "]"."""
        self.step()
        while self.peek() != "]":
            yield self.value()
        self.step()

    def value(self) -> tuple:
        """-> the value, its start and size in bytes, its line."""
        self.peek()
        while True:
            try:
                value, end = DECODE(self.text, self.place)
                # A number that ends where the window ends may go on behind it.
                if end < len(self.text) or not self._read():
                    break
            except (ValueError, RecursionError) as error:
                if len(self.text) - self.place > LONGEST or not self._read():
                    raise ValueError(self._tell(error)) from error
        start, line = self.start, self.line
        self._advance(end)
        return value, start, self.start - start, line

    def _read(self) -> bool:
        """Lengthen the window, at least twofold, so that a long entry is not parsed too often."""
        more = self.opened.read(max(WINDOW, len(self.text) - self.place))
        if more:
            self.text, self.place = self.text[self.place:] + more, 0
        return bool(more)

    def _advance(self, to: int) -> None:
        passed = self.text[self.place:to]
        self.start += len(passed.encode("utf-8", "surrogateescape"))
        self.line += passed.count("\n")
        self.place = to

    def _tell(self, error) -> str:
        pos, reason = getattr(error, "pos", self.place), getattr(error, "msg", str(error))
        line = self.line + self.text.count("\n", self.place, pos)
        if pos >= len(self.text.rstrip()) or reason.startswith("Unterminated string"):
            reason += "; the file ends too early, is the download complete?"
        return (f"{self.file}:{line}: not JSON: {reason}; an array cannot be read past a "
                "mistake, one object a line (JSON Lines) can")
