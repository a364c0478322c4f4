"""The augmentation of a whole batch: drawn on the host exactly as torchvision draws it, carried out on the device.

Resizing is linear, so that a batch of crops of any sizes is resized by two batched matrix products::

    result = down @ crop @ across^T

Row ``o`` of ``across`` holds what every column of the crop contributes to column ``o`` of the result: Pillow's triangle
filter, as wide as the scale where the crop shrinks. A flip reverses the rows of ``across``. Pillow counts weights in
steps of 2^-22 and rounds to whole grey levels after each of the two products, the order of which depends on the sizes;
so it is done here, in whole numbers that no product rounds (:func:`resize_crops`), and the device sees the pixels that
the CPU would have made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from spt_fast.errors import InputError

from .dataset import Transform
from .transforms import ImageTransform

# Pillow's weights are whole multiples of 2^-22 (PRECISION_BITS in its Resample.c).
WEIGHT_BITS = 22
# What a factor may have for a product to be exact with TF32 multiplications: 10 stored bits and the leading one.
HALF_BITS = 11
PILLOW = int(PIL.__version__.partition(".")[0])

Multiply = Callable[[Tensor, Tensor], Tensor]


class Crop(NamedTuple):
    """The part of an image that an augmentation takes, in pixels, and whether the result is flipped horizontally."""

    top: int
    left: int
    height: int
    width: int
    flipped: bool


def supports(transform: Transform | None) -> bool:
    """Whether what is left of ``transform`` after its preparation can be done on a device.

    Example:
        >>> from spt_fast.data import make_transform
        >>> supports(make_transform("fgvc", image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, train=True))
        True
        >>> jitter = ImageTransform([], [v2.ColorJitter(0.5)], size=(8, 8), mean=[0.5] * 3, std=[0.5] * 3)
        >>> supports(jitter)
        False
    """
    return why_not(transform) is None


def why_not(transform: Transform | None) -> str | None:
    """Why a device cannot do what is left of ``transform`` after its preparation, one sentence; ``None`` if it can."""
    if not isinstance(transform, ImageTransform):
        name = "no transform" if transform is None else f"the transform {type(transform).__name__}"
        return f"the data set has {name}, expected one of make_transform"
    steps = _random_steps(transform)
    for position, step in enumerate(steps):
        is_first, is_last = position == 0, position == len(steps) - 1
        if not (
            is_first and _is_plain_crop(step, transform) or is_last and type(step) is v2.RandomHorizontalFlip
        ):
            return (
                f"transform has {step}, which only the loader of the CPU (make_loader) can do; expected a bilinear "
                f"RandomResizedCrop to {transform.size}, a RandomHorizontalFlip, both in this order, or nothing"
            )
    return None


def draw_crops(
    transform: ImageTransform, sizes: Sequence[tuple[int, int]], seeds: Sequence[int]
) -> list[Crop]:
    """What ``transform`` takes of images, as it draws it itself from torch's CPU generator after ``manual_seed``.

    Some tens of microseconds an image with RandomResizedCrop. torch's global random state is left as it was.

    Args:
        transform: a transform that :func:`supports` accepts.
        sizes: (height, width) of every prepared image in pixels.
        seeds: for every image the number that the generator is seeded with.

    Raises:
        InputError: the transform has a step that is not carried out on a device.

    Example:
        >>> from spt_fast.data import make_transform
        >>> transform = make_transform("fgvc", image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, train=True)
        >>> draw_crops(transform, [(20, 30), (20, 30)], seeds=[1, 1])
        [Crop(top=1, left=1, height=15, width=18, flipped=True), Crop(top=1, left=1, height=15, width=18, flipped=True)]
    """
    reason = why_not(transform)
    if reason is not None:
        raise InputError(reason)
    whole = [Crop(0, 0, height, width, False) for height, width in sizes]
    steps = _random_steps(transform)
    if not steps:
        return whole
    pixel = torch.empty(1, 1, 1)
    crops = []
    with torch.random.fork_rng(devices=[]):
        for crop, seed in zip(whole, seeds, strict=True):
            # torch.manual_seed would reseed the GPUs as well.
            torch.default_generator.manual_seed(seed)
            for step in steps:
                if isinstance(step, v2.RandomHorizontalFlip):
                    crop = crop._replace(flipped=not bool(torch.rand(1) >= step.p))
                else:
                    # An image of this size without its pixels: torchvision asks for no more.
                    crop = Crop(**step.make_params([pixel.expand(1, crop.height, crop.width)]), flipped=False)
            crops.append(crop)
    return crops


def resized_vertically_first(heights: np.ndarray, widths: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which crops the installed Pillow resizes vertically and then horizontally, bool ``[B]``.

    Up to Pillow 12 none; since then those that lose more than twice as many rows as columns. In the other order
    about a fifth of the pixels comes out as another grey level.

    Args:
        heights: int64 ``[B]``, pixels.
        widths: int64 ``[B]``, pixels.
        size: (height, width) of the results in pixels.

    Example:
        >>> resized_vertically_first(np.array([9, 90]), np.array([99, 99]), size=(8, 8))
        array([False, False])
    """
    lost_rows, lost_columns = heights - size[0], widths - size[1]
    return (PILLOW >= 13) & (lost_rows > 0) & (lost_rows > 2 * lost_columns)


