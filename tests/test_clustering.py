"""KMeans against scikit-learn's: conventions, results, weights, and going on after an interruption."""

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.cluster
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import check_estimator
from token_samples import assert_same_clustering, clusters, noise, real_tokens
from torch import Tensor

from spt_fast.clustering import KMeans, MicroClusters, MiniBatchKMeans, plus_plus, seeded_generator
from spt_fast.errors import InputError
from spt_fast.kernels import kmeans_step

# --- scikit-learn's conventions ----------------------------------------------------------------------------------

# The check fits the same start twice, once with weights and once with tokens repeated and shuffled. From the same
# start the results are equal (see the tests of sample_weight below); but seeds are drawn by position in the data, and
# so differ. scikit-learn excludes the check for its own KMeans and MiniBatchKMeans for the same reason.
EXCLUDED = {"check_sample_weight_equivalence_on_dense_data": "seeds are drawn by position in the data"}


@pytest.mark.parametrize("estimator", [KMeans, MiniBatchKMeans])
def test_scikit_learns_checks_pass(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(
            estimator(), on_fail=None, on_skip=None, expected_failed_checks=dict(EXCLUDED)
        )
    outcome = {each["check_name"]: each["status"] for each in results}
    failed = {each["check_name"]: repr(each["exception"]) for each in results if each["status"] == "failed"}
    assert not failed
    assert {name for name, status in outcome.items() if status == "xfail"} == set(EXCLUDED)
    # Skipped is only what needs libraries or settings that may not be there: array API dispatch, pandas.
    skipped = {name for name, status in outcome.items() if status == "skipped"}
    assert skipped <= {"check_array_api_input", "check_sample_weights_pandas_series"}
    assert len(outcome) > 40


def test_parameters_are_kept_as_given_and_cloned():
    init = noise(3, 2)
    estimator = KMeans(3, init=init, tol=0.5, dtype=torch.bfloat16, random_state=7)
    assert estimator.get_params()["init"] is init
    twin = clone(estimator)
    assert torch.equal(twin.init, init) and twin.dtype is torch.bfloat16
    assert twin.get_params().keys() == estimator.get_params().keys()
    twin.set_params(n_clusters=2, init="random")
    assert (twin.n_clusters, twin.init, estimator.n_clusters) == (2, "random", 3)
    assert "n_clusters=3" in repr(estimator)
    with pytest.raises(ValueError, match="Invalid parameter 'clusters'"):
        twin.set_params(clusters=3)


@pytest.mark.parametrize("estimator", [KMeans, MiniBatchKMeans])
def test_everything_that_follows_from_the_centres(estimator):
    tokens = clusters(4, 300, 5).numpy()
    fitted = estimator(4, random_state=0).fit(tokens)
    distances = np.linalg.norm(tokens[:, None].astype(np.float64) - fitted.cluster_centers_, axis=2)
    np.testing.assert_array_equal(fitted.labels_, distances.argmin(axis=1))
    np.testing.assert_array_equal(fitted.predict(tokens), fitted.labels_)
    np.testing.assert_array_equal(estimator(4, random_state=0).fit_predict(tokens), fitted.labels_)
    np.testing.assert_allclose(fitted.transform(tokens), distances, rtol=1e-5)
    np.testing.assert_allclose(estimator(4, random_state=0).fit_transform(tokens), distances, rtol=1e-5)
    assert fitted.score(tokens) == pytest.approx(-((distances.min(axis=1) ** 2).sum()), rel=1e-5)
    assert fitted.inertia_ == pytest.approx(-fitted.score(tokens), rel=1e-5)
    assert isinstance(fitted.inertia_, float) and isinstance(fitted.score(tokens), float)
    weights = np.arange(300) % 3
    weighted = -(distances.min(axis=1) ** 2 * weights).sum()
    assert fitted.score(tokens, sample_weight=weights) == pytest.approx(weighted, rel=1e-5)
    name = estimator.__name__.lower()
    assert fitted.get_feature_names_out().tolist() == [f"{name}{cluster}" for cluster in range(4)]
    assert fitted.n_features_in_ == 5


@pytest.mark.parametrize("estimator", [KMeans, MiniBatchKMeans])
def test_what_was_not_fitted_says_so(estimator):
    fresh = estimator(3)
    for ask in (fresh.predict, fresh.transform, fresh.score):
        with pytest.raises(NotFittedError, match=f"This {estimator.__name__} instance is not fitted yet"):
            ask(noise(4, 2))
    for name in ("cluster_centers_", "counts_", "inertia_", "labels_", "micro_clusters_"):
        assert not hasattr(fresh, name)
    assert fresh.state_dict() == {}


@pytest.mark.parametrize("estimator", [KMeans, MiniBatchKMeans])
def test_an_estimator_survives_pickling_and_copying(estimator):
    tokens = clusters(3, 200, 4)
    fitted = estimator(3, random_state=0).fit(tokens)
    for twin in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        assert torch.equal(twin.cluster_centers_, fitted.cluster_centers_)
        assert torch.equal(twin.predict(tokens), fitted.labels_)


# --- The clustering ----------------------------------------------------------------------------------------------


def sklearn_fit(tokens: Tensor, init: Tensor, **kwargs) -> sklearn.cluster.KMeans:
    reference = sklearn.cluster.KMeans(len(init), init=init.numpy(), n_init=1, algorithm="lloyd", **kwargs)
    return reference.fit(tokens.numpy())


@pytest.mark.parametrize(
    ("tokens", "k"),
    [
        (clusters(6, 900, 7), 6),
        (clusters(5, 1500, 33, seed=5, spread=0.7), 9),
        (noise(400, 3), 8),
        (noise(300, 1), 4),
        (clusters(4, 500, 12, seed=3) + 500, 4),
        (noise(50, 6), 1),
        (noise(12, 6), 12),
    ],
    ids=["apart", "overlapping", "one blob", "one feature", "far from zero", "k=1", "k=t"],
)
def test_kmeans_is_scikit_learns_from_the_same_start(tokens, k):
    init = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(2))[:k]]
    ours = KMeans(k, init=init, max_iter=300).fit(tokens)
    theirs = sklearn_fit(tokens, init, max_iter=300)
    assert ours.cluster_centers_.dtype == torch.float32 and ours.inertia_.dtype == torch.float64
    assert ours.inertia_.item() == pytest.approx(theirs.inertia_, rel=1e-3, abs=1e-6)
    assert (ours.labels_.numpy() == theirs.labels_).mean() > 0.99
    np.testing.assert_allclose(ours.cluster_centers_.numpy(), theirs.cluster_centers_, atol=0.05)
    assert ours.counts_.tolist() == np.bincount(ours.labels_, minlength=k).tolist()
    assert abs(ours.n_iter_ - theirs.n_iter_) <= 2


