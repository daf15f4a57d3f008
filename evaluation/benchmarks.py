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
reads it. An image inside a Parquet file is read again when its question is asked, so that no
benchmark's images are held in memory.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from torch.utils.data import ConcatDataset

from dataset.readers.bad_sample import BadSample, shown
from dataset.readers.formats import open_data
from dataset.readers.json_files import CocoData, JsonStreamReader, RecordIndex, is_id, walk_object
from dataset.readers.parquet import UNREADABLE, ParquetData
from dataset.readers.record_images import IMAGE_KEYS, ImageFolder, find_images
from evaluation.benchmark_records import LETTERS, YES_NO, metric_of, question_of
from evaluation.eval_samples import Question
from evaluation.metrics import METRICS

COLUMNS = ("question", "text", "caption", "answer", "answers", "label", "choices", "hint",
           "category", "answer_type", *IMAGE_KEYS, *LETTERS)  # of a Parquet file


@dataclass(frozen=True)
class Benchmark:
    metric: str  # how its authors score it, one of evaluation/metrics.py
    data: object  # len() and [i] -> Question, which raises BadSample


def open_benchmark(files: list, images_dir=None, suffix: str | None = None,
                   follow_links: bool = False) -> Benchmark | None:
    """Files of one benchmark -> its questions and metric; None: they are not a benchmark's.

    images_dir: where image names start from; None: where each file lies, for easy-VQA the folder
    `images` beside it. suffix: said behind every question; None: the usual words for its metric.
    Raises ValueError for files that cannot be scored together.
    """
    files = [Path(file) for file in files]
    kinds = [kind_of(file) for file in files]
    if not any(kinds):
        return None
    of_kind = dict(zip(kinds, files))
    if of_kind.keys() & {"questions", "annotations"}:
        if of_kind.keys() != {"questions", "annotations"} or len(files) != 2:
            raise ValueError(f"{files[0]} is a part of VQA: expected two files, the questions and "
                             "their annotations (v2_OpenEnded_..._questions.json and "
                             "v2_..._annotations.json); the answers of its test split are not "
                             "published")
        metric, parts = "vqa", [open_vqa(of_kind["questions"], of_kind["annotations"])]
    elif len(of_kind) > 1:
        each = ", ".join(f"{file} by {kind or 'exact'}" for file, kind in zip(files, kinds))
        raise ValueError(f"files that are scored in unlike ways: {each}; score them one by one")
    else:
        metric = {"coco": "caption", "easy-vqa": "exact"}.get(kinds[0], kinds[0])
        open_one = {"coco": open_captions, "easy-vqa": open_easy_vqa}.get(kinds[0], open_records)
        parts = list(map(open_one, files))
    suffix = METRICS[metric].suffix if suffix is None else suffix
    folders = [Path(images_dir or file.parent / ("images" if kinds == ["easy-vqa"] else ""))
               for file in files]
    questions = [Questions(*part, metric, suffix, ImageFolder(folder, follow_links))
                 for part, folder in zip(parts, folders)]
    return Benchmark(metric, questions[0] if len(parts) == 1 else ConcatDataset(questions))


@dataclass(frozen=True)
class Questions:
    """len() and [i] -> Question, made of the i-th record."""

    count: int
    read: Callable  # i -> record; raises BadSample
    where: Callable  # i -> "file:line"
    metric: str
    suffix: str
    images_dir: ImageFolder

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Question:
        i = range(len(self))[i]
        record, where = self.read(i), self.where(i)
        images = [StoredImage(hashlib.sha256(image).hexdigest(), self, i, n)
                  if isinstance(image, bytes) else image
                  for n, image in enumerate(find_images(record, self.images_dir, where))]
        return question_of(self.metric, record, tuple(images), where, self.suffix)


@dataclass(frozen=True)
class StoredImage:
    """An image inside a Parquet file, read when it is called. Two with the same bytes are equal:
    many benchmarks ask several questions about one image, and repeat it in each row."""

    fingerprint: str
    questions: Questions = field(compare=False)
    row: int = field(compare=False)
    number: int = field(compare=False)

    def __call__(self) -> bytes:
        record = self.questions.read(self.row)
        return find_images(record, self.questions.images_dir, str(self))[self.number]

    def __str__(self) -> str:
        return self.questions.where(self.row)


# ---------------------------------------------------------------- which benchmark


