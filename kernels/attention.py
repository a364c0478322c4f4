"""prompt_attention: attention of an image's tokens over the prompts and over themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Backend, choose_backend


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention whose keys and values are the prompts' followed by the image's own (the inside of Eq. 6, 13).

    Equals ``scaled_dot_product_attention(q, cat([prompt_k, k]), cat([prompt_v, v]))`` along the sequence.

    Args:
        q: queries ``[B, H, Nq, d]``.
        k: keys ``[B, H, N, d]``.
        v: values ``[B, H, N, d]``.
        prompt_k: prompt keys ``[H, P, d]``, shared by the batch, or ``[B, H, P, d]``, one set for each image.
        prompt_v: prompt values, of the same shape as ``prompt_k``.
        scale: factor on the scores; ``None`` is ``1 / sqrt(d)``.
        backend: implementation to run; ``None`` takes the best (see :mod:`spt_fast.kernels.backends`).

    Returns:
        ``[B, H, Nq, d]`` in the dtype of ``q``. Differentiable in all five tensors; gradients of shared prompts are
        summed over the batch.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, or an unknown backend.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8)
        >>> prompt_attention(q, k, v, torch.randn(4, 3, 8), torch.randn(4, 3, 8)).shape
        torch.Size([2, 4, 5, 8])
    """
    _check(q, k, v, prompt_k, prompt_v)
    run = choose_backend("prompt_attention", BACKENDS, backend, q, k, v, prompt_k, prompt_v)
    return run(q, k, v, prompt_k, prompt_v, scale=scale)


def _check(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be [B, H, Nq, d], got {list(q.shape)}")
    batch, heads, _, width = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, width):
        raise ValueError(f"k must be [{batch}, {heads}, N, {width}] to match q, got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {list(k.shape)}, got {list(v.shape)}")
    shared = prompt_k.ndim == 3 and (prompt_k.shape[0], prompt_k.shape[2]) == (heads, width)
    own = prompt_k.ndim == 4 and (prompt_k.shape[0], prompt_k.shape[1], prompt_k.shape[3]) == (
        batch,
        heads,
        width,
    )
    if not (shared or own):
        raise ValueError(
            f"prompt_k must be [{heads}, P, {width}] or [{batch}, {heads}, P, {width}] to match q, "
            f"got {list(prompt_k.shape)}"
        )
    if prompt_v.shape != prompt_k.shape:
        raise ValueError(
            f"prompt_v must have the shape of prompt_k, {list(prompt_k.shape)}, got {list(prompt_v.shape)}"
        )
    for name, tensor in (("k", k), ("v", v), ("prompt_k", prompt_k), ("prompt_v", prompt_v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device} and q is {q.dtype} on {q.device}")


def prompt_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, *, scale: float | None
) -> Tensor:
    """The definition: concatenate, then attend."""
    if prompt_k.ndim == 3:
        prompt_k, prompt_v = (t.expand(q.shape[0], -1, -1, -1) for t in (prompt_k, prompt_v))
    keys, values = torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)
    return F.scaled_dot_product_attention(q, keys, values, scale=scale)


BACKENDS = {"torch": Backend(prompt_attention_torch)}
