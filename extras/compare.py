"""Several runs in one page: python -m extras.compare RUN RUN ... [--out compare.html]

    directories -> past.py -> the same four charts with a line for each run,
                              their last figures, the settings in which they differ -> one file
"""

import argparse
from pathlib import Path

from extras.charts import COLOURS, Curve, chart, last_mean, smooth
from extras.html import page, table, text
from extras.past import PastRun, read_past
from training.messages import clock

# Title, file, figure in its lines; on a logarithmic scale; jumps from step to step, so smoothed.
CHARTS = (("loss for each supervised token", "metrics", "loss", True, True),
          ("held-out loss", "evaluations", "eval_loss", True, False),
          ("held-out loss, wrong pictures", "evaluations", "eval_loss_wrong_picture", True, False),
          ("learning rate", "metrics", "learning_rate", False, False),
          ("tokens a second", "metrics", "tokens_per_second", False, True))


def names_of(runs: list[PastRun]) -> list[str]:
    """The paths without what they share at their beginning; alike ones are numbered."""
    paths = [run.out.resolve().parts for run in runs]
    shared = 0
    while len(runs) > 1 and len({path[:shared + 1] for path in paths}) == 1 and all(
            len(path) > shared + 1 for path in paths):
        shared += 1
    names = ["/".join(path[shared:] if len(runs) > 1 else path[-1:]) for path in paths]
    return [name if names.count(name) == 1 else f"{name} ({number})"
            for number, name in enumerate(names, start=1)]


def overlay(runs: list[PastRun], names: list[str]) -> str:
    charts = []
    for title, file, key, log, jumps in CHARTS:
        if not any(m.get(key) is not None for run in runs for m in getattr(run, file)):
            continue  # measured in none of them
        curves = []
        for number, (run, name) in enumerate(zip(runs, names)):
            lines = getattr(run, file)
            steps, values = [m["step"] for m in lines], [m.get(key) for m in lines]
            colour = COLOURS[number % len(COLOURS)]
            curves.append(Curve(name, steps, smooth(values) if jumps else values, colour,
                                dots=file == "evaluations", dashed=number >= len(COLOURS)))
        charts.append(chart(title, curves, log))
    return f'<div class="charts">{"".join(charts)}</div>'


def last_figures(run: PastRun) -> list:
    last = next((e for e in reversed(run.evaluations) if e.get("eval_loss") is not None), {})
    losses = [m["loss"] for m in run.metrics]
    return [run.last_step, last_mean(losses), last.get("eval_loss"),
            last.get("eval_loss_wrong_picture"), run.summary.get("samples_trained"),
            run.summary.get("tokens_per_second"), clock(sum(m["seconds"] for m in run.metrics)),
            run.outcome]


def differences(runs: list[PastRun]) -> list[list]:
    """[setting, value in each run] of those that are not the same in all; "out" always differs."""
    names = sorted({name for run in runs for name in run.settings} - {"out", "resume"})
    rows = [[name, *(run.settings.get(name) for run in runs)] for name in names]
    return [row for row in rows if any(value != row[1] for value in row[2:])]


def write_comparison(directories: list, file) -> Path:
    """Raises FileNotFoundError for a directory without a run."""
    runs = [read_past(directory) for directory in directories]
    names, file = names_of(runs), Path(file)
    heads = ["run", "steps", "loss (last 20)", "held-out loss", "wrong pictures", "samples",
             "tokens a second", "time", "outcome"]
    differ = differences(runs)
    sections = [
        f"<h1>{len(runs)} runs</h1>",
        '<p class="quiet">Losses and speeds are means of 21 neighbouring steps.</p>',
        overlay(runs, names), "<h2>At the end</h2>",
        table([[name, *last_figures(run)] for name, run in zip(names, runs)], heads),
        "<h2>Settings in which they differ</h2>",
        table(differ, ["setting", *names]) if differ else f"<p>{text('none')}</p>"]
    file.write_text(page(f"{len(runs)} runs", sections), encoding="utf-8")
    return file


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a training run")
    parser.add_argument("--out", default="compare.html", help="file to write (%(default)s)")
    flags = parser.parse_args(arguments)
    try:
        print(write_comparison(flags.runs, flags.out))
    except OSError as error:
        raise SystemExit(f"extras.compare: {error}") from error


if __name__ == "__main__":
    main()
