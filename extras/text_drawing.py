"""Text on pictures, in any script: what no font here can write is spelt out, never a box.

    text -> legible -> write, cut, lines -> PIL        (looks.py; the fonts are report.py's)
"""

from PIL import Image, ImageDraw

from evaluation.report import CHINESE, find_fonts, parts

SIZE, LINE = 14, 20  # pixels: of the letters, from line to line


def fonts_for(texts: list[str]) -> tuple:
    """(for English, for Chinese): one that has all of the Chinese if there is such a font here,
    else the embedded one, which knows the emoji world's characters."""
    found = find_fonts("".join(texts), SIZE)
    return found if found[1] else find_fonts("", SIZE)


def legible(text: str, fonts) -> str:
    """What no font here can write stands as its number, U+732B: a box would say nothing."""
    def known(character: str) -> bool:
        font = fonts[1] if CHINESE.match(character) else fonts[0]
        return character.isspace() or (
            bytes(font.getmask(character)) != bytes(font.getmask("\U0010fffe")))

    return "".join(c if known(c) else f"U+{ord(c):04X} " for c in " ".join(text.split()))


def width_of(text: str, fonts) -> float:
    return sum(font.getlength(part) for part, font in parts(text, fonts))


def cut(text: str, fonts, most: float) -> str:
    """As many characters as fit."""
    text = legible(text, fonts)
    while len(text) > 1 and width_of(text, fonts) > most:
        text = text[:-1]
    return text


def write(draw, fonts, text: str, x: float, base: float, ink) -> None:
    for part, font in parts(legible(text, fonts), fonts):
        draw.text((x, base), part, font=font, fill=ink, anchor="ls")
        x += font.getlength(part)


def lines(texts: list[str], fonts, ink, width: int) -> Image.Image:
    """Each text on lines of its own, as wide as the sheet."""
    wrapped = [line for text in texts for line in fold(legible(text, fonts), fonts, width)]
    sheet = Image.new("RGB", (width, LINE * len(wrapped)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(wrapped):
        write(draw, fonts, text, 0, number * LINE + 15, ink)
    return sheet


def fold(text: str, fonts, most: int) -> list[str]:
    """Lines of at most so many pixels."""
    folded = [""]
    for piece in text.replace(" ", " \0").split("\0"):
        for part in (piece if CHINESE.search(piece) else [piece]):  # Chinese may break anywhere
            if folded[-1] and width_of(folded[-1] + part.rstrip(), fonts) > most:
                folded.append("")
            folded[-1] += part
    return folded
