"""What is kept on disk while prototypes are being built, so that an interrupted build can go on."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from spt_fast.distributed import from_rank_0, world
from spt_fast.errors import InputError
from spt_fast.tensor_files import read_tensors, write_tensors

FORMAT = "spt_fast.prototypes_checkpoint.2"


class Checkpoint:
    """The states of estimators, by name, and how far the images have been read, in one safetensors file.

    With several processes the first one writes and all go on from what it reads: their states are the same.

    Args:
        path: the file; ``None`` keeps nothing.
        job: json-able record of what is being built; a file of another job is refused.
        resume: take up what ``path`` holds, if it exists; otherwise it is overwritten.
        minutes: how long to wait between two saves.

    Attributes:
        batches: how many batches of images the states have taken in.
        images: how many images the finished estimators saw.

    Raises:
        InputError: ``path`` belongs to another job.
        CheckpointError: ``path`` is something else.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, job: dict[str, Any], resume: bool, minutes: float
    ) -> None:
        self._path = None if path is None else Path(path)
        self._job = json.loads(json.dumps(job))
        self._seconds = 60 * minutes
        self._states: dict[str, dict[str, Tensor]] = {}
        self._last_save = time.monotonic()
        self.batches = 0
        self.images = 0
        if self._path is not None and resume:
            self._load(self._path)

    def state(self, name: str) -> dict[str, Tensor]:
        """The last state that was kept under ``name``; empty if there is none."""
        return self._states.get(name, {})

    @property
    def is_due(self) -> bool:
        """Whether the last save is long enough ago to make the next one worth its time."""
        return self._path is not None and time.monotonic() - self._last_save >= self._seconds

    def save(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Keep ``states``, beside those under other names."""
        self._states |= states
        if self._path is not None and world()[0] == 0:
            tensors = {
                f"{name}/{key}": tensor.cpu().contiguous()
                for name, state in self._states.items()
                for key, tensor in state.items()
            }
            record = {"job": self._job, "batches": self.batches, "images": self.images}
            write_tensors(self._path, FORMAT, tensors, record)
        self._last_save = time.monotonic()

    def remove(self) -> None:
        """The work is done: delete the file."""
        if self._path is not None and world()[0] == 0:
            self._path.unlink(missing_ok=True)

    def _load(self, path: Path) -> None:
        # One process reads: the others may run on machines that do not see the file.
        tensors, record = from_rank_0(
            lambda: (
                read_tensors(path, FORMAT, "a checkpoint of unfinished prototypes")
                if path.exists()
                else ({}, None)
            )
        )
        if record is None:
            return
        for key, value in self._job.items():
            if record["job"].get(key) != value:
                raise InputError(
                    f"{path} was begun with {key}={record['job'].get(key)!r} and this call asks for {key}={value!r}; "
                    "run without resume to start over"
                )
        self.batches, self.images = record["batches"], record["images"]
        for name, tensor in tensors.items():
            owner, key = name.split("/", 1)
            self._states.setdefault(owner, {})[key] = tensor
