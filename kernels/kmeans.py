"""kmeans_step and kmeans_assign: one pass of Lloyd's algorithm over tokens (Eq. 9-10).

Both work on one set of tokens ``[T, D]`` or on ``L`` independent ones ``[L, T, D]``. They are registered with
``torch.library`` as ``spt_fast::kmeans_step`` and ``spt_fast::kmeans_assign``, so that ``torch.compile`` takes them as
they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import kmeans_cpu, kmeans_cuda, kmeans_torch, kmeans_triton
from .backends import Backend, choose_backend

# Best first; what cannot take the tokens at hand is passed over. Which of triton and cuda is faster on a GPU is not
# known yet; triton stands first because its compiler, not we, looks after the memory system.
STEP_BACKENDS = {
    "cpu": Backend(kmeans_cpu.kmeans_step, kmeans_cpu.why_not),
    "triton": Backend(kmeans_triton.kmeans_step, kmeans_triton.why_not),
    "cuda": Backend(kmeans_cuda.kmeans_step, kmeans_cuda.why_not, kmeans_cuda.reads_tokens_once),
    "torch": Backend(kmeans_torch.kmeans_step),
}
ASSIGN_BACKENDS = {
    "cpu": Backend(kmeans_cpu.kmeans_assign, kmeans_cpu.why_not),
    "triton": Backend(kmeans_triton.kmeans_assign, kmeans_triton.why_not),
    "cuda": Backend(kmeans_cuda.kmeans_assign, kmeans_cuda.why_not),
    "torch": Backend(kmeans_torch.kmeans_assign),
}


class KMeansStep(NamedTuple):
    """What one pass over the tokens finds, before any division.

    Attributes:
        sums: float32 ``[.., K, D]``, the sum of the tokens nearest to each centroid.
        counts: int64 ``[.., K]``, how many they are.
        inertia: float64 ``[..]``, the sum of squared distances to the nearest centroid.
    """

    sums: Tensor
    counts: Tensor
    inertia: Tensor


def kmeans_step(x: Tensor, centroids: Tensor, *, backend: str | None = None) -> KMeansStep:
    """Assign every token to its nearest centroid and sum the tokens of each cluster.

    Args:
        x: tokens ``[T, D]`` or ``[L, T, D]``, float32, float16 or bfloat16; any strides; ``T`` may be 0.
        centroids: float32 ``[K, D]`` or ``[L, K, D]``.
        backend: implementation to run; ``None`` takes the best (see :mod:`spt_fast.kernels.backends`).

    Returns:
        :class:`KMeansStep`. Ties go to the lowest index.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, or an unknown backend.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [10.0]])
        >>> step = kmeans_step(x, torch.tensor([[0.0], [9.0]]))
        >>> step.sums.flatten().tolist(), step.counts.tolist(), step.inertia.item()
        ([1.0, 10.0], [2, 1], 2.0)
    """
    _check(x, centroids)
    return KMeansStep(*_step_op(x, centroids, backend))


def kmeans_assign(x: Tensor, centroids: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every token, and how far it is.

    Args:
        x: tokens ``[T, D]`` or ``[L, T, D]``, as for :func:`kmeans_step`.
        centroids: float32 ``[K, D]`` or ``[L, K, D]``.
        backend: implementation to run; ``None`` takes the best.

    Returns:
        ``labels`` int64 ``[.., T]`` (ties go to the lowest index) and ``sq_distances`` float32 ``[.., T]``.

    Raises:
        ValueError: as :func:`kmeans_step`.

    Example:
        >>> labels, sq_distances = kmeans_assign(torch.tensor([[0.0], [7.0]]), torch.tensor([[1.0], [9.0]]))
        >>> labels.tolist(), sq_distances.tolist()
        ([0, 1], [1.0, 4.0])
    """
    _check(x, centroids)
    return _assign_op(x, centroids, backend)


def _check(x: Tensor, centroids: Tensor) -> None:
    if x.ndim not in (2, 3):
        raise ValueError(f"x must be [T, D] or [L, T, D], got {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if centroids.dtype != torch.float32:
        raise ValueError(f"centroids must be float32, got {centroids.dtype}")
    if centroids.ndim != x.ndim or centroids.shape[-1] != x.shape[-1] or centroids.shape[:-2] != x.shape[:-2]:
        wanted = ["K", x.shape[-1]] if x.ndim == 2 else [x.shape[0], "K", x.shape[-1]]
        raise ValueError(
            f"centroids must be {wanted} to match x {list(x.shape)}, got {list(centroids.shape)}"
        )
    if x.shape[-1] == 0:
        raise ValueError(f"x must have at least one feature, got {list(x.shape)}")
    if centroids.shape[-2] == 0:
        raise ValueError("centroids must hold at least one centroid, got K=0")
    if centroids.device != x.device:
        raise ValueError(f"centroids are on {centroids.device} and x on {x.device}")


# The backend is chosen inside the op: a compiled program asks the environment each time it runs, not once when traced.
@torch.library.custom_op("spt_fast::kmeans_step", mutates_args=())
def _step_op(x: Tensor, centroids: Tensor, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    return choose_backend("kmeans_step", STEP_BACKENDS, backend, x, centroids)(x, centroids)


@_step_op.register_fake
def _(x: Tensor, centroids: Tensor, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(centroids, memory_format=torch.contiguous_format),
        centroids.new_empty(centroids.shape[:-1], dtype=torch.int64),
        centroids.new_empty(centroids.shape[:-2], dtype=torch.float64),
    )


@torch.library.custom_op("spt_fast::kmeans_assign", mutates_args=())
def _assign_op(x: Tensor, centroids: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    return choose_backend("kmeans_assign", ASSIGN_BACKENDS, backend, x, centroids)(x, centroids)


@_assign_op.register_fake
def _(x: Tensor, centroids: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.int64), x.new_empty(x.shape[:-1], dtype=torch.float32)
