"""The published files of benchmarks -> questions, as their authors lay them out.

    files -> open_benchmark -> Benchmark(metric, data), data[i] -> Question     -> evaluation/run.py

    benchmark       file                           how it is recognized                  metric
    MMStar          mmstar.parquet                 question with "Options:", answer      choice
    MMBench         Parquet                        question, answer, A, B, ...           choice
    ScienceQA       Parquet                        question, choices, answer (a number)  choice
    POPE            coco_pope_*.json, one a line   text, label                           yesno
    POPE            Parquet of lmms-lab            question, answer "yes" or "no"        yesno
    VQAv2           *_questions.json, and with it  {"questions": [...]}                  vqa
                    *_annotations.json             {"annotations": [{"answers": ...}]}
    VQAv2           Parquet of lmms-lab            question, answers                     vqa
    COCO            captions_*.json                images, annotations                   caption
    AI Challenger   one record an image            caption                               caption
    easy-VQA        questions.json                 [[question, answer, image], ...]      exact

The content of a file decides, not its name. Whatever else there is, is no benchmark, and formats.py
reads it. An image is looked up in --image_folder by the name that the file gives; one inside a
Parquet file is read again when its question is asked, so that no benchmark's images are held in
memory.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from torch.utils.data import ConcatDataset

from dataset.readers.bad_sample import BadSample, shown
from dataset.readers.formats import open_data
from dataset.readers.json_files import CocoData, JsonStreamReader, RecordIndex, is_id, walk_object
from dataset.readers.parquet import UNREADABLE, ParquetData
from dataset.readers.record_images import IMAGE_KEYS, find_images, image_path
from evaluation.benchmark_records import LETTERS, YES_NO, ask, metric_of, question_of, tags_of
from evaluation.eval_samples import Question
from evaluation.metrics import METRICS

COLUMNS = ("question", "text", "caption", "answer", "answers", "label", "choices", "hint",
           "category", "answer_type", *IMAGE_KEYS, *LETTERS)  # of a Parquet file


@dataclass(frozen=True)
class Benchmark:
    metric: str  # how its authors score it, one of evaluation/metrics.py
    data: object  # len() and [i] -> Question, which raises BadSample


def open_benchmark(files: list, images_dir=None, suffix: str | None = None) -> Benchmark | None:
    """Files of one benchmark -> its questions and metric; None: they are not a benchmark's.

    images_dir: where image names start from; None: where each file lies, for easy-VQA the folder
    `images` beside it. suffix: said behind every question; None: the usual words for its metric.
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
                       images_dir, METRICS["vqa"].suffix if suffix is None else suffix)
        return Benchmark("vqa", data)
    if len(set(kinds)) > 1:
        each = ", ".join(f"{file} by {kind or 'exact'}" for file, kind in zip(files, kinds))
        raise ValueError(f"files that are scored in unlike ways: {each}; score them one by one")
    kind = kinds[0]
    metric = {"coco": "caption", "easy-vqa": "exact"}.get(kind, kind)
    suffix = METRICS[metric].suffix if suffix is None else suffix
    open_one = {"coco": CaptionData, "easy-vqa": EasyVQAData}.get(kind, partial(Records, metric))
    parts = [open_one(file, images_dir, suffix) for file in files]
    return Benchmark(metric, parts[0] if len(parts) == 1 else ConcatDataset(parts))


# ---------------------------------------------------------------- which benchmark


def kind_of(file: Path) -> str | None:
    """-> a metric for a file of records, or "coco", "questions", "annotations", "easy-vqa"; None
    for what is no benchmark, or cannot be read: formats.py says why."""
    if not file.is_file():
        return None
    try:
        if is_parquet(file):
            return kind_of_parquet(file)
        with JsonStreamReader(file) as walk:
            bracket = walk.peek()
            first = next(walk.entries(), ({},))[0] if bracket == "[" else None
        if bracket == "{":
            return kind_of_object(file)
        if isinstance(first, list):
            return "easy-vqa" if is_triple(first) else None
        return metric_of(first) if isinstance(first, dict) else None
    except UNREADABLE:
        return None


def is_parquet(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(4) == b"PAR1"


def kind_of_parquet(file: Path) -> str | None:
    if metric_of(dict.fromkeys(pq.read_schema(file).names)) is None:
        return None
    rows = ParquetData(file, file.parent, COLUMNS)
    for i in range(len(rows)):
        with suppress(BadSample):  # reported later, with its line
            return metric_of(rows.record(i))
    return None


def kind_of_object(file: Path) -> str | None:
    """A file that begins with an object: one of VQA's or COCO's, or JSON Lines."""
    try:
        for key, value, *_ in walk_object(file):
            if key == "questions" and isinstance(value, dict):
                return "questions"
            if key == "annotations" and isinstance(value, dict):
                return ("annotations" if "answers" in value else
                        "coco" if "caption" in value else None)
    except ValueError:  # a broken first line of JSON Lines; the next may decide
        pass
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        for line in islice(lines, 100):
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict):
                    return metric_of(record)
    return None


# ---------------------------------------------------------------- one record a question


