"""Curves as SVG: lists of numbers -> the text of one small chart, to stand in a page.

    [Curve(name, xs, ys, colour)] -> chart -> "<svg ...>"        (report.py, compare.py)

Written by hand, because every run draws its curves at its end, and all that a chart needs is a
scale and lines: it takes a few milliseconds and no library that could be missing or fail there.
"""

import html
import itertools
import math
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 290  # of a chart, in pixels of the page
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 30, 34  # room around the lines
POINTS = 400  # of a line: more than that no eye tells apart, and long runs have millions
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")


@dataclass(frozen=True)
class Curve:
    name: str  # in the legend; "" for none
    xs: list
    ys: list  # None where there is no number: the line has a gap
    colour: str
    faint: bool = False  # single steps, behind their mean
    dashed: bool = False
    dots: bool = False  # few points, each of them measured


def smooth(values: list, reach: int = 10) -> list:
    """Each value's mean with those up to `reach` places before and behind it: single steps jump
    too much to be read. In the middle of its window, a mean does not lag behind. A value of None
    counts for nothing."""
    sums = [0.0, *itertools.accumulate(value or 0.0 for value in values)]
    counts = [0, *itertools.accumulate(value is not None for value in values)]
    spans = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (counts[end] - counts[start])
            if counts[end] > counts[start] else None for start, end in spans]


def last_mean(values: list, window: int = 20) -> float | None:
    known = [value for value in values if value is not None][-window:]
    return sum(known) / len(known) if known else None


def thin(xs: list, ys: list, most: int = POINTS) -> tuple[list, list]:
    """At most about so many points: the mean of each run of neighbours."""
    if len(xs) <= most:
        return xs, ys
    size = math.ceil(len(xs) / most)
    groups = [(xs[i:i + size], [y for y in ys[i:i + size] if y is not None])
              for i in range(0, len(xs), size)]
    return ([sum(x) / len(x) for x, _ in groups],
            [sum(y) / len(y) if y else None for _, y in groups])


def chart(title: str, curves: list[Curve], log: bool = False, last_x: float | None = None) -> str:
    """One chart with optimizer steps below and the title's figure on the left.

    log: the height is the logarithm, where all numbers are above 0. last_x: where the steps end;
    what a curve has beyond is left out.
    """
    curves = [Curve(c.name, *within(c, last_x), c.colour, c.faint, c.dashed, c.dots)
              for c in curves]
    points = [(x, y) for c in curves for x, y in zip(c.xs, c.ys) if y is not None]
    head = (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
            f'<text x="{LEFT}" y="16" class="title">{html.escape(title)}</text>')
    if not points:
        return (head + f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">not measured'
                "</text></svg>")
    xs, ys = zip(*points)
    log = log and min(ys) > 0
    end = max(last_x or 0, *xs)
    across = scale(min(0, min(xs)), end if end > 0 else 1, LEFT, WIDTH - RIGHT)
    ticks = log_ticks(min(ys), max(ys)) if log else even_ticks(min(ys), max(ys))
    # A little room, so that the least and the greatest do not lie on the frame.
    low, high = (min(ys) / 1.05, max(ys) * 1.05) if log else (ticks[0], ticks[-1])
    up = scale(low, high, HEIGHT - BOTTOM, TOP, log)
    parts = [head, grid(ticks, up, even_ticks(0, end, whole=True), across)]
    for curve in curves:
        parts.append(line(curve, across, up))
    return "".join([*parts, legend(curves), "</svg>"])


def within(curve: Curve, last_x: float | None) -> tuple[list, list]:
    pairs = [(x, y if y is not None and math.isfinite(y) else None)
             for x, y in zip(curve.xs, curve.ys) if last_x is None or x <= last_x]
    return thin([x for x, _ in pairs], [y for _, y in pairs])


def scale(low: float, high: float, start: float, stop: float, log: bool = False):
    """-> the function that lays low..high on start..stop."""
    shape = math.log10 if log else float
    bottom, top = shape(low), shape(high)
    if top <= bottom:  # one value only: in the middle
        return lambda value: (start + stop) / 2
    return lambda value: start + (stop - start) * (shape(value) - bottom) / (top - bottom)


def even_ticks(low: float, high: float, whole: bool = False, about: int = 5) -> list[float]:
    """Round numbers from at most low to at least high. whole: steps have no halves."""
    span = (high - low) or abs(high) or 1
    size = 10 ** math.floor(math.log10(span / about))
    size *= next(factor for factor in (1, 2, 5, 10) if span / (size * factor) <= about)
    if whole:
        return list(range(0, int(high) + 1, max(1, round(size))))
    first = math.floor(low / size + 1e-9)
    return [number * size for number in range(first, math.ceil(high / size - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """0.1, 0.2, 0.5, 1 ... between low and high; where that would be many, powers of ten alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else [low, high]


def grid(ticks: list, up, steps: list, across) -> str:
    parts = []
    for tick in ticks:
        y = up(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for step in steps:
        x = across(step)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/><text x="{x:.1f}" '
                     f'y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(step)}</text>')
    return "".join(parts)


def short(number: float) -> str:
    """1500 -> "1.5k", 0.00025 -> "2.5e-4"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    if number and abs(number) < 1e-3:
        digits, power = f"{number:.1e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{number:.4g}"


def line(curve: Curve, across, up) -> str:
    """A polyline; where a number is missing it begins anew."""
    path, pen = [], "M"
    for x, y in zip(curve.xs, curve.ys):
        if y is None:
            pen = "M"
            continue
        path.append(f"{pen}{across(x):.1f} {up(y):.1f}")
        pen = "L"
    looks = f'stroke="{curve.colour}"'
    looks += ' opacity="0.3"' if curve.faint else ' stroke-width="1.8"'
    looks += ' stroke-dasharray="5 4"' if curve.dashed else ""
    drawn = f'<path fill="none" {looks} d="{"".join(path)}"/>'
    if curve.dots:
        drawn += "".join(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5" '
                         f'fill="{curve.colour}"/>'
                         for x, y in zip(curve.xs, curve.ys) if y is not None)
    return drawn


def legend(curves: list[Curve]) -> str:
    """In the upper right corner, where a loss that falls leaves room."""
    named = [curve for curve in curves if curve.name]
    parts = []
    for row, curve in enumerate(named):
        y = TOP + 12 + 16 * row
        dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
        parts.append(f'<path stroke="{curve.colour}" stroke-width="2.5"{dash} '
                     f'd="M{WIDTH - RIGHT - 22} {y - 4}h18"/><text x="{WIDTH - RIGHT - 28}" y="{y}"'
                     f' text-anchor="end" class="legend">{html.escape(curve.name)}</text>')
    return "".join(parts)
