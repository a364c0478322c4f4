"""How much prompts and patch tokens tell about each other: the normalised mutual information of Eq. 7-8."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spt_fast.analysis.checks import checked_prompts, checked_tokens, require_finite
from spt_fast.distributed import gathered_rows
from spt_fast.errors import InputError

Per = Literal["dataset", "image"]

# An information that lies outside its bounds by more than this is a mistake and not rounding.
ROUNDING = 1e-9


class MutualInformation:
    """Normalised mutual information of the prompts and the tokens of each block, while the tokens pass.

    With ``s_kj = sigmoid(p_k . e_j)`` and ``Z`` the sum of all of them, Eq. 7 takes ``s_kj / Z`` for the joint
    distribution of prompts and tokens, and Eq. 8 is ``2 I / (H_P + H_E)``. The matrix of all ``s`` is never held: the
    row sums ``r_k`` over the tokens, ``sum_j c_j log c_j`` with the column sums ``c_j`` over the prompts, and
    ``sum_j c_j H(P | e_j)`` are enough, because ``I = H_P - H(P | E)`` and ``H_E = log Z - sum_j c_j log c_j / Z``. All
    of it is float64 and relative to the largest ``s`` so far: sigmoids that are too small for any number count.

    The paper does not say which tokens make up one joint distribution. ``per="dataset"`` takes all tokens of all images
    for one set; ``per="image"`` computes Eq. 8 for the tokens of each image and averages.

    When torch.distributed is initialised, :meth:`compute` is about what all processes have seen.

    Args:
        prompts: ``[L, P, D]``, floating point.
        per: ``"dataset"`` or ``"image"``.

    Raises:
        InputError: prompts that are none, or an unknown ``per``.

    Example:
        >>> prompts, tokens = torch.randn(2, 5, 8), torch.randn(2, 12, 16, 8)
        >>> information = MutualInformation(prompts)
        >>> for batch in tokens.split(4, dim=1):
        ...     information.update(batch)
        >>> at_once = normalized_mutual_information(prompts, tokens.flatten(1, 2))
        >>> torch.allclose(information.compute(), at_once, rtol=0, atol=1e-12)
        True
    """

    def __init__(self, prompts: Tensor, *, per: Per = "dataset") -> None:
        if per not in get_args(Per):
            raise InputError(f"per must be one of {', '.join(get_args(Per))}, got {per!r}")
        self.prompts = checked_prompts(prompts).double()
        self.per = per
        self._sums: _Sums | None = None
        self._total = self.prompts.new_zeros(len(prompts))
        self._images = 0

    def update(self, tokens: Tensor) -> None:
        """Take in the tokens ``[L, B, N, D]`` of ``B`` images.

        Raises:
            InputError: another shape, or NaN or infinite values.
        """
        tokens = checked_tokens(tokens, len(self.prompts), self.prompts.shape[-1])
        if not tokens.shape[1] * tokens.shape[2]:
            return
        self.prompts = self.prompts.to(tokens.device)
        if self.per == "image":
            each = _normalized(_sums_of(self.prompts[:, None], tokens.double()))
            self._total = self._total.to(tokens.device) + each.sum(dim=1)
            self._images += tokens.shape[1]
        else:
            sums = _sums_of(self.prompts, tokens.flatten(1, 2).double())
            self._sums = sums if self._sums is None else _added(self._sums, sums)

    def compute(self) -> Tensor:
        """Eq. 8 for each block: float64 ``[L]`` on the CPU, each in 0 .. 1; 0 where there is one prompt.

        Raises:
            InputError: no token has passed.
        """
        if self.per == "image":
            images = self._total.new_full((1, 1), self._images)
            summed = torch.cat(gathered_rows(torch.cat([self._total[None], images], dim=1))).sum(dim=0).cpu()
            if not summed[-1]:
                raise InputError("tokens: none have passed yet")
            return summed[:-1] / summed[-1]
        blocks, num_prompts, _ = self.prompts.shape
        mine = self.prompts.new_empty(0, blocks, num_prompts + 3)
        if self._sums is not None:
            mine = torch.cat([self._sums.rows, torch.stack(self._sums[1:], dim=-1)], dim=-1)[None]
        whole: _Sums | None = None
        for part in torch.cat(gathered_rows(mine)):
            sums = _Sums(part[:, :num_prompts], *part[:, num_prompts:].unbind(dim=-1))
            whole = sums if whole is None else _added(whole, sums)
        if whole is None:
            raise InputError("tokens: none have passed yet")
        return _normalized(whole).cpu()


def normalized_mutual_information(prompts: Tensor, tokens: Tensor) -> Tensor:
    """Eq. 8 for prompts and tokens that are in memory.

    Args:
        prompts: ``[P, D]``, or ``[L, P, D]`` for ``L`` blocks.
        tokens: ``[T, D]`` or ``[L, T, D]``.

    Returns:
        float64 ``[]`` or ``[L]`` on the CPU, in 0 .. 1. One prompt, or one token, has nothing to tell: 0.

    Raises:
        InputError: shapes that do not belong together, nothing to compare, or NaN or infinite values.

    Example:
        >>> tokens = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
        >>> f"{normalized_mutual_information(9 * torch.eye(2), tokens).item():.4f}"
        '1.0000'
        >>> normalized_mutual_information(torch.ones(2, 2), tokens).item()  # prompts that are all the same
        0.0
    """
    if prompts.ndim == 2:
        return normalized_mutual_information(prompts[None], tokens[None])[0]
    information = MutualInformation(prompts)
    information.update(tokens[:, None])
    return information.compute()


class _Sums(NamedTuple):
    """What Eq. 8 needs to know; the first three are to be multiplied by ``exp(log_scale)``.

    Attributes:
        rows: ``[.., P]``, ``r_k``.
        conditional: ``[..]``, ``sum_j c_j H(P | e_j)``.
        columns: ``[..]``, ``sum_j c_j log c_j`` of the scaled ``c``.
        log_scale: ``[..]``, the logarithm of the largest ``s``.
    """

    rows: Tensor
    conditional: Tensor
    columns: Tensor
    log_scale: Tensor


def _sums_of(prompts: Tensor, tokens: Tensor) -> _Sums:
    """Of prompts ``[.., P, D]`` and tokens ``[.., T, D]``, both float64."""
    products = prompts @ tokens.mT
    require_finite(products)
    log_s = logsigmoid(products)
    log_scale = log_s.amax(dim=(-2, -1))
    log_s = log_s - log_scale[..., None, None]
    log_c = log_s.logsumexp(dim=-2)
    s, c = log_s.exp(), log_c.exp()
    conditional = (s * (log_c[..., None, :] - log_s)).sum(dim=(-2, -1))
    return _Sums(s.sum(dim=-1), conditional, (c * log_c).sum(dim=-1), log_scale)


def _added(one: _Sums, other: _Sums) -> _Sums:
    log_scale = torch.maximum(one.log_scale, other.log_scale)
    rows, conditional, columns = [], [], []
    for each in (one, other):
        shift = each.log_scale - log_scale
        factor = shift.exp()
        rows.append(factor[..., None] * each.rows)
        conditional.append(factor * each.conditional)
        # Of f c the sum of x log x is f (sum of c log c) + f log f (sum of c).
        columns.append(factor * (each.columns + shift * each.rows.sum(dim=-1)))
    return _Sums(sum(rows), sum(conditional), sum(columns), log_scale)  # type: ignore[arg-type]


def _normalized(sums: _Sums) -> Tensor:
    """Eq. 8; the scale cancels."""
    total = sums.rows.sum(dim=-1)
    prompt_entropy = torch.special.entr(sums.rows / total[..., None]).sum(dim=-1).clamp(min=0)
    token_entropy = (total.log() - sums.columns / total).clamp(min=0)
    information = prompt_entropy - sums.conditional / total
    bounded = information.clamp(min=0).minimum(torch.minimum(prompt_entropy, token_entropy))
    if not ((information - bounded).abs() <= ROUNDING).all():
        raise ArithmeticError("a mutual information came out negative, or larger than an entropy")
    entropies = prompt_entropy + token_entropy
    return torch.where(entropies > 0, 2 * bounded / entropies.clamp(min=1e-300), 0.0)
