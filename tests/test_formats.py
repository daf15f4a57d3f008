"""Claim: every format gives the same samples; what is broken is named with file and line."""

import hashlib
import io
import json
import pickle
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, needed, shared_dir
from PIL import Image

from dataset.chat import Message
from dataset.images import load_image
from dataset.readers import json_files, parquet
from dataset.readers.formats import BadSample, MissingImage, open_data
from dataset.sample import PROMPTS
from training.data import data_hash

QUESTION, ANSWER = "<image>\nWho is it?", "一只猫 🐈"
MINIMIND = {"conversations": [{"role": "user", "content": QUESTION},
                              {"role": "assistant", "content": ANSWER}]}
LLAVA = {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]}
MESSAGES = (Message("user", QUESTION), Message("assistant", ANSWER))


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c d.png", "green")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    return tmp_path


def picture(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def write_lines(path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(path, records, group=2, **columns):
    texts = [r if isinstance(r, str) else json.dumps(r["conversations"]) for r in records]
    pq.write_table(pa.table({"conversations": texts, **columns}), path, row_group_size=group)
    return path


def content(sample):
    return sample.messages, [load_image(image).tobytes() for image in sample.images]


def test_three_formats_give_one_sample_whatever_the_file_is_called(folder):
    records = [{**MINIMIND, "image": "a.png"}, {**LLAVA, "image": "a.png"}]
    files = [write_lines(folder / "one", *records)]
    for name, indent in (("two.txt", None), ("two.jsonl", 1), ("two.parquet", 4)):
        file = folder / name
        file.write_text(json.dumps(records[::-1], indent=indent, ensure_ascii=False),
                        encoding="utf-8")
        files.append(file)
    files.append(write_parquet(folder / "three.json", [MINIMIND, LLAVA],
                               image_bytes=[picture()] * 2))
    files.append(write_parquet(folder / "four.json", [MINIMIND, LLAVA],
                               image_bytes=[[picture()]] * 2))
    expected = (MESSAGES, [Image.new("RGB", (8, 8), "red").tobytes()])
    for file in files:
        data = open_data(file)
        assert len(data) == 2, file
        for i in (0, 1, -1):
            assert content(data[i]) == expected, (file, i)
        assert len([sample.where for sample in data]) == 2  # ends by itself


def test_real_files_of_five_formats():
    coco = needed(shared_dir(), "data/coco128")
    data = {name: open_data(coco / name, coco / "images")
            for name in ("minimind_v.jsonl", "minimind_v.parquet", "llava.json",
                         "ai_challenger.json", "llava_instruct_mix.parquet")}
    for name, rows in data.items():
        assert len(rows) == 126
        for sample in rows:
            assert len(sample.images) == 1 and sum(m.images for m in sample.messages) == 1, name
            assert sample.messages[-1].role == "assistant" and sample.messages[-1].content
    assert len(data["llava.json"][0].messages) == 6
    assert data["llava.json"][0].images == data["minimind_v.jsonl"][0].images
    mix = data["llava_instruct_mix.parquet"][0]
    assert [m.role for m in mix.messages] == ["user", "assistant", "user", "assistant"]
    assert load_image(mix.images[0]).size[0] > 100
    captions = json.loads((coco / "ai_challenger.json").read_text(encoding="utf-8"))
    assert all(sample.messages[1].content in entry["caption"]
               for sample, entry in zip(data["ai_challenger.json"], captions))
    sample = data["llava.json"][5]
    line = int(sample.where.rsplit(":", 1)[1])
    lines = (coco / "llava.json").read_text(encoding="utf-8").splitlines()
    assert lines[line - 1].strip() == "{" and sample.images[0].name in lines[line + 1]


def test_several_pictures_in_every_spelling(folder):
    record = {"conversations": [{"role": "user", "content": "<image><image> Same?"}]}
    names = ["a.png, b.png", "a.png,b.png", ["a.png", "b.png"], [str(folder / "a.png"), "b.png"]]
    for sample in open_data(write_lines(folder / "x", *[{**record, "image": n} for n in names])):
        assert sample.images == (folder / "a.png", folder / "b.png")
    data = open_data(write_parquet(folder / "y", [record] * 2,
                                   image_bytes=[[picture("red"), picture("blue")]] * 2))
    assert data[1].images == (picture("red"), picture("blue"))


def test_text_alone_and_names_with_spaces_or_dots(folder):
    plain = {"conversations": [{"role": "user", "content": "u"}]}
    (folder / "sub").mkdir()
    for image in ({}, {"image": ""}, {"image": None}, {"image": []}):
        assert open_data(write_lines(folder / "x", {**plain, **image}))[0].images == ()
    data = open_data(write_lines(folder / "x", {**plain, "image": "sub/../c d.png"}), folder)
    assert data[0].images[0].is_file()
    assert open_data(write_parquet(folder / "y", [plain]))[0].images == ()
    assert open_data(write_parquet(folder / "y", [plain, plain],
                                   image_bytes=[None, picture()]))[0].images == ()


def test_a_picture_without_marker_stands_before_the_first_question(folder):
    turns = [("system", "s"), ("user", "u"), ("user", "v")]
    record = {"conversations": [{"role": r, "content": c} for r, c in turns], "image": "a.png"}
    sample = open_data(write_lines(folder / "x", record))[0]
    assert [m.content for m in sample.messages] == ["s", "<image>\nu", "v"]


def test_the_word_image_in_an_answer_is_no_marker(folder):
    record = {"conversations": [{"role": "user", "content": "<image>Which tag?"},
                                {"role": "assistant", "content": "<image>"}], "image": "a.png"}
    assert len(open_data(write_lines(folder / "x", record))[0].images) == 1


def test_tags_are_kept(folder):
    data = open_data(write_lines(folder / "x", {**MINIMIND, "image": "a.png", "kind": "count",
                                                "language": "en", "id": 7}, {**MINIMIND}))
    assert data[0].tags == {"kind": "count", "language": "en"}
    data = open_data(write_parquet(folder / "y", [MINIMIND] * 2, image_bytes=[picture()] * 2,
                                   kind=["count", None]))
    assert data[0].tags == {"kind": "count"} and data[1].tags == {}


BROKEN = {
    "not JSON": ('{"conversations": [', "not JSON"),
    "a list": ("[1, 2]", "object"),
    "no conversations": ({"text": "hello"}, "conversations"),
    "empty": ({"conversations": []}, "conversations"),
    "turns are texts": ({"conversations": ["hi"]}, "conversations"),
    "role": ({"conversations": [{"role": "robot", "content": "x"}]}, "robot"),
    "no content": ({"conversations": [{"role": "user"}]}, "not text"),
    "half a character": ('{"conversations": [{"role": "user", "content": "\\ud83d"}]}', "utf-8"),
    "missing picture": ({**MINIMIND, "image": "nowhere.png"}, "nowhere.png"),
    "long name": ({**MINIMIND, "image": "n" * 5000}, "no image"),
    "zero byte": ({**MINIMIND, "image": "a\0b"}, "no image"),
    "too few pictures": (MINIMIND, "1 <image> markers for 0 images"),
    "too many pictures": ({**MINIMIND, "image": "a.png,b.png"}, "1 <image> markers for 2"),
    "image is a number": ({**MINIMIND, "image": 7}, "'image' is '7', not an image"),
    "a broken line": ('{"conversations": [}', "not JSON: .* at character 20 of the record"),
    "nested without end": ("{" + '"a":[' * 100_000, "not JSON"),
    "prompt alone is a number": ({"prompt": 7, "completion": "x"}, "prompt and completion"),
    "texts are no pairs": ({"texts": ["hi"]}, "'texts' must be .* with user and assistant"),
    "a pair without its half": ({"texts": [{"user": "u"}]}, "assistant turn is None, not text"),
    "caption is a number": ({"caption": 7, "image": "a.png"}, "'caption' is '7'"),
    "no caption": ({"caption": ["", " "], "image_id": "a.png"}, "'caption' holds no text"),
    "caption of nothing": ({"caption": ["x"], "image_id": "gone.jpg"}, "no image .*gone.jpg"),
    "no user": ({"conversations": [{"from": "gpt", "value": "x"}], "image": "a.png"}, "no user"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named_and_hurts_no_other(folder, name):
    line, reason = BROKEN[name]
    good = {**MINIMIND, "image": "a.png"}
    data = open_data(write_lines(folder / "data.jsonl", good, "", line, good))
    assert len(data) == 3  # the empty line is no sample, but it is counted as a line
    with pytest.raises(BadSample, match=reason) as caught:
        data[1]
    assert caught.value.where == f"{folder / 'data.jsonl'}:3"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert content(data[0])[0] == content(data[2])[0] == MESSAGES
    assert data[2].where.endswith(":4")


def test_bytes_that_are_no_utf8_spoil_their_own_line_alone(folder):
    good = json.dumps({**MINIMIND, "image": "a.png"}, ensure_ascii=False).encode()
    broken = good.replace("猫".encode(), b"\xff\xfe")
    (folder / "lines").write_bytes(b"\n".join([good, broken, good]))
    (folder / "array").write_bytes(b"[" + b",\n".join([good, broken, good]) + b"]")
    for name in ("lines", "array"):
        data = open_data(folder / name)
        assert data[0].messages == data[2].messages == MESSAGES
        with pytest.raises(BadSample, match=f"{name}:2: not JSON"):
            data[1]


def test_broken_rows_of_a_parquet_file_are_named(folder):
    data = open_data(write_parquet(
        folder / "data", [MINIMIND, "{oops", MINIMIND, MINIMIND, MINIMIND],
        image_bytes=[[picture()], [picture()], [None], [b""], [picture()]]))
    assert data[4].messages == MESSAGES and data[0].messages == MESSAGES
    for row, reason in ((1, "cannot read"), (2, "not an image"), (3, "not an image")):
        with pytest.raises(BadSample, match=reason) as caught:
            data[row]
        assert caught.value.where == f"{folder / 'data'}:{row + 1}"


def test_a_damaged_row_group_costs_only_its_rows(folder):
    path = write_parquet(folder / "data", [MINIMIND] * 6, image_bytes=[picture()] * 6)
    offset = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[offset:offset + 60] = bytes(60)
    path.write_bytes(damaged)
    data = open_data(path)
    assert data[0].messages == data[5].messages == MESSAGES
    with pytest.raises(BadSample, match=":3: cannot read"):
        data[2]


def test_row_groups_are_read_in_order_and_once(folder, monkeypatch):
    data = open_data(write_parquet(folder / "data", [MINIMIND] * 7, image_bytes=[picture()] * 7))
    reads, read = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, **options:
                        reads.append(*options["row_groups"]) or read(self, **options))
    assert [sample.where.rsplit(":")[-1] for sample in data] == list("1234567")
    assert reads == [0, 1, 2, 3]
    assert pickle.loads(pickle.dumps(data))[6].messages == MESSAGES


def test_marks_line_ends_and_odd_arrays(folder):
    good = json.dumps({**MINIMIND, "image": "a.png"}, ensure_ascii=False)
    spellings = {"bom": "\ufeff" + good, "windows": good + "\r\n" + good, "no_end": good,
                 "bom_array": f"\ufeff [{good}]", "spread": f"[\n\n{good}\n,\n{good}]"}
    for name, text in spellings.items():
        (folder / name).write_bytes(text.encode("utf-8"))
        data = open_data(folder / name)
        for sample in data:
            assert sample.messages == MESSAGES, name
    assert [s.where.rsplit(":")[-1] for s in open_data(folder / "spread")] == ["3", "5"]
    (folder / "flat").write_text(f"[{good}, {good}]", encoding="utf-8")
    assert open_data(folder / "flat")[1].where == f"{folder / 'flat'}:1 entry 2"
    (folder / "none").write_text("[]")
    assert len(open_data(folder / "none")) == 0


@pytest.mark.parametrize("text,reason", [
    ("hello", "expected JSON Lines"), ("", "expected JSON Lines"),
    ('[{"a": 1},\n {"b": }]', ":2: not JSON"), ('[{"a": 1},\n', ":2: not JSON")])
def test_files_that_are_none_of_the_three_say_so(folder, text, reason):
    (folder / "data").write_text(text)
    with pytest.raises(ValueError, match=reason):
        open_data(folder / "data")


def test_missing_files_and_foreign_columns_say_what_is_expected(folder):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        open_data(folder / "nothing.jsonl")
    for columns in (["ratings"], ["prompt", "images"]):
        pq.write_table(pa.table({name: ["x"] for name in columns}), folder / "data")
        with pytest.raises(ValueError, match=f"columns {', '.join(columns)}; expected 'conver"):
            open_data(folder / "data")
    (folder / "cut").write_bytes((folder / "data").read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut: not readable as Parquet.*download complete"):
        open_data(folder / "cut")
    (folder / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        open_data(folder / "pointer")


def test_lines_are_not_held_in_memory(folder):
    line = json.dumps({**MINIMIND, "image": "a.png", "padding": "x" * 10_000})
    data = open_data(write_lines(folder / "data", *[line] * 300))
    assert len(pickle.dumps(data)) < 20_000 < 3_000_000 < (folder / "data").stat().st_size


def test_data_hash_is_the_files(folder):
    content = (folder / "a.png").read_bytes()
    assert data_hash(folder / "a.png") == {
        "file": str(folder / "a.png"), "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest()}


# The layouts that other projects publish. Each as its authors write it.

STRUCTS = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def embedded(*colours):
    return [{"bytes": picture(colour), "path": None} for colour in colours]


def write_columns(path, group=2, **columns):
    types = {"images": STRUCTS}
    pq.write_table(pa.table({name: pa.array(values, types.get(name))
                             for name, values in columns.items()}), path, row_group_size=group)
    return path


def test_llava_with_several_turns_and_pictures(folder):
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "<image>\n<image>\nu"},
             {"from": "gpt", "value": "a"}, {"from": "human", "value": "v"},
             {"from": "gpt", "value": "b"}]
    cc3m = {"id": "GCC_train_000000001", "image": "b.png", "conversations": [
        {"from": "human", "value": "Provide a brief description.\n<image>"},
        {"from": "gpt", "value": "a cat"}]}
    text = {"id": "t", "model": "", "conversations": turns[3:]}  # as in the mix of 665,000
    (folder / "chat.json").write_text(json.dumps(
        [{"id": "1", "image": ["a.png", "b.png"], "conversations": turns}, cc3m, text], indent=2))
    several, one, none = open_data(folder / "chat.json")
    assert [m.role for m in several.messages] == ["system"] + ["user", "assistant"] * 2
    assert several.images == (folder / "a.png", folder / "b.png")
    assert one.images == (folder / "b.png",) and one.messages[0].content.endswith("\n<image>")
    assert none.images == () and none.messages == (Message("user", "v"), Message("assistant", "b"))


def test_trl_prompt_and_completion(folder):
    """The published file has lost its markers; a list of parts is what its documentation shows."""
    prompts = [[{"role": "user", "content": "Who is it?"}],
               [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"},
                {"role": "user", "content": "v"}]]
    completions = [[{"role": "assistant", "content": ANSWER}],
                   [{"role": "assistant", "content": "b"}]]
    data = open_data(write_columns(folder / "x", images=[embedded("red"), embedded("red", "blue")],
                                   prompt=prompts, completion=completions))
    assert content(data[0]) == (MESSAGES, [Image.new("RGB", (8, 8), "red").tobytes()])
    assert [m.content for m in data[1].messages] == ["<image>\n<image>\nu", "a", "v", "b"]
    parts = [{"type": "image"}, {"type": "text", "text": "\nWho is it?"}]
    lines = write_lines(folder / "y", {"prompt": "Hi", "completion": "Ho"},
                        {"messages": [{"role": "user", "content": parts}], "images": ["a.png"]},
                        {"prompt": [{"role": "user", "content": parts}], "image": "a.png",
                         "completion": [{"role": "assistant", "content": ANSWER}]})
    assert open_data(lines)[0].messages == (Message("user", "Hi"), Message("assistant", "Ho"))
    assert open_data(lines)[1].messages == MESSAGES[:1]
    assert open_data(lines)[2].messages == MESSAGES


def test_cauldron_and_finevision(folder):
    texts = [[{"user": "Who is it?", "assistant": ANSWER, "source": "s"}],
             [{"user": "u", "assistant": "a", "source": "s"},
              {"user": "v", "assistant": "b", "source": "s"}]]
    data = open_data(write_columns(folder / "x", images=[embedded("red"), []], texts=texts,
                                   relevance_ratings=[[5], [4, 4]]))
    assert content(data[0]) == (MESSAGES, [Image.new("RGB", (8, 8), "red").tobytes()])
    assert data[1].images == () and [m.content for m in data[1].messages] == ["u", "a", "v", "b"]
    data = open_data(write_columns(folder / "y", images=[None, [{"bytes": None, "path": "a.png"}]],
                                   texts=texts[::-1]))
    assert data[0].images == () and data[1].images == (folder / "a.png",)
    with pytest.raises(BadSample, match=r"y:1: 'images' is 'None', not an image"):
        open_data(write_columns(folder / "y", texts=texts[:1],
                                images=[[{"bytes": None, "path": None}]]))[0]


def test_plain_conversations(folder):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
             {"role": "assistant", "content": "a"}]
    for name in ("conversations", "messages"):
        (sample,) = open_data(write_lines(folder / "x", {name: turns}))
        assert sample.images == () and [m.content for m in sample.messages] == ["s", "u", "a"]
        assert open_data(write_columns(folder / "y", **{name: [turns]}))[0].messages == (
            sample.messages)


CAPTIONS = ["一只猫坐着\n", "一只红色的猫", "猫", "图中有猫", "有一只猫在椅子上"]


def write_challenger(folder, count):
    entries = [{"url": "http://x", "image_id": "a.png", "caption": CAPTIONS}] * count
    (folder / "ai.json").write_text(json.dumps(entries, ensure_ascii=False, indent=1), "utf-8")
    return open_data(folder / "ai.json")


def test_ai_challenger_draws_one_caption_by_the_index(folder):
    data = write_challenger(folder, 400)
    first = [sample.messages for sample in data]
    assert first == [sample.messages for sample in pickle.loads(pickle.dumps(data))]
    assert {m[0].content.removeprefix("<image>\n") for m in first} == set(
        PROMPTS["zh"])
    counts = [sum(m[1].content == caption.strip() for m in first) for caption in CAPTIONS]
    assert sum(counts) == 400 and min(counts) > 50, counts  # 80 each, were it quite even
    for i in range(20):  # five draws go round: each caption once
        drawn = [data.sample(i, draw).messages[1].content for draw in range(5)]
        assert sorted(drawn) == sorted(caption.strip() for caption in CAPTIONS)
    assert data[3].images == (folder / "a.png",) and data[-1].messages == first[-1]


def write_coco(path, captions, images=None, **style):
    images = images or [{"id": 10 - i, "file_name": name, "height": 8}
                        for i, name in enumerate(["a.png", "b.png", "c d.png"])]
    annotations = [{"image_id": 10 - i, "id": 70 + n, "caption": text}
                   for n, (i, text) in enumerate(captions)]
    path.write_text(json.dumps({"info": {"year": 2017, "contributors": ["猫"]}, "licenses": [],
                                "images": images, "annotations": annotations}, **style), "utf-8")
    return path


@pytest.mark.parametrize("style", [{}, {"indent": 1}, {"ensure_ascii": False}])
def test_coco_has_a_sample_for_each_caption(folder, style, monkeypatch):
    monkeypatch.setattr(json_files, "WINDOW", 7)  # so that every record crosses a window's end
    captions = [(0, "A red square. "), (2, "绿色"), (0, "Red\n"), (2, "")]
    data = open_data(write_coco(folder / "captions.json", captions, **style))
    assert len(data) == 4
    assert [data[i].messages[1].content for i in range(3)] == ["A red square.", "绿色", "Red"]
    assert [data[i].images[0].name for i in (0, 1, 2)] == ["a.png", "c d.png", "a.png"]
    assert "绿" not in data[0].messages[0].content and data[0].messages[0].images == 1
    with pytest.raises(BadSample, match="'caption' holds no text") as caught:
        data[3]
    line = caught.value.where.removeprefix(f"{folder / 'captions.json'}:")
    lines = (folder / "captions.json").read_text("utf-8").splitlines()
    assert line == "1 entry 4" if len(lines) == 1 else '"caption": ""' in lines[int(line) + 2]
    assert pickle.loads(pickle.dumps(data))[1].images == data[1].images


def test_coco_mistakes_are_named(folder):
    path = folder / "x.json"
    with pytest.raises(BadSample, match="x.json:1: image_id -90 is none of the file's 3 images"):
        open_data(write_coco(path, [(100, "x")]))[0]
    with pytest.raises(MissingImage, match="no image .*gone.jpg"):
        open_data(write_coco(path, [(0, "x")], [{"id": 10, "file_name": "gone.jpg"}]))[0]
    with pytest.raises(BadSample, match="image 10 has no 'file_name'"):
        open_data(write_coco(path, [(0, "x")], [{"id": 10}]))[0]
    with pytest.raises(ValueError, match="x.json:1: an image without a number as its 'id'"):
        open_data(write_coco(path, [(0, "x")], [{"file_name": "a.png"}]))
    with pytest.raises(ValueError, match="3 images and 0 annotations; expected COCO captions"):
        open_data(write_coco(path, []))
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match="x.json:1: not JSON: .*is the download complete"):
        open_data(path)
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}],
                                "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}))
    with pytest.raises(BadSample, match="no 'caption'; boxes .* take captions_"):
        open_data(path)[0]


