"""prompt_attention judged by concatenation in float64, for all backends that work in lower precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spt_fast.kernels import prompt_attention

NAMES = ("q", "k", "v", "prompt_k", "prompt_v")

# Of the norm. Float32 rounds at 6e-8 and its sums here have a few hundred terms. Half precision rounds weights and
# results, at 2e-3 for bfloat16; Triton's interpreter even cuts off, at 5e-3.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}

SETS = 3  # of prompts, where images choose among them


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def concatenated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    scale: float,
    index: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention, and the log-sum-exp of its scores; a query without any key gets zeros."""
    batch, num_prompts = len(q), prompt_k.shape[-2]
    which = torch.arange(batch, device=q.device) if index is None else index
    if prompt_k.ndim == 3:
        prompt_k, prompt_v = (t.expand(batch, *t.shape) for t in (prompt_k, prompt_v))
    else:
        prompt_k, prompt_v = prompt_k[which], prompt_v[which]
    scores = q @ torch.cat([prompt_k, k], dim=2).mT * scale
    if lengths is not None:
        missing = torch.arange(num_prompts, device=q.device) >= lengths[which][:, None]
        missing = torch.cat([missing, missing.new_zeros(batch, k.shape[2])], dim=1)
        scores = scores.masked_fill(missing[:, None, None], -torch.inf)
    lse = scores.logsumexp(dim=3)
    weights = (scores - lse.clamp(min=-1e300)[..., None]).exp()
    return weights @ torch.cat([prompt_v, v], dim=2), lse


def check_close(name: str, got: Tensor, expected: Tensor, slack: float = 1) -> None:
    """By the norm of all errors and by the largest, either measured by the same of what is expected."""
    tolerance = slack * TOLERANCE[got.dtype]
    assert got.shape == expected.shape, f"{name}: {got.shape}, not {expected.shape}"
    if not expected.numel():
        return
    error = got.double() - expected
    assert error.norm() <= tolerance * expected.norm(), f"{name}: {error.norm() / expected.norm()}"
    # A single entry of many may be an outlier of the errors, but not by far.
    assert error.abs().max() <= 4 * tolerance * expected.abs().max(), f"{name}: {error.abs().max()}"


def judge(
    tensors: Sequence[Tensor],
    scale: float | None = None,
    index: Tensor | None = None,
    lengths: Tensor | None = None,
    wanted: Sequence[bool] = (True,) * 5,
    backend: str = "triton",
    slack: float = 1,
) -> None:
    """Check output and gradients; the views among the tensors reach the kernels as they are.

    ``slack`` is how much further from what is expected they may be than usual."""
    ours = [t.detach().requires_grad_(need) for t, need in zip(tensors, wanted, strict=True)]
    judged = [t.detach().double().requires_grad_(need) for t, need in zip(tensors, wanted, strict=True)]
    out = prompt_attention(*ours, scale=scale, prompt_index=index, prompt_lengths=lengths, backend=backend)
    expected, _ = concatenated(*judged, ours[0].shape[3] ** -0.5 if scale is None else scale, index, lengths)
    check_close("out", out, expected, slack)
    cotangent = noise(*out.shape, seed=9).to(out)
    out.backward(cotangent)
    expected.backward(cotangent.double())
    for name, tensor, reference, need in zip(NAMES, ours, judged, wanted, strict=True):
        if need:
            check_close(name, tensor.grad, reference.grad, slack)
        else:
            assert tensor.grad is None, name


def inputs(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    prompts: int,
    width: int,
    sets: str,
    device: str = "cpu",
) -> dict[str, Any]:
    """What to judge: ``sets`` is shared, own (of each image) or index, and may end in -lengths."""
    kind, _, with_lengths = sets.partition("-")
    leading = {"shared": (), "own": (batch,), "index": (SETS,)}[kind]
    shapes = [(batch, heads, rows, width) for rows in (queries, keys, keys)]
    shapes += [(*leading, heads, prompts, width)] * 2
    found: dict[str, Any] = {
        "tensors": [noise(*shape, seed=seed).to(device, dtype) for seed, shape in enumerate(shapes)]
    }
    if kind == "index":
        found["index"] = 2 * torch.arange(batch, device=device) % SETS
    if with_lengths:
        found["lengths"] = 2 * torch.arange(*leading, device=device) % (prompts + 1)
    return found
