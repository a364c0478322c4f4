"""Whole runs of k-means: until convergence, or for as many iterations as that takes where a library cannot tell."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sklearn.cluster
import torch
from torch import Tensor

from benchmarks.ceilings import Ceilings, name_of
from benchmarks.command import show
from benchmarks.kmeans_cases import (
    EXTRAS,
    Case,
    first_line,
    in_case,
    made_up_tokens,
    pass_limit,
    title,
    worth,
)
from benchmarks.kmeans_peers import Peer, first_centers, peers_on
from benchmarks.record import Record
from benchmarks.timing import synchronized_seconds
from spt_fast.clustering import KMeans, MiniBatchKMeans

MOST_ITERATIONS = 300
# A run averages over its iterations: that is as good as many rounds.
MOST_ROUNDS = 3
# By how much a run's inertia may exceed ours. Equal iterations end at nearly equal centres; a few labels that rounding
# decides can lead to another local optimum. Mini-batches are not meant to be exact.
EXACT, APPROXIMATE = 0.01, 0.1


@dataclass
class Run:
    """A fit from given initial centres; ``fit`` returns centres ``[L, K, D]`` and iterations, if it counts them."""

    name: str
    fit: Callable[[], tuple[Tensor, int | None]] | None = None
    tolerance: float = EXACT
    missing: str | None = None
    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def compare_runs(record: Record, ceilings: Ceilings, case: Case, device: torch.device, rounds: int) -> None:
    """Add a row for each run."""
    x = made_up_tokens(case, device)
    start = first_centers(x, case["clusters"])
    centers, needed = fit_ours(KMeans, x, start)
    expected = worth(x, centers)
    runs = list(runs_on(x, start, needed))
    for number in range(min(rounds, MOST_ROUNDS) + 1):
        for run in runs:
            if run.missing is None:
                _take(run, x, expected, counts=number > 0)
    own, before = in_case("convergence", case), len(record.rows)
    for run in runs:
        if run.missing is not None:
            record.missing(own, run.name, run.missing)
            continue
        # Centres move as often as there are iterations; one more pass finds the final labels.
        exact = run.name == "spt-fast KMeans"
        limit = pass_limit(ceilings, case, name_of(x.dtype), needed + 1) if exact else None
        record.measured(own, run.name, run.seconds, limit=limit, **run.facts)
    show(title("until convergence", case), record.rows[before:], against="spt-fast KMeans", extras=EXTRAS)


def runs_on(x: Tensor, start: Tensor, needed: int) -> Iterator[Run]:
    """Ours first; estimators stop by their own rule, loops after ``needed`` iterations."""
    yield Run("spt-fast KMeans", partial(fit_ours, KMeans, x, start))
    yield Run("spt-fast MiniBatchKMeans", partial(fit_ours, MiniBatchKMeans, x, start), APPROXIMATE)
    if x.device.type == "cpu":
        yield Run("scikit-learn KMeans", partial(fit_sklearn, sklearn.cluster.KMeans, x, start))
        mini_batch = partial(fit_sklearn, sklearn.cluster.MiniBatchKMeans, x, start)
        yield Run("scikit-learn MiniBatchKMeans", mini_batch, APPROXIMATE)
    for peer in peers_on([x]):
        if peer.missing is not None:
            yield Run(peer.name, missing=peer.missing)
        elif not peer.name.startswith(("spt-fast", "scikit-learn")):
            yield Run(peer.name, partial(iterated, peer, start, needed))


def iterated(peer: Peer, start: Tensor, count: int) -> tuple[Tensor, int]:
    return peer.run(start, count), count


def fit_ours(estimator: Any, x: Tensor, start: Tensor) -> tuple[Tensor, int]:
    model = estimator(start.shape[1], init=start, max_iter=MOST_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run of MOST_ITERATIONS counts as well
        model.fit(x)
    return model.cluster_centers_, model.n_iter_


def fit_sklearn(estimator: Any, x: Tensor, start: Tensor) -> tuple[Tensor, int]:
    centers, iterations = [], 0
    for tokens, own in zip(x.numpy(), start.numpy(), strict=True):
        model = estimator(len(own), init=own, n_init=1, max_iter=MOST_ITERATIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(tokens)
        centers.append(torch.from_numpy(model.cluster_centers_))
        iterations = max(iterations, model.n_iter_)
    return torch.stack(centers), iterations


def _take(run: Run, x: Tensor, expected: float, *, counts: bool) -> None:
    """Run it once more; the first time is warm-up and check."""
    outcome: list[tuple[Tensor, int | None]] = []
    try:
        assert run.fit is not None
        fit = run.fit
        seconds = synchronized_seconds(x.device, lambda: outcome.append(fit()))
    except Exception as error:
        run.missing = first_line(error)
        return
    if counts:
        run.seconds.append(seconds)
        return
    centers, iterations = outcome[0]
    run.facts = {"inertia": worth(x, centers), "iterations": iterations}
    above = run.facts["inertia"] / expected - 1
    if not above < run.tolerance:
        run.missing = f"ends elsewhere: its inertia is {above:+.1%} of ours"