def test_centres_counts_and_inertia_describe_the_same_clustering():
    tokens = clusters(5, 700, 9)
    fitted = KMeans(5, random_state=0, tol=0.0).fit(tokens)
    for cluster in range(5):
        own = tokens[fitted.labels_ == cluster]
        torch.testing.assert_close(fitted.cluster_centers_[cluster], own.mean(dim=0))
        assert fitted.counts_[cluster] == len(own)
    inertia = (tokens - fitted.cluster_centers_[fitted.labels_]).double().square().sum()
    torch.testing.assert_close(fitted.inertia_, inertia, rtol=1e-5, atol=0)


def test_the_layer_axis_equals_separate_fits():
    layers = torch.stack([clusters(4, 400, 8, seed=1), noise(400, 8), 10 * clusters(4, 400, 8, seed=7)])
    init = torch.stack([layer[:4] for layer in layers])
    together = KMeans(4, init=init).fit(layers)
    assert together.cluster_centers_.shape == (3, 4, 8)
    assert (together.counts_.shape, together.inertia_.shape) == ((3, 4), (3,))
    alone = [KMeans(4, init=start).fit(layer) for layer, start in zip(layers, init, strict=True)]
    for layer, own in enumerate(alone):
        torch.testing.assert_close(together.cluster_centers_[layer], own.cluster_centers_)
        assert torch.equal(together.counts_[layer], own.counts_)
        torch.testing.assert_close(together.inertia_[layer], own.inertia_)
        assert torch.equal(together.labels_[layer], own.labels_)
        torch.testing.assert_close(together.transform(layers)[layer], own.transform(layers[layer]))
        assert together.score(layers)[layer].item() == pytest.approx(own.score(layers[layer]))
    assert together.n_iter_ == max(own.n_iter_ for own in alone)


