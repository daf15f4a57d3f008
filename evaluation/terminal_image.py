"""A picture in a terminal, as blocks of colour: two pixels a character, one above the other.

    what the terminal can do -> colour_bits -> 24, 8 or 0        0: no picture is drawn
    PIL image -> blocks -> lines of text, each a row of half blocks

The sign is the upper half of a cell in the foreground colour; the lower half is the background. A
cell is about twice as high as wide, so the pixels are about square.
"""

import shutil
import sys

from PIL import Image

MOST_COLUMNS, MOST_ROWS = 48, 20  # of text; a picture should leave room for the talk about it
UPPER_HALF = "\u2580"
RESET = "\x1b[0m"
CUBE = (0, 95, 135, 175, 215, 255)  # the six levels of the 256 colours' cube, xterm's


def colour_bits(stream, environ) -> int:
    """How many bits of colour may be written to a stream: 24, 8 (256 colours) or 0.

    0 for whatever is no terminal, wherever NO_COLOR is set (https://no-color.org), and when the
    terminal does not say what it can do."""
    terminal = environ.get("TERM", "")
    if not stream.isatty() or environ.get("NO_COLOR") or terminal == "dumb":
        return 0
    if "utf" not in (stream.encoding or "").lower():  # the half block could not be written
        return 0
    if (environ.get("COLORTERM") in ("truecolor", "24bit") or terminal.endswith("-direct")
            or "WT_SESSION" in environ):  # Windows Terminal
        return 24
    return 8 if "256color" in terminal else 0


def blocks(image: Image.Image, bits: int, columns: int) -> list[str]:
    """bits: 24 or 8. columns: of the terminal; the picture is no wider, and no higher than
    MOST_ROWS."""
    width, height = image.size
    scale = min(min(columns, MOST_COLUMNS) / width, 2 * MOST_ROWS / height)
    size = max(1, round(width * scale)), max(2, 2 * round(height * scale / 2))
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    pixels = small.load()
    code = rgb_code if bits == 24 else cube_code
    lines = []
    for y in range(0, size[1], 2):
        cells = [f"\x1b[38;{code(pixels[x, y])};48;{code(pixels[x, y + 1])}m{UPPER_HALF}"
                 for x in range(size[0])]
        lines.append("".join(cells) + RESET)  # the rest of the line keeps the terminal's own
    return lines


def rgb_code(rgb: tuple[int, int, int]) -> str:
    return "2;{};{};{}".format(*rgb)


def cube_code(rgb: tuple[int, int, int]) -> str:
    """The nearest of the 6 x 6 x 6 cube (16 to 231) and the 24 greys (232 to 255)."""
    levels = [min(range(6), key=lambda i: abs(CUBE[i] - value)) for value in rgb]
    grey = min(range(24), key=lambda i: abs(8 + 10 * i - sum(rgb) / 3))

    def far(found) -> int:
        return sum((a - b) ** 2 for a, b in zip(rgb, found))

    if far([8 + 10 * grey] * 3) < far([CUBE[level] for level in levels]):
        return f"5;{232 + grey}"
    red, green, blue = levels
    return f"5;{16 + 36 * red + 6 * green + blue}"


def draw(image: Image.Image, environ) -> None:
    """On stdout, when that is a terminal with colours; otherwise nothing."""
    if bits := colour_bits(sys.stdout, environ):
        columns = shutil.get_terminal_size().columns - 1  # a full line would wrap on some
        print("\n".join(blocks(image, bits, columns)), flush=True)
