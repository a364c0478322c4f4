"""Holding a part of the training images back, the same part every time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from spt_fast.errors import InputError

VAL_FRACTION = 0.1
SourceT = TypeVar("SourceT")


def stratified_split(targets: Sequence[int], held_out: int, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split indices in two, every class in proportion.

    Each image gets a place in (0, 1) within its shuffled class; the ``held_out`` images with the lowest
    places are held out, the last image of each class only when no others are left. So the number is exact,
    equal classes differ by one image at most, and no class loses all its images unless it must.

    Args:
        targets: the label of every image.
        held_out: how many to hold out, 0 to ``len(targets)``.
        seed: seed of the choice.

    Returns:
        ``(kept, held)``: sorted indices, disjoint, together all of them.

    Example:
        >>> kept, held = stratified_split([0] * 6 + [1] * 3, 3)
        >>> sorted([0] * 6 + [1] * 3)[:6], [int(index > 5) for index in held]
        ([0, 0, 0, 0, 0, 0], [0, 0, 1])
    """
    labels = np.asarray(targets)
    # RandomState, not default_rng: numpy promises that its stream never changes, so neither does the split.
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, start, count = np.unique(labels[by_class], return_index=True, return_counts=True)
    within_class = np.arange(len(labels)) - np.repeat(start, count)
    place = np.empty(len(labels))
    place[by_class] = (within_class + 0.5) / np.repeat(count, count)
    place[by_class[start + count - 1]] = 1
    by_place = shuffled[np.argsort(place[shuffled], kind="stable")]
    return sorted(by_place[held_out:].tolist()), sorted(by_place[:held_out].tolist())


def split_off_validation(
    train: Sequence[tuple[SourceT, int]], folder: Path
) -> tuple[list[tuple[SourceT, int]], list[tuple[SourceT, int]]]:
    """Hold a stratified tenth of the training samples back, at least one, for data without a validation split.

    Args:
        train: pairs of an image and its label.
        folder: where they are, for the error.

    Returns:
        ``(kept, held)``, both in the order of ``train``; every class keeps an image.

    Raises:
        InputError: no class has a second image.

    Example:
        >>> kept, held = split_off_validation([("a", 0), ("b", 1), ("c", 1)], Path("photos"))
        >>> len(kept), held in ([("b", 1)], [("c", 1)])
        (2, True)
    """
    targets = [label for _, label in train]
    spare = len(targets) - len(set(targets))
    if not spare:
        raise InputError(
            f"data folder {folder} has one image a class, too few to hold some back for split 'val'"
        )
    num_val = min(max(1, round(len(targets) * VAL_FRACTION)), spare)
    kept, held = stratified_split(targets, num_val)
    return [train[index] for index in kept], [train[index] for index in held]