def test_layers_that_are_empty_in_places_are_seeded_and_moved_on_their_own():
    layers = torch.stack([clusters(4, 400, 8, seed=1), clusters(4, 400, 8, seed=7)])
    init = layers[:, :4].clone()
    init[1, :2] = 1e4  # nothing is near, in the second layer only
    together = KMeans(4, init=init).fit(layers)
    for layer in range(2):
        alone = KMeans(4, init=init[layer]).fit(layers[layer])
        torch.testing.assert_close(together.cluster_centers_[layer], alone.cluster_centers_)
    assert (together.counts_ > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kmeans_of_half_precision_tokens_is_that_of_their_float32_copies(dtype):
    tokens = clusters(5, 600, 8).to(dtype)
    half, full = (KMeans(5, random_state=3).fit(x) for x in (tokens, tokens.float()))
    torch.testing.assert_close(half.cluster_centers_, full.cluster_centers_)
    torch.testing.assert_close(half.inertia_, full.inertia_)
    asked = KMeans(5, random_state=3, dtype=dtype).fit(clusters(5, 600, 8))
    torch.testing.assert_close(asked.cluster_centers_, half.cluster_centers_)


def test_channels_with_a_common_offset_cluster_in_bfloat16_as_well_as_in_float64():
    tokens = clusters(6, 4000, 48, spread=1.5)
    tokens[:, ::11] += 100
    tokens[:, 5] -= 60
    tokens = tokens.bfloat16()
    init = tokens[:6].float()
    ours = KMeans(6, init=init, max_iter=300).fit(tokens)
    exact = sklearn.cluster.KMeans(6, init=init.double().numpy(), n_init=1, max_iter=300)
    exact.fit(tokens.double().numpy())
    inertia = ours.inertia_.item()
    assert inertia == pytest.approx(exact.inertia_, rel=1e-3)
    assert (ours.labels_.numpy() == exact.labels_).mean() > 0.995
    streamed = MiniBatchKMeans(6, init=init, init_size=1000, random_state=0)
    for batch in tokens.split(500):
        streamed.partial_fit(batch)
    reached = ((tokens.double() - streamed.cluster_centers_[streamed.predict(tokens)]) ** 2).sum().item()
    assert reached < 1.02 * exact.inertia_


@pytest.mark.parametrize("misplaced", [1, 3])
def test_empty_clusters_are_relocated_as_scikit_learn_does(misplaced):
    tokens = clusters(5, 500, 6, seed=11)
    init = tokens[:5].clone()
    init[:misplaced] = 1e4  # nothing is near
    ours = KMeans(5, init=init).fit(tokens)
    theirs = sklearn_fit(tokens, init, max_iter=100)
    assert (ours.counts_ > 0).all()
    assert ours.inertia_.item() == pytest.approx(theirs.inertia_, rel=1e-3)
    np.testing.assert_allclose(ours.cluster_centers_.numpy(), theirs.cluster_centers_, atol=0.05)
    assert_same_clustering(ours, KMeans(5, init=init).fit(tokens.split(37)))


def test_one_pass_with_empty_clusters_is_scikit_learns():
    tokens = clusters(5, 100, 6, seed=11)
    init = tokens[:5].clone()
    init[:2] = 1e4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ours = KMeans(5, init=init, max_iter=1).fit(tokens)
        theirs = sklearn_fit(tokens, init, max_iter=1)
    np.testing.assert_allclose(ours.cluster_centers_.numpy(), theirs.cluster_centers_, atol=1e-3)


@pytest.mark.parametrize(
    "init", ["k-means++", "random", torch.tensor([[1.0, 1.0]] * 5)], ids=["k-means++", "random", "equal"]
)
def test_fewer_distinct_tokens_than_clusters_warns_and_stays_finite(init):
    tokens = torch.tensor([[0.0, 1.0], [2.0, 3.0], [9.0, 9.0]]).repeat(10, 1)
    with pytest.warns(ConvergenceWarning, match="fewer distinct tokens than n_clusters=5"):
        fitted = KMeans(5, init=init, random_state=0).fit(tokens)
    assert torch.isfinite(fitted.cluster_centers_).all()
    assert fitted.inertia_.item() == pytest.approx(0.0, abs=1e-9)
    assert sorted(fitted.counts_.tolist()) == [0, 0, 10, 10, 10]


def test_identical_tokens_make_one_cluster():
    with pytest.warns(ConvergenceWarning):
        fitted = KMeans(3, random_state=0).fit(torch.full((20, 4), 2.5))
    assert (fitted.cluster_centers_ == 2.5).all() and fitted.counts_.tolist() == [20, 0, 0]


def test_stopping_early_warns_and_converging_does_not():
    tokens = noise(2000, 5)
    with pytest.warns(ConvergenceWarning, match="stopped after max_iter=2 passes"):
        assert KMeans(8, max_iter=2, random_state=0).fit(tokens).n_iter_ == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KMeans(8, max_iter=1000, random_state=0).fit(tokens)


def test_more_starts_keep_the_best_of_each_layer():
    layers = torch.stack([clusters(9, 500, 4, seed=seed, spread=8.0) for seed in range(3)])
    several = KMeans(9, n_init=4, random_state=0).fit(layers)
    single = [KMeans(9, random_state=seed).fit(layers) for seed in range(4)]
    first = KMeans(9, n_init=1, random_state=0).fit(layers)
    assert (several.inertia_ <= first.inertia_ * (1 + 1e-9)).all()
    assert (several.inertia_ < first.inertia_ * 0.999).any()
    assert (several.inertia_ <= torch.stack([each.inertia_ for each in single]).mean(dim=0)).all()
    # What is reported belongs together, whichever start it came from.
    torch.testing.assert_close(-several.score(layers), several.inertia_)
    assert torch.equal(several.counts_[1], torch.bincount(several.labels_[1], minlength=9))


def test_kmeans_is_deterministic_for_a_seed_and_follows_it():
    tokens = noise(500, 6)
    runs = [KMeans(7, random_state=seed).fit(tokens).cluster_centers_ for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0].sort(dim=0).values, runs[2].sort(dim=0).values)
    unseeded = [KMeans(7).fit(tokens).cluster_centers_ for _ in range(2)]
    assert not torch.equal(*unseeded)
    shared = np.random.RandomState(3)
    drawn = [KMeans(7, random_state=shared).fit(tokens).cluster_centers_ for _ in range(2)]
    assert not torch.equal(*drawn)
    again = KMeans(7, random_state=np.random.RandomState(3)).fit(tokens).cluster_centers_
    assert torch.equal(again, drawn[0])


