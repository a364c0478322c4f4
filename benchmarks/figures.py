"""From records to the charts of the page: what is drawn, what stands above and beside it, and its words."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from benchmarks import plots
from benchmarks.comparison import Comparison, Panel, Row, ours, panels, spread
from benchmarks.growth import Workload, by_processes, slope, workloads
from benchmarks.naming import case_words, memory, percent, rate, sentence, times, title, value_words
from benchmarks.plots import Curve, Mark, Roof, Strip
from benchmarks.summary import duration, middle
from spt_fast.drawing import chart as themed_chart
from spt_fast.drawing import escape, swatch

Record = dict[str, Any]

HOLLOW = "fill: none; stroke: currentColor; stroke-width: 1.6"
COURSE_HEIGHT, GROWTH_HEIGHT, ROOFLINE_HEIGHT = 3.3, 2.9, 3.6  # inches


def benchmark_figures(anchor: str, record: Record, found: Sequence[Comparison]) -> str:
    """All charts of a record; nothing if nothing can be drawn."""
    if record["benchmark"] == "scaling":
        figures = [figure for each in workloads(found) for figure in _scaling_figures(each)]
    elif any("curves" in row for each in found for row in each.rows):
        figures = [_courses_figure(each) for each in found if any("curves" in row for row in each.rows)]
    else:
        figures = _strips_figures(found)
    named = [figure(f"{anchor}-{number}") for number, figure in enumerate(figures)]
    return _grid(named)


def roofline_figure(anchor: str, found: Sequence[tuple[Record, Sequence[Comparison]]]) -> str:
    """Ours among what the device can do; nothing without ceilings or rows that have a limit."""
    roof = _roof([record["ceilings"] for record, _ in found if record.get("ceilings")])
    series = {title(record["benchmark"]): points for record, own in found if (points := list(_work(own)))}
    if roof is None or not series:
        return ""
    peaks = ", ".join(f"{name} {rate(peak, 'FLOP/s')}" for name, peak in roof.matmul.items())
    words = [
        f"Operations per second against operations per byte; memory {rate(roof.bandwidth, 'B/s')}, {peaks}."
    ]
    svg = chart(
        f"{anchor}-roofline",
        words,
        ROOFLINE_HEIGHT,
        lambda axes: plots.draw_roofline(axes, roof, list(series.values()), _prefixed),
    )
    return f"""<div class="charts">
<figure><figcaption>Roofline: operations per second</figcaption>
{svg}</figure>
<div class="beside">
<p>Each dot is a time of ours that is known in bytes and operations. The sloped line is what memory allows, \
{escape(rate(roof.bandwidth, "B/s"))} copied or read; the level ones are large matrix products. Both are measured in \
the same runs, with the commands below; of several runs the best.</p>
{_legend([(_dot(index), name) for index, name in enumerate(series)])}
</div>
</div>"""


def mark_key() -> str:
    """What the marks mean, for the head of the page."""
    shapes = [(_dot(0), "measured"), (_diamond(), "quoted, not measured here"), (_triangle(), "extrapolated")]
    return (
        f'<ul role="list" class="key">{"".join(f"<li>{shape}{words}</li>" for shape, words in shapes)}</ul>'
    )


# Figures are made late, because an id has to be known to draw one.
Figure = Callable[[str], str]
chart = partial(themed_chart, width=plots.WIDTH)


def _strips_figures(found: Sequence[Comparison]) -> list[Figure]:
    """Multiples of our time; seconds where something has nothing of ours beside it, or was quoted from elsewhere."""
    shown = panels(found)
    absolute = any(
        each.reference is None or any(row["kind"] == "quoted" for row in each.rows)
        for panel in shown
        for each in panel.comparisons
    )
    strips = [[_strip(peer, panel, absolute) for peer in panel.peers] for panel in shown]
    # The charts that compare with the same peer have the same axis.
    against = ["" if absolute else _against(panel) for panel in shown]
    edges: dict[str, list[float]] = {}
    for name, group in zip(against, strips, strict=True):
        edges.setdefault(name, []).extend(_edges(group))
    reach = {name: (min(values), max(values)) for name, values in edges.items()}
    return [
        _strips_figure(panel, group, name, reach[name])
        for panel, group, name in zip(shown, strips, against, strict=True)
    ]


def _strips_figure(panel: Panel, strips: Sequence[Strip], against: str, reach: plots.Point) -> Figure:
    key = panel.key
    legend = [] if key is None else [value_words(key, each.case[key]) for each in panel.comparisons]
    time = f"time against {against}" if against else "time"
    caption = sentence(f"{panel.label}: {time}" if panel.label else time)
    words = _short(times if against else duration)

    def figure(name: str) -> str:
        svg = chart(
            name,
            [f"{strip.name}: {strip.words}." for strip in strips],
            plots.strips_height(strips),
            lambda axes: plots.draw_strips(axes, strips, reach, words, mark_one=bool(against)),
        )
        return _figure(caption, svg, [(_dot(index), each) for index, each in enumerate(legend)])

    return figure


def _against(panel: Panel) -> str:
    """The peer that a panel's times are multiples of: the same in all its comparisons."""
    reference = panel.comparisons[0].reference
    return "" if reference is None else str(reference["peer"])


