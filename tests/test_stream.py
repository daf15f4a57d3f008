"""Claim: streamed pieces never hold half a character, and together they are the decoded text."""

import pytest

from dataset.tokenizer import Tokenizer
from model.generate import REPLACEMENT_CHARACTER, TextStreamer

TEXTS = ("plain words", "猫和狗在桌子上。", "a 🐈 and 👩‍👩‍👧 end", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "naïve\n\n x")


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters(tiny_tokenizer_dir, text):
    tokenizer = Tokenizer.from_directory(tiny_tokenizer_dir)
    stream = TextStreamer(tokenizer)
    ids = tokenizer.encode(text)
    pieces = [stream.add(i) for i in ids]
    assert not any(REPLACEMENT_CHARACTER in piece for piece in pieces), pieces
    assert "".join(pieces) + stream.end() == text
    if text.isascii():
        assert all(pieces), "whole characters come at once"


def test_what_is_never_completed_comes_at_the_end(tiny_tokenizer_dir):
    tokenizer = Tokenizer.from_directory(tiny_tokenizer_dir)
    stream = TextStreamer(tokenizer)
    half = tokenizer.encode("a🦜")[:-1]  # the bird lacks its last byte
    assert "".join(stream.add(i) for i in half) == "a"
    assert stream.end() == REPLACEMENT_CHARACTER
    assert stream.end() == ""


def test_a_broken_character_in_the_middle_does_not_stop_the_stream(tiny_tokenizer_dir):
    tokenizer = Tokenizer.from_directory(tiny_tokenizer_dir)
    stream = TextStreamer(tokenizer)
    ids = tokenizer.encode("🦜")[:-1] + tokenizer.encode("ok 猫") + tokenizer.encode(" now")
    text = "".join(stream.add(i) for i in ids)
    assert text + stream.end() == tokenizer.decode(ids) == f"{REPLACEMENT_CHARACTER}ok 猫 now"