def test_an_array_is_read_through_a_window(folder, monkeypatch):
    """Whatever its size: the same index as from one big window, for every place of its ends."""
    records = [{"n": 123456, "conversations": [{"from": "human", "value": "猫🐈\n\\\"" * n}]}
               for n in range(1, 8)]
    texts = {"flat": json.dumps(records, ensure_ascii=False),
             "lines": "\ufeff[\r\n" + ",\r\n".join(map(json.dumps, records)) + "\r\n]"}
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
        whole = open_data(folder / name).records
        for window in (1, 2, 3, 5, 17):
            monkeypatch.setattr(json_files, "WINDOW", window)
            found = open_data(folder / name).records
            assert found.numbers.tolist() == whole.numbers.tolist(), window
        monkeypatch.undo()
        assert [whole.read(i) for i in range(7)] == records
        assert whole.numbers[2::3].tolist() == ([1] * 7 if name == "flat" else list(range(2, 9)))


def test_an_endless_entry_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(json_files, "WINDOW", 10)
    monkeypatch.setattr(json_files, "LONGEST", 1000)
    (folder / "x").write_text('[{"a": 1},\n{"a": "no end' + "x" * 100_000)
    walk = json_files.JsonStreamReader(folder / "x")
    walk.peek()
    entries = walk.entries()
    next(entries)
    with pytest.raises(ValueError, match=":2: not JSON: Unterminated"):
        next(entries)
    assert len(walk.text) < 5000  # it did not read on to the end of the file


