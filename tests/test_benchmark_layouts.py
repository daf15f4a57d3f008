"""Claims: a question is asked with its options and its image, wherever the published file or one's
own has them, and is scored by a rule that can be right; the whole file decides which, not its first
record; what cannot be scored is refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset.readers.bad_sample import BadSample, MissingImage
from evaluation.benchmark_options import options_in
from evaluation.benchmarks import open_benchmark
from evaluation.metrics import METRICS, chosen_letter, measure
from tests.published_data import jpeg, save_pictures, write_json
from tests.test_benchmarks import IMAGE, colours, opened, stored

RED = [stored("red")]


def parquet(directory, columns):
    file = directory / "test.parquet"
    pq.write_table(pa.table({key: pa.array(value, IMAGE) if isinstance(value[0], dict) and
                             "bytes" in value[0] else value for key, value in columns.items()}),
                   file)
    return file


def lines(directory, *records):
    file = directory / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def read_one(file, metric, images=None):
    """-> what is asked (without the words behind it), the truths, the options"""
    found, (question,), bad = opened(file, images)
    assert found == metric and not bad
    text = question.messages[0].content
    assert text.endswith(METRICS[metric].suffix)
    return text.removesuffix(METRICS[metric].suffix).strip("\n"), question


# ---------------------------------------------------------------- options in columns of their own


def test_ai2d(tmp_path):
    """The answer is an index as text. Where the options are numbers too, it still is one."""
    file = parquet(tmp_path, {
        "question": ["Which is a leaf?", "How many are there?"], "image": RED * 2,
        "options": [["root", "leaf", "stem", "B"], ["3", "2", "1", "0"]], "answer": ["1", "2"]})
    metric, questions, bad = opened(file, suffix="")
    assert metric == "choice" and not bad and [q.truth for q in questions] == ["B", "C"]
    assert questions[0].messages[0].content == (
        "<image>\nWhich is a leaf?\nA. root\nB. leaf\nC. stem\nD. B")
    assert questions[1].options == {"A": "3", "B": "2", "C": "1", "D": "0"}
    assert colours(questions) == [["red"], ["red"]]


def test_seed_bench_as_parquet(tmp_path):
    file = parquet(tmp_path, {
        "answer": ["B"], "choice_a": ["One"], "choice_b": ["Two"], "choice_c": ["Three"],
        "choice_d": ["Four"], "data_id": ["1_0"], "data_type": ["image"], "question_id": ["1"],
        "question": ["How many towels?"], "image": [RED], "segment": [[0]]})
    text, question = read_one(file, "choice")
    assert text == "<image>\nHow many towels?\nA. One\nB. Two\nC. Three\nD. Four"
    assert question.truth == "B" and colours([question]) == [["red"]]


def test_seed_bench_as_json(tmp_path):
    """Images by their id; a video's question, whose frames are not there, is not asked without."""
    record = {"answer": "A", "choice_a": "One", "choice_b": "Two", "choice_c": "3", "choice_d": "4",
              "data_type": "image", "question": "How many?", "question_type_id": 5}
    (tmp_path / "1_0").write_bytes(jpeg("blue"))
    file = write_json(tmp_path / "SEED-Bench.json", {
        "questions": [{**record, "data_id": "1_0", "question_id": "1"},
                      {**record, "data_id": "v.x", "data_type": "video", "question_id": "2"}],
        "question_type": {"Scene Understanding": 1}})
    metric, questions, bad = opened(file)
    assert metric == "choice" and colours(questions) == [["blue"]]
    assert len(bad) == 1 and "a question without an image" in str(bad[0])


def mmmu(directory, **more):
    columns = {"id": ["v_1"], "question": ["<image 1> What is it?"],
               "options": ["['cat', 'a dog']"], "explanation": [""], "image_1": RED,
               "img_type": ["['Photographs']"], "answer": ["B"], "subfield": ["s"],
               "question_type": ["multiple-choice"],
               **{f"image_{n}": pa.array([None], IMAGE) for n in range(2, 8)}}
    return parquet(directory, {**columns, **more})


def test_mmmu(tmp_path):
    text, question = read_one(mmmu(tmp_path), "choice")
    assert text == "<image> What is it?\nA. cat\nB. a dog"
    assert question.truth == "B" and colours([question]) == [["red"]]


