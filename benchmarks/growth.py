"""How a step's time and memory grow: with the row, the vocabulary, the supervised tokens.

    python -m benchmarks.growth                 about ten minutes, writes docs/growth.png
    python -m benchmarks.growth --steps 1 --out /tmp/growth.png

    a small decoder (4 layers, 256 wide) and a tiny vision tower, the projector trained, one row
    -> a process for each side -> at each point seconds, and the peak over what it began with

Only one of the three is changed at a time; the others are those of START. Ours stands beside
transformers. Straight lines through the points would be the best there is: attention's share, which
grows with the square of the row, is small up to some thousand tokens.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.sides import Side, Work, write_weights

LANGUAGE = dict(model_type="qwen2", vocab_size=6400, hidden_size=256, intermediate_size=1024,
                num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                tie_word_embeddings=True, max_position_embeddings=8192)
VISION = dict(model_type="siglip_vision_model", hidden_size=64, intermediate_size=128,
              num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16)
START = {"tokens of a row": 1024, "words of the vocabulary": 6400, "supervised tokens": 128}
POINTS = {"tokens of a row": (256, 512, 1024, 2048, 4096),
          "words of the vocabulary": (6400, 32_000, 64_000, 151_936),
          "supervised tokens": (64, 256, 512, 960)}


def work_at(axis: str, value: int) -> Work:
    at = {**START, axis: value}
    if axis == "supervised tokens":  # of a small vocabulary they would cost nobody anything
        at["words of the vocabulary"] = 64_000
    return Work({**LANGUAGE, "vocab_size": at["words of the vocabulary"]}, VISION, "projector",
                ((at["tokens of a row"],),), at["supervised tokens"])


def measure(work: Work, sides: dict[str, Side], steps: int,
            clock: str) -> dict[str, tuple[float, float]]:
    """-> {side: (seconds of a step, MB at the peak of it beyond what stood there before)}."""
    with tempfile.TemporaryDirectory() as directory:
        write_weights(work, Path(directory))
        began = {name: side.begin(work, directory, "fp32") for name, side in sides.items()}
        measured = {name: [] for name in sides}
        for _ in range(steps + 1):  # the first one warms up
            for name, side in sides.items():
                measured[name].append(side.step(0))
        return {name: (median(step[clock] for step in steps[1:]),
                       (steps[-1]["peak"] - began[name]) / 1e6) for name, steps in measured.items()}


def draw(found: dict, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(9, 4.8), layout="constrained")
    for column, (axis, points) in enumerate(found.items()):
        for row, what in enumerate(("seconds of a step", "peak memory, MB")):
            panel = axes[row][column]
            for side, colour in (("theirs", "tab:orange"), ("ours", "tab:blue")):
                panel.plot([value for value, _ in points],
                           [measured[side][row] for _, measured in points], "o-", color=colour,
                           markersize=4, label={"theirs": "transformers", "ours": "ours"}[side])
            panel.set_ylim(bottom=0)
            panel.set_xlim(left=0)
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(what)
            if row == 1:
                panel.set_xlabel(axis)
    axes[0][0].legend(frameon=False)
    figure.savefig(out, dpi=100)


def table(found: dict) -> str:
    lines = ["| varied | value | ours: s, MB | transformers: s, MB | faster | memory |",
             "| --- " * 6 + "|"]
    for axis, points in found.items():
        for value, measured in points:
            (own, mine), (other, peak) = measured["ours"], measured["theirs"]
            lines.append(f"| {axis} | {value:,} | {own:.2f}, {mine:.0f} | {other:.2f}, {peak:.0f} "
                         f"| {other / own:.2f} | {mine / peak:.2f} |")
    return "\n".join(lines)


def beyond_linear(points: list) -> dict[str, float]:
    """Of each side: how many times more memory the largest value takes than if it had grown in
    proportion from the middle one."""
    (small, few), (large, many) = points[len(points) // 2], points[-1]
    return {side: many[side][1] / few[side][1] / (large / small) for side in few}


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=2, help="counted steps of each point (default: %(default)s)")
    add("--axes", nargs="+", choices=POINTS, default=[*POINTS], metavar="AXIS")
    add("--threads", type=int, default=1)
    add("--clock", choices=("seconds", "busy"), default="seconds", help="as in benchmarks.train")
    add("--out", default="docs/growth.png", help="the figure (default: %(default)s)")
    flags = parser.parse_args(arguments)
    found, sides = {}, {name: Side(name, flags.threads) for name in ("ours", "theirs")}
    for axis in flags.axes:
        found[axis] = []
        for value in POINTS[axis]:
            measured = measure(work_at(axis, value), sides, flags.steps, flags.clock)
            found[axis].append((value, measured))
            print(json.dumps({axis: value, **measured}), flush=True)
    for side in sides.values():
        side.end()
    print(table(found))
    for axis, points in found.items():
        print(axis, {side: f"{times:.2f} x linear"
                     for side, times in beyond_linear(points).items()})
    if len(found) > 1:
        draw(found, Path(flags.out))


if __name__ == "__main__":
    main()
