"""One page about a run: OUT's files of figures -> OUT/report.html, a single file to look at.

    OUT -> past.py -> curves (charts.py), answers through time, data, scores, settings -> html.py

Written when a run ends, however it ends. `python -m extras.report OUT` writes it anew: while a
run goes on, after one was killed, or with the scores that eval.py has written since:

    python -m extras.report out/demo/sft --scores out/demo/scores.json
"""

import argparse
import shutil
from contextlib import contextmanager
from pathlib import Path

from extras.charts import Curve, chart, last_mean, smooth
from extras.html import figures, page, picture, table, text
from extras.past import PastRun, compared, read_past, reference_of, unlike, unlike_preset
from training.messages import clock

OWN, WRONG, GREY = "#1f77b4", "#d62728", "#8a8a8a"
NAMES = {"pretrain": "stage one, pretrain", "sft": "stage two, sft"}


@contextmanager
def reported(out, enabled: bool):
    """Write the page when the block ends, also by an error. Only rank 0 is `enabled`.

    A page that cannot be written is told and ends nothing: the checkpoints are what counts.
    """
    try:
        yield
    finally:
        if enabled:
            try:
                write_report(out)
            except Exception as error:
                print(f"no report.html: {type(error).__name__}: {error}; python -m "
                      f"extras.report {out} tries again")


def write_report(out) -> Path:
    past = read_past(out)
    stage = past.run.get("stage")
    sections = [
        f"<h1>{text(str(past.out))}</h1>", f"<p>{text(NAMES.get(stage, stage))} &middot; preset "
        f"{text(past.settings.get('preset'))} &middot; {text(past.outcome)}</p>",
        head_figures(past), curves(past), answers(past), scores(past), data(past),
        settings(past), launches(past)]
    file = past.out / "report.html"
    file.write_text(page(f"{past.out.name}: {NAMES.get(stage, stage)}", sections),
                    encoding="utf-8")
    return file


def head_figures(past: PastRun) -> str:
    last = next((e for e in reversed(past.evaluations) if e.get("eval_loss") is not None), {})
    losses = [m["loss"] for m in past.metrics]
    return figures([
        ("optimizer steps", past.last_step),
        ("loss, mean of the last 20 steps", last_mean(losses)),
        ("held-out loss", last.get("eval_loss")),
        ("held-out loss, wrong pictures", last.get("eval_loss_wrong_picture")),
        ("tokens a second", past.summary.get("tokens_per_second")),
        ("training time", clock(sum(m["seconds"] for m in past.metrics)))])


def curves(past: PastRun) -> str:
    steps = [m["step"] for m in past.metrics]
    losses = [m["loss"] for m in past.metrics]
    planned = past.settings.get("steps") or 0
    reference = reference_of(past)
    loss = [Curve("", steps, losses, OWN, faint=True),
            Curve("this run", steps, smooth(losses), OWN)]
    if reference:
        _, points = reference
        behind = Curve("reference run", [p["step"] for p in points], [p["loss"] for p in points],
                       GREY, dashed=True)
        loss = [behind, *loss]
    measured = [e["step"] for e in past.evaluations]
    held_out = [Curve(name, measured, [e.get(key) for e in past.evaluations], colour, dots=True)
                for name, key, colour in (("own pictures", "eval_loss", OWN),
                                          ("wrong pictures", "eval_loss_wrong_picture", WRONG))]
    rates = [m["learning_rate"] for m in past.metrics]
    speed = [m["tokens_per_second"] for m in past.metrics]
    last = max(planned, past.last_step)
    charts = [chart("loss for each supervised token", loss, log=True, last_x=last),
              chart("held-out loss", held_out, log=True, last_x=last),
              chart("learning rate", [Curve("", steps, rates, OWN)], last_x=last),
              chart("tokens a second", [Curve("", steps, speed, OWN, faint=True),
                                        Curve("", steps, smooth(speed), OWN)], last_x=last)]
    return ("<h2>Curves</h2>" + normal(past, reference)
            + f'<div class="charts">{"".join(charts)}</div>' + how_to_measure(past))


