"""Markdown for the README."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table.

    Example:
        >>> print(table(["", "time"], [["ours", "1.00x"]]))
        | | time |
        |---|---|
        | ours | 1.00x |
    """
    lines = [head, *rows]
    cells = [[cell.replace("|", r"\|").replace("\n", " ") for cell in line] for line in lines]
    first, *others = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in cells]
    return "\n".join([first, "|" + "---|" * len(head), *others])


def shell(commands: str) -> str:
    """A block of commands."""
    return f"```sh\n{commands}\n```"


def wrapped(paragraph: str) -> str:
    """A paragraph in lines as long as the README's."""
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)
