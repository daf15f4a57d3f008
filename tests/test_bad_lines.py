"""Claim: whatever stands in a data file, each sample is used or skipped with file and line; no
line crashes the run, hangs it, or has a file read that lies outside of the image folder.

Each table reads: name of the case, what stands in the file, what the message says.
"""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad import show, talk, watched
from PIL import Image

from dataset.batching import Batches
from dataset.chat import ChatTemplate
from dataset.images import load_image
from dataset.readers.formats import BadSample, MissingImage, open_data
from dataset.sample import TURNS
from dataset.tokenizer import Tokenizer

BOM = b"\xef\xbb\xbf"


def nested(depth, inside=7):
    for _ in range(depth):
        inside = [inside]
    return inside


GOOD = show("a.png")
Q, A = ("user", "Who?"), ("assistant", "A cat.")

# ---------------------------------------------------------------- records, in every format

RECORDS = [
    # missing keys and wrong types
    ("no key", {}, "'conversations' must be a list of turns"),
    ("an unknown key", {"text": "hello"}, "'conversations' must be a list of turns"),
    ("null", {"conversations": None}, "found 'None'"),
    ("no turn", {"conversations": []}, "'conversations' must be a list"),
    ("a number", {"conversations": 7}, "found '7'"),
    ("true", {"conversations": True}, "found 'True'"),
    ("NaN", {"conversations": float("nan")}, "found 'nan'"),
    ("an object", {"conversations": {"role": "user"}}, "must be a list of turns"),
    ("a list of texts", {"conversations": ["hi"]}, "must be a list of turns"),
    ("a list of null", {"conversations": [None]}, "must be a list of turns"),
    ("one turn is a text", {"conversations": [{"role": "user", "content": "u"}, "a"]}, "must be"),
    ("lists in lists", {"conversations": nested(50)}, "must be a list of turns"),
    ("messages is a number", {"messages": 1}, "'messages' must be a list of turns"),
    # roles
    ("an unknown role", talk(("robot", "x")), "unknown role 'robot'; expected one of system"),
    ("a role of a tool", talk(("Tool", "x"), A), "unknown role 'Tool'"),
    ("an empty role", talk(("", "x"), A), "unknown role ''"),
    ("tool", talk(Q, ("tool", "x"), A), "unknown role 'tool'"),
    ("no role", {"conversations": [{"content": "x"}]}, "the role of a turn is 'None'"),
    ("the role is a number", talk((1, "x")), "the role of a turn is '1'"),
    ("the role is a list", talk((["user"], "x")), r"role of a turn is \"\['user'\]\"; expe"),
    ("the role is an object", talk(({"a": 1}, "x")), "the role of a turn is"),
    ("a role that steers a screen", talk(("\x1b[2J\r\n", "x")), r"unknown role '\\x1b\[2J\\r\\n'"),
    ("a role of 1 MB", talk(("r" * 1_000_000, "x")), "expected one of system, user, assistant"),
    # contents
    ("no content", {"conversations": [{"role": "user"}]}, "content of a user turn is None, not"),
    ("the content is a number", talk(("user", 3)), "content of a user turn is 3, not text"),
    ("the content is NaN", talk(("user", float("nan"))), "turn is nan, not text"),
    ("the content is infinite", talk(("user", float("inf"))), "turn is inf, not text"),
    ("the content is an object", talk(("user", {"a": 1})), "{'a': 1}, not text"),
    ("a part is a text", talk(("user", ["hi"]), A), "a part of a turn is 'hi'; expected an image"),
    ("a part is null", talk(("user", [None]), A), "a part of a turn is 'None'"),
    ("a part is a sound", talk(("user", [{"type": "audio"}]), A), "expected an image or a text"),
    ("a part's text is a number", talk(("user", [{"type": "text", "text": 7}]), A), "a part of a"),
    ("half a character", talk(("user", "\ud83d"), A), "surrogates not allowed"),
    ("half a character in an answer", talk(Q, ("assistant", "x\udc00")), "surrogates not allowed"),
    ("an empty answer", talk(Q, ("assistant", "")), "an answer is empty"),
    ("an answer of spaces", talk(Q, ("assistant", " \n\t\u3000")), "an answer is empty"),
    ("one of two answers is empty", talk(Q, A, Q, ("assistant", "")), "an answer is empty"),
    ("an answer of 1.5 MB", talk(Q, ("assistant", "猫" * 500_000)), "a conversation of 500,017 ch"),
    ("70,000 turns", talk(*[Q] * 70_000), "a conversation of 560,000 characters; expected at most"),
    # other layouts
    ("prompt alone", {"prompt": 7, "completion": "x"}, "'prompt and completion' must be"),
    ("the completion is empty", {"prompt": "u", "completion": ""}, "an answer is empty"),
    ("texts are no pairs", {"texts": ["hi"]}, "'texts' must be .* with user and assistant"),
    ("a pair without its half", {"texts": [{"user": "u"}]}, "assistant turn is None, not text"),
    ("a caption is a number", {"caption": 7, "image": "a.png"}, "'caption' is '7'; expected a"),
    ("a caption among captions", {"caption": ["x", 7], "image": "a.png"}, "expected a text or sev"),
    ("no caption", {"caption": ["", " "], "image": "a.png"}, "'caption' holds no text"),
    ("a caption without picture", {"caption": "A cat.", "image_id": 7}, "'image_id' is '7', not a"),
    # pictures and markers
    ("no image", talk(("user", "<image>"), A), "1 <image> markers for 0 images"),
    ("fewer pictures", talk(("user", "<image><image>"), A, image="a.png"), "2 <image> .* 1 image"),
    ("more pictures", {**GOOD, "image": ["a.png", "a.png"]}, "1 <image> markers for 2 images"),
    ("50 pictures, 1 marker", {**GOOD, "image": ["a.png"] * 50}, "1 <image> markers for 50"),
    ("50 markers, 1 picture", talk(("user", "<image>" * 50), A, image="a.png"), "50 <image> mar"),
    ("nobody to show it to", talk(A, image="a.png"), "an image, but no user turn"),
    ("the picture is a number", show(7), "'image' is '7', not an image"),
    ("the picture is true", show(True), "'image' is 'True', not an image"),
    ("the picture is an object", show({"uri": "x"}), "not an image; expected a file name"),
    ("a picture is a list", show([["a.png"]]), r"is \"\['a.png'\]\", not an image"),
    ("a picture is null", show(["a.png", None]), "'image' is 'None', not an image"),
    # names of pictures
    ("not there", show("gone.png"), "no image .*gone.png; is the image directory right"),
    ("a web address", show("https://example.com/a.png"), "a.png.*: nothing is fetched from the n"),
    ("with a zero byte", show("a\0.png"), r"no image .*a\\x00.png"),
    ("with a line end", show("a\nb.png"), r"no image .*a\\nb.png"),
    ("with half a character", show("\ud83d.png"), r"no image .*\\ud83d.png"),
    ("that steers a terminal", show("\x1b[31m.png"), r"no image .*\\x1b\[31m.png"),
    ("of 5,000 letters", show("n" * 5000), "no image .* is the image directory right"),
    ("of 1 MB", show("n" * 1_000_000), "no image .* is the image directory right"),
    ("a directory", show("folder.png"), "no image: .*folder.png is a directory, pipe or device"),
    ("the folder itself", show("."), "is a directory, pipe or device"),
    ("a pipe", show("pipe.png"), "pipe.png is a directory, pipe or device"),
    ("a link that goes round", show("round.png"), "no image .*round.png"),
    ("a link to nothing", show("nothing.png"), "no image .*nothing.png"),
    # names that lead out of the folder, to a file that is there
    ("..", show("../secret.png"), "leads out of the image folder .*, to .*secret.png: not opened"),
    (".. in the middle", show("sub/../../secret.png"), "leads out of the image folder"),
    (".. to a file that is not there", show("../no.png"), "leads out of the image folder"),
    ("an absolute path", show("/etc/passwd"), "leads out of .*, to /etc/passwd: not opened"),
    ("a device", show("/dev/zero"), "leads out of .*, to /dev/zero"),
    ("a link to a device", show("zero.png"), "leads out of .*, to /dev/zero"),
    ("a link", show("link.png"), "'link.png' leads out of .*, to .*secret.png"),
    ("through a linked folder", show("out/secret.png"), "leads out of the image folder"),
    ("one of several", talk(("user", "<image><image>"), A, image="a.png,../secret.png"), "leads"),
    ("a neighbour that begins alike", show("../pictures2/b.png"), "leads out of the image folder"),
    ("in an object", show({"path": "../secret.png", "bytes": None}), "leads out of the image"),
    ("in a caption", {"caption": "A cat.", "image_id": "../secret.png"}, "leads out of the image"),
]

