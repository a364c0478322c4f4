"""What a record's rows are compared with, and which comparisons belong into one chart or table."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.naming import case_words, sentence
from benchmarks.summary import middle, quartiles, ratio
from spt_fast.errors import InputError

Row = dict[str, Any]
Case = dict[str, Any]

REQUIRED = {
    "measured": {"case", "peer", "seconds"},
    "missing": {"case", "peer", "reason"},
    "quoted": {"case", "peer", "value_seconds", "source"},
    "extrapolated": {"case", "peer", "value_seconds", "rule", "measured"},
}
# What cases are swept over, the most telling first; other numbers come after them.
SWEPT = ("fraction", "clusters", "num_prompts", "tokens", "features", "layers", "batch_size")
OURS = "spt-fast"  # what the names of our peers begin with
COLOURS = 6  # values of a sweep that one chart can tell apart


@dataclass(frozen=True)
class Comparison:
    """The peers of one case.

    Attributes:
        case: what they all did.
        rows: theirs, in the record's order.
        reference: the first that was measured, which is ours; the others' times are multiples of its time.
    """

    case: Case
    rows: list[Row]
    reference: Row | None


@dataclass(frozen=True)
class Panel:
    """Comparisons that differ in one number at most: a chart, or a few lines of a table.

    Attributes:
        label: what distinguishes it from the other panels of its record.
        key: what differs; ``None`` in a panel of a single comparison.
        comparisons: in the order of that number.
    """

    label: str
    key: str | None
    comparisons: list[Comparison]

    @property
    def peers(self) -> list[str]:
        """All that take part anywhere, in order of appearance."""
        return list(dict.fromkeys(row["peer"] for each in self.comparisons for row in each.rows))


def comparisons(record: dict[str, Any]) -> list[Comparison]:
    """The rows of a record by case, those together that took turns.

    Rows of one case that follow each other did. Rows that come later to a case belong to it as well, unless they bring
    a time of ours along: then these are the peers of another run.

    Raises:
        InputError: there are none, or one of them is no row.
    """
    if not record["rows"]:
        raise InputError(
            f"the record of {record['benchmark']} on {record['machine'].get('device')} has no rows"
        )
    found: list[Comparison] = []
    latest: dict[str, int] = {}
    for row in record["rows"]:
        _check(row, record)
    for case, group in itertools.groupby(
        record["rows"], key=lambda row: json.dumps(row["case"], sort_keys=True)
    ):
        rows = list(group)
        reference = next((row for row in rows if row["kind"] == "measured"), None)
        earlier = latest.get(case)
        if earlier is None or (reference is not None and reference["peer"].startswith(OURS)):
            latest[case] = len(found)
            found.append(Comparison(rows[0]["case"], rows, reference))
        else:
            before = found[earlier]
            found[earlier] = Comparison(before.case, before.rows + rows, before.reference or reference)
    return found


def panels(found: Sequence[Comparison]) -> list[Panel]:
    """Every comparison in a panel that sweeps over something, or else in one of its own.

    A comparison that several sweeps pass through is in each that shows something new.
    """
    shown = [each for each in found if any(row["kind"] != "missing" for row in each.rows)]
    varying = [key for key in _keys(shown) if len({json.dumps(each.case.get(key)) for each in shown}) > 1]
    numbers = [key for key in varying if all(_is_number(each.case.get(key)) for each in shown)]
    covered: set[int] = set()
    chosen: list[tuple[str | None, list[Comparison]]] = []
    for key in sorted(numbers, key=lambda key: SWEPT.index(key) if key in SWEPT else len(SWEPT)):
        for sweep in _sweeps(shown, key):
            if len(sweep) > 1 and not covered.issuperset(map(id, sweep)):
                covered.update(map(id, sweep))
                chosen += [(key, sweep[at : at + COLOURS]) for at in range(0, len(sweep), COLOURS)]
    chosen += [(None, [each]) for each in shown if id(each) not in covered]
    order = {id(each): number for number, each in enumerate(shown)}
    chosen.sort(key=lambda pair: min(order[id(each)] for each in pair[1]))
    return [
        Panel(case_words(sweep[0].case, [each for each in varying if each != key]), key, sweep)
        for key, sweep in chosen
    ]


def common(found: Sequence[Comparison]) -> str:
    """What all comparisons share, in words."""
    shared = [
        key for key in _keys(found) if all(each.case.get(key) == found[0].case.get(key) for each in found)
    ]
    return case_words(found[0].case, shared)


def spread(row: Row, to: Row | None) -> tuple[float, float, float]:
    """First quartile, middle and third quartile of a row's seconds, or of its multiples of ``to``.

    Example:
        >>> ours = {"kind": "measured", "seconds": [1.0, 2.0, 4.0]}
        >>> spread({"kind": "measured", "seconds": [2.0, 6.0, 16.0]}, ours)
        (2.5, 3.0, 3.5)
        >>> spread({"kind": "quoted", "value_seconds": 20.0}, ours)
        (10.0, 10.0, 10.0)
    """
    if row["kind"] != "measured":
        value = middle(row) if to is None else ratio(row, to)
        return value, value, value
    if to is None or row is to:
        unit = 1.0 if to is None else middle(to)
        first, third = quartiles(row["seconds"])
        return first / unit, middle(row) / unit, third / unit
    if len(row["seconds"]) == len(to["seconds"]):
        ratios = [theirs / ours for theirs, ours in zip(row["seconds"], to["seconds"], strict=True)]
        first, third = quartiles(ratios)
        return first, statistics.median(ratios), third
    first, third = quartiles(row["seconds"])
    return first / middle(to), ratio(row, to), third / middle(to)


def ours(found: Sequence[Comparison]) -> Iterator[Row]:
    """The measured rows that are times of ours: those that say so, or else what the others are compared with."""
    named = [
        row
        for each in found
        for row in each.rows
        if row["kind"] == "measured" and row["peer"].startswith(OURS)
    ]
    yield from named or (each.reference for each in found if each.reference is not None)


def notes(found: Iterable[Comparison]) -> list[tuple[str, str]]:
    """Of everything that was not simply measured, who it is and why: each once, with the number of its cases."""
    found = list(found)
    reasons: dict[tuple[str, str], int] = {}
    for each in found:
        for row in each.rows:
            words = _why(row)
            # Where nobody could be measured it is the case that has to be named.
            nobody = all(other["kind"] == "missing" for other in each.rows)
            name = sentence(case_words(each.case, each.case)) if nobody else row["peer"]
            if words:
                reasons[name, words] = reasons.get((name, words), 0) + 1
    return [
        (name, words if count == len(found) else f"{words} ({count} of {len(found)} cases)")
        for (name, words), count in reasons.items()
    ]


def _why(row: Row) -> str:
    if row["kind"] == "missing":
        return f"was not measured: {row['reason']}"
    if row["kind"] == "quoted":
        return f"is quoted from {row['source']}"
    return f"is extrapolated: {row['rule']}" if row["kind"] == "extrapolated" else ""


def _sweeps(found: Sequence[Comparison], key: str) -> list[list[Comparison]]:
    """Those that agree in everything else and in what they are compared with, in the order of ``key``."""
    groups: dict[str, list[Comparison]] = {}
    multiples = all(each.reference for each in found)  # otherwise times are shown, which need no reference
    for each in found:
        rest = {name: value for name, value in each.case.items() if name != key}
        against = each.reference["peer"] if multiples and each.reference else None
        groups.setdefault(json.dumps([rest, against], sort_keys=True), []).append(each)
    return [sorted(group, key=lambda each: each.case[key]) for group in groups.values()]


def _keys(found: Sequence[Comparison]) -> list[str]:
    return list(dict.fromkeys(key for each in found for key in each.case))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(row: Any, record: dict[str, Any]) -> None:
    kind = row.get("kind") if isinstance(row, dict) else None
    if kind not in REQUIRED or not REQUIRED[kind] <= set(row) or row.get("seconds") == []:
        raise InputError(
            f"the record of {record['benchmark']} on {record['machine'].get('device')} has a row "
            f"{json.dumps(row)[:200]}, expected one of the kinds {', '.join(REQUIRED)} with all its entries"
        )
