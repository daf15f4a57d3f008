"""`eval.py --data`: files -> questions -> predictions -> scores, beside those without seeing.

    files -> open_questions -> questions -> answers of the model            -> a table
                            -> without an image, with another one           -> answers.jsonl
                            -> with --report: of stage one, of a random     -> scores.json
                               projector                                    -> two PNG files

Answers are on disk as soon as a batch is done (OUT/cache, see results_cache.py): the same command
goes on where it was killed, and asks nothing twice. OUT is --report DIR, or out/scores/NAME, a NAME
for each model and data (result_name). Only one process at a time scores into one OUT.
"""

import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dataset.readers.mixture import open_mixture, split_source
from evaluation.benchmarks import open_benchmark
from evaluation.eval_samples import read_questions
from evaluation.metrics import METRICS, measure
from evaluation.report import contact_sheet, loss_curve
from evaluation.results_cache import ResultsCache, changes, locked
from evaluation.score import Predictor, with_shuffled_images, without_images
from evaluation.summary import CONDITIONS, format_summary, summarize, table, write_summary
from model.pretrained.checkpoint import STEP, find_model, read_run
from model.pretrained.files import sha256, weight_files
from model.pretrained.hub import resolve
from model.projector import Projector
from training.data import data_hash, matching
from training.inference import load_model
from training.writable import free_name

LISTED = 5  # unusable samples named on the screen; scores.json counts them all
# Beside the weights.
SMALL_FILES = ("config.json", "tokenizer.json", "vocab.json", "merges.txt",
               "preprocessor_config.json", "processor_config.json")
# What lies in OUT beside the cache; scores.json says whose they are, so it is moved last.
RESULTS = ("answers.jsonl", "contact_sheet.png", "loss.png", "scores.json")
NAME_BYTES = 60  # of a model and of a file in result_name: some file systems take 143 in all


def evaluate(flags, checkpoint, model, template, processor) -> None:
    """checkpoint: the directory that was loaded, or "none" for --language_model alone."""
    # 1. Read the questions, and refuse a metric that does not fit before hours of answering.
    metric, data = open_questions(flags)
    questions, bad = read_questions(data, flags.limit)
    data_name = " ".join(flags.data)
    if not questions:
        raise ValueError(f"--data {data_name}: no question to score in {len(data)} samples"
                         + (f"; the first problem is {bad[0]}" if bad else ""))
    print_skipped(bad)
    some = questions[:1] if metric == "caption" else questions
    measure(metric, [q.truth for q in some], some)

    # 2. All that an answer depends on: the key of the cache.
    name = model_name(flags, checkpoint)
    key = {**model_files(name), **answer_settings(flags, metric, questions, template, model)}
    scored = {"name": result_name(flags, checkpoint), "model": name, "data": data_name, "key": key}
    out = Path(flags.report or Path("out") / "scores" / scored["name"])
    predictions, skipped = {}, {"data": len(bad)}
    with locked(out / "cache"):
        make_room(out, scored)

        # 3. Ask the questions under each condition, and score the answers.
        runs = runs_of(checkpoint) if flags.report else []
        ours = Predictor(model, template, processor, flags.batch_size, flags.max_new_tokens,
                         METRICS[metric].stop_after_truth)
        for condition, predictor, subset, other in conditions(flags, runs, ours, questions):
            cache = ResultsCache(out / "cache" / f"{condition}.jsonl",
                                 {"condition": condition, **key, **other})
            if cache.answers:
                print(f"{CONDITIONS[condition]}: {len(cache.answers):,} answers are in "
                      f"{cache.file} already", file=sys.stderr)
            answered, bad = predictor.predict(subset, cache, CONDITIONS[condition])
            print_skipped(bad)
            skipped[condition] = len(bad)
            if answered:
                rows = measure(metric, [p.answer for p in answered], [p.question for p in answered])
                predictions[condition] = [replace(p, row=tuple(row.tolist()))
                                          for p, row in zip(answered, rows)]
        if "sft" not in predictions:
            raise ValueError(f"--data {data_name}: none of the {len(questions)} questions could be "
                             "asked")

        # 4. Count, print and write.
        print(f"\n{METRICS[metric].title} {len(predictions['sft']):,} questions of {data_name}\n")
        print(table(predictions["sft"], METRICS[metric].unit))
        details = {"scored": scored, "metric": metric,
                   "questions": {c: len(p) for c, p in predictions.items()},
                   "skipped": skipped, **summarize(metric, predictions)}
        print("\n" + format_summary(metric, details))
        write_summary(predictions, details, out)
        written = ["scores.json", "answers.jsonl", *(draw(predictions["sft"], runs, out)
                                                     if flags.report else [])]
    print(f"\nwritten to {out}: {', '.join(written)}\nchat with it: python eval.py"
          + (f" --model {flags.model}" if flags.model else ""))


def open_questions(flags) -> tuple[str, object]:
    """-> the metric, and what read_questions reads."""
    if flags.metric not in ("auto", *METRICS):
        raise ValueError(f"--metric {flags.metric}: expected auto, {', '.join(METRICS)}")
    files, benchmark = data_files(flags), None
    if not files:
        from dataset.emoji.world import EmojiData  # here: other data has no use for it

        data = EmojiData("test")
    else:
        for file in files:
            if split_source(file)[1] != 1:
                raise ValueError(f"--data {file}: a weight says how often training sees a sample, "
                                 "and a score asks every question once. Leave the weight out.")
        benchmark = open_benchmark(files, flags.image_folder, flags.suffix,
                                   flags.follow_links)
        data = benchmark.data if benchmark else open_mixture(
            files, flags.image_folder, follow_links=flags.follow_links)
    own = benchmark.metric if benchmark else "exact"
    return own if flags.metric == "auto" else flags.metric, data


