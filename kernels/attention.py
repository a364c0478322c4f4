"""prompt_attention: attention of an image's tokens over the prompts and over themselves.

Both forms are ops of ``torch.library``, ``spt_fast::prompt_attention`` and ``spt_fast::prompt_attention_packed``,
each with its backward pass as an op of its own, so that ``torch.compile`` takes them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import attention_torch, attention_triton
from .attention_inputs import AttentionInputs
from .backends import Backend, choose_backend

# Best first. A backend is a module with the functions forward and backward.
BACKENDS = {
    "triton": Backend(attention_triton, attention_triton.why_not),
    "torch": Backend(attention_torch),
}


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *,
    scale: float | None = None,
    prompt_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention whose keys and values are the prompts' followed by the image's own (the inside of Eq. 6, 13).

    Equals ``scaled_dot_product_attention(q, cat([prompt_k, k]), cat([prompt_v, v]))`` along the sequence. Under
    autocast all five tensors are cast first, as torch does for its own attention.

    Args:
        q: queries ``[B, H, Nq, d]``; any strides, as for the others.
        k: keys ``[B, H, N, d]``.
        v: values ``[B, H, N, d]``.
        prompt_k: prompt keys ``[H, P, d]``, shared by the batch, or ``[B, H, P, d]``, one set for each image, or, with
            ``prompt_index``, ``[S, H, P, d]``: sets to choose from.
        prompt_v: prompt values, of the same shape as ``prompt_k``.
        scale: factor on the scores; ``None`` is ``1 / sqrt(d)``.
        prompt_index: integers ``[B]``: the set of prompts of every image, 0 to ``S - 1`` (not checked on GPUs, where
            looking would stall the device).
        prompt_lengths: integers ``[S]`` (or ``[B]`` without ``prompt_index``): how many of the ``P`` prompts of a set
            there are; what lies behind them is ignored, and gets no gradient. Only for prompts with four dimensions.
        backend: implementation to run; ``None`` takes the best (see :mod:`spt_fast.kernels.backends`).

    Returns:
        ``[B, H, Nq, d]`` in the dtype of ``q``, in memory ``[B, Nq, H, d]``: ``transpose(1, 2).flatten(2)`` is a view.
        Differentiable in all five tensors; gradients of prompts that several images share are summed over these
        in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, or an unknown backend.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8)
        >>> prompt_attention(q, k, v, torch.randn(4, 3, 8), torch.randn(4, 3, 8)).shape
        torch.Size([2, 4, 5, 8])
    """
    q, k, v, prompt_k, prompt_v = _autocast(q, k, v, prompt_k, prompt_v)
    _check_own(q, k, v)
    batch, heads, _, width = q.shape
    prompt_k, prompt_v = _check_prompts(
        q, batch, heads, width, prompt_k, prompt_v, prompt_index, prompt_lengths
    )
    index, lengths = _check_sets(q, prompt_k, prompt_index, prompt_lengths)
    scale = width**-0.5 if scale is None else float(scale)
    return _op(q, k, v, prompt_k, prompt_v, index, lengths, scale, backend)[0]


