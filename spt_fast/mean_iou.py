"""Intersection over union of predicted and true masks, added up batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from spt_fast.data.masks import IGNORED
from spt_fast.errors import InputError


class MeanIoU:
    """How well masks are predicted: pixels of all images together are counted in one confusion matrix.

    Args:
        num_classes: class ids are ``0 .. num_classes - 1``.
        ignored: the id of pixels in true masks that do not count.

    Attributes:
        confusion: int64 ``[C, C]`` on the CPU, pixels by true and by predicted class.

    Example:
        >>> iou = MeanIoU(num_classes=3)
        >>> iou.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 255]]))
        >>> iou.per_class, iou.mean, iou.accuracy
        ([0.5, 0.5, nan], 0.5, 0.6666666666666666)
    """

    def __init__(self, num_classes: int, *, ignored: int = IGNORED) -> None:
        self.num_classes = num_classes
        self.ignored = ignored
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, predicted: Tensor, masks: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            predicted: class ids, integers of any shape, for example ``logits.argmax(dim=1)`` ``[B, H, W]``.
            masks: the true ids, of the same shape.

        Raises:
            InputError: shapes that differ, or ids that are no classes.
        """
        if predicted.shape != masks.shape:
            raise InputError(
                f"predicted and masks must have one shape, got {list(predicted.shape)} and {list(masks.shape)}"
            )
        counts = masks != self.ignored
        true, guess = masks[counts].long(), predicted[counts].long().to(masks.device)
        for name, ids in (("masks", true), ("predicted", guess)):
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_classes:
                raise InputError(
                    f"{name} must hold class ids from 0 to {self.num_classes - 1}, got {int(ids.min())} to "
                    f"{int(ids.max())}"
                )
        pairs = torch.bincount(true * self.num_classes + guess, minlength=self.num_classes**2)
        self.confusion += pairs.view_as(self.confusion).cpu()

    @property
    def per_class(self) -> list[float]:
        """Pixels that are of a class and predicted so, among those that are either; NaN for a class without any."""
        both = self.confusion.diagonal().double()
        either = self.confusion.sum(dim=0) + self.confusion.sum(dim=1) - both
        return (both / either).tolist()

    @property
    def mean(self) -> float:
        """The mean of :attr:`per_class` over the classes that occur, in masks or predictions.

        Raises:
            InputError: no pixel was counted.
        """
        self._check_counted()
        return float(torch.tensor(self.per_class, dtype=torch.float64).nanmean())

    @property
    def accuracy(self) -> float:
        """The share of pixels that are predicted right.

        Raises:
            InputError: no pixel was counted.
        """
        self._check_counted()
        return float(self.confusion.diagonal().sum() / self.confusion.sum().double())

    def _check_counted(self) -> None:
        if not self.confusion.any():
            raise InputError("no pixel was counted: masks were empty or all ignored")
