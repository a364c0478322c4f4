"""Every shape of kernel that the Triton launcher can choose compiles for the GPUs it may meet, and fits on them."""

from __future__ import annotations

import pytest
import torch
from triton_compile import SHARED_MEMORY, check_fits, kmeans_resources, prepare_resources

pytest.importorskip("triton")

from spt_fast.kernels import kmeans_triton

HALF, FLOAT = torch.bfloat16, torch.float32

# The largest sums of each shape that step_config chooses, and the widths that people have.
STEPS = {
    80: [(HALF, 16, 1024), (HALF, 32, 512), (HALF, 50, 256), (FLOAT, 20, 192), (FLOAT, 16, 384)],
    90: [
        (torch.float16, 20, 768),
        (HALF, 20, 768),
        (HALF, 5, 1536),
        (HALF, 32, 1024),
        (HALF, 20, 1280),
        (HALF, 50, 384),
        (FLOAT, 20, 192),
        (FLOAT, 16, 384),
    ],
}
STEPS[100] = STEPS[90]


def tokens(dtype: torch.dtype, width: int, wide: bool) -> torch.Tensor:
    """A tensor without data: rows that can be read 16 bytes at a time, or entries far from each other."""
    if wide:
        return torch.empty(3, 1000, width, dtype=dtype, device="meta")
    return torch.empty(3, width, 1001, dtype=dtype, device="meta").transpose(1, 2)


def check(kernel: str, config: kmeans_triton.Config, x: torch.Tensor, architecture: int) -> None:
    check_fits(kmeans_resources(kernel, config, x, architecture), architecture)


@pytest.mark.parametrize(
    "architecture, dtype, k, width", [(at, *case) for at, cases in STEPS.items() for case in cases]
)
def test_step(architecture: int, dtype: torch.dtype, k: int, width: int) -> None:
    x = tokens(dtype, width, wide=True)
    config = kmeans_triton.step_config(width, k, dtype, True, divmod(architecture, 10))
    assert config is not None
    check("step_kernel", config, x, architecture)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
@pytest.mark.parametrize("wide, width", [(True, 768), (False, 200), (False, 7)])
def test_assign_and_accumulate(architecture: int, dtype: torch.dtype, wide: bool, width: int) -> None:
    x = tokens(dtype, width, wide)
    for per_token, k in ((True, 300), (False, 300), (False, 60)):
        config = kmeans_triton.assign_config(width, k, dtype, wide, divmod(architecture, 10))
        check_fits(
            kmeans_resources("assign_kernel", config, x, architecture, PER_TOKEN=per_token), architecture
        )
    took = kmeans_resources(
        "accumulate_kernel", kmeans_triton.accumulate_config(width, dtype), x, architecture
    )
    assert took.stack == 0 and took.registers > 16


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", [HALF, torch.float16, FLOAT])
def test_prepare(architecture: int, dtype: torch.dtype) -> None:
    took = prepare_resources(1408, dtype, architecture)
    assert took.stack == 0 and took.registers > 16
