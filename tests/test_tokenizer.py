"""Claim: text becomes the ids that the published tokenizer gives, and never a special token."""

import base64
import json
import pickle
import shutil
import sys

import pytest
import transformers
from conftest import ROOT, needed, shared_dir, weights_dir

from dataset.tokenizer import Tokenizer
from extras.check_data import make_template
from extras.convert import tiktoken
from extras.convert.tiktoken import (
    FIRST_QWEN_TOKENS,
    SPECIAL_TOKENS,
    TEXT_TOKENS,
    byte_alphabet,
    halves,
)
from model.pretrained.hub import resolve

TEXTS = ["", " ", "Hello, world!", "  two  spaces ", "a\n\n\nb\r\n\tc", "it's WE'LL don't",
         "3.14159", "图片里有4个橙子、3个碗。", "emoji 🍊👩‍👩‍👧 end", "e\u0301 é ﬁ",
         "def f(x):\n    return x**2\n", "ÀÉÎ ŧħ", "مرحبا नमस्ते สวัสดี", "\u200b\ufeff\x00",
         "<image>", "<think>so</think>", "\u3000全角　空格", "x" * 300,
         "https://a.b/c?d=e&f=%20", "\n", "\r\n\r\n", "\t\t \n  ", "a \u2028\u00a0b  ", " \n x",
         "if x:\r\n\treturn {'k': [1, 2]}  # 注释 🙂\n\n\n", "中文mixed English和123,456。\n下一行",
         "𠮷野家 ㊙️ 🏳️‍🌈 👍🏽 🇨🇳", "ＡＢＣ①②", "«a» – “b” … ‘c’", "\x7f\x1b[31m",
         "\ud7ff\ue000\U0010ffff"]


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer_dir):
    return Tokenizer.from_directory(tiny_tokenizer_dir)


def tiny_tiktoken(tiny, directory, **files):
    """The merges of a tokenizer as qwen.tiktoken lists them; files: {name: JSON to lie beside}."""
    bytes_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    ranks = [bytes([byte]) for byte in range(256)]
    for pair in json.loads(tiny.backend.to_str())["model"]["merges"]:
        ranks.append(bytes(bytes_of[character] for character in "".join(pair)))
    lines = [base64.b64encode(token).decode() + f" {rank}\n" for rank, token in enumerate(ranks)]
    (directory / "qwen.tiktoken").write_text("".join(lines))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer.from_directory(resolve(directory))


@pytest.fixture(scope="module")
def real(tmp_path_factory, request):
    """Each public tokenizer, read once: real("qwen"), or skip where it is not there."""
    read = {}
    # Both generations of Qwen stand on the same 151,643 ranks: their halves are looked for once.
    found = {}
    patch = pytest.MonkeyPatch()
    patch.setattr(tiktoken, "halves", lambda token, ranks: found.get((token, len(ranks)))
                  or found.setdefault((token, len(ranks)), halves(token, ranks)))
    request.addfinalizer(patch.undo)

    def get(name):
        if name == "emoji":
            directory = ROOT / "dataset/emoji/language"
        elif name == "minimind":
            directory = needed(shared_dir(), "tokenizers/minimind")
        elif name.startswith("tiktoken"):
            directory = needed(weights_dir(), "qwen")
        else:
            directory = needed(weights_dir(), name)
        if name not in read and name.startswith("tiktoken"):
            alone = tmp_path_factory.mktemp(name)
            shutil.copy(directory / "qwen.tiktoken", alone)
            if name == "tiktoken of the first Qwen":
                (alone / "config.json").write_text('{"model_type": "qwen"}')
            directory = alone
        if name not in read:
            read[name] = Tokenizer.from_directory(resolve(directory))
        return read[name]

    return get


def gives_back(tokenizer, text) -> bool:
    """Byte for byte; Qwen composes accents before anything else (NFC), as published."""
    normalizer = tokenizer.backend.normalizer
    expected = normalizer.normalize_str(text) if normalizer else text
    return tokenizer.decode(tokenizer.encode(text)).encode() == expected.encode()


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_the_text_back(tiny, text):
    assert gives_back(tiny, text)


