"""Claim: nobody trains or scores blind. A key that is not read and seems to hold a picture, a
video, a sound or options is refused with its line and its name; what only looks so passes."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataset.images import load_image
from dataset.readers import parquet
from dataset.readers.formats import BadSample, open_data
from dataset.readers.record_images import ImageFolder
from dataset.sample import RECORD_LAYOUTS, to_sample
from evaluation.benchmarks import open_benchmark
from evaluation.eval_samples import read_questions
from tests.published_data import (
    captions_and_vqa,
    cc3m_and_instruct_mix,
    coco_and_challenger,
    minimind_jsonl,
    minimind_parquet,
)

TALK = {"conversations": [{"from": "human", "value": "Which colour?"},
                          {"from": "gpt", "value": "Red"}]}
SHOW = {"conversations": [{"role": "user", "content": "<image>\nWhich colour?"},
                          {"role": "assistant", "content": "Red"}], "image": "a.png"}
QUESTION = {"question": "Which is a fruit?", "answer": "B"}


def png(colour="red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/a.png", "x.jpg"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def write(folder, record, form="lines"):
    file = folder / "data"
    if form == "parquet":
        pq.write_table(pa.table({key: [value] for key, value in record.items()}), file)
        return file, 1
    line = json.dumps(record)
    file.write_text(f"{json.dumps(SHOW)}\n{line}\n" if form == "lines" else
                    f"[{json.dumps(SHOW)},\n{line}]")
    return file, 2


def refused(folder, record, key, form="lines"):
    file, line = write(folder, record, form)
    with pytest.raises(BadSample) as caught:
        open_data(file)[line - 1]
    assert caught.value.where == f"{file}:{line}"
    assert repr(key) in caught.value.reason and "is not read" in caught.value.reason, caught.value
    assert len(str(caught.value)) < 1000
    return caught.value.reason


def read(folder, record, form="lines"):
    file, line = write(folder, record, form)
    return open_data(file)[line - 1]


# ---------------------------------------------------------------- names of keys

NAMES = """picture photo pixel_values path url file video videos video_path audio audios
audio_path image_1 image2 images_1 imgs pictures photos image_id imageId img_id imageID image_name
image_base64 img_b64 imageURL Image Image-Path filename filePath file_path media
media_path query_image input_image decoded_image screenshot screenshots pic jpg png
frames thumbnail video_id video_url audio_file image_file_name image_features
image_embeds has_image image_source has_audio wav mp4""".split()


@pytest.mark.parametrize("form", ["lines", "array", "parquet"])
@pytest.mark.parametrize("key", NAMES)
def test_a_picture_under_another_key_is_refused(folder, key, form):
    """Whatever stands there, if it is anything: a name, an address without an ending, a number."""
    for value in ("red.png", "https://host/12345", 7):
        assert "'image_bytes'" in refused(folder, {**TALK, key: value}, key, form)
    refused(folder, {**TALK, key: ["red.png", "blue.png"]}, key, form)


# What other data sets call it is read.
URI = "data:image/png;base64," + base64.b64encode(png()).decode()
OTHERS = [("image_path", "a.png"), ("image_paths", ["a.png"]), ("image_file", "a.png"),
          ("image_files", ["a.png"]), ("image_url", "a.png"), ("image_urls", ["a.png"]),
          ("img", "a.png"), ("img_path", "a.png"), ("file_name", "a.png"),
          ("file_names", ["a.png"]), ("image_url", {"url": "a.png"}), ("image_url", URI),
          ("image", URI), ("image", URI.partition(",")[2])]


@pytest.mark.parametrize("key, value", OTHERS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("form", ["lines", "parquet"])
def test_usual_keys_of_an_image_are_read(folder, key, value, form):
    expected = folder / "a.png" if "a.png" in str(value) else png()
    for layout in LAYOUTS:
        sample = read(folder, {**layout, key: value}, form)
        assert sample.images == (expected,) and sample.messages[0].content.startswith("<image>\n")
    benchmarked, _ = benchmark(folder, {**QUESTION, "answer": "red", key: value}, form)
    image, = benchmarked.images  # a question of a benchmark reads it alike
    image = image if image == expected else image()
    assert image == expected or np.array_equal(image, load_image(png()))


def test_names_that_are_written_in_other_ways(folder):
    for name in ("Paris, France.png", "set[1].png"):
        (folder / name).write_bytes(png())
        assert read(folder, {**SHOW, "image": name}).images == (folder / name,)
    two = {"role": "user", "content": "<image><image>"}
    several = {"conversations": [two, *SHOW["conversations"][1:]], "image": "a.png, b.png"}
    assert read(folder, several).images == (folder / "a.png", folder / "b.png")
    assert read(folder, {**SHOW, "image": "sub\\a.png"}).images == (folder / "sub/a.png",)
    for name in ("..\\a.png", "sub\\..\\..\\x.png", "C:\\a.png"):
        file, _ = write(folder, {**SHOW, "image": name})
        with pytest.raises(BadSample, match="leads out of the image folder|no image"):
            open_data(file)[1]
    for name in ("https://host/a.png", "s3://bucket/a.png"):
        file, _ = write(folder, {**SHOW, "image": name})
        with pytest.raises(BadSample, match="nothing is fetched from the network"):
            open_data(file)[1]
    file, _ = write(folder, {**SHOW, "image": "data:image/png;base64,@@@@"})
    with pytest.raises((OSError, ValueError), match="cannot read"):
        load_image(open_data(file)[1].images[0])


@pytest.mark.parametrize("form", ["lines", "array", "parquet"])
@pytest.mark.parametrize("value", [None, "", " ", [], [None], [""], {"bytes": None, "path": None},
                                   float("nan"), "nan", False])
@pytest.mark.parametrize("key", ["image_path", "video", "file_name", "options", "img", "A"])
def test_nothing_under_such_a_key_means_nothing(folder, key, value, form):
    try:
        sample = read(folder, {**TALK, key: value}, form)
    except pa.ArrowException:  # no column holds a list of nothing and an object at once
        pytest.skip("Parquet cannot hold it")
    assert len(sample.messages) == 2 and sample.images == ()


LAYOUTS = [
    TALK, {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    {"prompt": "u", "completion": "a"}, {"texts": [{"user": "u", "assistant": "a"}]},
    {"prompt": [{"role": "user", "content": "u"}],
     "completion": [{"role": "assistant", "content": "a"}]}, {"caption": "A cat."},
    {"caption": ["A cat.", "Cats."]}, {"question": "u", "answer": "a"},
    {"query": "u", "response": "a"}, {"instruction": "u", "output": "a"},
    {"input": "u", "output": "a"}]


def test_the_table_holds_every_layout():
    for keys, _ in RECORD_LAYOUTS:
        assert any(set(keys) <= set(layout) for layout in LAYOUTS), keys


def test_a_layout_is_one_entry_of_the_list(monkeypatch):
    def read(record, index, caption_index):
        return [{"role": "user", "content": record["question"]},
                {"role": "assistant", "content": record["answer"]}]

    added = (*RECORD_LAYOUTS, (("question", "answer"), read))
    monkeypatch.setattr("dataset.sample.RECORD_LAYOUTS", added)
    made = to_sample({"question": "u", "answer": "a", "image_bytes": b"x"}, ImageFolder(Path()),
                     "f:1")
    assert [message.content for message in made.messages] == ["<image>\nu", "a"]
    assert made.images == (b"x",)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout(folder, layout):
    for key in ("picture", "image_name", "video"):
        refused(folder, {**layout, key: "red.png"}, key)
        refused(folder, {**layout, key: "red.png"}, key, "parquet")


def test_all_keys_are_named_at_once(folder):
    reason = refused(folder, {**TALK, "image_1": "a.png", "image_2": "b.png"}, "image_1")
    assert "'image_1', 'image_2' ('a.png')" in reason


# ---------------------------------------------------------------- values

BASE64 = base64.b64encode(png()).decode()
VALUES = ["cat.jpg", "dir/cat.JPEG", "a b.png", "x.webp", "x.gif", "x.bmp", "x.tif", "x.tiff",
          "clip.mp4", "x.mov", "x.webm", "voice.wav", "x.mp3", "C:\\pictures\\cat.jpg",
          "https://host/cat.jpg", "https://host/cat.jpg?size=9", "a.png, b.png",
          f"data:image/png;base64,{BASE64}", BASE64, ["a.png", "b.png"],
          {"path": "cat.jpg", "bytes": None}, [{"path": "cat.jpg", "bytes": None}],
          {"bytes": "x"}, [["a.png"]]]


@pytest.mark.parametrize("value", VALUES, ids=[str(value)[:30] for value in VALUES])
@pytest.mark.parametrize("key", ["what", "data", "name", "content", "foto", "mask"])
def test_what_looks_like_media_is_refused_under_any_name(folder, key, value):
    refused(folder, {**TALK, key: value}, key)
    if not isinstance(value, dict) and value != [["a.png"]]:
        refused(folder, {**TALK, key: value}, key, "parquet")


@pytest.mark.parametrize("value", [
    png(), [png()], {"bytes": png(), "path": None}, [{"bytes": png(), "path": "x"}],
    b"\xff\xd8\xff\xe0" + bytes(9), b"RIFF" + bytes(9), b"\x00\x00\x00 ftypmp42",
    png() + bytes(9000)])
def test_bytes_in_parquet_under_any_name(folder, value):
    for key in ("what", "image_1", "jpg"):
        refused(folder, {**TALK, key: value}, key, "parquet")
    assert read(folder, {**TALK, "what": b"numbers" + bytes(9000)}, "parquet").images == ()


ORDINARY = ["A cat.", "see cat.jpg for\nmore", "https://en.wikipedia.org/wiki/Cat", "v1.5", "x.py",
            "000000000009", "5f0c8a", 3, 0.5, True, ["a", "b"], {"a": 1}, [1.5, 2.5], "png", ".",
            "", {"source": "s", "image_path": "images/0.jpg"}, "/9j/", "end.json", "a" * 5000]


@pytest.mark.parametrize("value", ORDINARY, ids=[str(value)[:30] for value in ORDINARY])
@pytest.mark.parametrize("key", ["what", "note", "meta_info", "answer", "width"])
def test_ordinary_values_under_other_names_are_passed_over(folder, key, value):
    assert read(folder, {**TALK, key: value}).messages[1].content == "Red"
    assert len(read(folder, {**SHOW, key: value}).images) == 1


# ---------------------------------------------------------------- beside pictures that are read


def test_a_second_picture_under_another_key_is_refused(folder):
    for key, value in (("images", ["b.png"]), ("image_2", "b.png"), ("file_name", "b.png"),
                       ("mask", "mask.png"), ("video", "x.mp4"), ("clip", "a.mp4"),
                       ("audio", "id7"), ("image_bytes", "b.png"), ("image_path", "x/b.png"),
                       ("images", ["a.png", "b.png"]), ("what", f"data:image/png;base64,{BASE64}")):
        refused(folder, {**SHOW, key: value}, key)
    embedded = {"conversations": json.dumps(SHOW["conversations"]), "image_bytes": png()}
    for key, value in (("image_2", png("blue")), ("video", "x.mp4"), ("clip", "x.mp4"),
                       ("decoded_image", {"bytes": png(), "path": None})):
        refused(folder, {**embedded, key: value}, key, "parquet")


def test_where_a_picture_comes_from_may_be_told_beside_it(folder):
    for more in ({"url": "https://host/other.jpg"}, {"image_url": "https://host/1"},
                 {"file_name": "a.png"}, {"image_path": "/else/a.png"}, {"images": ["a.png"]},
                 {"image_id": 9}, {"image_id": "COCO_val2014_000000000009"}, {"img_index": 3},
                 {"coco_url": "http://images.cocodataset.org/x.jpg"}, {"image_width": 8},
                 {"path": "C:\\data\\a.png"}, {"num_images": 1}, {"video_id": "x7"},
                 {"image_source": "COCO_val2014_0003"}, {"image_hash": "ff"}, {"has_image": True}):
        assert len(read(folder, {**SHOW, **more}).images) == 1, more
    embedded = {"conversations": json.dumps(SHOW["conversations"]), "image_bytes": png()}
    for more in ({"filename": "1000092795.jpg"}, {"image_name": "x.jpg"}, {"image_id": 3}):
        assert len(read(folder, {**embedded, **more}, "parquet").images) == 1, more


def test_text_among_pictures_passes(folder):
    for more in ({"image": None}, {"image": ""}, {"image": None, "url": "https://chat/1"},
                 {"images": [], "file": "notes", "videos": [], "audios": None},
                 {"image": None, "path": "src/main.py"}, {"path": "src/main.py"},
                 {"id": "a.png", "source": "b.png"}, {"num_images": 0}, {"model": "", "id": "t"}):
        assert read(folder, {**TALK, **more}).images == ()
    refused(folder, {**TALK, "image": None, "picture": "a.png"}, "picture")
    refused(folder, {**TALK, "image": None, "image_name": "1"}, "image_name")


def test_a_caption_without_a_picture_is_refused(folder):
    for more in ({}, {"image": None}, {"image": ""}, {"images": []}):
        for form in ("lines", "array", "parquet"):
            file, line = write(folder, {"caption": ["A cat.", "Cats."], **more}, form)
            with pytest.raises(BadSample, match=f"data:{line}: a caption without an image; exp"):
                open_data(file)[line - 1]


def test_an_annotation_of_coco_holds_no_more_than_its_caption(folder):
    for more, passes in (({"video": "x.mp4"}, False), ({"options": ["x", "y"]}, False),
                         ({"mask": "mask.png"}, False), ({"file_name": "a.png", "id": 3}, True)):
        (folder / "coco").write_text(json.dumps({
            "info": {}, "images": [{"id": 1, "file_name": "a.png", "coco_url": "http://h/x.jpg"}],
            "annotations": [{"image_id": 1, "caption": "A cat.", **more}]}))
        if passes:
            assert len(open_data(folder / "coco")[0].images) == 1
            continue
        with pytest.raises(BadSample, match=f"coco:1: {next(iter(more))!r} .* is not read"):
            open_data(folder / "coco")[0]


# ---------------------------------------------------------------- turns, their parts, their text


@pytest.mark.parametrize("turn", [
    {"images": ["a.png"]}, {"image": "b.png"}, {"video": "x"}, {"what": "b.png"},
    {"audio": {"path": "x"}}, {"image_name": "x"}], ids=str)
def test_keys_of_a_turn(folder, turn):
    key, = turn
    for shape in ({"role": "user", "content": "u"}, {"from": "human", "value": "u"}):
        reason = refused(folder, {"messages": [{**shape, **turn},
                                               {"role": "assistant", "content": "a"}]}, key)
        assert f"{key!r} in a turn (" in reason
    refused(folder, {"texts": [{"user": "u", "assistant": "a", "source": "s", **turn}]}, key)
    parquet_turns = json.dumps([{"role": "user", "content": "u", **turn}])
    refused(folder, {"conversations": parquet_turns}, key, "parquet")
    assert read(folder, {"messages": [{"role": "user", "content": "u", key: None}]}).images == ()
    assert read(folder, {"texts": [{"user": "u", "assistant": "a", "source": "a.png"}]})


def talk(*parts, **more):
    return {"messages": [{"role": "user", "content": list(parts)},
                         {"role": "assistant", "content": "a"}], **more}


def test_parts_of_a_turn(folder):
    for part, key in (({"type": "text", "text": "x", "video": "x.mp4"}, "video"),
                      ({"type": "image", "image": "a.png", "mask": "b.png"}, "mask")):
        for more in ({}, {"images": ["a.png"]}):
            assert f"{key!r} in a part of a turn" in refused(folder, talk(part, **more), key)
    for part in ({"type": "audio"}, {"type": "video", "video": "x.mp4"},
                 {"type": "video", "text": "a clip"}, {"type": "input_audio", "text": "x"},
                 {"type": "file", "text": "x"}, "a.png", {"type": "tool_use", "id": "x"}):
        file, _ = write(folder, talk(part))
        with pytest.raises(BadSample, match="data:2: a part of a turn is .*expected an image or a"):
            open_data(file)[1]
    both = [{"type": "image", "text": None, "index": 0, "image": None, "url": ""},
            {"type": "text", "text": "x", "index": None, "image_url": None}]
    assert len(read(folder, talk(*both, images=["a.png"])).images) == 1
    assert read(folder, talk({"text": "x"}, {"type": "input_text", "text": "y"})).images == ()


NAMED = [{"type": "image", "image": "b.png"}, {"type": "image", "path": "b.png"},
         {"type": "image", "url": "b.png"}, {"type": "image_url", "image_url": {"url": "b.png"}},
         {"type": "image_url", "image_url": "b.png"}, {"image": "b.png"},
         {"type": "input_image", "image_url": "b.png"},
         {"type": "image", "image": {"bytes": None, "path": "b.png"}}]


@pytest.mark.parametrize("part", NAMED, ids=str)
def test_an_image_that_stands_in_its_part(folder, part):
    b, text = folder / "b.png", {"type": "text", "text": "x"}
    for record in (talk(part, text), {"prompt": talk(part, text)["messages"][:1],
                                      "completion": talk()["messages"][1:]}):
        sample = read(folder, record)
        assert (sample.images, sample.messages[0].content) == ((b,), "<image>\nx")
        row = {key: json.dumps(value) for key, value in record.items()}
        if "messages" in row:  # minimind-v's column of JSON text
            assert read(folder, row, "parquet").images == (b,)
    # Beside the record's own images each stands where its part stands.
    sample = read(folder, talk(text, part, {"type": "image"}, text, images=["a.png"]))
    assert sample.images == (b, folder / "a.png")
    assert sample.messages[0].content == "x\n<image>\n<image>\nx"
    data = read(folder, talk({"type": "image_url", "image_url": {
        "url": f"data:image/png;base64,{BASE64}"}}))
    assert data.images == (png(),)
    for bad, reason in (({"type": "image", "image": "gone.png"}, "no image"),
                        ({"type": "image", "image": "../a.png"}, "leads out of the image folder"),
                        ({"type": "image", "url": "https://host/b.png"}, "network"),
                        ({"type": "image", "image": 7}, "not an image")):
        file, _ = write(folder, talk(part, bad))
        with pytest.raises(BadSample, match=f"data:2: .*{reason}"):
            open_data(file)[1]
    file, _ = write(folder, {"messages": [{"role": "user", "content": "u"},
                                          {"role": "assistant", "content": [part]}]})
    with pytest.raises(BadSample, match="an answer holds an image"):
        open_data(file)[1]


def test_parts_with_images_in_parquet(folder):
    """As the datasets library stores them: a part has every key, null where it has none."""
    parts = [{"type": "image", "text": None, "image": {"bytes": png(), "path": None}},
             {"type": "text", "text": "x", "image": None}]
    turns = [{"role": "user", "content": parts},
             {"role": "assistant", "content": [{"type": "text", "text": "a", "image": None}]}]
    assert read(folder, {"messages": turns}, "parquet").images == (png(),)


@pytest.mark.parametrize("text, beside_a_picture", [
    ("<img>\nWhat?", True), ("What? <img>", True), ("Picture 1: <img>a.png</img>\nWhat?", True),
    ("<image 1> What?", True), ("In <image_2> who?", True), ("<|image|>What?", True),
    ("see <|image_pad|> now", True), ("<picture>", True), ("<|image_1|>\nx", True),
    ("<video>\nWhat happens?", False), ("<VIDEO>x", False), ("Listen: <audio>", False),
    ("<audio>voice.wav</audio> Who?", False), ("<|video_pad|>", False), ("a <|audio_1|> b", False)])
def test_marks_of_other_programs_for_what_is_not_read(folder, text, beside_a_picture):
    for role in ("user", "system"):
        record = {"messages": [{"role": role, "content": text}, {"role": "user", "content": "x"}]}
        file, _ = write(folder, record)
        with pytest.raises(BadSample, match="data:2: the text has <.*none is read; expected <ima"):
            open_data(file)[1]
    file, _ = write(folder, {"messages": [{"role": "user", "content": text + "\n<image>"}],
                             "image": "a.png"})
    if beside_a_picture:
        assert len(open_data(file)[1].images) == 1
    else:
        with pytest.raises(BadSample, match="the text has <"):
            open_data(file)[1]


@pytest.mark.parametrize("text", [
    "How do I use the <img> tag in HTML?", "What does <video> do?", '<img src="a.png">',
    "<video controls>\n<source src='a.mp4'>\n</video>", "Is <audio> older than <video> in HTML?",
    "<video>\n  <source>\n</video>", "<imgs>", "a < image > b", "<html><img/></html>"])
def test_html_is_text(folder, text):
    assert read(folder, {"messages": [{"role": "user", "content": text}]}).images == ()


def test_a_text_full_of_marks_takes_no_time(folder):
    for mark in ("<video>", "<img>", "<video></video>"):
        text = f"a {mark} b " * (490_000 // (len(mark) + 5))
        assert read(folder, {"messages": [{"role": "user", "content": text}]}).images == ()


def test_in_an_answer_marks_are_words(folder):
    record = {"messages": [{"role": "user", "content": "Which mark?"},
                           {"role": "assistant", "content": "<video>"}]}
    assert read(folder, record).messages[1].content == "<video>"


# ---------------------------------------------------------------- options

OPTIONS = [
    {"options": ["stone", "apple"]}, {"choices": ["stone", "apple"]}, {"options": [7, 8]},
    {"choice_a": "stone", "choice_b": "apple"}, {"optionA": "x"}, {"option_1": "x"},
    {"options": "['stone', 'apple']"}, {"options": {"A": "stone", "B": "apple"}},
    {"A": "stone", "B": "apple"}, {"a": "x", "b": "y"}, {"opa": "x", "opb": "y"},
    {"choices": {"label": ["A"], "text": ["stone"]}}, {"answer_choices": ["stone"]},
    {"multiple_choices": ["no"]}, {"distractor1": "x"}, {"choice_list": ["x"]}]


@pytest.mark.parametrize("more", OPTIONS, ids=str)
def test_options_that_a_conversation_does_not_tell(folder, more):
    key = next(iter(more))
    for form in ("lines", "parquet"):
        assert "options to choose from" in refused(folder, {**SHOW, **more}, key, form)
        refused(folder, {**TALK, **more}, key, form)


def test_options_that_are_told_in_the_text_are_read(folder):
    turns = [{"role": "user", "content": "Which?\nA. stone\nB. apple"},
             {"role": "assistant", "content": "B"}]
    for more in ({"options": ["stone", "apple"]}, {"A": "stone", "B": "apple", "C": "nan"},
                 {"choices": {"text": ["stone", "apple"]}},
                 {"choice_a": "stone", "choice_b": "apple"}):
        assert read(folder, {"conversations": turns, **more})
    for more in ({"A": "grade"}, {"choices": 4}, {"multiple_choice": True}, {"choice": "B"},
                 {"A": 0.5, "B": 0.25}, {"correct_choice_idx": 1}, {"option": "x"}):
        assert read(folder, {**TALK, **more}), more
    for options in (["stone", "pear"], ["stone", "app"], ["ton"], [*map(str, range(101))]):
        refused(folder, {"conversations": turns, "options": options}, "options")
    turns[0]["content"] = "选一个：猫、狗。" + " ".join(map(str, range(101)))
    assert read(folder, {"conversations": turns, "options": ["猫", "狗", 7]})


def benchmark(folder, record, form="lines"):
    """-> the question of a record, or the BadSample; and how it would be scored"""
    file = folder / "benchmark"
    if form == "parquet":
        pq.write_table(pa.table({key: [value] for key, value in record.items()}), file)
    else:
        file.write_text(json.dumps(record) + "\n")
    opened = open_benchmark([file])
    (found,) = sum(map(list, read_questions(opened.data)), [])
    return found, opened.metric


BLIND = [{"picture": "a.png"}, {"imageId": "n1"}, {"image_id": 7},
         {"image_1": "a.png", "image": "b.png"}, {"photo": "a.png"}, {"what": "a.png"}, {"url": "https://host/1"},
         {"video": "x.mp4", "image": "a.png"}, {"image_2": "b.png", "image": "a.png"}]


@pytest.mark.parametrize("form", ["lines", "parquet"])
@pytest.mark.parametrize("more", BLIND, ids=str)
@pytest.mark.parametrize("record, metric", [
    ({"question": "Which?", "answer": "red"}, "exact"),
    ({"text": "Is it?", "label": "no"}, "yesno"),
    ({"question": "Is it?", "answer": "no"}, "yesno"),
    ({"question": "?", "answers": ["a"] * 10}, "vqa"),
    ({"question": "?", "answers": ["a", "b"]}, "exact"),
    ({"questionId": 1, "question": "?", "answers": ["a"]}, "anls"),
    ({"query": "?", "label": ["a"], "human_or_machine": 0}, "relaxed"),
    ({"question": "?", "answer": "a", "fullAnswer": "An a."}, "gqa"),
    ({"question": "Which?", "options": ["x", "y"], "answer": "1"}, "choice"),
    ({"question": "Which?", "choice_a": "x", "choice_b": "y", "answer": "B"}, "choice"),
    ({"question": "Which?", "choices": ["x", "y"], "answer": 1}, "choice"),
    ({"caption": "A."}, "caption")])
def test_a_question_whose_picture_is_not_read(folder, record, metric, more, form):
    key = next(iter(more))
    found, by = benchmark(folder, {**record, **more}, form)
    assert by == metric and isinstance(found, BadSample), found
    assert found.where == f"{folder / 'benchmark'}:1" and repr(key) in found.reason


@pytest.mark.parametrize("form", ["lines", "parquet"])
@pytest.mark.parametrize("more", OPTIONS, ids=str)
def test_a_question_whose_options_are_not_read(folder, more, form):
    key = next(iter(more))
    for record in (QUESTION, {"question": "Which?", "answers": ["apple"]},
                   {"text": "Is it?", "label": "yes"}):
        if record is QUESTION and key in ("choices", "options", "choice_a", "A", "a"):
            continue  # this is what is read
        found, _ = benchmark(folder, {**record, **more, "image": "a.png"}, form)
        assert isinstance(found, BadSample) and repr(key) in found.reason, found


def test_a_choice_reads_its_own_options_and_no_others(folder):
    told = {"question": "Which is a fruit?\nOptions: A: stone, B: apple", "answer": "B"}
    for record in ({**QUESTION, "choices": ["stone", "apple"]},
                   {**QUESTION, "A": "stone", "B": "apple"},
                   {**QUESTION, "choices": ["stone", "apple"], "A": "stone", "B": "apple"},
                   {**told, "options": ["stone", "apple"]}, told):
        found, metric = benchmark(folder, {**record, "image": "a.png"})
        assert metric == "choice" and found.options == {"A": "stone", "B": "apple"}, found
    found, _ = benchmark(folder, {**QUESTION, "choices": ["stone", "apple"], "A": "x", "B": "y"})
    assert isinstance(found, BadSample) and "'A', 'B'" in found.reason


@pytest.mark.parametrize("text", ["<image>\nWhich?", "<image 1> Which?", "<img> Which?"])
def test_a_question_with_the_mark_of_a_picture_and_none(folder, text):
    for record in ({"question": text, "answer": "x"}, {"text": text, "label": "yes"},
                   {"question": text, "choices": ["x", "y"], "answer": 0}):
        found, _ = benchmark(folder, record)
        assert isinstance(found, BadSample) and "<im" in found.reason and "image" in found.reason
        found, _ = benchmark(folder, {**record, "image": "a.png"})
        assert len(found.images) == 1


def test_pictures_of_a_benchmark_are_found_under_the_same_keys_in_parquet(folder):
    for key, value in (("images", [png()]), ("image_bytes", png()), ("images", ["a.png"])):
        found, _ = benchmark(folder, {"question": "Which?", "answer": "x", key: value}, "parquet")
        assert len(found.images) == 1, key


# ---------------------------------------------------------------- what is published, and passes

ROW = {"bytes": png(), "path": None}
PUBLISHED = {  # columns of a row as published, with what else stands there
    "llava 1.5": {"id": "000000033471", "image": "a.png", "conversations": TALK["conversations"]},
    "llava onevision": {"id": "sharegpt4v(coco)/a.png", "image": "a.png", "data_source": "s",
                        "conversations": TALK["conversations"]},
    "m4 instruct": {"sample_id": "x_1", "image": ["a.png", "b.png"], "choice_list": None,
                    "conversations": [{"from": "human", "value": "<image><image> Same?"}],
                    "metadata": {"dataset": "d", "split": "train", "num_sample": 2}},
    "allava": {"id": "allava_laion_0", "image": "sub/a.png", "url": "https://host/x.jpg",
               "conversations": TALK["conversations"]},
    "internvl": {"id": 0, "image": "a.png", "width": 8, "height": 8,
                 "conversations": TALK["conversations"]},
    "ms-swift": {**talk({"type": "text", "text": "x"}), "images": [], "videos": [], "audios": None,
                 "objects": {"bbox": [[1, 2]]}},
    "ai challenger": {"url": "http://m4.biz.itc.cn/7.jpg", "image_id": "a.png", "caption": ["x"]},
    "text in llava's mix": {"id": "t", "model": "", **TALK},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_pass(folder, name):
    assert read(folder, PUBLISHED[name]).messages


STORED = {
    "cauldron": {"images": [ROW], "texts": [{"user": "u", "assistant": "a", "source": "a.png"}]},
    "finevision": {"images": [ROW], "texts": [{"user": "u", "assistant": "a"}], "source": "s.jpg",
                   "image_correspondence_ratings": [5], "image_correspondence_min": 5,
                   "visual_dependency_ratings": [4], "formatting_ratings": [4]},
    "flickr30k": {"image": ROW, "caption": ["A cat.", "Cats."], "sentids": ["0"], "split": "test",
                  "img_id": "0", "filename": "1000092795.jpg"},
    "vsft": {"messages": [{"role": "user", "content": [
        {"index": None, "text": "Who?", "type": "text"},
        {"index": 0, "text": None, "type": "image"}]}], "images": [ROW]},
}


@pytest.mark.parametrize("name", STORED)
def test_published_columns_pass(folder, name):
    sample = read(folder, STORED[name], "parquet")
    assert len(sample.images) == 1 and sample.messages


ASKED = {
    "mmbench": {"index": 1, **QUESTION, "hint": "nan", "A": "x", "B": "y", "C": "nan", "D": None,
                "category": "c", "image": ROW, "source": "s", "L2-category": "l", "comment": "nan",
                "split": "dev"},
    "scienceqa": {"image": ROW, "question": "Which?", "choices": ["x", "y"], "answer": 1,
                  "hint": "", "task": "closed choice", "grade": "grade2", "lecture": "L",
                  "solution": "S"},
    "vqav2": {"question_type": "what", "multiple_choice_answer": "net", "answers": ["net"],
              "image_id": 393225, "answer_type": "other", "question_id": 1, "question": "?",
              "image": ROW},
    "pope": {"id": "0", "question_id": "1", "question": "Is it?", "answer": "yes", "image": ROW,
             "image_source": "COCO_val2014_000000310196", "category": "adversarial"},
    "textvqa": {"image_id": "003a8ae2ef43b901", "question_id": 34602, "question": "?",
                "image_width": 8, "image_height": 8, "image": ROW, "answers": ["x"],
                "image_classes": ["Cassette deck"], "set_name": "val",
                "flickr_original_url": "https://host/a_o.jpg",
                "flickr_300k_url": "https://host/a_z.jpg", "ocr_tokens": ["x"]},
    "vizwiz": {"question_id": "VizWiz_val_00000000.jpg", "image": ROW, "question": "?",
               "answers": ["x"], "category": "other"},
}


@pytest.mark.parametrize("name", ASKED)
def test_published_benchmarks_pass(folder, name):
    found, _ = benchmark(folder, ASKED[name], "parquet")
    assert len(found.images) == 1, found


@pytest.mark.parametrize("make", [minimind_jsonl, minimind_parquet, coco_and_challenger,
                                  captions_and_vqa, cc3m_and_instruct_mix])
def test_every_row_of_the_published_files_passes(tmp_path, make):
    published = make(tmp_path / "data")
    for flags in (published.pretrain, published.sft):
        names = flags[1:flags.index("--image_folder")] if "--image_folder" in flags else flags[1:]
        images = flags[flags.index("--image_folder") + 1] if "--image_folder" in flags else None
        for name in names:
            for file in sorted(tmp_path.glob(name[len(str(tmp_path)) + 1:])):
                assert [*open_data(file, images)]


# ---------------------------------------------------------------- Parquet reads no more than needed


def test_columns_of_parquet_are_chosen_by_the_footer(folder):
    rows = 300
    table = {"conversations": [json.dumps(TALK["conversations"])] * rows,
             "long": [f"{i} words " * 2000 for i in range(rows)], "words": ["some words"] * rows,
             "names": [None] * 200 + ["x.jpg"] * 100, "blob": [bytes(5)] * rows,
             "numbers": [list(np.arange(4.0))] * rows, "nothing": pa.nulls(rows, pa.string()),
             "big": [bytes(9000)] * rows, "meta": [{"image_path": "x.jpg"}] * rows,
             "image_path": pa.nulls(rows, pa.string()),
             "cut": ["/".join(["folder"] * 9)[:60] + ".png"] * rows}
    for statistics in (True, False):
        pq.write_table(pa.table(table), folder / "x", row_group_size=100,
                       write_statistics=statistics)
        data = open_data(folder / "x")
        looked = {"conversations", "names", "image_path", "cut", "big"}
        assert set(data.columns) == looked | (set() if statistics else {"words", "blob", "nothing"})
    pq.write_table(pa.table({name: table[name] for name in table if name != "cut"}), folder / "x",
                   row_group_size=100)
    data = open_data(folder / "x")
    assert data[0].messages and data[199].messages, "a row without a name has nothing to be read"
    with pytest.raises(BadSample, match="x:201: 'names' \\('x.jpg'\\) is not read"):
        data[200]


def test_a_column_without_a_name_of_a_file_is_never_opened(folder, monkeypatch):
    looked = []
    monkeypatch.setattr(parquet, "holds_media", lambda value, names: looked.append(value) or False)
    read(folder, {**TALK, "note": "words", "embedding": b"eeee"}, "parquet")
    assert sorted(map(str, looked)) == sorted(map(str, ["words", "words", b"eeee", b"eeee"]))
