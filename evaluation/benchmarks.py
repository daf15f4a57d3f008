"""The published files of benchmarks -> questions, as their authors lay them out.

    files -> open_benchmark -> Benchmark(metric, data), data[i] -> Question     -> evaluation/run.py

    benchmark       file                           how it is recognized                  metric
    MMStar          mmstar.parquet                 question with "Options:", answer      choice
    MMBench         Parquet                        question, answer, A, B, ...           choice
    SEED-Bench      Parquet; SEED-Bench.json       question, answer, choice_a, ...       choice
    ScienceQA       Parquet                        question, choices, answer (an index)  choice
    AI2D, MMMU      Parquet                        question, options, answer             choice
    POPE            coco_pope_*.json, one a line   text, label                           yesno
    POPE            Parquet of lmms-lab            question, answer "yes" or "no"        yesno
    VQAv2           *_questions.json, and with it  {"questions": [...]}                  vqa
                    *_annotations.json             {"annotations": [{"answers": ...}]}
    VQAv2, TextVQA  Parquet of lmms-lab            question, ten answers each            vqa
    DocVQA, InfoVQA Parquet; {"data": [...]}       questionId, question, answers         anls
    ChartQA         Parquet; test_human.json       imgname, query, label; or its types   relaxed
    GQA             Parquet; *_questions.json      question, answer, fullAnswer          gqa
    COCO            captions_*.json                images, annotations                   caption
    AI Challenger   one record an image            caption                               caption
    easy-VQA        questions.json                 [[question, answer, image], ...]      exact
    your own        any                            question, answer or answers           exact

The content of a file decides, all its records, not its name. Other files with questions are
refused; whatever else there is, is no benchmark, and formats.py reads it. An image inside a Parquet
file is read again when its question is asked, so that no benchmark's images are held in memory.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from torch.utils.data import ConcatDataset

from dataset.readers.bad_sample import BadSample
from dataset.readers.json_files import JsonStreamReader
from dataset.readers.parquet import UNREADABLE
from dataset.readers.record_images import ImageFolder, find_images
from evaluation.benchmark_files import (
    DECIDING,
    first_entry,
    is_parquet,
    is_triple,
    is_whole,
    open_captions,
    open_easy_vqa,
    open_records,
    open_vqa,
)
from evaluation.benchmark_options import COLUMN
from evaluation.benchmark_records import layout_of, question_of, with_images
from evaluation.eval_samples import Question
from evaluation.metrics import METRICS


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
    kinds, styles = zip(*map(kind_of, files)) if files else ((), ())
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
    folders = [Path(images_dir or file.parent / ("images" if kinds == ("easy-vqa",) else ""))
               for file in files]
    questions = [Questions(*part, metric, suffix, ImageFolder(folder, follow_links), style)
                 for part, folder, style in zip(parts, folders, styles)]
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
    style: str = "letter"  # how the answers of a choice name their options

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Question:
        i = range(len(self))[i]
        where = self.where(i)
        record, numbers, images = self.images(i)
        images = [StoredImage(hashlib.sha256(image).hexdigest(), self, i, n)
                  if isinstance(image, bytes) else image for n, image in enumerate(images)]
        images = dict(zip(numbers or range(1, len(images) + 1), images))
        return question_of(self.metric, record, images, where, self.suffix, self.style)

    def images(self, i: int) -> tuple[dict, list[int], list]:
        """-> record i as with_images gives it, the numbers of its images, paths and bytes"""
        where = self.where(i)
        record, numbers = with_images(self.read(i), self.images_dir, where)
        return record, numbers, find_images(record, self.images_dir, where)


@dataclass(frozen=True)
class StoredImage:
    """An image inside a Parquet file, read when it is called. Two with the same bytes are equal:
    many benchmarks ask several questions about one image, and repeat it in each row."""

    fingerprint: str
    questions: Questions = field(compare=False)
    row: int = field(compare=False)
    number: int = field(compare=False)

    def __call__(self) -> bytes:
        return self.questions.images(self.row)[2][self.number]

    def __str__(self) -> str:
        return self.questions.where(self.row)


# ---------------------------------------------------------------- which benchmark


def kind_of(file: Path) -> tuple[str | None, str]:
    """-> a metric for a file of records, or "coco", "questions", "annotations", "easy-vqa"; None
    for what is no benchmark, or cannot be read: formats.py says why. And the style of answers."""
    if not file.is_file():
        return None, ""
    with suppress(*UNREADABLE):
        if not is_parquet(file):
            with JsonStreamReader(file) as walk:
                if walk.peek() == "[" and is_triple(next(walk.entries(), (None,))[0]):
                    return "easy-vqa", ""
            name, entry = first_entry(file)
            if name == "annotations":
                return ("annotations" if "answers" in entry else
                        "coco" if "caption" in entry else None), ""
            if name == "questions" and not is_whole(entry):
                return "questions", ""
    try:
        return layout_of(list_records(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def list_records(file: Path):
    """Each record of a file that can be read; of Parquet without its images."""
    with suppress(*UNREADABLE):
        if not is_parquet(file):
            count, read, _ = open_records(file)
            for i in range(count):
                with suppress(BadSample):  # reported later, with its line
                    yield read(i)
            return
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            columns = [name for name in names if name in DECIDING or COLUMN.fullmatch(name)]
            for batch in parquet.iter_batches(1000, columns=columns, use_threads=False):
                yield from (dict.fromkeys(names) | row for row in batch.to_pylist())
