"""What an ablation compares: variants of one experiment that differ in one thing, and their places in its table."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from spt_fast.ablations.subsets import Subset
from spt_fast.building import Layers
from spt_fast.errors import InputError

FigureKind = Literal["bars", "lines", "matrix", "courses"]


@dataclass(frozen=True)
class Variant:
    """One cell of an ablation's table.

    Attributes:
        row: the row of the table.
        column: its column.
        method: a name of :data:`spt_fast.methods.METHODS`.
        init: how its prompts start, a ``method`` of :func:`spt_fast.build_prototypes`; ``None``: by itself, or there
            are none.
        num_prompts: prompt tokens per block; ``None`` without prompts.
        layers: whose tokens the prototypes come from.
        data_fraction: share of the training images that the prototypes are built from.
        options: keyword arguments of :func:`spt_fast.methods.build_model`.
        data: which of the data sets it is trained on, from 0.
        start_data: which of them its prototypes come from.
        backbone: which of the backbones, from 0.
        subset: the part of the training images that it gets; ``None``: all.
        snapshots: keep an adapter of every epoch, and measure the NMI of its prompts.
    """

    row: str
    column: str
    method: str = "spt_deep"
    init: str | None = None
    num_prompts: int | None = 20
    layers: Layers = "same"
    data_fraction: float = 1.0
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    data: int = 0
    start_data: int = 0
    backbone: int = 0
    subset: Subset | None = None
    snapshots: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """All but the place in the table, as json: variants with equal settings share their runs."""
        return {name: value for name, value in asdict(self).items() if name not in ("row", "column")}

    @property
    def name(self) -> str:
        """Of the folder of its runs: readable, and different for different settings."""
        readable = re.sub(r"[^\w.=-]+", "-", "-".join(filter(None, [self.row, self.column])))
        return f"{readable[:60].strip('-')}-{digest(self.settings)}"


@dataclass(frozen=True)
class Ablation:
    """The table of an ablation.

    Attributes:
        name: as on the command line.
        title: a sentence above table and figure.
        source: the table or figure of the paper that has this shape; ``None`` if the paper has none.
        variants: the cells.
        figure: how they are drawn.
        axis: what the rows are.
        measures: what is shown beside the accuracy: names of numbers of an outcome.
        notes: what is to be known to read it.

    Raises:
        InputError: two variants have one place in the table.
    """

    name: str
    title: str
    source: str | None
    variants: list[Variant]
    figure: FigureKind
    axis: str
    measures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        places = Counter((variant.row, variant.column) for variant in self.variants)
        for (row, column), count in places.items():
            if count > 1:
                raise InputError(
                    f"variants of {self.name} must have places of their own in the table, got {count} in row {row!r} "
                    f"and column {column!r}"
                )


def exact(number: float) -> str:
    """A number as ``:g`` writes it, or with all its digits where those of ``:g`` are another number.

    Example:
        >>> exact(0.03), exact(1e-4), exact(0.0300000001)
        ('0.03', '0.0001', '0.0300000001')
    """
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def digest(record: dict[str, Any]) -> str:
    """Eight letters that stand for a json-able record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
