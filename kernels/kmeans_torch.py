"""The definition of kmeans_step and kmeans_assign in plain torch: short, on any device, the judge of the others."""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of float32 tokens looked at together: several operations pass over a chunk, so it should stay in a core's cache.
CHUNK_BYTES = 1 << 20


def kmeans_step(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest centroid, then a one-hot product; sums of chunks are added in float64."""
    if x.ndim == 3:
        layers = [kmeans_step(tokens, own) for tokens, own in zip(x, centroids, strict=True)]
        return _stacked(layers) if layers else _nothing(centroids)
    k = centroids.shape[0]
    sums = x.new_zeros(centroids.shape, dtype=torch.float64)
    counts = x.new_zeros(k, dtype=torch.int64)
    inertia = x.new_zeros((), dtype=torch.float64)
    clusters = torch.arange(k, device=x.device)
    offset = common_offset(x, centroids)
    for tokens in x.split(_chunk_rows(x)):
        tokens = tokens.float()
        labels, sq_distances = _nearest(tokens, centroids, offset)
        one_hot = (labels[:, None] == clusters).float()
        sums += one_hot.T @ tokens
        counts += torch.bincount(labels, minlength=k)
        inertia += sq_distances.sum(dtype=torch.float64)
    return sums.float(), counts, inertia


def kmeans_assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every token and how far it is, chunk by chunk."""
    labels = x.new_empty(x.shape[:-1], dtype=torch.int64)
    sq_distances = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.ndim == 3:
        for layer, (tokens, own) in enumerate(zip(x, centroids, strict=True)):
            labels[layer], sq_distances[layer] = kmeans_assign(tokens, own)
        return labels, sq_distances
    rows = _chunk_rows(x)
    offset = common_offset(x, centroids)
    for start in range(0, x.shape[0], rows):
        chunk = slice(start, start + rows)
        labels[chunk], sq_distances[chunk] = _nearest(x[chunk].float(), centroids, offset)
    return labels, sq_distances


def common_offset(x: Tensor, centroids: Tensor) -> Tensor:
    """A float32 point ``[.., D]`` in the middle of the tokens ``[.., T, D]``, to measure from.

    The median of a few tokens, feature by feature: no stray centroid moves it, and as it is made of entries of ``x``,
    whole numbers stay whole and exact ties exact.
    """
    tokens = x.shape[-2]
    few = x[..., :: tokens // 16 + 1, :].float() if tokens else centroids
    return few.sort(dim=-2).values[..., few.shape[-2] // 2, :]  # torch.median is not deterministic on a GPU


def _chunk_rows(x: Tensor) -> int:
    # A GPU wants as many rows as fit; its limit is memory, not cache.
    budget = CHUNK_BYTES if x.device.type == "cpu" else 256 * CHUNK_BYTES
    return max(64, budget // (4 * x.shape[1]))


def _nearest(tokens: Tensor, centroids: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    # Only x . c tells centroids apart, and its rounding error grows with the common offset of tokens and centroids;
    # the difference to the chosen centroid is then formed directly, free of cancellation.
    shifted = centroids - offset
    scores = torch.addmm(shifted.square().sum(dim=1), tokens - offset, shifted.T, alpha=-2)
    labels = scores.argmin(dim=1)
    return labels, centroids.index_select(0, labels).sub_(tokens).square_().sum(dim=1)


def _stacked(layers: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    sums, counts, inertia = zip(*layers, strict=True)
    return torch.stack(sums), torch.stack(counts), torch.stack(inertia)


def _nothing(centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    empty = torch.zeros_like(centroids)
    return empty, empty[..., 0].long(), empty[..., 0, 0].double()
