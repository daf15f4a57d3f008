"""What the scores say: figures with their intervals, and whether the model looks at all.

    {condition: [Answered]}, {condition: rows} -> judged -> scores.json, told -> the terminal
    {condition: [Answered]}                    -> write_answers -> answers.jsonl

A condition is who was asked in which way: this model, or one of the stages before it; with the
picture, without it, or with another one. What is left without the right picture can be had from
the question alone: a score that does not fall is not seeing.
"""

import json
from pathlib import Path

from dataset.chat import IMAGE
from evaluation.benchmarks import StoredPicture
from evaluation.metrics import fall, figures, intervals

WORDS = {"before": "before training: a projector of noise", "pretrain": "after stage one",
         "sft": "this model", "no_picture": "this model, picture withheld",
         "wrong_picture": "this model, picture of another sample"}
TITLES = {"exact": "exact answers to", "vqa": "VQA accuracy on", "choice": "right letters to",
          "yesno": "right with yes or no on", "caption": "CIDEr of the captions to"}
UNITS = {"caption": ""}  # CIDEr is no share: its published figures are times 100, without %
CONTROLS = {"no_picture": "is withheld", "wrong_picture": "is another one"}


def judged(metric: str, answers: dict[str, list], rows: dict) -> dict:
    """-> for scores.json: every figure with its interval, and how far the score falls without
    the right picture: by the questions that were asked both ways, one by one."""
    told, falls = {}, {}
    for condition, found in rows.items():
        between = intervals(metric, found)
        told[condition] = {name: {"value": value, "low": between[name][0], "high": between[name][1]}
                           for name, value in figures(metric, found.mean(0)).items()}
    for condition in [name for name in CONTROLS if name in rows]:
        place = {key(a): i for i, a in enumerate(answers["sft"])}
        pairs = [(place[key(a)], j) for j, a in enumerate(answers[condition]) if key(a) in place]
        if pairs:
            ours, theirs = map(list, zip(*pairs))
            value, low, high = fall(rows["sft"][ours], rows[condition][theirs])
            falls[condition] = {"value": value, "low": low, "high": high}
    return {"figures": told, "falls": falls}


def key(answered) -> tuple:
    """Of a question, whatever its picture: its sample and its turn."""
    return answered.question.where, len(answered.question.messages)


def told(metric: str, details: dict) -> str:
    """The figures as a person reads them, and whether the model looks at all."""
    unit, lines = UNITS.get(metric, "%"), []

    def percent(one: dict) -> str:
        return (f"{100 * one['value']:6.1f}{unit} ({100 * one['low']:.1f} to "
                f"{100 * one['high']:.1f})")

    for condition in WORDS:
        if condition in details["figures"]:
            first, *more = details["figures"][condition].items()
            lines.append(f"{percent(first[1]):26}{WORDS[condition]}")
            if condition == "sft":
                lines += [f"{percent(value):26}  {name.replace('_', ' ')}" for name, value in more]
    for condition, words in CONTROLS.items():
        one = details["falls"].get(condition)
        if one and one["low"] <= 0:
            lines.append(f"The score does not fall when the picture {words}"
                         f" (by {100 * one['value']:.1f}, {100 * one['low']:.1f} to "
                         f"{100 * one['high']:.1f}): it tells nothing of seeing.")
    return "\n".join([*lines, "in brackets: where 95 % of the scores lie when the questions are "
                      "drawn anew (bootstrap)"])


def write_answers(answers: dict[str, list], path: Path) -> None:
    """One JSON line a question, for whoever wants to see what went wrong: beside the answer
    stands what the model said without the picture, and with another one."""
    others = {condition: {key(a): a.answer for a in answers.get(condition, ())}
              for condition in CONTROLS}
    with open(path, "w", encoding="utf-8") as file:
        for a in answers["sft"]:
            q = a.question
            line = {"where": q.where, **q.tags, "picture": [picture_name(q, i) for i in q.images],
                    "question": q.messages[-1].content.replace(IMAGE, "").strip(),
                    "truth": list(q.truths) if len(q.truths) > 1 else q.truth,
                    "answer": a.answer, "score": a.points, "right": a.right}
            line |= {condition: said[key(a)] for condition, said in others.items()
                     if key(a) in said}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def picture_name(question, image) -> str:
    """A file's name, or the place of the row that holds the picture or says how it is drawn."""
    return str(image) if isinstance(image, (str, Path, StoredPicture)) else question.where
