"""Centred kernel alignment with a linear kernel: how alike two representations are, up to rotation and scale."""

from __future__ import annotations

import torch
from torch import Tensor

from spt_fast.analysis.checks import checked_prompts, checked_tokens, require_finite
from spt_fast.distributed import all_reduced
from spt_fast.errors import InputError


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of two representations of the same examples (Kornblith et al. 2019).

    ``||Y'X||^2 / (||X'X|| ||Y'Y||)`` in Frobenius norms, the columns of X and Y centred.

    Args:
        x: ``[n, D1]``, an example in each row.
        y: ``[n, D2]``, the same examples.

    Returns:
        float64 ``[]``, in 0 .. 1; NaN if one representation is the same for all examples.

    Raises:
        InputError: other shapes.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
        >>> f"{linear_cka(x, 5 * x.flip(1) + 1).item():.6f}"
        '1.000000'
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise InputError(f"x and y must be [n, D1] and [n, D2], got {list(x.shape)} and {list(y.shape)}")
    x, y = x.double() - x.double().mean(dim=0), y.double() - y.double().mean(dim=0)
    alike = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    return alike.clamp(max=1)  # rounding passes 1 by a little


class MinibatchCKA:
    """Linear CKA of representations too large to be compared at once (Nguyen et al. 2021).

    Averages over mini-batches the estimator of HSIC that has no bias (Song et al. 2012); so the result does not grow
    as batches get smaller, as :func:`linear_cka` of few examples and many features does, and may come out below 0.

    Example:
        >>> x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
        >>> cka = MinibatchCKA()
        >>> for batch in x.split(16):
        ...     cka.update(batch[None], torch.stack([batch.flip(1), batch.square()]))
        >>> [[f"{value:.2f}" for value in row] for row in cka.compute().tolist()]
        [['1.00', '0.11']]
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take in a mini-batch of examples.

        Args:
            x: ``[L1, n, D1]``: ``L1`` representations of ``n`` examples.
            y: ``[L2, n, D2]``: others of the same examples.

        Raises:
            InputError: other shapes, or fewer than 4 examples, of which HSIC cannot be estimated without bias.
        """
        if x.ndim != 3 or y.ndim != 3 or x.shape[1] != y.shape[1]:
            raise InputError(
                f"x and y must be [L1, n, D1] and [L2, n, D2], got {list(x.shape)} and {list(y.shape)}"
            )
        if x.shape[1] < 4:
            raise InputError(f"x must hold at least 4 examples, got {x.shape[1]}")
        gram_x, gram_y = _gram(x), _gram(y)
        found = [
            _unbiased_hsic(gram_x[:, None], gram_y[None]),
            _unbiased_hsic(gram_x, gram_x),
            _unbiased_hsic(gram_y, gram_y),
        ]
        self._sums = [a + b for a, b in zip(self._sums, found, strict=True)] if self._sums else found

    def compute(self) -> Tensor:
        """CKA of every representation of x with every one of y: float64 ``[L1, L2]``; NaN where one of them tells
        its examples apart no better than chance.

        Raises:
            InputError: no batch has passed.
        """
        if not self._sums:
            raise InputError("x: no batch has passed yet")
        both, only_x, only_y = self._sums
        return (both / (only_x[:, None].sqrt() * only_y[None].sqrt())).cpu()


class FeatureCKA:
    """Linear CKA of prompts and tokens, which are not equally many, while the tokens pass (Fig. S4).

    The paper does not say how ``P`` prompts are paired with ``T`` tokens. What both have in common are their ``D``
    features, and here these are the examples: a feature is described by its value in each of the prompts, and by its
    value in each of the tokens. So this is ``linear_cka(prompts.T, tokens.T)``: it asks whether the features that go
    together in the prompts are those that go together in the tokens. Centring takes the mean over its features from
    each prompt and token, as LayerNorm does. Of the tokens only the ``D x D`` matrix of each block is kept.

    When torch.distributed is initialised, :meth:`compute` is about what all processes have seen.

    Args:
        blocks: ``L``, whose tokens will pass.
        features: ``D``.

    Example:
        >>> prompts, tokens = torch.randn(2, 5, 8), torch.randn(2, 12, 16, 8)
        >>> cka = FeatureCKA(blocks=2, features=8)
        >>> for batch in tokens.split(4, dim=1):
        ...     cka.update(batch)
        >>> at_once = linear_cka(prompts[0].T, tokens[1].flatten(0, 1).T)
        >>> torch.allclose(cka.compute(prompts)[0, 1], at_once, rtol=0, atol=1e-12)
        True
    """

    def __init__(self, *, blocks: int, features: int) -> None:
        self._gram = torch.zeros(blocks, features, features, dtype=torch.float64)
        self._seen = 0

    def update(self, tokens: Tensor) -> None:
        """Take in the tokens ``[L, B, N, D]`` of ``B`` images.

        Raises:
            InputError: another shape, or NaN or infinite values.
        """
        tokens = checked_tokens(tokens, len(self._gram), self._gram.shape[-1])
        gram = _feature_gram(tokens.flatten(1, 2))
        require_finite(gram)
        self._gram = self._gram.to(tokens.device) + gram
        self._seen += tokens.shape[1] * tokens.shape[2]

    def compute(self, prompts: Tensor) -> Tensor:
        """CKA of prompts ``[L', P, D]`` of any blocks with the tokens of every block.

        Returns:
            float64 ``[L', L]`` on the CPU, in 0 .. 1; NaN where all features have the same values.

        Raises:
            InputError: no token has passed, or prompts of another width.
        """
        prompts = checked_prompts(prompts)
        if prompts.shape[-1] != self._gram.shape[-1]:
            raise InputError(f"prompts must be [L, P, {self._gram.shape[-1]}], got {list(prompts.shape)}")
        if not all_reduced(torch.tensor(self._seen)):
            raise InputError("tokens: none have passed yet")
        tokens = all_reduced(self._gram.clone()).cpu()
        ours = _feature_gram(prompts.cpu())
        ours, tokens = (gram / gram.flatten(1).norm(dim=1)[:, None, None] for gram in (ours, tokens))
        return (ours.flatten(1) @ tokens.flatten(1).T).clamp(max=1)


def _feature_gram(rows: Tensor) -> Tensor:
    """``[.., n, D]`` as ``[.., D, D]``: what centred features have in common over the rows."""
    rows = rows.double()
    centred = rows - rows.mean(dim=-1, keepdim=True)
    return centred.mT @ centred


def _gram(x: Tensor) -> Tensor:
    """``[L, n, D]`` as ``[L, n, n]`` without its diagonal."""
    # HSIC is that of centred examples whichever way they are shifted; near 0 there is the least rounding.
    centred = x.double() - x.double().mean(dim=1, keepdim=True)
    gram = centred @ centred.mT
    gram.diagonal(dim1=1, dim2=2).zero_()
    return gram


def _unbiased_hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741 (the letters of the paper)
    """Eq. 5 of Song et al. (2012) for Gram matrices ``[.., n, n]`` without their diagonals."""
    n = k.shape[-1]
    k_rows, l_rows = k.sum(dim=-1), l.sum(dim=-1)
    both = (k * l).sum(dim=(-2, -1))
    apart = k_rows.sum(dim=-1) * l_rows.sum(dim=-1) / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * (k_rows * l_rows).sum(dim=-1)
    return (both + apart - mixed) / (n * (n - 3))