def conditions(flags, runs: list[Path], predictor: Predictor, questions: list):
    """Yield (condition, predictor, questions, what differs in the key)."""
    if len(runs) == 2:
        model, _, _ = load_model(flags, str(runs[0]))
        earlier, files = replace(predictor, model=model), model_files(runs[0])
        yield "pretrain", earlier, questions, files
        torch.manual_seed(0)
        weight = next(model.projector.parameters())
        model.projector = Projector(model.config.projector).to(weight.device, weight.dtype).eval()
        yield "before", earlier, questions, {**files, "projector": "random"}
        del model, earlier, weight  # its memory is free for the answers of the next one
    yield "sft", predictor, questions, {}
    if any(q.images for q in questions):
        yield "no_image", predictor, without_images(questions), {}
        yield "shuffled_images", predictor, with_shuffled_images(questions), {}


# ---------------------------------------------------------------- where the scores lie


def result_name(flags, checkpoint) -> str:
    """MODEL-DATA-HASH, a directory's name: the same for the same model and data, whatever the
    other settings. The hash is of where both lie, for there may be a second data.jsonl elsewhere.
    """
    model = Path(model_name(flags, checkpoint)).resolve()
    files = [Path(file).resolve() for file in data_files(flags)]
    names = ["-".join(model.parts[-2:]) if STEP.fullmatch(model.name) else model.name,
             (files[0].name if files else "emoji") + ("-and-more" if len(files) > 1 else "")]
    names = [re.sub(r"[^\w.-]", "_", name).encode()[:NAME_BYTES].decode(errors="ignore")
             for name in names]
    digest = hashlib.sha256(json.dumps(list(map(str, [model, *files]))).encode()).hexdigest()
    return "-".join([*names, digest[:8]])


def data_files(flags) -> list[str]:
    """[] for the embedded world."""
    if flags.data == ["emoji"]:
        return []
    return [file for source in flags.data for file in matching(source)]


def model_name(flags, checkpoint) -> str:
    if checkpoint == "none":
        return str(flags.language_model or "dataset/emoji/language")
    return str(checkpoint)


def make_room(out: Path, scored: dict) -> None:
    """Scores of another model or of other data that lie in OUT are moved to OUT/earlier_N: no
    scores are overwritten, nor mixed with these. Those of the same two will be replaced; if the
    model was trained anew, or a setting differs, a message says so."""
    file = out / "scores.json"
    if not file.is_file():
        return
    try:
        old = json.loads(file.read_text(encoding="utf-8"))["details"]["scored"]
        name, differences = old["name"], changes(old["key"], scored["key"])
        title = f"{old['model']} on {old['data']}"
    except (ValueError, KeyError, TypeError, AttributeError):  # torn, or not of eval.py
        name, differences, title = None, [], "a model that it does not name"
    if name != scored["name"]:
        aside = free_name(out, "earlier")
        aside.mkdir()
        for each in RESULTS:
            if (out / each).exists():
                (out / each).rename(aside / each)
        print(f"{file} held scores of {title}. They were moved to {aside}.", file=sys.stderr)
    elif differences:
        print(f"{file} holds scores of {title} as they were before: {'; '.join(differences)}. They "
              "are replaced when this scoring has ended.", file=sys.stderr)


# ---------------------------------------------------------------- what an answer depends on


def answer_settings(flags, metric: str, questions: list, template, model) -> dict:
    """All that an answer depends on beside the model's files, by name: see ResultsCache."""
    digest = hashlib.sha256()
    for q in questions:
        turns = [[m.role, m.content] for m in q.messages]
        digest.update(json.dumps([turns, q.truths, q.where, len(q.images)]).encode())
    weight = next(model.parameters())
    return {"data": list(map(data_hash, data_files(flags))), "questions": digest.hexdigest(),
            "images": flags.image_folder, "system": template.default_system,
            "stop_after_truth": METRICS[metric].stop_after_truth, "quantize": flags.quantize,
            "batch_size": flags.batch_size, "max_new_tokens": flags.max_new_tokens,
            "dtype": str(weight.dtype), "device": weight.device.type}


def model_files(name) -> dict:
    """{"model": {file: sha256}}"""
    directory = resolve(name)
    files = [*weight_files(directory), *(directory / small for small in SMALL_FILES)]
    return {"model": {file.name: sha256(file) for file in files if file.is_file()}}


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


# ---------------------------------------------------------------- on the screen and drawn


def print_skipped(bad: list) -> None:
    for sample in bad[:LISTED]:
        print(f"skipped {sample}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} could not be used and are not counted", file=sys.stderr)


def draw(predictions: list, runs: list[Path], out: Path) -> list[str]:
    """The PNG files of --report -> their names."""
    drawn = []
    if any(p.question.images for p in predictions):
        contact_sheet(predictions, out / "contact_sheet.png")
        drawn.append("contact_sheet.png")
    names = ["this model"] if len(runs) == 1 else ["stage one: projector", "stage two"]
    metrics = {name: run.parent / "metrics.jsonl" for name, run in zip(names, runs)}
    metrics = {name: file for name, file in metrics.items() if file.exists()}
    if metrics:
        loss_curve(metrics, out / "loss.png")
        drawn.append("loss.png")
    return drawn