def test_images_stand_where_the_text_calls_them(tmp_path):
    file = mmmu(tmp_path, question=["Which of <image 3> and <image 1>, <image 3>, is it?"],
                options=['["<image 2>", "none"]'], image_2=[stored("green")],
                image_3=[stored("blue")], image_4=[stored("white")])
    text, question = read_one(file, "choice")
    assert text == ("<image>\nWhich of <image> and <image>, image 3, is it?\nA. <image>\nB. none")
    assert colours([question]) == [["white", "blue", "red", "green"]]
    _, questions, bad = opened(mmmu(tmp_path, question=["See <image 2>."]))
    assert not questions and "<image 2>" in str(bad[0]) and "[1]" in str(bad[0])


def test_markers_without_a_number(tmp_path):
    save_pictures(tmp_path, "{}.png")
    both = {"images": ["red.png", "blue.png"]}
    for question, more, expected in (
            ("Is <image> it?", {"image": "red.png"}, "Is <image> it?\nA. x\nB. y"),
            ("Is <image> like <image>?", both, "Is <image> like <image>?\nA. x\nB. y"),
            ("<image>\nAre they?", both, "<image>\n<image>\nAre they?\nA. x\nB. y"),
            ("Which?", {**both, "options": ["<image>", "<image>"]},
             "Which?\nA. <image>\nB. <image>")):
        record = {"question": question, "options": ["x", "y"], "answer": "B", **more}
        text, asked = read_one(lines(tmp_path, record), "choice")
        assert text == expected and colours([asked]) == [["red", "blue"][:len(asked.images)]]
    _, questions, bad = opened(lines(tmp_path, *exact("no", question="<image><image> Same?",
                                                      image="red.png")))
    assert not questions and "2 <image> markers for 1 images" in str(bad[0])


def test_an_open_question_of_mmmu_is_refused(tmp_path):
    columns = pq.read_table(mmmu(tmp_path)).to_pydict()
    file = parquet(tmp_path, {**{key: value * 2 for key, value in columns.items()
                                 if key not in ("options", "answer", "image_1")
                                 and value != [None]},
                              "options": ["['cat', 'dog']", "[]"], "answer": ["A", "0.5"],
                              "image_1": RED * 2})
    metric, questions, bad = opened(file)
    assert metric == "choice" and [q.truth for q in questions] == ["A"]
    assert bad[0].where == f"{file}:2" and "no options" in bad[0].reason and "'options'" in str(bad)


def test_a_okvqa(tmp_path):
    """What is right stands in correct_choice_idx."""
    file = parquet(tmp_path, {
        "image": RED, "question_id": ["x"], "question": ["Which?"], "choices": [["net", "ball"]],
        "correct_choice_idx": [1], "direct_answers": ["['ball']"], "rationales": [["r"]]})
    assert read_one(file, "choice")[1].truth == "B"


FRUIT = {"question": "Which is a fruit?", "answer": "B"}
OPTIONS = [
    {"options": ["stone", "apple"]}, {"choices": ["stone", "apple"]},
    {"options": {"A": "stone", "B": "apple", "C": None}}, {"options": '["stone", "apple"]'},
    {"options": "['stone', 'apple']"}, {"options": "A. stone B. apple"},
    {"options": ["A. stone", "B. apple"]}, {"options": ["(A) stone", "(B) apple"]},
    {"options": ["stone", "apple", None]}, {"choices": {"label": ["A", "B"],
                                                        "text": ["stone", "apple"]}},
    {"A": "stone", "B": "apple"}, {"a": "stone", "b": "apple", "c": ""},
    {"choice_a": "stone", "choice_b": "apple"}, {"option_a": "stone", "option_b": "apple"},
    {"optionA": "stone", "optionB": "apple", "optionC": None}]


@pytest.mark.parametrize("form", ["lines", "array", "parquet"])
@pytest.mark.parametrize("more", OPTIONS, ids=str)
def test_options_of_ones_own(tmp_path, more, form):
    save_pictures(tmp_path, "{}.png")
    record = {**FRUIT, **more, "image": "red.png"}
    file = (parquet(tmp_path, {key: [value] for key, value in record.items()})
            if form == "parquet" else lines(tmp_path, record) if form == "lines"
            else write_json(tmp_path / "a.json", [record]))
    text, question = read_one(file, "choice")
    assert text == "<image>\nWhich is a fruit?\nA. stone\nB. apple"
    assert question.truth == "B" and question.options == {"A": "stone", "B": "apple"}


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "(b)", "B. apple", 1, "1", 1.0, "apple",
                                    " Apple "])
def test_an_answer_is_a_letter_an_index_or_a_text(tmp_path, answer):
    file = lines(tmp_path, {**FRUIT, "options": ["stone", "apple"], "answer": answer})
    assert read_one(file, "choice")[1].truth == "B"


