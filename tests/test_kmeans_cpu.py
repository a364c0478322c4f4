"""The C++ backend of the k-means ops: every instruction set this processor has, against distances in float64."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kmeans_judge import check
from torch import Tensor

from spt_fast.kernels import BackendError, kmeans_cpu
from spt_fast.kernels import kmeans_step as any_kmeans_step
from spt_fast.kernels.kmeans_cpu import (
    ENVIRONMENT_VARIABLE,
    instruction_set,
    instruction_sets,
    kmeans_assign,
    kmeans_step,
)

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the native library was not built")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=instruction_sets())
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, request.param)
    assert instruction_set() == request.param
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(count: int, tokens: int, width: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``tokens`` tokens around ``count`` centres, and the centres."""
    centers = spread * noise(count, width, seed=seed)
    labels = torch.randint(count, (tokens,), generator=torch.Generator().manual_seed(seed + 1))
    return centers[labels] + noise(tokens, width, seed=seed + 2), centers


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "k", "width"),
    [
        (0, 3, 5),
        (1, 1, 1),
        (3, 2, 7),
        (63, 5, 32),
        (64, 20, 192),
        (65, 33, 200),
        (67, 100, 384),
        (130, 256, 64),
        (131, 300, 776),
        (301, 20, 768),
        (4099, 20, 48),  # more than one slice
        (10_000, 4, 16),
    ],
)
def test_agrees_with_the_judge(tokens: int, k: int, width: int, dtype: torch.dtype) -> None:
    x = noise(tokens, width, seed=tokens).to(dtype)
    check(kmeans_assign, kmeans_step, x, noise(k, width, seed=k))


@pytest.mark.usefixtures("instructions")
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_agrees_with_the_judge_on_any_shape_stride_and_offset(data: st.DataObject) -> None:
    layers, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 150))
    k, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
    seed = data.draw(st.integers(0, 2**31))
    view = data.draw(
        st.sampled_from(["plain", "every other feature", "transposed", "layers inside", "a part"])
    )
    shape = {
        "plain": (layers, tokens, width),
        "every other feature": (layers, tokens, 2 * width),
        "transposed": (layers, width, tokens),
        "layers inside": (tokens, layers, width),
        "a part": (layers, tokens + 2, width + 3),
    }[view]
    x = noise(*shape, seed=seed) + data.draw(st.sampled_from([0.0, 1.0, 30.0]))
    x = x.to(data.draw(st.sampled_from(DTYPES)))
    x = {
        "plain": x,
        "every other feature": x[..., ::2],
        "transposed": x.transpose(1, 2),
        "layers inside": x.transpose(0, 1),
        "a part": x[:, 1 : tokens + 1, 2 : width + 2],
    }[view]
    centroids = noise(layers, k, width, seed=seed + 1) + x.float().mean().nan_to_num()
    check(kmeans_assign, kmeans_step, x, centroids)
    if layers == 1:
        check(kmeans_assign, kmeans_step, x[0], centroids[0])


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 3.0, 300.0])
def test_tight_clusters_far_apart(offset: float, dtype: torch.dtype) -> None:
    x, centers = clusters(6, 300, 48, spread=1000.0)
    x = (offset + x).to(dtype)
    check(kmeans_assign, kmeans_step, x, offset + centers)
    check(
        kmeans_assign,
        kmeans_step,
        x,
        torch.cat([offset + centers, 10 * centers]) + 1e-2 * noise(12, 48, seed=9),
    )


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("width", [16, 48, 50])
def test_only_the_few_tokens_that_cancel_are_measured_directly(width: int) -> None:
    # Half of the tokens lie on their centroids, but for a little: there |x|^2 + |c|^2 - 2 x.c has no digits left.
    x = noise(200, width)
    x[:100] = 100 * x[:100] + 1e-3 * noise(100, width, seed=1)
    centroids = torch.cat([100 * noise(200, width)[:100], noise(3, width, seed=2)])
    check(kmeans_assign, kmeans_step, x, centroids)


@pytest.mark.usefixtures("instructions")
def test_equal_centroids_and_whole_numbers_tie_to_the_lowest_index() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-3, 4, (500, 20), generator=generator)
    centroids = torch.randint(-3, 4, (47, 20), generator=generator).float().repeat(3, 1)
    exact = (x[:, None] - centroids[None]).square().sum(dim=2)
    lowest = exact.min(dim=1).indices
    lowest = (exact == exact.min(dim=1, keepdim=True).values).int().argmax(dim=1)
    for dtype in DTYPES:
        labels, sq_distances = kmeans_assign(x.to(dtype), centroids)
        assert torch.equal(labels, lowest) and torch.equal(sq_distances, exact.min(dim=1).values)
        sums, counts, inertia = kmeans_step(x.to(dtype), centroids)
        assert torch.equal(sums, torch.zeros(141, 20).index_add(0, lowest, x.float()))
        assert torch.equal(counts, torch.bincount(lowest, minlength=141))
        assert inertia == exact.min(dim=1).values.double().sum()