# What looks odd and is sound: name, record, the messages' last text, how many pictures.
SOUND = [
    ("one letter", talk(Q, ("assistant", "x")), "x", 0),
    ("an answer alone", talk(A), "A cat.", 0),
    ("a zero byte in a text", talk(Q, ("assistant", "a\0b")), "a\0b", 0),
    ("the end of a turn, typed", talk(Q, ("assistant", "<|im_end|>")), "<|im_end|>", 0),
    ("an empty question", talk(("user", ""), A), "A cat.", 0),
    ("two questions in a row", talk(Q, Q, A), "A cat.", 0),
    ("NaN and infinity", {**talk(Q, A), "score": float("nan"), "w": float("inf")}, "A cat.", 0),
    ("tags of another kind", {**talk(Q, A), "kind": ["x"], "language": {"a": 1}}, "A cat.", 0),
    ("an inner link", show("inner.png"), "A cat.", 1),
    ("out and in again", show("sub/../a.png"), "A cat.", 1),
    ("two markers, one picture twice", talk(("user", "<image><image>"), A,
                                            image="a.png,a.png"), "A cat.", 2),
    ("50 pictures", talk(("user", "<image>" * 50), A, image=["a.png"] * 50), "A cat.", 50),
    ("half a million letters less a few", talk(("assistant", "x" * 499_991)), "x" * 499_991, 0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """pictures/, to be read, and beside it what must never be."""
    base = tmp_path_factory.mktemp("data")
    (base / "pictures" / "sub").mkdir(parents=True)
    (base / "pictures2").mkdir()
    for name in ("pictures/a.png", "secret.png", "pictures2/b.png"):
        Image.new("RGB", (8, 8), "red").save(base / name)
    inside = base / "pictures"
    (inside / "folder.png").mkdir()
    os.mkfifo(inside / "pipe.png")
    links = {"link.png": base / "secret.png", "out": base, "zero.png": "/dev/zero",
             "round.png": "round.png", "nothing.png": "no", "inner.png": "a.png"}
    for name, target in links.items():
        (inside / name).symlink_to(target)
    return base


def lines(path, record):
    good = json.dumps(GOOD)
    path.write_text(f"{good}\n{json.dumps(record)}\n{good}\n")
    return 3, 1, f"{path}:2"


def array(path, record):
    good = json.dumps(GOOD)
    path.write_text(f"[{good},\n{json.dumps(record)},\n{good}]")
    return 3, 1, f"{path}:2"


def parquet(path, record):
    """Its one row: turns as JSON text, other columns of the types that their values ask for."""
    table = {key: [json.dumps(value) if key in TURNS else value]
             for key, value in (record or {"caption": None}).items()}
    try:
        pq.write_table(pa.table(table), path)
    except (pa.ArrowException, ValueError, TypeError):
        return None  # no column can hold such a value
    return 1, 0, f"{path}:1"


@pytest.fixture
def tidy(folder):
    """Data files are written beside the folder and removed again."""
    path = folder / "data"
    yield path
    path.unlink(missing_ok=True)


def plain_and_short(text: str) -> None:
    text.encode("utf-8")  # a log must be able to take it
    assert text.isprintable(), "one line, nothing that steers a terminal"
    assert len(text) < 1000, len(text)


@pytest.mark.parametrize("written", [lines, array, parquet])
@pytest.mark.parametrize("name, record, words", RECORDS, ids=[case[0] for case in RECORDS])
def test_a_bad_record_is_skipped_with_its_line(tidy, folder, name, record, words, written):
    told = written(tidy, record)
    if told is None:
        pytest.skip("Parquet cannot hold it")
    count, number, where = told
    with watched() as seen:
        try:
            data = open_data(tidy, folder / "pictures")
        except ValueError as error:  # a Parquet file says by its columns that it is of no use
            assert written is parquet and f"{tidy} has the columns" in str(error)
            return
        assert len(data) == count
        with pytest.raises(BadSample) as caught:
            data[number]
    caught.match(words)
    assert str(caught.value).startswith(f"{where}: ")
    plain_and_short(str(caught.value))
    assert not seen.started and set(seen.opened_outside(folder / "pictures")) <= {str(tidy)}
    if count == 3:
        assert data[0].messages == data[2].messages and len(data[0].images) == 1


@pytest.mark.parametrize("written", [lines, array, parquet])
@pytest.mark.parametrize("name, record, last, pictures", SOUND, ids=[case[0] for case in SOUND])
def test_an_odd_record_that_is_sound_is_used(tidy, folder, name, record, last, pictures, written):
    _, number, _ = written(tidy, record)
    sample = open_data(tidy, folder / "pictures")[number]
    assert sample.messages[-1].content == last and len(sample.images) == pictures
    assert sample.tags == {} and {load_image(i).size for i in sample.images} <= {(8, 8)}


def test_a_missing_picture_and_a_forbidden_one_are_told_apart(tidy, folder):
    tidy.write_text(json.dumps(show("gone.png")) + "\n" + json.dumps(show("../secret.png")))
    data = open_data(tidy, folder / "pictures")
    with pytest.raises(MissingImage):
        data[0]
    with pytest.raises(BadSample) as caught:
        data[1]
    assert not isinstance(caught.value, MissingImage)


# ---------------------------------------------------------------- lines that are no records

good = json.dumps(GOOD).encode()
LINES = [
    ("cut in a key", good[:10], "not JSON: .* of the record"),
    ("cut in a text", good[:60], "not JSON: Invalid control character"),  # its line end
    ("cut before its end", good[:-1], "not JSON: .* at character"),
    ("twice in a line", good + good, "not JSON: Extra data"),
    ("with a comma behind", good + b",", "not JSON: Extra data"),
    ("single quotes", str(GOOD).encode(), "not JSON: Expecting property name"),
    ("a comment", b"// " + good, "not JSON: Expecting value"),
    ("null", b"null", "expected an object, found 'None'"),
    ("a number", b"7", "expected an object, found '7'"),
    ("a text", b'"hello"', "expected an object, found 'hello'"),
    ("a list", b"[1, 2]", "expected an object, found '\\[1, 2\\]'"),
    ("NaN", b"NaN", "expected an object, found 'nan'"),
    ("words", b"hello there", "not JSON: Expecting value"),
    ("a web page", b"<!DOCTYPE html>", "not JSON: Expecting value"),
    ("zero bytes", bytes(40), "not JSON: Expecting value"),
    ("a zero byte in it", good.replace(b"cat", b"c\0t"), "not JSON: Invalid control character"),
    ("a zero byte after the first", good[:1] + b"\0" + good[1:], "not JSON: "),
    ("no UTF-8", good.replace(b"cat", b"\xff\xfe"), "not JSON: 'utf-8' codec can't decode"),
    ("UTF-8 cut short", good.replace(b"cat", b"\xe7\x8c"), "not JSON: 'utf-8' codec"),
    ("an encoded half character", good.replace(b"cat", b"\xed\xa0\xbd"), "not JSON: 'utf-8'"),
    ("UTF-16", json.dumps(GOOD).encode("utf-16-le"), "not JSON: "),
    ("Latin-1", good.replace(b"cat", b"\xe9l\xe8ve"), "not JSON: 'utf-8' codec"),
    ("compressed", b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "not JSON: 'utf-8' codec"),
    ("a tab in a text", good.replace(b"cat", b"c\tt"), "not JSON: Invalid control character"),
    ("a wrong escape", good.replace(b"cat", b"\\x41"), "not JSON: Invalid \\\\\\\\?escape"),
    ("a number of 5,000 digits", b'{"n": ' + b"1" * 5000 + b"}", "not JSON: .*digits|must be a li"),
    ("100,000 lists deep", b'{"a":' + b"[" * 100_000, "not JSON: "),
    ("100,000 lists deep and back", b"[" * 100_000 + b"]" * 100_000, "not JSON: "),
    ("900 lists deep and back", b"[" * 900 + b"]" * 900, "expected an object|not JSON"),
    ("400 lists deep and back", b"[" * 400 + b"]" * 400, "expected an object, found|not JSON"),
    ("900 lists for a role", json.dumps(talk((nested(900), "x"))).encode(), "role of a|not JSON"),
    ("700 lists for a text", json.dumps(talk(("user", nested(700)))).encode(), "part|not JSON"),
    ("10 MB of one letter", b"x" * 10_000_000, "not JSON: Expecting value"),
    ("10 MB without end", b'{"conversations": "' + b"x" * 10_000_000, "not JSON: Invalid control"),
    ("a question of 10 MB", good.replace(b"Who", b"x" * 10_000_000), "a conversation of 10,000,0"),
    ("a name of 10 MB", good.replace(b"a.png", b"n" * 10_000_000), "no image .*directory right"),
]
SOUND_LINES = [
    ("CR LF", good + b"\r"),
    ("spaces around", b"  \t" + good + b"  "),
    ("its own BOM", BOM + good),
    ("a key twice", good[:-1] + b', "image": "a.png"}'),
    ("keys in another order", json.dumps(dict(reversed(GOOD.items()))).encode()),
    ("escaped letters", good.replace(b"cat", b"\\u0063at")),
]


@pytest.mark.parametrize("name, line, words", LINES, ids=[case[0] for case in LINES])
def test_a_line_that_is_no_record_is_skipped_with_its_number(tidy, folder, name, line, words):
    tidy.write_bytes(good + b"\n" + line + b"\n\n" + good + b"\r\n")
    data = open_data(tidy, folder / "pictures")
    assert len(data) == 3
    with pytest.raises(BadSample, match=words) as caught:
        data[1]
    assert caught.value.where == f"{tidy}:2"
    plain_and_short(str(caught.value))
    assert data[0].messages == data[2].messages and data[2].where == f"{tidy}:4"


@pytest.mark.parametrize("name, line, words", LINES, ids=[case[0] for case in LINES])
def test_in_an_array_it_spoils_itself_or_is_named_when_the_file_is_opened(
        tidy, folder, name, line, words):
    """An array has no line ends to go on from."""
    tidy.write_bytes(b"[" + good + b",\n" + line + b",\n" + good + b"]")
    try:
        data = open_data(tidy, folder / "pictures")
    except ValueError as error:
        assert str(error).startswith(f"{tidy}:") and len(str(error)) < 1000
        assert "not JSON" in str(error) or "something follows the end of the array" in str(error)
        return
    usable = [i for i in range(len(data)) if sound(data, i)]
    assert 0 in usable and len(data) - 1 in usable  # the ones before and behind it


def sound(data, i) -> bool:
    try:
        return data[i].messages == data[0].messages
    except BadSample as bad:
        plain_and_short(str(bad))
        return False


@pytest.mark.parametrize("name, line", SOUND_LINES, ids=[case[0] for case in SOUND_LINES])
def test_an_odd_line_that_is_sound_is_used(tidy, folder, name, line):
    tidy.write_bytes(BOM + good + b"\r\n" + line + b"\n" + good)
    first, second, third = open_data(tidy, folder / "pictures")
    assert first.messages == second.messages == third.messages
    assert first.images == second.images == third.images


# ---------------------------------------------------------------- whole files

PNG = b"\x89PNG\r\n\x1a\n"
COCO = b'{"info": {}, "images": %b, "annotations": %b}'
FILES = [
    ("empty", b"", "starts with b''; expected JSON Lines"),
    ("a BOM alone", BOM, "expected JSON Lines"),
    ("spaces", b" \n" * 50, "expected JSON Lines"),
    ("words", b"hello", "starts with b'hello'; expected JSON Lines"),
    ("CSV", b"image,caption\na.png,A cat.\n", "expected JSON Lines"),
    ("a picture", PNG, r"starts with b'\\x89PNG"),
    ("a zip archive", b"PK\x03\x04", "starts with b'PK"),
    ("compressed lines", b"\x1f\x8b\x08\x00", "expected JSON Lines"),
    ("UTF-16", json.dumps(GOOD).encode("utf-16"), r"starts with b'\\xff\\xfe"),
    ("a git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("a pickle", b"\x80\x04\x95", "expected JSON Lines"),
    ("an open array", b"[" + good, ":1: not JSON: .*the file ends too early"),
    ("an array cut in a text", b"[" + good + b",\n" + good[:60], ":2: not JSON: Unterminated"),
    ("an array of 100,000 arrays", b"[" * 100_000, ":1: not JSON: maximum recursion"),
    ("an array with a word", b"[" + good + b", what]", ":1: not JSON: Expecting value"),
    ("two arrays", b"[" + good + b"]\n[" + good + b"]", ":2: something follows the end of the arr"),
    ("a number of 5,000 digits", b"[" + b"1" * 5000 + b"]", ":1: not JSON: .*digits"),
    ("Parquet's first word", b"PAR1", "not readable as Parquet"),
    ("Parquet's first and last", b"PAR1" + bytes(40) + b"PAR1", "not readable as Parquet"),
    ("a footer of 4 GB", b"PAR1" + bytes(40) + b"\xff\xff\xff\xff" + b"PAR1", "not readable as"),
    ("COCO without images", COCO % (b"[]", b"[]"), "has 0 images and 0 annotations"),
    ("COCO, an image without id", COCO % (b"[{}]", b"[{}]"), ":1: an image without a number as"),
    ("COCO, an id of 30 digits", COCO % (b'[{"id": %d}]' % 10**30, b"[{}]"), "without a number as"),
    ("COCO, an id is a text", COCO % (b'[{"id": "9"}]', b"[{}]"), "without a number as its 'id'"),
    ("COCO, an image is a list", COCO % (b"[[]]", b"[{}]"), "an image without a number as"),
    ("COCO, cut", (COCO % (b"[]", b"[]"))[:-9], "not JSON: .*ends too early"),
]


@pytest.mark.parametrize("name, content, words", FILES, ids=[case[0] for case in FILES])
def test_a_file_that_is_of_no_use_says_so_by_name(tidy, name, content, words):
    tidy.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        open_data(tidy)
    assert str(tidy) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["pictures", "pictures/pipe.png", "nothing", "pictures/round.png"])
def test_what_is_no_file_is_not_opened(folder, name):
    with pytest.raises(FileNotFoundError, match=f"no data file .*{name}"):
        open_data(folder / name)


ANNOTATIONS = [  # of COCO: the annotation, what the message says
    ("an id of 30 digits", {"image_id": 10**30, "caption": "x"}, "image_id 1000.* is none of the"),
    ("an id is a text", {"image_id": "1", "caption": "x"}, "image_id 1 is none of the file's 2"),
    ("no id", {"caption": "x"}, "image_id None is none of the file's 2 images"),
    ("no caption", {"image_id": 1, "bbox": []}, "the annotation has no 'caption'"),
    ("a caption is a list of lists", {"image_id": 1, "caption": [[]]}, "expected a text or sev"),
    ("a number", 7, "expected an object, found '7'"),
    ("a picture outside", {"image_id": 2, "caption": "x"}, "leads out of the image folder"),
]


@pytest.mark.parametrize("name, annotation, words", ANNOTATIONS, ids=[c[0] for c in ANNOTATIONS])
def test_a_bad_annotation_of_coco_is_skipped_with_its_line(tidy, folder, name, annotation, words):
    images = json.dumps([{"id": 1, "file_name": "a.png"},
                         {"id": 2, "file_name": "../secret.png"}]).encode()
    tidy.write_bytes(COCO % (images, b"\n[" + json.dumps(annotation).encode() + b"]"))
    with pytest.raises(BadSample, match=words) as caught:
        open_data(tidy, folder / "pictures")[0]
    assert caught.value.where == f"{tidy}:2"


COLUMNS = [  # of Parquet, one row: name, columns, what the message says
    ("deep JSON", {"conversations": ["[" * 100_000]}, "cannot read 'conversations': not JSON"),
    ("cut JSON", {"conversations": ['[{"role": "us']}, "cannot read 'conversations': not JSON"),
    ("an empty text", {"conversations": [""]}, "cannot read 'conversations': not JSON"),
    ("bytes for text", {"conversations": [b"[]"]}, "'conversations' must be a list of turns"),
    ("numbers", {"conversations": [[1, 2]]}, "'conversations' must be a list of turns"),
    ("a time", {"caption": [pa.scalar(0, pa.timestamp("us"))], "image": ["a.png"]}, "'caption' is"),
    ("bytes that are no image", {"caption": ["A cat."], "image_bytes": [b""]}, "not an image"),
    ("a path in bytes", {"caption": ["x"], "image": [{"bytes": None, "path": "../secret.png"}]},
     "leads out of the image folder"),
]


@pytest.mark.parametrize("name, columns, words", COLUMNS, ids=[case[0] for case in COLUMNS])
def test_a_bad_row_of_parquet_is_skipped_with_its_number(tidy, folder, name, columns, words):
    pq.write_table(pa.table(columns), tidy)
    with pytest.raises(BadSample, match=words) as caught:
        open_data(tidy, folder / "pictures")[0]
    assert caught.value.where == f"{tidy}:1"
    plain_and_short(str(caught.value))


# ---------------------------------------------------------------- refused when they are rendered

LATE = [
    ("no answer", talk(Q), "no supervised token: the conversation has no assistant turn"),
    ("50 pictures", talk(("user", "<image>" * 50), A, image=["a.png"] * 50), "part of an image"),
    ("a long question", talk(("user", "x " * 5000), A), "no supervised token within max_length 64"),
    ("the system alone", talk(("system", "s")), "no supervised token"),
]


@pytest.mark.parametrize("name, record, words", LATE, ids=[case[0] for case in LATE])
def test_what_cannot_be_trained_on_is_skipped_with_its_line(
        tidy, folder, tiny_tokenizer_dir, name, record, words):
    tidy.write_text(json.dumps(record))
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), image_tokens=4)
    batches = Batches(open_data(tidy, folder / "pictures"), template, None, 1, 64, seed=0)
    (batch, (bad,)), = batches.epoch(0)
    assert batch.where == [] and bad.where == f"{tidy}:1"
    assert words in bad.reason