@pytest.mark.parametrize("options", [
    ["stone", 3], [["stone"]], 4, {"stone": 1}, [str(n) for n in range(27)], "stone or apple",
    [True, False], {"label": ["A"], "text": ["stone", "apple"]}, {"label": [[]], "text": ["x"]},
    ["stone", None, "apple"], {"a": "stone", "A": "apple"}, "[" * 99999, {"A": {"bytes": "x"}}],
    ids=lambda value: str(value)[:30])
def test_options_that_cannot_be_read_are_named(tmp_path, options):
    benchmark = open_benchmark([lines(tmp_path, {**FRUIT, "options": options})])
    with pytest.raises(BadSample, match="data.jsonl:1: the options in 'options' are"):
        benchmark.data[0]


def test_options_that_the_question_has_too_are_said_once(tmp_path):
    question = "Which?\n(A) stone\n(B) apple"
    for more in ({"options": ["stone", "apple"]}, {"A": "stone", "B": "apple"}):
        record = {**FRUIT, "question": question, **more}
        assert read_one(lines(tmp_path, record), "choice")[0] == question
    for text in (question.replace("stone", "a stone"), "Which?"):
        record = {**FRUIT, "question": text, "options": ["stone", "apple"]}
        assert read_one(lines(tmp_path, record), "choice")[0] == text + "\nA. stone\nB. apple"


def test_none_of_many_options_is_left_out(tmp_path):
    texts = [f"text {n}" for n in range(26)]
    _, question = read_one(lines(tmp_path, {**FRUIT, "options": texts, "answer": "Z"}), "choice")
    assert list(question.options.values()) == texts and question.truth == "Z"


# ---------------------------------------------------------------- the file decides


def test_all_answers_of_a_file_name_their_option_in_one_way(tmp_path):
    """"1" is the text of an option in the first record, and an index in both."""
    for answers, truths in ((["1", "0"], "BA"), (["A", "B"], "AB"), (["1", "stone"], "AA")):
        file = lines(tmp_path, *[{"question": "?", "options": options, "answer": answer}
                                 for options, answer in zip((["1", "2"], ["stone", "apple"]),
                                                            answers)])
        metric, questions, bad = opened(file)
        assert metric == "choice" and not bad and [q.truth for q in questions] == list(truths)
    with pytest.raises(ValueError, match="data.jsonl: .*index or text.*write letters"):
        open_benchmark([lines(tmp_path, {"question": "?", "options": ["1", "2"], "answer": "1"})])
    one = {"question": "?", "options": ["a cat", "a dog"]}
    with pytest.raises(ValueError, match="data.jsonl: .*counted from 1"):
        open_benchmark([lines(tmp_path, {**one, "answer": 1}, {**one, "answer": 2})])
    file = lines(tmp_path, *[{**one, "answer": answer} for answer in (0, 1, "B")])
    _, questions, bad = opened(file)
    assert [q.truth for q in questions] == ["A", "B"]
    assert bad[0].where == f"{file}:3" and "in the rest of the file, the index" in bad[0].reason


def exact(*answers, **more):
    return [{"question": "Which?", "answer": answer, **more} for answer in answers]


CHOICE = {"question": "Which?\nOptions: A: red, B: blue", "answer": "B"}
FILES = [
    ("exact", exact("yes", "red", "no")), ("exact", exact("no", "2")),
    ("yesno", exact("Yes", "no")),
    ("yesno", [{"question": 3}, *exact("yes", None, "no")]),
    ("choice", [{**FRUIT, "answer": "red"}, {**FRUIT, "options": ["stone", "apple"]}]),
    ("choice", [CHOICE, CHOICE, {**FRUIT, "answer": "B"}]), ("exact", [CHOICE, *exact("two")]),
    ("exact", [*exact("two"), CHOICE]), ("yesno", [{"text": "Is it?", "label": "no"}]),
    ("exact", [{"question": "?", "answers": ["a"] * 10}, {"question": "?", "answers": ["a", "b"]}]),
    ("exact", [{"question": "?", "answers": ["a", "b"]}]),
    ("exact", [{"question": "?", "answers": [str(n) for n in range(14)]}]),
    ("exact", [{"question": "?", "answer": ["a", "b"]}]),
    ("vqa", [{"question": "?", "answers": ["a"] * 10}] * 2),
    ("vqa", [{"question": "?", "answers": None}, {"question": "?", "answers": ["a"] * 10}]),
    ("exact", [{"question": "?", "answers": ["a"] * 10}, *exact("red")]),
    ("exact", exact("red", questionId=7)), ("exact", exact("red", imgname="x.png")),
    ("exact", exact("red", caption="x")),
    ("gqa", exact("yes", "no", fullAnswer="Yes, it is.")),
    ("relaxed", exact("Yes", "7", type="human_test")),
    ("exact", exact("Yes", "7", type="chart")),
    ("anls", [{"questionId": 1, "question": "?", "answers": ["a"] * 10}])]


