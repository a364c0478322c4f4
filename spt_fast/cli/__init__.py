"""The command line: ``spt-fast prototypes | train | eval | predict | demo | info | bench``; nothing else prints."""

from spt_fast.cli.commands import app, main

__all__ = ["app", "main"]
