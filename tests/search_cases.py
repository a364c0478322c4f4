"""``spt-fast sweep`` and ``spt-fast vtab`` as tests call them."""

import pytest
import typer
from command_line import Done, run

from spt_fast.cli import commands, search

# An application of these two alone: the others need not be imported as commands to test them.
APP = typer.Typer(pretty_exceptions_enable=False)
APP.command()(search.sweep)
APP.command()(search.vtab)

PHOTOS = ["--pool", "avg", "--epochs", "2", "--dtype", "float32", "--workers", "0"]


def run_search(*arguments: object) -> Done:
    """What ``spt-fast *arguments`` does, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "app", APP)
        return run(*arguments)
