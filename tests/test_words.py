"""Claims: words never cut a character, add up to the whole answer, and English ones are whole."""

import pytest

from dataset.tokenizer import Tokenizer
from extras.text_drawing import words
from tests.tiny import ROOT, make_tokenizer


@pytest.fixture(scope="module")
def by_bytes(tmp_path_factory):
    """Each byte a token: a Chinese character is three of them, an emoji four."""
    directory = tmp_path_factory.mktemp("bytes")
    make_tokenizer(directory)
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def emoji():
    return Tokenizer.from_directory(ROOT / "dataset" / "emoji" / "language")


CASES = [("An anchor, an owl.", ["An", " anchor,", " an", " owl."]),
         ("一节电池。", ["一", "节", "电", "池。"]),
         ("It is 猫 or cat", ["It", " is", " 猫", " or", " cat"]),
         ("猫cat", ["猫", "cat"]), ("🦉🦉 ok", ["🦉", "🦉", " ok"]), ("\n\nYes", ["\n\nYes"]),
         ("don't", ["don't"]), ("", [])]


@pytest.mark.parametrize("text, expected", CASES)
def test_words_of_bytes(by_bytes, text, expected):
    ids = by_bytes.encode(text)
    found = words(by_bytes, ids)
    assert [word for word, _ in found] == expected
    assert [place for _, places in found for place in places] == list(range(len(ids)))
    for word, places in found:
        assert by_bytes.decode([ids[place] for place in places]) == word


@pytest.mark.parametrize("text, _", CASES)
def test_words_of_the_demo_tokenizer_add_up(emoji, text, _):
    ids = emoji.encode(text)
    found = words(emoji, ids)
    assert "".join(word for word, _ in found) == emoji.decode(ids)
    assert [place for _, places in found for place in places] == list(range(len(ids)))


def test_half_a_character_at_the_end_is_a_word_of_its_own(by_bytes):
    """An answer that was stopped, or cut at its longest."""
    ids = by_bytes.encode("ok 猫")[:-1]
    assert [places for _, places in words(by_bytes, ids)] == [[0, 1], [2, 3, 4]]
