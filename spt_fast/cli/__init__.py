"""The command line: ``spt-fast train | prototypes | sweep | vtab | recipes | eval ...``; nothing else prints."""

from spt_fast.cli.commands import app, main

__all__ = ["app", "main"]
