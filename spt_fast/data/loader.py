"""Batches in an order that can be repeated, resumed and shared between ranks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from spt_fast.errors import InputError

from .dataset import ImageDataset, mixed_seed

# Shards whose images are mixed with each other: enough for batches of all kinds, and few enough that the page cache
# holds what a rank is reading.
WINDOW_SHARDS = 8


class EpochBatches(Sampler[list[int]]):
    """The batches of indices of one epoch on one rank: a pure function of the arguments.

    The ranks share the images out, none left out and none twice. Shuffled, every rank has the same number of batches,
    because training takes its steps together: where the division leaves a gap, a rank's last batches are smaller or
    empty lists. In evaluation order (``shuffle=False``) one rank may have more batches than another.

    Without shards, batch ``k`` of all ranks together is batch ``k`` of a single process with ``world_size`` times the
    batch size.

    With ``shards`` (the number of consecutive images in each) a rank has whole shards and reads them ``WINDOW_SHARDS``
    at a time, shuffled within such a window.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        epoch: int,
        rank: int,
        world_size: int,
        drop_last: bool,
        shards: list[int] | None = None,
    ) -> None:
        self.world_size = world_size
        if shards is not None:
            mine = _images_of_shards(
                shards, shuffle=shuffle, seed=seed, epoch=epoch, rank=rank, world_size=world_size
            )
        elif shuffle:
            generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
            mine = torch.randperm(length, generator=generator)[rank::world_size].tolist()
        else:
            mine = list(range(rank, length, world_size))
        # What every rank can fill, or what the largest share needs.
        shares = _shares(length, shards, world_size) if shuffle else [len(mine)]
        count = min(shares) // batch_size if drop_last else -(-max(shares) // batch_size)
        self.batches = [
            mine[start : start + batch_size] for start in range(0, count * batch_size, batch_size)
        ]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _shares(length: int, shards: list[int] | None, world_size: int) -> list[int]:
    """The number of shuffled images in each share; which rank has which share depends on the epoch."""
    if shards is None:
        return [len(range(first, length, world_size)) for first in range(world_size)]
    dealt = sorted(shards, reverse=True)
    return [sum(dealt[first::world_size]) for first in range(world_size)]


def _images_of_shards(
    shards: list[int], *, shuffle: bool, seed: int, epoch: int, rank: int, world_size: int
) -> list[int]:
    """The images of one rank in the order in which it reads them."""
    ends = list(itertools.accumulate(shards))
    images = [torch.arange(end - size, end) for end, size in zip(ends, shards, strict=True)]
    if not shuffle:
        return torch.cat(images[rank::world_size]).tolist()

    # Dealt round by round with the largest first, shares differ by one shard at most, and the largest share is the
    # same in every epoch: a learning rate schedule needs to know the number of steps. Shards of equal size are dealt
    # at random; the rank that is dealt to first is drawn as well.
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    dealt = torch.randperm(len(shards), generator=generator).tolist()
    dealt.sort(key=lambda shard: shards[shard], reverse=True)
    first = int(torch.randint(world_size, (), generator=generator))
    mine = dealt[(rank - first) % world_size :: world_size]

    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch, 1 + rank))
    walk = [mine[position] for position in torch.randperm(len(mine), generator=generator)]
    windows = [
        torch.cat([images[shard] for shard in walk[start : start + WINDOW_SHARDS]])
        for start in range(0, len(walk), WINDOW_SHARDS)
    ]
    shuffled = [window[torch.randperm(len(window), generator=generator)] for window in windows]
    return torch.cat(shuffled).tolist()


