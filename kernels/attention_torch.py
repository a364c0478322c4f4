"""prompt_attention in plain torch: the definition, a few images at a time.

The scores of a few images stay in a processor's cache between the products, which makes this faster on CPUs than
torch's own attention over concatenated keys (``python -m benchmarks.attention``), and its memory does not grow with
the batch. Scores and their gradients are at least float32; operands of the other products keep the inputs' type.
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


def forward(inputs: AttentionInputs, out: Tensor) -> Tensor:
    """Write the attention into ``out`` ``[B, H, Nq, d]``; returns the log-sum-exp of the scores ``[B, H, Nq]``."""
    lse = out.new_empty(out.shape[:-1], dtype=torch.promote_types(out.dtype, torch.float32))
    for images in _pieces(inputs):
        keys, values = _keys_and_values(inputs, images)
        if not keys.shape[2]:
            out[images], lse[images] = 0, -torch.inf
            continue
        scores = _scores_base_2(inputs, images, keys)
        # Clamped, so that a query without any key gets zeros.
        highest = scores.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        powers = scores.sub_(highest).exp2_()
        total = powers.sum(dim=-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).tiny)
        weights = torch.div(powers, total, out=torch.empty_like(powers, dtype=values.dtype))
        out[images] = weights @ values
        lse[images] = (highest.mul_(LN_2) + total.log_()).squeeze(-1)
    return lse


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
    lowest = torch.finfo(accumulate).min
    needs_scores = needs_prompt_k or grad_q is not None or grad_k is not None
    for images in _pieces(inputs):
        keys, values = _keys_and_values(inputs, images)
        scores = _scores_base_2(inputs, images, keys)
        weights = scores.sub_(lse[images].mul(1 / LN_2).clamp_(min=lowest).unsqueeze(-1)).exp2_()
        upstream = grad_out[images]
        if needs_prompt_v or grad_v is not None:
            grad_values = weights.to(q.dtype).transpose(-1, -2) @ upstream
            if grad_v is not None:
                grad_v[images] = grad_values[:, :, num_prompts:]
            if sums_v is not None:
                _add_prompts(sums_v, inputs, images, grad_values[:, :, :num_prompts])
        if not needs_scores:
            continue
        # What all values have in common adds the same to all weights' gradients of a query, which softmax does not
        # see. Without it the rest survives the rounding of this product.
        values = values - values.mean(dim=2, keepdim=True)
        grad_weights = (upstream @ values.transpose(-1, -2)).to(accumulate)
        # d softmax: w * (g - sum(w * g)), in one pass.
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, accumulate)
        grad_scores = torch.mul(grad_scores, inputs.scale, out=torch.empty_like(grad_scores, dtype=q.dtype))
        if grad_q is not None:
            grad_q[images] = grad_scores @ keys
        if needs_prompt_k or grad_k is not None:
            grad_keys = grad_scores.transpose(-1, -2) @ q[images]
            if grad_k is not None:
                grad_k[images] = grad_keys[:, :, num_prompts:]
            if sums_k is not None:
                _add_prompts(sums_k, inputs, images, grad_keys[:, :, :num_prompts])
    grad_prompt_k = None if sums_k is None else sums_k.to(q.dtype)
    grad_prompt_v = None if sums_v is None else sums_v.to(q.dtype)
    return grad_prompt_k, grad_prompt_v


def _pieces(inputs: AttentionInputs) -> Iterator[slice]:
    """Slices of the batch whose scores are held together."""
    batch, heads, num_queries, _ = inputs.q.shape
    per_image = heads * num_queries * (inputs.prompt_k.shape[2] + inputs.k.shape[2])
    most = SCORES_ON_CPU if inputs.q.device.type == "cpu" else SCORES_ELSEWHERE
    step = max(1, most // max(1, per_image))
    return (slice(start, min(start + step, batch)) for start in range(0, batch, step))


def _keys_and_values(inputs: AttentionInputs, images: slice) -> tuple[Tensor, Tensor]:
    """The prompts', then the images' own: ``[b, H, P + N, d]``."""
    if inputs.prompt_index is not None:
        prompts = [t[inputs.prompt_index[images]] for t in (inputs.prompt_k, inputs.prompt_v)]
    elif inputs.shared:
        count = images.stop - images.start
        prompts = [t.expand(count, -1, -1, -1) for t in (inputs.prompt_k, inputs.prompt_v)]
    else:
        prompts = [inputs.prompt_k[images], inputs.prompt_v[images]]
    missing = _missing(inputs, images)
    if missing is not None:  # whatever they hold, if it is no number at all
        prompts = [t.masked_fill(missing[..., None], 0) for t in prompts]
    own = (inputs.k[images], inputs.v[images])
    keys, values = (torch.cat(pair, dim=2) for pair in zip(prompts, own, strict=True))
    return keys, values


def _scores_base_2(inputs: AttentionInputs, images: slice, keys: Tensor) -> Tensor:
    """Scores in units in which softmax takes powers of 2 ``[b, H, Nq, P + N]``: torch is faster at those."""
    accumulate = torch.promote_types(keys.dtype, torch.float32)
    queries = inputs.q[images].to(accumulate) * (inputs.scale / LN_2)
    scores = queries @ keys.to(accumulate).transpose(-1, -2)
    missing = _missing(inputs, images)
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


def _add_prompts(sums: Tensor, inputs: AttentionInputs, images: slice, gradients: Tensor) -> None:
    if inputs.prompt_index is not None:
        sums.index_add_(0, inputs.prompt_index[images], gradients.to(sums.dtype))
    elif inputs.shared:
        sums += gradients.sum(dim=0, keepdim=True, dtype=sums.dtype)
    else:
        sums[images] += gradients
