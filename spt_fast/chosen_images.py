"""The share of a data set's images that prototypes are built from, counted as they pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from spt_fast.clustering import seeded_generator
from spt_fast.errors import InputError
from spt_fast.progress import Progress
from spt_fast.tokens import image_batches


class ChosenImages:
    """Batches of the chosen images, as large as the batches they come from.

    Args:
        images: an iterable of ``[B, 3, H, W]`` tensors or ``(images, labels)`` pairs.
        fraction: the share to use, spread evenly over the images from a random offset.
        seed: of the offset.
        report: called as ``report("layer tokens", images, total)``.

    Attributes:
        images: how many have passed in the last :meth:`counted`.
    """

    def __init__(self, images: Iterable[Any], fraction: float, seed: int, report: Progress) -> None:
        self._all = images
        self._fraction = fraction
        self._offset = float(torch.rand((), generator=seeded_generator(seed)))
        self._report = report
        self.images = 0

    @property
    def read_only_once(self) -> bool:
        """Whether a second pass would find nothing."""
        # iter(images) is images would tell as well, but may start a loader's processes.
        return isinstance(self._all, Iterator)

    def __iter__(self) -> Iterator[Tensor]:
        kept: list[Tensor] = []
        position, size = 0, 0
        for batch in image_batches(self._all):
            if self._fraction == 1:
                yield batch
                continue
            size = max(size, len(batch))
            # Image j is used where j * fraction + offset passes an integer: the right share, evenly spread.
            positions = torch.arange(position, position + len(batch) + 1, dtype=torch.float64)
            steps = (positions * self._fraction + self._offset).floor()
            position += len(batch)
            kept.extend(batch[steps.diff() > 0])
            while len(kept) >= size > 0:
                yield torch.stack(kept[:size])
                kept = kept[size:]
        if kept:
            yield torch.stack(kept)

    def counted(self, skip: int = 0) -> Iterator[Tensor]:
        """The batches after the first ``skip``; counts them all and reports progress."""
        total = self._total()
        self.images = 0
        # An empty batch is none: ``skip`` counts the batches whose tokens were taken in.
        for index, batch in enumerate(batch for batch in self if len(batch)):
            self.images += len(batch)
            if index >= skip:
                yield batch
            self._report("layer tokens", self.images, total)

    def random_batch(self, generator: torch.Generator) -> Tensor:
        """One batch, each full batch being as likely as any other.

        Where the number of batches is known, the last one, which may be a partial one, is never it.
        """
        chosen: Tensor | None = None
        full = 0
        length = len(self._all) if self._fraction == 1 and isinstance(self._all, Sized) else None
        if length:
            # Walk to the chosen batch instead of through all.
            index = int(torch.randint(max(1, length - 1), (), generator=generator))
            chosen = next(itertools.islice(self, index, None), None)
        else:
            for batch in self:
                if not len(batch):
                    continue
                if chosen is None or len(batch) > len(chosen):
                    full = 0  # what came before were partial ones
                if chosen is None or len(batch) >= len(chosen):
                    full += 1
                    if int(torch.randint(full, (), generator=generator)) == 0:
                        chosen = batch
        if chosen is None or not len(chosen):
            raise InputError("images yields no image")
        self.images = len(chosen)
        return chosen

    def _total(self) -> int | None:
        dataset = getattr(self._all, "dataset", None)
        return math.ceil(len(dataset) * self._fraction) if isinstance(dataset, Sized) else None
