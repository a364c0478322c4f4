"""What the benchmark commands share: their options, how a measurement begins and ends, tables, progress bars."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.image_folder import load_images
from benchmarks.record import RESULTS, Record, Row
from benchmarks.summary import duration, middle, quartiles, ratio, share_of_limit
from spt_fast.devices import choose_device
from spt_fast.errors import SptFastError

# Into a file or a pipe tables are as wide as they need to be.
console = Console(width=None if sys.stdout.isatty() else 140)

DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda; sizes follow from it unless given.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Times that every peer has its turn.")]
ResultsOption = Annotated[Path, typer.Option(help="Folder for the record.")]
MinutesOption = Annotated[
    float | None,
    typer.Option(min=0, help="Begin no further case after this time; the record says that it is incomplete."),
]


@contextmanager
def measuring(
    benchmark: str,
    context: typer.Context,
    device: str,
    results: Path = RESULTS,
    minutes: float | None = None,
    **settings: Any,
) -> Iterator[tuple[Record, Ceilings]]:
    """Open a record with the machine's ceilings in it, and write it in the end, or what there is of it.

    A mistake of the caller is one sentence on stderr and exit code 1.
    """
    with mistakes_in_one_sentence():
        chosen = choose_device(device)
        record = Record(benchmark, command_line(benchmark, context), chosen, results, settings, minutes)
        ceilings = measure_ceilings(chosen)
        record.content["ceilings"] = ceilings.as_dict()
        try:
            yield record, ceilings
        except BaseException:
            if record.rows:
                record.save()
            raise
        record.finish()
        unfinished = "" if record.content["complete"] else ", incomplete: the time was up"
        console.print(f"written to {escape(str(record.path))}{unfinished}", soft_wrap=True)


def command_line(benchmark: str, context: typer.Context) -> str:
    """The command with the options that were given, however it was entered."""
    words = ["python", "-m", f"benchmarks.{benchmark}"]
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE" or parameter.name in ("results", "minutes"):
            continue
        value = context.params[str(parameter.name)]
        for each in value if isinstance(value, (list, tuple)) else [value]:
            words += [parameter.opts[0], *([] if each is True else [str(each)])]
    return shlex.join(words)


@contextmanager
def mistakes_in_one_sentence() -> Iterator[None]:
    """Print a mistake of the caller as one sentence on stderr and leave with exit code 1."""
    try:
        yield
    except SptFastError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


def show(
    title: str,
    rows: Sequence[Row],
    *,
    against: str = "spt-fast",
    extras: Mapping[str, Callable[[Row], str]] | None = None,
) -> None:
    """The rows of one case as a table: times, spread, ratios to the peer ``against``, shares of the limit.

    ``extras`` are further columns; a function that finds nothing to say raises ``KeyError``.
    """
    extras = extras or {}
    table = Table(title=title, title_justify="left")
    headers = ("", "median", "quartiles", f"time of {against}", "of its limit", *extras)
    for header in headers:
        table.add_column(header, justify="right" if header else "left")
    reference = next((row for row in rows if row["peer"] == against and row["kind"] == "measured"), None)
    for row in rows:
        name = escape(row["peer"])
        if row["kind"] == "missing":
            table.add_row(name, f"[dim]{escape(row['reason'])}[/]")
            continue
        spread = " .. ".join(map(duration, quartiles(row["seconds"]))) if "seconds" in row else row["kind"]
        share = share_of_limit(row)
        table.add_row(
            name,
            duration(middle(row)),
            spread,
            # Who was quoted worked elsewhere, on something else.
            "" if reference is None or row["kind"] == "quoted" else f"{ratio(row, reference):.2f}x",
            "" if share is None else f"{share:.0%}",
            *(_cell(extra, row) for extra in extras.values()),
        )
    console.print(table)


def _cell(extra: Callable[[Row], str], row: Row) -> str:
    try:
        return extra(row)
    except KeyError:
        return ""


def load_with_progress(path: Path, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """:func:`benchmarks.image_folder.load_images` with a progress bar."""
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        return load_images(
            path, size, on_progress=lambda read, total: progress.update(task, completed=read, total=total)
        )
