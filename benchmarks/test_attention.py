"""prompt_attention_packed in the shape of a ViT-S."""

from __future__ import annotations

import pytest
import torch

from benchmarks.conftest import Measure
from spt_fast.devices import choose_device
from spt_fast.kernels import available_backends, prompt_attention_packed

GPU = choose_device().type == "cuda"
BATCH = 64 if GPU else 8
HEADS, WIDTH, TOKENS = 6, 64, 197
FITTING = ("triton", "torch") if GPU else ("torch",)

pytestmark = [
    pytest.mark.parametrize("num_prompts", [20, 100]),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]),
    pytest.mark.parametrize(
        "backend", [name for name in available_backends()["prompt_attention"] if name in FITTING]
    ),
]


def inputs(device: torch.device, dtype: torch.dtype, num_prompts: int) -> list[torch.Tensor]:
    shapes = [(BATCH, TOKENS, 3, HEADS, WIDTH), *[(HEADS, num_prompts, WIDTH)] * 2]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def test_forward(
    measure: Measure, device: torch.device, backend: str, dtype: torch.dtype, num_prompts: int
) -> None:
    qkv, prompt_k, prompt_v = inputs(device, dtype, num_prompts)
    measure(lambda: prompt_attention_packed(qkv, prompt_k, prompt_v, backend=backend))


def test_forward_and_backward(
    measure: Measure, device: torch.device, backend: str, dtype: torch.dtype, num_prompts: int
) -> None:
    leaves = [each.requires_grad_() for each in inputs(device, dtype, num_prompts)]
    upstream = torch.randn(BATCH, TOKENS, HEADS, WIDTH, device=device).to(dtype)

    def work() -> None:
        torch.autograd.grad(prompt_attention_packed(*leaves, backend=backend), leaves, upstream)

    measure(work)
