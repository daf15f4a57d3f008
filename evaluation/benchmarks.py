"""The published files of benchmarks -> questions, as their authors lay them out.

    files -> open_benchmark -> Benchmark(metric, data), data[i] -> Question     -> evaluation/run.py

    benchmark       file                           what tells it                         metric
    MMStar          mmstar.parquet                 question with "Options:", answer      choice
    MMBench         Parquet                        question, answer, A, B, ...           choice
    ScienceQA       Parquet                        question, choices, answer (a number)  choice
    POPE            coco_pope_*.json, one a line   text, label                           yesno
    POPE            Parquet of lmms-lab            question, answer "yes" or "no"        yesno
    VQAv2           *_questions.json, and with it  {"questions": [...]}                  vqa
                    *_annotations.json             {"annotations": [{"answers": ...}]}
    VQAv2           Parquet of lmms-lab            question, answers                     vqa
    COCO            captions_*.json                images, annotations                   caption
    AI Challenger   one record a picture           caption                               caption
    easy-VQA        questions.json                 [[question, answer, picture], ...]    exact

What tells a file is what is in it, not its name. Whatever else there is, is no benchmark, and
formats.py reads it. A picture is looked up in --images by the name that the file gives; one that
lies inside a Parquet file is read again when it is asked about, so that no benchmark's pictures
are held in memory.
"""

import hashlib
import json
from array import array
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dataset.readers.bad_sample import BadSample, shown
from dataset.readers.json_files import (
    BYTE_ORDER_MARK,
    CocoData,
    JsonWalk,
    Pieces,
    is_id,
    open_json,
    walk_object,
)
from dataset.readers.parquet import UNREADABLE, ParquetData
from dataset.readers.record_images import PICTURE_KEYS, existing, find_pictures
from evaluation.benchmark_records import (
    LETTERS,
    YES_NO,
    ask,
    caption_question,
    metric_of,
    question_of,
)
from evaluation.eval_samples import Question

COLUMNS = ("question", "text", "caption", "answer", "answers", "label", "choices", "hint",
           "category", "answer_type", *PICTURE_KEYS, *LETTERS)  # of a Parquet file
# What is said behind a question, so that the answer has the form that its metric reads: the words
# of LLaVA 1.5 (Liu et al. 2023), which the data of many models repeat.
SUFFIXES = {"vqa": "Answer the question using a single word or phrase.",
            "yesno": "Answer the question using a single word or phrase.",
            "choice": "Answer with the option's letter from the given choices directly."}


@dataclass(frozen=True)
class Benchmark:
    metric: str  # how its authors score it, one of evaluation/metrics.py
    data: object  # len() and [i] -> Question, which raises BadSample


def open_benchmark(files: list, images_dir=None, suffix: str | None = None) -> Benchmark | None:
    """Files of one benchmark -> its questions and metric; None: they are not a benchmark's.

    images_dir: where picture names start from; None: where each file lies, for easy-VQA the
    folder `images` beside it. suffix: said behind every question; None: what SUFFIXES has.
    Raises ValueError for files that cannot be scored together.
    """
    files = [Path(file) for file in files]
    kinds = [kind_of(file) for file in files]
    if not any(kinds):
        return None
    if any(kind in ("questions", "annotations") for kind in kinds):
        if sorted(map(str, kinds)) != ["annotations", "questions"]:
            raise ValueError(f"{files[0]} is a part of VQA: expected two files, the questions and "
                             "their annotations (v2_OpenEnded_..._questions.json and "
                             "v2_..._annotations.json); the answers of its test split are not "
                             "published")
        data = VQAData(files[kinds.index("questions")], files[kinds.index("annotations")],
                       images_dir, SUFFIXES["vqa"] if suffix is None else suffix)
        return Benchmark("vqa", data)
    if len(set(kinds)) > 1:
        told = ", ".join(f"{file} by {kind or 'exact'}" for file, kind in zip(files, kinds))
        raise ValueError(f"files that are scored in unlike ways: {told}; score them one by one")
    metric = {"coco": "caption", "easy-vqa": "exact"}.get(kinds[0], kinds[0])
    said = SUFFIXES.get(metric, "") if suffix is None else suffix
    parts = [open_one(file, kinds[0], images_dir, said) for file in files]
    return Benchmark(metric, parts[0] if len(parts) == 1 else Joined(parts))


