"""Batches that are cropped, resized and normalised where the model is, from images that are kept decoded.

The pixels are on the device, all of them where they fit, else those of a batch's crops are copied there. Order and
augmentation are those of :func:`spt_fast.data.make_loader`: a run sees the same images whichever way they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from spt_fast.devices import free_memory
from spt_fast.errors import InputError

from .cache import CachedImages
from .dataset import mixed_seed
from .device_transforms import draw_crops, normalize_images, resize_crops, resized_vertically_first, why_not
from .loader import EpochBatches, make_loader
from .transforms import ImageTransform

# Pixels of crops that are padded to the same size and resized together: 100 MB of them in float32. Without a limit one
# huge photo would have a whole batch padded to its size. A CPU is three times as fast on what its caches hold.
MOST_PADDED_PIXELS = 1 << 23
MOST_PADDED_PIXELS_ON_CPU = 1 << 20
# Bytes that are page-locked at a time while all pixels are copied to the device.
STAGING_BYTES = 64 << 20


class DeviceImages:
    """Decoded images for a device, which makes batches of them there.

    Args:
        dataset: the images, with a transform that :func:`spt_fast.data.device_transforms.supports` accepts.
        device: where batches are made.
        budget: bytes that the pixels may take on the device; default: half of what is free there now.

    Attributes:
        dataset (CachedImages): the images.
        device (torch.device): where the batches are.
        resident (bool): whether all pixels are on the device. If not, the crops of a batch are copied there from the
            file, through page-locked memory and without waiting for the copy.

    Raises:
        InputError: a transform with steps that a device cannot do, images of other sizes than the transform makes, or a
            negative budget.

    Example:
        >>> import tempfile
        >>> from spt_fast.data import load_dataset, make_transform
        >>> from spt_fast.data.cache import cache_images
        >>> transform = make_transform("fgvc", image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, train=True)
        >>> digits = load_dataset("digits", "val", transform=transform)
        >>> images = DeviceImages(cache_images(digits, tempfile.mkdtemp()), torch.device("cpu"))
        >>> batches = images.batches(batch_size=64, shuffle=True, seed=0, epoch=3)
        >>> [(tuple(images.shape), len(labels)) for images, labels in batches][-1]
        ((8, 3, 16, 16), 8)
    """

    def __init__(self, dataset: CachedImages, device: torch.device, *, budget: int | None = None) -> None:
        if budget is not None and budget < 0:
            raise InputError(f"budget must be 0 bytes or more, got {budget}")
        transform = dataset.transform
        reason = why_not(transform)
        if reason is not None:
            raise InputError(reason)
        assert isinstance(transform, ImageTransform)  # or there would have been a reason
        self.dataset = dataset
        self.device = device
        self._transform = transform
        self._sizes = np.asarray(dataset.sizes)
        self._targets = np.asarray(dataset.targets, dtype=np.int64)
        self._check_sizes()
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
            for values in (transform.mean, transform.std)
        )
        # Where in the pixels of all images those of each begin.
        self._begins = np.concatenate([[0], np.cumsum(self._sizes.prod(axis=1))])
        room = free_memory(device) // 2 if budget is None else budget
        self.resident = bool(dataset.nbytes <= room)
        self._pixels = self._on_device() if self.resident else None

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
    ) -> DeviceBatches:
        """The batches of an epoch: those of :func:`spt_fast.data.make_loader` for the same arguments.

        Raises:
            InputError: an argument out of range.
        """
        loader = make_loader(
            self.dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            epoch=epoch,
            start_batch=start_batch,
            rank=rank,
            world_size=world_size,
        )
        return DeviceBatches(self, loader.batch_sampler, epoch)

    def is_readable(self, index: int) -> bool:
        """Whether there are pixels of image ``index``."""
        return bool(self._sizes[index, 0] > 0)

    def batch(self, indices: Sequence[int], epoch: int) -> tuple[Tensor, Tensor]:
        """The images at ``indices``, which are readable, augmented for ``epoch``; the device is not waited for.

        Returns:
            float32 ``[B, 3, H, W]`` and the labels int64 ``[B]``, on the device.
        """
        if not indices:
            return self._empty(torch.float32, 0), torch.empty(0, dtype=torch.int64, device=self.device)
        sizes = [(int(height), int(width)) for height, width in self._sizes[list(indices)]]
        seeds = [mixed_seed(self.dataset.seed, epoch, index) for index in indices]
        crops = np.array(draw_crops(self._transform, sizes, seeds), dtype=np.int64)
        top, left, heights, widths, flipped = crops.T
        stride = self._sizes[list(indices), 1]  # how far the rows of a crop are apart in its image
        first = self._begins[list(indices)] + top * stride + left
        down_first = resized_vertically_first(heights, widths, self._transform.size)
        most = MOST_PADDED_PIXELS_ON_CPU if self.device.type == "cpu" else MOST_PADDED_PIXELS
        groups = [
            (way, group)
            for way in (False, True)
            for group in padded_groups(np.flatnonzero(down_first == way), heights, widths, most)
        ]
        order = np.concatenate([group for _, group in groups])
        columns = [each[order] for each in (first, stride, heights, widths, flipped)]
        # One copy for everything that the device has to know about the batch.
        *table, labels = self._sent(
            torch.from_numpy(np.stack([order, *columns, self._targets[list(indices)]]))
        )
        levels = self._empty(torch.uint8, len(indices))
        begin = 0
        for way, group in groups:
            end = begin + len(group)
            position, *own = (column[begin:end] for column in table)
            members = [(indices[each], crops[each]) for each in group]
            levels.index_copy_(0, position, self._resized(members, *own, vertically_first=way))
            begin = end
        return normalize_images(levels, self._mean, self._std), labels

    def _resized(
        self,
        members: Sequence[tuple[int, np.ndarray]],
        first: Tensor,
        stride: Tensor,
        heights: Tensor,
        widths: Tensor,
        flipped: Tensor,
        *,
        vertically_first: bool,
    ) -> Tensor:
        """uint8 ``[B, 3, H, W]`` of some images and their crops; the tensors say the same where the device reads it."""
        crops = np.stack([crop for _, crop in members])[:, 2:4]
        rows, columns = crops.max(axis=0).tolist()
        if self._pixels is not None:
            pixels = _gathered(self._pixels, first, stride, rows, columns)
        else:
            pixels = self._sent(self._staged(members, rows, columns))
        if (crops == self._transform.size).all():
            upright = pixels.permute(0, 3, 1, 2)
            return torch.where(flipped.bool().view(-1, 1, 1, 1), upright.flip(3), upright)
        size = self._transform.size
        return resize_crops(pixels, heights, widths, flipped, size, vertically_first=vertically_first)

    def _check_sizes(self) -> None:
        """Without a crop all images have to have their final size already."""
        if any(isinstance(step, v2.RandomResizedCrop) for step in self._transform.augmentation):
            return
        odd = (self._sizes[:, 0] > 0) & (self._sizes != self._transform.size).any(axis=1)
        if odd.any():
            index = int(odd.argmax())
            height, width = self._sizes[index]
            raise InputError(
                f"{self.dataset.describe(index)} is {height} x {width} pixels after the transform's preparation, "
                f"expected the transform's size {self._transform.size}"
            )

    def _empty(self, dtype: torch.dtype, count: int) -> Tensor:
        return torch.empty(count, 3, *self._transform.size, dtype=dtype, device=self.device)

    def _host_memory(self, *shape: int) -> Tensor:
        """uint8, page-locked if the device can then copy while the host goes on; torch reuses it once that is done."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _sent(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _staged(self, members: Sequence[tuple[int, np.ndarray]], rows: int, columns: int) -> Tensor:
        """The crops from the file, uint8 ``[B, rows, columns, 3]``; what is outside of them is left as it is."""
        staging = self._host_memory(len(members), rows, columns, 3)
        for target, (index, (top, left, height, width, _)) in zip(staging.numpy(), members, strict=True):
            target[:height, :width] = self.dataset.pixels(index)[top : top + height, left : left + width]
        return staging

    def _on_device(self) -> Tensor:
        """The pixels of all images one after the other, uint8 ``[pixels, 3]``."""
        pixels = torch.empty(int(self._begins[-1]), 3, dtype=torch.uint8, device=self.device)
        begin = 0
        while begin < len(self.dataset):
            # As many images as fit into the staging memory, but one at least.
            room = self._begins[begin] + STAGING_BYTES // 3
            end = max(begin + 1, int(np.searchsorted(self._begins, room, side="right")) - 1)
            start, stop = int(self._begins[begin]), int(self._begins[end])
            staging = self._host_memory(stop - start, 3)
            for index in range(begin, end):
                if self.is_readable(index):
                    own = slice(int(self._begins[index]) - start, int(self._begins[index + 1]) - start)
                    staging.numpy()[own] = self.dataset.pixels(index).reshape(-1, 3)
            pixels[start:stop].copy_(staging, non_blocking=True)
            begin = end
        return pixels


