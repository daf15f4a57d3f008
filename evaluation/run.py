"""`eval.py --data`: files -> questions -> answers -> scores, beside what is scored without looking.

    files -> open_questions -> questions -> answers of the model            -> table
                            -> without a picture, with a wrong picture      -> answers.jsonl
                            -> with --report: of stage one, of an untrained -> scores.json
                               projector                                    -> PNG files

Answers are on disk as soon as a batch is done (OUT/journal, see journal.py): the same command goes
on where it was killed, and asks nothing twice. OUT is --report DIR, or out/scores/NAME, a NAME for
each model and data (result_name). Only one process at a time scores into one OUT.
"""

import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from dataset.readers.formats import data_hash
from dataset.readers.mixture import open_mixture, split_source
from evaluation.benchmarks import open_benchmark
from evaluation.eval_samples import read_questions
from evaluation.metrics import measure
from evaluation.report import contact_sheet, loss_curve, write_scores
from evaluation.results_cache import Journal, changes, locked
from evaluation.score import answer_all, share, table, with_wrong_picture, without_picture
from evaluation.summary import TITLES, UNITS, WORDS, judged, told, write_answers
from model.pretrained.checkpoint import STEP, find_model, read_run
from model.pretrained.files import file_hashes, sha256
from model.pretrained.hub import resolve
from model.projector import Projector
from training.setup import free_name, matching

LISTED = 5  # unusable samples named on the screen; scores.json counts them all
CHECKPOINT_FILES = ("model.safetensors", "config.json", "tokenizer.json",
                    "preprocessor_config.json")
# What lies in OUT beside the journal; scores.json says whose they are, so it is moved last.
RESULTS = ("answers.jsonl", "contact_sheet.png", "loss.png", "scores.json")
NAME_BYTES = 60  # of a model and of a file in result_name: some file systems take 143 in all


def evaluate(flags, load, checkpoint, model, template, processor) -> None:
    """checkpoint: the directory that the model was loaded from, or "none" for --language alone.
    load: eval.py's own function, to load the model of stage one in the same way.
    """
    metric, data = open_questions(flags)
    questions, bad = read_questions(data, flags.limit)
    name = " ".join(flags.data)
    if not questions:
        raise ValueError(f"--data {name}: no question to score in {len(data)} samples"
                         + (f"; the first problem is {bad[0]}" if bad else ""))
    tell_bad(bad)
    check_truths(metric, questions)
    asked = about_questions(flags, metric, questions, template, model)
    this = model_files(flags, checkpoint)
    scored = {"name": result_name(flags, checkpoint), "model": model_name(flags, checkpoint),
              "data": name, "asked": {**this, **asked}}
    out = Path(flags.report or Path("out") / "scores" / scored["name"])
    answers, rows, skipped = {}, {}, {"data": len(bad)}

    def ask(condition: str, model, questions, who: dict) -> None:
        journal = Journal(out / "journal" / f"{condition}.jsonl",
                          {"condition": condition, **who, **asked})
        answered, unusable = run(WORDS[condition], model, template, processor, questions, flags,
                                 cuts(metric), journal)
        skipped[condition] = len(unusable)
        if answered:
            rows[condition] = measure(metric, [a.answer for a in answered],
                                      [a.question for a in answered])
            answers[condition] = [replace(a, score=float(row[0]))
                                  for a, row in zip(answered, rows[condition])]

    with locked(out / "journal"):
        make_room(out, scored)
        runs = runs_of(checkpoint) if flags.report else []
        if len(runs) == 2:
            earlier, _, _ = load(flags, str(runs[0]))
            who = model_files(flags, runs[0])
            ask("pretrain", earlier, questions, who)
            earlier.projector = untrained_projector(earlier)
            ask("before", earlier, questions, {**who, "projector": "noise"})
        ask("sft", model, questions, this)
        if "sft" not in answers:
            raise ValueError(f"--data {name}: none of the {len(questions)} questions could be "
                             "asked")
        if any(q.images for q in questions):
            ask("no_picture", model, without_picture(questions), this)
            ask("wrong_picture", model, with_wrong_picture(questions), this)

        print(f"\n{TITLES[metric]} {len(answers['sft']):,} questions of {name}\n")
        print(table(answers["sft"], UNITS.get(metric, "%")))
        details = {"scored": scored, "metric": metric,
                   "questions": {c: len(a) for c, a in answers.items()},
                   "skipped": skipped, **judged(metric, answers, rows)}
        print("\n" + told(metric, details))
        write_answers(answers, out / "answers.jsonl")
        report(flags, out, answers, runs, details)


