"""`eval.py --data`: a data file -> the share of exact answers, and with --report how it came to be.

    data -> questions -> answers of the model                          -> table
                      -> of stage one, of an untrained projector,      -> scores.json
                         without a picture, with a wrong picture       -> PNG files
"""

import json
import sys
import time
from pathlib import Path

import torch

from dataset.mixture import open_mixture, split_source
from evaluation.report import contact_sheet, loss_curve, write_scores
from evaluation.score import (
    answer_all,
    read_questions,
    share,
    table,
    with_wrong_picture,
    without_picture,
)
from model.checkpoint import find_model, read_run
from model.projector import Projector
from training.setup import matching

WORDS = {"before": "before training: a projector of noise", "pretrain": "after stage one",
         "sft": "this model", "no_picture": "this model, picture withheld",
         "wrong_picture": "this model, picture of another sample"}


def evaluate(flags, load, model, template, processor) -> None:
    """load: eval.py's own function, to load the model of stage one in the same way."""
    data = open_scored_data(flags)
    questions, bad = read_questions(data, flags.limit)
    name = " ".join(flags.data)
    if not questions:
        raise ValueError(f"--data {name}: no question to score in {len(data)} samples"
                         + (f"; the first problem is {bad[0]}" if bad else ""))
    tell_bad(bad)
    answers = {}

    def ask(condition: str, model, questions) -> None:
        answers[condition] = run(WORDS[condition], model, template, processor, questions, flags)

    runs = runs_of(flags.model) if flags.report else []
    if len(runs) == 2:
        earlier, _, _ = load(flags, str(runs[0]))
        ask("pretrain", earlier, questions)
        earlier.projector = untrained_projector(earlier)
        ask("before", earlier, questions)
    ask("sft", model, questions)
    if flags.report and any(q.images for q in questions):
        ask("no_picture", model, without_picture(questions))
        ask("wrong_picture", model, with_wrong_picture(questions))

    print(f"\nexact answers to {len(answers['sft']):,} questions of {name}\n")
    print(table(answers["sft"]))
    if flags.report:
        report(flags, answers, runs)


def runs_of(model: str | None) -> list[Path]:
    """The checkpoint, and in front of it the one that its training started from, if it is there."""
    if model == "none":
        return []
    checkpoint = find_model(model)
    run = read_run(checkpoint)
    if run["stage"] == "pretrain" or run["settings"]["model"] == "none":
        return [checkpoint]
    try:
        return [find_model(run["settings"]["model"], runs=("out/pretrain",)), checkpoint]
    except FileNotFoundError as error:
        print(f"cannot score the stage before: {error}", file=sys.stderr)
        return [checkpoint]


def open_scored_data(flags):
    if flags.data == ["emoji"]:
        from dataset.emoji.world import EmojiData  # here: other data has no use for it

        return EmojiData("test")
    files = [name for file in flags.data for name in matching(file)]
    for file in files:
        if split_source(file)[1] != 1:
            raise ValueError(f"--data {file}: a weight says how often training sees a sample, and "
                             "a score asks every question once. Leave the weight out.")
    return open_mixture(files, flags.images)


def run(name: str, model, template, processor, questions, flags) -> list:
    """Answer all the questions, with a line of progress on stderr."""
    started = time.monotonic()

    def progress(done: int, of: int) -> None:
        if sys.stderr.isatty() or done == of:
            print(f"\r{name}: {done}/{of} in {time.monotonic() - started:.0f} s",
                  end="\n" if done == of else "", file=sys.stderr, flush=True)

    answered, bad = answer_all(model, template, processor, questions, flags.batch_size,
                               flags.max_new_tokens, progress)
    tell_bad(bad)
    return answered


def tell_bad(bad: list, listed: int = 5) -> None:
    for sample in bad[:listed]:
        print(f"skipped {sample}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} could not be used and are not counted", file=sys.stderr)


def untrained_projector(model) -> Projector:
    """Noise in the place of what stage one learned."""
    torch.manual_seed(0)
    c, weight = model.config, model.projector.fc1.weight
    fresh = Projector(c.projector, c.vision.hidden_size, c.language.hidden_size, c.pixel_shuffle)
    return fresh.to(weight.device, weight.dtype).eval()


def report(flags, answers: dict, runs: list[Path]) -> None:
    out = Path(flags.report)
    out.mkdir(parents=True, exist_ok=True)
    shares = {name: share(answers[name]) for name in WORDS if name in answers}
    print()
    for name, value in shares.items():
        print(f"{value:7.1%}  {WORDS[name]}")
    write_scores(shares, answers["sft"], out / "scores.json")
    write_answers(answers["sft"], out / "answers.jsonl")
    written = ["scores.json", "answers.jsonl"]
    if any(a.question.images for a in answers["sft"]):
        if not contact_sheet(answers["sft"], out / "contact_sheet.png"):
            print("no font here can write all the Chinese of these answers: their cards are not "
                  "on the contact sheet (the package fonts-noto-cjk would help)")
        written.append("contact_sheet.png")
    names = ["this model"] if len(runs) == 1 else ["stage one: projector", "stage two"]
    metrics = {name: run.parent / "metrics.jsonl" for name, run in zip(names, runs)}
    metrics = {name: file for name, file in metrics.items() if file.exists()}
    if metrics:
        loss_curve(metrics, out / "loss.png")
        written.append("loss.png")
    print(f"\nwritten to {out}: {', '.join(written)}")
    chosen = f" --model {flags.model}" if flags.model else ""
    print(f"chat with it: python eval.py{chosen}")


def write_answers(answered: list, path: Path) -> None:
    """One JSON line a question, for whoever wants to see what went wrong."""
    with open(path, "w", encoding="utf-8") as file:
        for a in answered:
            line = {"where": a.question.where, **a.question.tags, "right": a.right,
                    "question": a.question.messages[-1].content, "answer": a.answer,
                    "truth": a.question.truth}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