def kind_of(file: Path) -> str | None:
    """-> a metric for a file of records, or "coco", "questions", "annotations", "easy-vqa"; None
    for what is no benchmark, or cannot be read: formats.py says why."""
    if not file.is_file():
        return None
    with suppress(*UNREADABLE):
        if is_parquet(file):
            return kind_of_parquet(file)
        with JsonStreamReader(file) as walk:
            if walk.peek() == "[":
                first, *_ = next(walk.entries(), (None,))
                return "easy-vqa" if is_triple(first) else metric_of(first)
        with suppress(ValueError):  # a broken first line of JSON Lines; the next may decide
            for key, value, *_ in walk_object(file):
                if key == "questions" and isinstance(value, dict):
                    return "questions"
                if key == "annotations" and isinstance(value, dict):
                    return ("annotations" if "answers" in value else
                            "coco" if "caption" in value else None)
        with open(file, encoding="utf-8-sig", errors="replace") as lines:
            for line in islice(lines, 100):
                with suppress(ValueError, RecursionError):
                    record = json.loads(line)
                    if isinstance(record, dict):
                        return metric_of(record)
    return None


def is_parquet(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(4) == b"PAR1"


def kind_of_parquet(file: Path) -> str | None:
    if metric_of(dict.fromkeys(pq.read_schema(file).names)) is None:
        return None
    count, read, _ = open_records(file)
    for i in range(count):
        with suppress(BadSample):  # reported later, with its line
            return metric_of(read(i))
    return None


# ---------------------------------------------------------------- the layouts: count, read, where


def open_records(file: Path) -> tuple:
    """Every record of a file, JSON or Parquet, is one question."""
    if is_parquet(file):
        rows = ParquetData(file, file.parent, COLUMNS)
        return len(rows), rows.record, lambda i: f"{file}:{i + 1}"
    records = open_data(file).records
    return len(records), records.read, records.where


def open_vqa(questions_file: Path, annotations_file: Path) -> tuple:
    """VQA's two files, joined by question_id; {"data_subtype": "val2014"} names the images."""
    questions, _, about = index_array(questions_file, "questions", "question_id")
    annotations, ids, _ = index_array(annotations_file, "annotations", "question_id")
    by_id, subtype = {id: i for i, id in enumerate(ids)}, about.get("data_subtype")
    if not isinstance(subtype, str):
        raise ValueError(f"{questions_file} has no 'data_subtype' (such as \"val2014\"), which is "
                         "a part of the names of the images")

    def read(i: int) -> dict:
        question, where = questions.read(i), questions.where(i)
        number, image = question.get("question_id"), question.get("image_id")
        if not is_id(number) or number not in by_id:
            raise BadSample(where, f"question_id {shown(number)} has no annotation in "
                                   f"{annotations_file}")
        if not is_id(image):
            raise BadSample(where, f"image_id is {shown(image)}; expected a number")
        return {**annotations.read(by_id[number]), **question,
                "image": [f"COCO_{subtype}_{image:012d}.jpg"]}

    return len(questions), read, questions.where


def open_captions(file: Path) -> tuple:
    """COCO captions, one question an image: all its captions are references."""
    coco, by_image = CocoData(file, file.parent), {}  # {image_id: indices of its annotations}
    # Training has no use for the images' ids, so CocoData does not keep them: a second walk.
    for index, id in enumerate(index_array(file, "annotations", "image_id")[1]):
        by_image.setdefault(id, []).append(index)
    captions = list(by_image.values())

    def read(i: int) -> dict:
        records = list(map(coco.record, captions[i]))  # a broken one names its own line
        return {**records[0], "caption": [record["caption"] for record in records]}

    return len(captions), read, lambda i: coco.annotations.where(captions[i][0])


def index_array(file: Path, name: str, id_name: str) -> tuple[RecordIndex, list, dict]:
    """An array of the object in a file -> its index, each entry's id or None, and what stands
    beside the array."""
    records, ids, beside = RecordIndex(file), [], {}
    for key, value, *piece in walk_object(file):
        if key == name:
            records.append(*piece)
            number = value.get(id_name) if isinstance(value, dict) else None
            ids.append(number if is_id(number) else None)
        else:
            beside[key] = value
    return records, ids, beside


def open_easy_vqa(file: Path) -> tuple:
    """questions.json of easy-VQA (PyPI `easy-vqa`): [["is there a circle?", "yes", 0], ...], and
    images/0.png. In the folder above, answers.txt lists the words that are answers."""
    entries = json.loads(file.read_text(encoding="utf-8"))
    listed = file.parent.parent / "answers.txt"
    answers = listed.read_text(encoding="utf-8").split() if listed.is_file() else None

    def where(i: int) -> str:
        return f"{file} entry {i + 1}"

    def read(i: int) -> dict:
        if not is_triple(entries[i]):
            raise BadSample(where(i), f"the entry is {shown(entries[i])}; expected [question, "
                                      "answer, number of the image]")
        question, answer, number = entries[i]
        if answers is not None and answer not in answers:
            raise BadSample(where(i), f"the answer {shown(answer)} is none of those in answers.txt")
        return {"question": question, "answer": answer, "image": [f"{number}.png"],
                "category": "yes/no" if answer in YES_NO else "shape or colour"}

    return len(entries), read, where


def is_triple(entry) -> bool:
    return (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)
            and isinstance(entry[1], str) and type(entry[2]) is int)
