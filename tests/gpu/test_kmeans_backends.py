"""Every backend of the k-means ops that takes tokens on a GPU, judged there."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kmeans_judge import check
from torch import Tensor

from spt_fast.kernels import kmeans_assign, kmeans_step
from spt_fast.kernels.kmeans import STEP_BACKENDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=["torch", "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in STEP_BACKENDS:
        pytest.skip(f"kmeans_step has no backend {name}")
    probe = torch.zeros(1, 64, device="cuda")
    reason = STEP_BACKENDS[name].why_not(probe, probe)
    if reason is not None:
        pytest.skip(reason)
    return name


def judge(backend: str, x: Tensor, centroids: Tensor) -> None:
    check(partial(kmeans_assign, backend=backend), partial(kmeans_step, backend=backend), x, centroids)


def some(shape: tuple[int, ...], clusters: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens and centroids on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cuda") + 1
    centroids = torch.randn(*shape[:-2], clusters, shape[-1], generator=generator, device="cuda") + 1
    return x.to(dtype), centroids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, clusters",
    [
        ((0, 32), 3),
        ((1, 7), 1),
        ((63, 1), 2),
        ((2, 5003, 192), 20),
        ((2, 5003, 192), 64),
        ((3, 4097, 384), 48),
        ((12, 3001, 768), 20),
        ((5003, 768), 100),
        ((2, 4099, 776), 20),
        ((4099, 1024), 20),
        ((4099, 1280), 20),
        ((1500, 1408), 33),
        ((9001, 200), 256),
        ((3001, 64), 1000),
    ],
)
def test_shapes(backend: str, shape: tuple[int, ...], clusters: int, dtype: torch.dtype) -> None:
    judge(backend, *some(shape, clusters, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(backend: str, dtype: torch.dtype) -> None:
    wide, centroids = some((2, 2000, 400), 20, dtype)
    centroids = centroids[:, :, :192].contiguous()
    for x in (
        wide[:, ::2, 8:200],
        wide[:, :1000, 3:195],
        wide[:, :1000, 1:385:2],
        wide[:, :192, :].transpose(1, 2),
        wide[:1, 5:6, 8:200].expand(2, 300, 192),
    ):
        judge(backend, x, centroids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_tight_clusters(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    whole = torch.randint(-3, 4, (3000, 64), generator=generator, device="cuda")
    centroids = whole[:7].float().repeat(3, 1)
    judge(backend, whole.to(dtype), centroids)
    labels, _ = kmeans_assign(whole.to(dtype), centroids, backend=backend)
    assert int(labels.max()) < 7
    centers = torch.randn(20, 192, generator=generator, device="cuda")
    noise = torch.randn(3000, 192, generator=generator, device="cuda")
    judge(backend, (centers[torch.arange(3000) % 20] + 1e-3 * noise).to(dtype), centers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_repeat_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    x, centroids = some((3, 50_001, 192), 20, dtype)
    first = kmeans_step(x, centroids, backend=backend)
    for _ in range(5):
        for a, b in zip(kmeans_step(x, centroids, backend=backend), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_sums_do_not_drift(backend: str, dtype: torch.dtype) -> None:
    # All of one sign: what is cut off from a long sum would add up.
    x = torch.rand(1_000_000, 64, generator=torch.Generator("cuda").manual_seed(2), device="cuda").to(dtype)
    sums, counts, _ = kmeans_step(x, x[:2].float(), backend=backend)
    assert int(counts.sum()) == len(x)
    torch.testing.assert_close(sums.double().sum(dim=0), x.double().sum(dim=0), rtol=1e-5, atol=0)


def test_on_a_side_stream(backend: str) -> None:
    x, centroids = some((2, 100_003, 384), 20, torch.bfloat16)
    expected = kmeans_step(x, centroids, backend=backend)
    later = torch.empty_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a launch on another stream would not wait for the tokens
        later.copy_(x)
        found = kmeans_step(later, centroids, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_not_finite_tokens_do_no_harm(backend: str) -> None:
    for dtype in DTYPES:
        x, centroids = some((2000, 192), 20, dtype)
        x[::7, 3], x[::11, 5] = float("nan"), float("inf")
        labels, _ = kmeans_assign(x, centroids, backend=backend)
        step = kmeans_step(x, centroids, backend=backend)
        assert int(labels.min()) >= 0 and int(labels.max()) < 20
        assert int(step.counts.sum()) == 2000


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    tokens, width = (1 << 31) // 768 + 100_000, 768
    if torch.cuda.mem_get_info()[0] < 4 * tokens * width:
        pytest.skip("needs more GPU memory")
    x = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")
    x[-70_001:] = 2  # these lie beyond
    centroids = torch.stack([torch.zeros(width), torch.full((width,), 1.5)]).cuda()
    sums, counts, inertia = kmeans_step(x, centroids, backend=backend)
    assert counts.tolist() == [tokens - 70_001, 70_001]
    assert sums.unique(dim=1).tolist() == [[0.0], [140_002.0]]
    assert inertia.item() == 70_001 * 0.25 * width
    labels, sq_distances = kmeans_assign(x, centroids, backend=backend)
    assert torch.equal(labels.bincount(), counts)
    assert sq_distances[-70_002:].unique().tolist() == [0.0, 0.25 * width]
