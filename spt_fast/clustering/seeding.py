"""Where k-means starts: seeds drawn from a sample of the tokens (Arthur & Vassilvitskii 2007)."""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from spt_fast.errors import InputError

# Seeds are drawn from a uniform sample of the tokens: each costs a look at every token of it. Beyond this many tokens a
# cluster they do not get better, and beyond this many in all they would no longer be cheap to draw, or to keep.
TOKENS_PER_CLUSTER = 1024
MOST_TOKENS = 65536

# Squared distances under this share of the squared norms are formed anew from differences, so many at a time.
CANCELLED = 1e-3
ROWS = 8192

INITS = ("k-means++", "random")


def sample_size(n_clusters: int) -> int:
    """How many tokens seeds are drawn from: 1,024 per cluster, at most 65,536 unless there are more clusters."""
    return max(n_clusters, min(TOKENS_PER_CLUSTER * n_clusters, MOST_TOKENS))


def drawn_seed(random_state: int | np.random.RandomState | None) -> int:
    """A whole number that stands for scikit-learn's ``random_state``; from entropy for ``None``."""
    if random_state is None:
        return torch.Generator().seed() >> 1  # so that it fits into an int64
    if isinstance(random_state, (int, np.integer)):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31))


def seeded_generator(seed: int | None) -> torch.Generator:
    """A CPU generator, seeded, or from entropy for ``None``."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def starts(
    init: str | Tensor | np.ndarray,
    n_clusters: int,
    n_init: int,
    tokens: Tensor,
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> Tensor:
    """The centres that each of ``n_init`` runs starts from.

    Args:
        init: ``"k-means++"``, ``"random"`` (different tokens) or the centres ``[K, D]`` / ``[L, K, D]`` themselves.
        n_clusters: ``K``.
        n_init: how many starts; centres that are given make one.
        tokens: the sample ``[L, n, D]`` to draw from.
        generator: where the draws come from.
        weights: how much each token of the sample counts, ``[L, n]``.

    Returns:
        float32 ``[n_init, L, K, D]``.
    """
    given = given_centers(init, tokens.shape[0], n_clusters, tokens.shape[2])
    if given is not None:
        return given.to(tokens.device)[None]
    draw = plus_plus if init == "k-means++" else _different_tokens
    return torch.stack(
        [
            torch.stack(
                [
                    draw(layer, n_clusters, generator, None if weights is None else weights[index])
                    for index, layer in enumerate(tokens)
                ]
            )
            for _ in range(n_init)
        ]
    )


def given_centers(
    init: str | Tensor | np.ndarray, layers: int, n_clusters: int, features: int
) -> Tensor | None:
    """The centres float32 ``[L, K, D]`` that ``init`` holds; ``None`` if it says how to draw them.

    Raises:
        InputError: neither, or centres of another shape or with NaN or infinite values.
    """
    if isinstance(init, str) and init in INITS:
        return None
    try:
        given = torch.as_tensor(init).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        choices = " or ".join(map(repr, INITS))
        raise InputError(f"init must be {choices} or the centres themselves, got {init!r}") from error
    wanted = (layers, n_clusters, features)
    centers = given if given.ndim == 3 else given[None]
    if tuple(centers.shape) != wanted:
        raise InputError(f"init must hold the centres {list(wanted)}, got {list(given.shape)}")
    if not torch.isfinite(centers).all():
        raise InputError("init holds NaN or infinite values")
    return centers.to(torch.float32, copy=True)


def plus_plus(
    tokens: Tensor, n_clusters: int, generator: torch.Generator, weights: Tensor | None = None
) -> Tensor:
    """Greedy k-means++ seeds: of ``2 + log K`` candidates drawn with probability proportional to the (weighted) squared
    distance to the seeds so far, keep the one that lowers the inertia most.

    Args:
        tokens: ``[T, D]`` with ``T >= n_clusters``.
        n_clusters: ``K``.
        generator: a CPU generator.
        weights: how much each token counts, ``[T]``; ``None`` counts all alike.

    Returns:
        float32 ``[K, D]``.

    Example:
        >>> tokens = torch.tensor([[0.0], [0.1], [9.0]])
        >>> plus_plus(tokens, 2, seeded_generator(0)).round().sort(dim=0).values.flatten().tolist()
        [0.0, 9.0]
    """
    tokens = tokens.float()
    shifted = tokens - tokens.mean(dim=0)
    norms = shifted.square().sum(dim=1)
    weights = tokens.new_ones(len(tokens)) if weights is None else weights.to(tokens)
    trials = 2 + int(math.log(n_clusters))
    chosen: list[Tensor] = []
    closest = torch.ones_like(weights)
    for index in range(n_clusters):
        # The first seed is one draw: every token is as good as its weight.
        candidates = drawn(closest * weights, trials if index else 1, generator)
        distances = _sq_distances(shifted, norms, candidates)
        if index:
            distances = torch.minimum(distances, closest)
        best = (distances * weights).sum(dim=1, dtype=torch.float64).argmin()
        chosen.append(candidates[best])
        closest = distances[best]
    return tokens[torch.stack(chosen)]


def _sq_distances(tokens: Tensor, norms: Tensor, candidates: Tensor) -> Tensor:
    """Of every token ``[T, D]``, with its squared norm ``[T]``, to the candidates among them: ``[C, T]``."""
    both = norms[candidates, None] + norms
    distances = torch.addmm(both, tokens[candidates], tokens.T, alpha=-2)
    # Where little is left of the norms, little is left of their precision: for a token itself it must be zero.
    for near in (distances < CANCELLED * both).nonzero().split(ROWS):
        candidate, token = near.T
        gap = tokens[token] - tokens[candidates[candidate]]
        distances[candidate, token] = gap.square().sum(dim=1)
    return distances


def drawn(weights: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Indices drawn with probability proportional to ``weights``, with replacement."""
    cumulative = weights.double().cumsum(dim=0)
    points = torch.rand(draws, generator=generator, dtype=torch.float64).to(weights.device) * cumulative[-1]
    # right=True never draws an entry of weight zero, but when all are zero.
    return torch.searchsorted(cumulative, points, right=True).clamp(max=len(weights) - 1)


def _different_tokens(
    tokens: Tensor, n_clusters: int, generator: torch.Generator, weights: Tensor | None
) -> Tensor:
    chance = torch.ones(len(tokens), dtype=torch.float64) if weights is None else weights.double().cpu()
    # Each token's exponential waiting time, sped up by its weight: the first K make a draw without replacement.
    waiting = torch.empty(len(tokens), dtype=torch.float64).exponential_(generator=generator) / chance
    return tokens[waiting.topk(n_clusters, largest=False).indices.to(tokens.device)].float()
