"""The folder of a training run: its files, and which of them survive what.

A run that prunes prompts (:mod:`spt_fast.pruned_training`) is two runs in folders of their own, with the record of what
was pruned beside them.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from spt_fast.errors import CheckpointError, InputError
from spt_fast.files import atomic_path, remove_leftovers, write_text

# The last entry tells that there is a run.
RESULTS = (
    "checkpoint.pt",
    "best.safetensors",
    "last.safetensors",
    "metrics.csv",
    "summary.json",
    "config.json",
)
PRUNED_PARTS = ("trained", "rewound")
PRUNED_RESULTS = ("pruning.json", "start.safetensors")
# What the command line keeps of how prompts started.
START = ("prompts.partial", "prompts.safetensors")
# TensorBoard draws what stands before a slash into one group.
EVENT_NAMES = {
    "train_loss": "train/loss",
    "train_accuracy": "train/accuracy",
    "val_loss": "val/loss",
    "val_accuracy": "val/accuracy",
}


def holds_run(folder: Path) -> bool:
    """Whether there is a run of either kind."""
    return (folder / RESULTS[-1]).exists() or holds_pruned_run(folder)


def holds_pruned_run(folder: Path) -> bool:
    """Whether there is a run that prunes prompts."""
    return (folder / PRUNED_RESULTS[-1]).exists()


def refuse_to_replace(folder: Path) -> None:
    """Raise :class:`InputError` if a run is in ``folder`` already."""
    if holds_run(folder):
        raise InputError(
            f"output {folder} already holds a run; resume it, overwrite it or name another folder"
        )


def refuse_other_kind(folder: Path, *, prunes: bool) -> None:
    """Raise :class:`InputError` if the run in ``folder`` cannot be gone on with by one that prunes prompts, or by one
    that does not."""
    if holds_run(folder) and holds_pruned_run(folder) != prunes:
        here, asked = ("does not prune", "does") if prunes else ("prunes", "does not")
        raise InputError(f"the run in {folder} {here} prompts and this call {asked}")


def remove_results(folder: Path) -> None:
    """Remove what a run of either kind has left in ``folder``; what its prompts started from stays."""
    if holds_pruned_run(folder):
        for part in PRUNED_PARTS:
            remove_results(folder / part)
            _remove_empty(folder / part)
        for name in PRUNED_RESULTS:
            (folder / name).unlink(missing_ok=True)
    for stale in (*folder.glob("tensorboard/events.*"), *folder.glob("snapshots/*.safetensors")):
        stale.unlink()
    for inner in (folder / "tensorboard", folder / "snapshots"):
        remove_leftovers(inner)
        _remove_empty(inner)
    remove_leftovers(folder)
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)


def remove_run(folder: Path) -> None:
    """Remove the run in ``folder``, if there is one, and what its prompts started from."""
    if holds_run(folder):
        for name in START:
            (folder / name).unlink(missing_ok=True)
        remove_results(folder)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not there, or holds what is not of a run
        folder.rmdir()


class RunFolder:
    """The files of a run, as one of its processes sees them.

    Args:
        path: the folder.
        writes: whether this process writes; the others only look.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self._state_file = path / "checkpoint.pt"
        self._log: SummaryWriter | None = None

    def has_state(self) -> bool:
        """Whether there is something to go on from.

        Raises:
            InputError: the run here prunes prompts, and is gone on with as a whole.
        """
        refuse_other_kind(self.path, prunes=False)
        return self._state_file.exists()

    def refuse_to_replace(self) -> None:
        """Raise :class:`InputError` if a run is here already."""
        if self.writes:
            refuse_to_replace(self.path)

    def open(self, config: dict[str, Any], *, step: int) -> None:
        """Begin to write after ``step`` steps: what an earlier run left goes if there are none."""
        if not self.writes:
            return
        if step == 0:
            remove_results(self.path)
        for folder in (self.path, self.path / "snapshots"):
            remove_leftovers(folder)
        self.write_json("config.json", config)
        self._log = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the saved state.

        Warns:
            RuntimeWarning: it cannot be written, because the disk is full for example; the one before is kept.
        """
        # Written by Python, whose errors say what is wrong with the disk.
        packed = io.BytesIO()
        torch.save(state, packed)
        try:
            with atomic_path(self._state_file) as temporary:
                temporary.write_bytes(packed.getbuffer())
        except OSError as error:
            kept = "the one before it is kept" if self._state_file.exists() else "there is none before it"
            warnings.warn(
                f"the state of training could not be saved in {self.path}: {error.strerror}; {kept}, training goes on",
                RuntimeWarning,
                stacklevel=3,
            )

    def load_state(self, device: torch.device) -> dict[str, Any]:
        """The saved state.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            state = torch.load(self._state_file, map_location=device, weights_only=True)
            state["record"]
        except Exception as error:  # damaged bytes make torch.load raise nearly anything
            raise CheckpointError(
                f"{self._state_file} is not the state of a training run: {error}"
            ) from error
        return state

    def log_batches(self, totals: list[tuple[int, Tensor]]) -> None:
        """The mean losses of batches, given as ``(step, [summed loss, hits, images])``: one copy from the device."""
        if self._log is None or not totals:
            return
        rows = torch.stack([each for _, each in totals]).cpu()
        for (step, _), (loss, _, images) in zip(totals, rows.tolist(), strict=True):
            self._log.add_scalar("train/batch_loss", loss / max(1.0, images), step)

    def log_epoch(self, row: dict[str, Any], metrics: list[dict[str, Any]]) -> None:
        """The numbers of an epoch, and the table of all of them."""
        if self.writes:
            self._write_csv("metrics.csv", metrics)
        if self._log is not None:
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    self._log.add_scalar(EVENT_NAMES.get(name, name), value, row["epoch"])

    def close(self, summary: dict[str, Any]) -> None:
        """The run is over."""
        if self._log is not None:
            self._log.close()
        if self.writes:
            self.write_json("summary.json", summary)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def _write_csv(self, name: str, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / name, text.getvalue())
