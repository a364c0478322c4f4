"""Work that is not ours: what changes here is the machine, and :mod:`benchmarks.regressions` divides by it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.conftest import Measure

pytestmark = pytest.mark.benchmark(group="reference")


def test_copy(measure: Measure, device: torch.device) -> None:
    source = torch.randn((1 << 28) if device.type == "cuda" else (1 << 25), device=device)
    target = torch.empty_like(source)
    measure(lambda: target.copy_(source))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_matmul(measure: Measure, device: torch.device, dtype: torch.dtype) -> None:
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    measure(lambda: a @ b)
