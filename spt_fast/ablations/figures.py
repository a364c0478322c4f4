"""The figure of an ablation, drawn from the cells of its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from spt_fast.ablations.variants import Ablation
from spt_fast.drawing import NO_METADATA, STRONG, STYLE, colour, dashes
from spt_fast.files import atomic_path

Cells = Sequence[dict[str, Any]]
BAR = 0.32  # inches of a bar and its share of the gap


def write_figures(folder: Path, ablation: Ablation, cells: Cells) -> list[Path]:
    """Write ``figure.png`` and ``figure.svg``; equal cells give equal bytes."""
    rows = len({cell["row"] for cell in cells})
    columns = len({cell["column"] for cell in cells})
    sizes = {
        "bars": (7.0, 1.2 + BAR * rows * columns),
        "lines": (6.0, 4.0),
        "courses": (6.0, 4.0),
        "matrix": (2.5 + columns, 1.6 + 0.7 * rows),
    }
    files = [folder / f"figure{suffix}" for suffix in (".png", ".svg")]
    for file in files:
        with matplotlib.style.context(STYLE, after_reset=True), atomic_path(file) as temporary:
            figure = Figure(figsize=sizes[ablation.figure], layout="constrained")
            axes = figure.subplots()
            axes.set_title(ablation.title)
            _DRAW[ablation.figure](axes, ablation, cells)
            lines, names = axes.get_legend_handles_labels()
            if len(names) > 1:
                figure.legend(
                    lines, names, loc="outside upper left", ncols=min(len(names), 4), handlelength=2.6
                )
            figure.savefig(temporary, format=file.suffix[1:], metadata=NO_METADATA[file.suffix])
    return files


def _bars(axes: Axes, ablation: Ablation, cells: Cells) -> None:
    """A group of bars for each row, one bar for each column."""
    rows, columns = _names(cells, "row"), _names(cells, "column")
    height = 0.8 / len(columns)
    for index, column in enumerate(columns):
        own = [cell for cell in cells if cell["column"] == column and cell["accuracy_mean"] is not None]
        places = [rows.index(cell["row"]) + height * (index - (len(columns) - 1) / 2) for cell in own]
        means = [cell["accuracy_mean"] for cell in own]
        spread = [cell["accuracy_std"] or 0.0 for cell in own]
        axes.barh(places, means, height * 0.9, xerr=spread, color=colour(index), ecolor=STRONG, label=column)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel("accuracy")
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))


def _lines(axes: Axes, ablation: Ablation, cells: Cells) -> None:
    """Accuracy against the rows, evenly spaced, a line for each column."""
    rows = _names(cells, "row")
    for index, column in enumerate(_names(cells, "column")):
        own = [cell for cell in cells if cell["column"] == column and cell["accuracy_mean"] is not None]
        axes.errorbar(
            [rows.index(cell["row"]) for cell in own],
            [cell["accuracy_mean"] for cell in own],
            yerr=[cell["accuracy_std"] or 0.0 for cell in own],
            color=colour(index),
            dashes=dashes(index),
            marker="o",
            markersize=4.5,
            elinewidth=1.0,
            label=column,
        )
    axes.set_xticks(range(len(rows)), rows)
    axes.set_xlabel(ablation.axis)
    _finish(axes, "accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))


def _courses(axes: Axes, ablation: Ablation, cells: Cells) -> None:
    """NMI against the epoch, a line for each row."""
    for index, cell in enumerate(cells):
        course = cell["nmi_by_epoch_mean"]
        if course:
            axes.plot(
                range(len(course)), course, color=colour(index), dashes=dashes(index), label=cell["row"]
            )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, "NMI")


def _matrix(axes: Axes, ablation: Ablation, cells: Cells) -> None:
    """Colours say the normalised accuracy, words the accuracy itself."""
    rows, columns = _names(cells, "row"), _names(cells, "column")
    values = {(cell["row"], cell["column"]): cell for cell in cells}
    shades = [[values[row, column]["normalized"] or 0.0 for column in columns] for row in rows]
    axes.imshow(shades, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")  # light enough for dark letters
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            mean = values[row, column]["accuracy_mean"]
            words = "failed" if mean is None else f"{100 * mean:.1f}"
            axes.text(x, y, words, ha="center", va="center", color=STRONG)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("trained and judged on")
    axes.set_ylabel(ablation.axis)
    axes.grid(visible=False)


def _finish(axes: Axes, what: str) -> None:
    axes.set_ylabel(what)
    axes.set_axisbelow(True)


def _names(cells: Cells, kind: str) -> list[str]:
    return list(dict.fromkeys(cell[kind] for cell in cells))


_DRAW: dict[str, Callable[[Axes, Ablation, Cells], None]] = {
    "bars": _bars,
    "lines": _lines,
    "courses": _courses,
    "matrix": _matrix,
}
