"""The page and the part of the README that show what the benchmarks measured.

    python -m benchmarks.report                                # docs/benchmarks/index.html and README.md
    python -m benchmarks.report --results runs/results --output runs/benchmarks.html

Both are made of records alone and can be made again at any time: the same records give the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from benchmarks.command import console, mistakes_in_one_sentence
from benchmarks.page import page
from benchmarks.readme import measured_section, with_measured
from benchmarks.record import RESULTS, ROOT, newest
from benchmarks.starts import load_starts
from spt_fast.errors import InputError
from spt_fast.files import write_text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

PAGE, README = ROOT / "docs" / "benchmarks" / "index.html", ROOT / "README.md"


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="Folder with the records.")] = RESULTS,
    output: Annotated[Path, typer.Option(help="The page to write.")] = PAGE,
    readme: Annotated[
        bool | None,
        typer.Option(help="Bring README.md up to date; unless said, if neither folder nor page is named."),
    ] = None,
) -> None:
    """Draw the newest record of every benchmark on every device into one page, and into the README."""
    with mistakes_in_one_sentence():
        if not results.is_dir():
            raise InputError(f"--results must be a folder with records, and {results} is none")
        records = newest(results)
        # All is made before anything is written: a broken record leaves page and README as they were.
        texts = {output: page(records)}
        if readme or (readme is None and (results, output) == (RESULTS, PAGE)):
            section = measured_section(records, load_starts(results))
            texts[README] = with_measured(README.read_text(encoding="utf-8"), section)
        for path, text in texts.items():
            try:
                write_text(path, text)
            except OSError as error:
                raise InputError(
                    f"--output must be a file that can be written, and {path} is not: {error}"
                ) from None
            console.print(f"written to {escape(str(path))}", soft_wrap=True)


if __name__ == "__main__":
    app()
