"""How benchmarks take the time, and the ceilings that they compare with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(device: torch.device, work: Callable[..., Any], *arguments: Any) -> float:
    """Seconds until ``work`` is done on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def matmul_peak(device: torch.device, rounds: int = 5) -> float:
    """TFLOP/s of a large bfloat16 product of random numbers, the best of some rounds."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    repeats = 10 if device.type == "cuda" else 1

    def products() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    products()
    return 2 * size**3 * repeats / min(timed(device, products) for _ in range(rounds)) / 1e12
