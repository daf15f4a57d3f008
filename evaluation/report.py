"""What a training achieved, to look at: two PNG files.

    [Prediction] -> contact_sheet -> PNG    images with question, answer and truth
    OUT/metrics.jsonl -> loss_curve -> PNG  one line for each stage
"""

from pathlib import Path

from matplotlib.figure import Figure

from dataset.chat import IMAGE
from dataset.images import load_image
from evaluation.score import Prediction
from extras.report import WINDOW, draw
from extras.text_drawing import fold, style
from training.run_metadata import read_lines

SIDE, MARGIN = 288, 12  # pixels of an image; pixels between cards
COLUMNS, CARDS, MOST_CARDS = 5, 20, 40
LINES, LINE_HEIGHT, DPI = 7, 19, 120  # lines below an image; pixels; pixels of an inch
INK, GREY, GREEN, RED = "#282828", "#787878", "#147828", "#be1e1e"


def contact_sheet(predictions: list[Prediction], path) -> None:
    """A card for each prediction that choose_cards takes: its image, and below it what was said."""
    cards = choose_cards(predictions)
    step_x, step_y = SIDE + MARGIN, SIDE + LINES * LINE_HEIGHT + MARGIN
    width = min(COLUMNS, len(cards)) * step_x + MARGIN
    height = -(-len(cards) // COLUMNS) * step_y + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for number, card in enumerate(cards):
        left = MARGIN + number % COLUMNS * step_x
        bottom = MARGIN + number // COLUMNS * step_y + SIDE  # of the image, from above
        axes = figure.add_axes((left / width, 1 - bottom / height, SIDE / width, SIDE / height))
        axes.imshow(load_image(card.question.images[-1]))
        axes.set_axis_off()
        lines = [(line, ink) for text, ink in card_texts(card) for line in fold(text, SIDE / DPI)]
        # When there is too much, the answer matters more than how the conversation began.
        for row, (line, ink) in enumerate(lines[-LINES:]):
            figure.text(left / width, 1 - (bottom + row * LINE_HEIGHT + 4) / height, line,
                        va="top", color=ink, **style())
    figure.savefig(path)


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


def card_texts(card: Prediction) -> list[tuple[str, str]]:
    """[(text, colour)]: the turns before, the question, the answer, and the truth when the answer
    is wrong."""
    turns = [m.content.replace(IMAGE, "") for m in card.question.messages if m.role != "system"]
    texts = [*((text, GREY) for text in turns[:-1]), (turns[-1], INK)]
    if card.correct:
        texts.append(("\u2713 " + card.answer, GREEN))
    else:
        texts += [("\u2717 " + card.answer, RED), ("truth: " + card.question.truth, INK)]
    return texts


def loss_curve(runs: dict[str, Path], path) -> None:
    """runs: {name of a stage: its metrics.jsonl}. The stages stand one after the other."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, start = figure.subplots(), 0
    for number, (name, file) in enumerate(runs.items()):
        metrics = [{**line, "step": start + line["step"]} for line in read_lines(file)]
        draw(axes, metrics, "loss", "-", color=f"C{number}", alpha=0.25)
        draw(axes, metrics, "loss", "-", WINDOW, color=f"C{number}", label=name)
        start = metrics[-1]["step"]
    axes.set(xlabel="optimizer step", ylabel="loss for each supervised token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