class ImageLoader(DataLoader):
    """A DataLoader over an :class:`ImageDataset` that remembers which files it could not read.

    Attributes:
        skipped (list[str]): the unreadable files met so far in the current pass, or in the last one when it
            is over.
    """

    dataset: ImageDataset
    batch_sampler: EpochBatches

    def __init__(
        self, dataset: ImageDataset, batches: EpochBatches, *, num_workers: int, pin_memory: bool
    ) -> None:
        # Workers never raise for an unreadable file; here, in the main process, the error is one sentence
        # instead of the traceback of a worker.
        lenient = copy.copy(dataset)
        lenient.strict = False
        self.strict = dataset.strict
        self.skipped: list[str] = []
        super().__init__(
            lenient,
            batch_sampler=batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_Collate(lenient),
            # A generator of its own: by default every pass draws a number from the global one, and a resumed
            # run would go on with other dropout masks.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # type: ignore[override]
        self.skipped = []
        for (images, labels, unreadable), indices in zip(super().__iter__(), self.batch_sampler, strict=True):
            names = [self.dataset.describe(indices[position]) for position in unreadable]
            if names and self.strict:
                raise InputError(f"{names[0]} cannot be read as an image")
            self.skipped += names
            yield images, labels


class _Collate:
    """Stacks what could be read and says which positions of the batch could not."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __call__(
        self, items: list[tuple[torch.Tensor, int] | None]
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        readable = [item for item in items if item is not None]
        unreadable = [position for position, item in enumerate(items) if item is None]
        labels = torch.tensor([label for _, label in readable], dtype=torch.int64)
        images = [image for image, _ in readable]
        stacked = torch.stack(images or [self.dataset.blank()])[: len(images)]
        return stacked, labels, unreadable


def make_loader(
    dataset: ImageDataset,
    *,
    batch_size: int = 32,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    start_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    drop_last: bool = False,
) -> ImageLoader:
    """Batches of one epoch of ``dataset``, the same every time they are iterated.

    Order and augmentation depend on ``seed`` (the data set's own for augmentation), ``epoch`` and nothing
    else, so ``start_batch=k`` gives exactly what was left of an epoch after ``k`` batches. Make a new loader
    for each epoch. torch's global random state is left alone.

    A data set with ``shards`` is read shard by shard, so that it may be larger than memory: each rank has whole
    shards, and shuffling mixes the images of eight at a time.

    Args:
        dataset: the images; it needs a transform. Its own epoch stays as it is.
        batch_size: images in a batch.
        shuffle: a new order in each epoch; False keeps the order of the data set.
        seed: seed of the order, 0 or more.
        epoch: the epoch, from 0.
        start_batch: batches to leave out at the beginning, without decoding them.
        rank: which share of the images, 0 to ``world_size - 1``.
        world_size: number of shares. Every image is in exactly one. With shuffling all shares have the same number
            of batches, the last of which may be smaller on some ranks, or empty.
        num_workers: processes that decode; 0 decodes in this one.
        pin_memory: put batches into page-locked memory, for faster copies to a GPU.
        drop_last: leave out last batches that are not full, with shuffling on any rank.

    Returns:
        A DataLoader of ``(images [B, 3, H, W] float32, labels [B] int64)``. Files that cannot be read are
        left out of their batch, and ``loader.skipped`` lists them (for a ``strict`` data set the first one is
        an :class:`InputError`). The batch keeps its place in the epoch however few images remain: a batch
        with nothing readable has ``B = 0``.

    Raises:
        InputError: an argument out of range, a data set without transform, fewer shards than shares with shuffling,
            or ``drop_last`` that leaves no batch.

    Example:
        >>> from spt_fast.data import load_dataset, make_transform
        >>> transform = make_transform("vtab", image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, train=True)
        >>> digits = load_dataset("digits", "val", transform=transform)
        >>> loader = make_loader(digits, batch_size=64, shuffle=True, epoch=3)
        >>> [len(labels) for _, labels in loader]
        [64, 64, 64, 8]
    """
    for name, value, least in [
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("epoch", epoch, 0),
        ("start_batch", start_batch, 0),
        ("world_size", world_size, 1),
        ("num_workers", num_workers, 0),
    ]:
        if value < least:
            raise InputError(f"{name} must be {least} or more, got {value}")
    if not 0 <= rank < world_size:
        raise InputError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}")
    if dataset.transform is None:
        raise InputError(
            f"dataset {dataset.name} has no transform to make its images equal in size, "
            "expected one such as dataset.with_transform(make_transform(...))"
        )
    shards = dataset.shards
    if shuffle:
        _check_shards(dataset, world_size)
    elif shards is not None and len(shards) < world_size:
        shards = None  # what is looked at once may be shared out image by image

    batches = EpochBatches(
        len(dataset),
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        epoch=epoch,
        rank=rank,
        world_size=world_size,
        drop_last=drop_last,
        shards=shards,
    )
    if drop_last and not batches:
        raise InputError(
            f"drop_last=True leaves no batch of batch_size={batch_size} out of {len(dataset)} images"
        )
    if start_batch > len(batches):
        raise InputError(
            f"start_batch must be at most the {len(batches)} batches of an epoch, got {start_batch}"
        )
    del batches.batches[:start_batch]

    at_epoch = copy.copy(dataset)
    at_epoch.set_epoch(epoch)
    return ImageLoader(at_epoch, batches, num_workers=num_workers, pin_memory=pin_memory)


def batches_per_epoch(dataset: ImageDataset, *, batch_size: int, world_size: int) -> int:
    """The number of shuffled batches on each rank, the same in every epoch.

    Args:
        dataset: the images, with shards or without.
        batch_size: images in a batch of one rank.
        world_size: number of ranks.

    Raises:
        InputError: an argument below 1, or fewer shards than ranks.

    Example:
        >>> from spt_fast.data import load_dataset
        >>> batches_per_epoch(load_dataset("digits", "train"), batch_size=64, world_size=3)
        5
    """
    for name, value in [("batch_size", batch_size), ("world_size", world_size)]:
        if value < 1:
            raise InputError(f"{name} must be 1 or more, got {value}")
    _check_shards(dataset, world_size)
    return -(-max(_shares(len(dataset), dataset.shards, world_size)) // batch_size)


def _check_shards(dataset: ImageDataset, world_size: int) -> None:
    if dataset.shards is not None and len(dataset.shards) < world_size:
        raise InputError(
            f"world_size must be at most the number of shards, which is {len(dataset.shards)} in {dataset.name}, "
            f"got {world_size}"
        )
