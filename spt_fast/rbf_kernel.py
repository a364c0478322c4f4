"""The Gaussian kernel ``k(x, y) = exp(-|x - y|^2 / (2 s^2))``, and what it makes of distributions.

The mean of ``k(x, .)`` over a distribution is its *mean embedding*, and the distance of two mean embeddings is the
maximum mean discrepancy, MMD (Gretton et al., "A Kernel Two-Sample Test", JMLR 2012). Random Fourier features (Rahimi
and Recht, NIPS 2007) turn the kernel into a dot product: the mean embedding of any number of tokens is then one vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spt_fast.clustering import seeded_generator


def rbf_kernel(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """The kernel of every ``x`` ``[n, D]`` with every ``y`` ``[m, D]``: ``[n, m]`` in their dtype.

    Example:
        >>> rbf_kernel(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [3.0, 4.0]]), bandwidth=5.0)
        tensor([[1.0000, 0.6065]])
    """
    return torch.exp(torch.cdist(x, y).square() / (-2 * bandwidth**2))


def squared_mmd(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """The squared MMD of two samples ``[n, D]`` and ``[m, D]`` as distributions (the V-statistic, at least 0)."""
    within_x, within_y = (rbf_kernel(each, each, bandwidth).mean() for each in (x, y))
    return float(within_x + within_y - 2 * rbf_kernel(x, y, bandwidth).mean())


def median_distance(tokens: Tensor) -> float:
    """The median heuristic: the middle of the distances between different tokens of ``[n, D]``.

    Where more than half of the distances are 0 it is their mean, and 1 if there is no other: never 0.

    Example:
        >>> median_distance(torch.tensor([[0.0], [1.0], [5.0]]))
        4.0
    """
    distances = torch.pdist(tokens.double())
    for middle in (torch.Tensor.median, torch.Tensor.mean):
        found = float(middle(distances)) if len(distances) else 0.0
        if found > 0:
            return found
    return 1.0


class RandomFourierFeatures:
    """``phi`` with ``phi(x) . phi(y)`` near ``k(x, y)``, and 1 for ``x = y``.

    ``phi(x) = [cos(w_1 x / s) .. cos(w_M x / s), sin(w_1 x / s) .. sin(w_M x / s)] / sqrt(M)`` with normal ``w``. A dot
    product is off by about ``1 / sqrt(2 M)`` at most, and does not change when all points are shifted alike.

    Args:
        width: ``D``.
        num_frequencies: ``M``.
        seed: of the frequencies.
        device: where the tokens are.

    Example:
        >>> phi = RandomFourierFeatures(2, num_frequencies=4096, seed=0)
        >>> a, b = phi(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), bandwidth=5.0)
        >>> abs(float(a @ b) - 0.6065) < 0.02
        True
    """

    def __init__(
        self, width: int, num_frequencies: int, seed: int, device: torch.device | None = None
    ) -> None:
        drawn = torch.randn(width, num_frequencies, generator=seeded_generator(seed))
        self.frequencies = drawn.to(device)

    def __call__(self, tokens: Tensor, bandwidth: float) -> Tensor:
        """``[n, D]`` to ``[n, 2 M]``, in float64 for float64 and in float32 for everything narrower."""
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        angles = wide @ self.frequencies.to(wide) / bandwidth
        return torch.cat([angles.cos(), angles.sin()], dim=1) / self.frequencies.shape[1] ** 0.5
