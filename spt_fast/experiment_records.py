"""What searches and ablations record alike: which images, which seeds, how much values spread, what has changed."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from spt_fast.data import ImageDataset
from spt_fast.errors import InputError


def described_images(images: ImageDataset) -> dict[str, Any]:
    """What makes two data sets the same, as json, without reading an image.

    Example:
        >>> from spt_fast.data import load_dataset
        >>> described = described_images(load_dataset("digits", "val"))
        >>> described["name"], described["images"]
        ('digits/val', 200)
    """
    labels = hashlib.sha256(json.dumps([images.classes, images.targets]).encode())
    transform = images.transform
    # The text of a torchvision transform has all its numbers; that of another object has its address.
    known = repr(transform) if isinstance(transform, nn.Module) else type(transform).__name__
    return {
        "name": images.name,
        "images": len(images),
        "labels": labels.hexdigest()[:16],
        "transform": " ".join(known.split()),
        "seed": images.seed,
    }


def differences(
    theirs: dict[str, Any], ours: dict[str, Any], *, may_lack: Sequence[str] = ("data.", "config.", "start.")
) -> list[tuple[str, Any, Any]]:
    """Where two nested records differ: the name of each entry, its value in the one and in the other, sorted.

    Args:
        theirs: the record that is kept.
        ours: the record of this call.
        may_lack: how entries begin that one of the two need not have: a call may look at fewer splits, and an older
            version of the package knew fewer options.

    Example:
        >>> differences({"pool": "avg", "config": {"epochs": 5}}, {"pool": "avg", "config": {"epochs": 9, "new": 1}})
        [('config.epochs', 5, 9)]
    """
    old, new = dict(_flat(theirs)), dict(_flat(ours))
    free = {name for name in old.keys() ^ new.keys() if name.startswith(tuple(may_lack))}
    names = sorted((old.keys() | new.keys()) - free)
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def sample_std(values: Sequence[float]) -> float | None:
    """The sample standard deviation; ``None`` for one value, which has none.

    Example:
        >>> sample_std([0.5]), sample_std([1.0, 3.0]) == 2**0.5
        (None, True)
    """
    return statistics.stdev(values) if len(values) > 1 else None


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise :class:`InputError` unless ``seeds`` are different whole numbers of at least 0, one or more."""
    whole = [seed for seed in seeds if isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0]
    if not seeds or len(whole) < len(seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds must be different whole numbers of at least 0, got {list(seeds)}")


def _flat(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