def test_fitting_changes_neither_tokens_nor_initial_centres():
    tokens = clusters(3, 200, 4)
    init, kept = tokens[:3].clone().requires_grad_(), tokens.clone()
    fitted = KMeans(3, init=init).fit(tokens)
    assert torch.equal(tokens, kept) and torch.equal(init, kept[:3])
    assert not fitted.cluster_centers_.requires_grad


def test_verbose_prints_a_line_after_each_pass(capsys):
    fitted = KMeans(4, random_state=0, verbose=1).fit(noise(200, 3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[: fitted.n_iter_] == [f"k-means: {done + 1} passes" for done in range(fitted.n_iter_)]


# --- Weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch", "numpy", "list"])
def test_weights_are_repetitions_from_the_same_start(form):
    tokens = clusters(4, 400, 5, spread=2.0)
    weights = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(1))
    repeated = tokens.repeat_interleave(weights, dim=0)
    init = tokens[weights > 0][:4]
    given = {"torch": weights, "numpy": weights.numpy(), "list": weights.tolist()}[form]
    weighted = KMeans(4, init=init).fit(tokens, sample_weight=given)
    plain = KMeans(4, init=init).fit(repeated)
    torch.testing.assert_close(weighted.cluster_centers_, plain.cluster_centers_, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weighted.inertia_, plain.inertia_)
    assert weighted.counts_.dtype == torch.float64 and weighted.counts_.tolist() == plain.counts_.tolist()
    assert len(weighted.labels_) == 400


def test_weights_count_in_relocation_as_in_scikit_learn():
    tokens = clusters(5, 300, 6, seed=11)
    weights = torch.rand(300, generator=torch.Generator().manual_seed(2)) * 3
    init = tokens[:5].clone()
    init[0] = 1e4
    ours = KMeans(5, init=init).fit(tokens, sample_weight=weights)
    theirs = sklearn.cluster.KMeans(5, init=init.numpy(), n_init=1, max_iter=100)
    theirs.fit(tokens.numpy(), sample_weight=weights.numpy())
    assert ours.inertia_.item() == pytest.approx(theirs.inertia_, rel=1e-3)


def test_a_token_without_weight_is_no_place_for_an_empty_cluster():
    tokens = clusters(4, 300, 6)
    tokens[7] = 500.0
    init = tokens[:4].clone()
    init[0] = 1e4
    fitted = KMeans(4, init=init).fit(tokens, sample_weight=torch.arange(300) != 7)
    assert (fitted.counts_ > 0).all() and fitted.cluster_centers_.abs().max() < 50


def test_seeds_are_drawn_where_the_weight_is():
    tokens = clusters(2, 400, 3, spread=30.0)
    weights = (tokens[:, 0] > tokens[:, 0].mean()).float()
    for init in ("k-means++", "random"):
        for seed in range(5):
            fitted = KMeans(3, init=init, random_state=seed, max_iter=1, tol=1e9)
            fitted.fit(tokens, sample_weight=weights)
            assert (fitted.counts_ > 0).all() and fitted.counts_.sum() == weights.sum()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(5), r"sample_weight must hold one number for each token.*got \[5\] for X \[6, 2\]"),
        (torch.full((6,), -1.0), "sample_weight must hold finite numbers of at least 0"),
        (torch.zeros(6), "sample_weight .* not only zeros"),
        (torch.tensor([1.0, 1, 1, 1, 1, float("nan")]), "sample_weight must hold finite"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        KMeans(2).fit(noise(6, 2), sample_weight=weights)
    with pytest.raises(InputError, match=message):
        MiniBatchKMeans(2).partial_fit(noise(6, 2), sample_weight=weights)


def test_weights_belong_to_one_array():
    with pytest.raises(InputError, match="sample_weight needs X as one array"):
        KMeans(2).fit([noise(6, 2), noise(6, 2)], sample_weight=torch.ones(12))
    with pytest.raises(InputError, match=r"sample_weight must hold one number for each token of X \[T, D\]"):
        KMeans(2).fit(noise(2, 6, 2), sample_weight=torch.ones(6))


# --- Going on after an interruption ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["in memory", "chunks", "weighted", "layers"])
def test_a_fit_goes_on_bit_by_bit_from_every_point(form):
    tokens = clusters(5, 500, 6, spread=1.0)
    source: Any = {"chunks": list(tokens.split(90)), "layers": torch.stack([tokens, tokens * 2 + 1])}.get(
        form, tokens
    )
    weight = {"sample_weight": torch.arange(500) % 3} if form == "weighted" else {}
    parameters = {"n_clusters": 5, "n_init": 2, "max_iter": 6, "random_state": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        whole = KMeans(**parameters).fit(source, **weight)
        states, first = [], KMeans(**parameters)
        passes = []
        for done in first.fit_passes(source, **weight):
            passes.append(done)
            states.append(first.state_dict())
        kept = copy.deepcopy(states)
        assert len(states) > 8 and passes == sorted(passes) and passes[-1] <= 12
        for done, state in enumerate(states, start=1):
            assert all(isinstance(value, Tensor) for value in state.values())
            second = KMeans(**parameters)
            second.load_state_dict(state)
            rest = list(second.fit_passes(source, **weight, resume=True))
            assert passes[:done] + rest == passes
            assert torch.equal(second.cluster_centers_, whole.cluster_centers_)
            assert torch.equal(second.counts_, whole.counts_)
            assert torch.equal(second.inertia_, whole.inertia_)
            assert second.n_iter_ == whole.n_iter_
    for state, before in zip(states, kept, strict=True):  # going on did not touch what was kept
        assert all(torch.equal(state[name], before[name]) for name in before)


def test_what_was_learned_is_kept_and_taken_up():
    for tokens in (clusters(3, 90, 4), clusters(3, 90, 4).reshape(2, 45, 4)):
        fitted = KMeans(3, random_state=0).fit(tokens.numpy())
        state = fitted.state_dict()
        twin = KMeans(3)
        twin.load_state_dict(state)
        np.testing.assert_array_equal(twin.cluster_centers_.numpy(), fitted.cluster_centers_)
        np.testing.assert_array_equal(twin.counts_.numpy(), fitted.counts_)
        np.testing.assert_array_equal(twin.predict(tokens).numpy(), fitted.labels_)
        assert (twin.n_iter_, twin.n_features_in_) == (fitted.n_iter_, fitted.n_features_in_)
        assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())


def test_a_finished_state_replaces_an_unfinished_fit():
    tokens = clusters(3, 90, 4)
    begun = KMeans(3, random_state=0)
    next(iter(begun.fit_passes(tokens)))
    finished = KMeans(3, random_state=1).fit(tokens)
    begun.load_state_dict(finished.state_dict())
    assert begun.state_dict().keys() == finished.state_dict().keys()


def test_resuming_without_a_state_starts_from_the_beginning():
    tokens = clusters(3, 90, 4)
    estimator = KMeans(3, random_state=0)
    for _ in estimator.fit_passes(tokens, resume=True):
        pass
    assert torch.equal(estimator.cluster_centers_, KMeans(3, random_state=0).fit(tokens).cluster_centers_)


# --- Micro-clusters of KMeans ------------------------------------------------------------------------------------


def test_clusters_can_be_clustered_further():
    tokens = clusters(4, 2000, 6, spread=10.0)
    micro = KMeans(64, random_state=0).fit(tokens).micro_clusters_
    assert isinstance(micro, MicroClusters)
    assert (micro.centers.shape, micro.weights.sum().item()) == ((1, 64, 6), 2000)
    found = micro.cluster(4, random_state=0)
    direct = KMeans(4, n_init=3, random_state=0).fit(tokens)
    assert kmeans_step(tokens, found.centers[0]).inertia < 1.01 * direct.inertia_
    assert found.inertia.item() == pytest.approx(direct.inertia_.item(), rel=0.01)
    assert found.counts.sort().values.tolist() == [direct.counts_.sort().values.tolist()]
    with pytest.raises(InputError, match="n_clusters must be in 1 .. 64, .* got 65"):
        micro.cluster(65)


# --- Tokens of real images ---------------------------------------------------------------------------------------


def assert_inertia_is_scikit_learns(layers: Tensor, k: int, max_iter: int) -> None:
    """Every layer's k-means is within 0.1 % of scikit-learn's from the same initial centres."""
    for layer, tokens in enumerate(layers):
        init = plus_plus(tokens, k, seeded_generator(layer))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            ours = KMeans(k, init=init, max_iter=max_iter).fit(tokens)
            theirs = sklearn_fit(tokens, init, max_iter=max_iter)
        assert ours.inertia_.item() == pytest.approx(theirs.inertia_, rel=1e-3), layer
        assert abs(ours.n_iter_ - theirs.n_iter_) <= max(3, theirs.n_iter_ // 5), layer


def test_on_digits_kmeans_reaches_scikit_learns_inertia_in_every_layer(bundled_backbone, digit_images):
    from spt_fast.tokens import stream_layer_tokens

    captured = list(stream_layer_tokens(bundled_backbone, digit_images[:60].split(20)))
    layers = [torch.cat([batch[i].flatten(0, 1) for batch in captured]) for i in captured[0]]
    assert len(layers) == 12 and layers[0].shape == (60 * 64, 192)
    assert_inertia_is_scikit_learns(torch.stack(layers), k=10, max_iter=40)


@pytest.mark.slow
def test_on_real_images_kmeans_reaches_scikit_learns_inertia(bundled_backbone, cifar10):
    layers = real_tokens(bundled_backbone, cifar10, 400)[::4, ::2]  # early, in the middle, late
    assert_inertia_is_scikit_learns(layers, k=20, max_iter=40)
