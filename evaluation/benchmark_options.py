"""The options of a multiple choice -> {"A": "a cat", ...}, and which of them an answer means.

    choices, options      ["a cat", "a dog"], its text "['a cat', 'a dog']" (MMMU), {"A": "a cat"},
                          {"label": ["A"], "text": ["a cat"]}, "A. a cat B. a dog"
    A, B, ...             a column for each (MMBench); choice_a, ... (SEED-Bench), option_a, optionA
    the question          "... Options: A: a cat, B: a dog" (MMStar)

An answer is the letter of an option, its index counted from 0 (ScienceQA, AI2D) or its text.
All answers of a file mean it in one way (see answer_style): "1" may be an index or the text "1".
"""

import ast
import json
import re
from collections import Counter
from contextlib import suppress
from string import ascii_uppercase

from dataset.readers.bad_sample import BadSample, shown
from dataset.readers.record_images import is_nothing

LETTERS = "ABCDEFGHIJ"
# "Options: A: on the book., B: beneath the cat." -> where each option begins
OPTION = re.compile(r"(?:(?<=[\s,;])|^)\(?([A-J])[:.)]\s")
LISTS = ("choices", "options")  # keys that hold all options
COLUMN = re.compile(r"((?:choice|option)_?|)([A-J]|[a-j])", re.IGNORECASE)  # or each has its own
# What may stand behind the last option: which form the answer should have.
REQUEST = re.compile(r"\s+(?:Please )?answer (?:directly|with|the question)\b.*", re.I | re.DOTALL)
STYLES = ("letter", "index", "text")


def option_keys(record: dict) -> list[str]:
    """The keys that hold the options; []: none does. A list comes before columns."""
    for key in LISTS:
        if not is_nothing(record.get(key)):
            return [key]
    groups = {}  # choice_a and choice_b belong together, as do A and B
    for key, value in record.items():
        match = COLUMN.fullmatch(key)
        if match and is_option(value):
            groups.setdefault((match[1], match[2].isupper()), {})[match[2].upper()] = key
    group = next((group for group in groups.values() if {"A", "B"} <= group.keys()), {})
    return [group[letter] for letter in sorted(group)]


def is_option(value) -> bool:
    if isinstance(value, str):
        return value.strip() not in ("", "nan")
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def options_of(record: dict, where: str) -> dict[str, str]:
    """{"A": "a cat", ...}; {}: this record has none. BadSample: they cannot be read."""
    keys = option_keys(record)
    if not keys:
        question = record.get("question")
        return options_in(question) if isinstance(question, str) else {}
    found = record[keys[0]]
    if keys[0] not in LISTS:
        found = {key[-1]: record[key] for key in keys}
    elif isinstance(found, str):
        found = parse(found)
    if isinstance(found, dict) and {"label", "text"} <= found.keys():
        letters, texts = found["label"], found["text"]
    elif isinstance(found, dict):
        found = {letter: text for letter, text in found.items() if text is not None}
        letters, texts = list(found), list(found.values())
    else:
        texts = list(found) if isinstance(found, list) else None
        while texts and texts[-1] is None:  # a table has as many places in each row
            texts.pop()
        letters = list(ascii_uppercase[:len(texts or "")])
    kinds = set(map(type, texts)) if isinstance(texts, list) else {None}
    if not (kinds <= {str} or kinds <= {int, float}) or not are_letters(letters, len(texts)):
        raise BadSample(where, f"the options in {', '.join(map(repr, keys))} are "
                               f"{shown(record[keys[0]])}; expected up to 26 texts")
    letters = [letter.upper() for letter in letters]
    texts = [str(text).strip() for text in texts]
    marked = [re.match(rf"\(?{letter}[.:)]\s+", text) for letter, text in zip(letters, texts)]
    if all(marked):  # "A. a cat": each has its letter in front already
        texts = [text[mark.end():] for text, mark in zip(texts, marked)]
    return dict(zip(letters, texts))


def are_letters(letters, count: int) -> bool:
    """Whether these are so many letters, each once."""
    return (isinstance(letters, list) and all(
        isinstance(each, str) and len(each) == 1 and each.upper() in ascii_uppercase
        for each in letters) and len(letters) == count == len({each.upper() for each in letters}))


def parse(text: str):
    """A list or an object as JSON or Python writes it; "A. a cat B. a dog"."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            found = read(text[:100_000])
            if isinstance(found, (list, dict)):
                return found
    return options_in(text) or text


def options_in(question: str) -> dict[str, str]:
    """"... Options: A: red, B: blue" -> {"A": "red", "B": "blue"}; {} without any. The letters
    have to come in their order, or else they are words of the question."""
    start = question.rfind("Options:")
    text = question[start + len("Options:"):] if start >= 0 else question
    marks = []
    for mark in OPTION.finditer(text):
        if mark[1] == LETTERS[len(marks):len(marks) + 1]:
            marks.append(mark)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    texts = [text[mark.end():end].strip() for mark, end in zip(marks, ends)]
    if len(texts) < 2:
        return {}
    if not any("\n" in each for each in texts[:-1]):  # RealWorldQA: "...\nPlease answer directly"
        texts[-1] = texts[-1].partition("\n")[0]
    texts[-1] = REQUEST.sub("", texts[-1])
    return {mark[1]: each.rstrip(",;").strip() for mark, each in zip(marks, texts)}


# ---------------------------------------------------------------- which of them is the answer


def readings(answer, options: dict[str, str]) -> dict[str, str]:
    """{style: letter} for each of STYLES in which an answer can be one of the options."""
    letters, found = list(options), {}
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        return found
    text = str(answer).strip()
    mark = re.fullmatch(r"\(?([A-Za-z])[.:)]*(?:\s+(.*))?", text, re.DOTALL)
    letter = mark[1].upper() if mark else ""
    if letter in options and mark[2] in (None, options[letter]):
        found["letter"] = letter
    with suppress(ValueError, OverflowError):
        if float(text).is_integer() and 0 <= float(text) < len(letters):
            found["index"] = letters[int(float(text))]
    same = [each for each in letters if options[each].casefold() == text.casefold()]
    if len(same) == 1:
        found["text"] = same[0]
    return found


class AnswerStyle:
    """How the answers of a file name their options: by add() of each record, then name()."""

    def __init__(self):
        self.votes, self.split, self.first, self.past = Counter(), set(), False, False

    def add(self, answer, options: dict[str, str]) -> None:
        found = readings(answer, options)
        self.votes.update(found.keys())
        self.split |= {frozenset((one, other)) for one in found for other in found
                       if found[one] != found[other]}
        number = str(answer).strip().removesuffix(".0")
        self.first |= number == "0"
        self.past |= bool(options) and number == str(len(options))

    def name(self) -> str:
        """The style of most answers. ValueError: two fit all of them and do not mean the same."""
        most = max(self.votes.values(), default=0)
        best = [style for style in STYLES if self.votes[style] == most]
        if any({one, other} in self.split for one in best for other in best):
            raise ValueError("an answer may be a letter, an index or the text of an option here "
                             f"({' or '.join(best)}), and each means another one; write letters")
        if best[0] == "index" and self.past and not self.first:
            raise ValueError("the answers seem to be indices counted from 1: none is 0, and some "
                             "are as large as the number of options; expected indices from 0, or "
                             "letters")
        return best[0]