# Memory and laziness, in small; the full sizes were measured once by hand.

def memory_of(statement: str) -> float:
    """Megabytes that a fresh process's peak grows by."""
    script = ("import resource; from dataset.readers.formats import open_data\n"
              "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
              f"before = peak()\n{statement}\nprint(peak() - before)")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    return float(done.stdout)


@pytest.mark.parametrize("name", ["lines", "array", "coco"])
def test_an_index_costs_24_bytes_a_row_and_no_record_is_held(folder, name):
    if name == "coco":
        write_coco(folder / name, [(i % 3, "x" * 2000) for i in range(10_000)])
    else:
        record = json.dumps({**MINIMIND, "padding": "x" * 2000}, ensure_ascii=False)
        between, ends = ("\n", ("", "")) if name == "lines" else (",", "[]")
        (folder / name).write_text(ends[0] + between.join([record] * 10_000) + ends[1], "utf-8")
    data = open_data(folder / name)
    assert len(data) == 10_000 and len(pickle.dumps(data)) < 10_000 * 24 + 2000
    grown = memory_of(f"data = open_data({str(folder / name)!r})")
    assert grown < 14, f"{grown:.1f} MB for a file of 22 MB, 44 to 88 as python's text"


def test_opening_parquet_reads_the_footer_alone(folder):
    """The pixels may be gone altogether: len() still answers, and only the row itself is bad."""
    path = write_parquet(folder / "data", [MINIMIND] * 50, image_bytes=[bytes(50_000)] * 50,
                         group=5)
    whole = bytearray(path.read_bytes())
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    whole[4:-footer] = b"\xff" * (len(whole) - footer - 4)
    path.write_bytes(whole)
    assert len(open_data(path)) == 50
    with pytest.raises(BadSample, match="data:7: cannot read the row"):
        open_data(path)[6]


