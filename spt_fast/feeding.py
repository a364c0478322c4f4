"""Where batches come from: the same images in the same order, by whichever way keeps the device busy."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from spt_fast.data import ImageDataset, ImageLoader, make_loader
from spt_fast.data.cache import CachedImages
from spt_fast.data.device_batches import DeviceBatches, DeviceImages
from spt_fast.data.device_transforms import supports

MOST_WORKERS = 8
# An epoch with fewer batches for each of them is over before worker processes have paid for themselves.
BATCHES_PER_WORKER = 4


class ImageFeed:
    """Batches of a data set on a device, epoch after epoch, and how long they were waited for.

    On a GPU, images that are kept decoded (:func:`spt_fast.data.cache_images`) are cropped, resized and normalised
    there; everywhere else worker processes of the CPU decode and transform.

    Args:
        data: the images, with a transform.
        device: where the batches are to be.
        num_workers: worker processes; ``None``: as many as the processor has cores for this process, up to 8, where
            there is enough to do for them, and none for images that are in memory already.

    Attributes:
        waited: seconds that the host has spent in waiting for batches, in all.
        skipped: files of the last pass that could not be read.

    Example:
        >>> from spt_fast.data import load_dataset, make_transform
        >>> transform = make_transform("vtab", image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, train=True)
        >>> feed = ImageFeed(load_dataset("digits", "val", transform=transform), torch.device("cpu"))
        >>> sum(len(labels) for _, labels in feed.batches(batch_size=64))
        200
    """

    def __init__(self, data: ImageDataset, device: torch.device, *, num_workers: int | None = None) -> None:
        self.data = data
        self.device = device
        self.num_workers = num_workers
        self.waited = 0.0
        self.skipped: list[str] = []
        self._device_images: DeviceImages | None = None
        if device.type == "cuda" and isinstance(data, CachedImages) and supports(data.transform):
            self._device_images = DeviceImages(data, device)

    def batches(
        self,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        start_batch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, as :func:`spt_fast.data.make_loader` describes them, on the device."""
        order: dict[str, Any] = {
            "batch_size": batch_size,
            "shuffle": shuffle,
            "seed": seed,
            "epoch": epoch,
            "start_batch": start_batch,
            "rank": rank,
            "world_size": world_size,
        }
        loader: DeviceBatches | ImageLoader
        if self._device_images is not None:
            loader = self._device_images.batches(**order)
        else:
            loader = make_loader(
                self.data,
                **order,
                num_workers=workers_for(self.data, batch_size * world_size, self.num_workers),
                pin_memory=self.device.type == "cuda",
            )
        pending = iter(loader)
        while True:
            begun = time.perf_counter()
            batch = next(pending, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                break
            images, labels = batch
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        self.skipped = loader.skipped


def workers_for(data: ImageDataset, batch_size: int, num_workers: int | None = None) -> int:
    """How many processes decode ``data`` in batches of ``batch_size`` (of all ranks): ``num_workers`` if given."""
    if num_workers is not None:
        return num_workers
    if isinstance(data.samples[0][0], Image.Image):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(MOST_WORKERS, ours, -(-len(data) // batch_size) // BATCHES_PER_WORKER)
