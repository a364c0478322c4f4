"""What became slower: a run of the developer suite against the baseline of this machine.

    python -m pytest benchmarks/test_*.py --benchmark-json=.benchmarks/current.json
    python -m benchmarks.regressions .benchmarks/current.json              # the first run becomes the baseline
    python -m benchmarks.regressions .benchmarks/current.json --replace    # so does this one

A baseline is ``.benchmarks/<device>.json``. A test's change is the ratio of its medians, divided by the drift: the
median ratio of the reference workloads, which are not ours and take longer only if the machine is slower now. A test is
slower if its change exceeds 1 + n, and faster if the inverse does. n is the noise, the sum of both runs' relative
interquartile half-ranges, (q3 - q1) / 2 / median, but at least 5 %.

To be slower is no error: the exit code is 0 unless there was nothing to compare.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from benchmarks.command import console, mistakes_in_one_sentence
from benchmarks.record import ROOT, slug
from benchmarks.summary import duration
from spt_fast.errors import InputError
from spt_fast.files import write_text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

BASELINES = ROOT / ".benchmarks"
SMALLEST = 0.05
# What makes two machines the same one.
MACHINE = ("device", "cpu", "cores", "threads")


@dataclass(frozen=True)
class Timing:
    """A test's samples in seconds, in short."""

    median: float
    first_quartile: float
    third_quartile: float
    reference: bool

    @property
    def noise(self) -> float:
        return (self.third_quartile - self.first_quartile) / 2 / self.median


@dataclass(frozen=True)
class Run:
    """One run of the developer suite, and the file that it comes from."""

    path: Path
    text: str
    machine: dict[str, Any]
    timings: dict[str, Timing]


@dataclass(frozen=True)
class Change:
    """A test in both runs: how many times as long it takes, the machine's drift taken out, and what may be noise."""

    name: str
    before: float
    now: float
    ratio: float
    noise: float

    @property
    def slower(self) -> bool:
        return self.ratio > 1 + self.noise

    @property
    def faster(self) -> bool:
        return 1 / self.ratio > 1 + self.noise


@app.command()
def main(
    current: Annotated[Path, typer.Argument(help="What pytest-benchmark wrote.")],
    baseline: Annotated[
        Path | None, typer.Argument(help="What to compare it with, instead of this machine's baseline.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Make CURRENT the baseline.")] = False,
) -> None:
    """What became slower, and what faster, since this machine's baseline."""
    with mistakes_in_one_sentence():
        now = load(current)
        path = baseline or BASELINES / f"{slug(now.machine['device'])}.json"
        if replace or (baseline is None and not path.exists()):
            write_text(path, now.text)
            say(f"{path} is the baseline now, with {len(now.timings)} tests; later runs are compared with it")
            return
        before = load(path)
        check_same_machine(before, now)
    report(before, now)


def load(path: Path) -> Run:
    """A run from the json that pytest-benchmark wrote.

    Raises:
        InputError: there is no such file, or it holds something else, or nothing.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        timings = {entry["fullname"]: timing_of(entry) for entry in content["benchmarks"]}
        machine = content["machine_info"]["spt_fast"]
        if not timings or not {*MACHINE, "versions"} <= set(machine):
            raise ValueError
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path} holds no run of the developer suite, benchmarks/test_*.py") from None
    return Run(path, text, machine, timings)


def timing_of(entry: dict[str, Any]) -> Timing:
    """The timing in one entry of pytest-benchmark's."""
    median, first, third = (float(entry["stats"][name]) for name in ("median", "q1", "q3"))
    if not median > 0:
        raise ValueError
    return Timing(median, first, third, reference=entry["group"] == "reference")


def check_same_machine(before: Run, now: Run) -> None:
    for fact in MACHINE:
        if before.machine[fact] != now.machine[fact]:
            raise InputError(
                f"{before.path} was measured on another machine: its {fact} is {before.machine[fact]} and that of "
                f"{now.path} is {now.machine[fact]}; make bench-baseline makes a new baseline here"
            )


def drift_between(before: Run, now: Run) -> float | None:
    """How many times as long the reference workloads take; ``None`` if no reference is in both runs."""
    ratios = [
        now.timings[name].median / timing.median
        for name, timing in before.timings.items()
        if timing.reference and name in now.timings
    ]
    return statistics.median(ratios) if ratios else None


def changes(before: Run, now: Run, drift: float) -> list[Change]:
    """All tests of ours that are in both runs."""
    found = []
    for name, new in now.timings.items():
        old = before.timings.get(name)
        if old is not None and not new.reference:
            noise = max(SMALLEST, old.noise + new.noise)
            found.append(Change(name, old.median, new.median, new.median / old.median / drift, noise))
    return found


def report(before: Run, now: Run) -> None:
    """Print everything that somebody who compares the two should know."""
    drift = drift_between(before, now)
    compared = changes(before, now, drift or 1.0)
    slower = sorted((each for each in compared if each.slower), key=lambda each: -each.ratio)
    faster = sorted((each for each in compared if each.faster), key=lambda each: each.ratio)
    for title, found in (("slower", slower), ("faster", faster)):
        if found:
            show(title, found)
    say(
        f"{len(slower)} slower, {len(faster)} faster, {len(compared) - len(slower) - len(faster)} within the noise "
        f"of {before.path}"
    )
    if drift is None:
        say("no reference workload is in both runs, so nothing tells a slower machine from slower code")
    else:
        say(f"the machine itself takes {drift:.2f}x as long as it did, which is taken out")
    for sentence, there, elsewhere in (("was not run", before, now), ("has no baseline", now, before)):
        for name in there.timings:
            if name not in elsewhere.timings:
                say(f"{name} {sentence}")
    old, new = before.machine["versions"], now.machine["versions"]
    for package in sorted({*old, *new}):
        if old.get(package) != new.get(package):
            say(f"{package} was {old.get(package, 'not there')} and is {new.get(package, 'not there')}")


def show(title: str, found: list[Change]) -> None:
    table = Table(title=title, title_justify="left")
    for header in ("test", "was", "is", "change", "noise"):
        table.add_column(header, justify="left" if header == "test" else "right", overflow="fold")
    for each in found:
        times = duration(each.before), duration(each.now)
        table.add_row(escape(each.name), *times, f"{each.ratio:.2f}x", f"{each.noise:.0%}")
    console.print(table)


def say(sentence: str) -> None:
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
