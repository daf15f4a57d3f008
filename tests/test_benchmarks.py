"""Claims: the published files of each benchmark are read as they are laid out; what is broken in
them is told with its place and hurts nothing else; nothing else passes for a benchmark."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import ConcatDataset

from dataset.images import load_image
from dataset.readers.bad_sample import BadSample, MissingImage
from evaluation.benchmark_options import options_in
from evaluation.benchmarks import open_benchmark
from evaluation.eval_samples import read_questions
from evaluation.metrics import METRICS
from tests.published_data import jpeg, save_pictures, write_json
from tests.tiny import COLOURS, make_data

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # of the datasets library


def stored(colour: str) -> dict:
    return {"bytes": jpeg(colour), "path": None}


def mmstar(directory):
    """mmstar.parquet: its columns and the way its questions are written."""
    question = ("Which option describe the colour of the image correctly?\nOptions: A: It is red., "
                "B: It is green., C: It is blue., D: It is white.")
    file = directory / "mmstar.parquet"
    pq.write_table(pa.table({
        "index": [0, 1, 2, 3], "question": [question] * 4,
        "image": pa.array([stored(colour) for colour in COLOURS], IMAGE),
        "answer": ["A", "B", "C", "X"],
        "category": ["coarse perception", "math", "math", "math"],
        "l2_category": ["image scene and topic", "geometry", "geometry", "geometry"],
        "meta_info": [{"source": "MMBench", "split": "val", "image_path": "images/0.jpg"}] * 4}),
        file, row_group_size=2)
    return file


def pope(directory, name="coco_pope_random.json"):
    pictures = save_pictures(directory / "val2014", "COCO_val2014_000000{}.jpg")
    lines = [{"question_id": i + 1, "image": picture,
              "text": "Is there a snowboard in the image?", "label": ("yes", "no")[i % 2]}
             for i, picture in enumerate(pictures)]
    file = directory / name
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def vqa(directory):
    """v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json."""
    (directory / "val2014").mkdir(parents=True)
    for number, colour in zip((42, 73), COLOURS):
        name = f"COCO_val2014_{number:012d}.jpg"
        (directory / "val2014" / name).write_bytes(jpeg(colour))
    about = {"info": {"year": 2017, "version": "2.0"}, "license": {"name": "CC BY 4.0"},
             "data_subtype": "val2014", "data_type": "mscoco"}
    questions = write_json(directory / "v2_OpenEnded_mscoco_val2014_questions.json", {
        **about, "task_type": "Open-Ended", "questions": [
            {"image_id": 42, "question": "What color is it?", "question_id": 42000},
            {"image_id": 73, "question": "Is it green?", "question_id": 73001},
            {"image_id": 73, "question": "Nobody answered?", "question_id": 73002}]})
    said = {73001: ("yes/no", ["yes"] * 9 + ["no"]), 42000: ("other", ["red"] * 4 + ["pink"] * 6)}
    annotations = write_json(directory / "v2_mscoco_val2014_annotations.json", {
        **about, "annotations": [
            {"question_type": "what", "multiple_choice_answer": "pink", "image_id": number // 1000,
             "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
                         for i, answer in enumerate(answers)],
             "answer_type": kind, "question_id": number}
            for number, (kind, answers) in said.items()]})
    return [questions, annotations]


def coco(directory):
    names = save_pictures(directory / "val2017", "000000{}.jpg")
    return write_json(directory / "annotations" / "captions_val2017.json", {
        "info": {"year": 2017}, "licenses": [],
        "images": [{"id": 9 + i, "file_name": name, "height": 18, "width": 20}
                   for i, name in enumerate(names[:2])],
        "annotations": [{"image_id": image, "id": i, "caption": f"A plain picture, {i}."}
                        for i, image in enumerate([10, 9, 10, 9, 9])]})


def easy_vqa(directory):
    """easy_vqa/data of the package: answers.txt, test/questions.json, test/images/0.png."""
    save_pictures(directory / "test" / "images", "{}.png")
    for number, colour in enumerate(COLOURS):
        (directory / "test" / "images" / f"{colour}.png").rename(
            directory / "test" / "images" / f"{number}.png")
    (directory / "answers.txt").write_text("\n".join(["circle", "red", "yes", "no", "blue"]))
    return write_json(directory / "test" / "questions.json", [
        ["what color is the shape?", "red", 0], ["is there a circle?", "no", 2],
        ["what color is it?", "mauve", 1], ["no image?", "yes", 77]])


def opened(files, images=None, **more):
    benchmark = open_benchmark(files if isinstance(files, list) else [files], images, **more)
    questions, bad = read_questions(benchmark.data)
    return benchmark.metric, questions, bad


def colours(questions):
    """What each question shows, seen through load_image."""
    near = {name: load_image(jpeg(name)).getpixel((9, 9)) for name in COLOURS}
    return [[next(name for name in near if load_image(i).getpixel((9, 9)) == near[name])
             for i in q.images] for q in questions]


# ---------------------------------------------------------------- one by one


def test_mmstar(tmp_path):
    metric, questions, bad = opened(mmstar(tmp_path))
    assert metric == "choice" and [q.truth for q in questions] == ["A", "B", "C"]
    first = questions[0]
    assert first.options == {"A": "It is red.", "B": "It is green.", "C": "It is blue.",
                             "D": "It is white."}
    text, = (m.content for m in first.messages)
    assert text.startswith("<image>\nWhich option describe")
    assert text.endswith(METRICS["choice"].suffix)
    assert first.tags == {"kind": "coarse perception"}
    assert colours(questions) == [["red"], ["green"], ["blue"]]
    assert colours(reversed(questions)) == [["blue"], ["green"], ["red"]]  # also backwards
    assert [b.where.rsplit(":")[-1] for b in bad] == ["4"] and "'X'" in str(bad[0])


def test_mmbench_and_scienceqa_as_parquet(tmp_path):
    file = tmp_path / "mmbench.parquet"
    pq.write_table(pa.table({
        "index": [241, 242], "question": ["Which is it?", "Which?"], "hint": ["Look well.", "nan"],
        "answer": ["B", "C"], "A": ["red", "cat"], "B": ["green", "dog"], "C": ["blue", "owl"],
        "D": ["nan", "ant"], "category": ["color", "what"],
        "image": pa.array([stored("green"), stored("red")], IMAGE)}), file)
    metric, questions, bad = opened(file, suffix="")
    assert metric == "choice" and not bad
    assert questions[0].messages[0].content == (
        "<image>\nLook well.\nWhich is it?\nA. red\nB. green\nC. blue")
    assert questions[1].options == {"A": "cat", "B": "dog", "C": "owl", "D": "ant"}
    file = tmp_path / "scienceqa.parquet"
    pq.write_table(pa.table({
        "image": pa.array([stored("white"), None], IMAGE), "question": ["Which?", "Without?"],
        "choices": [["West Virginia", "Oregon"], ["yes", "no", "perhaps"]],
        "answer": pa.array([1, 2], pa.int8()), "hint": ["", "A hint."]}), file)
    metric, questions, bad = opened(file, suffix="")
    assert (metric, bad, [q.truth for q in questions]) == ("choice", [], ["B", "C"])
    assert questions[1].messages[0].content == "A hint.\nWithout?\nA. yes\nB. no\nC. perhaps"
    assert colours(questions) == [["white"], []]


def test_pope(tmp_path):
    file = pope(tmp_path)
    metric, questions, bad = opened(file, tmp_path / "val2014")
    assert metric == "yesno" and not bad
    assert [q.truth for q in questions] == ["yes", "no", "yes", "no"]
    assert questions[1].messages[0].content == (
        "<image>\nIs there a snowboard in the image?\n" + METRICS["yesno"].suffix)
    assert questions[1].where == f"{file}:2" and colours(questions)[:2] == [["red"], ["green"]]


def test_pope_as_parquet_knows_which_rows_show_the_same_picture(tmp_path):
    file = tmp_path / "test-00000-of-00003.parquet"
    pq.write_table(pa.table({
        "id": list("012"), "question_id": list("123"), "question": ["Is there a dog?"] * 3,
        "answer": ["yes", "no", "yes"], "image_source": ["COCO_val2014_000000310196"] * 3,
        "image": pa.array([stored("red"), stored("red"), stored("blue")], IMAGE),
        "category": ["adversarial", "popular", "random"]}), file)
    metric, questions, _ = opened(file)
    assert metric == "yesno" and questions[2].tags == {"kind": "random"}
    assert questions[0].images == questions[1].images != questions[2].images
    assert str(questions[1].images[0]) == f"{file}:2"


def test_vqa(tmp_path):
    files = vqa(tmp_path)
    for given in (files, files[::-1]):
        metric, questions, bad = opened(given, tmp_path / "val2014")
        assert metric == "vqa" and [q.truth for q in questions] == ["pink", "yes"]
        assert questions[0].references == ("red",) * 4 + ("pink",) * 6
        assert questions[1].tags == {"kind": "yes/no"}
        assert colours(questions) == [["red"], ["green"]]
        assert len(bad) == 1 and "73002" in str(bad[0]) and "no annotation" in str(bad[0])
    for part in files:
        with pytest.raises(ValueError, match="expected two files, the questions and their"):
            open_benchmark([part])


def test_vqa_as_parquet(tmp_path):
    file = tmp_path / "validation-00000-of-00068.parquet"
    answers = [[{"answer": text, "answer_confidence": "yes", "answer_id": i + 1}
                for i, text in enumerate(["two"] * 10)]]
    pq.write_table(pa.table({
        "question_type": ["how many"], "multiple_choice_answer": ["two"], "answers": answers,
        "image_id": [262148], "answer_type": ["number"], "question_id": [262148000],
        "question": ["How many?"], "image": pa.array([stored("red")], IMAGE)}), file)
    metric, (question,), _ = opened(file)
    assert metric == "vqa" and question.references == ("two",) * 10
    assert question.tags == {"kind": "number"} and colours([question]) == [["red"]]


def test_coco_captions_of_one_picture_belong_together(tmp_path):
    metric, questions, bad = opened(coco(tmp_path), tmp_path / "val2017")
    assert metric == "caption" and not bad
    assert [q.references for q in questions] == [
        ("A plain picture, 0.", "A plain picture, 2."),
        ("A plain picture, 1.", "A plain picture, 3.", "A plain picture, 4.")]
    assert questions[0].messages[0].content == "<image>\nDescribe this picture in one sentence."
    assert colours(questions) == [["green"], ["red"]]


def test_captions_in_one_record_and_in_chinese(tmp_path):
    names = save_pictures(tmp_path, "{}8f0c.jpg")
    file = write_json(tmp_path / "caption_validation_annotations_20170910.json", [
        {"url": "http://m4.biz.itc.cn/pic", "image_id": name, "caption": ["一个平面", "一面墙\n"]}
        for name in names])
    metric, questions, bad = opened(file)
    assert metric == "caption" and not bad and len(questions) == 4
    assert questions[0].references == ("一个平面", "一面墙")
    assert questions[0].messages[0].content == "<image>\n请用一句话描述这张图片。"


def test_easy_vqa(tmp_path):
    file = easy_vqa(tmp_path)
    for images in (None, tmp_path / "test" / "images"):
        metric, questions, bad = opened(file, images)
        assert metric == "exact" and [q.truth for q in questions] == ["red", "no"]
        assert questions[0].messages[0].content == "<image>\nwhat color is the shape?"
        assert [q.tags["kind"] for q in questions] == ["shape or colour", "yes/no"]
        assert colours(questions) == [["red"], ["blue"]]
        assert [b.where for b in bad] == [f"{file} entry 3", f"{file} entry 4"]
        assert "mauve" in str(bad[0]) and isinstance(bad[1], MissingImage)


# ---------------------------------------------------------------- together, and broken


def test_several_files_are_one_benchmark(tmp_path):
    files = [pope(tmp_path, f"coco_pope_{name}.json") for name in ("random", "popular")]
    benchmark = open_benchmark(files, tmp_path / "val2014")
    assert isinstance(benchmark.data, ConcatDataset) and len(benchmark.data) == 8
    assert [benchmark.data[i].where for i in (3, 4)] == [f"{files[0]}:4", f"{files[1]}:1"]
    with pytest.raises(IndexError):
        benchmark.data[8]
    with pytest.raises(ValueError, match="unlike ways.*by yesno.*by choice"):
        open_benchmark([files[0], mmstar(tmp_path)])


def test_broken_lines_are_told_and_the_others_read(tmp_path):
    file = pope(tmp_path)
    good = file.read_text().splitlines()
    lines = ["{broken", good[0], '{"text": 3, "label": "no"}', '["a list"]',
             good[1].replace("COCO", "../COCO"), good[2].replace('"yes"', "null"),
             json.dumps({"text": "half \ud83d", "label": "no", "image": "x"}), good[3]]
    file.write_text("\n".join(lines) + "\n")
    metric, questions, bad = opened(file, tmp_path / "val2014")
    assert metric == "yesno" and [q.where for q in questions] == [f"{file}:2", f"{file}:8"]
    assert [b.where for b in bad] == [f"{file}:{n}" for n in (1, 3, 4, 5, 6, 7)]


@pytest.mark.parametrize("record", [
    {"question": "?", "answers": "yes"}, {"question": "?", "answers": [3]},
    {"question": "?", "answers": []}, {"question": "?", "choices": ["a", 3], "answer": 0},
    {"question": "?", "choices": ["a", "b"], "answer": 2},
    {"question": "?", "choices": ["a", "b"], "answer": None},
    {"question": ["?"], "answer": "yes"}, {"question": " ", "answer": "yes"},
    {"caption": []}, {"caption": ["", "x"]}, {"caption": "text", "image": 5},
    {"caption": "no image"}])
def test_records_that_cannot_be_questions(tmp_path, record):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(record) + "\n")
    benchmark = open_benchmark([file])
    with pytest.raises(BadSample, match="data.jsonl:1: "):
        benchmark.data[0]


def test_what_is_no_benchmark_is_left_to_the_other_formats(tmp_path):
    assert open_benchmark([make_data(tmp_path)]) is None
    for name, text in (("a.json", "[]"), ("b.json", "{"), ("c.json", "[[1, 2]]"), ("d", "PAR1"),
                       ("e.json", '{"annotations": [{"bbox": [1]}]}'), ("f.json", "")):
        (tmp_path / name).write_text(text)
        assert open_benchmark([tmp_path / name]) is None, name
    assert open_benchmark([tmp_path / "none.json"]) is None


@pytest.mark.parametrize(("question", "options"), [
    ("What?\nOptions: A: red, B: blue", {"A": "red", "B": "blue"}),
    ("Pick: (A) one (B) two, or three", {"A": "one", "B": "two, or three"}),
    ("Which?\nA. a cat\nB. a dog\nC. it is B. Brown", {"A": "a cat", "B": "a dog",
                                                     "C": "it is B. Brown"}),
    ("Point A: where is it?", {}), ("Is it vitamin C. or B. ?", {}), ("", {})])
def test_options_in_a_question(question, options):
    assert options_in(question) == options
