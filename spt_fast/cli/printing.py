"""What the command line prints: results on standard output; progress, warnings and errors on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Of the processes that torchrun starts, the first one tells how it goes; all of them tell what went wrong.
is_first = os.environ.get("RANK", "0") == "0"
out = Console(quiet=not is_first)
status = Console(stderr=True, quiet=not is_first)
errors = Console(stderr=True)


def show(result: dict[str, Any], as_json: bool) -> None:
    """A result as json, or its numbers as a table."""
    if as_json:
        print_json(result)
        return
    table = new_table("", "", show_header=False)
    for name, value in result.items():
        if value is not None and not isinstance(value, list):
            is_share = name.endswith("accuracy") or name == "data_wait"
            shown = f"{value:.2%}" if is_share else f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(name.replace("_", " "), Text(shown))
    out.print(table)


def new_table(*headers: str, show_header: bool = True) -> Table:
    """An empty table that breaks long words, such as paths, instead of cutting them off."""
    table = Table(show_header=show_header)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def print_json(value: Any) -> None:
    """The only thing on standard output under --json."""
    out.out(json.dumps(value, indent=2), highlight=False)


def say(sentence: str) -> None:
    out.print(Text(sentence), soft_wrap=True)


def warn(sentence: str) -> None:
    status.print(Text.assemble(("warning: ", "yellow"), " ".join(sentence.split())), soft_wrap=True)


def report_skipped(stage: str, count: int) -> None:
    if count:
        images = "an unreadable image" if count == 1 else f"{count} unreadable images"
        warn(f"{stage} skipped {images}; --strict stops at the first and names it")


@contextmanager
def resumable(*kept: Path) -> Iterator[None]:
    """Say on Ctrl-C how to go on, if anything of ``kept`` is there to go on from."""
    try:
        yield
    except KeyboardInterrupt:
        if any(path.exists() for path in kept):
            status.print("interrupted; the same command with --resume goes on from here")
        else:
            status.print("interrupted")
        raise  # which typer makes exit code 130


def fail(sentence: str) -> NoReturn:
    errors.print(Text.assemble(("error: ", "red"), " ".join(sentence.split())), soft_wrap=True)
    sys.exit(1)