def resize_crops(
    pixels: Tensor,
    heights: Tensor,
    widths: Tensor,
    flipped: Tensor,
    size: tuple[int, int],
    *,
    vertically_first: bool,
) -> Tensor:
    """Resize crops of different sizes, bilinear and antialiased as Pillow does, and flip some of them horizontally.

    Equal to ``horizontal_flip(resized_crop(...))`` of torchvision on PIL images, grey level for grey level: weights are
    Pillow's whole multiples of 2^-22, and no sum of them is rounded. (A weight may differ in its last bit where the
    order of a float64 sum decides about it; one grey level in 10,000 would then be off by one, at most.)

    On a GPU weights are multiplied in two halves of 11 bits, which TF32 holds exactly as well as float32 does, so that
    the result depends neither on ``torch.backends`` nor on ``torch.set_float32_matmul_precision``; both are left alone.
    The sums are exact for crops up to 31 times as long as the result; beyond, they may be off by a few 2^-22 of a grey
    level before they are rounded. On a CPU the products are float64.

    Nothing here waits for the device.

    Args:
        pixels: uint8 ``[B, H, W, 3]``; a crop is at its upper left, the rest may be anything.
        heights: int64 ``[B]``, rows of every crop, 1 to ``H``.
        widths: int64 ``[B]``, columns of every crop, 1 to ``W``.
        flipped: int64 or bool ``[B]``, whether a result is flipped.
        size: (height, width) of the results in pixels.
        vertically_first: the order that :func:`resized_vertically_first` gives, the same for all crops.

    Returns:
        uint8 ``[B, 3, height, width]``.

    Example:
        >>> pixels = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).view(1, 1, 4, 1).expand(1, 1, 4, 3)
        >>> one, three = torch.tensor([1]), torch.tensor([3])  # the fourth column is outside the crop
        >>> resize_crops(pixels, one, three, flipped=one, size=(1, 3), vertically_first=False)[0, 0]
        tensor([[200, 100,   0]], dtype=torch.uint8)
        >>> resize_crops(pixels, one, three, flipped=one, size=(1, 1), vertically_first=False)[0, 0]
        tensor([[100]], dtype=torch.uint8)
    """
    batch, most_rows, most_columns, channels = pixels.shape
    height, width = size
    across = _triangle_weights(widths, most_columns, width, flipped)
    down = _triangle_weights(heights, most_rows, height, torch.zeros_like(flipped))

    def resized_across(levels: Tensor) -> Tensor:
        """From ``[B, H, W, 3]`` to ``[B, H, 3, width]``."""
        lines = levels.transpose(2, 3).reshape(batch, -1, most_columns)
        done = _filtered(across, lines, lambda weights, lines: torch.bmm(lines, weights.mT))
        return done.view(batch, -1, channels, width)

    def resized_down(levels: Tensor) -> Tensor:
        """From ``[B, H, ..]`` to ``[B, height, ..]``."""
        done = _filtered(down, levels.reshape(batch, most_rows, -1), torch.bmm)
        return done.view(batch, height, *levels.shape[2:])

    # Under autocast the products would be rounded to its dtype.
    with torch.autocast(pixels.device.type, enabled=False):
        done = (
            resized_across(resized_down(pixels)) if vertically_first else resized_down(resized_across(pixels))
        )
    return done.transpose(1, 2).to(torch.uint8, memory_format=torch.contiguous_format)


