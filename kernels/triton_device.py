"""What the launchers of Triton kernels ask of a machine."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor


def why_not(tensor: Tensor, what: str, kernel: Any) -> str | None:
    """Why Triton kernels cannot run where ``tensor`` is, or ``None``.

    Args:
        tensor: one of the op's; all are on one device.
        what: what the tensor holds, for the message.
        kernel: returns one of the kernels; only called where it matters.
    """
    if tensor.device.type == "cuda":
        if torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return "Triton's tensor-core products need compute capability 8.0"
        return None
    # The kernels are interpreted if the variable was set when they were first needed.
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and is_interpreted(kernel()):
        return None
    return f"{what} are on {tensor.device.type} and Triton's interpreter is off (TRITON_INTERPRET=1)"


def is_interpreted(kernel: Any) -> bool:
    return type(kernel).__name__ == "InterpretedFunction"


def capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


def processors(tensor: Tensor) -> int:
    """Multiprocessors, each of which runs a program or a few at a time."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


def power_of_two(n: int) -> int:
    """The lowest that is at least ``n``."""
    return 1 << (n - 1).bit_length()
