"""What a training achieved, to look at: answers and metrics -> two PNG files and scores.json.

    [Prediction] -> contact_sheet -> PNG    images with question, answer and truth
    OUT/metrics.jsonl -> loss_curve -> PNG  one line for each stage
    accuracies -> write_scores -> scores.json
"""

import json
import re
from pathlib import Path

from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from dataset.chat import IMAGE
from dataset.images import load_image
from evaluation.score import Prediction
from evaluation.summary import by_tag

SIDE, MARGIN = 288, 12  # pixels of an image; pixels between cards
COLUMNS, CARDS, MOST_CARDS = 5, 20, 40
LINES, LINE_HEIGHT = 7, 21  # lines below an image; pixels
INK, GREY, GREEN, RED = (40, 40, 40), (120, 120, 120), (20, 120, 40), (190, 30, 30)
RIGHT_MARK, WRONG_MARK = "\u2713 ", "\u2717 "
CHINESE = re.compile("([\u2e80-\uffef]+)")
# Enough for the emoji world, on any machine; for other texts the machine's own fonts are tried,
# likely names first.
EMBEDDED_FONT = Path(__file__).resolve().parent.parent / "dataset" / "emoji" / "chinese.ttf"
CHINESE_FONTS = ("notosanscjk", "notosanssc", "sourcehansans", "pingfang", "msyh", "wqy", "simhei",
                 "hiragino sans gb", "droidsansfallback")


def contact_sheet(predictions: list[Prediction], path) -> bool:
    """A card for each prediction that choose_cards takes. False when Chinese cards were left out,
    because no font here can write them all.
    """
    cards = choose_cards(predictions)
    texts = ["".join(text for text, _ in card_texts(card)) for card in cards]
    fonts = find_fonts("".join(texts), 16)
    shown = [card for card, text in zip(cards, texts) if fonts[1] or not CHINESE.search(text)]
    columns, rows = min(COLUMNS, len(shown)), -(-len(shown) // COLUMNS)
    width, height = SIDE + MARGIN, SIDE + LINES * LINE_HEIGHT + MARGIN
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    for number, card in enumerate(shown):
        left, top = number % COLUMNS * width + MARGIN, number // COLUMNS * height + MARGIN
        sheet.paste(enlarge(load_image(card.question.images[-1])), (left, top))
        write_card(ImageDraw.Draw(sheet), fonts, card, left, top + SIDE + 4)
    sheet.save(path)
    return len(shown) == len(cards)


def choose_cards(predictions: list[Prediction]) -> list[Prediction]:
    """CARDS or a few less, and as many of each kind and language, at least one: the first ones;
    those of an image that another card shows come last. Of a conversation, its last question. The
    share of wrong answers is that of all predictions, rounded up: wrong ones take the place of
    right ones, of their own kind first.
    """
    kinds, shown, cards = {}, [], []
    for p in predictions:
        if p.question.images:
            kinds.setdefault(kind_of(p), {})[p.question.where] = p  # the last question stays
    per_kind = max(1, CARDS // max(1, len(kinds)))
    for of_kind in list(kinds.values())[:MOST_CARDS]:
        fresh, others = [], []
        for p in of_kind.values():
            new = len(fresh) < per_kind and p.question.images[-1] not in shown
            (fresh if new else others).append(p)
            if new:
                shown.append(p.question.images[-1])
        cards += (fresh + others)[:per_kind]
    every = [p for of_kind in kinds.values() for p in of_kind.values()]
    wrong = [p for p in every if not p.correct]
    due = -(-len(cards) * len(wrong) // max(1, len(every))) - sum(not c.correct for c in cards)
    for p in [p for p in wrong if not any(p is card for card in cards)][:max(0, due)]:
        right = [i for i, card in enumerate(cards) if card.correct]
        cards[max(right, key=lambda i: (kind_of(cards[i]) == kind_of(p), i))] = p
    return cards


def kind_of(prediction: Prediction) -> tuple:
    return prediction.question.tags.get("kind"), prediction.question.tags.get("language")


def enlarge(image: Image.Image) -> Image.Image:
    """To SIDE pixels on the longer side, in the middle of a grey square."""
    scale = SIDE / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size],
                         Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE, SIDE), (225, 225, 225))
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return square


