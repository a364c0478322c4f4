"""Where batches come from: the same images in the same order, by whichever way keeps the device busy."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from spt_fast.building import WHOLE_DATA_METHODS
from spt_fast.data import ImageDataset, ImageLoader, make_loader
from spt_fast.data.cache import CachedImages
from spt_fast.data.device_batches import DeviceBatches, DeviceImages
from spt_fast.data.device_transforms import supports
from spt_fast.distributed import gathered_numbers, world

MOST_WORKERS = 8
# An epoch with fewer batches for each of them is over before worker processes have paid for themselves.
BATCHES_PER_WORKER = 4


class ImageFeed:
    """Batches of a data set on a device, epoch after epoch, and how long they were waited for.

    On a GPU, images that are kept decoded (:func:`spt_fast.data.cache_images`) are cropped, resized and normalised
    there; on a CPU, images in memory are transformed by this process and all others by worker processes.

    Args:
        data: the images, with a transform.
        device: where the batches are to be.
        num_workers: worker processes; ``None``: as many as the processor has cores for this process, up to 8, where
            there is enough to do for them (see :func:`workers_for`), and none for images that are in memory already.

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
                num_workers=workers_for(
                    self.data, batch_size * world_size, self.num_workers, device=self.device
                ),
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


def prototype_loader(
    data: ImageDataset,
    method: str,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    num_workers: int | None = None,
) -> ImageLoader:
    """Images as :func:`spt_fast.build_prototypes` wants them from this process.

    Args:
        data: the images, with the transform for looking at them.
        method: how prototypes will be built. Those that look at all images share them out among the processes of a
            group; the others look at one batch, the same in all, which is drawn from a shuffled order so as to show
            all classes.
        batch_size: images at a time.
        seed: of the order.
        device: where the batches are worked on.
        num_workers: worker processes, see :func:`workers_for`.
    """
    shared = world()[1] > 1 and method in WHOLE_DATA_METHODS
    rank, shares = world() if shared else (0, 1)
    return make_loader(
        data,
        batch_size=batch_size,
        shuffle=not shared,
        seed=seed,
        rank=rank,
        world_size=shares,
        num_workers=workers_for(data, batch_size * shares, num_workers, device=device),
        pin_memory=device.type == "cuda",
    )


def skipped_by_all(loader: ImageLoader) -> int:
    """How many files the processes that share a loader's images out could not read."""
    shared = loader.batch_sampler.world_size > 1
    return int(gathered_numbers([len(loader.skipped)]).sum()) if shared else len(loader.skipped)


def workers_for(
    data: ImageDataset, batch_size: int, num_workers: int | None = None, *, device: torch.device
) -> int:
    """How many worker processes are to decode and transform images.

    Args:
        data: the images.
        batch_size: images in a batch of all ranks together.
        num_workers: the number, if somebody has said it.
        device: where the batches are worked on. What is decoded already costs a CPU less than the cores that workers
            take from it: on two cores, training with them took an eighth longer.
    """
    if num_workers is not None:
        return num_workers
    decoded = isinstance(data.samples[0][0], Image.Image)
    if decoded or (isinstance(data, CachedImages) and device.type == "cpu"):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(MOST_WORKERS, ours, -(-len(data) // batch_size) // BATCHES_PER_WORKER)
