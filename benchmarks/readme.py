"""The part of the README that is made of results: a selection of every record as tables, each with its command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.comparison import Comparison, Panel, Row, common, comparisons, notes, panels
from benchmarks.growth import Growth, slope, workloads
from benchmarks.markdown import shell, table, wrapped
from benchmarks.naming import (
    description,
    machine_line,
    percent,
    position,
    rate,
    sentence,
    times,
    title,
    value_words,
)
from benchmarks.starts import starts_section
from benchmarks.summary import duration, middle, ratio, share_of_limit
from spt_fast.errors import InputError

Record = dict[str, Any]

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PAGE = "docs/benchmarks/index.html"
# What the README shows of a record: so many sweeps, and so many values of each. The page shows everything.
MOST_PANELS, MOST_COLUMNS = 4, 5
NOTABLE_INERTIA = 1e-3
NO_GPU = (
    "No GPU has been measured yet. The Triton and CUDA kernels are judged in an interpreter and an emulator and "
    "compiled for their architectures; the same commands with `--device cuda` are there to measure them."
)


def measured_section(records: Sequence[Record], starts: dict[str, Record]) -> str:
    """Markdown out of records, GPUs as they come first, and of the comparisons of starts by the name of their data."""
    devices: dict[str, list[Record]] = {}
    for record in records:
        devices.setdefault(str(record["machine"]["device"]), []).append(record)
    parts = [_introduction()] if records else []
    if not any(record["machine"].get("device_type") == "cuda" for record in records):
        parts.append(wrapped(NO_GPU))
    for device, own in devices.items():
        parts.append(f"### {device}\n\n{wrapped(machine_line(*(record['machine'] for record in own)))}.")
        parts += map(_benchmark, sorted(own, key=lambda record: position(record["benchmark"])))
    if starts:
        parts.append(starts_section(starts))
    return "\n\n".join(parts)


def with_measured(text: str, section: str) -> str:
    """``text`` with ``section`` between its two markers.

    Example:
        >>> with_measured(f"a\\n{BEGIN}\\nold\\n{END}\\nz", "new").splitlines()
        ['a', '<!-- measured: begin -->', '', 'new', '', '<!-- measured: end -->', 'z']
    """
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end:
        raise InputError(f"the README has no lines {BEGIN} and {END} to write the results between")
    return f"{before}{BEGIN}\n\n{section}\n\n{END}\n{after}"


def _introduction() -> str:
    return wrapped(
        f"[One page]({PAGE}) draws all of it. In a table the first time is ours, in brackets how much of it the "
        "hardware's own limit explains; the others are multiples of it. Times are medians, and those that are compared "
        "took turns in one run."
    )


def _benchmark(record: Record) -> str:
    found = comparisons(record)
    shared = common(found)
    unfinished = "" if record["complete"] else "Incomplete: the run ended before all cases were measured."
    words = [description(record["benchmark"]), f"All with {shared}." if shared else "", unfinished]
    head = wrapped(" ".join([f"**{title(record['benchmark'])}.**", *filter(None, words)]))
    body = _tables(record, found)
    return "\n\n".join([head, *body, shell(record["command"])])


def _tables(record: Record, found: Sequence[Comparison]) -> list[str]:
    if record["benchmark"] == "scaling":
        return [_scaling_table(found), *_remarks(found)]
    if any(key.endswith("accuracy") for each in found for row in each.rows for key in row):
        return [*map(_accuracy_table, found), *_remarks(found)]
    every = panels(found)
    chosen = _selected(every)
    shown = list({id(each): each for panel in chosen for each in panel.comparisons}.values())
    by_key: dict[str | None, list[Panel]] = {}
    for panel in chosen:
        by_key.setdefault(panel.key, []).append(panel)
    left_out = (
        [] if len(chosen) == len(every) else [f"A selection; [the page]({PAGE}) has {len(found)} cases."]
    )
    tables = [_panel_table(key, own) for key, own in by_key.items()]
    return [*tables, *_remarks([*shown, *(each for each in found if each.reference is None)]), *left_out]


def _selected(every: Sequence[Panel]) -> list[Panel]:
    """Of the sweeps of one kind (model, pass, ...) the one with the most cases, and of these that of the largest."""
    kinds: dict[tuple[str, ...], list[Panel]] = {}
    for panel in every:
        first = panel.comparisons[0]
        against = "" if first.reference is None else first.reference["peer"]
        words = [value for value in first.case.values() if isinstance(value, str)]
        kinds.setdefault((*words, against), []).append(panel)
    return [max(own, key=_weight) for own in kinds.values()][:MOST_PANELS]


def _weight(panel: Panel) -> tuple[int, list[float]]:
    case = panel.comparisons[0].case
    fixed = [float(value) for key, value in case.items() if key != panel.key and not isinstance(value, str)]
    return len(panel.comparisons), fixed


def _panel_table(key: str | None, own: Sequence[Panel]) -> str:
    """A line per sweep and peer, a column per value of what is swept over."""
    values = sorted({each.case[key] for panel in own for each in panel.comparisons}) if key else []
    values = spread_out(values, MOST_COLUMNS)
    labelled = any(panel.label for panel in own)
    rows = []
    for panel in own:
        at = {each.case.get(str(key)): each for each in panel.comparisons}
        columns = [at.get(value) for value in values] if key else panel.comparisons
        label = sentence(panel.label)
        for peer in panel.peers:
            cells = ["" if each is None else _cell(each, peer) for each in columns]
            if any(cells):
                rows.append([*([label] if labelled else []), peer, *cells])
                label = ""  # said once
    heads = [value_words(str(key), value) for value in values] if key else ["time"]
    return table([*([""] if labelled else []), "", *heads], rows)


def _cell(comparison: Comparison, peer: str) -> str:
    row = next((row for row in comparison.rows if row["peer"] == peer), None)
    reference = comparison.reference
    if row is None:
        return ""
    if row["kind"] == "missing":
        return "–"
    if row["kind"] != "measured":
        # Who was quoted worked elsewhere, on something else: no multiple of ours.
        compared = reference is not None and row["kind"] == "extrapolated"
        multiple = f", {times(ratio(row, reference))}" if compared and reference else ""
        return f"{duration(middle(row))}{multiple} ({row['kind']})"
    if row is reference or reference is None:
        share = share_of_limit(row)
        return duration(middle(row)) + ("" if share is None else f" ({100 * share:.0f} %)")
    return times(ratio(row, reference)) + _inertia(row, reference)


def _inertia(row: Row, reference: Row) -> str:
    """How much worse its clusters are, where that is to be seen."""
    for key in ("inertia", "inertia_per_token"):
        if row.get(key) and reference.get(key):
            more = row[key] / reference[key] - 1
            return f", inertia {100 * more:+.1f} %" if abs(more) >= NOTABLE_INERTIA else ""
    return ""


def _scaling_table(found: Sequence[Comparison]) -> str:
    every = workloads(found)
    labelled = len(every) > 1
    rows = [
        [*([sentence(each.label)] if labelled else []), line.label, *_growth_cells(line)]
        for each in every
        for line in each.lines
    ]
    head = ["most tokens", "tokens/s", "slope of time", "slope of peak memory"]
    return table([*([""] if labelled else []), "", *head], rows)


def _growth_cells(line: Growth) -> list[str]:
    tokens, per_second = line.throughput
    slopes = [slope(line.times), slope(line.memory)]
    return [
        f"{tokens:,.0f}",
        rate(per_second, ""),
        *("" if each is None else f"{round(each, 2) + 0.0:.2f}" for each in slopes),  # no minus before a zero
    ]


def _accuracy_table(comparison: Comparison) -> str:
    """Times beside what they are worth; the first point of a curve is that before training."""
    rows = [row for row in comparison.rows if row["kind"] != "missing"]
    columns: dict[str, Callable[[Row], str]] = {"time": lambda row: _cell(comparison, row["peer"])}
    if any("curves" in row for row in rows):
        columns["of it for prototypes"] = lambda row: _before_training(row, 0, duration)
        columns["accuracy before training"] = lambda row: _before_training(row, 1, percent)
    for key in dict.fromkeys(key for row in rows for key in row if "accuracy" in key):
        columns[key.replace("_", " ")] = partial(_accuracy, key)
    return table(["", *columns], [[row["peer"], *(cell(row) for cell in columns.values())] for row in rows])


def _accuracy(key: str, row: Row) -> str:
    return percent(row[key]) if row.get(key) else ""


def _before_training(row: Row, at: int, words: Callable[[Any], str]) -> str:
    firsts = [curve[0][at] for curve in row.get("curves", [])]
    return words(sum(firsts) / len(firsts)) if firsts else ""


def _remarks(found: Sequence[Comparison]) -> list[str]:
    peers: dict[str, list[str]] = {}
    for peer, words in notes(list({id(each): each for each in found}.values())):
        # Who and what are told apart by a colon here, not by a verb that would have to fit one or many.
        peers.setdefault(words.removeprefix("is ").removeprefix("was "), []).append(peer)
    lines = [f"{', '.join(names)}: {words}." for words, names in peers.items()]
    return [wrapped(" ".join(lines))] if lines else []


def spread_out(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, the first and the last among them.

    Example:
        >>> spread_out([1, 2, 3, 4, 5, 6, 7], 4)
        [1, 3, 5, 7]
    """
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]
