"""What a training achieved, to look at: answers and metrics -> two PNG files and scores.json.

    [Answered] -> contact_sheet -> PNG      pictures with question, answer and truth
    OUT/metrics.jsonl -> loss_curve -> PNG  one line for each stage
    shares -> write_scores -> scores.json
"""

import json
import re
from pathlib import Path

from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from dataset.chat import IMAGE
from dataset.images import load_image
from training.score import Answered, by_tag

PICTURE, MARGIN = 288, 12  # pixels a side; pixels between cards
COLUMNS, MOST_CARDS = 5, 40
LINES, LINE_HEIGHT = 7, 21  # lines below a picture; pixels
INK, GREY, RIGHT, WRONG = (40, 40, 40), (120, 120, 120), (20, 120, 40), (190, 30, 30)
# Tried first; any other font on the machine that knows the characters will do as well.
CHINESE_FONTS = ("notosanscjk", "notosanssc", "sourcehansans", "pingfang", "msyh", "wqy", "simhei",
                 "hiragino sans gb", "droidsansfallback")



def contact_sheet(answered: list[Answered], path) -> bool:
    """One card for each kind and language: the first such sample, right or wrong, and its last
    question. False when Chinese cards were left out, because no font here can write them.
    """
    font, chinese = find_font(16)
    cards = {}
    for a in answered:
        tags = a.question.tags
        key = tags.get("kind"), tags.get("language"), None if tags else a.question.where
        same_sample = key in cards and cards[key].question.where == a.question.where
        if a.question.images and (chinese or all(ord(c) < 0x2e80 for c in a.question.truth)):
            if same_sample or (key not in cards and len(cards) < MOST_CARDS):
                cards[key] = a
    columns, rows = min(COLUMNS, len(cards)), -(-len(cards) // COLUMNS)
    width, height = PICTURE + MARGIN, PICTURE + LINES * LINE_HEIGHT + MARGIN
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    for number, card in enumerate(cards.values()):
        left, top = number % COLUMNS * width + MARGIN, number // COLUMNS * height + MARGIN
        sheet.paste(enlarge(load_image(card.question.images[-1])), (left, top))
        write_card(ImageDraw.Draw(sheet), font, card, left, top + PICTURE + 4)
    sheet.save(path)
    return chinese


def enlarge(image: Image.Image) -> Image.Image:
    """To PICTURE pixels on the longer side, in the middle of a grey square."""
    scale = PICTURE / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size],
                         Image.Resampling.LANCZOS)
    square = Image.new("RGB", (PICTURE, PICTURE), (225, 225, 225))
    square.paste(image, ((PICTURE - image.width) // 2, (PICTURE - image.height) // 2))
    return square


def write_card(draw, font, card: Answered, left: int, top: int) -> None:
    """What was said before, the question, the answer, and the truth when it is another one."""
    words = [(m.content.replace(IMAGE, "").strip(), GREY) for m in card.question.messages
             if m.role != "system"]
    words[-1] = (words[-1][0], INK)
    words.append(("\u2192 " + card.answer.strip(), RIGHT if card.right else WRONG))
    if not card.right:
        words.append(("truth: " + card.question.truth.strip(), INK))
    lines = [(line, ink) for text, ink in words for line in wrap(text, font)]
    if len(lines) > LINES:  # the answer matters more than how the talk began
        lines = lines[-LINES:]
    for number, (line, ink) in enumerate(lines):
        draw.text((left, top + number * LINE_HEIGHT), line, font=font, fill=ink)


def wrap(text: str, font) -> list[str]:
    """Lines no wider than a picture; Chinese may break anywhere, English between words."""
    lines = [""]
    for piece in re.findall(r"[^\s\u2e80-\uffff]+\s*|[\u2e80-\uffff]|\s+", text):
        if lines[-1] and font.getlength(lines[-1] + piece.rstrip()) > PICTURE:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def find_font(size: int):
    """A font of this machine that can write Chinese, and True; else one for English, and False."""
    def rank(path: str) -> int:
        name = Path(path).name.lower()
        return next((i for i, known in enumerate(CHINESE_FONTS) if known in name), 99)

    for path in sorted(font_manager.findSystemFonts(), key=lambda path: (rank(path), path)):
        try:
            font = ImageFont.truetype(path, size)
            # A font draws every character that it lacks as the same empty box.
            if len({bytes(font.getmask(character)) for character in "\u8fd9\u732b\u9e21"}) == 3:
                return font, True
        except (OSError, ValueError):  # a font for other programs, or of pixels of one size
            continue
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size), False


def loss_curve(runs: dict[str, Path], path) -> None:
    """runs: {name of a stage: its metrics.jsonl}. The stages stand one after the other."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, start = figure.subplots(), 0
    for name, file in runs.items():
        metrics = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        steps = [start + m["step"] for m in metrics]
        losses = [m["loss"] for m in metrics]
        line, = axes.plot(steps, losses, alpha=0.25)
        axes.plot(steps, smooth(losses), color=line.get_color(), label=name)
        start = steps[-1]
    axes.set(xlabel="optimizer step", ylabel="loss for each supervised token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def smooth(values: list[float], window: int = 20) -> list[float]:
    """The mean of the last `window` values: single steps jump too much to be read."""
    return [sum(values[max(0, i - window + 1):i + 1]) / min(i + 1, window)
            for i in range(len(values))]


def write_scores(shares: dict[str, float], answered: list[Answered], path) -> dict:
    """shares of each condition; by kind and by language those of `answered`. All 0 to 1."""
    scores = {**shares, "by_kind": by_tag(answered, "kind"),
              "by_language": by_tag(answered, "language")}
    Path(path).write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n",
                          encoding="utf-8")
    return scores