def check_truths(metric: str, questions: list) -> None:
    """ValueError when the data has no truths of this kind: before hours of answering."""
    some = questions[:1] if metric == "caption" else questions
    measure(metric, [q.truth for q in some], some)


def open_questions(flags) -> tuple[str, object]:
    """-> the metric, and what read_questions reads."""
    if flags.data == ["emoji"]:
        from dataset.emoji.world import EmojiData  # here: other data has no use for it

        metric, data = "exact", EmojiData("test")
    else:
        files = [name for file in flags.data for name in matching(file)]
        for file in files:
            if split_source(file)[1] != 1:
                raise ValueError(f"--data {file}: a weight says how often training sees a sample, "
                                 "and a score asks every question once. Leave the weight out.")
        benchmark = open_benchmark(files, flags.images, flags.suffix)
        metric = benchmark.metric if benchmark else "exact"
        data = benchmark.data if benchmark else open_mixture(files, flags.images)
    return metric if flags.metric == "auto" else flags.metric, data


# ---------------------------------------------------------------- where the scores lie


def result_name(flags, checkpoint) -> str:
    """MODEL-DATA-HASH, a directory's name: the same for the same model and data, whatever else is
    asked. The hash is of where both lie, for there may be a second data.jsonl elsewhere."""
    files = [file for given in flags.data for file in matching(given)]
    model = resolve(model_name(flags, checkpoint)) if checkpoint == "none" else Path(checkpoint)
    emoji = flags.data == ["emoji"]
    places = [model.resolve(), *("emoji" if emoji else Path(file).resolve() for file in files)]
    shown = "-".join(model.resolve().parts[-2:] if STEP.fullmatch(model.resolve().name)
                     else [Path(model_name(flags, checkpoint)).resolve().name])
    names = [shown, Path(files[0]).name + ("-and-more" if len(files) > 1 else "")]
    names = ["".join(c if c.isalnum() or c in "-_." else "_" for c in name) for name in names]
    names = [name.encode()[:NAME_BYTES].decode(errors="ignore") for name in names]
    digest = hashlib.sha256(json.dumps(list(map(str, places))).encode()).hexdigest()
    return "-".join([*names, digest[:8]])


def model_name(flags, checkpoint) -> str:
    return str(checkpoint if checkpoint != "none" else flags.language or "dataset/emoji/language")


def make_room(out: Path, scored: dict) -> None:
    """Scores of another model or of other data that lie in OUT are moved to OUT/earlier_N: nobody's
    scores are overwritten, nor mixed with these. Those of the same two, by their places, will be
    replaced; if one of them was made anew, or a setting is another one, it is said."""
    file = out / "scores.json"
    if not file.is_file():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["details"]["scored"]
        name, changed = found["name"], changes(found["asked"], scored["asked"])
        whose = f"{found['model']} on {found['data']}"
    except (ValueError, KeyError, TypeError, AttributeError):  # of an older eval.py, or torn
        name, changed, whose = None, [], "a model that it does not name"
    if name != scored["name"]:
        aside = free_name(out, "earlier")
        aside.mkdir()
        for each in RESULTS:
            if (out / each).exists():
                (out / each).rename(aside / each)
        print(f"{file} held scores of {whose}. They were moved to {aside}.", file=sys.stderr)
    elif changed:
        print(f"{file} holds scores of {whose} as they were before: {'; '.join(changed)}. They "
              "are replaced when this scoring has ended.", file=sys.stderr)


