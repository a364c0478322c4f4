"""The Triton backend of the k-means ops against the judge, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreted import Case, outcomes_of, print_outcomes
from kmeans_judge import check
from torch import Tensor

pytest.importorskip("triton")

from spt_fast.kernels import kmeans_triton

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def judge(x: Tensor, centroids: Tensor) -> None:
    check(kmeans_triton.kmeans_assign, kmeans_triton.kmeans_step, x, centroids)


def shape_case(dtype: torch.dtype, shape: tuple[int, ...], k: int) -> Case:
    return lambda: judge(noise(*shape).to(dtype), noise(*shape[:-2], k, shape[-1], seed=1))


CASES: dict[str, Case] = {
    f"{str(dtype)[6:]}-{'x'.join(map(str, shape))}-{k}": shape_case(dtype, shape, k)
    for dtype, shape, k in [
        (FLOAT, (63, 7), 1),
        (FLOAT, (1, 32), 5),
        (FLOAT, (65, 192), 20),
        (FLOAT, (2, 40, 200), 33),
        (FLOAT, (64, 1), 2),
        (HALF, (64, 200), 2),
        (HALF, (130, 384), 33),
        (HALF, (2, 65, 32), 5),
        (HALF, (70, 1408), 20),
        (HALF, (65, 7), 100),
        (BRAIN, (1, 768), 20),
        (BRAIN, (700, 40), 20),
        (BRAIN, (5, 65, 64), 20),
        (BRAIN, (65, 776), 20),
        (BRAIN, (130, 384), 50),
        (BRAIN, (80, 192), 256),
        (BRAIN, (70, 1536), 9),
        (BRAIN, (63, 32), 300),
        (BRAIN, (0, 8), 3),
        (HALF, (3, 0, 8), 3),
        (FLOAT, (0, 5, 8), 3),
    ]
}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


@case
def every_kind_of_strides() -> None:
    for dtype in (FLOAT, BRAIN):
        base, centroids = noise(3, 40, 24).to(dtype), noise(3, 6, 24, seed=1)
        judge(base.transpose(1, 2), noise(3, 6, 40, seed=1))
        judge(base[:, :5].transpose(0, 1), noise(5, 6, 24, seed=1))
        judge(base[:, ::2], centroids)
        judge(base[..., ::3], centroids[..., :8])
        judge(base[..., 1:17], centroids[..., :16])
        judge(base[:1].expand(3, -1, -1), centroids)
        judge(base[0, :1].expand(70, -1), centroids[0])
        judge(base[0], centroids[0].T.contiguous().T)


@case
def common_offsets() -> None:
    offset = 30 * noise(64, seed=2)
    for dtype in (FLOAT, HALF, BRAIN):
        judge((noise(70, 64) + offset).to(dtype), noise(20, 64, seed=1) + offset)
        judge((noise(70, 64) + 100).to(dtype), noise(20, 64, seed=1) + 100)


@case
def tight_clusters_far_apart() -> None:
    centroids = 50 * noise(10, 64, seed=1)
    for dtype in (FLOAT, HALF, BRAIN):
        tight = (centroids.repeat(7, 1) + 0.01 * noise(70, 64)).to(dtype)
        judge(tight, centroids)
        judge(tight.T.contiguous().T, centroids)  # in two launches
        judge(centroids.to(dtype), centroids.to(dtype).float())


@case
def differences_out_of_range_of_half_precision() -> None:
    far = torch.full((1, 32), 60000.0)
    judge(
        torch.cat([far.repeat(40, 1) + 100 * noise(40, 32), -far + 100 * noise(30, 32)]).half(),
        torch.cat([far, -far]),
    )
    judge(noise(70, 32).half(), torch.tensor([[1.0], [1e6], [1e-7], [-2.0]]) * noise(4, 32, seed=1))


@case
def centroids_closer_than_half_precision_can_say() -> None:
    centroids = noise(5, 32, seed=1).repeat(4, 1) + 2**-10 * noise(20, 32, seed=2)
    for dtype in (HALF, BRAIN):
        judge(noise(130, 32).to(dtype), centroids)


@case
def ties_go_to_the_lowest_index() -> None:
    for dtype in (FLOAT, HALF, BRAIN):
        for k in (20, 130):
            centroids = noise(4, 16, seed=1)[torch.arange(k) % 4]
            x = noise(40, 16).to(dtype)
            judge(x, centroids)
            labels, _ = kmeans_triton.kmeans_assign(x, centroids)
            assert labels.max() < 4
            _, counts, _ = kmeans_triton.kmeans_step(x, centroids)
            assert counts[4:].sum() == 0
        x = torch.tensor([[0.0, 3.0], [1.0, 3.0], [5.0, 3.0]], dtype=dtype)
        labels, _ = kmeans_triton.kmeans_assign(x, torch.tensor([[2.0, 3.0], [0.0, 3.0], [8.0, 3.0]]))
        assert labels.tolist() == [1, 0, 0]


@case
def results_repeat_bit_for_bit() -> None:
    x, centroids = noise(700, 24).bfloat16(), noise(20, 24, seed=1)
    for tokens in (x, x.T.contiguous().T):
        first, second = (kmeans_triton.kmeans_step(tokens, centroids) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@case
def what_is_not_a_number_stays_in_bounds() -> None:
    for dtype in (FLOAT, HALF, BRAIN):
        x = noise(70, 32).to(dtype)
        x[3, 5], x[8, 1], x[66, 0] = float("nan"), float("inf"), -float("inf")
        for k in (5, 70):
            labels, _ = kmeans_triton.kmeans_assign(x, noise(k, 32, seed=1))
            assert labels.min() >= 0 and labels.max() < k
            _, counts, _ = kmeans_triton.kmeans_step(x, noise(k, 32, seed=1))
            assert counts.sum() == 70


@case
def cpu_tensors_are_taken() -> None:
    assert kmeans_triton.why_not(torch.zeros(1, 8), torch.zeros(1, 8)) is None


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """Case -> its traceback, or ``None`` if it went well."""
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name: str, outcomes: dict[str, str | None]) -> None:
    if outcomes[name]:
        pytest.fail(str(outcomes[name]))


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 8)
    assert (
        kmeans_triton.why_not(x, x)
        == "tokens are on cpu and Triton's interpreter is off (TRITON_INTERPRET=1)"
    )


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans_triton, "find_spec", lambda name: None)
    x = torch.zeros(1, 8)
    assert kmeans_triton.why_not(x, x) == "Triton is not installed"


@pytest.mark.parametrize(
    "layers, tiles, processors", [(12, 16576, 132), (24, 700, 132), (5, 3, 132), (300, 1, 132)]
)
def test_programs_fill_the_gpu_in_whole_waves(layers: int, tiles: int, processors: int) -> None:
    slots = kmeans_triton.slots_per_layer(layers, tiles, processors, most_tiles=64)
    assert 1 <= slots <= tiles
    programs = layers * slots
    if slots < tiles and programs > processors:
        idle = -programs % processors
        assert idle < layers, "one more program for each layer would have fitted into the last wave"


if __name__ == "__main__":
    print_outcomes(CASES)
