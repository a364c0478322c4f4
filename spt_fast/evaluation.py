"""How good a model is: loss and accuracy over a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast.data import ImageDataset
from spt_fast.distributed import all_reduced, world
from spt_fast.errors import InputError
from spt_fast.feeding import ImageFeed
from spt_fast.progress import Progress
from spt_fast.tuned_vit import TunedViT


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    Attributes:
        accuracy: share of the images whose highest logit is their label, 0 to 1.
        loss: mean cross-entropy in nats.
        images: how many images were judged.
        skipped: how many files could not be read.
    """

    accuracy: float
    loss: float
    images: int
    skipped: int

    def as_dict(self) -> dict[str, Any]:
        """The numbers as a json-able dict."""
        return asdict(self)


def evaluate(
    model: TunedViT,
    data: ImageDataset,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Accuracy and loss of ``model`` over ``data``, every image counted once.

    Under torch.distributed each process takes its share of the images and all return the same sums.

    Args:
        model: the model; it is judged in eval mode and left in the mode it was in.
        data: a data set with a transform.
        batch_size: images at a time.
        num_workers: processes that decode; ``None``: as many as there is use for.
        progress: called with the images done so far.

    Raises:
        InputError: no image of ``data`` could be read, or it has more classes than the model.

    Example:
        >>> from spt_fast import PromptedViT, load_backbone
        >>> from spt_fast.data import load_dataset, make_transform
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = PromptedViT(backbone, torch.randn(2, 5, 192), num_classes=10, pool="avg")
        >>> transform = make_transform("vtab", image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, train=False)
        >>> evaluate(model, load_dataset("digits", "val", transform=transform)).images
        200
    """
    feed = ImageFeed(data, model.device, num_workers=num_workers)
    return evaluate_feed(model, feed, batch_size=batch_size, progress=progress)


def evaluate_feed(
    model: TunedViT, feed: ImageFeed, *, batch_size: int = 64, progress: Progress | None = None
) -> Evaluation:
    """:func:`evaluate` over a feed, which can be used again."""
    sums = torch.zeros(4, dtype=torch.float64, device=feed.device)
    for logits, labels in judged_batches(model, feed, batch_size=batch_size, progress=progress):
        sums[0] += (logits.argmax(dim=1) == labels).sum()
        sums[1] += F.cross_entropy(logits, labels, reduction="sum")
        sums[2] += len(labels)
    sums[3] = len(feed.skipped)
    correct, loss, count, skipped = all_reduced(sums).tolist()
    if not count:
        raise InputError(f"no image of {feed.data.name} could be read")
    return Evaluation(correct / count, loss / count, int(count), int(skipped))


@torch.no_grad()
def judged_batches(
    model: TunedViT, feed: ImageFeed, *, batch_size: int, progress: Progress | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of a feed, batch by batch: float32 logits ``[B, C]``, in eval mode, and labels ``[B]``.

    Raises:
        InputError: the images have more classes than the model.
    """
    data = feed.data
    if len(data.classes) > model.head.out_features:
        raise InputError(f"data has {len(data.classes)} classes and the model {model.head.out_features}")
    rank, world_size = world()
    training = model.training
    model.eval()
    done = 0
    try:
        for images, labels in feed.batches(batch_size=batch_size, rank=rank, world_size=world_size):
            if len(labels):
                yield model(images).float(), labels
            done += len(labels)
            if progress is not None:
                progress("evaluating", done * world_size, len(data))
    finally:
        model.train(training)
