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
from pathlib import Path

import numpy as np

from dataset.readers.bad_sample import BadSample, shown
from dataset.readers.index_cache import cached
from dataset.readers.record_images import ImageFolder
from dataset.readers.unread import refuse_unread
from dataset.sample import TEXT_KEYS, Sample, to_sample

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it in front of a text
WINDOW = 1 << 20  # characters of a file that JsonStreamReader holds at a time
DECODE = json.JSONDecoder().raw_decode
BETWEEN = re.compile("[\ufeff\\s,:]*")  # what may stand between two values, or before the first
LONGEST = 1 << 26  # characters; a value that is still not complete is taken to be damaged


class RecordIndex:
    """Where the records of a file are; their content stays in the file.

    numbers: of each record its start and size in bytes and its line, counted from 1.
    """

    def __init__(self, file: Path, numbers=None):
        self.file, self.numbers = file, array("q") if numbers is None else numbers

    def append(self, start: int, size: int, line: int) -> None:
        self.numbers.extend((start, size, line))

    def __len__(self) -> int:
        return len(self.numbers) // 3

    def where(self, i: int) -> str:
        """"file:line", and the number of the entry where the line alone does not tell it."""
        line = self.numbers[3 * i + 2]
        where = f"{self.file}:{line}"
        shared = any(self.numbers[3 * n + 2] == line for n in (i - 1, i + 1) if 0 <= n < len(self))
        return f"{where} entry {i + 1}" if shared else where

    def read(self, i: int) -> dict:
        # Opened anew each time: processes that share one open file move each other's position.
        with open(self.file, "rb") as opened:
            opened.seek(self.numbers[3 * i])
            text = opened.read(self.numbers[3 * i + 1])
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

    def __init__(self, records: RecordIndex, images_dir: ImageFolder):
        self.records, self.images_dir = records, images_dir

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Sample:
        return self.sample(i)

    def sample(self, i: int, caption_index: int = 0) -> Sample:
        """caption_index: which of several captions, see sample.py."""
        i = range(len(self))[i]  # IndexError past the end, which is what ends a for loop
        return to_sample(self.records.read(i), self.images_dir, self.records.where(i), i,
                         caption_index)


class CocoData:
    """COCO captions: a sample is an annotation, so every caption is learned in each epoch, under
    its own line number. (A mixture's weight of 0.2 takes one of the five of an image.)"""

    def __init__(self, file: Path, images_dir: ImageFolder):
        self.images_dir = images_dir
        # One array: how many numbers of annotations, of images, all of them, and the images' ids.
        numbers = cached("COCO", file, lambda: index_coco(file))
        annotations, images, ids = np.split(numbers[2:], np.cumsum(numbers[:2]))
        self.annotations, self.images = RecordIndex(file, annotations), RecordIndex(file, images)
        self.order = np.argsort(ids)  # index in the file of the image with the n-th smallest id
        self.ids = ids[self.order]

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, i: int) -> Sample:
        return self.sample(i)

    def sample(self, i: int, caption_index: int = 0) -> Sample:
        i = range(len(self))[i]
        return to_sample(self.record(i), self.images_dir, self.annotations.where(i), i,
                         caption_index)

    def record(self, i: int) -> dict:
        """Annotation i and its image's name: {"caption": "A cat.", "image": ["9.jpg"]}."""
        where, annotation = self.annotations.where(i), self.annotations.read(i)
        if "caption" not in annotation:
            raise BadSample(where, "the annotation has no 'caption'; boxes and key points cannot "
                                   "be learned here, take captions_*.json")
        number = annotation.get("image_id")
        n = np.searchsorted(self.ids, number) if is_id(number) else len(self.ids)
        if n == len(self.ids) or self.ids[n] != number:
            raise BadSample(where, f"image_id {str(number)[:60]} is none of the file's "
                                   f"{len(self.ids)} images")
        image = self.images.read(self.order[n])
        if not isinstance(image.get("file_name"), str):
            raise BadSample(where, f"image {number} has no 'file_name' "
                                   f"({self.images.where(self.order[n])})")
        refuse_unread(annotation, ("caption",), where, [Path(image["file_name"])])
        return {"caption": annotation["caption"], "image": [image["file_name"]]}


def is_id(value) -> bool:
    return isinstance(value, int) and abs(value) < 1 << 63  # what an index of numbers can hold


def open_json(file: Path, images_dir: ImageFolder, first: bytes):
    """first: the character that the file begins with, "{" or "["."""
    if first == b"{" and is_coco(file):
        return CocoData(file, images_dir)
    index = index_array if first == b"[" else index_lines
    return JsonData(RecordIndex(file, cached("JSON", file, lambda: index(file))), images_dir)


def index_lines(file: Path) -> np.ndarray:
    """JSON Lines: every line that is not empty is a record. Nothing is parsed."""
    records, start = RecordIndex(file), 0
    with open(file, "rb") as opened:
        for number, line in enumerate(opened, 1):
            mark = len(BYTE_ORDER_MARK) if start == 0 and line.startswith(BYTE_ORDER_MARK) else 0
            if line[mark:].strip():
                records.append(start + mark, len(line) - mark, number)
            start += len(line)
    return np.array(records.numbers)


