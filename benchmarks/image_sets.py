"""Disjoint sets of real images for the benchmarks that train: digits, folders, or zips of folders."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.image_folder import load_images
from spt_fast.backbones import image_settings
from spt_fast.data import ImageDataset, load_dataset, make_transform
from spt_fast.errors import InputError


def image_sets(
    data: str, test_data: str | None, backbone: Any, train_per_class: int, val_per_class: int
) -> tuple[ImageDataset, ImageDataset, ImageDataset]:
    """Training, validation and test images, none augmented, sized for ``backbone``.

    Args:
        data: ``"digits"``, or an ImageFolder (or a zip of one): so many images of each class are drawn from it for
            training and for validation.
        test_data: an ImageFolder or zip to test on; not for digits, which have a test split.
        backbone: a timm ViT for square images.
        train_per_class: training images of a class; of the digits at most so many.
        val_per_class: validation images of a class; of the digits all are used.

    Raises:
        InputError: ``test_data`` is missing, or a class has too few images.
    """
    transform = make_transform("vtab", train=False, **image_settings(backbone))
    if data == "digits":
        splits = [load_dataset("digits", split, transform=transform) for split in ("train", "val", "test")]
        return some_of_each_class(splits[0], train_per_class), splits[1], splits[2]
    if test_data is None:
        raise InputError("--test-data is needed beside --data, unless the data is digits")
    size = image_settings(backbone)["image_size"][0]
    pool, test = (in_memory(path, size, transform) for path in (data, test_data))
    picked = [
        list(itertools.islice(_of_class(pool, label), train_per_class + val_per_class))
        for label in range(len(pool.classes))
    ]
    for name, indices in zip(pool.classes, picked, strict=True):
        if len(indices) < train_per_class + val_per_class:
            raise InputError(
                f"--data {data} has {len(indices)} images of {name}, "
                f"expected at least {train_per_class + val_per_class}"
            )
    training = [index for indices in picked for index in indices[:train_per_class]]
    validation = [index for indices in picked for index in indices[train_per_class:]]
    return pool.subset(training), pool.subset(validation), test


def training_and_test(
    data: str, test_data: str | None, backbone: Any, per_class: int
) -> tuple[ImageDataset, ImageDataset]:
    """At most so many images of each class to train on, and as many to judge on, none augmented.

    Args:
        data: ``"digits"``, or a folder with splits as ``spt-fast train`` takes it, which is judged on its validation
            images; with ``test_data`` an ImageFolder or a zip of one.
        test_data: an ImageFolder or zip to judge on.
        backbone: a timm ViT; images are sized for it.
        per_class: images of a class.
    """
    settings = image_settings(backbone)
    transform = make_transform("vtab", train=False, **settings)
    if test_data is not None:
        training, test = (in_memory(path, settings["image_size"][0], transform) for path in (data, test_data))
    else:
        judged = "test" if data == "digits" else "val"
        training, test = (load_dataset(data, split, transform=transform) for split in ("train", judged))
    return some_of_each_class(training, per_class), some_of_each_class(test, per_class)


def some_of_each_class(images: ImageDataset, most: int) -> ImageDataset:
    """At most so many images of each class."""
    picked = [itertools.islice(_of_class(images, label), most) for label in range(len(images.classes))]
    return images.subset([index for indices in picked for index in indices])


def in_memory(path: str, size: int, transform: Any) -> ImageDataset:
    """All images of a folder or zip, decoded once."""
    images, labels, classes = load_images(Path(path), size)
    samples = [
        (Image.fromarray(image), label)
        for image, label in zip(images.permute(0, 2, 3, 1).numpy(), labels.tolist(), strict=True)
    ]
    return ImageDataset(samples, classes, transform=transform, name=Path(path).name)


def _of_class(pool: ImageDataset, label: int) -> Iterator[int]:
    """Indices of a class in an order that does not follow the file names."""
    indices = [index for index, target in enumerate(pool.targets) if target == label]
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(label)).tolist()
    return (indices[position] for position in order)