def how_to_measure(past: PastRun) -> str:
    if past.evaluations:
        return ('<p class="quiet">The gap between the two held-out losses is what the model sees: '
                "with another picture it should know less.</p>")
    return ('<p class="quiet">Nothing was held out: <code>--eval_every 50</code> measures samples '
            "that are never trained on, and shows answers to them.</p>")


def normal(past: PastRun, reference) -> str:
    """Is my loss normal? Put beside the reference run's at the same steps."""
    if not reference or not past.metrics:
        return ""
    about, points = reference
    own = {m["step"]: m["loss"] for m in past.metrics if m["loss"] is not None}
    shared = [p for p in points if p["step"] <= past.last_step]
    if not shared:
        return ""
    half = max(1, round(points[0]["step"]))  # steps on each side of a point of the reference
    place = shared[-1]["step"]
    near = [loss for step, loss in own.items() if abs(step - place) <= half]
    if not near:
        return ""
    mine, theirs = sum(near) / len(near), shared[-1]["loss"]
    told = (f"Around step {place:.0f} the loss is {mine:.3f}; the reference run of "
            f"{text(about['recipe'])} ({about['steps']:,} steps, dashed) had {theirs:.3f} there.")
    others = unlike(compared(past), about["settings"])
    if others:
        told += (" This run differs from it, so its curve may too: " + "; ".join(
            f"{name} {text(mine)} instead of {text(theirs)}"
            for name, (mine, theirs) in others.items()) + ".")
    return f'<p class="note">{told}</p>'


def answers(past: PastRun) -> str:
    """A card for each held-out question: the picture, the truth, and what was answered when."""
    asked = [line for line in past.answers if line.get("answers")]
    problems = [f"step {line['step']}: {line['problem']}" for line in past.answers
                if line.get("problem")]
    told = "".join(f'<p class="note">no answers at {text(problem)}</p>' for problem in problems)
    if not asked:
        return f"<h2>Answers</h2>{told}" if told else ""
    cards = []
    for number, last in enumerate(asked[-1]["answers"]):
        rows = []
        for line in asked:
            found = line["answers"][number]["answer"]
            if rows and rows[-1][2] == found:  # said again: the row grows longer
                rows[-1][1] = line["step"]
            else:
                rows.append([line["step"], line["step"], found])
        lines = "".join(
            f"<tr><td>{first if first == final else f'{first} to {final}'}</td><td class="
            f"\"{'right' if found.strip() == last['truth'].strip() else 'wrong'}\">"
            f"{text(found) or '(nothing)'}</td></tr>" for first, final, found in rows)
        cards.append(f'<div class="card">{picture(past.out / last["picture"])}'
                     f'<p class="quiet">{text(last["question"])}</p><p>truth: '
                     f'{text(last["truth"])}</p><table><tr><th>step</th><th>answer</th></tr>{lines}'
                     "</table></div>")
    return ("<h2>Answers to held-out questions, as it learned</h2>" + told
            + f'<div class="cards">{"".join(cards)}</div>')


def scores(past: PastRun) -> str:
    if not past.scores:
        return ""
    alone = [[name, value, between(past.scores, name)] for name, value in past.scores.items()
             if not isinstance(value, dict)]
    tables = [table(alone, ["score", "", "95 % interval"])] if alone else []
    for name, values in past.scores.items():
        if isinstance(values, dict) and name != "details":
            tables.append(table([[key, value] for key, value in values.items()], [name, ""]))
    return f'<h2>Scores</h2><div class="figures">{"".join(tables)}</div>'


def between(scores: dict, name: str) -> str:
    """The bootstrap interval that eval.py writes under "details"; "-" where there is none."""
    try:
        figure, = scores["details"]["figures"][name].values()
        return f"{figure['low']:.4f} to {figure['high']:.4f}"
    except (KeyError, TypeError, ValueError, AttributeError):  # of an older eval.py, or by hand
        return "-"