@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize("metric, records", FILES, ids=lambda value: str(value)[:60])
def test_the_rule_is_decided_by_all_records(tmp_path, metric, records, form):
    file = lines(tmp_path, *records) if form == "lines" else write_json(tmp_path / "a", records)
    assert open_benchmark([file]).metric == metric
    file.write_text("{broken\n" + file.read_text()) if form == "lines" else None
    assert open_benchmark([file]).metric == metric


def test_the_rule_of_a_parquet_file_too(tmp_path):
    for answers, metric in ((["yes", "red"], "exact"), (["yes", "no"], "yesno")):
        file = parquet(tmp_path, {"question": ["?"] * 2, "answer": answers, "image": RED * 2,
                                  "choices": pa.array([None, None], pa.list_(pa.string()))})
        assert open_benchmark([file]).metric == metric


@pytest.mark.parametrize("record", [
    {"question": "?"}, {"question": "?", "options": ["a", "b"]}, {"question": "?", "label": "a"},
    {"query": "?", "label": "a"}, {"question": "?", "A": "x", "B": "y"},
    {"question": "?", "response": "a"}, {"caption": "x", "question": "?"}], ids=str)
def test_questions_without_a_known_answer_are_refused_with_their_keys(tmp_path, record):
    save_pictures(tmp_path, "{}.png")
    record = {**record, "image": "red.png"}
    for file in (lines(tmp_path, record),
                 parquet(tmp_path, {key: [value] for key, value in record.items()})):
        with pytest.raises(ValueError, match=file.name) as caught:
            open_benchmark([file])
        assert all(repr(key) in str(caught.value) for key in record)


# ---------------------------------------------------------------- answers, and other keys of images


def test_docvqa_and_infovqa(tmp_path):
    save_pictures(tmp_path / "documents", "{}.png")
    own = {"docId": 279, "ucsf_document_id": "nkbl0226", "ucsf_document_page_no": "1",
           "data_split": "val", "question_types": ["handwritten"]}
    said = {"questionId": 337, "question": "Which date?", "answers": ["1/8/93", "8 Jan 93"]}
    info = {"image_url": "https://host/1.jpeg", "answer_type": ["single span"], "ocr": "{}",
            "operation/reasoning": [""], "data_split": "val"}
    for file, colour in (
            (parquet(tmp_path, {key: [value] for key, value in {**said, **own}.items()}
                     | {"image": RED}), "red"),
            (write_json(tmp_path / "val_v1.0.json", {
                "dataset_name": "docvqa", "dataset_split": "val", "dataset_version": "1.0",
                "data": [{**said, **own, "image": "documents/blue.png"}]}), "blue"),
            (write_json(tmp_path / "info.json", {"dataset_name": "infographicsVQA", "data": [{
                **said, "image_local_name": "documents/green.png", "data_split": "val",
                "image_url": "https://host/1.jpeg", "ocr_output_file": "1.json"}]}), "green")):
        text, question = read_one(file, "anls")
        assert text == "<image>\nWhich date?" and colours([question]) == [[colour]]
        assert question.truths == ("1/8/93", "8 Jan 93")
    file = parquet(tmp_path, {key: [value] for key, value in {**said, **info}.items()}
                   | {"image": RED})
    assert len(read_one(file, "anls")[1].images) == 1


def test_chartqa(tmp_path):
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "1.png").write_bytes(jpeg("blue"))
    published = write_json(tmp_path / "test_human.json", [
        {"imgname": "1.png", "query": "How many?", "label": "14"}])
    for file, images in (
            (published, tmp_path / "png"),
            (parquet(tmp_path, {"type": ["human_test"], "question": ["How many?"],
                                "answer": ["14"], "image": RED}), None)):
        text, question = read_one(file, "relaxed", images)
        assert text == "<image>\nHow many?" and question.truths == ("14",) and question.images
    file = parquet(tmp_path, {"image": RED, "query": ["How many?"], "label": [["14", "fourteen"]],
                              "human_or_machine": [0]})
    assert read_one(file, "relaxed")[1].truths == ("14", "fourteen")


