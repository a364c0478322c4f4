"""What every backend of prompt_attention is given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionInputs(NamedTuple):
    """Checked inputs; all tensors on one device, all but the last two of one floating dtype, any strides.

    Attributes:
        q: ``[B, H, Nq, d]``.
        k: ``[B, H, N, d]``.
        v: ``[B, H, N, d]``.
        prompt_k: ``[S, H, P, d]``, ``S`` sets of prompts.
        prompt_v: ``[S, H, P, d]``.
        prompt_index: int64 ``[B]``, the set of every image; ``None``: one set for all (``S = 1``) or for each image its
            own (``S = B``).
        prompt_lengths: int64 ``[S]``, how many of a set's ``P`` prompts there are; ``None``: all.
        scale: factor on the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prompt_k: Tensor
    prompt_v: Tensor
    prompt_index: Tensor | None
    prompt_lengths: Tensor | None
    scale: float

    @property
    def shared(self) -> bool:
        """Whether all images have the same prompts."""
        return self.prompt_index is None and self.prompt_k.shape[0] == 1
