"""The first look at tokens: are they sound, how many are there, how widely do they vary, and a sample to seed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spt_fast.clustering.reservoir import Reservoir
from spt_fast.clustering.sources import Source, common_shape, first_unsound, in_parts, refuse_unsound
from spt_fast.distributed import gathered_numbers, gathered_rows, world
from spt_fast.errors import InputError


@dataclass
class Survey:
    """What one look at all tokens (of all processes together) tells.

    Attributes:
        length: tokens in each layer.
        mean_variance: float64 ``[L]``, the variance of a feature, averaged over features.
        sample: a uniform sample ``[L, n, D]``; all tokens if they are no more than were asked for.
        sample_weights: their weights ``[L, n]``, if tokens have any.
    """

    length: int
    mean_variance: Tensor
    sample: Tensor
    sample_weights: Tensor | None


def take_survey(source: Source, sample_size: int, seed: int) -> Survey:
    """Read all tokens once; once more to count them, where several processes read chunks of unknown length.

    The sample is that of the tokens of all processes, one process after the other, whatever the cuts between them.

    Raises:
        InputError: NaN or infinite tokens, naming the first such row; no tokens anywhere. In all processes alike.
    """
    rank, size = world()
    length = source.length
    if length is None and size > 1:
        length = sum(tokens.shape[1] for tokens, _ in source)
    start = sum(int(counted) for counted in gathered_numbers([length or 0])[:rank, 0])
    moments = Moments()
    reservoir = Reservoir(sample_size, seed)
    reservoir.seen = start
    unsound = -1
    for tokens, weights in source:
        unsound = moments.add(tokens)
        if unsound >= 0:
            break
        reservoir.add(tokens, weights)
    reports = gathered_numbers([moments.length, unsound, moments.layers, moments.features])
    for other, (_, row, _, _) in enumerate(reports.tolist()):
        refuse_unsound(row, other if size > 1 else None)
    length = int(reports[:, 0].sum())
    layers, features = common_shape(reports[:, 2:].tolist())
    if not features:
        raise InputError("X yields no tokens")
    if size > 1:
        moments = _united(moments, layers, features)
        reservoir = reservoir.united(layers, features, source.weighted)
    return Survey(length, moments.mean_variance(), reservoir.tokens(), reservoir.weights())


class Moments:
    """Count, mean and summed squared deviation of a stream of tokens (merged as in Chan et al. 1979)."""

    def __init__(self) -> None:
        self.length = 0
        self.layers = 0
        self.features = 0
        self.mean = torch.zeros(0, 0, dtype=torch.float64)
        self.deviation = torch.zeros(0, dtype=torch.float64)

    def add(self, tokens: Tensor) -> int:
        """Take in ``[L, T, D]``; returns the first row with NaN or infinite values, counted from the first token ever
        added, or -1. Nothing is taken in after such a row."""
        layers, _, features = tokens.shape
        if not self.features:
            self.layers, self.features = layers, features
            self.mean = torch.zeros(layers, features, dtype=torch.float64, device=tokens.device)
            self.deviation = torch.zeros(layers, dtype=torch.float64, device=tokens.device)
        for part in in_parts(tokens):
            if not part.shape[1]:
                continue
            # Measured from one of the tokens, no precision is lost to an offset that they share.
            origin = part[:, :1].float()
            shifted = part.float() - origin
            mean = shifted.mean(dim=1, dtype=torch.float64)
            squares = shifted.square_().sum(dim=2).sum(dim=1, dtype=torch.float64)
            if not torch.isfinite(squares).all():
                unsound = first_unsound(part)
                if unsound >= 0:
                    return self.length + unsound
                shifted = part.double() - origin  # sound, but too large to be squared in float32
                squares = shifted.square().sum(dim=(1, 2))
            deviation = squares - part.shape[1] * mean.square().sum(dim=1)
            self.merge(part.shape[1], mean + origin[:, 0], deviation)
        return -1

    def merge(self, length: int, mean: Tensor, deviation: Tensor) -> None:
        """Take in the moments of other tokens."""
        if length:
            gap = mean - self.mean
            total = self.length + length
            self.mean = self.mean + gap * (length / total)
            self.deviation = self.deviation + deviation.clamp(min=0)
            self.deviation = self.deviation + gap.square().sum(dim=1) * (self.length * length / total)
            self.length = total

    def mean_variance(self) -> Tensor:
        """The variance of a feature, averaged over features: float64 ``[L]``."""
        return self.deviation / max(1, self.length * self.features)


def _united(moments: Moments, layers: int, features: int) -> Moments:
    """The moments of the tokens of all processes together."""
    union = Moments()
    union.layers, union.features = layers, features
    union.mean = torch.zeros(layers, features, dtype=torch.float64)
    union.deviation = torch.zeros(layers, dtype=torch.float64)
    own = [torch.cat([moments.mean.cpu(), moments.deviation.cpu()[:, None]], dim=1)] if moments.length else []
    lengths = gathered_numbers([moments.length])[:, 0]
    parts = gathered_rows(
        torch.stack(own) if own else torch.zeros(0, layers, features + 1, dtype=torch.float64)
    )
    for length, part in zip(lengths[lengths > 0].tolist(), torch.cat(parts), strict=True):
        union.merge(length, part[:, :-1], part[:, -1])
    return union
