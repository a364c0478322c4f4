"""What every backend of the k-means ops is judged by: all distances, formed one by one in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Assign = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def check(assign: Assign, step: Step, x: Tensor, centroids: Tensor) -> None:
    """Both ops on ``x`` ``[T, D]`` or ``[L, T, D]``; where two centroids are equally near up to rounding, either is
    right, but both ops must have chosen alike wherever it is not that close."""
    labels, sq_distances = (found.cpu() for found in assign(x, centroids))
    sums, counts, inertia = (found.cpu() for found in step(x, centroids))
    assert (labels.dtype, sq_distances.dtype) == (torch.int64, torch.float32)
    assert (sums.dtype, counts.dtype, inertia.dtype) == (torch.float32, torch.int64, torch.float64)
    assert labels.shape == sq_distances.shape == x.shape[:-1]
    assert sums.shape == centroids.shape
    assert (counts.shape, inertia.shape) == (centroids.shape[:-1], centroids.shape[:-2])
    if x.ndim == 2:
        x, centroids = x[None], centroids[None]
        labels, sq_distances, sums, counts, inertia = (
            found[None] for found in (labels, sq_distances, sums, counts, inertia)
        )
    for layer in range(len(x)):
        _check_layer(
            x[layer].cpu(),
            centroids[layer].cpu(),
            labels[layer],
            sq_distances[layer],
            sums[layer],
            counts[layer],
            inertia[layer],
        )


def _check_layer(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    sq_distances: Tensor,
    sums: Tensor,
    counts: Tensor,
    inertia: Tensor,
) -> None:
    tokens, centers = x.double(), centroids.double()
    exact = torch.stack([(tokens - center).square().sum(dim=1) for center in centers], dim=1)
    nearest = exact.min(dim=1).values
    chosen = exact.gather(1, labels[:, None])[:, 0]
    scale = (centers - centers.mean(dim=0)).square().sum(dim=1).max() + 1e-30
    tolerance = 1e-5 * (nearest + scale)
    if x.dtype != torch.float32:
        # Two half-precision terms for a centroid keep about 16 bits of it.
        tolerance += 2**-15 * tokens.norm(dim=1) * scale.sqrt()
    assert (chosen - nearest <= tolerance).all(), f"a farther centroid by {(chosen - nearest).max():.3g}"
    torch.testing.assert_close(sq_distances.double(), chosen, rtol=1e-4, atol=1e-30)

    # The step must have chosen as the judge did, but for near ties: at most as many tokens may have moved.
    second = exact.topk(min(2, len(centers)), dim=1, largest=False).values[:, -1]
    close = int((second - nearest <= 2 * tolerance).sum()) if len(centers) > 1 else 0
    clear = torch.bincount(exact.argmin(dim=1), minlength=len(centers))
    assert int(counts.sum()) == len(x)
    assert (counts - clear).abs().max() <= close
    if close == 0:
        own = torch.zeros_like(centers).index_add_(0, exact.argmin(dim=1), tokens)
        size = torch.zeros_like(centers).index_add_(0, exact.argmin(dim=1), tokens.abs())
        assert ((sums.double() - own).abs() <= 1e-5 * size + 1e-30).all()
    torch.testing.assert_close(sums.double().sum(dim=0), tokens.sum(dim=0), rtol=0, atol=_rounding(tokens))
    torch.testing.assert_close(inertia, nearest.sum(), rtol=2e-4, atol=1e-30)


def _rounding(tokens: Tensor) -> float:
    """How far a float32 sum of the tokens may be off."""
    return 1e-5 * float(tokens.abs().sum(dim=0).max()) + 1e-30 if len(tokens) else 0.0
