"""The table of an ablation: one record for each cell, and the same in rows and columns for people."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spt_fast.ablations.paper_values import PRETRAININGS, paper_value
from spt_fast.ablations.running import Finished
from spt_fast.ablations.variants import Ablation, exact
from spt_fast.experiment_records import sample_std
from spt_fast.files import write_text
from spt_fast.sweep_folder import write_csv

# Measures that the records have even where the table does not show them.
ALWAYS_KEPT = ("prototype_seconds", "train_seconds", "largest_class")
SHARES = ("accuracy", "mean_per_class", "head", "medium", "tail")
NAMES = {
    "mean_per_class": "mean of classes",
    "effective_clusters": "effective clusters",
    "prototype_seconds": "prototypes (s)",
    "train_seconds": "training (s)",
    "train_images": "images",
    "trainable_parameters": "trained parameters",
    "nmi_first": "NMI at the start",
    "nmi_last": "NMI at the end",
}


def cells_of(
    ablation: Ablation, finished: Sequence[Finished], paper: Sequence[tuple[str, str]] = ()
) -> list[dict[str, Any]]:
    """A json-able record for each variant.

    Args:
        ablation: what was compared.
        finished: what came of it.
        paper: data set and pre-training of the paper's numbers to put beside ours.

    Returns:
        Dicts with ``row`` and ``column``, the settings, ``learning_rate``, ``tried``, ``seeds``, ``runs`` (as many
        were trained), ``accuracies``, and of the accuracy and every measure, also those of ``ALWAYS_KEPT``,
        ``NAME_mean`` and ``NAME_std`` (sample standard deviation over seeds); ``per_class_mean``; ``failure``;
        ``paper``: the paper's numbers, by ``"DATASET-PRETRAINING MEASURE"``. ``None`` where there is no number.
    """
    cells = []
    for each in finished:
        variant, outcomes = each.variant, each.outcomes
        failure = next((outcome["failure"] for outcome in outcomes if "failure" in outcome), None)
        if each.learning_rate is None:
            failure = "the loss stayed finite with none of the learning rates"
        good = [] if failure else outcomes
        cell: dict[str, Any] = {
            "row": variant.row,
            "column": variant.column,
            **variant.settings,
            "learning_rate": each.learning_rate,
            "tried": {exact(rate): accuracy for rate, accuracy in each.tried.items()},
            "seeds": list(each.seeds),
            "runs": len(outcomes),
            "accuracies": [outcome["accuracy"] for outcome in good],
            "failure": failure,
        }
        for measure in dict.fromkeys(("accuracy", *ablation.measures, *ALWAYS_KEPT)):
            values = [outcome[measure] for outcome in good if outcome.get(measure) is not None]
            cell[f"{measure}_mean"] = statistics.fmean(values) if values else None
            cell[f"{measure}_std"] = sample_std(values) if values else None
        for name in ("per_class", "clusters_by_block", "nmi_by_epoch"):
            cell[f"{name}_mean"] = _mean_of_lists([outcome[name] for outcome in good if name in outcome])
        cell["paper"] = {}
        for setting in paper:
            for measure in ("accuracy", *ablation.measures):
                known = paper_value(ablation.name, variant.row, variant.column, measure, setting)
                if known is not None:
                    cell["paper"][f"{'-'.join(setting)} {measure}"] = known[0]
        cells.append(cell)
    if ablation.figure == "matrix":
        _normalize_columns(cells)
    return cells


def arranged(ablation: Ablation, cells: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines in words: accuracy in percent, mean and standard deviation; the paper's numbers beside ours.

    The columns of the ablation stand side by side, unless more than the accuracy is shown: then each cell has a line.
    """
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    groups: dict[str, list[dict[str, Any] | None]]
    if ablation.measures and len(columns) > 1:
        header, lines = [ablation.axis, ""], [[cell["row"], cell["column"]] for cell in cells]
        groups = {"": list(cells)}
    else:
        by_place = {(cell["row"], cell["column"]): cell for cell in cells}
        header, lines = [ablation.axis], [[row] for row in rows]
        groups = {column: [by_place.get((row, column)) for row in rows] for column in columns}
    several_rates = len({cell["learning_rate"] for cell in cells} - {None}) > 1
    for group, own in groups.items():
        # The name of a group is its accuracy's; alone, it is known without being said.
        prefix = f"{group}, " if len(groups) > 1 else ""
        for measure in ("accuracy", *ablation.measures):
            words = [_words(cell, measure) for cell in own]
            is_accuracy = measure == "accuracy"
            name = (group or measure) if is_accuracy else prefix + NAMES.get(measure, measure)
            if any(words):
                _append(header, lines, name, words)
            settings = {key for cell in own if cell for key in cell["paper"] if key.split()[1] == measure}
            for key in sorted(settings):
                dataset, pretraining = key.split()[0].rsplit("-", 1)
                paper = [f"{cell['paper'][key]:g}" if cell and key in cell["paper"] else "" for cell in own]
                _append(header, lines, f"{name}, paper ({dataset}, {PRETRAININGS[pretraining]})", paper)
        if several_rates:
            rates = [exact(cell["learning_rate"]) if cell and cell["learning_rate"] else "" for cell in own]
            _append(header, lines, f"{prefix}base rate", rates)
    return header, lines