@pytest.mark.usefixtures("instructions", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads_and_repeat(dtype: torch.dtype) -> None:
    x, centroids = noise(3, 9001, 40).to(dtype), noise(3, 7, 40, seed=1)
    torch.set_num_threads(1)
    alone = [*kmeans_step(x, centroids), *kmeans_assign(x, centroids)]
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        for one, other in zip(alone, [*kmeans_step(x, centroids), *kmeans_assign(x, centroids)], strict=True):
            assert torch.equal(one, other)


@pytest.mark.usefixtures("instructions")
def test_long_sums_of_equal_tokens_lose_no_digits() -> None:
    # In one long float32 sum every addition would be rounded the same way.
    x = torch.full((30_000, 3), 1001.37)
    sums, counts, _ = kmeans_step(x, torch.zeros(1, 3))
    torch.testing.assert_close(sums[0].double() / counts[0], x[0].double(), rtol=2e-6, atol=0)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_tokens_do_no_harm(bad: float) -> None:
    x = noise(200, 30)
    x[::7] = bad
    labels, _ = kmeans_assign(x, noise(9, 30, seed=1))
    assert ((labels >= 0) & (labels < 9)).all()
    _, counts, _ = kmeans_step(x, noise(9, 30, seed=1))
    assert counts.sum() == 200


@pytest.mark.usefixtures("instructions")
def test_half_floats_of_every_size_are_read_right() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype)
        x = x[x.isfinite() & (x.abs() < 1e15)]
        x = x[: len(x) // 17 * 17].reshape(-1, 17)
        for tokens in (x, x.T.contiguous().T):  # by vectors, and one by one
            sums, _, _ = kmeans_step(tokens[:40], torch.zeros(1, 17))
            torch.testing.assert_close(sums[0], tokens[:40].double().sum(dim=0).float(), rtol=1e-5, atol=0)
            for row in (0, 57, len(x) - 1):
                assert torch.equal(
                    kmeans_step(tokens[row : row + 1], torch.zeros(1, 17))[0], x[row : row + 1].float()
                )


def test_x_is_neither_copied_nor_changed() -> None:
    x, centroids = noise(50, 70)[:, ::2], noise(4, 35, seed=1)
    kept = x.clone()
    kmeans_step(x, centroids)
    assert torch.equal(x, kept)
    expanded = noise(1, 64).expand(2_000_000_000, 64)  # 512 GB, were it copied
    assert kmeans_cpu.why_not(expanded, noise(2, 64)) is None
    labels, _ = kmeans_assign(expanded[:5000], noise(2, 64))
    assert len(labels.unique()) == 1


def test_no_layers() -> None:
    sums, counts, inertia = kmeans_step(noise(0, 5, 3), noise(0, 2, 3))
    assert (sums.shape, counts.shape, inertia.shape) == ((0, 2, 3), (0, 2), (0,))
    labels, sq_distances = kmeans_assign(noise(0, 5, 3), noise(0, 2, 3))
    assert labels.shape == sq_distances.shape == (0, 5)


@pytest.mark.usefixtures("threads")
def test_several_python_threads_may_call_at_once() -> None:
    torch.set_num_threads(2)
    inputs = [(noise(9000, 20, seed=seed), noise(5, 20, seed=100 + seed)) for seed in range(4)]
    wanted = [kmeans_step(x, centroids) for x, centroids in inputs]
    wrong = []

    def work(number: int) -> None:
        for _ in range(20):
            found = kmeans_step(*inputs[number])
            if not all(torch.equal(one, other) for one, other in zip(found, wanted[number], strict=True)):
                wrong.append(number)

    callers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=20)
    assert not wrong and not any(caller.is_alive() for caller in callers)


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    torch.set_num_threads(3)
    x, centroids = noise(15_000, 4), noise(2, 4, seed=1)
    before = kmeans_step(x, centroids)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # should it wait for threads that it does not have
        os._exit(0 if torch.equal(kmeans_step(x, centroids)[0], before[0]) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert torch.equal(kmeans_step(x, centroids)[0], before[0])


def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "abacus")
    with pytest.raises(
        BackendError, match="SPT_FAST_INSTRUCTION_SET=abacus: there is no such instruction set"
    ):
        any_kmeans_step(noise(5, 4), noise(2, 4), backend="cpu")
    built = kmeans_cpu.built_instruction_sets
    monkeypatch.setattr(
        kmeans_cpu, "built_instruction_sets", lambda library: {**built(library), "abacus": False}
    )
    with pytest.raises(BackendError, match="this processor does not have these instructions"):
        any_kmeans_step(noise(5, 4), noise(2, 4), backend="cpu")


def test_says_why_there_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing.so"
    assert "was not built (" in kmeans_cpu.load(missing)[1] and "cmake" in kmeans_cpu.load(missing)[1]
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    assert "cannot be loaded" in kmeans_cpu.load(broken)[1]
    monkeypatch.setattr(kmeans_cpu, "ABI_VERSION", -1)
    kmeans_cpu.load.cache_clear()
    assert "another version" in kmeans_cpu.load(kmeans_cpu.LIBRARY)[1]
    assert "another version" in kmeans_cpu.why_not(noise(5, 4), noise(2, 4))
    assert instruction_sets() == []
    monkeypatch.undo()
    kmeans_cpu.load.cache_clear()
    assert kmeans_cpu.why_not(noise(5, 4), noise(2, 4)) is None


def test_tokens_elsewhere_are_refused() -> None:
    assert kmeans_cpu.why_not(noise(5, 4).to("meta"), noise(2, 4)) == "the tokens are on meta"
    assert os.environ.get(ENVIRONMENT_VARIABLE) is None
