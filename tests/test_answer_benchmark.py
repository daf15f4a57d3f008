"""Claims: benchmarks/answer.py reckons rates, shares and ratios from what it was told, and asks a
question of exactly the length that it names."""

import pytest

from benchmarks.answer import ratios, table
from benchmarks.answer_sides import NEW, ROWS, TEXT, question
from dataset.chat import ChatTemplate
from dataset.tokenizer import Tokenizer
from extras.preset_list import ROOT


def rounds(first: float, step: float) -> list[list[float]]:
    """Three equal rounds of NEW tokens."""
    return [[first + step * number for number in range(NEW)]] * 3


def test_by_hand():
    asked = {"ours-int8": rounds(1.0, 0.01), "ours-fp32": rounds(1.0, 0.02),
             "llama.cpp-q8_0": [[2.0, 2.0 + 0.015 * (NEW - 1)]] * 3}  # first and last alone
    weights = {"ours-int8": 10**8, "ours-fp32": 4 * 10**8, "llama.cpp-q8_0": 0}
    told = table(asked, weights, read=2e10)
    assert "| ours-int8 | 1.63 (1.63 to 1.63) | 1.00 | 100.0 | 50% |" in told
    assert "| ours-fp32 | 2.26 (2.26 to 2.26) | 1.00 | 50.0 | 100% |" in told
    assert "| llama.cpp-q8_0 | 2.94 (2.94 to 2.94) | 2.00 | 66.7 | - |" in told
    assert ratios(asked).splitlines() == [
        "ours-int8 against llama.cpp-q8_0: 1.81x, decoding alone 1.50x",
        "ours-int8 against ours-fp32: 1.39x, decoding alone 2.00x"]


@pytest.mark.parametrize("fewer", [0, ROWS - 1])
def test_the_question_is_as_long_as_it_says(fewer):
    tokenizer = Tokenizer.from_directory(ROOT / "dataset/emoji/language")
    assert len(question(ChatTemplate(tokenizer, 196, None), fewer)) == 196 + TEXT - fewer


def test_no_question_is_shorter_than_its_marks():
    template = ChatTemplate(Tokenizer.from_directory(ROOT / "dataset/emoji/language"), 196, None)
    with pytest.raises(ValueError, match="the marks around a question take .* more than the 196"):
        question(template, TEXT)
