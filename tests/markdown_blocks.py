"""The fenced blocks of a page of documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
# A file of the checkout in place of the block's content, as the site shows it.
INCLUDED = re.compile(r'^--8<-- "([^"]+)"\n$')


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the file it is in.
        line: the number of its first line there, from 1.
        language: the word after the fence.
        content: what is shown, without the page's indentation.
        source: where ``content`` lies: ``page``, or the file that the page includes.
    """

    page: Path
    line: int
    language: str
    content: str
    source: Path

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line} ({self.language or 'no language'})"

    @property
    def code(self) -> str:
        """``content`` at its line numbers in ``source``, for tracebacks."""
        return self.content if self.source != self.page else "\n" * (self.line - 1) + self.content

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command; where commands follow a ``$`` the other lines are what they printed."""
        lines = re.sub(r"\\\n\s*", "", self.content).splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of ``page``, in its order; an unclosed one is an error."""
    blocks = []
    lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        number += 1
        if opening is None:
            continue
        indentation, fence, info = opening.groups()
        first = number
        while number < len(lines) and lines[number].strip() != fence:
            number += 1
        assert number < len(lines), f"{page.name}:{first} is not closed"
        content = "".join(line.removeprefix(indentation) for line in lines[first:number])
        included = INCLUDED.match(content)
        source = page if included is None else ROOT / included[1]
        if included is not None:
            content = source.read_text(encoding="utf-8")
        blocks.append(Block(page, first + 1, info.strip(), content, source))
        number += 1
    return blocks
