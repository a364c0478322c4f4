"""Every benchmark in one go: each a process of its own with its share of the time, resumable section by section.

    python -m benchmarks.suite                                 # in less than 9 minutes
    python -m benchmarks.suite --device cuda --resume          # go on after an interruption
    python -m benchmarks.suite --device cuda --at-scale        # training at scale, in less than 6 minutes of a GPU

A section that fails, or is stopped because its time is over, does not stop the others, and the record that it wrote
until then stays. ``suite.json`` among the results says how far the suite came.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from benchmarks.command import DeviceOption, ResultsOption, console, mistakes_in_one_sentence
from benchmarks.record import RESULTS, ROOT, machine
from benchmarks.summary import duration
from spt_fast.devices import choose_device
from spt_fast.errors import InputError
from spt_fast.files import write_text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Section:
    """A part of the suite.

    Attributes:
        minutes: its share of the time, by type of device; where there is none it does not run.
        command: what runs, given the device, its minutes and the folder for results.
        at_scale: whether it is of the part that only ``--at-scale`` runs.
    """

    minutes: dict[str, float]
    command: Callable[[str, float, Path], list[str]]
    at_scale: bool = False


def benchmark(
    name: str, *, on_cpu: tuple[str, ...] = (), at_scale: bool = False, **minutes: float
) -> Section:
    """A module of this package as a section, with its minutes by type of device.

    ``on_cpu`` makes it smaller where its own sizes take too long.
    """

    def command(device: str, share: float, results: Path) -> list[str]:
        # A benchmark ends the case that it began: that, and starting Python, is what the rest of the minutes is for.
        options = ["--device", device, "--minutes", f"{BEGINNING * share:.2f}", "--results", str(results)]
        return [sys.executable, "-m", f"benchmarks.{name}", *options, *(on_cpu if device == "cpu" else ())]

    return Section(minutes, command, at_scale)


def gpu_tests(device: str, minutes: float, results: Path) -> list[str]:
    """The tests that need a GPU; files that cannot be imported, for want of a package, do not hold up the others."""
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--quiet"]
    log = results / "gpu-tests.xml"
    return [*pytest, "--continue-on-collection-errors", f"--junit-xml={log}", "tests"]


SHORT_STREAMS = ("--tokens", "100000", "--tokens", "1000000", "--tokens", "10000000")
FEW_IMAGES = ("--images-per-class", "16")
# In the order in which they run. Together: 8.9 minutes, and 5.6 of a GPU at scale.
SECTIONS = {
    "tests": Section({"cuda": 2.4}, gpu_tests),
    "kmeans": benchmark("kmeans", cuda=1.2, cpu=2.15, on_cpu=("--rounds", "3")),
    "attention": benchmark("attention", cuda=1.2, cpu=0.65, on_cpu=("--rounds", "10")),
    "train_step": benchmark("train_step", cuda=1.2, cpu=2.1, on_cpu=("--rounds", "3", "--brief")),
    "prototypes": benchmark("prototypes", cuda=1.0, cpu=1.2, on_cpu=("--images", "400")),
    "scaling": benchmark("scaling", cuda=0.8, cpu=1.4, on_cpu=("--rounds", "2", *SHORT_STREAMS)),
    "accuracy_speed": benchmark("accuracy_speed", cuda=1.1, cpu=1.4, on_cpu=("--epochs", "2", *FEW_IMAGES)),
    "end_to_end": benchmark("end_to_end", cuda=2.9, at_scale=True),
    "large_model": benchmark("large_model", cuda=1.2, at_scale=True),
    "imagenet_stream": benchmark("imagenet_stream", cuda=1.5, at_scale=True),
}
# Of its minutes, a benchmark begins cases in this share; it is stopped when it has taken so many times its minutes.
BEGINNING, LIMIT = 0.9, 1.25
# Seconds that a section has to leave after it was interrupted.
GRACE = 5.0


@dataclass
class Outcome:
    """How a section went. It counts as interrupted from its beginning until its end is known."""

    status: str = "interrupted"
    seconds: float = 0.0
    return_code: int | None = None
    files: list[str] = field(default_factory=list)


@dataclass
class State:
    """How far the suite came: the content of ``suite.json``."""

    started: str
    machine: dict[str, Any]
    sections: dict[str, Outcome]

    def save(self, results: Path) -> None:
        write_text(results / "suite.json", json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> State:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            sections = {name: Outcome(**outcome) for name, outcome in content["sections"].items()}
            return cls(content["started"], dict(content["machine"]), sections)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{path} does not say how far a suite came") from None


@app.command()
def main(
    device: DeviceOption = "auto",
    section: Annotated[
        list[str] | None, typer.Option(help=f"Only this one: {', '.join(SECTIONS)}; may be repeated.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="For all sections together, instead of 8.9, or 5.6 at scale."),
    ] = None,
    at_scale: Annotated[
        bool, typer.Option("--at-scale", help="The sections of training at scale, and no others.")
    ] = False,
    results: ResultsOption = RESULTS,
    resume: Annotated[
        bool, typer.Option("--resume", help="Pass over the sections that are finished.")
    ] = False,
) -> None:
    """Every benchmark in one go, each a process of its own with its share of the time."""
    begun = time.monotonic()
    with mistakes_in_one_sentence():
        chosen = choose_device(device)
        sections = chosen_sections(section, chosen, at_scale)
        shares = {name: each.minutes[chosen.type] for name, each in sections.items()}
        results = results.resolve()
        state = opened_state(results, chosen, resume)
        asked = chosen.type if device == "auto" else device
    usual = sum(each.minutes.get(chosen.type, 0.0) for each in SECTIONS.values() if each.at_scale == at_scale)
    scale = 1.0 if minutes is None else minutes / usual
    left = {name: scale * share for name, share in shares.items() if not is_finished(state, name)}
    deadline = begun + 60 * sum(left.values())
    try:
        with termination_as_interrupt():
            for name in list(left):
                # What a section left over, or took too much, is shared out among all that follow.
                allotted = (deadline - time.monotonic()) * left[name] / sum(left.values())
                run_section(name, asked, allotted, deadline, results, state)
                del left[name]
    except KeyboardInterrupt:
        show(state)
        console.print("interrupted; the same command with --resume goes on from here")
        raise typer.Exit(130) from None
    show(state)
    if not all(is_finished(state, name) for name in shares):
        raise typer.Exit(1)


def chosen_sections(names: list[str] | None, device: torch.device, at_scale: bool) -> dict[str, Section]:
    """Those of a part with a share of the time on this device, or those that were asked for, in the table's order.

    Raises:
        InputError: one that was asked for does not run on this device, or there is none.
    """
    possible = {name: each for name, each in SECTIONS.items() if device.type in each.minutes}
    unknown = [name for name in names or [] if name not in possible]
    if unknown:
        raise InputError(
            f"--section must be one of {', '.join(possible)} on {device.type}, got {', '.join(unknown)}"
        )
    chosen = {
        name: each
        for name, each in possible.items()
        if (each.at_scale == at_scale if names is None else name in names)
    }
    if not chosen:
        raise InputError(f"--at-scale is measured on a GPU, not on {device.type}; --section runs any other")
    return chosen


def opened_state(results: Path, device: torch.device, resume: bool) -> State:
    """The state of the suite that is resumed, or that of a new one."""
    here = machine(device)
    path = results / "suite.json"
    if not (resume and path.exists()):
        return State(datetime.now(timezone.utc).isoformat(timespec="seconds"), here, {})
    state = State.load(path)
    for fact in ("device", "commit"):
        if state.machine.get(fact) != here[fact]:
            raise InputError(
                f"{path} is of {fact} {state.machine.get(fact)} and this is {here[fact]}: begin again without "
                "--resume, or name another folder with --results"
            )
    return state


def is_finished(state: State, name: str) -> bool:
    return name in state.sections and state.sections[name].status == "finished"


def run_section(
    name: str, device: str, allotted: float, deadline: float, results: Path, state: State
) -> None:
    """Run one section in about ``allotted`` seconds, never beyond ``deadline``, and note how it went."""
    outcome = state.sections[name] = Outcome()
    if allotted <= 0:
        outcome.status = "timed out"
        return state.save(results)
    state.save(results)
    before = modified(results)
    begun = time.monotonic()
    console.rule(f"{name}, {duration(allotted)}")
    try:
        outcome.status, outcome.return_code = run(
            SECTIONS[name].command(device, allotted / 60, results),
            min(LIMIT * allotted, deadline - begun),
        )
    finally:
        outcome.seconds = round(time.monotonic() - begun, 1)
        outcome.files = sorted(
            path.name for path, time_of in modified(results).items() if before.get(path) != time_of
        )
        state.save(results)


def run(command: list[str], seconds: float) -> tuple[str, int]:
    """How a command ended, and its return code; when its time is over, it is stopped with all that it started."""
    # A session of its own makes a process group of its own, in which everything that it starts can be found.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return "timed out", stop(process)
    except KeyboardInterrupt:
        stop(process)
        raise
    return ("failed" if code else "finished"), code


def stop(process: subprocess.Popen[bytes]) -> int:
    """Interrupt the process and its children, on which benchmarks and tests write what they have, then kill them."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """End like Ctrl-C when terminated: a section, which has a session of its own, would live on otherwise."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def modified(results: Path) -> dict[Path, int]:
    """When each result was last written."""
    return {path: path.stat().st_mtime_ns for path in results.glob("[!.]*") if path.name != "suite.json"}


def show(state: State) -> None:
    """All sections that were begun, as a table."""
    colours = {"finished": "green", "interrupted": "yellow"}
    table = Table("section", "status", "time", "written")
    for name, outcome in state.sections.items():
        colour = colours.get(outcome.status, "red")
        code = f", exit code {outcome.return_code}" if outcome.status == "failed" else ""
        files = escape("\n".join(outcome.files))
        table.add_row(name, f"[{colour}]{outcome.status}{code}[/]", duration(outcome.seconds), files)
    console.print(table)


if __name__ == "__main__":
    app()
