"""One page about a training, or about several directories beside each other.

    RunRecord (runs.py) -> curves, answers, scores, settings, what ran -> one HTML file

A training writes the page when it ends, however it ends. This command writes it again: while a run
goes on, after one was killed, with the scores that eval.py has written since, or for several
directories, of trainings or of eval.py's scores:

    python -m extras.report out/demo/sft --scores out/demo/scores.json
    python -m extras.report out/a out/b --page compare.html

The page fetches nothing, and all that comes from data goes through `text`: a caption may hold HTML.
"""

import argparse
import base64
import html
import io
import math
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from extras.runs import (
    RunRecord,
    answers_of,
    curve_settings,
    marked_settings,
    mean_loss,
    read_run,
    reference_of,
    unlike,
)

WINDOW, POINTS, CARDS = 21, 2000, 40  # of a mean; most of a line; most questions in a page
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 24px; max-width: 1400px; }
table { border-collapse: collapse; } img { width: 100%; } .right { color: #14782a; }
th, td { text-align: left; padding: 3px 12px; border: 1px solid #ddd; overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; font-size: 13px; }
.card { border: 1px solid #ddd; padding: 10px; width: 250px; } .wrong { color: #b01e1e; }"""


@contextmanager
def reported(out, enabled: bool):
    """Write the page when the block ends, also by an error. Only rank 0 is `enabled`. A page that
    cannot be written is said and ends nothing: the checkpoints are what counts."""
    try:
        yield
    finally:
        if enabled:
            try:
                write_report([out])
            except Exception as error:
                print(f"no report.html: {type(error).__name__}: {error}; python -m "
                      f"extras.report {out} tries again")


def write_report(outs: list, file=None) -> Path:
    """file: OUT/report.html of one directory, compare.html of several, if not given."""
    runs = [read_run(out) for out in outs]
    names, alone = [str(run.out) for run in runs], len(runs) == 1
    ran = [{**run.run, "settings": {}, **run.summary} for run in runs]
    scores = [{**run.scores, "details": run.scores.get("details", {}).get("figures", {})}
              for run in runs]  # of the details only the intervals
    settings = [marked_settings(run) for run in runs]
    sections = [
        *map(heading, runs), beside_reference(runs[0]) if alone else "", curves(runs),
        answers(runs, names), table("Scores", names, scores),
        table("Settings", names, settings) if alone else
        table("Settings in which they differ", names, settings, only_differing=True),
        table("What ran, on which data, and what came of it", names, ran)]
    file = Path(file or (runs[0].out / "report.html" if alone else "compare.html"))
    file.write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        # Should anything here ever name another address, the browser will not go there.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'\"><title>{text(names)}</title>"
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(sections) + "\n</body></html>\n",
        encoding="utf-8")
    return file


def heading(run: RunRecord) -> str:
    """What it was and where it stands; a directory of scores has no run.json."""
    facts = ""
    if run.run:
        outcome = run.run["launches"][-1]["outcome"] or "it goes on, or it was killed"
        facts = (f"{run.recipe}, {run.last_step:,} steps: {outcome}; loss over the last 20 steps "
                 f"{text(mean_loss(run.metrics[-20:]))}")
    return f"<h1>{text(run.out)}</h1><p>{text(facts)}</p>"


def beside_reference(run: RunRecord) -> str:
    """Is my loss normal? The loss of the reference run at the same step."""
    about, points = reference_of(run)
    points = [point for point in points if point["step"] <= run.last_step]
    if not points:
        return ""
    step, loss = points[-1]["step"], points[-1]["loss"]
    own = mean_loss([m for m in run.metrics if abs(m["step"] - step) <= 5])
    sentence = (f"Around step {step:.0f} the loss is {text(own)}; the reference run of "
                f"{about['recipe']} ({about['steps']:,} steps, dashed) had {loss:.3f} there.")
    if differing := unlike(curve_settings(run), about["settings"]):
        sentence += " This run differs from it, so its curve may too: " + "; ".join(
            f"{name} {here} instead of {there}" for name, (here, there) in differing.items())
    return f"<p>{text(sentence)}</p>"


def curves(runs: list[RunRecord]) -> str:
    """A chart for the held-out losses and for each figure of metrics.jsonl, as a PNG."""
    from matplotlib.figure import Figure  # here: a training needs it only at its end

    names = dict.fromkeys(name for run in runs for m in run.metrics[:1] for name in m)
    names = [name for name in names if name not in ("step", "seconds")]
    if not names:
        return ""
    titles = ["held-out loss (--eval_steps)", *(name.replace("_", " ") for name in names)]
    rows = math.ceil(len(titles) / 3)
    figure = Figure(figsize=(14, 3.4 * rows), layout="constrained")
    charts = [figure.add_subplot(rows, 3, position, title=title)
              for position, title in enumerate(titles, start=1)]
    for number, run in enumerate(runs):
        style = {"color": f"C{number}", "label": "/".join(run.out.parts[-2:])}
        draw(charts[0], run.evaluations, "eval_loss", "-o", **style)
        draw(charts[0], run.evaluations, "eval_loss_shuffled_images", ":x",
             **{**style, "label": "with wrong images"})
        for axes, name in zip(charts[1:], names):
            if len(runs) == 1:  # the single steps, behind their mean
                draw(axes, run.metrics, name, "-", color="C0", alpha=0.25)
            draw(axes, run.metrics, name, "-", 1 if name == "learning_rate" else WINDOW, **style)
            if name == "loss" and len(runs) == 1:
                draw(axes, reference_of(run)[1], name, "--", color="grey", label="reference run")
    for axes in charts:
        axes.grid(alpha=0.3, which="both")
        if "loss" in axes.get_title():
            axes.set_yscale("log", nonpositive="mask")
        if axes.lines:
            axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return "<h2>Curves over optimizer steps</h2>" + image(png.getvalue(), "png")


def draw(axes, lines: list[dict], name: str, style: str, window: int = 1, **more) -> None:
    """The mean of `window` neighbouring lines; where all of them lack the figure is a gap."""
    lines = lines[::len(lines) // POINTS + 1]
    values = np.array([line.get(name) for line in lines], dtype=float)
    known, window = np.isfinite(values), np.ones(min(window, len(values)))
    if known.any():
        sums, counts = (np.convolve(array, window, "same")
                        for array in (np.where(known, values, 0), known))
        means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        axes.plot([line["step"] for line in lines], means, style, **more)


def answers(runs: list[RunRecord], names: list[str]) -> str:
    """A card for each held-out question: what one run answered at which step, or what several
    answered at last, first where they differ."""
    cards = [f"<p>no answers at step {text(line['step'])}: {text(line['problem'])}</p>"
             for run in runs for line in run.answers if "problem" in line]
    given = [answers_of(run) for run in runs]
    shared = [key for key in given[0] if all(key in each for each in given)]
    last = {key: [each[key][-1][1]["answer"] for each in given] for key in shared}
    shared.sort(key=lambda key: len(set(last[key])) == 1)
    for key in shared[:CARDS]:
        about = given[0][key][-1][1]
        rows = zip(names, last[key])
        if len(runs) == 1:
            rows = [(f"step {step}" if step else names[0], line["answer"])
                    for step, line in given[0][key]]
        lines = "".join(
            f"<tr><td>{text(name)}</td><td class="
            f"\"{'right' if answer.strip() == about['truth'].strip() else 'wrong'}\">"
            f"{text(answer) or '(nothing)'}</td></tr>" for name, answer in rows)
        cards.append(f'<div class="card">{held_out_image(runs[0], about)}<p>{text(key[1])}</p>'
                     f"<p>truth: {text(about['truth'])}</p><table>{lines}</table></div>")
    title = f"<h2>Answers to held-out questions: {min(CARDS, len(shared))} of {len(shared):,}</h2>"
    return f'{title}<div class="cards">{"".join(cards)}</div>' if cards else ""


def held_out_image(run: RunRecord, about: dict) -> str:
    """The small image that a training keeps of a question: no file outside OUT/held_out."""
    file = run.out / "held_out" / Path(str(about.get("image"))).name
    return image(file.read_bytes(), "jpeg") if file.is_file() else f"<p>{text(about['where'])}</p>"


def image(content: bytes, kind: str) -> str:
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def table(title: str, names: list[str], columns: list[dict], only_differing=False) -> str:
    """A row for each fact, a column for each directory; none where there is no fact."""
    columns = [dict(flat(column)) for column in columns]
    rows = [[name, *(column.get(name) for column in columns)]
            for name in dict.fromkeys(name for column in columns for name in column)]
    rows = [row for row in rows if not only_differing or len(set(map(text, row[1:]))) > 1]
    lines = [f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows]
    head = "".join(f"<th>{text(name)}</th>" for name in ["", *names])
    return f"<h2>{title}</h2><table><tr>{head}</tr>{''.join(lines)}</table>" if rows else ""


def flat(facts: dict, before: str = ""):
    """{"a": {"b": 1}} -> ("a: b", 1), ...; a list of dicts by their numbers."""
    for name, value in facts.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = dict(enumerate(value, start=1))
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}: ")
        else:
            yield f"{before}{name}", value


def text(value) -> str:
    """Anything -> what a reader sees, and never markup."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text, value))
    if isinstance(value, float):
        value = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return html.escape("-" if value is None else str(value))


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m extras.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", nargs="+", help="directory of a training, or of eval.py's scores")
    parser.add_argument("--scores", metavar="FILE", help="scores.json to keep with the first OUT")
    parser.add_argument("--page", metavar="FILE", help="default: OUT/report.html, or compare.html")
    flags = parser.parse_args(arguments)
    try:
        read_run(flags.out[0])
        kept = Path(flags.out[0]) / "scores.json"
        if flags.scores and Path(flags.scores).resolve() != kept.resolve():
            shutil.copyfile(flags.scores, kept)
        print(write_report(flags.out, flags.page))
    except OSError as error:
        raise SystemExit(f"extras.report: {error}") from error


if __name__ == "__main__":
    main()
