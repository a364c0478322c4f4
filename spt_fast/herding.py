"""A few vectors that stand for very many tokens: kernel herding, and a descent on what it leaves.

Herding (Welling, ICML 2009; Chen, Welling and Smola, UAI 2010) picks tokens one after the other, each so that the mean
embedding of those picked comes nearest to that of all tokens. So the first ``P`` picks are the picks for ``P``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spt_fast.clustering.reservoir import Reservoir
from spt_fast.clustering.sources import in_parts
from spt_fast.distributed import all_reduced, broadcast
from spt_fast.errors import InputError
from spt_fast.rbf_kernel import RandomFourierFeatures, median_distance, rbf_kernel

# Two features each; the kernel of two tokens is then known to about 0.02.
FREQUENCIES = 1024
# Tokens that are picked from, a uniform sample of all; more only if more are to be picked.
CANDIDATES = 4096
# Tokens whose distances give the bandwidth.
BANDWIDTH_TOKENS = 1024
DESCENT_STEPS = 50


def herd(features: Tensor, mean: Tensor, count: int) -> Tensor:
    """Which candidates to pick, in order: int64 ``[count]``, all different.

    Pick ``t + 1`` is the candidate with the greatest ``phi(x) . (mean - (phi(x_1) + .. + phi(x_t)) / (t + 1))``: the
    one that brings the mean embedding of the picks nearest to ``mean``, as all features have the same length.

    Args:
        features: ``[n, F]`` of the candidates, all of the same length.
        mean: ``[F]``, the mean embedding to come near.
        count: at most ``n``.

    Example:
        >>> herd(torch.eye(3), torch.tensor([0.5, 0.1, 0.4]), 2)
        tensor([0, 2])
    """
    to_mean = features @ mean
    to_picked = torch.zeros_like(to_mean)
    picks: list[int] = []
    for step in range(1, count + 1):
        score = to_mean - to_picked / step
        score[picks] = -torch.inf
        picks.append(int(score.argmax()))
        to_picked += features @ features[picks[-1]]
    return torch.tensor(picks, device=features.device)


def descend(points: Tensor, tokens: Tensor, bandwidth: float, steps: int = DESCENT_STEPS) -> Tensor:
    """Move points downhill on their squared MMD to a sample of tokens; never to a higher one.

    Plain gradient descent with the exact kernel: each point is drawn to the tokens near it and driven from the other
    points. A step that does not help is halved, one that does is doubled for the next.

    Args:
        points: ``[P, D]``.
        tokens: ``[n, D]``.
        bandwidth: of the kernel.
        steps: how many to try at most.

    Returns:
        ``[P, D]``.
    """
    step = len(points) * bandwidth**2  # about what brings a point to the mean of its tokens in one move
    value, gradient = _discrepancy(points, tokens, bandwidth)
    for _ in range(steps):
        moved = points - step * gradient
        lower, there = _discrepancy(moved, tokens, bandwidth)
        if lower < value:
            points, value, gradient = moved, lower, there
            step *= 2
        else:
            step /= 2
    return points


def _discrepancy(points: Tensor, tokens: Tensor, bandwidth: float) -> tuple[float, Tensor]:
    """The squared MMD but for what depends on the tokens alone, and its gradient ``[P, D]``."""
    among = rbf_kernel(points, points, bandwidth)
    across = rbf_kernel(points, tokens, bandwidth)
    driven = (among @ points - among.sum(dim=1, keepdim=True) * points) / len(points)
    drawn = (across @ tokens - across.sum(dim=1, keepdim=True) * points) / len(tokens)
    gradient = 2 * (driven - drawn) / (len(points) * bandwidth**2)
    return float(among.mean() - 2 * across.mean()), gradient


@dataclass
class Herded:
    """Vectors that stand for the tokens of every layer.

    Attributes:
        values: float32 ``[L, P, D]`` on the CPU.
        squared_mmd: of each layer, their squared MMD to all tokens, by random features.
        descended: in which layers the vectors were moved from the tokens that herding picked.
    """

    values: Tensor
    squared_mmd: list[float]
    descended: list[bool]


class Herding:
    """Vectors of the least maximum mean discrepancy to a stream of tokens, layer by layer.

    One pass: the mean embedding of all tokens is added up, and a bounded uniform sample of them is kept to pick from.
    The bandwidth is the median distance between tokens of the first batch. When torch.distributed is initialised, the
    batches of all processes together are the stream, and all processes hold the same state; each calls
    :meth:`partial_fit` equally often, with an empty batch where it has none.

    Args:
        most: the greatest number of vectors that will be asked for.
        seed: of the features and of the sample.

    Example:
        >>> herding = Herding(most=5, seed=0)
        >>> for batch in torch.randn(2, 1000, 8).split(100, dim=1):
        ...     herding.partial_fit(batch)
        >>> herding.find(5).values.shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, most: int, seed: int) -> None:
        self._seed = seed
        self._sample = Reservoir(max(CANDIDATES, most), seed)
        self._bandwidths = torch.zeros(0, dtype=torch.float64)
        # Both are in float64: the middle of the first batch [L, D], and the sum of all features [L, 2 M].
        self._center = torch.zeros(0, 0, dtype=torch.float64)
        self._sums = torch.zeros(0, 0, dtype=torch.float64)
        self._features: RandomFourierFeatures | None = None

    @property
    def bandwidths(self) -> list[float]:
        """The kernel's bandwidth in each layer."""
        return self._bandwidths.tolist()

    @property
    def tokens(self) -> int:
        """How many have passed in each layer."""
        return self._sample.seen

    def partial_fit(self, tokens: Tensor) -> None:
        """Take in the next tokens, ``[L, t, D]``.

        Raises:
            InputError: NaN or infinite tokens; in all processes alike.
        """
        self._sample.add_from_all(tokens)
        if not len(self._bandwidths):
            self._look_at_first()
        sums = torch.zeros_like(self._sums)
        for part in in_parts(tokens):
            for layer, rows in enumerate(part):
                sums[layer] += self._embed(rows, layer).sum(dim=0, dtype=torch.float64)
        self._sums += all_reduced(sums)
        if not torch.isfinite(self._sums).all():
            raise InputError("the tokens of a layer hold NaN or infinite values")

    def _look_at_first(self) -> None:
        """Bandwidths and origin, from what is the same in all processes."""
        first = self._sample.tokens()
        layers, count, _ = first.shape
        apart = first[:, :: -(-count // BANDWIDTH_TOKENS)]
        self._bandwidths = torch.tensor([median_distance(each) for each in apart], dtype=torch.float64)
        self._center = first.mean(dim=1, dtype=torch.float64)
        self._sums = first.new_zeros(layers, 2 * FREQUENCIES, dtype=torch.float64)

    def _embed(self, rows: Tensor, layer: int) -> Tensor:
        """Features of one layer's tokens, measured from near their middle: far from it angles lose their digits."""
        if self._features is None:
            self._features = RandomFourierFeatures(rows.shape[1], FREQUENCIES, self._seed, rows.device)
        wide = rows if rows.dtype == torch.float64 else rows.float()
        return self._features(wide - self._center[layer].to(wide), float(self._bandwidths[layer]))

    def find(self, count: int) -> Herded:
        """``P = count`` vectors for every layer, at most as many as there were tokens.

        They are the picks of herding, moved by :func:`descend` on the sample where that brings them nearer to the mean
        embedding of all tokens.
        """
        candidates = self._sample.tokens()
        values, discrepancies, descended = [], [], []
        for layer, tokens in enumerate(candidates):
            tokens = tokens.double()
            mean = self._sums[layer] / self.tokens
            picked = tokens[herd(self._embed(tokens, layer), mean, count)]
            center = self._center[layer]
            moved = center + descend(picked - center, tokens - center, float(self._bandwidths[layer]))
            both = [(self._embed(each, layer).mean(dim=0) - mean).square().sum() for each in (picked, moved)]
            better = bool(both[1] < both[0])
            values.append(moved if better else picked)
            discrepancies.append(float(both[better]))
            descended.append(better)
        result = torch.stack(values).float().cpu()
        broadcast([result])
        return Herded(result, discrepancies, descended)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on later."""
        return {
            "bandwidths": self._bandwidths,
            "center": self._center,
            "sums": self._sums,
            **{f"sample.{name}": value for name, value in self._sample.state_dict().items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from :meth:`state_dict` of a herding with the same arguments; from the start if it is empty."""
        if state:
            self._bandwidths = state["bandwidths"].cpu().clone()
            self._center, self._sums = state["center"].clone(), state["sums"].clone()
            prefix = "sample."
            sample = {
                name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)
            }
            self._sample.load_state_dict(sample)
