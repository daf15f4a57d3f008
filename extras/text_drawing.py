"""Text of any script in matplotlib's drawings: words, lines that fit, fonts that have the letters.

    ids of an answer -> words;   text, inches -> fold -> lines -> figure.text(x, y, line, **style())
"""

import textwrap
import unicodedata
from functools import cache
from pathlib import Path

from matplotlib import font_manager

from model.generate import TextStreamer

SIZE = 8  # points of the letters
LETTER = 0.65 * SIZE / 72  # inches of a Latin letter, in the one typeface that is used
# Enough for the emoji world, on any machine; for other texts the machine's own fonts are tried.
EMBEDDED_FONT = Path(__file__).resolve().parent.parent / "dataset" / "emoji" / "chinese.ttf"
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei",
    "SimHei", "Hiragino Sans GB", "WenQuanYi Zen Hei", "Noto Sans CJK JP", "Droid Sans Fallback")


@cache
def fonts() -> tuple[list[str], set[int]]:
    """-> families that matplotlib tries one after the other, and all characters that they have."""
    font_manager.fontManager.addfont(EMBEDDED_FONT)
    here = {font.name for font in font_manager.fontManager.ttflist}
    families = ["DejaVu Sans Mono", *(name for name in CHINESE_FONTS if name in here),
                font_manager.get_font(EMBEDDED_FONT).family_name]
    return families, {code for name in families for code in
                      font_manager.get_font(font_manager.findfont(name)).get_charmap()}


def style() -> dict:
    return {"family": fonts()[0], "fontsize": SIZE, "parse_math": False}


def legible(text: str) -> str:
    """What no font here can write stands as its number, U+732B: a box would say nothing."""
    text = " ".join(text.split()) or repr(text)[1:-1]
    return "".join(c if ord(c) in fonts()[1] else f"U+{ord(c):04X} " for c in text)


def fold(text: str, width: float) -> list[str]:
    """Lines of at most so many inches; a Chinese character is less than twice a Latin letter."""
    text = legible(text)
    wide = any(unicodedata.east_asian_width(c) in "WF" for c in text)
    return textwrap.wrap(text, max(1, int(width / LETTER) // (1 + wide))) or [""]


def words(tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """ids -> [(word, [0, 1]), ...] with the indices of its tokens. A byte-level tokenizer cuts one
    Chinese character into up to three tokens and one English word into several."""
    streamer, found, start = TextStreamer(tokenizer), [], 0
    for end in range(1, len(ids) + 1):
        piece = streamer.add(ids[end - 1]) + (streamer.end() if end == len(ids) else "")
        if not piece and end < len(ids):  # the next token may complete the character
            continue
        if not (found and continues(piece, found[-1][0])):
            found.append(("", []))
        word, indices = found[-1]
        found[-1], start = (word + piece, [*indices, *range(start, end)]), end
    return found


def continues(piece: str, before: str) -> bool:
    """Whether a piece of text goes on with the word before it: so does a full stop."""
    def alone(character: str) -> bool:  # Chinese characters and emoji are words by themselves
        kind = unicodedata.category(character)
        return kind in ("Lo", "So") and not "\u0600" <= character < "\u0e00"  # Arabic, Hindi: no

    if not piece or not before.strip() or unicodedata.category(piece[0])[0] == "P":
        return True
    return not (piece[0].isspace() or alone(piece[0]) or alone(before[-1]))
