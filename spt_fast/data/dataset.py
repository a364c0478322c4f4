"""Labelled images as a torch data set whose augmentation can be repeated exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from spt_fast.errors import InputError, MissingFileError

from .images import read_image, to_rgb
from .tar_member import TarMember

Source = str | Path | Image.Image | TarMember
Sample = tuple[Source, int]
Transform = Callable[[Image.Image], torch.Tensor]


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed out of several numbers of 0 or more; similar numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class ImageDataset(Dataset):
    """Images with class labels, decoded and transformed one at a time.

    The randomness of the transform is a function of ``(seed, epoch, index)`` alone: a resumed run sees the
    crops that an uninterrupted one would have seen, with any number of workers. (This holds for transforms
    that draw from torch's CPU generator, as torchvision's do.) torch's global random state is left as it was.

    Args:
        samples: pairs of an image and its label. An image is the path of a file, a member of a tar file or a PIL
            image in memory; a label is an index into ``classes``.
        classes: the class names.
        transform: from a PIL RGB image to a float32 tensor ``[3, H, W]``; None gives the image at its own
            size, scaled to [0, 1].
        strict: what a file that cannot be read becomes: an error (True), or None in place of a pair (False),
            which the loader drops and counts.
        seed: seed of the augmentation, 0 or more.
        recipe: the transform recipe that is customary for these images, see :func:`make_transform`.
        name: what to call the data in reports.
        shards: the number of consecutive samples in each shard, which the loader then reads one after the other;
            None for images that are as quickly read in any order.

    Attributes:
        classes (list[str]): class names.
        targets (list[int]): the label of every image.
        epoch (int): the epoch that the augmentation is drawn for.
        shards (list[int] | None): the number of samples in each shard.

    Raises:
        InputError: no samples, a label that is no index into ``classes``, or shards that are not of these samples.

    Example:
        >>> images = [Image.new("RGB", (5, 4), color=color) for color in ("red", "blue")]
        >>> dataset = ImageDataset([(images[0], 0), (images[1], 1)], ["red", "blue"])
        >>> image, label = dataset[1]
        >>> image.shape, dataset.classes[label]
        (torch.Size([3, 4, 5]), 'blue')
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        classes: Sequence[str],
        *,
        transform: Transform | None = None,
        strict: bool = False,
        seed: int = 0,
        recipe: str = "vtab",
        name: str = "images",
        shards: Sequence[int] | None = None,
    ) -> None:
        if not samples:
            raise InputError(f"samples of {name} is empty, expected at least one image")
        if seed < 0:
            raise InputError(f"seed must be 0 or more, got {seed}")
        strays = {label for _, label in samples if not 0 <= label < len(classes)}
        if strays:
            raise InputError(
                f"label {min(strays)} in samples of {name} is no index into its {len(classes)} classes"
            )
        if shards is not None and (min(shards, default=0) < 1 or sum(shards) != len(samples)):
            raise InputError(
                f"shards of {name} must be 1 or more samples each and {len(samples)} together, "
                f"got {len(shards)} with {sum(shards)}"
            )
        self.samples = list(samples)
        self.classes = list(classes)
        self.transform = transform
        self.strict = strict
        self.seed = seed
        self.recipe = recipe
        self.name = name
        self.epoch = 0
        self.shards = None if shards is None else list(shards)

    @property
    def targets(self) -> list[int]:
        return [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: {len(self)} images, {len(self.classes)} classes)"

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | None:
        """The image ``[3, H, W]`` float32 and its label; None for an unreadable file unless ``strict``."""
        try:
            image = self.picture(index)
        except (InputError, MissingFileError):
            if self.strict:
                raise
            return None
        return self._transformed(image, int(index) % len(self), self.transform), self.samples[index][1]

    def picture(self, index: int) -> Image.Image:
        """Image ``index``, decoded to RGB at its own size and not transformed.

        Raises:
            MissingFileError: its file is not there.
            InputError: its file cannot be read.
        """
        source = self.samples[index][0]
        if isinstance(source, TarMember):
            return source.read_image()
        return to_rgb(source) if isinstance(source, Image.Image) else read_image(source)

    def blank(self) -> torch.Tensor:
        """What the transform makes of a black image, float32 [3, H, W]: the shape all images share."""
        return self._transformed(Image.new("RGB", (512, 512)), 0, self.transform)

    def describe(self, index: int) -> str:
        """The path of image ``index`` (``shard: member`` in a tar file), or its number when it never was a file."""
        source = self.samples[index][0]
        return f"image {index} of {self.name}" if isinstance(source, Image.Image) else str(source)

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation of ``epoch`` (0 or more) from now on."""
        if epoch < 0:
            raise InputError(f"epoch must be 0 or more, got {epoch}")
        self.epoch = epoch

    def subset(self, indices: Sequence[int]) -> ImageDataset:
        """The images at ``indices``, in that order, with all the classes; shards remain where the order does."""
        samples = [self.samples[index] for index in indices]
        if not samples:
            raise InputError(f"indices into {self.name} is empty, expected at least one image")
        smaller = copy.copy(self)
        smaller.samples = samples
        smaller.shards = self._shards_of(np.asarray(indices))
        return smaller

    def with_transform(self, transform: Transform | None) -> ImageDataset:
        """The same images behind another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def _shards_of(self, indices: np.ndarray) -> list[int] | None:
        if self.shards is None or indices[0] < 0 or (np.diff(indices) < 0).any():
            return None
        shard_of = np.searchsorted(np.cumsum(self.shards), indices, side="right")
        return np.unique(shard_of, return_counts=True)[1].tolist()

    def _transformed(self, image: Image.Image, index: int, transform: Transform | None) -> torch.Tensor:
        """With the randomness that belongs to image ``index`` in this epoch."""
        if transform is None:
            return tv.to_dtype(tv.pil_to_tensor(image), torch.float32, scale=True)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would reseed the GPUs as well, and with them the dropout of the trained model.
            torch.default_generator.manual_seed(mixed_seed(self.seed, self.epoch, index))
            return transform(image)
