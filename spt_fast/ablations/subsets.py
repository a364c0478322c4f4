"""Fewer images of each class: a cap, a share, a few shots, a long tail; a smaller choice lies within a larger one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from spt_fast.data import ImageDataset
from spt_fast.errors import InputError

SubsetKind = Literal["fraction", "shots", "imbalance"]


@dataclass(frozen=True)
class Subset:
    """How many of the training images of each class a run gets.

    Attributes:
        kind: ``"fraction"``: this share of every class, one image at least; ``"shots"``: this many of every class;
            ``"imbalance"``: ``n_max * imbalance ** (-i / (C - 1))`` of class ``i`` of ``C``, rounded down, one at least
            (the exponential profile of Cui et al. 2019); ``n_max`` is the size of the smallest class, so that every
            class could be the largest.
        value: the share in (0, 1], the number of images, or how many times larger the first class is than the last.

    Raises:
        InputError: an unknown kind, or a value that cannot be.

    Example:
        >>> Subset("imbalance", 100).counts([500] * 5)
        [500, 158, 50, 15, 5]
    """

    kind: SubsetKind
    value: float

    def __post_init__(self) -> None:
        expected = {
            "fraction": not 0 < self.value <= 1 and "in (0, 1]",
            "shots": not (self.value >= 1 and self.value % 1 == 0) and "a whole number of at least 1",
            "imbalance": not 1 <= self.value < math.inf and "at least 1 and finite",
        }
        if self.kind not in expected:
            raise InputError(f"kind must be one of {', '.join(get_args(SubsetKind))}, got {self.kind!r}")
        if expected[self.kind]:
            raise InputError(f"{self.kind} must be {expected[self.kind]}, got {self.value!r}")

    def counts(self, available: Sequence[int]) -> list[int]:
        """How many images of each class there are to be, out of as many as there are.

        Raises:
            InputError: a class has fewer images than shots.
        """
        if self.kind == "fraction":
            return [min(count, max(1, round(self.value * count))) for count in available]
        if self.kind == "shots":
            if min(available) < self.value:
                raise InputError(
                    f"there are {min(available)} images of a class, fewer than shots={self.value:g}"
                )
            return [int(self.value)] * len(available)
        most, last = min(available), max(1, len(available) - 1)
        sizes = [most * self.value ** (-index / last) for index in range(len(available))]
        # A whole number of images may come out a rounding error too small, and would lose one.
        return [max(1, math.floor(size * (1 + 1e-12))) for size in sizes]


def subset(dataset: ImageDataset, chosen: Subset, *, seed: int) -> ImageDataset:
    """Part of ``dataset`` (a view: nothing is decoded or copied); the order of the images stays.

    Args:
        dataset: the images.
        chosen: how many of each class.
        seed: of the drawing. With one seed, a choice with fewer images of a class lies within one with more.

    Raises:
        InputError: a class has no images, or fewer than are asked for.

    Example:
        >>> from spt_fast.data import load_dataset
        >>> digits = load_dataset("digits", "train")
        >>> len(subset(digits, Subset("shots", 4), seed=0)), len(subset(digits, Subset("fraction", 1.0), seed=0))
        (40, 800)
    """
    available = class_sizes(dataset)
    if not all(available):
        raise InputError(f"{dataset.name} has no image of {dataset.classes[available.index(0)]}")
    return dataset.subset(drawn(dataset, chosen.counts(available), seed=seed))


def class_sizes(dataset: ImageDataset) -> list[int]:
    """The number of images of each class."""
    sizes = Counter(dataset.targets)
    return [sizes[label] for label in range(len(dataset.classes))]


def drawn(
    dataset: ImageDataset, counts: Sequence[int], *, seed: int, after: Sequence[int] | None = None
) -> list[int]:
    """Sorted indices of so many images of each class, at most.

    Args:
        dataset: the images.
        counts: how many of each class.
        seed: of the order in which the images of a class are taken.
        after: how many of each class to leave out first: a choice after another one shares no image with it.
    """
    targets = np.asarray(dataset.targets)
    # RandomState, not default_rng: numpy promises that its stream never changes, so neither does the choice.
    places = np.random.RandomState(seed).permutation(len(targets))
    indices: list[int] = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(targets == label)
        first = 0 if after is None else after[label]
        indices += members[np.argsort(places[members])][first : first + count].tolist()
    return sorted(indices)