class DeviceBatches:
    """The batches of one epoch, the same every time they are iterated; :meth:`DeviceImages.batches` makes them.

    A batch is ``(images [B, 3, H, W] float32, labels [B] int64)`` on the device. An image that cannot be read is left
    out, and where the data set is ``strict`` it is an :class:`InputError`.

    Attributes:
        skipped (list[str]): the unreadable files met so far in the current pass, or in the last one when it is over.
    """

    def __init__(self, images: DeviceImages, batches: EpochBatches, epoch: int) -> None:
        self.skipped: list[str] = []
        self._images = images
        self._batches = batches
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.skipped = []
        images = self._images
        for indices in self._batches:
            unreadable = [
                images.dataset.describe(index) for index in indices if not images.is_readable(index)
            ]
            if unreadable and images.dataset.strict:
                raise InputError(f"{unreadable[0]} cannot be read as an image")
            self.skipped += unreadable
            yield images.batch([index for index in indices if images.is_readable(index)], self._epoch)


def padded_groups(
    positions: np.ndarray, heights: np.ndarray, widths: np.ndarray, most: int
) -> list[list[int]]:
    """Groups of crops that are padded to the largest in them, so that a group takes at most ``most`` pixels.

    Crops of similar size share a group; one that is larger than ``most`` by itself has its own.

    Args:
        positions: which crops to share out, indices into ``heights`` and ``widths``.
        heights: int64 ``[B]``, pixels.
        widths: int64 ``[B]``, pixels.
        most: pixels.

    Example:
        >>> padded_groups(np.arange(3), np.array([90, 10, 8]), np.array([90, 10, 12]), most=250)
        [[2, 1], [0]]
    """
    groups: list[list[int]] = []
    rows = columns = 0
    areas = heights[positions] * widths[positions]
    for position in positions[np.argsort(areas, kind="stable")].tolist():
        height, width = int(heights[position]), int(widths[position])
        rows, columns = max(rows, height), max(columns, width)
        if groups and (len(groups[-1]) + 1) * rows * columns <= most:
            groups[-1].append(position)
        else:
            groups.append([position])
            rows, columns = height, width
    return groups


def _gathered(pixels: Tensor, first: Tensor, stride: Tensor, rows: int, columns: int) -> Tensor:
    """From the pixels of all images ``[pixels, 3]`` those of crops, ``[B, rows, columns, 3]``.

    Args:
        pixels: those of all images, one image after the other.
        first: int64 ``[B]``, where in them every crop begins.
        stride: int64 ``[B]``, how far the rows of its image are apart.
        rows: of the largest crop; what is outside of a smaller one is some other part of the pixels.
        columns: likewise.
    """
    row = first[:, None] + torch.arange(rows, device=pixels.device) * stride[:, None]
    where = row[..., None] + torch.arange(columns, device=pixels.device)
    where = where.clamp_(max=len(pixels) - 1)
    return pixels.index_select(0, where.flatten()).view(*where.shape, 3)
