"""Pictures with a class for every pixel: a folder of images beside a folder of masks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2

from spt_fast.errors import InputError, MissingFileError

from .images import read_image
from .transforms import make_transform

# The id of pixels that have no class, as in PASCAL VOC, Cityscapes and ADE20K.
IGNORED = 255


class MaskTransform:
    """Image and mask to the size of a backbone: bicubic and normalised, and to the nearest pixel.

    Args:
        image_size: side of the square result in pixels, or ``(height, width)``.
        mean: three channel means in units of [0, 1].
        std: three channel standard deviations in units of [0, 1].

    Raises:
        InputError: a size, mean or std that is not one.

    Example:
        >>> transform = MaskTransform(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> image, mask = transform(Image.new("RGB", (20, 30), "white"), np.full((30, 20), 7))
        >>> image.shape, image.max(), mask.shape, mask.dtype, mask.unique()
        (torch.Size([3, 8, 8]), tensor(1.), torch.Size([8, 8]), torch.int64, tensor([7]))
    """

    def __init__(
        self, *, image_size: int | tuple[int, int], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        # Its last part, from a picture of the right size on, is the same for all recipes.
        self._normalise = make_transform("vtab", image_size=image_size, mean=mean, std=std, train=False)
        self.size = self._normalise.size

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """From a PIL RGB image and its class ids ``[height, width]`` to float32 ``[3, H, W]`` and int64 ``[H, W]``."""
        resized = v2.functional.resize(image, list(self.size), InterpolationMode.BICUBIC)
        ids = torch.from_numpy(mask.astype(np.int32))[None]
        ids = v2.functional.resize(ids, list(self.size), InterpolationMode.NEAREST_EXACT)
        return self._normalise.finish(resized), ids[0].long()


class MaskFolder(Dataset[tuple[Tensor, Tensor]]):
    """``ROOT/images/<name>.jpg`` (or .png and the like) and ``ROOT/masks/<name>.png``, in the order of the names.

    A mask is a picture with one channel, as grey levels or palette numbers, whose values are class ids; 255 marks
    pixels that have none.

    Args:
        root: the folder of one split.
        classes: the class names; the first has id 0.
        transform: how image and mask become tensors, for example :class:`MaskTransform` with the backbone's
            :func:`~spt_fast.backbones.image_settings`.

    Attributes:
        samples (list[tuple[Path, Path]]): image and mask files.
        classes, transform: the arguments.

    Raises:
        MissingFileError: no folder ``images`` or ``masks``, or an image without mask.
        InputError: no images, two of one name, or more classes than ids.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder, mode in (("images", "RGB"), ("masks", "L")):
        ...     (root / folder).mkdir()
        ...     Image.new(mode, (20, 30)).save(root / folder / "sky.png")
        >>> transform = MaskTransform(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> image, mask = MaskFolder(root, ["sky", "ground"], transform=transform)[0]
        >>> image.shape, mask.shape
        (torch.Size([3, 8, 8]), torch.Size([8, 8]))
    """

    def __init__(
        self, root: str | os.PathLike[str], classes: Sequence[str], *, transform: MaskTransform
    ) -> None:
        self.classes = list(classes)
        self.transform = transform
        if not 1 <= len(self.classes) <= IGNORED:
            raise InputError(f"classes must be 1 to {IGNORED} names, got {len(self.classes)}")
        images, masks = Path(root) / "images", Path(root) / "masks"
        for folder in (images, masks):
            if not folder.is_dir():
                raise MissingFileError(f"folder {folder} does not exist; expected {images} and {masks}")
        image_of: dict[Path, Path] = {}
        for image in sorted(path for path in images.iterdir() if _is_image(path)):
            mask = masks / f"{image.stem}.png"
            if mask in image_of:
                raise InputError(f"{image_of[mask]} and {image} would have one mask, {mask}")
            if not mask.is_file():
                raise MissingFileError(f"image {image} has no mask: {mask} does not exist")
            image_of[mask] = image
        self.samples = [(image, mask) for mask, image in image_of.items()]
        if not self.samples:
            raise InputError(f"folder {images} has no images (looked for {' '.join(IMG_EXTENSIONS)})")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image ``[3, H, W]`` and class ids int64 ``[H, W]``.

        Raises:
            InputError: a file that cannot be read, a mask with several channels, of another size than its image, or
                with ids of no class.
        """
        path, mask_path = self.samples[index]
        image, mask = read_image(path), _read_mask(mask_path)
        if mask.shape != (image.height, image.width):
            raise InputError(
                f"mask {mask_path} is {mask.shape[1]}x{mask.shape[0]} pixels and image {path} is "
                f"{image.width}x{image.height}"
            )
        unknown = np.unique(mask[(mask != IGNORED) & ((mask < 0) | (mask >= len(self.classes)))])
        if len(unknown):
            raise InputError(
                f"mask {mask_path} holds the id {unknown[0]}; expected 0 to {len(self.classes) - 1}, one for each of "
                f"the {len(self.classes)} classes, or {IGNORED} for pixels without a class"
            )
        return self.transform(image, mask)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")


def _read_mask(path: Path) -> np.ndarray:
    """Class ids ``[height, width]``."""
    try:
        with Image.open(path) as picture:
            ids = np.asarray(picture)
    except MemoryError:
        raise
    except Exception as error:  # damaged content makes decoders raise nearly anything
        raise InputError(f"mask {path} cannot be read as an image: {error}") from error
    if ids.ndim != 2:
        raise InputError(f"mask {path} has {ids.shape[-1]} channels; expected one that holds class ids")
    return ids