def data(past: PastRun) -> str:
    s, about = past.summary, past.run.get("data", {})
    rows = [["files", name] for name in files_of(about)]
    rows.append(["samples in the data", about.get("samples")])
    if not s:
        rows.append(["supervised tokens", sum(m["supervised_tokens"] for m in past.metrics)])
        rows.append(["skipped samples", "unknown: summary.json is written when a run ends"])
        return "<h2>Data</h2>" + table(rows)
    seen = s["samples_trained"] + s["samples_skipped"]
    if s["steps"] != past.last_step:
        rows.append(["the figures below are of step", s["steps"]])
    rows += [["samples trained on", s["samples_trained"]],
             ["samples skipped as unusable", f"{s['samples_skipped']:,} of {seen:,}"],
             *([f"... because: {reason}", count] for reason, count in
               sorted(s["skipped_why"].items(), key=lambda pair: -pair[1])),
             ["tokens", s["tokens"]], ["tokens supervised", s["tokens_supervised"]],
             ["padding", f"{s['tokens_padding'] / max(1, s['tokens']):.1%}"],
             ["most memory in a process", gigabytes(s["peak_memory"])],
             ["most memory on a GPU", gigabytes(s["peak_gpu_memory"])]]
    return "<h2>Data</h2>" + table([row for row in rows if row[1] is not None])


def files_of(about: dict) -> list[str]:
    """The parts of run.json's "data": one file, or several with their weights."""
    return [" ".join(str(value) for name, value in part.items() if name in ("file", "kind"))
            + (f", weight {part['weight']:g}" if "weight" in part else "")
            for part in about.get("files", [about])]


def gigabytes(size: int | None) -> str | None:
    return None if size is None else f"{size / 1e9:.2f} GB"


def settings(past: PastRun) -> str:
    if not past.settings:
        return ""
    others = unlike_preset(past)
    rows = [[name, value] for name, value in sorted(past.settings.items())]
    told = "; ".join(f"{name}: {text(value)}" for name, value in sorted(others.items()))
    note = (f"Highlighted: what the preset {text(past.settings['preset'])} has otherwise ({told})."
            if others else "All as the preset has it.")
    note += "".join(text(f" From step {change['from_step']} on {change['setting']} is "
                         f"{change['now']}; before, it was {change['before']}.")
                    for change in past.run.get("changes", []))
    return (f'<h2>Settings</h2><p class="quiet">{note}</p><div class="columns">'
            f"{table(rows, told=set(others))}</div>")


def launches(past: PastRun) -> str:
    if not past.run.get("launches"):
        return ""
    rows = [[launch["started"], launch["ended"], launch["first_step"], launch["last_step"],
             launch["outcome"], (launch.get("commit") or "")[:12], launch["processes"],
             (launch["machine"].get("gpu") or {}).get("name") or launch["machine"]["cpu"]]
            for launch in past.run["launches"]]
    versions = ", ".join(f"{name} {version}" for name, version in past.run["versions"].items())
    heads = ["started", "ended", "first step", "last step", "outcome", "commit", "processes",
             "machine"]
    return f'<h2>Launches</h2>{table(rows, heads)}<p class="quiet">{text(versions)}</p>'


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", help="directory of a training run")
    parser.add_argument("--scores", metavar="FILE", help="a scores.json of eval.py --report, to be "
                        "kept with the run and shown")
    flags = parser.parse_args(arguments)
    try:
        read_past(flags.out)
        if flags.scores:
            kept = Path(flags.out) / "scores.json"
            if Path(flags.scores).resolve() != kept.resolve():
                shutil.copyfile(flags.scores, kept)
        print(write_report(flags.out))
    except OSError as error:
        raise SystemExit(f"extras.report: {error}") from error


if __name__ == "__main__":
    main()