def test_gqa(tmp_path):
    """Its questions name the images; the first answer is "yes", and the file is not one of POPE."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "n161313.jpg").write_bytes(jpeg("green"))
    entry = {"semantic": [{"operation": "select"}], "imageId": "n161313", "isBalanced": True,
             "annotations": {"answer": {}, "question": {}}, "fullAnswer": "Yes, it is."}
    records = {f"20{n}": {**entry, "question": "Is it?", "answer": answer}
               for n, answer in enumerate(["yes", "green"])}
    parts = {key: [record[key] for record in records.values()]
             for key in ("question", "answer", "imageId", "fullAnswer")}
    for file in (write_json(tmp_path / "testdev_balanced_questions.json", records),
                 parquet(tmp_path, parts),
                 lines(tmp_path, *[{key: value for key, value in record.items()
                                    if key != "annotations"} for record in records.values()])):
        metric, questions, bad = opened(file, tmp_path / "images")
        assert metric == "gqa" and not bad and [q.truth for q in questions] == ["yes", "green"]
        assert colours(questions) == [["green"], ["green"]]
        _, questions, bad = opened(file)  # the images lie elsewhere: not asked without
        assert not questions and isinstance(bad[0], MissingImage)
        assert "'imageId' is 'n161313', and" in bad[0].reason and str(tmp_path) in bad[0].reason
    assert measure("gqa", ["Green.", "green", "a green one"], [
        opened(file, tmp_path / "images")[1][1]] * 3).tolist() == [[1], [1], [0]]


def test_textvqa_as_json(tmp_path):
    (tmp_path / "0a.jpg").write_bytes(jpeg("white"))
    file = write_json(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [
        {"question": "What brand?", "image_id": "0a", "image_width": 9, "question_id": 1,
         "flickr_original_url": "https://host/0a_o.jpg", "answers": ["nokia"] * 10}]})
    text, question = read_one(file, "vqa")
    assert text == "<image>\nWhat brand?" and colours([question]) == [["white"]]


def test_several_accepted_answers(tmp_path):
    for key in ("answers", "answer"):
        for said in (["two", "2"], [{"answer": "two"}, {"answer": "2"}]):
            metric, (question,), _ = opened(lines(tmp_path, {"question": "How many?", key: said}))
            assert metric == "exact" and question.truths == ("two", "2")
            assert measure("exact", ["two", "2", "3"], [question] * 3).tolist() == [[1], [1], [0]]


def test_accepted_answers_under_another_key_are_refused(tmp_path):
    for key in ("accepted_answers", "answer_aliases", "direct_answers"):
        _, questions, bad = opened(lines(tmp_path, *exact("two", **{key: ["two", "2"]})))
        assert not questions and f"{key!r} (" in str(bad[0]) and "'answers'" in str(bad[0])
        assert opened(lines(tmp_path, *exact("two", **{key: []})))[1]


def test_blink(tmp_path):
    """Two images, and a prompt that repeats question and options."""
    file = parquet(tmp_path, {
        "idx": ["1"], "question": ["Which?"], "choices": [["x", "y"]], "answer": ["(B)"],
        "prompt": ["Which?\n(A) x\n(B) y"], "image_1": RED, "image_2": [stored("blue")],
        "image_3": pa.array([None], IMAGE)})
    text, question = read_one(file, "choice")
    assert text == "<image>\n<image>\nWhich?\nA. x\nB. y" and question.truth == "B"
    assert colours([question]) == [["red", "blue"]]


def test_a_hint_is_asked_too(tmp_path):
    text, _ = read_one(lines(tmp_path, *exact("red", hint="It burns.")), "exact")
    assert text == "It burns.\nWhich?"


# ---------------------------------------------------------------- options in the question

REALWORLD = "Which way?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of the " \
    "correct option and nothing else."


@pytest.mark.parametrize("question, last", [
    (REALWORLD, "Right"), (REALWORLD.replace("\nPlease", " Please"), "Right"),
    ("Which?\nOptions: A: left, B: right.\nAnswer with the option's letter.", "right."),
    ("A. left\nB. right\n\nAnswer the question using a single word", "right"),
    ("A. left\nor so\nB. right\nof it", "right\nof it"),
    ("A. left B. right, I answer", "right, I answer")])
def test_a_request_behind_the_options_is_none_of_them(question, last):
    assert options_in(question)["B"] == last
    assert chosen_letter(last, options_in(question)) == "B"


def test_realworldqa(tmp_path):
    """Letters, yes and no, and numbers in one file: the same text is right."""
    file = parquet(tmp_path, {
        "question": [REALWORLD, "Is it red? Please answer directly with a single word or number."],
        "answer": ["B", "Yes"], "image": RED * 2})
    metric, questions, bad = opened(file)
    assert metric == "exact" and not bad and [q.truth for q in questions] == ["B", "Yes"]
