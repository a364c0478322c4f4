"""What the paper's own tables say, where its ablations were made with the data sets of theirs.

In percent, as printed (Table 1: in seconds). Numbers that the paper shows only in pictures (Figures 2 to 4) or that the
text does not have (Table 4b) are not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spt_fast.errors import InputError

# How the backbones were pre-trained, by the names of the recipes.
PRETRAININGS = {"mae": "MAE", "mocov3": "MoCo v3", "sup21k": "IN-21K"}
DATASETS = ("cub200", "caltech101")


@dataclass(frozen=True)
class PaperTable:
    """Numbers of one table of the paper that belong to one ablation.

    Attributes:
        ablation: its name.
        source: where in the paper they are.
        column: the column of the ablation's table that they belong to.
        measure: what they measure: ``"accuracy"`` (percent) or ``"prototype_seconds"``.
        header: data set and pre-training of each number in a row.
        rows: the numbers of each row; ``None`` where the paper has none.
    """

    ablation: str
    source: str
    column: str
    measure: str
    header: tuple[tuple[str, str], ...]
    rows: Mapping[str, Sequence[float | None]]


_CUB_SUP_MAE = (("cub200", "sup21k"), ("cub200", "mae"))
PAPER_TABLES = (
    PaperTable(
        "sampling",
        "Table 4a",
        "frozen",
        "accuracy",
        (("cub200", "sup21k"), ("caltech101", "sup21k"), ("cub200", "mae"), ("caltech101", "mae")),
        {
            "Random init (VPT)": (81.6, 81.9, 25.3, 73.5),
            "K-means": (85.1, 87.8, 39.2, 84.1),
            "Mean pooling": (83.5, 86.3, 37.7, 81.5),
            "Max pooling": (84.0, 87.1, 37.0, 81.6),
            "Random sample": (84.2, 86.9, 37.8, 82.2),
        },
    ),
    PaperTable(
        "layers",
        "Table S2",
        "shallow",
        "accuracy",
        _CUB_SUP_MAE,
        {"random": (86.7, 42.2), "first": (90.2, 71.1), "last": (88.4, 64.6), "same": (90.2, 71.1)},
    ),
    PaperTable(
        "layers",
        "Table S2",
        "deep",
        "accuracy",
        _CUB_SUP_MAE,
        {"random": (88.5, 68.3), "first": (89.2, 76.5), "last": (89.9, 76.8), "same": (90.6, 80.1)},
    ),
    PaperTable(
        "prototype-fraction",
        "Table 1",
        "K-means",
        "prototype_seconds",
        (("cub200", "mae"),),
        {  # days in the paper
            "10%": (0.10 * 86400,),
            "30%": (0.30 * 86400,),
            "50%": (1.70 * 86400,),
            "70%": (6.20 * 86400,),
            "100%": (27.30 * 86400,),
        },
    ),
    PaperTable(
        "methods",
        "Tables 2 and 3",
        "accuracy",
        "accuracy",
        (("cub200", "mae"), ("cub200", "mocov3"), ("cub200", "sup21k")),
        {
            "Full": (80.55, 81.75, 87.3),
            "Linear": (None, None, 85.3),
            "Bias": (None, None, 88.4),
            "Adapter": (None, None, 87.1),
            "Moment Probing": (None, None, 89.3),
            "SSF": (None, None, 89.5),
            "SNF": (None, None, 90.2),
            "VPT-Shallow": (42.15, 79.05, 86.7),
            "VPT-Deep": (68.33, 82.67, 88.5),
            "GateVPT": (70.56, 82.86, None),
            "E2VPT": (None, None, 89.1),
            "SPT-Shallow": (71.15, 83.50, 90.2),
            "SPT-Deep": (80.13, 84.47, 90.6),
        },
    ),
    PaperTable(
        "methods",
        "Table S3",
        "accuracy",
        "accuracy",
        (("caltech101", "mae"), ("caltech101", "mocov3"), ("caltech101", "sup21k")),
        {
            "Full": (84.2, 91.0, 87.7),
            "SPT-Shallow": (87.6, 91.0, 91.2),
            "SPT-Deep": (88.9, 92.2, 92.6),
        },
    ),
)


def paper_settings(name: str) -> list[tuple[str, str]]:
    """Data set and pre-training of the columns that a name stands for.

    Args:
        name: a data set, for all pre-trainings, or the beginning of a recipe's name: data set and pre-training.

    Raises:
        InputError: the paper has no ablations on it.

    Example:
        >>> paper_settings("cub200-mae"), len(paper_settings("caltech101"))
        ([('cub200', 'mae')], 3)
    """
    known = [(dataset, pretraining) for dataset in DATASETS for pretraining in PRETRAININGS]
    found = [each for each in known if name in (each[0], "-".join(each))]
    if not found:
        raise InputError(
            f"paper-column must be {' or '.join(DATASETS)}, on its own or with one of "
            f"{', '.join(f'-{each}' for each in PRETRAININGS)}, got {name!r}"
        )
    return found


def paper_value(
    ablation: str, row: str, column: str, measure: str, setting: tuple[str, str]
) -> tuple[float, str] | None:
    """The paper's number and where it is from; ``None`` where it has none.

    Example:
        >>> paper_value("layers", "same", "deep", "accuracy", ("cub200", "mae"))
        (80.1, 'Table S2')
    """
    for table in PAPER_TABLES:
        same = (table.ablation, table.column, table.measure) == (ablation, column, measure)
        if same and setting in table.header and row in table.rows:
            value = table.rows[row][table.header.index(setting)]
            return None if value is None else (value, table.source)
    return None