def normalize_images(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """What ``v2.ToDtype(torch.float32, scale=True)`` and ``v2.Normalize`` make of images, bit for bit.

    torchvision's own functions copy ``mean`` and ``std`` to the device at every call and wait for it.

    Args:
        pixels: uint8 ``[B, 3, H, W]``.
        mean: float32 ``[3, 1, 1]`` where the pixels are, in units of [0, 1].
        std: likewise.

    Returns:
        float32 ``[B, 3, H, W]``, contiguous.

    Example:
        >>> half = torch.full((3, 1, 1), 0.5)
        >>> normalize_images(torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2), half, half)[0, 0]
        tensor([[-1.,  1.]])
    """
    images = pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return images.mul_(1.0 / 255).sub_(mean).div_(std)


def _random_steps(transform: ImageTransform) -> list[Any]:
    """What comes between the preparation and the tensor.

    As it is carried out, not ``transform.augmentation``: whoever appended a step to a transform expects it to be taken.
    """
    steps = list(transform.transforms[len(transform.preparation) :])
    ends_as_made = [type(step) for step in steps[-3:]] == [v2.PILToTensor, v2.ToDtype, v2.Normalize]
    return steps[:-3] if ends_as_made else steps


def _is_plain_crop(step: Any, transform: ImageTransform) -> bool:
    return (
        type(step) is v2.RandomResizedCrop
        and tuple(step.size) == transform.size
        and step.interpolation in ("bilinear", InterpolationMode.BILINEAR)
    )


def _triangle_weights(lengths: Tensor, most: int, size: int, flipped: Tensor) -> Tensor:
    """What every pixel of a line contributes to every pixel of its result, in units of 2^-22.

    Pillow's ``precompute_coeffs`` and ``normalize_coeffs_8bpc``, operation for operation in float64.

    Args:
        lengths: int64 ``[B]``, pixels of the lines, at most ``most``.
        most: columns of the result.
        size: pixels of every result.
        flipped: ``[B]``, whether a result begins at the end of its line.

    Returns:
        int32 ``[B, size, most]``.
    """
    device = lengths.device
    # How many pixels a pixel is made of at most: known on the host, because ``most`` is.
    taps = min(2 * math.ceil(max(1.0, most / size)) + 1, most)
    scale = (lengths.double() / size)[:, None]
    support = scale.clamp(min=1.0)
    pixel = torch.arange(size, device=device)
    pixel = torch.where(flipped.bool()[:, None], size - 1 - pixel, pixel)
    center = (pixel.double() + 0.5) * scale
    first = (center - support + 0.5).long().clamp(min=0)
    end = torch.minimum((center + support + 0.5).long(), lengths[:, None])
    position = first.clamp(max=most - taps)[..., None] + torch.arange(taps, device=device)
    distance = ((position - center[..., None] + 0.5) * support.reciprocal()[..., None]).abs()
    inside = (position >= first[..., None]) & (position < end[..., None])
    weights = torch.where(inside, 1.0 - distance, 0.0).clamp(min=0.0)
    weights /= weights.sum(dim=2, keepdim=True)
    whole = (weights * 2**WEIGHT_BITS + 0.5).int()
    return torch.zeros(*pixel.shape, most, dtype=torch.int32, device=device).scatter_(2, position, whole)


def _filtered(weights: Tensor, levels: Tensor, multiply: Multiply) -> Tensor:
    """The weighted sums of grey levels, rounded to whole grey levels as Pillow rounds them; int32."""
    # On a CPU float32 products may be rounded to bfloat16, which has no 11 bits; on many GPUs float64 is slow.
    sums = _sums_in_float64 if levels.device.type == "cpu" else _sums_in_halves
    return (sums(weights, levels, multiply) + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS


def _sums_in_float64(weights: Tensor, levels: Tensor, multiply: Multiply) -> Tensor:
    return multiply(weights.double(), levels.double()).int()


def _sums_in_halves(weights: Tensor, levels: Tensor, multiply: Multiply) -> Tensor:
    """The same from float32 or TF32 products: 11 bits of a weight times 8 bits of a pixel, summed below 2^24."""
    levels = levels.float()
    high = (weights + (1 << (HALF_BITS - 1))) >> HALF_BITS  # rounded: what is left is in -1024 .. 1023
    low = weights - (high << HALF_BITS)
    return (multiply(high.float(), levels).int() << HALF_BITS) + multiply(low.float(), levels).int()