def card_texts(card: Prediction) -> list[tuple[str, tuple]]:
    """[(text, colour)]: the turns before, the question, the answer, and the truth when the answer
    is wrong."""
    turns = [m.content.replace(IMAGE, "") for m in card.question.messages if m.role != "system"]
    texts = [*((text, GREY) for text in turns[:-1]), (turns[-1], INK),
             (RIGHT_MARK + card.answer, GREEN) if card.correct else
             (WRONG_MARK + card.answer, RED)]
    if not card.correct:
        texts.append(("truth: " + card.question.truth, INK))
    return [(" ".join(text.split()), ink) for text, ink in texts]  # a line break would not fit


def write_card(draw, fonts, card: Prediction, left: int, top: int) -> None:
    lines = [(line, ink) for text, ink in card_texts(card) for line in wrap(text, fonts, SIDE)]
    # When there is too much, the answer matters more than how the conversation began.
    for number, (line, ink) in enumerate(lines[-LINES:]):
        x, base = left, top + number * LINE_HEIGHT + 16
        for part, font in parts(line, fonts):
            draw.text((x, base), part, font=font, fill=ink, anchor="ls")
            x += font.getlength(part)


def parts(text: str, fonts) -> list[tuple]:
    """[(part, font)]: English and Chinese characters, each with the font that has them."""
    latin, chinese = fonts
    return [(part, chinese if CHINESE.match(part) else latin)
            for part in CHINESE.split(text) if part]


def wrap(text: str, fonts, width: int) -> list[str]:
    """Lines of at most `width` pixels; Chinese may break anywhere, English between words."""
    def pixels(line: str) -> float:
        return sum(font.getlength(part) for part, font in parts(line, fonts))

    lines = [""]
    for piece in re.findall("[\u2e80-\uffef]|\\s+|[^\\s\u2e80-\uffef]+", text):
        if lines[-1] and pixels(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] = (lines[-1] + piece).lstrip()
    return lines


def find_fonts(text: str, size: int) -> tuple:
    """(a font for English, one for all Chinese in the text, or None when there is no such one)"""
    def rank(path: str) -> int:
        name = Path(path).name.lower()
        return next((i for i, known in enumerate(CHINESE_FONTS) if known in name), 99)

    latin = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)  # matplotlib brings it
    needed = set("".join(CHINESE.findall(text)))
    here = sorted(font_manager.findSystemFonts(), key=lambda path: (rank(path), path))
    for path in [str(EMBEDDED_FONT), *here]:
        try:
            font = ImageFont.truetype(path, size)
            missing = bytes(font.getmask("\U0010fffe"))  # the box that stands for no character
            if all(bytes(font.getmask(character)) != missing for character in needed):
                return latin, font
        except (OSError, ValueError):  # a font for other programs, or of pixels of one size
            continue
    return latin, None


def loss_curve(runs: dict[str, Path], path) -> None:
    """runs: {name of a stage: its metrics.jsonl}. The stages stand one after the other."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, start = figure.subplots(), 0
    for name, file in runs.items():
        metrics = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        metrics = [m for m in metrics if m["loss"] is not None]  # fp16 overflowed there
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


def write_scores(accuracies: dict[str, float], predictions: list[Prediction], path,
                 details: dict | None = None) -> None:
    """accuracies: of each condition. By kind and by language: those of the predictions. All are 0
    to 1, CIDEr 0 to 10."""
    scores = {**accuracies, "by_kind": by_tag(predictions, "kind"),
              "by_language": by_tag(predictions, "language"),
              **({"details": details} if details else {})}
    Path(path).write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n",
                          encoding="utf-8")