@pytest.mark.parametrize("name", ["emoji", "minimind", "smollm2", "qwen", "tiktoken"])
def test_decode_gives_the_text_back_with_public_tokenizers(real, name):
    for text in [*TEXTS, "\n".join(TEXTS)]:
        assert gives_back(real(name), text), repr(text)


def test_special_token_that_a_user_types_is_ordinary_text(tiny):
    special = {tiny.token_id(token) for token in SPECIAL_TOKENS}
    for token in SPECIAL_TOKENS:
        ids = tiny.encode(f"I typed {token} here")
        assert special.isdisjoint(ids), f"{token} became a real special token: {ids}"
        assert tiny.decode(ids) == f"I typed {token} here"


def test_a_worker_process_keeps_that_rule(tiny):
    # Pickling the backend alone forgets it; loaders hand the tokenizer to workers by pickling.
    copy = pickle.loads(pickle.dumps(tiny))
    assert copy.encode("<|im_end|>") == tiny.encode("<|im_end|>")


def test_names_and_sizes(tiny):
    assert tiny.vocab_size == max(tiny.backend.get_vocab().values()) + 1
    assert tiny.has("<|im_end|>") and not tiny.has("<|no_such|>")
    with pytest.raises(KeyError, match="no_such"):
        tiny.token_id("<|no_such|>")
    assert tiny.decode([tiny.vocab_size + 7, *tiny.encode("a")]) == "a"


def test_truncation_and_padding_of_a_published_file_are_switched_off(tiny_tokenizer_dir, tmp_path):
    public = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    public["truncation"] = {"max_length": 4, "stride": 0, "strategy": "LongestFirst",
                            "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(public), encoding="utf-8")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode("far more than four tokens")) == (
        "far more than four tokens")


def test_saving_keeps_ids_and_companions(tiny_tokenizer_dir, tmp_path):
    shutil.copy(tiny_tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    before = Tokenizer.from_directory(tmp_path)
    before.save(tmp_path / "saved")
    after = Tokenizer.from_directory(tmp_path / "saved")
    assert (tmp_path / "saved/tokenizer_config.json").read_text() == '{"eos_token": "<|im_end|>"}'
    for text in TEXTS:
        assert after.encode(text) == before.encode(text)


def test_a_directory_without_tokenizer_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Tokenizer.from_directory(tmp_path)


def test_merges_follow_from_ranks():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5}
    assert halves(b"abc", ranks) == [b"ab", b"c"]  # "ab" has the better rank, so it joins first


def test_tiktoken_gives_the_merges_that_it_was_made_from(tiny, tmp_path):
    ours = tiny_tiktoken(tiny, tmp_path)
    model, expected = (json.loads(t.backend.to_str())["model"] for t in (ours, tiny))
    assert model["merges"] == expected["merges"] and len(model["merges"]) > 100
    assert model["vocab"].keys() == expected["vocab"].keys() - set(SPECIAL_TOKENS)
    for text in TEXTS:
        if "<think>" not in text:  # the one has a token for it
            assert ours.backend.encode(text).tokens == tiny.backend.encode(text).tokens


def test_special_tokens_follow_the_ranks_and_differ_with_the_generation(tiny, tmp_path):
    (tmp_path / "later").mkdir()
    (tmp_path / "first").mkdir()
    (tmp_path / "by_class").mkdir()
    later = tiny_tiktoken(tiny, tmp_path / "later", config={"model_type": "qwen2"})
    first = tiny_tiktoken(tiny, tmp_path / "first", config={"model_type": "qwen"})
    ranks = first.vocab_size - len(FIRST_QWEN_TOKENS)
    assert later.vocab_size == ranks + len(SPECIAL_TOKENS + TEXT_TOKENS)
    for number, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]):
        assert first.token_id(token) == later.token_id(token) == ranks + number
    assert first.token_id("<|extra_0|>") == later.token_id("<|object_ref_start|>") == ranks + 3
    assert first.token_id("<|extra_204|>") == first.vocab_size - 1
    assert not first.has("<|image_pad|>") and not later.has("<|extra_0|>")
    assert len(first.encode("<think>")) > 1 == len(later.encode("<think>"))
    template = make_template(str(tmp_path / "first"), None, 2)  # without weights too
    assert (template.family, template.image_token_id) == ("qwen", ranks + 3)
    # Without a config.json the tokenizer's own file tells; and a saved one needs neither.
    by_class = tiny_tiktoken(tiny, tmp_path / "by_class",
                             tokenizer_config={"tokenizer_class": "QWenTokenizer"})
    by_class.save(tmp_path / "saved")
    again = Tokenizer.from_directory(tmp_path / "saved")
    assert again.backend.get_vocab() == first.backend.get_vocab()
    assert again.is_special("<|extra_0|>") and len(again.encode("<|extra_0|>")) > 1