def open_one(file: Path, kind: str, images_dir, suffix: str):
    if kind == "easy-vqa":
        return EasyVQAData(file, Path(images_dir or file.parent / "images"), suffix)
    images_dir = Path(images_dir or file.parent)
    if kind == "coco":
        return CaptionData(file, images_dir, suffix)
    with open(file, "rb") as opened:
        head = opened.read(4096)
    if head.startswith(b"PAR1"):
        rows = ParquetRows(ParquetData(file, images_dir, COLUMNS))
    else:
        rows = open_json(file, images_dir, first_sign(head)).pieces
    return Records(rows, kind, images_dir, suffix)


class Joined:
    """Several files of one benchmark, one after the other."""

    def __init__(self, parts: list):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, i: int) -> Question:
        i = range(len(self))[i]  # IndexError past the end, which is what ends a for loop
        for part in self.parts:
            if i < len(part):
                return part[i]
            i -= len(part)


# ---------------------------------------------------------------- which benchmark


def kind_of(file: Path) -> str | None:
    """-> a metric for a file of records, or "coco", "questions", "annotations", "easy-vqa"; None
    for what is no benchmark, or cannot be read: formats.py says why."""
    if not file.is_file():
        return None
    with open(file, "rb") as opened:
        head = opened.read(4096)
    try:
        if head.startswith(b"PAR1"):
            names = pq.read_schema(file).names
            if metric_of(dict.fromkeys(names)) is None:
                return None
            rows = ParquetData(file, file.parent, COLUMNS)
            return metric_of(first_record(rows.record(i) for i in range(len(rows))))
        if first_sign(head) == b"[":
            with JsonWalk(file) as walk:
                walk.peek()
                first = next(walk.entries(), ({},))[0]
            if isinstance(first, list):
                return "easy-vqa" if is_triple(first) else None
            return metric_of(first) if isinstance(first, dict) else None
        if first_sign(head) == b"{":
            return kind_of_object(file)
    except (BadSample, *UNREADABLE):
        pass
    return None


def first_sign(head: bytes) -> bytes:
    return head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]


def first_record(records) -> dict:
    """The first that can be read; a broken one is told later, with its line."""
    records = iter(records)
    while True:
        try:
            return next(records, {})
        except BadSample:
            continue


def kind_of_object(file: Path) -> str | None:
    """A file that begins with an object: one of VQA's or COCO's, or JSON Lines."""
    try:
        for key, value, *_ in walk_object(file):
            if key == "questions" and isinstance(value, dict):
                return "questions"
            if key == "annotations" and isinstance(value, dict):
                return ("annotations" if "answers" in value else
                        "coco" if "caption" in value else None)
    except ValueError:  # a broken first line of JSON Lines; the next may tell
        pass
    pieces, start = Pieces(file), 0
    with open(file, "rb") as opened:
        for number, line in enumerate(islice(opened, 100), 1):
            if line.strip():
                pieces.append(start, len(line), number)
            start += len(line)
    return metric_of(first_record(map(pieces.read, range(len(pieces)))))


# ---------------------------------------------------------------- one record a question


class ParquetRows:
    """Rows of a Parquet file as records, whose pictures are read again when they are asked for."""

    def __init__(self, data: ParquetData):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def where(self, i: int) -> str:
        return f"{self.data.file}:{i + 1}"

    def read(self, i: int) -> dict:
        return self.data.record(i)

    def pictures(self, record: dict, i: int) -> tuple:
        pictures = find_pictures(record, self.data.images_dir, self.where(i))
        return tuple(StoredPicture(fingerprint(found), self, i, n, getattr(found, "name", None))
                     for n, found in enumerate(pictures))


@dataclass(frozen=True)
class StoredPicture:
    """A picture inside a file, read when it is called. Two with the same bytes are equal: many
    benchmarks ask several questions about one picture, and repeat it in each row."""

    fingerprint: str
    rows: ParquetRows = field(compare=False)
    row: int = field(compare=False)
    number: int = field(compare=False)
    name: str | None = field(default=None, compare=False)  # of its file; None: the bytes lie here

    def __call__(self):
        record = self.rows.read(self.row)
        return find_pictures(record, self.rows.data.images_dir, str(self))[self.number]

    def __str__(self) -> str:
        return self.rows.where(self.row)


def fingerprint(picture) -> str:
    return hashlib.sha256(picture if isinstance(picture, bytes) else str(picture).encode()
                          ).hexdigest()


class Records:
    """Every record is one question; rows: len(), read(i) and where(i)."""

    def __init__(self, rows, metric: str, images_dir: Path, suffix: str):
        self.rows, self.metric = rows, metric
        self.images_dir, self.suffix = images_dir, suffix

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Question:
        i = range(len(self))[i]
        record, where = self.rows.read(i), self.rows.where(i)
        if isinstance(self.rows, ParquetRows):
            images = self.rows.pictures(record, i)
        else:
            images = tuple(find_pictures(record, self.images_dir, where))
        kind = record.get("category") or record.get("answer_type")
        tags = {"kind": kind} if isinstance(kind, str) and kind.isprintable() else {}
        return question_of(self.metric, record, images, where, tags, self.suffix)


