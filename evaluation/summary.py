"""What the scores say: tables, figures with their intervals, and whether the model looks at all.

    [Prediction]                -> accuracy, by_tag, table
    {condition: [Prediction]}   -> summarize -> details -> format_summary -> the terminal
                                -> write_summary -> scores.json, answers.jsonl

A condition is a model (this one, or one of the stages before it) and a way of asking: with the
image, without it, or with another one. What is left without the right image can be had from the
question alone: a score that does not fall is not seeing.
"""

import json
from pathlib import Path

import numpy as np

from dataset.chat import IMAGE
from evaluation.benchmarks import StoredImage
from evaluation.metrics import METRICS, fall, figures, intervals
from evaluation.score import Prediction
from model.pretrained.files import write_json

CONDITIONS = {"before": "before training: a random projector", "pretrain": "after stage one",
              "sft": "this model", "no_image": "this model, image withheld",
              "shuffled_images": "this model, image of another sample"}
CONTROLS = {"no_image": "is withheld", "shuffled_images": "is another one"}


def accuracy(predictions: list[Prediction]) -> float:
    """The mean score: the share of right answers, where each is right or wrong."""
    return sum(p.points for p in predictions) / len(predictions) if predictions else 0.0


def by_tag(predictions: list[Prediction], tag: str) -> dict[str, float]:
    """{value of the tag: accuracy}, in the order of first appearance."""
    values = dict.fromkeys(p.question.tags[tag] for p in predictions if tag in p.question.tags)
    return {value: accuracy(tagged(predictions, tag, value)) for value in values}


def tagged(predictions: list[Prediction], tag: str, value: str) -> list[Prediction]:
    return [p for p in predictions if p.question.tags.get(tag) == value]


def table(predictions: list[Prediction], unit: str = "%") -> str:
    """Accuracy times 100 by kind of question (rows) and by language (columns); tags that no
    question has are left out, so without any tag it is one line."""
    languages, kinds = (list(by_tag(predictions, tag)) for tag in ("language", "kind"))
    width = max(map(len, [*kinds, "question"])) + 1
    lines = [f"{'question':{width}}" + "".join(f"{name:>9}" for name in [*languages, "all"])
             + f"{'questions':>11}"]
    for name, row in [*((kind, tagged(predictions, "kind", kind)) for kind in kinds),
                      ("all", predictions)]:
        cells = [*(tagged(row, "language", language) for language in languages), row]
        values = [f"{100 * accuracy(cell):.1f}{unit}" if cell else "-" for cell in cells]
        lines.append(f"{name:{width}}" + "".join(f"{value:>9}" for value in values)
                     + f"{len(row):11,}")
    return "\n".join(lines)


def summarize(metric: str, predictions: dict[str, list]) -> dict:
    """{condition: [Prediction]} -> every figure with its interval, and how far the score falls
    without the right image, over the questions that were asked both ways."""
    summary, falls = {}, {}
    for condition, answered in predictions.items():
        rows = np.array([p.row for p in answered])  # (Q,S)
        between = intervals(metric, rows)
        summary[condition] = {name: with_bounds(value, *between[name])
                              for name, value in figures(metric, rows.mean(0)).items()}
    ours = {question_key(p): p.row for p in predictions["sft"]}
    for condition in CONTROLS:
        both = [p for p in predictions.get(condition, ()) if question_key(p) in ours]
        if both:
            with_image = np.array([ours[question_key(p)] for p in both])
            falls[condition] = with_bounds(*fall(with_image, np.array([p.row for p in both])))
    return {"figures": summary, "falls": falls}


def with_bounds(value: float, low: float, high: float) -> dict:
    return {"value": value, "low": low, "high": high}


def question_key(prediction: Prediction) -> tuple:
    """The same for a question with its image, without it and with another one."""
    return prediction.question.where, len(prediction.question.messages)


def format_summary(metric: str, details: dict) -> str:
    """The figures for a reader, and whether the model looks at all."""
    unit, lines = METRICS[metric].unit, []

    def percent(figure: dict) -> str:
        return (f"{100 * figure['value']:6.1f}{unit} ({100 * figure['low']:.1f} to "
                f"{100 * figure['high']:.1f})")

    for condition, title in CONDITIONS.items():
        if condition in details["figures"]:
            (_, headline), *more = details["figures"][condition].items()
            lines.append(f"{percent(headline):26}{title}")
            if condition == "sft":
                lines += [f"{percent(value):26}  {name.replace('_', ' ')}" for name, value in more]
    for condition, words in CONTROLS.items():
        lost = details["falls"].get(condition)
        if lost and lost["low"] <= 0:
            lines.append(f"The score does not fall when the image {words}"
                         f" (by {100 * lost['value']:.1f}, {100 * lost['low']:.1f} to "
                         f"{100 * lost['high']:.1f}): it tells nothing of seeing.")
    return "\n".join([*lines, "in brackets: where 95 % of the scores lie when the questions are "
                      "drawn anew (bootstrap)"])


def write_summary(predictions: dict[str, list], details: dict, out: Path) -> None:
    """OUT/answers.jsonl: one line a question, to see what went wrong; beside the answer stands what
    the model said without the image, and with another one. OUT/scores.json: all that was counted.
    """
    controls = {condition: {question_key(p): p.answer for p in predictions.get(condition, ())}
                for condition in CONTROLS}
    with open(out / "answers.jsonl", "w", encoding="utf-8") as file:
        for p in predictions["sft"]:
            q = p.question
            # An image that is no file lies in a row of the data, or is drawn as that says.
            images = [str(image) if isinstance(image, (str, Path, StoredImage)) else q.where
                      for image in q.images]
            line = {"where": q.where, **q.tags, "image": images,
                    "question": q.messages[-1].content.replace(IMAGE, "").strip(),
                    "truth": list(q.truths) if len(q.truths) > 1 else q.truth,
                    "answer": p.answer, "score": p.points, "right": p.correct}
            line |= {condition: answers[question_key(p)] for condition, answers in controls.items()
                     if question_key(p) in answers}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    # By kind and by language: of this model. All are 0 to 1, CIDEr 0 to 10.
    write_json(out / "scores.json", {
        **{name: accuracy(predictions[name]) for name in CONDITIONS if name in predictions},
        **{f"by_{tag}": by_tag(predictions["sft"], tag) for tag in ("kind", "language")},
        "details": details})
