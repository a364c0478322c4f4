"""prompt_attention in plain torch: the definition, a few images or heads at a time.

The scores of a piece stay in a processor's cache between the products, which makes this faster on CPUs than torch's own
attention over concatenated keys (``python -m benchmarks.attention``), except in float32, where it is called; and its
memory does not grow with the batch. Scores and their gradients are at least float32; operands of the other products
keep the inputs' type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .attention_inputs import AttentionInputs

# Scores held at a time. On CPUs they should fit in the second-level caches; elsewhere only memory matters.
SCORES_ON_CPU = 1 << 20
SCORES_ELSEWHERE = 1 << 28

LN_2 = math.log(2)
Piece = tuple[slice, slice]  # images, heads
EVERYTHING = (slice(None), slice(None))


def forward(inputs: AttentionInputs, out: Tensor) -> Tensor:
    """Write the attention into ``out`` ``[B, H, Nq, d]``; returns the log-sum-exp of the scores ``[B, H, Nq]``."""
    if _suits_torchs_own(inputs):
        keys, values = _keys_and_values(inputs, EVERYTHING)
        attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _rows(inputs.q), keys, values, scale=inputs.scale
        )
        out.copy_(attended)
        return lse.contiguous()
    lse = out.new_empty(out.shape[:-1], dtype=torch.promote_types(out.dtype, torch.float32))
    limits = torch.finfo(lse.dtype)
    room = Room()
    for piece in _pieces(inputs):
        keys, values = _keys_and_values(inputs, piece)
        if not keys.shape[2]:
            out[piece], lse[piece] = 0, -torch.inf
            continue
        scores = _scores_base_2(inputs, piece, keys, room)
        # Clamped, so that a query without any key gets zeros.
        highest = scores.amax(dim=-1, keepdim=True).clamp_(min=limits.min)
        powers = scores.sub_(highest).exp2_()
        total = powers.sum(dim=-1, keepdim=True).clamp_(min=limits.tiny)
        divisor = total
        if values.dtype == torch.float16:  # its sums of weights that do not add up to 1 might overflow
            powers, divisor = powers.div_(total), torch.ones_like(total)
        weighted = room("rounded", powers.shape, values).copy_(powers) @ values
        torch.div(weighted, divisor, out=out[piece])
        lse[piece] = total.log2_().add_(highest).squeeze(-1)
    return lse.mul_(LN_2)


def backward(
    inputs: AttentionInputs,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    needs_prompt_k: bool,
    needs_prompt_v: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradients that are not ``None``; returns those of the prompts that are needed."""
    q, num_prompts = inputs.q, inputs.prompt_k.shape[2]
    accumulate = torch.promote_types(q.dtype, torch.float32)
    sums_k, sums_v = (
        q.new_zeros(inputs.prompt_k.shape, dtype=accumulate) if needed else None
        for needed in (needs_prompt_k, needs_prompt_v)
    )
    shift = lse.mul(1 / LN_2).clamp_(min=torch.finfo(lse.dtype).min).unsqueeze(-1)
    if _suits_torchs_own(inputs):
        keys, values = _keys_and_values(inputs, EVERYTHING)
        of_q, of_keys, of_values = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _rows(grad_out), _rows(q), keys, values, out, lse, 0.0, False, scale=inputs.scale
        )
        for own, gradient in (
            (grad_q, of_q),
            (grad_k, of_keys[:, :, num_prompts:]),
            (grad_v, of_values[:, :, num_prompts:]),
        ):
            if own is not None:
                own.copy_(gradient)
        for sums, gradient in ((sums_k, of_keys), (sums_v, of_values)):
            if sums is not None:
                _add_prompts(sums, inputs, EVERYTHING, gradient[:, :, :num_prompts])
        return sums_k, sums_v
    needs_scores = needs_prompt_k or grad_q is not None or grad_k is not None
    room = Room()
    for piece in _pieces(inputs):
        keys, values = _keys_and_values(inputs, piece)
        scores = _scores_base_2(inputs, piece, keys, room)
        weights = scores.sub_(shift[piece]).exp2_()
        upstream = grad_out[piece].contiguous()
        rounded = room("rounded", weights.shape, q)
        if needs_prompt_v or grad_v is not None:
            grad_values = rounded.copy_(weights).transpose(-1, -2) @ upstream
            if grad_v is not None:
                grad_v[piece] = grad_values[:, :, num_prompts:]
            if sums_v is not None:
                _add_prompts(sums_v, inputs, piece, grad_values[:, :, :num_prompts])
        if not needs_scores:
            continue
        # What all values have in common adds the same to all weights' gradients of a query, which softmax does not
        # see. Without it the rest survives the rounding of this product.
        values = values - values.mean(dim=2, keepdim=True)
        products = torch.matmul(upstream, values.transpose(-1, -2), out=rounded)
        grad_weights = room("grad_weights", weights.shape, weights).copy_(products)
        # d softmax: w * (g - sum(w * g)), in one pass.
        torch._softmax_backward_data(grad_weights, weights, -1, accumulate, grad_input=grad_weights)
        grad_scores = rounded.copy_(grad_weights.mul_(inputs.scale))
        if grad_q is not None:
            grad_q[piece] = grad_scores @ keys
        if needs_prompt_k or grad_k is not None:
            grad_keys = grad_scores.transpose(-1, -2) @ q[piece]
            if grad_k is not None:
                grad_k[piece] = grad_keys[:, :, num_prompts:]
            if sums_k is not None:
                _add_prompts(sums_k, inputs, piece, grad_keys[:, :, :num_prompts])
    grad_prompt_k = None if sums_k is None else sums_k.to(q.dtype)
    grad_prompt_v = None if sums_v is None else sums_v.to(q.dtype)
    return grad_prompt_k, grad_prompt_v


