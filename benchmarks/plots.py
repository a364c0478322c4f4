"""The charts of the benchmarks' page. Each function draws numbers into axes and knows nothing of records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, floor

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from benchmarks.naming import rate
from spt_fast.drawing import INK, PAPER, RULE, STRONG, colour, dashes

Point = tuple[float, float]
Words = Callable[[float], str]

WIDTH = 4.4  # inches of a chart: at 390 pixels its text is 12 pixels high
LETTERS = 46  # in a line of it
# Inches of a strip: a line of words, a mark, and the room under the marks.
LINE, MARK, GAP = 0.22, 0.125, 0.08
FRAME = 0.42  # inches below the strips: the numbers of the axis
HOLLOW = {"quoted": "D", "extrapolated": "^"}  # what was not measured is drawn hollow


@dataclass(frozen=True)
class Mark:
    """A time: its quartiles and its middle, which colour it has, and what kind of knowledge it is."""

    series: int
    spread: tuple[float, float, float]
    kind: str


@dataclass(frozen=True)
class Strip:
    """The times of one peer, with its name and the times in words above them."""

    name: str
    words: str
    marks: list[Mark]
    strong: bool = False


@dataclass(frozen=True)
class Roof:
    """What a device can do at most: bytes per second, and operations per second by dtype."""

    bandwidth: float
    matmul: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """A line of a chart; ``faint`` ones go with it, as single runs do with their mean."""

    points: list[Point]
    faint: list[list[Point]] = field(default_factory=list)


def strips_height(strips: Sequence[Strip]) -> float:
    """The inches that :func:`draw_strips` needs."""
    return FRAME + sum(_strip_height(strip) for strip in strips)


def draw_strips(axes: Axes, strips: Sequence[Strip], reach: Point, words: Words, mark_one: bool) -> None:
    """One strip below the other; every name stands above its marks, so that long names cost no width.

    ``reach`` is from where to where the marks of all charts go that should be compared by eye.
    """
    axes.set_xscale("log")
    margin = (reach[1] / reach[0]) ** 0.04 * 1.02
    low, high = reach[0] / margin, reach[1] * margin
    axes.set_xlim(low, high)
    _label(axes.xaxis, low, high, words)
    across = axes.get_yaxis_transform()
    top = 0.0
    for strip in strips:
        bottom = top + _strip_height(strip)
        name = strip.name if len(strip.name) <= LETTERS else f"{strip.name[: LETTERS - 1]}…"
        weight = "bold" if strip.strong else "normal"
        marks_from = top + LINE * _lines(strip)
        axes.text(0, top + LINE / 2, name, transform=across, va="center", weight=weight, color=STRONG)
        axes.text(1, marks_from - LINE / 2, strip.words, transform=across, va="center", ha="right")
        # Lines end below the names, through which they would go.
        if strip.marks:
            ends = (marks_from, bottom - GAP)
            axes.vlines(round_numbers(low, high), *ends, color=RULE, linewidth=0.8, zorder=0)
            if mark_one:
                axes.vlines(1, *ends, color=INK, linewidth=1.0, zorder=1)
        for number, mark in enumerate(strip.marks):
            _draw_mark(axes, mark, marks_from + MARK * (number + 0.5))
        top = bottom
        axes.axhline(top - GAP / 2, color=RULE, linewidth=0.8)
    axes.set_ylim(top, 0)
    axes.yaxis.set_major_locator(NullLocator())
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


def draw_roofline(axes: Axes, roof: Roof, series: Sequence[Sequence[Point]], words: Words) -> None:
    """Operations per second against operations per byte, below what memory and products allow."""
    points = [point for group in series for point in group]
    ridges = [peak / roof.bandwidth for peak in roof.matmul.values()]
    left = min([*(x for x, _ in points), min(ridges)]) / 3
    right = max([*(x for x, _ in points), max(ridges)])
    right *= (right / left) ** 0.85  # the names of the roofs stand where no point is
    best = max(roof.matmul.values())
    bottom = min([*(y for _, y in points), roof.bandwidth * left]) / 2
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name, peak in roof.matmul.items():
        above = peak == best  # and below the others, so that close roofs leave room for both names
        axes.plot([peak / roof.bandwidth, right], [peak, peak], color=INK, linewidth=1.4)
        axes.annotate(
            f"{name} {rate(peak, 'FLOP/s')}",
            (right, peak),
            xytext=(0, 3 if above else -3),
            textcoords="offset points",
            ha="right",
            va="bottom" if above else "top",
        )
    axes.plot([left, best / roof.bandwidth], [left * roof.bandwidth, best], color=INK, linewidth=1.4)
    for index, group in enumerate(series):
        axes.scatter(
            [x for x, _ in group],
            [y for _, y in group],
            s=30,
            color=colour(index),
            edgecolors=PAPER,
            linewidth=0.6,
            zorder=3,
        )
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, best * (best / bottom) ** 0.12)
    _label(axes.xaxis, left, right, lambda value: f"{value:,g}")
    _label(axes.yaxis, *axes.get_ylim(), words)
    axes.set_xlabel("operations per byte")
    axes.set_axisbelow(True)


def draw_growth(axes: Axes, curves: Sequence[Sequence[Point]], words: Words, x_words: Words) -> None:
    """Lines through measured points, both axes logarithmic."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for index, points in enumerate(curves):
        _draw_line(axes, points, index, marker="o")
    for axis, values, say in (
        (axes.xaxis, [x for points in curves for x, _ in points], x_words),
        (axes.yaxis, [y for points in curves for _, y in points], words),
    ):
        low, high = min(values) / 1.25, max(values) * 1.25
        axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})
        _label(axis, low, high, say)
    axes.set_axisbelow(True)


