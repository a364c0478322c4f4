"""Every backend of prompt_attention on a GPU, judged there."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from attention_judge import inputs, judge
from torch import Tensor

from spt_fast.kernels import attention_triton, prompt_attention, prompt_attention_packed, triton_launch
from spt_fast.kernels.attention import BACKENDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = BACKENDS[name].why_not(*[torch.zeros(1, 64, device="cuda")] * 5)
    if reason is not None:
        pytest.skip(reason)
    return name


# All widths, all dtypes, but not all pairs: most of the time is the compiler's.
@pytest.mark.parametrize(
    "dtype, width",
    [*product([torch.bfloat16], [17, 32, 48, 64, 80, 88, 96, 128]), (torch.float16, 64), (torch.float16, 80)]
    + [(torch.float32, width) for width in (17, 64, 128)],
)
@pytest.mark.parametrize(
    "batch, heads, queries, keys, prompts, sets",
    [
        (65, 3, 197, 197, 100, "shared"),
        (9, 2, 257, 257, 20, "own-lengths"),
        (40, 3, 50, 50, 17, "index-lengths"),
        (7, 4, 1, 197, 200, "shared"),
        (3, 2, 5, 130, 0, "shared"),
        (3, 2, 64, 0, 5, "index"),
    ],
)
def test_shapes(backend: str, dtype: torch.dtype, width: int, batch: int, heads: int, queries: int, keys: int,
                prompts: int, sets: str) -> None:  # fmt: skip
    given = inputs(dtype, batch, heads, queries, keys, prompts, width, sets, device="cuda")
    judge(**given, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(backend: str, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 50, 3, 2, 40, device="cuda").to(dtype).permute(2, 0, 3, 1, 4)
    prompts = [torch.randn(2, 20, 41, device="cuda").to(dtype)[..., 1:] for _ in range(2)]
    judge((q, k, v, *prompts), backend=backend)
    judge((q[..., ::2], k[..., 1:40:2], v[..., 3:23], *(t[..., :20] for t in prompts)), backend=backend)
    judge((q, k[:1].expand(3, -1, -1, -1), v[:, :1].expand(-1, 2, -1, -1), *prompts), backend=backend)


def gradients(backend: str, qkv: Tensor, prompts: list[Tensor], **more: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (qkv, *prompts)]
    out = prompt_attention_packed(*leaves, backend=backend, **more)
    out.backward(torch.ones_like(out) + out.detach())
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


def packed(dtype: torch.dtype, *leading: int) -> tuple[Tensor, list[Tensor]]:
    """Projections of 61 images, and prompts."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(61, 197, 3, 4, 64), *[(*leading, 4, 20, 64)] * 2]
    qkv, *prompts = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes)
    return qkv, prompts


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_repeat_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    index = torch.arange(61, device="cuda") % 3
    for leading, more in (((), {}), ((3,), {"prompt_index": index})):
        if backend == "torch" and more:
            continue  # index_add_ adds in any order
        first = gradients(backend, *packed(dtype, *leading), **more)
        for _ in range(5):
            again = gradients(backend, *packed(dtype, *leading), **more)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_depends_on_what_the_autotuner_prefers(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    query_shapes, key_shapes = attention_triton.query_shapes, attention_triton.key_shapes
    found = []
    for which in range(4):
        monkeypatch.setattr(triton_launch, "_kinds", {})  # or the first choice would be launched again
        for name, shapes in (("query_shapes", query_shapes), ("key_shapes", key_shapes)):

            def only(*arguments: Any, which: int = which, shapes: Any = shapes) -> Any:
                choice = shapes(*arguments)
                return (choice[which % len(choice)],)

            monkeypatch.setattr(attention_triton, name, only)
        found.append(gradients("triton", *packed(dtype)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_in_a_cuda_graph(backend: str) -> None:
    qkv, prompts = packed(torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(backend, qkv, prompts)  # compiles and tunes
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(backend, qkv, prompts)
    qkv.mul_(-1.5)
    graph.replay()
    for a, b in zip(captured, gradients(backend, qkv, prompts), strict=True):
        assert torch.equal(a, b)


def test_compiled(backend: str) -> None:
    qkv, prompts = packed(torch.bfloat16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    compiled = torch.compile(prompt_attention, fullgraph=True)
    torch.testing.assert_close(
        compiled(q, k, v, *prompts, backend=backend), prompt_attention(q, k, v, *prompts, backend=backend)
    )


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    batch, heads, width = 1500, 16, 128
    qkv = torch.empty(batch, 351, 3, heads, width, dtype=torch.bfloat16, device="cuda")
    assert qkv.numel() > 1 << 31
    if torch.cuda.mem_get_info()[0] < 4 * qkv.numel():
        pytest.skip("needs more GPU memory")
    qkv[:-1] = 0
    qkv[-1].normal_()
    prompts = [torch.randn(heads, 5, width, device="cuda").bfloat16() for _ in range(2)]
    last = gradients(backend, qkv[-1:], prompts)
    everything = gradients(backend, qkv, prompts)
    for a, b in zip(last[:2], everything[:2], strict=True):
        torch.testing.assert_close(a[0], b[-1], rtol=1e-2, atol=1e-2)