def _suits_torchs_own(inputs: AttentionInputs) -> bool:
    """Whether torch's own attention takes these and is faster: it is in float32, and not in half precision."""
    q = inputs.q
    plain = q.device.type == "cpu" and q.dtype == torch.float32 and inputs.prompt_lengths is None
    return plain and bool(q.numel()) and bool(inputs.k.shape[2] + inputs.prompt_k.shape[2])


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class Room:
    """Memory for intermediate results that the pieces use one after another: fresh memory would cost more time than
    what is written there."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        """A tensor of this shape, of the type of ``like``, with anything in it."""
        flat = self.tensors.get(name)
        if flat is None or flat.numel() < shape.numel():
            flat = self.tensors[name] = like.new_empty(shape.numel())
        return flat[: shape.numel()].view(shape)


def _pieces(inputs: AttentionInputs) -> Iterator[Piece]:
    """Slices of the batch, and of the heads where one image has too many scores."""
    batch, heads, num_queries, _ = inputs.q.shape
    per_head = max(1, num_queries * (inputs.prompt_k.shape[2] + inputs.k.shape[2]))
    most = SCORES_ON_CPU if inputs.q.device.type == "cpu" else SCORES_ELSEWHERE
    images_step = max(1, most // max(1, heads * per_head))
    heads_step = max(1, min(heads, most // per_head))
    for images in range(0, batch, images_step):
        for first in range(0, heads, heads_step):
            yield (
                slice(images, min(images + images_step, batch)),
                slice(first, min(first + heads_step, heads)),
            )


def _keys_and_values(inputs: AttentionInputs, piece: Piece) -> tuple[Tensor, Tensor]:
    """The prompts', then the images' own: ``[b, h, P + N, d]``."""
    images, heads = piece
    prompts = [t[:, heads] for t in (inputs.prompt_k, inputs.prompt_v)]
    if inputs.prompt_index is not None:
        prompts = [t[inputs.prompt_index[images]] for t in prompts]
    elif inputs.shared:
        prompts = [t.expand(len(inputs.k[images]), -1, -1, -1) for t in prompts]
    else:
        prompts = [t[images] for t in prompts]
    missing = _missing(inputs, images)
    if missing is not None:  # whatever they hold, if it is no number at all
        prompts = [t.masked_fill(missing[..., None], 0) for t in prompts]
    own = (inputs.k[piece], inputs.v[piece])
    keys, values = (torch.cat(pair, dim=2) for pair in zip(prompts, own, strict=True))
    return keys, values


def _scores_base_2(inputs: AttentionInputs, piece: Piece, keys: Tensor, room: Room) -> Tensor:
    """Scores in units in which softmax takes powers of 2 ``[b, h, Nq, P + N]``: torch is faster at those."""
    accumulate = torch.promote_types(keys.dtype, torch.float32)
    queries = inputs.q[piece].to(accumulate) * (inputs.scale / LN_2)
    shape = torch.Size((*queries.shape[:-1], keys.shape[2]))
    scores = torch.matmul(queries, keys.to(accumulate).transpose(-1, -2), out=room("scores", shape, queries))
    missing = _missing(inputs, piece[0])
    if missing is not None:
        scores[..., : inputs.prompt_k.shape[2]].masked_fill_(missing[:, :, None], -torch.inf)
    return scores


def _missing(inputs: AttentionInputs, images: slice) -> Tensor | None:
    """Which of the images' prompts there are not ``[b, 1, P]``."""
    lengths = inputs.prompt_lengths
    if lengths is None:
        return None
    lengths = lengths[images] if inputs.prompt_index is None else lengths[inputs.prompt_index[images]]
    return torch.arange(inputs.prompt_k.shape[2], device=lengths.device) >= lengths[:, None, None]


def _add_prompts(sums: Tensor, inputs: AttentionInputs, piece: Piece, gradients: Tensor) -> None:
    images, heads = piece
    if inputs.prompt_index is not None:
        sums[:, heads].index_add_(0, inputs.prompt_index[images], gradients.to(sums.dtype))
    elif inputs.shared:
        sums[:, heads] += gradients.sum(dim=0, keepdim=True, dtype=sums.dtype)
    else:
        sums[piece] += gradients