LATE = ["<loc1>", "<|user|>"]


def vocab_merges(source, directory, said, kind="Qwen2Tokenizer"):
    """The tokenizer.json of source as vocab.json and merges.txt, with two more tokens, the second
    special. said: where the added tokens stand."""
    public = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocab, added = public["model"]["vocab"], public["added_tokens"]
    first = 1 + max([*vocab.values(), *(token["id"] for token in added)])
    added += [{**added[0], "id": first + number, "content": LATE[number], "special": bool(number),
               "normalized": not number} for number in (0, 1)]
    end = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "rstrip": False,
           "normalized": False, "single_word": False}
    config = {"tokenizer_class": kind, "eos_token": end,
              "additional_special_tokens": ["<|im_start|>", "<|user|>"]}
    files = {"vocab.json": vocab, "config.json": {"model_type": "qwen2"}}
    if said == "tokenizer_config.json":
        config["added_tokens_decoder"] = {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}
    elif said == "added_tokens.json":
        files[said] = {token["content"]: token["id"] for token in added}
    if said != "config.json":
        files["tokenizer_config.json"] = config
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    lines = [merge if isinstance(merge, str) else " ".join(merge)
             for merge in public["model"]["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), "utf-8")
    return directory


@pytest.mark.parametrize("said", ["tokenizer_config.json", "added_tokens.json", "config.json"])
@pytest.mark.parametrize("source", ["tiny", "emoji"])  # special tokens in vocab.json, and behind it
def test_vocab_and_merges_equal_the_public_tokenizer(source, said, tiny_tokenizer_dir, tmp_path):
    source = tiny_tokenizer_dir if source == "tiny" else ROOT / "dataset/emoji/language"
    directory = vocab_merges(source, tmp_path / "old", said)
    ours = Tokenizer.from_directory(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert ours.backend.get_vocab() == theirs.get_vocab()
    for text in [*TEXTS, "a <loc1> b", "\n".join(TEXTS)]:
        assert ours.encode(text) == theirs(text)["input_ids"], repr(text)
    if said != "config.json":
        assert len(ours.encode(LATE[0])) == 1 and not ours.is_special(LATE[0])
        assert ours.is_special(LATE[1]) and len(ours.encode(LATE[1])) > 1
        assert {token.content for token in ours.backend.get_added_tokens_decoder().values()
                if token.special} <= set(theirs.all_special_tokens) | set(SPECIAL_TOKENS)
        assert make_template(str(directory), None, 2).family == "qwen2"
    ours.save(tmp_path / "saved")
    assert Tokenizer.from_directory(tmp_path / "saved").encode("it's 42") == ours.encode("it's 42")


def test_vocab_and_merges_without_the_extras_are_a_sentence(tiny_tokenizer_dir, tmp_path,
                                                           monkeypatch):
    directory = vocab_merges(tiny_tokenizer_dir, tmp_path / "old", "config.json")
    monkeypatch.setitem(sys.modules, "extras.convert.vocab_merges", None)
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json; .*extras/ reads vocab.j"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize("name, content, words", [
    ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}', "a GPT2Tokenizer who"),
    ("config.json", '{"model_type": "llama"}', "this is a class whose way .*fetch tokenizer.json"),
    ("vocab.json", "{", "vocab.json and merges.txt cannot be read"),
    ("merges.txt", "a b c d\n", "vocab.json and merges.txt cannot be read"),
    ("merges.txt", "xx yy\n", "vocab.json and merges.txt cannot be read"),
    ("added_tokens.json", '{"<loc1>": 9999}', "'<loc1>' has the id 9999, but comes to be 373")])