def _edges(strips: Sequence[Strip]) -> Iterable[float]:
    return (edge for strip in strips for mark in strip.marks for edge in mark.spread)


def _strip(peer: str, panel: Panel, absolute: bool) -> Strip:
    marks, kinds = [], set()
    for index, each in enumerate(panel.comparisons):
        for row in each.rows:
            if row["peer"] == peer and row["kind"] != "missing":
                marks.append(Mark(index, spread(row, None if absolute else each.reference), row["kind"]))
                kinds.add(row["kind"])
    strong = any(each.reference is not None and each.reference["peer"] == peer for each in panel.comparisons)
    if not marks:
        return Strip(peer, "not measured", [])
    if strong and not absolute:
        # A multiple of itself would say nothing.
        own = [middle(each.reference) for each in panel.comparisons if each.reference is not None]
        return Strip(peer, _range(own, duration), marks, strong)
    said = _range([mark.spread[1] for mark in marks], duration if absolute else times)
    others = sorted(kinds - {"measured"})
    return Strip(peer, f"{' and '.join(others)} {said}" if "measured" not in kinds else said, marks, strong)


def _courses_figure(comparison: Comparison) -> Figure:
    rows = [row for row in comparison.rows if row.get("curves")]
    curves = [_course(row) for row in rows]
    label = case_words(comparison.case, comparison.case)
    legend = [(swatch(index), row["peer"]) for index, row in enumerate(rows)]
    words = [
        f"{row['peer']}: {percent(curve.points[-1][1])} after {duration(curve.points[-1][0])}."
        for row, curve in zip(rows, curves, strict=True)
    ]

    def figure(name: str) -> str:
        svg = chart(
            name, words, COURSE_HEIGHT, lambda axes: plots.draw_courses(axes, curves, _short(duration))
        )
        return _figure(f"{sentence(label)}: accuracy against seconds", svg, legend)

    return figure


def _course(row: Row) -> Curve:
    """The mean of all seeds, point by point: they are measured after the same epochs."""
    points = [
        (statistics.mean(x for x, _ in each), statistics.mean(y for _, y in each))
        for each in zip(*row["curves"], strict=False)
    ]
    several = len(row["curves"]) > 1
    return Curve(points, [[(x, y) for x, y in curve] for curve in row["curves"]] if several else [])


def _scaling_figures(workload: Workload) -> list[Figure]:
    label = sentence(workload.label)
    figures = [
        _growth_figure(f"{label}: {what} against tokens", lines, words)
        for what, attribute, words in (
            ("time", "times", duration),
            ("peak memory", "memory", memory),
        )
        # A point alone does not grow.
        if (
            lines := {
                line.label: points for line in workload.lines if len(points := getattr(line, attribute)) > 1
            }
        )
    ]
    curves = by_processes(workload)
    if curves:
        figures.append(lambda name: _throughput_figure(name, f"{label}: tokens per second", curves))
    return figures


