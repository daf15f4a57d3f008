"""Claim: every format gives the same samples; what is broken is named with file and line."""

import hashlib
import io
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import needed, shared_dir
from PIL import Image

from dataset.chat import Message
from dataset.formats import BadSample, data_hash, open_data
from dataset.images import load_image

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


def test_real_files_of_the_three_formats():
    coco = needed(shared_dir(), "data/coco128")
    data = {name: open_data(coco / name, coco / "images")
            for name in ("minimind_v.jsonl", "minimind_v.parquet", "llava.json")}
    for name, rows in data.items():
        assert len(rows) == 126
        for sample in rows:
            assert len(sample.images) == 1 and sum(m.images for m in sample.messages) == 1, name
            assert sample.messages[-1].role == "assistant" and sample.messages[-1].content
    assert len(data["llava.json"][0].messages) == 6
    assert data["llava.json"][0].images == data["minimind_v.jsonl"][0].images
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
    data = open_data(write_lines(folder / "x", {**plain, "image": "../c d.png"}), folder / "sub")
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
    "long name": ({**MINIMIND, "image": "n" * 5000}, "no picture"),
    "zero byte": ({**MINIMIND, "image": "a\0b"}, "no picture"),
    "too few pictures": (MINIMIND, "1 <image> markers for 0 pictures"),
    "too many pictures": ({**MINIMIND, "image": "a.png,b.png"}, "1 <image> markers for 2"),
    "image is a number": ({**MINIMIND, "image": 7}, "'image' is '7'"),
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
    for row, reason in ((1, "cannot read"), (2, "not a picture"), (3, "not a picture")):
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
    pq.write_table(pa.table({"prompt": ["x"]}), folder / "data")
    with pytest.raises(ValueError, match="columns prompt; expected 'conversations'"):
        open_data(folder / "data")


def test_lines_are_not_held_in_memory(folder):
    line = json.dumps({**MINIMIND, "image": "a.png", "padding": "x" * 10_000})
    data = open_data(write_lines(folder / "data", *[line] * 300))
    assert len(pickle.dumps(data)) < 20_000 < 3_000_000 < (folder / "data").stat().st_size


def test_data_hash_is_the_files(folder):
    content = (folder / "a.png").read_bytes()
    assert data_hash(folder / "a.png") == {
        "file": str(folder / "a.png"), "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest()}
