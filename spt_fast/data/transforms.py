"""The image transforms of Section 4.1, built from torchvision.

=========  ==========================================  ==================================================
recipe     training                                    test
=========  ==========================================  ==================================================
``fgvc``   random resized crop, horizontal flip        resize the shorter side to 256/224, centre crop
``vtab``   plain resize                                plain resize
=========  ==========================================  ==================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import v2

from spt_fast.errors import InputError

RECIPES = ("fgvc", "vtab")


class ImageTransform(v2.Compose):
    """From a PIL RGB image to a normalised float32 tensor ``[3, height, width]``, in parts that can be had apart.

    Args:
        preparation: what is the same for an image in every epoch, from PIL to PIL; it comes first.
        augmentation: what is random, from PIL to PIL; drawn from torch's CPU generator alone.
        size: (height, width) of the result in pixels.
        mean: three channel means in units of [0, 1].
        std: three channel standard deviations in units of [0, 1].

    Attributes:
        preparation, augmentation (list[nn.Module]), size (tuple[int, int]), mean, std (list[float]): the arguments.
    """

    def __init__(
        self,
        preparation: Sequence[torch.nn.Module],
        augmentation: Sequence[torch.nn.Module],
        *,
        size: tuple[int, int],
        mean: list[float],
        std: list[float],
    ) -> None:
        to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        super().__init__([*preparation, *augmentation, *to_tensor])
        self.preparation = list(preparation)
        self.augmentation = list(augmentation)
        self.size = size
        self.mean = mean
        self.std = std

    def prepare(self, image: Image.Image) -> Image.Image:
        """The image after the preparation: what may be kept between epochs."""
        for step in self.preparation:
            image = step(image)
        return image

    def finish(self, prepared: Image.Image) -> torch.Tensor:
        """The rest: ``transform(image)`` is ``transform.finish(transform.prepare(image))``."""
        image: Any = prepared
        for step in self.transforms[len(self.preparation) :]:
            image = step(image)
        return image


def make_transform(
    recipe: str,
    *,
    image_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    train: bool,
) -> ImageTransform:
    """Build the transform of a recipe.

    Args:
        recipe: ``"fgvc"`` (random resized crop and flip to train; resize and centre crop to test) or
            ``"vtab"`` (plain resize, no augmentation).
        image_size: side of the square result in pixels, or ``(height, width)``.
        mean: three channel means in units of [0, 1], e.g. the backbone's own.
        std: three channel standard deviations in units of [0, 1].
        train: the training or the test half of the recipe.

    Returns:
        A callable from a PIL RGB image to a float32 tensor ``[3, height, width]``, normalised by ``mean`` and
        ``std``. What is random about it is drawn from torch's CPU generator alone.

    Raises:
        InputError: an unknown recipe, or a size, mean or std that is not one.

    Example:
        >>> from PIL import Image
        >>> transform = make_transform("fgvc", image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, train=False)
        >>> transform(Image.new("RGB", (20, 30), color="white"))[:, 0, 0]
        tensor([1., 1., 1.])
    """
    height, width = _height_width(image_size)
    mean, std = _three_floats("mean", mean), _three_floats("std", std)
    if not all(value > 0 for value in std):
        raise InputError(f"std must be positive, got {std}")

    preparation: list[torch.nn.Module] = []
    augmentation: list[torch.nn.Module] = []
    if recipe == "vtab":
        preparation = [v2.Resize((height, width))]
    elif recipe == "fgvc" and train:
        augmentation = [v2.RandomResizedCrop((height, width)), v2.RandomHorizontalFlip()]
    elif recipe == "fgvc":
        # By the longer side of the crop, so that an oblong crop never reaches outside the image.
        preparation = [v2.Resize(round(max(height, width) * 256 / 224)), v2.CenterCrop((height, width))]
    else:
        raise InputError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    return ImageTransform(preparation, augmentation, size=(height, width), mean=mean, std=std)


def _height_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError(
            f"image_size must be a positive number of pixels or (height, width), got {image_size!r}"
        )
    return sides


def _three_floats(name: str, values: Sequence[float]) -> list[float]:
    try:
        floats = [float(value) for value in values]
    except (TypeError, ValueError):
        floats = []
    if len(floats) != 3:
        raise InputError(f"{name} must be three numbers, one for each of red, green and blue, got {values!r}")
    return floats