def test_columns_that_are_not_needed_are_not_read(folder):
    path = write_parquet(folder / "data", [MINIMIND] * 4, image_bytes=[picture()] * 4,
                         embedding=[b"e" * 9] * 4)
    about = pq.ParquetFile(path).metadata.row_group(0).column(2)
    assert about.path_in_schema == "embedding"
    spoilt = bytearray(path.read_bytes())
    start = about.dictionary_page_offset or about.data_page_offset
    spoilt[start:start + about.total_compressed_size] = b"\xff" * about.total_compressed_size
    path.write_bytes(spoilt)
    assert content(open_data(path)[0])[0] == MESSAGES
    with pytest.raises((OSError, ValueError)):
        pq.read_table(path)


def test_a_huge_row_group_is_passed_in_slices(folder, monkeypatch):
    monkeypatch.setattr(parquet, "SLICE", 3000)
    monkeypatch.setattr(parquet, "POOL", 6000)
    parquet.ParquetData.buffer.clear()
    monkeypatch.setattr(parquet.ParquetData, "buffered", 0)
    path = write_parquet(folder / "data", [MINIMIND] * 40, group=40,
                         image_bytes=[i.to_bytes(2, "big") * 500 for i in range(40)])
    data = open_data(path)
    assert data.largest_group > 10 * parquet.SLICE
    for i in (0, 1, 17, 39, 5, 6, 4):  # forwards, and back again
        assert data[i].images == (i.to_bytes(2, "big") * 500,), i
        assert len(parquet.ParquetData.buffer) <= 5
        assert max(rows.num_rows for rows in parquet.ParquetData.buffer.values()) <= 3
    opened, start = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, **options:
                        opened.append(1) or start(self, **options))
    assert [int.from_bytes(s.images[0][:2], "big") for s in open_data(path)] == list(range(40))
    assert len(opened) == 1  # in order, a group is passed through once


def test_parquet_can_be_rewritten_in_small_groups(folder):
    path = write_parquet(folder / "big", [MINIMIND] * 30, group=30,
                         image_bytes=[i.to_bytes(2, "big") * 500 for i in range(30)])
    parquet.rewrite(path, folder / "small", group_bytes=5000)
    before, after = open_data(path), open_data(folder / "small")
    assert len(after.ends) > 5 and after.largest_group < before.largest_group / 5
    assert [(s.messages, s.images) for s in after] == [(s.messages, s.images) for s in before]
    usage = subprocess.run([sys.executable, "-m", "dataset.readers.parquet", path,
                            folder / "small"], cwd=ROOT, capture_output=True, text=True)
    assert usage.returncode == 1 and "must not exist yet" in usage.stderr