def notes_of(ablation: Ablation, cells: Sequence[dict[str, Any]], about: dict[str, Any]) -> list[str]:
    """Sentences without which the table would be misread."""
    seeds = len(cells[0]["seeds"])
    notes = [
        f"Accuracy in percent on the {about['test_split']} images"
        + (f": mean and sample standard deviation over {seeds} seeds." if seeds > 1 else ", one seed."),
    ]
    if about["choose_split"] is not None:
        where = (
            "training images held out"
            if about["choose_split"] == "held-out"
            else f"{about['choose_split']} images"
        )
        notes.append(f"Each variant has the base rate that was best on the {where}, with seed 0.")
    if about["test_split"] != "test":
        notes.append(
            f"The variants are not judged on test images: the {about['test_split']} images stand for them."
        )
    if about["jobs"] > 1 and any(measure.endswith("seconds") for measure in ablation.measures):
        notes.append(f"Seconds were measured with {about['jobs']} runs at the same time.")
    sparse = dict.fromkeys(cell["row"] for cell in cells if _has_filled_classes(cell))
    if sparse:
        notes.append(f"Imbalance {', '.join(sparse)}: classes that would have less than one image have one.")
    if ablation.source is not None:
        notes.append(f"In the paper: {ablation.source}.")
    failed = [f"{cell['row']}, {cell['column']}: {cell['failure']}" for cell in cells if cell["failure"]]
    return [*notes, *ablation.notes, *failed]


def write_tables(
    folder: Path, ablation: Ablation, cells: Sequence[dict[str, Any]], about: dict[str, Any]
) -> list[Path]:
    """Write ``table.json``, ``table.csv`` and ``table.md``.

    Args:
        folder: where.
        ablation: what was compared.
        cells: :func:`cells_of`.
        about: json-able facts of all runs: ``test_split``, ``choose_split``, ``jobs`` and whatever else should be kept.
    """
    notes = notes_of(ablation, cells, about)
    record = {
        "ablation": ablation.name,
        "title": ablation.title,
        "paper": ablation.source,
        "about": about,
        "notes": notes,
        "cells": list(cells),
    }
    files = [folder / f"table.{suffix}" for suffix in ("json", "csv", "md")]
    write_text(files[0], json.dumps(record, indent=1) + "\n")
    write_csv(files[1], [_flat(cell) for cell in cells])
    header, rows = arranged(ablation, cells)
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(
        f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |" for line in lines
    )
    write_text(files[2], f"# {ablation.title}\n\n{table}\n\n" + "".join(f"- {note}\n" for note in notes))
    return files


def _words(cell: dict[str, Any] | None, measure: str) -> str:
    if cell is None or cell[f"{measure}_mean"] is None:
        return "failed" if cell is not None and cell["failure"] and measure == "accuracy" else ""
    mean, std = cell[f"{measure}_mean"], cell[f"{measure}_std"]
    if measure in SHARES:
        return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")
    if measure in ("trainable_parameters", "train_images"):
        return f"{mean:,.0f}"
    return f"{mean:.3g}"


def _has_filled_classes(cell: dict[str, Any]) -> bool:
    """Whether the smallest classes of a long tail would have no image if each did not get at least one."""
    chosen, largest = cell["subset"], cell["largest_class_mean"]
    if largest is None or chosen is None or chosen["kind"] != "imbalance":
        return False
    return bool(largest < chosen["value"])


def _append(header: list[str], lines: list[list[str]], name: str, words: Sequence[str]) -> None:
    header.append(name)
    for line, word in zip(lines, words, strict=True):
        line.append(word)


def _mean_of_lists(lists: Sequence[Sequence[float | None]]) -> list[float | None] | None:
    """Entry by entry; ``None`` where an entry is missing in one of them."""
    if not lists:
        return None
    columns = zip(*lists, strict=True)
    return [None if None in column else statistics.fmean(column) for column in columns]


def _normalize_columns(cells: Sequence[dict[str, Any]]) -> None:
    """Add ``normalized``: 0 for the lowest accuracy of the column, 1 for the highest; 1 where all are equal."""
    for column in {cell["column"] for cell in cells}:
        own = [cell for cell in cells if cell["column"] == column]
        means = [cell["accuracy_mean"] for cell in own if cell["accuracy_mean"] is not None]
        for cell in own:
            mean = cell["accuracy_mean"]
            spread = max(means) - min(means) if means else 0.0
            cell["normalized"] = None if mean is None else (mean - min(means)) / spread if spread else 1.0


def _flat(cell: dict[str, Any]) -> dict[str, Any]:
    """A row of the csv file: nested values as json."""
    nested = (dict, list)
    return {name: json.dumps(value) if isinstance(value, nested) else value for name, value in cell.items()}