# ---------------------------------------------------------------- who is asked what


def about_questions(flags, metric: str, questions: list, template, model) -> dict:
    """All that an answer depends on beside the model's files, by name: see Journal."""
    text = hashlib.sha256()
    for q in questions:
        said = [[m.role, m.content] for m in q.messages]
        text.update(json.dumps([said, q.truths, q.where, len(q.images)]).encode())
    files = [] if flags.data == ["emoji"] else [
        data_hash(name) for file in flags.data for name in matching(file)]
    weight = next(model.parameters())
    return {"data": files, "questions": text.hexdigest(), "images": flags.images,
            "system": template.default_system, "cut": cuts(metric),
            "batch_size": flags.batch_size, "max_new_tokens": flags.max_new_tokens,
            "dtype": str(weight.dtype), "quantize": flags.quantize,
            "device": weight.device.type}


def model_files(flags, checkpoint) -> dict:
    """{"model": {file: sha256}}; checkpoint: a directory, or "none" for --language alone."""
    if checkpoint == "none":
        return {"model": file_hashes(resolve(model_name(flags, checkpoint)))}
    return {"model": {name: sha256(Path(checkpoint) / name) for name in CHECKPOINT_FILES
                      if (Path(checkpoint) / name).is_file()}}


def cuts(metric: str) -> bool:
    """Whether an answer that is longer than the longest truth is wrong whatever follows."""
    return metric in ("exact", "vqa")


def runs_of(checkpoint) -> list[Path]:
    """The checkpoint, and in front of it the one that its training started from, if it is there."""
    if checkpoint == "none":
        return []
    checkpoint = Path(checkpoint)
    run = read_run(checkpoint)
    if run["stage"] == "pretrain" or run["settings"]["model"] == "none":
        return [checkpoint]
    try:
        return [find_model(run["settings"]["model"], runs=("out/pretrain",)), checkpoint]
    except FileNotFoundError as error:
        print(f"cannot score the stage before: {error}", file=sys.stderr)
        return [checkpoint]


def untrained_projector(model) -> Projector:
    """Noise in the place of what stage one learned."""
    torch.manual_seed(0)
    weight = next(model.projector.parameters())
    return Projector(model.config.projector).to(weight.device, weight.dtype).eval()


# ---------------------------------------------------------------- asking


def run(name: str, model, template, processor, questions, flags, cut: bool, journal) -> tuple:
    """Answer all the questions, with a line of progress on stderr -> answered, unusable."""
    if journal.known:
        print(f"{name}: {len(journal.known):,} answers are in {journal.file} already",
              file=sys.stderr)
    started = time.monotonic()

    def progress(done: int, of: int) -> None:
        seconds = time.monotonic() - started
        if done == of:
            print(f"\r{name}: {done:,}/{of:,} in {seconds:.0f} s" + " " * 16, file=sys.stderr)
        elif sys.stderr.isatty():
            print(f"\r{name}: {done:,}/{of:,}, {seconds / done * (of - done):.0f} s left   ",
                  end="", file=sys.stderr, flush=True)

    answered, bad = answer_all(model, template, processor, questions, flags.batch_size,
                               flags.max_new_tokens, progress, cut, journal)
    tell_bad(bad)
    return answered, bad


def tell_bad(bad: list) -> None:
    for sample in bad[:LISTED]:
        print(f"skipped {sample}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} could not be used and are not counted", file=sys.stderr)


def report(flags, out: Path, answers: dict, runs: list[Path], details: dict) -> None:
    """scores.json always; with --report the pictures too."""
    shares = {name: share(answers[name]) for name in WORDS if name in answers}
    write_scores(shares, answers["sft"], out / "scores.json", details)
    written = ["scores.json", "answers.jsonl"]
    if flags.report and any(a.question.images for a in answers["sft"]):
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
