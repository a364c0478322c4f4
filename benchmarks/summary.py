"""What is derived from a record's samples, in one place for tables, README and pages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.naming import three_digits

Row = dict[str, Any]


def middle(row: Row) -> float:
    """The median of a row's samples in seconds; of a quoted or extrapolated row, its value."""
    return statistics.median(row["seconds"]) if row["kind"] == "measured" else float(row["value_seconds"])


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """The first and third quartile.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
        (2.0, 4.0)
    """
    if len(samples) == 1:
        return samples[0], samples[0]
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, third


def ratio(row: Row, to: Row) -> float:
    """How many times as long ``row`` takes as ``to``: the median of the ratios within a round where both took turns."""
    if row["kind"] == to["kind"] == "measured" and len(row["seconds"]) == len(to["seconds"]):
        return statistics.median(a / b for a, b in zip(row["seconds"], to["seconds"], strict=True))
    return middle(row) / middle(to)


def share_of_limit(row: Row) -> float | None:
    """How much of the time the hardware's limit explains: 1 is as fast as it could be."""
    limit = row.get("limit")
    return None if limit is None else float(limit["seconds"]) / middle(row)


def duration(seconds: float) -> str:
    """A time in the unit it reads best in.

    Example:
        >>> [duration(each) for each in (2.3e-5, 0.0467, 9.87, 754, 8640, 2358720)]
        ['23.0 us', '46.7 ms', '9.87 s', '12.6 min', '2.40 h', '27.3 d']
    """
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        # Minutes begin at two, hours and days at one: 90 s reads better than 1.5 min.
        if seconds >= size * (2 if unit == "min" else 1):
            return f"{three_digits(seconds / size)} {unit}"
    return f"{three_digits(seconds * 1e6)} us"
