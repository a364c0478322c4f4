"""How the tokens are shared out among prompts: the sizes of clusters, and how many of them matter."""

from __future__ import annotations

import torch
from torch import Tensor

from spt_fast.analysis.checks import checked_prompts, checked_tokens, require_finite
from spt_fast.distributed import all_reduced
from spt_fast.errors import InputError
from spt_fast.kernels import kmeans_step


class ClusterSizes:
    """Counts for each prompt the tokens that are nearer to it than to any other, while the tokens pass.

    When torch.distributed is initialised, :meth:`compute` is about what all processes have seen.

    Args:
        prompts: ``[L, P, D]``, floating point.

    Example:
        >>> sizes = ClusterSizes(torch.tensor([[[0.0], [10.0]]]))
        >>> sizes.update(torch.tensor([1.0, 2.0, 9.0]).reshape(1, 1, 3, 1))
        >>> sizes.compute().tolist()
        [[2, 1]]
    """

    def __init__(self, prompts: Tensor) -> None:
        self.prompts = checked_prompts(prompts).float().contiguous()
        self._counts = torch.zeros(self.prompts.shape[:2], dtype=torch.int64, device=prompts.device)

    def update(self, tokens: Tensor) -> None:
        """Take in the tokens ``[L, B, N, D]`` of ``B`` images; in half precision they are compared as they are.

        Raises:
            InputError: another shape, or NaN or infinite values.
        """
        tokens = checked_tokens(tokens, len(self.prompts), self.prompts.shape[-1]).flatten(1, 2)
        if tokens.dtype == torch.float64:
            tokens = tokens.float()  # what the kernels take
        self.prompts, self._counts = self.prompts.to(tokens.device), self._counts.to(tokens.device)
        step = kmeans_step(tokens, self.prompts)
        require_finite(step.inertia)
        self._counts += step.counts

    def compute(self) -> Tensor:
        """int64 ``[L, P]`` on the CPU."""
        return all_reduced(self._counts.clone()).cpu()


def effective_clusters(counts: Tensor) -> Tensor:
    """How many clusters of equal size would be as varied: ``exp`` of the entropy of the clusters' shares.

    Args:
        counts: tokens of each cluster, ``[.., P]``, for example ``Prototypes.counts`` or :meth:`ClusterSizes.compute`.

    Returns:
        float64 ``[..]``: from 1 (one cluster has all tokens) to ``P`` (all have the same number).

    Raises:
        InputError: negative counts, or no token at all.

    Example:
        >>> [f"{value:.2f}" for value in effective_clusters(torch.tensor([[5, 5, 5, 5], [97, 1, 1, 1]])).tolist()]
        ['4.00', '1.18']
    """
    total = counts.double().sum(dim=-1, keepdim=True)
    if (counts < 0).any() or not (total > 0).all():
        raise InputError("counts must be 0 or more, and not all of them 0")
    return torch.special.entr(counts.double() / total).sum(dim=-1).exp()
