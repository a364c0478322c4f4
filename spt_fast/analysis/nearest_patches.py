"""What a prompt is: the image patches whose tokens come nearest to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spt_fast.analysis.checks import checked_prompts, checked_tokens, require_finite
from spt_fast.errors import InputError


class Nearest(NamedTuple):
    """The patches nearest to each prompt, the nearest first; ``k`` or as many as there are images.

    Attributes:
        images: int64 ``[L, P, k]``: the number of the image among those that passed, from 0.
        positions: int64 ``[L, P, k]``: the number of the patch within its image, row by row.
        distances: float64 ``[L, P, k]``: Euclidean distance of prompt and token.
    """

    images: Tensor
    positions: Tensor
    distances: Tensor


class NearestPatches:
    """Keeps the patches nearest to each prompt while the tokens pass, at most one of each image.

    Of an image only its nearest patch counts: neighbouring patches look alike, and different images show what a prompt
    has in common with all of them. Ties go to the earlier image and patch.

    Args:
        prompts: ``[L, P, D]``, floating point.
        k: most patches to keep for a prompt.

    Raises:
        InputError: prompts that are none, or ``k < 1``.

    Example:
        >>> nearest = NearestPatches(torch.tensor([[[0.0], [10.0]]]), k=1)
        >>> nearest.update(torch.tensor([[1.0, 7.0], [9.0, 8.0]]).reshape(1, 2, 2, 1))
        >>> found = nearest.compute()
        >>> found.images.tolist(), found.positions.tolist(), found.distances.tolist()
        ([[[0], [1]]], [[[0], [0]]], [[[1.0], [1.0]]])
    """

    def __init__(self, prompts: Tensor, *, k: int = 8) -> None:
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        self.prompts = checked_prompts(prompts).double()
        self.k = k
        self._seen = 0
        none = torch.empty(*prompts.shape[:2], 0, dtype=torch.int64, device=prompts.device)
        self._found = Nearest(none, none, none.double())

    def update(self, tokens: Tensor) -> None:
        """Take in the tokens ``[L, B, N, D]`` of the next ``B`` images.

        Raises:
            InputError: another shape, or NaN or infinite values.
        """
        tokens = checked_tokens(tokens, len(self.prompts), self.prompts.shape[-1])
        if not tokens.shape[1] * tokens.shape[2]:
            return
        self.prompts = self.prompts.to(tokens.device)
        distances = torch.cdist(self.prompts, tokens.flatten(1, 2).double())
        require_finite(distances)
        nearest, positions = distances.unflatten(-1, tokens.shape[1:3]).min(dim=-1)
        first = self._seen
        self._seen += tokens.shape[1]
        images = torch.arange(first, self._seen, device=tokens.device).expand_as(positions)
        kept = Nearest(*(each.to(tokens.device) for each in self._found))
        both = Nearest(
            torch.cat([kept.images, images], dim=-1),
            torch.cat([kept.positions, positions], dim=-1),
            torch.cat([kept.distances, nearest], dim=-1),
        )
        order = both.distances.sort(dim=-1, stable=True).indices[..., : self.k]
        self._found = Nearest(*(each.gather(-1, order) for each in both))

    def compute(self) -> Nearest:
        """The patches found, on the CPU.

        Raises:
            InputError: no image has passed.
        """
        if not self._seen:
            raise InputError("tokens: none have passed yet")
        return Nearest(*(each.cpu() for each in self._found))
