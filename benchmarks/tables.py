"""The tables of the benchmarks' page: every row of a record, with all that was measured of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.comparison import Comparison, Row, common
from benchmarks.naming import (
    case_words,
    counted,
    memory,
    percent,
    rate,
    sentence,
    three_digits,
    times,
)
from benchmarks.summary import duration, middle, quartiles, ratio, share_of_limit
from spt_fast.drawing import escape

Cell = Callable[[Row, Comparison], str]

SHOWN_OPEN = 14  # rows; longer tables are folded
# How what was measured beside the time is called and shown; the rest is shown as it is called.
_FACTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "peak_bytes": ("peak memory", memory),
    "joules_per_image": ("J/image", three_digits),
    "inertia": ("inertia", lambda value: f"{value:.5g}"),
    "test_accuracy": ("test accuracy", percent),
    "accuracy": ("accuracy", percent),
    "accuracy_on_float32": ("accuracy on float32", percent),
}
_OWN = {"kind", "case", "peer", "seconds", "limit", "reason", "value_seconds", "source", "rule", "measured"}


def table(found: Sequence[Comparison], name: str) -> str:
    """A table that folds where it is long and scrolls by itself where it is wide."""
    columns = _columns(found)
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in columns)
    body = "\n".join(_group(each, columns, found) for each in found)
    rows = sum(len(each.rows) for each in found)
    fold = " open" if rows <= SHOWN_OPEN else ""
    return f"""<details{fold}><summary>All {counted(rows, "row")}</summary>
<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}: table">
<table>
<caption>{escape(name)}</caption>
<thead><tr><th scope="col">{escape(sentence(common(found)))}</th>{head}</tr></thead>
{body}
</table>
</div></details>"""


def _columns(found: Sequence[Comparison]) -> dict[str, Cell]:
    """Headings and what stands under them, without the columns that would be empty."""
    columns: dict[str, Cell] = {
        "median": lambda row, _: duration(middle(row)),
        "quartiles": _quartiles,
        "relative": _multiple,
        "of its limit": _share,
        "images/s": _images_per_second,
        "tokens/s": _tokens_per_second,
        "rate": _operations_per_second,
    }
    extras = dict.fromkeys(key for each in found for row in each.rows for key in row if key not in _OWN)
    for key in extras:
        heading = _FACTS[key][0] if key in _FACTS else key.replace("_", " ")
        columns[heading] = partial(_fact, key)
    rows = [(row, each) for each in found for row in each.rows if row["kind"] != "missing"]
    return {heading: cell for heading, cell in columns.items() if any(cell(row, each) for row, each in rows)}


def _fact(key: str, row: Row, _: Comparison) -> str:
    """What was measured of a row beside its time, in words; nothing if it was not, or has no short form."""
    value = row.get(key)
    if value is None or isinstance(value, (dict, bool)):
        return ""
    if isinstance(value, list) and not all(isinstance(each, (int, float)) for each in value):
        return ""
    if key in _FACTS:
        return _FACTS[key][1](value)
    if isinstance(value, list):
        return f"{statistics.mean(value):.4g}" if value else ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _group(comparison: Comparison, columns: dict[str, Cell], found: Sequence[Comparison]) -> str:
    """A line that says which case it is, if there are several, and the rows of its peers."""
    keys = [
        key for key in comparison.case if any(each.case.get(key) != found[0].case.get(key) for each in found)
    ]
    name = escape(sentence(case_words(comparison.case, keys)))
    width = len(columns) + 1
    line = (
        f'<tr class="case"><th scope="rowgroup" colspan="{width}"><span>{name}</span></th></tr>\n'
        if name
        else ""
    )
    rows = "\n".join(_row(row, comparison, columns) for row in comparison.rows)
    return f"<tbody>\n{line}{rows}\n</tbody>"


def _row(row: Row, comparison: Comparison, columns: dict[str, Cell]) -> str:
    ours = ' class="ours"' if row is comparison.reference else ""
    name = f'<th scope="row"{ours}>{escape(row["peer"])}</th>'
    if row["kind"] == "missing":
        return f'<tr class="missing">{name}<td colspan="{max(1, len(columns))}">not measured</td></tr>'
    cells = "".join(f"<td>{escape(cell(row, comparison))}</td>" for cell in columns.values())
    return f'<tr class="{row["kind"]}">{name}{cells}</tr>'


def _quartiles(row: Row, _: Comparison) -> str:
    if row["kind"] != "measured":
        return str(row["kind"])
    if len(row["seconds"]) == 1:
        return "one sample"
    first, third = map(duration, quartiles(row["seconds"]))
    if first.split()[1] == third.split()[1]:
        first = first.split()[0]
    return f"{first} to {third}"


def _multiple(row: Row, comparison: Comparison) -> str:
    # Who was quoted worked elsewhere, on something else: no multiple of ours.
    compared = comparison.reference is not None and row["kind"] != "quoted"
    return times(ratio(row, comparison.reference)) if compared and comparison.reference else ""


def _share(row: Row, _: Comparison) -> str:
    share = share_of_limit(row)
    return "" if share is None else f"{100 * share:.0f} %"


def _images_per_second(row: Row, _: Comparison) -> str:
    images = row["case"].get("batch_size")
    # A batch is the whole work of such a row, unless it says otherwise.
    return rate(images / middle(row), "").strip() if images and "pass" not in row["case"] else ""


def _tokens_per_second(row: Row, _: Comparison) -> str:
    case = row["case"]
    once = "processes" in case or case.get("measure") == "iteration"
    return rate(case["tokens"] * case.get("layers", 1) / middle(row), "").strip() if once else ""


def _operations_per_second(row: Row, _: Comparison) -> str:
    limit = row.get("limit")
    return rate(limit["operations"] / middle(row), "FLOP/s") if limit and limit["operations"] else ""
