"""Claim: text becomes the ids that the published tokenizer gives, and never a special token."""

import json
import pickle
import shutil

import pytest
from conftest import needed, shared_dir, weights_dir

from dataset.tiktoken import SPECIAL_TOKENS, halves
from dataset.tokenizer import Tokenizer

TEXTS = ["", " ", "Hello, world!", "  two  spaces ", "a\n\n\nb\r\n\tc", "it's WE'LL don't",
         "3.14159", "图片里有4个橙子、3个碗。", "emoji 🍊👩‍👩‍👧 end", "e\u0301 é ﬁ",
         "def f(x):\n    return x**2\n", "ÀÉÎ ŧħ", "مرحبا नमस्ते สวัสดี", "\u200b\ufeff\x00",
         "<image>", "<think>so</think>", "\u3000全角　空格", "x" * 300,
         "https://a.b/c?d=e&f=%20"]


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer_dir):
    return Tokenizer.from_directory(tiny_tokenizer_dir)


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_the_text_back(tiny, text):
    expected = tiny.backend.normalizer.normalize_str(text)  # Qwen composes accents (NFC)
    assert tiny.decode(tiny.encode(text)) == expected


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


def test_tiktoken_equals_the_published_tokenizer_json(tmp_path):
    qwen = needed(weights_dir(), "qwen")
    shutil.copy(qwen / "qwen.tiktoken", tmp_path)
    ours, public = Tokenizer.from_directory(tmp_path), Tokenizer.from_directory(qwen)
    assert ours.backend.get_vocab() == public.backend.get_vocab()
    photos = needed(shared_dir(), "data/coco128/llava.json").read_text(encoding="utf-8")
    for text in [*TEXTS, photos]:
        assert ours.encode(text) == public.encode(text), text[:60]
    assert ours.token_id("<|im_start|>") == 151644 and ours.token_id("<|image_pad|>") == 151655


def test_a_damaged_tiktoken_file_is_named_with_its_line(tmp_path):
    (tmp_path / "qwen.tiktoken").write_text("YQ== 0\nnot-base64\n")
    with pytest.raises(ValueError, match=r"qwen.tiktoken:2"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["qwen", "smollm2", "minimind"])
def test_ids_equal_transformers(name):
    transformers = pytest.importorskip("transformers")
    directory = (needed(shared_dir(), "tokenizers/minimind") if name == "minimind"
                 else needed(weights_dir(), name))
    public = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    ours = Tokenizer.from_directory(directory)
    for text in TEXTS:
        assert ours.encode(text) == public.encode(text, add_special_tokens=False), text