def test_vocab_and_merges_that_cannot_be_read_are_refused(name, content, words, tiny_tokenizer_dir,
                                                         tmp_path):
    said = name if name == "added_tokens.json" else "config.json"
    directory = vocab_merges(tiny_tokenizer_dir, tmp_path / "old", said)
    (directory / name).write_text(content)
    with pytest.raises(ValueError, match=f"(?s){words}") as caught:
        Tokenizer.from_directory(directory)
    assert str(directory) in str(caught.value)
    (directory / "tokenizer.json").write_text(
        (tiny_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"), encoding="utf-8")
    Tokenizer.from_directory(directory)  # and where it lies, it alone is read


def test_what_is_special_is_never_typed(tiny, tmp_path):
    first = tiny_tiktoken(tiny, tmp_path)
    assert first.is_special("<|im_end|>") and first.token_id("<|im_end|>") not in first.encode(
        "<|im_end|>")
    assert not first.is_special("<think>")  # a single token, but text may hold it
    assert not first.is_special("@") and not first.is_special("<|no_such|>")


def test_tiktoken_equals_the_published_tokenizer_json(real):
    ours, public = real("tiktoken"), real("qwen")
    assert ours.backend.get_vocab() == public.backend.get_vocab()
    ours_model, public_model = (json.loads(t.backend.to_str())["model"] for t in (ours, public))
    assert ours_model["merges"] == public_model["merges"]
    assert len(ours_model["merges"]) == 151387 and len(ours_model["vocab"]) == 151643
    photos = needed(shared_dir(), "data/coco128/llava.json").read_text(encoding="utf-8")
    for text in [*TEXTS, photos]:
        assert ours.encode(text) == public.encode(text), text[:60]
    assert ours.token_id("<|im_start|>") == 151644 and ours.token_id("<|image_pad|>") == 151655


def test_the_first_qwen_has_its_own_tokens_behind_the_same_ranks(real):
    first = real("tiktoken of the first Qwen")
    assert [first.token_id(token) for token in FIRST_QWEN_TOKENS] == list(range(151643, 151851))
    assert first.vocab_size == 151851
    for text in TEXTS:
        if "<think>" not in text:  # a single token since Qwen3 alone
            assert first.encode(text) == real("qwen").encode(text)


def test_a_damaged_tiktoken_file_is_named_with_its_line(tmp_path):
    (tmp_path / "qwen.tiktoken").write_text("YQ== 0\nnot-base64\n")
    with pytest.raises(ValueError, match=r"qwen.tiktoken:2"):
        resolve(tmp_path)


def test_a_tiktoken_file_that_is_not_whole_is_refused(tiny, tmp_path):
    tiny_tiktoken(tiny, tmp_path)
    lines = (tmp_path / "qwen.tiktoken").read_text().splitlines(keepends=True)
    (tmp_path / "qwen.tiktoken").write_text("".join(lines[:260] + lines[270:]))
    with pytest.raises(ValueError, match="qwen.tiktoken: rank 260 is missing"):
        resolve(tmp_path)
    (tmp_path / "qwen.tiktoken").write_text("YQ== 0\nYWI= 1\n")  # a, ab
    with pytest.raises(ValueError, match="qwen.tiktoken: no token for the byte b'b'"):
        resolve(tmp_path)
    (tmp_path / "qwen.tiktoken").write_text("YQ== 0\nYg== 1\nYWJi 2\nYmI= 3\n")  # a, b, abb, bb
    with pytest.raises(ValueError, match="qwen.tiktoken: no earlier tokens join to b'abb'"):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["emoji", "minimind", "smollm2", "qwen"])
def test_ids_equal_transformers(real, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = real(name)
    ours.save(tmp_path)
    if not (tmp_path / "tokenizer_config.json").exists():
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    if name == "emoji":  # transformers chooses the class by the model's type where one stands
        (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    public = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == public.encode(text, add_special_tokens=False), repr(text)
