"""How good a model is at each class: the confusion matrix of a data set, and what follows from it."""

from __future__ import annotations

import torch
from torch import Tensor

from spt_fast.data import ImageDataset
from spt_fast.distributed import all_reduced
from spt_fast.errors import InputError
from spt_fast.evaluation import judged_batches
from spt_fast.feeding import ImageFeed
from spt_fast.progress import Progress
from spt_fast.tuned_vit import TunedViT


def confusion_matrix(
    model: TunedViT,
    data: ImageDataset,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """How often the images of each class were taken for each class, in one pass over ``data``.

    Under torch.distributed each process takes its share of the images and all return the same matrix.

    Args:
        model: the model of ``C`` outputs; it is judged in eval mode and left in the mode it was in.
        data: a data set with a transform; unreadable images are left out.
        batch_size: images at a time.
        num_workers: processes that decode; ``None``: as many as there is use for.
        progress: called with the images done so far.

    Returns:
        int64 ``[C, C]`` on the CPU: row the label, column the highest logit; it sums to the number of images.

    Raises:
        InputError: no image of ``data`` could be read, or it has more classes than the model.

    Example:
        >>> from spt_fast import PromptedViT, load_backbone
        >>> from spt_fast.data import load_dataset, make_transform
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = PromptedViT(backbone, torch.randn(2, 5, 192), num_classes=10, pool="avg")
        >>> transform = make_transform("vtab", image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, train=False)
        >>> confusion_matrix(model, load_dataset("digits", "val", transform=transform)).sum().item()
        200
    """
    classes = model.head.out_features
    feed = ImageFeed(data, model.device, num_workers=num_workers)
    counts = torch.zeros(classes * classes, dtype=torch.float64, device=feed.device)  # exact to 2**53 images
    for logits, labels in judged_batches(model, feed, batch_size=batch_size, progress=progress):
        counts += torch.bincount(labels * classes + logits.argmax(dim=1), minlength=classes * classes)
    confusion = all_reduced(counts).long().view(classes, classes).cpu()
    if not confusion.any():
        raise InputError(f"no image of {data.name} could be read")
    return confusion


def per_class_accuracy(confusion: Tensor) -> list[float | None]:
    """The share of each class's images that was recognised, 0 to 1; ``None`` for a class without images.

    Example:
        >>> per_class_accuracy(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]))
        [0.75, 1.0, None]
    """
    right, images = confusion.diagonal().tolist(), confusion.sum(dim=1).tolist()
    return [hits / count if count else None for hits, count in zip(right, images, strict=True)]
