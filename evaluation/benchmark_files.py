"""The layouts of benchmarks' files -> their records: how many there are, one of them, where it is.

    a file -> open_records, open_vqa, open_captions, open_easy_vqa -> count, read, where

read(i) -> a dict, or BadSample; where(i) -> "file:line".
"""

import json
from contextlib import suppress
from pathlib import Path

from dataset.readers.bad_sample import BadSample, shown
from dataset.readers.formats import open_data
from dataset.readers.json_files import CocoData, JsonStreamReader, RecordIndex, is_id, walk_object
from dataset.readers.parquet import ParquetData
from dataset.readers.record_images import IMAGE_KEYS
from evaluation.benchmark_options import LETTERS, LISTS
from evaluation.benchmark_records import ANSWERS, NAMES, YES_NO

# Columns of a Parquet file: those that tell how it is scored, and all that are read.
DECIDING = (*LISTS, *ANSWERS, "question", "answers", "type")
COLUMNS = (*DECIDING, "query", "text", "caption", "label", "hint", "category", "answer_type",
           "data_type", *NAMES, *IMAGE_KEYS, *LETTERS)
# The arrays of files that are one object, and what their entries have one of.
ENTRIES = {"questions": {"question"}, "data": {"question"},
           "annotations": {"answers", "caption", "image_id"}}



def open_records(file: Path) -> tuple:
    """Every record of a file, JSON or Parquet, is one question."""
    if is_parquet(file):
        rows = ParquetData(file, file.parent, COLUMNS)
        return len(rows), rows.record, lambda i: f"{file}:{i + 1}"
    name, _ = first_entry(file)
    if name is None:
        records = open_data(file).records
    else:  # {"data": [...]}, or {id: record, ...} as GQA and ScienceQA have it
        records = RecordIndex(file)
        for key, _, *piece in walk_object(file):
            if key == name or name not in ENTRIES:
                records.append(*piece)
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


# ---------------------------------------------------------------- what a file is


def is_parquet(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(4) == b"PAR1"


def first_entry(file: Path) -> tuple[str | None, dict]:
    """Of a file that is one object of records: the key of its first record, and that record."""
    with suppress(ValueError):  # a broken first line of JSON Lines; the next may decide
        with JsonStreamReader(file) as walk:
            if walk.peek() != "{":
                return None, {}
        for key, value, *_ in walk_object(file):
            expected = ENTRIES.get(key, {})
            if isinstance(value, dict) and (expected & value.keys() or is_whole(value)):
                return key, value
    return None, {}


def is_whole(record: dict) -> bool:
    return isinstance(record.get("question"), str) and not record.keys().isdisjoint(
        ("answer", "answers", "choices"))