def _growth_figure(label: str, lines: dict[str, list[plots.Point]], words: Callable[[float], str]) -> Figure:
    said = [f"{name}{_slope_words(points)}" for name, points in lines.items()]

    def figure(name: str) -> str:
        svg = chart(
            name,
            [f"{each}." for each in said],
            GROWTH_HEIGHT,
            lambda axes: plots.draw_growth(axes, list(lines.values()), _short(words), _prefixed),
        )
        return _figure(label, svg, [(swatch(index), each) for index, each in enumerate(said)])

    return figure


def _throughput_figure(name: str, label: str, curves: dict[str, list[plots.Point]]) -> str:
    words = [
        f"{peer}: {rate(points[-1][1], 'tokens/s')} with {points[-1][0]:g}."
        for peer, points in curves.items()
    ]
    svg = chart(
        name,
        words,
        GROWTH_HEIGHT,
        lambda axes: plots.draw_throughput(axes, list(curves.values()), _prefixed),
    )
    return _figure(label, svg, [(swatch(index), peer) for index, peer in enumerate(curves)])


def _slope_words(points: Sequence[plots.Point]) -> str:
    exponent = slope(points)
    return "" if exponent is None else f": slope {exponent:.2f}"


def _work(found: Sequence[Comparison]) -> Iterable[plots.Point]:
    """Operations per byte and per second of our rows."""
    for row in ours(found):
        limit = row.get("limit")
        if limit and limit["operations"] > 0 and limit["moved_bytes"] > 0:
            yield limit["operations"] / limit["moved_bytes"], limit["operations"] / middle(row)


def _roof(ceilings: Sequence[dict[str, Any]]) -> Roof | None:
    """The best of what was measured in all runs."""
    if not ceilings:
        return None
    bandwidths = [max(each["copy_bytes_per_second"], each["read_bytes_per_second"]) for each in ceilings]
    peaks: dict[str, float] = {}
    for each in ceilings:
        for name, peak in each["matmul_operations_per_second"].items():
            peaks[name] = max(peak, peaks.get(name, 0.0))
    return Roof(max(bandwidths), peaks)


def _range(values: Sequence[float], words: Callable[[float], str]) -> str:
    low, high = words(min(values)), words(max(values))
    return low if low == high else f"{low} to {high}"


def _short(words: Callable[[float], str]) -> Callable[[float], str]:
    """For axes, whose numbers are round: without zeros after the point."""

    def short(value: float) -> str:
        number, *unit = words(value).replace("x", " x").split()
        if "." in number:
            number = number.rstrip("0").rstrip(".")
        return f"{number}x" if unit == ["x"] else " ".join([number, *unit])

    return short


def _prefixed(value: float) -> str:
    """``1e7`` -> ``"10M"``."""
    return _short(lambda each: rate(each, ""))(value).replace(" ", "") if value else "0"


def _figure(caption: str, svg: str, legend: Sequence[tuple[str, str]]) -> str:
    caption = caption.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    return f"<figure><figcaption>{escape(caption)}</figcaption>\n{_legend(legend)}{svg}</figure>"


def _grid(figures: Sequence[str]) -> str:
    newline = "\n"
    return f'<div class="charts">\n{newline.join(figures)}\n</div>' if figures else ""


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<li>{picture}{escape(words)}</li>" for picture, words in entries)
    return f'<ul role="list" class="legend">{items}</ul>\n' if items else ""


def _dot(index: int) -> str:
    return _shape(f'<circle cx="5" cy="5" r="4.5" style="fill: var(--series-{index})"/>')


def _diamond() -> str:
    return _shape(f'<path d="M5 .8L9.2 5 5 9.2.8 5z" style="{HOLLOW}"/>')


def _triangle() -> str:
    return _shape(f'<path d="M5 1L9.3 9H.7z" style="{HOLLOW}"/>')


def _shape(body: str) -> str:
    return f'<svg class="dot" viewBox="0 0 10 10" aria-hidden="true">{body}</svg>'