class Records:
    """Every record of a file, JSON or Parquet, is one question."""

    def __init__(self, metric: str, file: Path, images_dir, suffix: str):
        self.metric, self.file, self.suffix = metric, file, suffix
        self.images_dir, self.parquet = Path(images_dir or file.parent), is_parquet(file)
        if self.parquet:
            self.rows = ParquetData(file, self.images_dir, COLUMNS)
            self.read = self.rows.record
        else:
            self.rows = open_data(file, self.images_dir).records
            self.read = self.rows.read

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, i: int) -> str:
        return f"{self.file}:{i + 1}" if self.parquet else self.rows.where(i)

    def __getitem__(self, i: int) -> Question:
        i = range(len(self))[i]
        record, where = self.read(i), self.where(i)
        images = find_images(record, self.images_dir, where)
        if self.parquet:
            images = [StoredImage(fingerprint(image), self, i, n, getattr(image, "name", None))
                      for n, image in enumerate(images)]
        return question_of(self.metric, record, tuple(images), where, tags_of(record), self.suffix)


@dataclass(frozen=True)
class StoredImage:
    """An image inside a Parquet file, read when it is called. Two with the same bytes are equal:
    many benchmarks ask several questions about one image, and repeat it in each row."""

    fingerprint: str
    records: Records = field(compare=False)
    row: int = field(compare=False)
    number: int = field(compare=False)
    name: str | None = field(default=None, compare=False)  # of its file; None: the bytes lie here

    def __call__(self):
        record = self.records.read(self.row)
        return find_images(record, self.records.images_dir, str(self))[self.number]

    def __str__(self) -> str:
        return self.records.where(self.row)


def fingerprint(image) -> str:
    return hashlib.sha256(image if isinstance(image, bytes) else str(image).encode()).hexdigest()


# ---------------------------------------------------------------- layouts of their own


class VQAData:
    """VQA's two files, joined by question_id; {"data_subtype": "val2014"} names the images."""

    def __init__(self, questions: Path, annotations: Path, images_dir, suffix: str):
        self.images_dir, self.suffix = Path(images_dir or questions.parent), suffix
        self.questions, self.subtype = RecordIndex(questions), None
        for key, value, *piece in walk_object(questions):
            if key == "questions":
                self.questions.append(*piece)
            elif key == "data_subtype":
                self.subtype = value
        if not isinstance(self.subtype, str):
            raise ValueError(f"{questions} has no 'data_subtype' (such as \"val2014\"), which is "
                             "a part of the names of the images")
        self.annotations, self.by_id = RecordIndex(annotations), {}  # {question_id: index}
        for key, value, *piece in walk_object(annotations):
            if key == "annotations":
                number = value.get("question_id") if isinstance(value, dict) else None
                self.by_id[number if is_id(number) else None] = len(self.annotations)
                self.annotations.append(*piece)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, i: int) -> Question:
        i = range(len(self))[i]
        record, where = self.questions.read(i), self.questions.where(i)
        number, image = record.get("question_id"), record.get("image_id")
        if not is_id(number) or number not in self.by_id:
            raise BadSample(where, f"question_id {shown(number)} has no annotation in "
                                   f"{self.annotations.file}")
        if not is_id(image):
            raise BadSample(where, f"image_id is {shown(image)}; expected a number")
        annotation = self.annotations.read(self.by_id[number])
        images = (image_path(self.images_dir, f"COCO_{self.subtype}_{image:012d}.jpg", where),)
        return question_of("vqa", {**annotation, **record}, images, where, tags_of(annotation),
                           self.suffix)


class CaptionData:
    """COCO captions, one question an image: all its captions are references."""

    def __init__(self, file: Path, images_dir, suffix: str):
        self.suffix = suffix
        self.coco = CocoData(file, Path(images_dir or file.parent))
        # Training has no use for the images' ids, so CocoData does not keep them: a second walk.
        annotations = (value for key, value, *_ in walk_object(file) if key == "annotations")
        by_image = {}  # {image_id: indices of its annotations}
        for index, value in enumerate(annotations):
            number = value.get("image_id") if isinstance(value, dict) else None
            by_image.setdefault(number if is_id(number) else None, []).append(index)
        self.captions = list(by_image.values())

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> Question:
        indices = self.captions[i]
        records = [self.coco.record(index) for index in indices]  # a broken one names its own line
        record = {"caption": [r["caption"] for r in records], "image": records[0]["image"]}
        where = self.coco.annotations.where(indices[0])
        images = tuple(find_images(record, self.coco.images_dir, where))
        return question_of("caption", record, images, where, {}, self.suffix)


class EasyVQAData:
    """questions.json of easy-VQA (PyPI `easy-vqa`): [["is there a circle?", "yes", 0], ...], and
    images/0.png. In the folder above, answers.txt lists the words that are answers."""

    def __init__(self, file: Path, images_dir, suffix: str):
        self.file, self.suffix = file, suffix
        self.images_dir = Path(images_dir or file.parent / "images")
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
                                   "number of the image]")
        question, answer, number = entry
        if self.answers is not None and answer not in self.answers:
            raise BadSample(where, f"the answer {shown(answer)} is none of those in answers.txt")
        images = (image_path(self.images_dir, f"{number}.png", where),)
        tags = {"kind": "yes/no" if answer in YES_NO else "shape or colour"}
        return Question(ask(question, images, self.suffix), images, answer, where, tags)


def is_triple(entry) -> bool:
    return (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)
            and isinstance(entry[1], str) and type(entry[2]) is int)
