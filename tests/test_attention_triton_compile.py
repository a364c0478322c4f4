"""The attention kernels compile for the GPUs they may meet in the shapes that the launcher chooses, and fit on them."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from triton_compile import SHARED_MEMORY, Resources, attention_resources, check_fits

pytest.importorskip("triton")

from spt_fast.kernels.attention_triton import Shape, key_shapes, query_shapes

HALF, FLOAT = torch.bfloat16, torch.float32
KERNELS = ("forward_kernel", "queries_kernel", "keys_kernel")
WIDTHS = (32, 48, 64, 80, 88, 96, 128)
FEW_WIDTHS = (64, 80, 128)  # where compiling for all would take too long
MANY = 1000  # rows, so that blocks are as large as they get


def shapes(
    kernel: str, width: int, dtype: torch.dtype, architecture: int, queries: int = MANY, keys: int = MANY
) -> tuple[Shape, ...]:
    capability = divmod(architecture, 10)
    if kernel == "keys_kernel":
        return key_shapes(width, dtype, capability, queries, keys)
    return query_shapes(kernel, width, dtype, capability, queries)


def resources(
    kernel: str, shape: Shape, width: int, dtype: torch.dtype, architecture: int, own: bool = False
) -> Resources:
    """With all there is to do: sets by index, of different lengths, and sums in chunks; or for an image's own keys."""
    more: dict[str, Any] = {}
    if kernel == "forward_kernel":
        more = {"SIGN": -1}
    elif kernel == "keys_kernel":
        more = {"SHARED": False, "partial": not own, "without": ("order", "starts", "lengths") if own else ()}
    return attention_resources(kernel, shape, width, dtype, architecture, **more)


@pytest.mark.parametrize(
    "width, architecture, own",
    [
        *product(WIDTHS, (80,), (True,)),  # take more registers than prompts
        *product(FEW_WIDTHS, (90,), (True, False)),
        *product(WIDTHS, (100,), (False,)),
    ],
)
def test_keys_of_every_width(width: int, architecture: int, own: bool) -> None:
    shape = shapes("keys_kernel", width, HALF, architecture)[0]
    check_fits(resources("keys_kernel", shape, width, HALF, architecture, own), architecture)


@pytest.mark.parametrize("kernel", ["forward_kernel", "queries_kernel"])
@pytest.mark.parametrize("width, architecture", [*product(WIDTHS, (80, 90)), *product(FEW_WIDTHS, (100,))])
def test_queries_of_every_width(kernel: str, width: int, architecture: int) -> None:
    shape = shapes(kernel, width, HALF, architecture)[0]
    check_fits(resources(kernel, shape, width, HALF, architecture), architecture)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize(
    "kernel, width", [("forward_kernel", 128), ("queries_kernel", 80), ("keys_kernel", 128)]
)
def test_float32(kernel: str, width: int, architecture: int) -> None:
    shape = shapes(kernel, width, FLOAT, architecture)[0]
    check_fits(resources(kernel, shape, width, FLOAT, architecture), architecture)


@pytest.mark.parametrize("kernel, architecture", product(KERNELS, (80, 90)))
def test_other_shapes_to_choose_from(kernel: str, architecture: int) -> None:
    """Those with the largest blocks, and those for a single query and a few prompts."""
    for shape in {
        max(shapes(kernel, 64, HALF, architecture), key=lambda each: each.queries * each.keys * each.stages),
        shapes(kernel, 64, HALF, architecture, queries=1, keys=5)[0],
    }:
        check_fits(resources(kernel, shape, 64, HALF, architecture), architecture)


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_are_on_their_way_from_memory_while_others_are_worked_at(kernel: str) -> None:
    """Only where the compiler sees that rows can be read 16 bytes at once does it give a stage room of its own."""
    shape = Shape(32, 64, 2, 4)
    two, three = (
        resources(kernel, shape._replace(stages=stages), 64, HALF, 90, own=True) for stages in (2, 3)
    )
    rows = shape.queries if kernel == "keys_kernel" else shape.keys
    assert three.shared - two.shared >= 2 * 64 * 2 * rows  # of two tensors, 64 features of 2 bytes


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_rows_of_the_output_and_its_gradient(architecture: int) -> None:
    shape = query_shapes("delta_kernel", 128, HALF, divmod(architecture, 10), MANY)[0]
    took = attention_resources("delta_kernel", shape, 128, HALF, architecture)
    assert took.stack == 0 and took.registers > 16
