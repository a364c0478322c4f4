"""``spt-fast bench NAME ...`` is ``python -m benchmarks.NAME ...`` in a checkout of the source."""

from __future__ import annotations

import importlib
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import typer
from typer.core import TyperCommand, TyperGroup

import spt_fast
from spt_fast.errors import InputError, SptFastError
from spt_fast.kernels import BackendError


class BenchmarkGroup(TyperGroup):
    """The benchmarks as commands: listed from one table, imported when one is called."""

    # Contexts are typer's own from 0.29 on and click's before, so that there is no one type to name.

    def format_help(self, ctx: Any, formatter: Any) -> None:
        find_benchmarks()  # before half of the help is printed
        super().format_help(ctx, formatter)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(descriptions())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A line of the list; :meth:`resolve_command` has the command itself."""
        line = descriptions().get(cmd_name)
        return None if line is None else TyperCommand(cmd_name, help=line)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0].replace("-", "_")
        known = descriptions()
        if name not in known:
            ctx.fail(f"there is no benchmark {args[0]!r}, expected one of {', '.join(known)}")
        return name, typer.main.get_command(importlib.import_module(f"benchmarks.{name}").app), args[1:]

    def invoke(self, ctx: Any) -> Any:
        find_benchmarks()  # what main() says in a sentence is that there are none, not what goes wrong inside one
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # whoever read the output has seen enough
            raise
        except (SptFastError, BackendError, torch.OutOfMemoryError, OSError):
            traceback.print_exc()
            raise typer.Exit(1) from None


def descriptions() -> dict[str, str]:
    """Name of every benchmark -> what it measures."""
    benchmarks = find_benchmarks()
    return {**benchmarks.BENCHMARKS, **benchmarks.TOOLS}


def find_benchmarks() -> ModuleType:
    """The package ``benchmarks``: where Python finds it, else in the folder above this package.

    Raises:
        InputError: it is in neither place.
    """
    for added in ([], [str(Path(spt_fast.__file__).resolve().parent.parent)]):
        sys.path[:0] = added
        with suppress(ModuleNotFoundError):
            found = importlib.import_module("benchmarks")
            if hasattr(found, "BENCHMARKS"):
                return found
            del sys.modules["benchmarks"]  # somebody else's package of this name
    raise InputError(
        "the benchmarks come with the source, not with the installed package: git clone the project, then "
        'pip install -e ".[bench]" in it'
    )
