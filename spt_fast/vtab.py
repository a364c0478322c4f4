"""VTAB-1k: the 19 tasks one after the other, and the table of what came out, as Table 2 and Table S3 report it."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from spt_fast.distributed import process_group
from spt_fast.errors import InputError, MissingFileError
from spt_fast.files import write_text
from spt_fast.progress import Progress
from spt_fast.recipe import DatasetFacts, vtab_tasks
from spt_fast.sweep import Images, SweepResult, sweep
from spt_fast.sweep_folder import write_csv

TASKS: tuple[DatasetFacts, ...] = tuple(vtab_tasks())
GROUPS = ("natural", "specialized", "structured")


@dataclass(frozen=True)
class VtabResult:
    """What :func:`run_vtab` measured; ``None`` stands for what cannot be told.

    Attributes:
        tasks: a dict for each task: ``task`` (its name), ``title``, ``group``, ``test_accuracy_mean`` and
            ``test_accuracy_std`` (over seeds, 0 to 1), ``test_accuracies`` (of every seed), ``val_accuracy_mean``,
            ``parameters`` (the best of the space), ``skipped`` (see :class:`SweepResult`).
        groups: mean accuracy over the tasks of each group; ``None`` unless all of them are there.
        mean: of the three groups, which is not that of the 19 tasks; ``None`` unless all are there.
        output: the folder.
    """

    tasks: list[dict[str, Any]]
    groups: dict[str, float | None]
    mean: float | None
    output: Path

    def as_dict(self) -> dict[str, Any]:
        """What ``vtab.json`` holds."""
        return {"tasks": self.tasks, "groups": self.groups, "mean": self.mean}


def run_vtab(
    backbone: VisionTransformer,
    root: str | os.PathLike[str],
    images: Callable[[Path], Images],
    *,
    output: str | os.PathLike[str],
    tasks: Sequence[str] | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> VtabResult:
    """Run :func:`spt_fast.sweep.sweep` on tasks of VTAB-1k, each in a folder of its own below ``output``.

    The same call goes on after an interruption. After every task ``vtab.csv`` and ``vtab.json`` are written again, with
    the tasks of this call.

    Args:
        backbone: the frozen timm ViT, on the device to work on.
        root: the folder of the tasks' folders, under one of the names they usually have (``TASKS[...].folders``).
        images: opens the folder of a task: ``images(folder)(split, train)``, see :func:`spt_fast.sweep.sweep`.
        output: a folder for everything.
        tasks: names out of :data:`TASKS`; ``None`` takes all 19.
        progress: called with how far the current part of the work is.
        **arguments: of :func:`spt_fast.sweep.sweep`: ``space``, ``seeds``, ``config`` ... With one point in the space
            nothing is chosen: the tasks are trained on their 1,000 images and scored on test.

    Returns:
        :class:`VtabResult`.

    Raises:
        MissingFileError: folders of tasks are not there; the message names all of them.
        InputError: an unknown task, or what :func:`~spt_fast.sweep.sweep` raises.

    Example:
        >>> [task.name for task in TASKS if task.group == "specialized"]
        ['patch_camelyon', 'eurosat', 'resisc45', 'retinopathy']
    """
    output = Path(output)
    folders = find_tasks(root, tasks)
    results: dict[str, SweepResult] = {}
    with process_group(next(backbone.parameters()).device) as (rank, _):
        for task in [task for task in TASKS if task.name in folders]:
            results[task.name] = sweep(
                backbone,
                images(folders[task.name]),
                output=output / task.name,
                progress=_named(progress, task.title),
                **arguments,
            )
            table = _table(results, output)
            if rank == 0:
                write_csv(output / "vtab.csv", _rows(table))
                write_text(output / "vtab.json", json.dumps(table.as_dict(), indent=2) + "\n")
    return table


def find_tasks(root: str | os.PathLike[str], tasks: Sequence[str] | None = None) -> dict[str, Path]:
    """The folders below ``root`` of the named tasks, or of all.

    Raises:
        MissingFileError: some are not there; the message names all of them.
        InputError: an unknown task, or none.
    """
    root = Path(root).expanduser()
    names = [task.name for task in TASKS]
    for name in tasks or []:
        if name not in names:
            raise InputError(f"tasks has {name!r}, expected names among {', '.join(names)}")
    if tasks is not None and not tasks:
        raise InputError("tasks is empty, expected at least one name")
    found, missing = {}, []
    for task in TASKS:
        if tasks is None or task.name in tasks:
            usual = list(dict.fromkeys([*task.folders, task.name]))
            here = next((root / name for name in usual if (root / name).is_dir()), None)
            if here is None:
                missing.append(" or ".join(usual))
            else:
                found[task.name] = here
    if missing:
        raise MissingFileError(
            f"{root} lacks {len(missing)} of {len(found) + len(missing)} folders of VTAB-1k tasks: "
            + ", ".join(missing)
        )
    return found


def _table(results: dict[str, SweepResult], output: Path) -> VtabResult:
    groups: dict[str, float | None] = {}
    for group in GROUPS:
        means = [
            results[task.name].test_accuracy_mean
            for task in TASKS
            if task.group == group and task.name in results
        ]
        whole = len(means) == sum(task.group == group for task in TASKS)
        groups[group] = statistics.fmean(means) if whole else None
    known = [mean for mean in groups.values() if mean is not None]
    rows = [
        {
            "task": task.name,
            "title": task.title,
            "group": task.group,
            "test_accuracy_mean": results[task.name].test_accuracy_mean,
            "test_accuracy_std": results[task.name].test_accuracy_std,
            "test_accuracies": results[task.name].test_accuracies,
            "val_accuracy_mean": results[task.name].val_accuracy_mean,
            "parameters": results[task.name].parameters,
            "skipped": results[task.name].skipped,
        }
        for task in TASKS
        if task.name in results
    ]
    return VtabResult(rows, groups, statistics.fmean(known) if len(known) == len(GROUPS) else None, output)


def _rows(table: VtabResult) -> list[dict[str, Any]]:
    """The lines of ``vtab.csv``: the tasks, then the means of the groups that are complete, then their mean."""
    shown = ("task", "group", "test_accuracy_mean", "test_accuracy_std", "val_accuracy_mean")
    rows = [
        {**{key: row[key] for key in shown}, "parameters": json.dumps(row["parameters"])}
        for row in table.tasks
    ]
    for group, mean in table.groups.items():
        if mean is not None:
            rows.append({"task": f"mean of {group}", "group": group, "test_accuracy_mean": mean})
    if table.mean is not None:
        rows.append({"task": "mean of groups", "test_accuracy_mean": table.mean})
    return rows


def _named(progress: Progress | None, name: str) -> Progress | None:
    return progress and (lambda stage, done, total: progress(f"{name}: {stage}", done, total))
