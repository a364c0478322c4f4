"""MiniBatchKMeans and MicroClusters: one pass over a stream, judged by what many passes reach."""

import copy
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import sklearn.cluster
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from token_samples import clusters, noise, real_tokens
from torch import Tensor

from spt_fast.clustering import KMeans, MicroClusters, MiniBatchKMeans
from spt_fast.errors import InputError
from spt_fast.kernels import kmeans_step


def streamed(tokens: Tensor, size: int, k: int = 3, seed: int = 0, **parameters) -> MiniBatchKMeans:
    """What an estimator makes of ``[.., T, D]`` that comes ``size`` tokens at a time."""
    estimator = MiniBatchKMeans(k, random_state=seed, **parameters)
    for batch in tokens.split(size, dim=-2):
        estimator.partial_fit(batch)
    return estimator


def reached(tokens: Tensor, centers: Tensor | np.ndarray) -> float:
    return kmeans_step(tokens, torch.as_tensor(centers, dtype=torch.float32)).inertia.item()


def lloyd(tokens: Tensor, k: int, starts: int = 3) -> list[float]:
    """Inertia of k-means to the end, from several seeds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return [KMeans(k, random_state=seed).fit(tokens).inertia_.item() for seed in range(starts)]


# --- How good one pass is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", "sorted"])
@pytest.mark.parametrize("size", [100, 777, 30_000])
def test_one_pass_comes_near_lloyd_on_clustered_tokens(size, order):
    tokens = clusters(8, 30_000, 12, spread=1.5)
    if order == "sorted":  # one cluster after the other
        tokens = tokens[KMeans(8, n_init=3, random_state=0).fit(tokens).labels_.argsort(stable=True)]
    results = []
    for seed in range(3):
        one_pass = streamed(tokens, size, 8, seed)
        assert one_pass.counts_.sum() == 30_000
        assert one_pass.counts_.dtype == torch.int64 and one_pass.cluster_centers_.dtype == torch.float32
        results.append(reached(tokens, one_pass.cluster_centers_))
        # Many passes from here on find little left to gain: it is a settled clustering, if not always the best one.
        assert results[-1] < 1.01 * KMeans(8, init=one_pass.cluster_centers_).fit(tokens).inertia_
        assert one_pass.inertia_.item() == pytest.approx(results[-1], rel=0.03)
        counts = torch.bincount(one_pass.predict(tokens), minlength=8)
        torch.testing.assert_close(one_pass.counts_.float(), counts.float(), rtol=0.15, atol=60)
    assert min(results) < 1.01 * min(lloyd(tokens, 8))


@pytest.mark.parametrize("spread", [4.0, 20.0])
def test_a_stream_that_is_sorted_by_cluster_is_no_trap(spread):
    tokens = clusters(6, 40_000, 8, spread=spread)
    tokens = tokens[KMeans(6, n_init=5, random_state=0).fit(tokens).labels_.argsort(stable=True)]
    best = min(lloyd(tokens, 6, starts=5))
    assert (
        min(reached(tokens, streamed(tokens, 500, 6, seed).cluster_centers_) for seed in range(3))
        < 1.01 * best
    )


def test_one_cluster_is_the_mean_of_what_passed():
    tokens = noise(5000, 3) + 2
    one = streamed(tokens, 300, 1, init_size=5000)
    torch.testing.assert_close(one.cluster_centers_[0], tokens.mean(dim=0), rtol=1e-5, atol=1e-5)
    assert one.counts_.tolist() == [5000]
    # Of a longer stream it is that of the sample, within what a sample can tell: 3 standard errors.
    short = streamed(tokens, 300, 1)
    torch.testing.assert_close(short.cluster_centers_[0], tokens.mean(dim=0), rtol=0, atol=3 / 1024**0.5)
    assert short.counts_.tolist() == [5000]


def test_layers_are_clustered_each_on_its_own():
    layers = torch.stack([clusters(3, 6000, 5, seed=1), 10 * clusters(3, 6000, 5, seed=9) + 3])
    init = layers[:, :3].clone()
    together = streamed(layers, 500, init=init)
    assert together.cluster_centers_.shape == (2, 3, 5) and together.counts_.shape == (2, 3)
    assert together.counts_.sum(dim=1).tolist() == [6000, 6000]
    for layer in range(2):
        alone = streamed(layers[layer], 500, init=init[layer])
        torch.testing.assert_close(together.cluster_centers_[layer], alone.cluster_centers_)
        assert torch.equal(together.counts_[layer], alone.counts_)
        assert torch.equal(together.predict(layers)[layer], alone.predict(layers[layer]))


def test_a_short_stream_is_clustered_exactly():
    tokens = clusters(4, 900, 5)
    short, whole = streamed(tokens, 20, 4), streamed(tokens, 900, 4)
    assert torch.equal(short.cluster_centers_, whole.cluster_centers_)
    exact = KMeans(4, init=short.cluster_centers_).fit(tokens)
    torch.testing.assert_close(short.cluster_centers_, exact.cluster_centers_, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(short.inertia_, exact.inertia_, rtol=1e-3, atol=0)
    assert short.counts_.tolist() == torch.bincount(short.predict(tokens), minlength=4).tolist()


# --- What depends on the batches, and what does not --------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 4000), max_size=8), seed=st.integers(0, 1000))
def test_cuts_do_not_change_the_sample(cuts, seed):
    tokens = clusters(3, 4000, 5)
    whole, parts = MiniBatchKMeans(3, random_state=seed), MiniBatchKMeans(3, random_state=seed)
    whole.partial_fit(tokens)
    for batch in torch.tensor_split(tokens, sorted(cuts)):
        parts.partial_fit(batch)
    kept, expected = (each.micro_clusters_.sample for each in (parts, whole))
    assert torch.equal(kept, expected) and kept.shape == (1, 3 * 1024, 5)


def test_centres_are_there_as_soon_as_there_are_enough_tokens():
    estimator = MiniBatchKMeans(4, random_state=0)
    estimator.partial_fit(noise(3, 2))
    assert not hasattr(estimator, "cluster_centers_")
    with pytest.raises(InputError, match="X holds 3 tokens, fewer than n_clusters=4"):
        estimator.finish()
    estimator.partial_fit(noise(1, 2, seed=1))
    assert estimator.cluster_centers_.shape == (4, 2) and estimator.counts_.tolist() == [1, 1, 1, 1]
    with pytest.raises(InputError, match="X holds 0 tokens, fewer than n_clusters=4"):
        MiniBatchKMeans(4).finish()


def test_asking_in_mid_stream_changes_nothing_that_follows():
    batches = list(clusters(3, 9000, 5).split(500))
    silent, asked = MiniBatchKMeans(3, random_state=0), MiniBatchKMeans(3, random_state=0)
    for batch in batches:
        silent.partial_fit(batch)
        asked.partial_fit(batch)
        assert asked.cluster_centers_.shape == (3, 5)
        assert asked.inertia_ > 0 and asked.micro_clusters_.centers.shape[2] == 5
        assert asked.predict(batch).shape == (500,)
        asked.state_dict()
    assert torch.equal(silent.cluster_centers_, asked.cluster_centers_)
    for name, value in silent.state_dict().items():
        assert torch.equal(asked.state_dict()[name], value)


def test_a_stream_is_deterministic_for_a_seed_and_follows_it():
    tokens = noise(9000, 5)
    runs = [streamed(tokens, 500, seed=seed).cluster_centers_ for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    unseeded = [streamed(tokens, 500, seed=None).cluster_centers_ for _ in range(2)]
    assert not torch.equal(*unseeded)


def test_empty_batches_do_no_harm():
    tokens = clusters(3, 5000, 4)
    plain, gaps = MiniBatchKMeans(3, random_state=0), MiniBatchKMeans(3, random_state=0)
    for batch in tokens.split(500):
        plain.partial_fit(batch)
        gaps.partial_fit(batch[:0]).partial_fit(batch)
    assert torch.equal(plain.cluster_centers_, gaps.cluster_centers_)
    assert gaps.n_steps_ == 2 * plain.n_steps_ == 20


def test_a_memory_map_is_one_batch_like_any_other(tmp_path, monkeypatch):
    from spt_fast.clustering import sources

    tokens = clusters(3, 5000, 4).double().numpy()
    tokens.tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", dtype=np.float64, mode="r", shape=tokens.shape)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1000 * 4 * 8)
    found = MiniBatchKMeans(3, random_state=0).partial_fit(mapped)
    assert found.n_steps_ == 1
    expected = MiniBatchKMeans(3, random_state=0).partial_fit(tokens)
    np.testing.assert_array_equal(found.cluster_centers_, expected.cluster_centers_)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("interrupted_after", [0, 1, 3, 11, 19])
def test_a_stream_goes_on_bit_by_bit_from_its_state(interrupted_after, weighted):
    batches = list(clusters(3, 6000, 7).split(300))
    weights = {"sample_weight": torch.arange(300) % 4 + 0.5} if weighted else {}
    whole, first, second = (MiniBatchKMeans(3, random_state=0) for _ in range(3))
    for batch in batches:
        whole.partial_fit(batch, **weights)
    for batch in batches[:interrupted_after]:
        first.partial_fit(batch, **weights)
    state = first.state_dict()
    kept = copy.deepcopy(state)
    assert all(isinstance(value, Tensor) for value in state.values())
    for batch in batches[interrupted_after:]:  # what goes on elsewhere must not touch the state
        first.partial_fit(batch, **weights)
    second.load_state_dict(state)
    for batch in batches[interrupted_after:]:
        second.partial_fit(batch, **weights)
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    for estimator in (first, second):
        assert torch.equal(estimator.cluster_centers_, whole.cluster_centers_)
        assert torch.equal(estimator.counts_, whole.counts_)
        assert torch.equal(estimator.inertia_, whole.inertia_)
        assert torch.equal(estimator.micro_clusters_.weights, whole.micro_clusters_.weights)
        assert estimator.n_steps_ == whole.n_steps_ and estimator.n_features_in_ == 7


def test_what_was_fitted_is_kept_and_taken_up():
    tokens = clusters(3, 5000, 4)
    fitted = MiniBatchKMeans(3, random_state=0, batch_size=1000).fit(tokens.numpy())
    twin = MiniBatchKMeans(3)
    twin.load_state_dict(fitted.state_dict())
    np.testing.assert_array_equal(twin.cluster_centers_.numpy(), fitted.cluster_centers_)
    np.testing.assert_array_equal(twin.counts_.numpy(), fitted.counts_)
    np.testing.assert_array_equal(twin.predict(tokens).numpy(), fitted.labels_)
    assert twin.inertia_.item() == fitted.inertia_


# --- fit ---------------------------------------------------------------------------------------------------------


def test_fit_reports_what_all_tokens_say():
    tokens = clusters(5, 20_000, 6, spread=1.5)
    fitted = MiniBatchKMeans(5, batch_size=1000, random_state=0).fit(tokens)
    assert fitted.counts_.tolist() == torch.bincount(fitted.labels_, minlength=5).tolist()
    assert fitted.inertia_.item() == pytest.approx(reached(tokens, fitted.cluster_centers_), rel=1e-6)
    assert fitted.inertia_ < 1.01 * min(lloyd(tokens, 5))
    # Several passes have let every token into the sample once.
    assert fitted.n_iter_ > 1
    assert torch.equal(fitted.micro_clusters_.sample, streamed(tokens, 1000, 5).micro_clusters_.sample)
    fitted.partial_fit(tokens[:100])
    assert fitted.counts_.sum() == 20_100 and not hasattr(fitted, "labels_")


def test_fit_starts_over():
    tokens = clusters(3, 5000, 4)
    estimator = MiniBatchKMeans(3, random_state=0).fit(tokens + 50)
    fresh = MiniBatchKMeans(3, random_state=0).fit(tokens)
    assert torch.equal(estimator.fit(tokens).cluster_centers_, fresh.cluster_centers_)


def test_fit_over_chunks_is_fit_in_memory():
    tokens = clusters(3, 8000, 4)
    whole, parts = (
        MiniBatchKMeans(3, batch_size=500, random_state=0).fit(source)
        for source in (tokens, list(tokens.split(2000)))
    )
    assert torch.equal(whole.cluster_centers_, parts.cluster_centers_)
    assert torch.equal(whole.counts_, parts.counts_)
    assert (whole.n_iter_, whole.n_steps_) == (parts.n_iter_, parts.n_steps_)
    assert not hasattr(parts, "labels_")


def test_fit_stops_when_passes_no_longer_pay():
    tokens = clusters(4, 12_000, 5)
    endless = MiniBatchKMeans(4, batch_size=1000, max_iter=7, max_no_improvement=None, random_state=0).fit(
        tokens
    )
    assert (endless.n_iter_, endless.n_steps_) == (7, 7 * 12)
    patient = MiniBatchKMeans(4, batch_size=1000, max_iter=100, max_no_improvement=10, random_state=0).fit(
        tokens
    )
    impatient = MiniBatchKMeans(4, batch_size=1000, max_iter=100, max_no_improvement=1, random_state=0).fit(
        tokens
    )
    assert 1 <= impatient.n_iter_ <= patient.n_iter_ < 100
    assert impatient.n_steps_ < patient.n_steps_ < 100 * 12
    assert patient.inertia_ < 1.01 * min(lloyd(tokens, 4))


def test_the_sample_has_the_size_that_was_asked_for():
    tokens = noise(5000, 4)
    for size, kept in ((100, 100), (None, 3 * 1024), (9000, 5000)):
        estimator = streamed(tokens, 700, init_size=size)
        sample = estimator.micro_clusters_.sample
        if size == 9000:  # everything is in the sample: the tokens themselves are the micro-clusters
            assert sample is None and estimator.micro_clusters_.centers.shape == (1, 5000, 4)
        else:
            assert sample.shape == (1, kept, 4)
    with pytest.raises(InputError, match="init_size must be at least n_clusters=3, got 2"):
        MiniBatchKMeans(3, init_size=2).fit(tokens)
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        MiniBatchKMeans(3, batch_size=0).fit(tokens)


def test_a_cluster_of_one_stray_token_is_tried_elsewhere():
    # Two clouds and a stray token. One centre starts between the clouds, the other on the stray token, and Lloyd's
    # algorithm leaves both where they are.
    tokens = noise(3000, 2)
    tokens[:1500, 0] += 8
    tokens[1500:, 0] -= 8
    tokens[0] = torch.tensor([0.0, 60.0])
    init = torch.tensor([[0.0, 0.0], [0.0, 60.0]])
    stuck, freed = (
        MiniBatchKMeans(2, init=init, reassignment_ratio=ratio, random_state=0).fit(tokens)
        for ratio in (0, 0.01)
    )
    assert sorted(stuck.counts_.tolist()) == [1, 2999]
    assert sorted(freed.counts_.tolist()) == pytest.approx([1500, 1500], abs=1)
    assert freed.inertia_ < 0.1 * stuck.inertia_


def test_more_seedings_are_no_worse():
    tokens = clusters(9, 20_000, 4, spread=8.0)
    one, four = (
        [reached(tokens, streamed(tokens, 2000, 9, seed, n_init=n).cluster_centers_) for seed in range(4)]
        for n in (1, 4)
    )
    assert sum(four) <= sum(one)


# --- Weights -----------------------------------------------------------------------------------------------------


def test_weights_are_repetitions_as_long_as_the_sample_holds_all_tokens():
    tokens = clusters(4, 400, 5)
    weights = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(1))
    repeated = tokens.repeat_interleave(weights, dim=0)
    init = tokens[weights > 0][:4]
    weighted, plain = (MiniBatchKMeans(4, init=init, random_state=0) for _ in range(2))
    for part in torch.arange(400).split(90):
        weighted.partial_fit(tokens[part], sample_weight=weights[part])
    plain.partial_fit(repeated)
    torch.testing.assert_close(weighted.cluster_centers_, plain.cluster_centers_, rtol=1e-4, atol=1e-4)
    assert weighted.counts_.tolist() == plain.counts_.tolist()


@pytest.mark.parametrize("weighted_first", [False, True])
def test_batches_with_and_without_weights_mix(weighted_first):
    tokens = clusters(3, 6000, 5)
    ones, mixed = (MiniBatchKMeans(3, random_state=0) for _ in range(2))
    for index, batch in enumerate(tokens.split(500)):
        ones.partial_fit(batch, sample_weight=torch.ones(500))
        mixed.partial_fit(
            batch, sample_weight=torch.ones(500) if (index % 2 == 0) == weighted_first else None
        )
    torch.testing.assert_close(mixed.cluster_centers_, ones.cluster_centers_)
    torch.testing.assert_close(mixed.counts_, ones.counts_)
    assert mixed.counts_.sum().item() == pytest.approx(6000)


def test_total_weight_is_kept():
    tokens = clusters(3, 9000, 4)
    weights = torch.rand(9000, generator=torch.Generator().manual_seed(0)) + 0.1
    fitted = MiniBatchKMeans(3, batch_size=500, random_state=0).fit(tokens, sample_weight=weights)
    assert fitted.n_iter_ > 1
    total = weights.double().sum().item()
    assert fitted.counts_.sum().item() == pytest.approx(total, rel=1e-6)
    # Several passes have moved the running means; each token still counts once.
    assert fitted.micro_clusters_.weights.sum().item() == pytest.approx(total, rel=1e-6)
    plain = MiniBatchKMeans(3, batch_size=500, random_state=0).fit(tokens)
    assert plain.micro_clusters_.weights.sum().item() == pytest.approx(9000)


# --- What is refused ---------------------------------------------------------------------------------------------


def test_a_refused_batch_changes_nothing():
    tokens = clusters(3, 5000, 4)
    estimator = streamed(tokens, 500)
    before = {name: value.clone() for name, value in estimator.state_dict().items()}
    bad = noise(20, 4)
    bad[7, 1] = float("inf")
    for wrong, message in (
        (bad, "X holds NaN or infinite values, first in row 7"),
        (noise(20, 5), r"X must be \['T', 4\], as it was when fitted, got \[1, 20, 5\]"),
        (noise(2, 20, 4), r"X must be \['T', 4\]"),
        ([noise(20, 4), noise(20, 4)], r"X must be one batch \[T, D\] or \[L, T, D\], got chunks"),
        (noise(4), "X must be a tensor or array"),
    ):
        with pytest.raises(InputError, match=message):
            estimator.partial_fit(wrong)
    with pytest.raises(ValueError, match="X has 5 features, but MiniBatchKMeans is expecting 4 features"):
        estimator.partial_fit(noise(20, 5).numpy())
    now = estimator.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
    assert (estimator.n_features_in_, estimator.n_steps_) == (4, 10)
    fresh = MiniBatchKMeans(3)
    with pytest.raises(InputError, match="row 7"):
        fresh.partial_fit(bad)
    assert fresh.state_dict() == {} and not hasattr(fresh, "n_features_in_")


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("best", "init must be .* got 'best'"),
        (torch.zeros(2, 4), r"init must hold the centres \[1, 3, 4\], got \[2, 4\]"),
    ],
)
def test_wrong_initial_centres_are_refused_with_the_first_batch(init, message):
    with pytest.raises(InputError, match=message):
        MiniBatchKMeans(3, init=init).partial_fit(noise(10, 4))


def test_what_can_be_read_only_once_goes_to_partial_fit():
    def once() -> Iterator[Tensor]:
        yield noise(100, 3)

    with pytest.raises(InputError, match="X can be read only once"):
        MiniBatchKMeans(2).fit(once())


# --- Micro-clusters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", "sorted"])
def test_from_micro_clusters_any_number_of_clusters_is_derived(order):
    tokens = clusters(12, 30_000, 8, spread=1.5)
    if order == "sorted":
        tokens = tokens[tokens[:, 0].argsort()]
    micro = streamed(tokens, 1000, 256, init="random", init_size=16_384).micro_clusters_
    assert micro.weights.sum() == 30_000 and micro.centers.shape == (1, 256, 8)
    for k in (1, 5, 12, 40):
        found = micro.cluster(k, n_init=10, random_state=0)
        assert found.centers.shape == (1, k, 8) and found.counts.sum() == 30_000
        inertia = reached(tokens, found.centers[0])
        assert inertia < 1.01 * np.median(lloyd(tokens, k))
        assert found.inertia.item() == pytest.approx(inertia, rel=0.03)
        again = micro.cluster(k, n_init=10, random_state=0)
        assert torch.equal(found.centers, again.centers)


def test_micro_clusters_of_layers_equal_those_of_each_layer():
    layers = torch.stack([clusters(4, 9000, 5, seed=1), clusters(4, 9000, 5, seed=3) * 4])
    together = streamed(layers, 1000, 64, init="random", init_size=3000).micro_clusters_
    found = together.cluster(4, random_state=0)
    assert found.centers.shape == (2, 4, 5) and found.counts.sum(dim=1).tolist() == [9000, 9000]
    for layer in range(2):
        assert reached(layers[layer], found.centers[layer]) < 1.01 * min(lloyd(layers[layer], 4))


def test_without_a_sample_the_inertia_is_that_of_whole_micro_clusters():
    points, weights = torch.tensor([[[0.0], [1.0], [10.0], [12.0]]]), torch.tensor([[3, 1, 1, 1]])
    found = MicroClusters(points, weights, torch.tensor([5.0], dtype=torch.float64)).cluster(
        2, random_state=0
    )
    assert sorted(found.centers.flatten().tolist()) == [0.25, 11.0]
    assert sorted(found.counts.flatten().tolist()) == [2, 4]
    assert found.inertia.item() == pytest.approx(5 + 3 * 0.25**2 + 0.75**2 + 2)


def test_micro_clusters_refuse_more_clusters_than_they_are():
    micro = streamed(noise(900, 3), 300, 20, init_size=100).micro_clusters_
    for k in (0, 21):
        with pytest.raises(InputError, match=rf"n_clusters must be in 1 .. \d+, .* got {k}"):
            micro.cluster(k)


# --- Tokens of real images ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_real_images_one_pass_is_as_good_as_many(bundled_backbone, cifar10):
    layers = real_tokens(bundled_backbone, cifar10, 400)[:, ::2]
    for layer, tokens in zip(range(1, 12, 4), layers[1::4], strict=True):  # early, in the middle, late
        tokens = tokens.contiguous()
        best = min(lloyd(tokens, 20))
        ours = reached(tokens, streamed(tokens, 2048, 20).cluster_centers_) / best
        theirs = sklearn.cluster.MiniBatchKMeans(
            20, batch_size=2048, max_iter=1, n_init=3, random_state=0
        ).fit(tokens.numpy())
        theirs = reached(tokens, theirs.cluster_centers_) / best
        print(f"layer {layer}: one pass {ours:.4f}, scikit-learn's {theirs:.4f} of the best of three")
        assert ours < 1.02
        assert ours <= theirs


@pytest.mark.slow
def test_on_real_images_micro_clusters_are_as_good_as_the_tokens(bundled_backbone, cifar10):
    tokens = real_tokens(bundled_backbone, cifar10, 1100)[6]
    micro = streamed(tokens, 4096, 2048, init="random").micro_clusters_
    assert micro.sample.shape[1] == 65536 < len(tokens)
    for k in (5, 20, 50, 100):
        ours = reached(tokens, micro.cluster(k, random_state=0).centers[0])
        (direct,) = lloyd(tokens, k, starts=1)
        print(f"{k} clusters from micro-clusters: {ours / direct:.4f} of k-means over the tokens")
        assert ours < 1.01 * direct
