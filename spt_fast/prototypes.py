"""Prototypes: the vectors prompts start from, built from the target data's own layer tokens (Sec. 3.3-3.4)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spt_fast.errors import InputError
from spt_fast.files import write_text
from spt_fast.tensor_files import read_tensors, write_tensors

FORMAT = "spt_fast.prototypes.1"


@dataclass
class Prototypes:
    """Start values of prompts, and where they came from.

    Attributes:
        values: float32 ``[L, P, D]`` (deep) or ``[1, P, D]`` (shallow).
        metadata: json-able record: method, backbone, data, seconds and so on.
        counts: int64 ``[L, P]`` tokens of each cluster, where the method clusters.
        inertia: float64 ``[L]`` summed squared distance to the nearest prototype, where the method clusters.

    Example:
        >>> prototypes = Prototypes(torch.randn(12, 20, 192), {"method": "kmeans"})
        >>> {name: tuple(t.shape) for name, t in prototypes.export_vpt().items()}
        {'prompt_embeddings': (1, 20, 192), 'deep_prompt_embeddings': (11, 20, 192)}
    """

    values: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)
    counts: Tensor | None = None
    inertia: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.values.dtype != torch.float32:
            raise InputError(
                f"values must be float32 [L, P, D], got {self.values.dtype} {list(self.values.shape)}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file; an interruption leaves the old file or the new one."""
        tensors = {"values": self.values, "counts": self.counts, "inertia": self.inertia}
        kept = {
            name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None
        }
        write_tensors(path, FORMAT, kept, self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prototypes:
        """Read what :meth:`save` wrote.

        Raises:
            MissingFileError: no such file.
            CheckpointError: not a file of prototypes.
        """
        tensors, metadata = read_tensors(path, FORMAT, "a file of prototypes")
        return cls(tensors["values"], metadata, tensors.get("counts"), tensors.get("inertia"))

    def export_released(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write ``depth_0.txt .. depth_{L-1}.txt`` for the authors' released code: one prototype per line, entries
        separated by commas, with all digits of a float32.

        Returns:
            The files.
        """
        paths = []
        for index, block in enumerate(self.values.cpu().tolist()):
            path = Path(folder) / f"depth_{index}.txt"
            write_text(path, "".join(",".join(f"{entry:.9g}" for entry in prompt) + "\n" for prompt in block))
            paths.append(path)
        return paths

    def export_vpt(self) -> dict[str, Tensor]:
        """The prototypes under the names and shapes of VPT's code: ``prompt_embeddings`` ``[1, P, D]`` and, for deep
        prompts, ``deep_prompt_embeddings`` ``[L-1, P, D]``."""
        exported = {"prompt_embeddings": self.values[:1].clone()}
        if len(self.values) > 1:
            exported["deep_prompt_embeddings"] = self.values[1:].clone()
        return exported
