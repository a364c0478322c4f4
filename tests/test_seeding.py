"""Seeds of k-means, and the samples they are drawn from."""

import warnings

import numpy as np
import pytest
import sklearn.cluster
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from token_samples import clusters, noise

from spt_fast.clustering import KMeans, plus_plus, seeded_generator
from spt_fast.clustering.reservoir import Reservoir
from spt_fast.kernels import kmeans_step

# --- Seeds and samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "k"), [(30, 30), (200, 9), (5000, 2)])
def test_seeds_are_different_tokens(tokens, k):
    x = noise(tokens, 5)
    seeds = plus_plus(x, k, seeded_generator(4))
    found = (seeds[:, None] == x[None]).all(dim=2)
    assert (found.sum(dim=1) == 1).all()
    assert len(set(found.int().argmax(dim=1).tolist())) == k


def test_random_starts_are_different_tokens_spread_evenly():
    tokens = torch.arange(50.0)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        drawn = [
            KMeans(10, init="random", random_state=seed, max_iter=1, tol=1e9).fit(tokens).counts_
            for seed in range(20)
        ]
    assert all((counts > 0).all() for counts in drawn)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("spread", [40.0, 4000.0])
def test_seeds_find_clusters_that_are_far_apart(spread, offset):
    tokens = clusters(8, 800, 16, spread=spread) + offset
    for seed in range(10):
        seeds = plus_plus(tokens, 8, seeded_generator(seed))
        assert kmeans_step(tokens, seeds).counts.min() > 0
        assert kmeans_step(tokens, seeds).inertia < 3 * 16 * 800  # each cluster has its own seed


def test_seeds_tell_close_tokens_apart_that_are_far_from_the_others():
    # Two tight pairs, far from each other: the distance within a pair is lost in the rounding of a dot product.
    tokens = torch.tensor([[1000.0, 0.0], [1000.0, 0.01], [-1000.0, 0.0], [-1000.0, 0.01]])
    for seed in range(20):
        seeds = plus_plus(tokens, 4, seeded_generator(seed))
        assert len({tuple(seed) for seed in seeds.tolist()}) == 4


def test_seeds_are_as_good_as_scikit_learns():
    tokens = clusters(10, 1500, 4, spread=1.5)
    ours = [
        kmeans_step(tokens, plus_plus(tokens, 10, seeded_generator(seed))).inertia.item()
        for seed in range(20)
    ]
    theirs = [
        kmeans_step(
            tokens,
            torch.from_numpy(sklearn.cluster.kmeans_plusplus(tokens.numpy(), 10, random_state=seed)[0]),
        ).inertia.item()
        for seed in range(20)
    ]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.1)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(0, 400), capacity=st.integers(1, 120), cuts=st.lists(st.integers(0, 400), max_size=6)
)
def test_a_reservoir_depends_on_the_order_of_tokens_not_on_their_batches(length, capacity, cuts):
    tokens = torch.arange(float(length)).reshape(1, length, 1)
    whole, parts, resumed = (Reservoir(capacity, seed=3) for _ in range(3))
    whole.add(tokens)
    for batch in torch.tensor_split(tokens, sorted(cuts), dim=1):
        parts.add(batch)
        resumed.add(batch)
        state = resumed.state_dict()
        resumed = Reservoir(capacity, seed=3)
        resumed.load_state_dict(state)
    for each in (parts, resumed):
        assert each.seen == length
        assert torch.equal(each.tokens(), whole.tokens())
    kept = whole.tokens().flatten().long()
    assert len(kept) == min(length, capacity) and torch.equal(kept, whole.positions.sort().values)


def test_a_reservoir_is_uniform():
    tokens = torch.arange(400.0).reshape(1, 400, 1)
    kept = torch.zeros(400)
    for seed in range(600):
        reservoir = Reservoir(40, seed)
        for batch in tokens.split(37, dim=1):
            reservoir.add(batch)
        kept[reservoir.tokens().flatten().long()] += 1
    # Every token is kept 60 times, give or take 7.3; early ones are as likely as late ones.
    assert kept.sum() == 600 * 40 and kept.std() == pytest.approx(7.35, rel=0.15)
    assert kept[:100].mean().item() == pytest.approx(60, abs=3)
    assert kept[-100:].mean().item() == pytest.approx(60, abs=3)


def test_a_reservoir_counts_tokens_without_weight_once_beside_weighted_ones():
    reservoir = Reservoir(6, seed=0)
    reservoir.add(noise(1, 2, 1))
    reservoir.add(noise(1, 2, 1), torch.tensor([[3.0, 4.0]]))
    reservoir.add(noise(1, 2, 1))
    assert reservoir.weights().tolist() == [[1.0, 1.0, 3.0, 4.0, 1.0, 1.0]]
