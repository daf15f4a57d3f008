"""An answer's token ids -> its words, each with the tokens that it is made of.

    ids -> words -> [(text, [0, 1]), ...]        (looks.py draws one picture for each)

A byte-level tokenizer cuts one Chinese character into up to three tokens and one English word into
several; who asks where the model looked for "battery" wants one answer. A group never ends inside
a character. Chinese is written without spaces: there each token that ends a character is a word.
"""

import unicodedata

from model.generate import REPLACEMENT_CHARACTER


def words(tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """The texts add up to the decoded ids, the places to 0 .. len(ids) - 1, in order."""
    found, start, told = [], 0, 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        # The next token may complete the character.
        if text.endswith(REPLACEMENT_CHARACTER) and end < len(ids):
            continue
        piece, places = text[told:], list(range(start, end))
        start, told = end, len(text)
        if found and belongs(piece, found[-1][0]):
            before, earlier = found[-1]
            found[-1] = before + piece, earlier + places
        else:
            found.append((piece, places))
    return found


def belongs(piece: str, before: str) -> bool:
    """Whether a piece of text goes on with the word before it."""
    if not piece or not before.strip():
        return True
    if piece[0].isspace():
        return False
    if unicodedata.category(piece[0])[0] == "P":  # a full stop stands with its word
        return True
    return not (alone(piece[0]) or alone(before[-1]))


def alone(character: str) -> bool:
    """Chinese characters and signs such as emoji are words by themselves."""
    kind = unicodedata.category(character)
    return kind in ("Lo", "So") and not "\u0600" <= character < "\u0e00"  # Arabic, Hindi: no