def prompt_attention_packed(
    qkv: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *,
    scale: float | None = None,
    prompt_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`prompt_attention` on the output of a block's query-key-value projection as it lies in memory.

    The gradient comes in the same layout, so that none of the three is ever copied.

    Args:
        qkv: ``[B, N, 3, H, d]``: queries, keys and values side by side.
        prompt_k: as for :func:`prompt_attention`, like all that follow.
        prompt_v: prompt values.
        scale: factor on the scores; ``None`` is ``1 / sqrt(d)``.
        prompt_index: the set of prompts of every image.
        prompt_lengths: how many prompts a set has.
        backend: implementation to run.

    Returns:
        ``[B, N, H, d]``, contiguous.

    Raises:
        ValueError: as :func:`prompt_attention`.

    Example:
        >>> qkv = torch.randn(2, 5, 3, 4, 8)
        >>> prompt_attention_packed(qkv, torch.randn(4, 3, 8), torch.randn(4, 3, 8)).shape
        torch.Size([2, 5, 4, 8])
    """
    qkv, prompt_k, prompt_v = _autocast(qkv, prompt_k, prompt_v)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [B, N, 3, H, d], got {list(qkv.shape)}")
    batch, _, _, heads, width = qkv.shape
    prompt_k, prompt_v = _check_prompts(
        qkv, batch, heads, width, prompt_k, prompt_v, prompt_index, prompt_lengths
    )
    index, lengths = _check_sets(qkv, prompt_k, prompt_index, prompt_lengths)
    scale = width**-0.5 if scale is None else float(scale)
    return _packed_op(qkv, prompt_k, prompt_v, index, lengths, scale, backend)[0]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _check_own(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be [B, H, Nq, d], got {list(q.shape)}")
    batch, heads, _, width = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, width):
        raise ValueError(f"k must be [{batch}, {heads}, N, {width}] to match q, got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {list(k.shape)}, got {list(v.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        _check_kind(name, tensor, "q", q)


def _check_prompts(
    own: Tensor,
    batch: int,
    heads: int,
    width: int,
    prompt_k: Tensor,
    prompt_v: Tensor,
    prompt_index: Tensor | None,
    prompt_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The prompts as sets ``[S, H, P, d]``."""
    first = "q" if own.ndim == 4 else "qkv"
    if not own.is_floating_point():
        raise ValueError(f"{first} must be floating point, got {own.dtype}")
    if not width:
        raise ValueError(f"{first} must have at least one feature per head, got {list(own.shape)}")
    shape = list(prompt_k.shape)
    fits = prompt_k.ndim in (3, 4) and (shape[-3], shape[-1]) == (heads, width)
    if prompt_index is not None:
        if not (fits and prompt_k.ndim == 4 and (shape[0] or not batch)):
            raise ValueError(
                f"prompt_k must be [S, {heads}, P, {width}] to match {first} and prompt_index, got {shape}"
            )
    elif not fits or (prompt_k.ndim == 4 and shape[0] != batch):
        raise ValueError(
            f"prompt_k must be [{heads}, P, {width}] or [{batch}, {heads}, P, {width}] to match {first}, got {shape}"
        )
    if prompt_lengths is not None and prompt_k.ndim == 3:
        raise ValueError(f"prompt_lengths needs prompt_k with four dimensions, got {shape}")
    if prompt_v.shape != prompt_k.shape:
        raise ValueError(f"prompt_v must have the shape of prompt_k, {shape}, got {list(prompt_v.shape)}")
    for name, tensor in (("prompt_k", prompt_k), ("prompt_v", prompt_v)):
        _check_kind(name, tensor, first, own)
    return (prompt_k[None], prompt_v[None]) if prompt_k.ndim == 3 else (prompt_k, prompt_v)


def _check_sets(
    own: Tensor, prompt_k: Tensor, prompt_index: Tensor | None, prompt_lengths: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Index and lengths as int64."""
    checked = []
    for name, tensor, length in (
        ("prompt_index", prompt_index, own.shape[0]),
        ("prompt_lengths", prompt_lengths, prompt_k.shape[0]),
    ):
        if tensor is not None:
            if tensor.dtype not in (torch.int32, torch.int64) or list(tensor.shape) != [length]:
                raise ValueError(
                    f"{name} must be integers [{length}], got {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor.device != own.device:
                raise ValueError(f"{name} is on {tensor.device} and the queries on {own.device}")
            tensor = tensor.long()
        checked.append(tensor)
    return checked[0], checked[1]


def _check_kind(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device} and {other_name} is {other.dtype} on {other.device}"
        )


def _run(which_pass: str, inputs: AttentionInputs, backend: str | None, *others: Any) -> Any:
    """One pass of the chosen backend."""
    tensors = (inputs.q, inputs.k, inputs.v, inputs.prompt_k, inputs.prompt_v)
    chosen = choose_backend("prompt_attention", BACKENDS, backend, *tensors)
    # Autocast has done its work at the door; products inside know best what they need.
    with torch.autocast(inputs.q.device.type, enabled=False):
        return getattr(chosen, which_pass)(inputs, *others)


def _forward(inputs: AttentionInputs, backend: str | None) -> tuple[Tensor, Tensor]:
    """The output in memory ``[B, Nq, H, d]``, and the log-sum-exp of the scores ``[B, H, Nq]``."""
    index, sets = inputs.prompt_index, inputs.prompt_k.shape[0]
    if index is not None and index.device.type == "cpu" and index.numel():
        low, high = index.aminmax()
        if low < 0 or high >= sets:
            raise ValueError(
                f"prompt_index must be from 0 to {sets - 1}, the sets of prompts, got {low} to {high}"
            )
    batch, heads, num_queries, width = inputs.q.shape
    out = inputs.q.new_empty(batch, num_queries, heads, width)
    lse = _run("forward", inputs, backend, out.transpose(1, 2))
    return out, lse


# The backend is chosen inside the ops: a compiled program asks the environment each time it runs, not once when traced.
# What a pass needs is written by one backend and can be read by any other.
@torch.library.custom_op("spt_fast::prompt_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    prompt_index: Tensor | None,
    prompt_lengths: Tensor | None,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    inputs = AttentionInputs(q, k, v, prompt_k, prompt_v, prompt_index, prompt_lengths, scale)
    out, lse = _forward(inputs, backend)
    return out.transpose(1, 2), lse


@torch.library.custom_op("spt_fast::prompt_attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    prompt_index: Tensor | None,
    prompt_lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    backend: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = AttentionInputs(q, k, v, prompt_k, prompt_v, prompt_index, prompt_lengths, scale)
    own = [_like_rows(t) if needed else None for t, needed in zip((q, k, v), needs, strict=False)]
    prompts = _run("backward", inputs, backend, grad_out, out, lse, *own, *needs[3:])
    grad_q, grad_k, grad_v, grad_prompt_k, grad_prompt_v = (
        q.new_empty(0) if gradient is None else gradient for gradient in (*own, *prompts)
    )
    return grad_q, grad_k, grad_v, grad_prompt_k, grad_prompt_v


@torch.library.custom_op("spt_fast::prompt_attention_packed", mutates_args=())
def _packed_op(
    qkv: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    prompt_index: Tensor | None,
    prompt_lengths: Tensor | None,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = _unpack(qkv)
    inputs = AttentionInputs(q, k, v, prompt_k, prompt_v, prompt_index, prompt_lengths, scale)
    return _forward(inputs, backend)


@torch.library.custom_op("spt_fast::prompt_attention_packed_backward", mutates_args=())
def _packed_backward_op(
    grad_out: Tensor,
    qkv: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    prompt_index: Tensor | None,
    prompt_lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    backend: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = AttentionInputs(*_unpack(qkv), prompt_k, prompt_v, prompt_index, prompt_lengths, scale)
    grad_qkv = qkv.new_empty(qkv.shape if needs[0] else 0)
    own = _unpack(grad_qkv) if needs[0] else (None, None, None)
    grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
    prompts = _run("backward", inputs, backend, grad_out, out, lse, *own, *needs[1:])
    grad_prompt_k, grad_prompt_v = (
        qkv.new_empty(0) if gradient is None else gradient for gradient in prompts
    )
    return grad_qkv, grad_prompt_k, grad_prompt_v


def _unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, N, 3, H, d]`` to views ``[B, H, N, d]``."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _like_rows(t: Tensor) -> Tensor:
    """Room for a gradient ``[B, H, N, d]`` in memory ``[B, N, H, d]``, as projections are laid out."""
    batch, heads, length, width = t.shape
    return t.new_empty(batch, length, heads, width).transpose(1, 2)


def _lse_like(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


@_op.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like_rows(q), _lse_like(q)


@_backward_op.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[-1]
    own = [_like_rows(t) if needed else q.new_empty(0) for t, needed in zip((q, k, v), needs, strict=False)]
    return (*own, *_fake_prompts((prompt_k, prompt_v), needs[3:]))


@_packed_op.register_fake
def _(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, width = qkv.shape
    return qkv.new_empty(batch, length, heads, width), _lse_like(_unpack(qkv)[0])


@_packed_backward_op.register_fake
def _(grad_out: Tensor, qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    return (qkv.new_empty(qkv.shape if needs[0] else 0), *_fake_prompts((prompt_k, prompt_v), needs[1:]))


def _fake_prompts(prompts: tuple[Tensor, Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape if needed else 0) for t, needed in zip(prompts, needs, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(backward_op: Any, ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the tensors that need one; ``None`` for the others, and for index, lengths, scale, backend."""
    *differentiable, index, lengths, out, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[: len(differentiable)])
    gradients = backward_op(
        grad_out, *differentiable, index, lengths, out, lse, ctx.scale, ctx.backend, needs
    )
    kept = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return (*kept, None, None, None, None)


_op.register_autograd(
    lambda ctx, grad_out, _: _differentiate(_backward_op, ctx, grad_out), setup_context=_save
)
_packed_op.register_autograd(
    lambda ctx, grad_out, _: _differentiate(_packed_backward_op, ctx, grad_out), setup_context=_save
)