def draw_throughput(axes: Axes, curves: Sequence[Sequence[Point]], words: Words) -> None:
    """Rates against the number of processes; the dotted line is as many times the rate of the fewest."""
    for index, points in enumerate(curves):
        processes, first = points[0]
        ends = [processes, points[-1][0]]
        axes.plot(ends, [first * each / processes for each in ends], ":", color=INK, linewidth=1.2, zorder=1)
        _draw_line(axes, points, index, marker="o")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(FixedLocator(sorted({x for points in curves for x, _ in points})))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("processes")
    axes.set_axisbelow(True)


def draw_courses(axes: Axes, curves: Sequence[Curve], words: Words) -> None:
    """Accuracies against seconds: means in full, the runs behind them faint."""
    for index, curve in enumerate(curves):
        for points in curve.faint:
            axes.plot(*zip(*points, strict=True), color=colour(index), linewidth=0.9, alpha=0.35)
        _draw_line(axes, curve.points, index)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words(value) if value else "0"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)


def _strip_height(strip: Strip) -> float:
    return LINE * _lines(strip) + MARK * len(strip.marks) + GAP


def _lines(strip: Strip) -> int:
    """Name and times stand in one line if they fit."""
    return 1 if len(strip.name) + len(strip.words) < LETTERS else 2


def _draw_mark(axes: Axes, mark: Mark, y: float) -> None:
    first, middle, third = mark.spread
    shade = colour(mark.series)
    axes.plot([first, third], [y, y], color=shade, linewidth=2.2, solid_capstyle="butt")
    hollow = mark.kind in HOLLOW
    axes.plot(
        [middle],
        [y],
        HOLLOW.get(mark.kind, "o"),
        color=shade,
        markersize=6 if hollow else 6.5,
        markerfacecolor=PAPER if hollow else shade,
        markeredgewidth=1.5 if hollow else 0,
        zorder=3,
    )


def _draw_line(axes: Axes, points: Sequence[Point], index: int, marker: str = "") -> None:
    """A line with a dot at its end, which also keeps a line of a single point visible."""
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=colour(index), dashes=dashes(index), dash_capstyle="butt")
    ends = slice(None) if marker else slice(-1, None)
    axes.scatter(xs[ends], ys[ends], s=24, color=colour(index), zorder=3, clip_on=False)


def _label(axis: Axis, low: float, high: float, words: Words) -> None:
    """Round numbers on a logarithmic axis, as many as can be read."""
    axis.set_major_locator(FixedLocator(round_numbers(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))


def round_numbers(low: float, high: float, most: int = 6) -> list[float]:
    """At most so many round numbers between two, none too near the next: the finest choice that there is.

    Example:
        >>> [float(f"{each:g}") for each in round_numbers(0.93, 1.08)]
        [0.95, 1.0, 1.05]
        >>> [float(f"{each:g}") for each in round_numbers(0.8, 23)]
        [1.0, 2.0, 5.0, 10.0, 20.0]
        >>> [float(f"{each:g}") for each in round_numbers(0.9, 123456)]
        [1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0]
    """
    gap = (high / low) ** (1 / 13)
    found: list[float] = []
    for found in _choices(low, high, most):
        if len(found) <= most and all(after / before > gap for before, after in pairwise(found)):
            return found
    return found[:: -(-len(found) // most)]


def _choices(low: float, high: float, most: int) -> Iterator[list[float]]:
    """Multiples of one step where a logarithmic axis is nearly even, and the usual digits of every power of ten."""
    powers = [10.0**power for power in range(-18, 19)]
    if high < 4 * low:
        for step in (digit * power for power in powers for digit in (1, 2, 5)):
            if high - low < most * step:
                yield [step * number for number in range(ceil(low / step), floor(high / step) + 1)]
    for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        yield [digit * power for power in powers for digit in digits if low <= digit * power <= high]