# ---------------------------------------------------------------- layouts of their own


class VQAData:
    """VQA's two files, joined by question_id; {"data_subtype": "val2014"} names the pictures."""

    def __init__(self, questions: Path, annotations: Path, images_dir, suffix: str):
        self.images_dir, self.suffix = Path(images_dir or questions.parent), suffix
        self.questions, self.subtype = Pieces(questions), None
        for key, value, start, size, line in walk_object(questions):
            if key == "questions":
                self.questions.append(start, size, line)
            elif key == "data_subtype":
                self.subtype = value
        if not isinstance(self.subtype, str):
            raise ValueError(f"{questions} has no 'data_subtype' (such as \"val2014\"), which is "
                             "a part of the names of the pictures")
        self.annotations, ids = Pieces(annotations), array("q")
        for key, value, start, size, line in walk_object(annotations):
            if key == "annotations":
                number = value.get("question_id") if isinstance(value, dict) else None
                self.annotations.append(start, size, line)
                ids.append(number if is_id(number) else -1)
        self.order = np.argsort(ids)
        self.ids = np.array(ids)[self.order]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, i: int) -> Question:
        i = range(len(self))[i]
        record, where = self.questions.read(i), self.questions.where(i)
        number, image = record.get("question_id"), record.get("image_id")
        place = np.searchsorted(self.ids, number) if is_id(number) else len(self.ids)
        if place == len(self.ids) or self.ids[place] != number:
            raise BadSample(where, f"question_id {shown(number)} has no annotation in "
                                   f"{self.annotations.file}")
        if not is_id(image):
            raise BadSample(where, f"image_id is {shown(image)}; expected a number")
        annotation = self.annotations.read(self.order[place])
        images = (existing(self.images_dir, f"COCO_{self.subtype}_{image:012d}.jpg", where),)
        kind = annotation.get("answer_type")
        return question_of("vqa", {**annotation, **record}, images, where,
                           {"kind": kind} if isinstance(kind, str) else {}, self.suffix)


class CaptionData:
    """COCO captions, one question a picture: all its captions are references."""

    def __init__(self, file: Path, images_dir: Path, suffix: str):
        self.coco, self.images_dir, self.suffix = CocoData(file, images_dir), images_dir, suffix
        # Training has no use for this, so CocoData keeps no picture's number: a second walk.
        found = (value for key, value, *_ in walk_object(file) if key == "annotations")
        self.captions = {}  # {id of a picture: its annotations' places}
        for place, value in enumerate(found):
            number = value.get("image_id") if isinstance(value, dict) else None
            self.captions.setdefault(number if is_id(number) else None, []).append(place)
        self.numbers = list(self.captions)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Question:
        places = self.captions[self.numbers[i]]
        found = [self.coco.record(place) for place in places]  # each names its own line if broken
        record = {"caption": [one["caption"] for one in found], "image": found[0]["image"]}
        where = self.coco.annotations.where(places[0])
        images = tuple(find_pictures(record, self.images_dir, where))
        return caption_question(record, images, where, {}, self.suffix)


class EasyVQAData:
    """questions.json of easy-VQA (PyPI `easy-vqa`): [["is there a circle?", "yes", 0], ...], and
    images/0.png. In the folder above, answers.txt lists the words that are answers."""

    def __init__(self, file: Path, images_dir: Path, suffix: str):
        self.file, self.images_dir, self.suffix = file, images_dir, suffix
        self.entries = json.loads(file.read_text(encoding="utf-8"))
        listed = file.parent.parent / "answers.txt"
        self.answers = listed.read_text(encoding="utf-8").split() if listed.is_file() else None

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Question:
        i = range(len(self))[i]
        entry, where = self.entries[i], f"{self.file} entry {i + 1}"
        if not is_triple(entry):
            raise BadSample(where, f"the entry is {shown(entry)}; expected [question, answer, "
                                   "number of the picture]")
        question, answer, number = entry
        if self.answers is not None and answer not in self.answers:
            raise BadSample(where, f"the answer {shown(answer)} is none of those in answers.txt")
        images = (existing(self.images_dir, f"{number}.png", where),)
        tags = {"kind": "yes/no" if answer in YES_NO else "shape or colour"}
        return Question(ask(question, images, self.suffix), images, answer, where, tags)


def is_triple(entry) -> bool:
    return (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)
            and isinstance(entry[1], str) and type(entry[2]) is int)
