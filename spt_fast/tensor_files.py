"""Tensors and a json record in one safetensors file: prototypes, adapters, unfinished work."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spt_fast.errors import CheckpointError, MissingFileError
from spt_fast.files import atomic_path


def write_tensors(
    path: str | os.PathLike[str], format: str, tensors: dict[str, Tensor], record: dict[str, Any]
) -> None:
    """Write a file for :func:`read_tensors`; an interruption leaves the old file or the new one.

    Args:
        path: the file.
        format: a name that tells such files from others.
        tensors: contiguous tensors on the CPU, by name.
        record: json-able.

    Raises:
        OSError: it cannot be written; the old file is kept.
    """
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, {"format": format, "json": json.dumps(record)})
        except SafetensorError as error:
            # What the system said, a full disk for example, is in the text alone.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def read_tensors(
    path: str | os.PathLike[str], wanted: str | tuple[str, ...], what: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and json record of one of this package's safetensors files.

    Args:
        path: the file.
        wanted: the format name that must stand in it, or several that may.
        what: how to name such a file in an error.

    Raises:
        MissingFileError: no such file.
        CheckpointError: not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist or is not a file; expected {what}")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not {what}: {error}") from error
    known = (wanted,) if isinstance(wanted, str) else wanted
    if metadata.get("format") not in known:
        raise CheckpointError(
            f"{path} is not {what}: its format is {metadata.get('format')!r}, expected {' or '.join(map(repr, known))}"
        )
    return tensors, json.loads(metadata["json"])
