"""kmeans_step and kmeans_assign, on every backend that can run on this machine, against distances formed one by one."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kmeans_judge import check
from token_samples import clusters, noise
from torch import Tensor

from spt_fast.kernels import BackendError, available_backends, kmeans_assign, kmeans_step

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = [None, *available_backends()["kmeans_step"]]
OPS = [kmeans_step, kmeans_assign]


def judge(x: Tensor, centroids: Tensor, backend: str | None = None) -> None:
    check(partial(kmeans_assign, backend=backend), partial(kmeans_step, backend=backend), x, centroids)


def equal(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(left, right, strict=True))


# --- Every backend, every form of input --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "k", "width"),
    [
        (0, 3, 5),
        (1, 1, 1),
        (1, 4, 17),
        (7, 20, 3),
        (64, 1, 48),
        (65, 7, 33),
        (129, 300, 32),
        (1023, 13, 200),
        (500, 5, 776),
        (257, 100, 384),
    ],
)
def test_ops_are_right(tokens, k, width, dtype, backend):
    judge(noise(tokens, width, seed=tokens).to(dtype), noise(k, width, seed=k), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layers", "tokens"), [(0, 5), (2, 0), (1, 70), (3, 301)])
def test_ops_are_right_with_layers(layers, tokens, dtype, backend):
    judge(noise(layers, tokens, 19).to(dtype), noise(layers, 7, 19, seed=1), backend)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "packed": lambda x: x,
    "every other column": lambda x: x[..., ::2],
    "every third token": lambda x: x[..., ::3, 1:],
    "transposed": lambda x: x.transpose(-1, -2),
    "one token expanded": lambda x: x[..., :1, :].expand(*x.shape[:-2], min(33, 33 * x.shape[-2]), -1),
    "one feature expanded": lambda x: x[..., :1].expand(*x.shape[:-1], 9),
    "slice of a fused tensor": lambda x: x.unflatten(-1, (2, -1))[..., 1, :],
    "layers and tokens swapped": lambda x: x.transpose(0, 1) if x.ndim == 3 else x,
}


@settings(max_examples=150, deadline=None)
@given(
    layers=st.sampled_from([None, None, 1, 3]),
    tokens=st.integers(0, 150),
    width=st.integers(1, 40).map(lambda half: 2 * half),
    k=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    view=st.sampled_from(sorted(VIEWS)),
    offset=st.sampled_from([0.0, 3.0, -100.0]),
    scale=st.sampled_from([1.0, 0.01, 30.0]),
    near=st.booleans(),
    seed=st.integers(0, 2**31),
    backend=st.sampled_from(BACKENDS),
)
def test_ops_are_right_for_any_shape_stride_and_offset(
    layers, tokens, width, k, dtype, view, offset, scale, near, seed, backend
):
    shape = (tokens, width) if layers is None else (layers, tokens, width)
    x = VIEWS[view]((scale * noise(*shape, seed=seed) + offset).to(dtype))
    assume(x.shape[-1] > 0)
    if near and x.shape[-2]:  # centres among the tokens: tight clusters, exact hits, equal centres
        rows = torch.randint(x.shape[-2], (k,), generator=torch.Generator().manual_seed(seed))
        centroids = x[..., rows, :].float()
    else:
        centroids = scale * noise(*x.shape[:-2], k, x.shape[-1], seed=seed + 1) + offset
    judge(x, centroids, backend)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_on_whole_numbers_the_ops_are_exact_and_ties_go_to_the_lowest_index(data):
    # Small whole numbers are exact in every dtype, and full of ties: equal centroids, and tokens halfway between two.
    tokens, k, width = data.draw(st.tuples(st.integers(0, 50), st.integers(1, 12), st.integers(1, 6)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.randint(-3, 4, (tokens, width), generator=generator).to(data.draw(st.sampled_from(DTYPES)))
    centroids = torch.randint(-3, 4, (k, width), generator=generator).float()
    to_each = (x.long()[:, None] - centroids.long()).square().sum(dim=2)
    nearest = to_each.min(dim=1).values if tokens else torch.zeros(0, dtype=torch.int64)
    labels = [row.index(min(row)) for row in to_each.tolist()]
    sums = torch.zeros(k, width, dtype=torch.int64)
    for token, label in zip(x.long(), labels, strict=True):
        sums[label] += token
    for backend in BACKENDS:
        found, sq_distances = kmeans_assign(x, centroids, backend=backend)
        step = kmeans_step(x, centroids, backend=backend)
        assert found.tolist() == labels
        assert sq_distances.tolist() == nearest.tolist()
        assert step.sums.tolist() == sums.tolist()
        assert step.counts.tolist() == [labels.count(cluster) for cluster in range(k)]
        assert step.inertia.item() == nearest.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layer_axis_equals_the_layers_one_by_one(dtype, backend):
    x, centroids = noise(3, 301, 19).to(dtype), noise(3, 7, 19, seed=1)
    for op in OPS:
        together = op(x, centroids, backend=backend)
        for layer in range(3):
            alone = op(x[layer], centroids[layer], backend=backend)
            for ours, theirs in zip(together, alone, strict=True):
                torch.testing.assert_close(ours[layer], theirs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_results_repeat_bit_for_bit(op, dtype, backend):
    x, centroids = noise(5000, 40).to(dtype), noise(9, 40, seed=1)
    first = op(x, centroids, backend=backend)
    assert all(equal(first, op(x, centroids, backend=backend)) for _ in range(3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_common_offset_costs_no_precision(dtype, backend):
    x = (clusters(8, 900, 24, spread=1.0) * 0.05 + 300).to(dtype)
    judge(x, (x[::113].float() + 1e-3 * noise(8, 24)).contiguous(), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tight_clusters_far_apart_keep_their_small_distances(dtype, backend):
    x = (clusters(4, 400, 64, spread=3000.0) * 0.01).to(dtype)
    centers = torch.stack([x[row].float() for row in range(4)])
    judge(x, centers + 1e-3, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stray_centroids_cost_no_precision(backend):
    centroids = noise(5, 6)
    centroids[:3] = torch.tensor([[1e4], [3e4], [1e5]])
    x = noise(500, 6, seed=1)
    labels, _ = kmeans_assign(x, centroids, backend=backend)
    exact = torch.cdist(x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(labels, exact.argmin(dim=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_not_kept_in_the_type_of_the_tokens(dtype, backend):
    step = kmeans_step(torch.full((5000, 2), 1001.0).to(dtype), torch.zeros(1, 2), backend=backend)
    value = float(torch.tensor(1001.0).to(dtype))
    assert step.sums.tolist() == [[5000 * value] * 2]
    assert step.inertia.item() == pytest.approx(5000 * 2 * value**2, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_unsound_tokens_do_no_harm_beyond_themselves(value, backend):
    # The estimators refuse them; the ops, which do not look, must at least stay within their bounds.
    x = noise(70, 12)
    x[33] = value
    labels, _ = kmeans_assign(x, noise(5, 12, seed=1), backend=backend)
    assert labels.min() >= 0 and labels.max() < 5
    counts = kmeans_step(x, noise(5, 12, seed=1), backend=backend).counts
    assert counts.sum() == 70 and counts.min() >= 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_op_leaves_its_inputs_alone(backend):
    x, centroids = noise(50, 4), noise(3, 4, seed=1)
    kept = x.clone(), centroids.clone()
    for op in OPS:
        op(x, centroids, backend=backend)
    assert torch.equal(x, kept[0]) and torch.equal(centroids, kept[1])


# --- The door ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("x", "centroids", "message"),
    [
        (torch.zeros(5), torch.zeros(2, 5), r"x must be \[T, D\] or \[L, T, D\], got \[5\]"),
        (
            torch.zeros(5, 3, dtype=torch.float64),
            torch.zeros(2, 3),
            "x must be float32, float16 or bfloat16, got .*64",
        ),
        (torch.zeros(5, 3), torch.zeros(2, 3).half(), "centroids must be float32, got torch.float16"),
        (
            torch.zeros(5, 3),
            torch.zeros(2, 4),
            r"centroids must be \['K', 3\] to match x \[5, 3\], got \[2, 4\]",
        ),
        (torch.zeros(5, 3), torch.zeros(1, 2, 3), r"centroids must be \['K', 3\] .*got \[1, 2, 3\]"),
        (torch.zeros(2, 5, 3), torch.zeros(3, 2, 3), r"centroids must be \[2, 'K', 3\] .*got \[3, 2, 3\]"),
        (torch.zeros(5, 3), torch.zeros(0, 3), "at least one centroid, got K=0"),
        (torch.zeros(5, 0), torch.zeros(2, 0), r"x must have at least one feature, got \[5, 0\]"),
        (torch.zeros(5, 3), torch.zeros(2, 3, device="meta"), "centroids are on meta and x on cpu"),
    ],
)
def test_ops_refuse_what_does_not_belong_together(op, x, centroids, message):
    with pytest.raises(ValueError, match=message):
        op(x, centroids)


@pytest.mark.parametrize("op", OPS)
def test_the_backend_is_chosen_by_argument_then_environment(op, monkeypatch):
    x, centroids = noise(9, 2), noise(3, 2, seed=1)
    monkeypatch.delenv("SPT_FAST_BACKEND", raising=False)
    best, reference = op(x, centroids), op(x, centroids, backend="torch")
    with pytest.raises(
        BackendError, match=f"backend=abacus: {op.__name__} has no such backend; it has .*torch"
    ):
        op(x, centroids, backend="abacus")
    monkeypatch.setenv("SPT_FAST_BACKEND", "abacus")
    with pytest.raises(BackendError, match=f"SPT_FAST_BACKEND=abacus: {op.__name__} has no such backend"):
        op(x, centroids)
    assert equal(op(x, centroids, backend="torch"), reference)
    monkeypatch.setenv("SPT_FAST_BACKEND", "torch")
    assert equal(op(x, centroids), reference)
    monkeypatch.setenv("SPT_FAST_BACKEND", "")
    assert equal(op(x, centroids), best)
    assert "torch" in available_backends()[op.__name__]


# --- torch.library and torch.compile -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kmeans_step", "kmeans_assign"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ops_are_well_registered(name, dtype):
    op = getattr(torch.ops.spt_fast, name)
    for backend in BACKENDS:
        torch.library.opcheck(op, (noise(30, 6).to(dtype), noise(4, 6, seed=1), backend))
        torch.library.opcheck(op, (noise(2, 6, 30).to(dtype).mT, noise(2, 4, 6, seed=1), backend))


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_ops_compile_into_one_graph(dynamic):
    def lloyd(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        step = kmeans_step(x, centroids)
        means = step.sums / step.counts.clamp(min=1)[..., None]
        return means, kmeans_assign(x, means)[0]

    torch.compiler.reset()
    compiled = torch.compile(lloyd, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens, k in ((50, 4), (71, 4), (0, 4), (90, 7)):
        x, centroids = noise(tokens, 6), noise(k, 6, seed=1)
        assert equal(compiled(x, centroids), lloyd(x, centroids))


def test_a_compiled_program_asks_the_environment_when_it_runs(monkeypatch):
    monkeypatch.delenv("SPT_FAST_BACKEND", raising=False)
    torch.compiler.reset()
    compiled = torch.compile(kmeans_assign, fullgraph=True, backend="aot_eager")
    compiled(noise(9, 2), noise(3, 2))
    monkeypatch.setenv("SPT_FAST_BACKEND", "abacus")
    with pytest.raises(BackendError, match="SPT_FAST_BACKEND=abacus"):
        compiled(noise(9, 2), noise(3, 2))
