"""The sets of prompts that lie in files: of adapters, of prototypes, of a training run from its start to its end."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spt_fast.adapters import Adapter
from spt_fast.errors import InputError, MissingFileError
from spt_fast.prototypes import Prototypes

SNAPSHOT = re.compile(r"epoch-(\d+)")


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and where they came from.

    Attributes:
        name: to be shown.
        file: where they lie.
        values: ``[L, P, D]`` or ``[1, P, D]``.
        origin: the adapter or the prototypes of that file.
        epoch: how many epochs they were trained, in a run; 0 is the start.
    """

    name: str
    file: Path
    values: Tensor
    origin: Adapter | Prototypes
    epoch: int | None = None

    @property
    def counts(self) -> Tensor | None:
        """int64 ``[L, P]``, the tokens of each cluster, where prototypes were clustered."""
        return self.origin.counts if isinstance(self.origin, Prototypes) else None


def prompts_of_adapter(file: Path, name: str, epoch: int | None = None) -> PromptSet:
    """The prompts of an adapter file.

    Raises:
        MissingFileError, CheckpointError: as :meth:`spt_fast.Adapter.load`.
        InputError: its method has no prompts.
    """
    adapter = Adapter.load(file)
    if adapter.prompts is None:
        raise InputError(f"{file} is an adapter of {adapter.method}, which has no prompts to look at")
    return PromptSet(name, file, adapter.prompts, adapter, epoch)


def prompts_of_prototypes(file: Path, name: str, epoch: int | None = None) -> PromptSet:
    """The prototypes of a file.

    Raises:
        MissingFileError, CheckpointError: as :meth:`spt_fast.Prototypes.load`.
    """
    prototypes = Prototypes.load(file)
    return PromptSet(name, file, prototypes.values, prototypes, epoch)


def prompts_of_run(folder: Path) -> list[PromptSet]:
    """The prompts of a training run in the order of epochs: its snapshots, or its start and its last state.

    Raises:
        MissingFileError: no such folder, or no adapter of a run in it.
        InputError: its method has no prompts, or its table of epochs cannot be read.
    """
    sets = {}
    for file in sorted(folder.glob("snapshots/epoch-*.safetensors")):
        number = SNAPSHOT.fullmatch(file.stem)
        if number is not None:
            sets[int(number[1])] = prompts_of_adapter(file, f"epoch {int(number[1])}", int(number[1]))
    last = folder / "last.safetensors"
    if last.is_file():
        epochs = _epochs(folder / "metrics.csv")
        sets.setdefault(epochs, prompts_of_adapter(last, f"epoch {epochs}", epochs))
    if not sets:
        raise MissingFileError(f"{folder} holds no training run: neither last.safetensors nor snapshots")
    start = folder / "prompts.safetensors"
    if 0 not in sets and start.is_file():
        sets[0] = prompts_of_prototypes(start, "epoch 0", 0)
    return [sets[epoch] for epoch in sorted(sets)]


def _epochs(metrics: Path) -> int:
    """How many epochs the last adapter of a run was trained; if interrupted, fewer than were asked for."""
    if not metrics.is_file():
        raise MissingFileError(
            f"{metrics} does not exist; it says how many epochs last.safetensors was trained"
        )
    with metrics.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return int(rows[-1]["epoch"])
    except (IndexError, KeyError, TypeError, ValueError):
        raise InputError(f"{metrics} is not the table of a run's epochs") from None
