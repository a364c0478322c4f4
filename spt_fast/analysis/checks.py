"""What every measure asks of prompts and of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from spt_fast.errors import InputError


def checked_prompts(prompts: Tensor) -> Tensor:
    """Prompts ``[L, P, D]`` without their graph.

    Raises:
        InputError: another shape or dtype, no prompt, or NaN or infinite values.
    """
    if not isinstance(prompts, Tensor) or prompts.ndim != 3 or not prompts.is_floating_point():
        came = f"{prompts.dtype} {list(prompts.shape)}" if isinstance(prompts, Tensor) else type(prompts)
        raise InputError(f"prompts must be floating point [L, P, D], got {came}")
    if not prompts.numel():
        raise InputError(f"prompts must hold at least one prompt, got {list(prompts.shape)}")
    if not torch.isfinite(prompts).all():
        raise InputError("prompts hold NaN or infinite values")
    return prompts.detach()


def checked_tokens(tokens: Tensor, blocks: int, features: int) -> Tensor:
    """Tokens ``[L, B, N, D]`` of ``L = blocks`` blocks, without their graph.

    Raises:
        InputError: another shape or dtype.
    """
    fits = tokens.ndim == 4 and (tokens.shape[0], tokens.shape[-1]) == (blocks, features)
    if not fits or not tokens.is_floating_point():
        raise InputError(
            f"tokens must be floating point [{blocks}, B, N, {features}], got {tokens.dtype} {list(tokens.shape)}"
        )
    return tokens.detach()


def require_finite(made_of_tokens: Tensor) -> None:
    """Raise :class:`InputError` if tokens held NaN or infinite values, by what was made of them.

    That is smaller than the tokens, and reading these once more for each set of prompts would take as long as the
    measure does.
    """
    if not torch.isfinite(made_of_tokens).all():
        raise InputError("tokens hold NaN or infinite values")
