"""What the reference makes of docstrings: roles become links, doctests become code.

mkdocstrings loads this as an extension of griffe. Docstrings are written for people who read the code; there
``:func:`train``` names a function and ``Example:`` is followed by a doctest.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
# griffe knows the doctests of a section called Examples; of another name it makes a box with the text as it stands.
EXAMPLE = re.compile(r"^(\s*)Example:$", flags=re.MULTILINE)
# Outside of that section a doctest is a paragraph like any other.
DOCTEST = re.compile(r"(?:^>>> .*\n?(?:(?!\n|>>> ).+\n?)*)+", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites the docstring of every object when it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
        if obj.is_module:
            text = DOCTEST.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
        obj.docstring.value = ROLE.sub(lambda found: _link(obj, *found.groups()), text)


def _link(obj: griffe.Object, short: str, name: str) -> str:
    """A link to what ``name`` means inside ``obj``; where it has no page the name alone."""
    try:
        target = obj.resolve(name)
    except griffe.NameResolutionError:
        target = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'
