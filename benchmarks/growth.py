"""How time and memory grow with the tokens, and throughput with the processes: what ``benchmarks.scaling`` is about."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.comparison import Comparison, Row
from benchmarks.naming import case_words, counted
from benchmarks.summary import middle

Point = tuple[float, float]
APART = ("tokens", "processes")  # a line goes through the tokens, and a chart shows all numbers of processes


@dataclass(frozen=True)
class Growth:
    """A peer with so many processes over more and more tokens.

    Attributes:
        peer: its name.
        processes: how many work together.
        times: tokens and median seconds.
        memory: tokens and bytes at the peak, where they were measured.
    """

    peer: str
    processes: int
    times: list[Point]
    memory: list[Point]

    @property
    def label(self) -> str:
        return f"{self.peer}, {counted(self.processes, 'process')}"

    @property
    def throughput(self) -> Point:
        """The most tokens that were measured, and how many of them pass in a second."""
        tokens, seconds = max(self.times)
        return tokens, tokens / seconds


@dataclass(frozen=True)
class Workload:
    """All lines over the same kind of tokens; ``label`` says which."""

    label: str
    lines: list[Growth]


def workloads(found: Sequence[Comparison]) -> list[Workload]:
    """The measured rows as lines, those of comparable work together."""
    kinds: dict[str, tuple[dict[str, Any], dict[tuple[str, int], list[tuple[int, Row]]]]] = {}
    for each in found:
        rest = {key: value for key, value in each.case.items() if key not in APART}
        _, lines = kinds.setdefault(json.dumps(rest, sort_keys=True), (rest, {}))
        for row in each.rows:
            if row["kind"] == "measured":
                name = row["peer"], each.case.get("processes", 1)
                lines.setdefault(name, []).append((each.case["tokens"], row))
    return [
        Workload(case_words(rest, rest), [_line(*name, rows) for name, rows in lines.items()])
        for rest, lines in kinds.values()
        if lines
    ]


def slope(points: Sequence[Point]) -> float | None:
    """The exponent of the power law that fits best: 1 is linear. ``None`` if all lie at one number of tokens.

    Example:
        >>> round(slope([(10, 3.0), (100, 300.0), (1000, 30000.0)]), 3)
        2.0
    """
    logarithms = [(math.log(tokens), math.log(value)) for tokens, value in points if value > 0]
    if len({tokens for tokens, _ in logarithms}) < 2:
        return None
    return statistics.linear_regression(*zip(*logarithms, strict=True)).slope


def by_processes(workload: Workload) -> dict[str, list[Point]]:
    """Of every peer that was run by several numbers of processes: these, and tokens per second.

    Its times are those of the most tokens that all its numbers of processes were given.
    """
    found: dict[str, list[Growth]] = {}
    for line in workload.lines:
        found.setdefault(line.peer, []).append(line)
    curves = {}
    for peer, lines in found.items():
        shared = set.intersection(*({tokens for tokens, _ in line.times} for line in lines))
        if len(lines) > 1 and shared:
            tokens = max(shared)
            curves[peer] = sorted(
                (float(line.processes), tokens / dict(line.times)[tokens]) for line in lines
            )
    return curves


def _line(peer: str, processes: int, rows: list[tuple[int, Row]]) -> Growth:
    rows = sorted(rows, key=lambda pair: pair[0])
    memory = [(float(tokens), float(row["peak_bytes"])) for tokens, row in rows if row.get("peak_bytes")]
    return Growth(peer, processes, [(float(tokens), middle(row)) for tokens, row in rows], memory)