def index_array(file: Path) -> np.ndarray:
    """JSON array: every entry is a record.

    An array has no line ends to go on from after a mistake, so one mistake spoils the file.
    """
    records = RecordIndex(file)
    with JsonStreamReader(file) as reader:
        reader.peek()
        for _, start, size, line in reader.entries():
            records.append(start, size, line)
        if reader.peek():  # two arrays, one after the other: half of the data would be lost unseen
            raise ValueError(f"{file}:{reader.line}: something follows the end of the array; "
                             "expected one array, or one object a line (JSON Lines)")
    return np.array(records.numbers)


def index_coco(file: Path) -> np.ndarray:
    annotations, images, ids = RecordIndex(file), RecordIndex(file), array("q")
    for key, value, *place in walk_object(file):
        if key == "annotations":
            annotations.append(*place)
        if key == "images":
            if not isinstance(value, dict) or not is_id(value.get("id")):
                raise ValueError(f"{file}:{place[-1]}: an image without a number as its 'id': "
                                 f"{shown(value)}")
            images.append(*place)
            ids.append(value["id"])
    if not len(images) or not len(annotations):
        raise ValueError(f"{file} has {len(images)} images and {len(annotations)} "
                         "annotations; expected COCO captions with both (captions_*.json)")
    counts = [len(annotations.numbers), len(images.numbers)]
    return np.concatenate([counts, annotations.numbers, images.numbers, ids])


def is_coco(file: Path) -> bool:
    """Whether a file that starts with "{" is COCO, and not JSON Lines: by the keys of its first
    object, of which a record of text has others. Usually known within a few kilobytes."""
    found = False
    try:
        for key, value, *_ in walk_object(file):
            if key in TEXT_KEYS:
                return False
            found |= key in ("info", "licenses", "categories", "annotations")
            if isinstance(value, dict) and ((key == "images" and "file_name" in value)
                                            or (key == "annotations" and "image_id" in value)):
                return True
    except ValueError:  # a broken first line of JSON Lines must not spoil the others
        with open(file, "rb") as opened:
            opened.readline(LONGEST)
            return found and not opened.read(1) == b"{"
    return found


def walk_object(file: Path):
    """The first object of a file -> (key, value, start, size, line), arrays entry by entry."""
    with JsonStreamReader(file) as reader:
        reader.peek()
        reader.step()  # over the "{"
        while reader.peek() != "}":
            key, _, size, line = reader.value()
            if reader.peek() != "[":
                yield key, *reader.value()
                continue
            for entry in reader.entries():
                yield key, *entry


class JsonStreamReader:
    """A JSON file value by value, through a moving window: a file of any size opens with a few
    megabytes. Commas and colons between the values are skipped like spaces.
    """

    def __init__(self, file: Path):
        self.file = file
        # Bytes that are not UTF-8 are carried through, so that they spoil their own entry alone.
        self.opened = open(file, encoding="utf-8", errors="surrogateescape", newline="")
        self.text, self.position = "", 0  # the window, and the position in it
        self.start, self.line = 0, 1  # of that position in the file: bytes before it, its line

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.opened.close()

    def peek(self) -> str:
        """Go to the next value or bracket -> its first character; "" at the end of the file."""
        while True:
            self._advance(BETWEEN.match(self.text, self.position).end())
            if self.position < len(self.text) or not self._read():
                return self.text[self.position:self.position + 1]

    def step(self) -> None:
        self._advance(self.position + 1)

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
                value, end = DECODE(self.text, self.position)
                # A number that ends where the window ends may go on behind it.
                if end < len(self.text) or not self._read():
                    break
            except (ValueError, RecursionError) as error:
                if len(self.text) - self.position > LONGEST or not self._read():
                    raise ValueError(self._describe(error)) from error
        start, line = self.start, self.line
        self._advance(end)
        return value, start, self.start - start, line

    def _read(self) -> bool:
        """Lengthen the window, at least twofold, so that a long entry is not parsed too often."""
        more = self.opened.read(max(WINDOW, len(self.text) - self.position))
        if more:
            self.text, self.position = self.text[self.position:] + more, 0
        return bool(more)

    def _advance(self, to: int) -> None:
        passed = self.text[self.position:to]
        self.start += len(passed.encode("utf-8", "surrogateescape"))
        self.line += passed.count("\n")
        self.position = to

    def _describe(self, error) -> str:
        pos, reason = getattr(error, "pos", self.position), getattr(error, "msg", str(error))
        line = self.line + self.text.count("\n", self.position, pos)
        if pos >= len(self.text.rstrip()) or reason.startswith("Unterminated string"):
            reason += "; the file ends too early, is the download complete?"
        return (f"{self.file}:{line}: not JSON: {reason}; an array cannot be read past a "
                "mistake, one object a line (JSON Lines) can")
