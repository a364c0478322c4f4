"""Maximum mean discrepancy: how far the distribution of prompts is from that of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spt_fast.analysis.checks import checked_prompts, checked_tokens, require_finite
from spt_fast.clustering.reservoir import Reservoir
from spt_fast.distributed import all_reduced, world
from spt_fast.errors import InputError
from spt_fast.rbf_kernel import median_distance, rbf_kernel

# Rows of a matrix of kernel values that are computed at once.
ROWS_AT_ONCE = 1024


class Discrepancies(NamedTuple):
    """What :meth:`MaximumMeanDiscrepancy.compute` found.

    Attributes:
        values: for each set of prompts the squared MMD of each of its blocks, float64 ``[L]`` or ``[1]`` on the CPU.
        bandwidth: ``h`` of each block, float64 ``[L]`` on the CPU.
    """

    values: list[Tensor]
    bandwidth: Tensor


class MaximumMeanDiscrepancy:
    """Squared MMD of prompts and tokens with a Gaussian kernel, block by block, while the tokens pass.

    The estimator without bias (Gretton et al. 2012, Lemma 6): the mean of ``k(p, p')`` over pairs of different prompts,
    plus the mean of ``k(e, e')`` over pairs of different tokens, minus twice the mean of ``k(p, e)``, where
    ``k(x, y) = exp(-||x - y||^2 / (2 h^2))``. It may come out slightly below 0 where the distributions are the same.

    The mean over prompts and tokens is over every token. That over pairs of tokens is over a uniform sample of
    ``sample_size`` tokens, and exact if there are no more. The bandwidth ``h`` of a block is the median distance among
    the first ``sample_size`` tokens and all prompts together (:func:`spt_fast.rbf_kernel.median_distance`); all sets of
    prompts are measured with the same, so that they can be compared.

    When torch.distributed is initialised, ``bandwidth`` must be given, and :meth:`compute` is about what all processes
    have seen.

    Args:
        prompt_sets: sets of prompts, each ``[L, P, D]`` with ``P >= 2``, or ``[1, P, D]``, which is compared with the
            first block's tokens.
        bandwidth: ``h`` of each block, ``[L]``, in units of the tokens; ``None``: the median.
        sample_size: most tokens whose distances to each other are looked at.
        seed: of the sample.

    Raises:
        InputError: no prompts, prompts that are too few or of different widths, or an argument out of range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> near, tokens = torch.randn(1, 30, 4, generator=generator), torch.randn(1, 5, 40, 4, generator=generator)
        >>> mmd = MaximumMeanDiscrepancy([near, near + 3])
        >>> mmd.update(tokens)
        >>> [f"{value.item():.1f}" for value in mmd.compute().values]
        ['-0.0', '1.1']
    """

    def __init__(
        self,
        prompt_sets: Sequence[Tensor],
        *,
        bandwidth: Tensor | None = None,
        sample_size: int = 1024,
        seed: int = 0,
    ) -> None:
        self.prompt_sets = [checked_prompts(prompts).double() for prompts in prompt_sets]
        if not self.prompt_sets:
            raise InputError("prompt_sets must hold prompts, got none")
        self.blocks = max(map(len, self.prompt_sets))
        self.features = self.prompt_sets[0].shape[-1]
        for prompts in self.prompt_sets:
            if prompts.shape[-1] != self.features or len(prompts) not in (1, self.blocks):
                wanted = f"[{self.blocks}, P, {self.features}]"
                raise InputError(
                    f"prompt_sets must all be {wanted} or of one block, got {list(prompts.shape)}"
                )
            if prompts.shape[1] < 2:
                raise InputError("prompt_sets must have at least 2 prompts for each block, got 1")
        if sample_size < 2:
            raise InputError(f"sample_size must be at least 2, got {sample_size}")
        if bandwidth is not None and (bandwidth.shape != (self.blocks,) or not (bandwidth > 0).all()):
            raise InputError(f"bandwidth must be {self.blocks} positive numbers, got {bandwidth.tolist()}")
        if bandwidth is None and world()[1] > 1:
            raise InputError("bandwidth must be given where several processes share the tokens")
        self.bandwidth = None if bandwidth is None else bandwidth.double()
        self._sample = Reservoir(sample_size, seed)
        # Sums of the kernel of prompts and tokens, of all tokens but those that still wait for a bandwidth.
        self._across = [prompts.new_zeros(len(prompts)) for prompts in self.prompt_sets]

    def update(self, tokens: Tensor) -> None:
        """Take in the tokens ``[L, B, N, D]`` of ``B`` images.

        Raises:
            InputError: another shape, or NaN or infinite values.
        """
        tokens = checked_tokens(tokens, self.blocks, self.features).flatten(1, 2)
        require_finite(tokens)  # the kernel is 0 of infinite distances
        self._to(tokens.device)
        if self.bandwidth is None:
            # As long as the sample has room it holds every token; the last that fit in are waited for.
            room = self._sample.capacity - self._sample.seen
            self._sample.add(tokens[:, :room])
            if tokens.shape[1] < room:
                return
            waiting = self._sample.tokens().double()
            self.bandwidth = self._median_bandwidth(waiting)
            self._across = self._kernel_sums_across(waiting, self.bandwidth)
            tokens = tokens[:, room:]
        self._sample.add(tokens)
        more = self._kernel_sums_across(tokens.double(), self.bandwidth)
        self._across = [sums + added for sums, added in zip(self._across, more, strict=True)]

    def compute(self) -> Discrepancies:
        """The squared MMD of what has passed so far.

        Raises:
            InputError: fewer than two tokens have passed.
        """
        seen = int(all_reduced(torch.tensor(self._sample.seen)))
        if seen < 2:
            raise InputError(f"tokens: {seen} have passed, and at least 2 are needed")
        sample = self._sample.united(self.blocks, self.features, False) if world()[1] > 1 else self._sample
        kept = sample.tokens().to(self.prompt_sets[0].device).double()
        bandwidth, sums_across = self.bandwidth, self._across
        if bandwidth is None:
            bandwidth = self._median_bandwidth(kept)
            sums_across = self._kernel_sums_across(kept, bandwidth)
        among_tokens = _mean_of_pairs(kept, bandwidth)
        values = []
        for prompts, sums in zip(self.prompt_sets, sums_across, strict=True):
            blocks, number, _ = prompts.shape
            among_prompts = _mean_of_pairs(prompts, bandwidth[:blocks])
            across = all_reduced(sums.clone()) / (number * seen)
            values.append((among_prompts + among_tokens[:blocks] - 2 * across).cpu())
        return Discrepancies(values, bandwidth.cpu())

    def _median_bandwidth(self, tokens: Tensor) -> Tensor:
        distances = []
        for block in range(self.blocks):
            prompts = [prompts[block] for prompts in self.prompt_sets if block < len(prompts)]
            distances.append(median_distance(torch.cat([tokens[block], *prompts])))
        return tokens.new_tensor(distances)

    def _kernel_sums_across(self, tokens: Tensor, bandwidth: Tensor) -> list[Tensor]:
        return [
            _kernel_sums(prompts, tokens[: len(prompts)], bandwidth[: len(prompts)])
            for prompts in self.prompt_sets
        ]

    def _to(self, device: torch.device) -> None:
        self.prompt_sets = [prompts.to(device) for prompts in self.prompt_sets]
        self._across = [across.to(device) for across in self._across]
        self.bandwidth = None if self.bandwidth is None else self.bandwidth.to(device)


def _kernel_sums(x: Tensor, y: Tensor, bandwidth: Tensor) -> Tensor:
    """The sum of the kernel over all pairs of ``[L, n, D]`` and ``[L, m, D]``: ``[L]``."""
    sums = torch.zeros_like(bandwidth)
    for block, width in enumerate(bandwidth.tolist()):
        for start in range(0, y.shape[1], ROWS_AT_ONCE):
            sums[block] += rbf_kernel(x[block], y[block, start : start + ROWS_AT_ONCE], width).sum()
    return sums


def _mean_of_pairs(x: Tensor, bandwidth: Tensor) -> Tensor:
    """The mean of the kernel over pairs of different rows of ``[L, n, D]``: ``[L]``."""
    n = x.shape[1]
    return (_kernel_sums(x, x, bandwidth) - n) / (n * (n - 1))
