"""Decoding one image file, completely."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from spt_fast.errors import InputError, MissingFileError


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file to RGB.

    The whole file is decoded here and now, so a truncated one is noticed. EXIF orientation is not applied, as
    in torchvision and timm.

    Args:
        path: the file, in any format that Pillow reads.

    Returns:
        A PIL image of mode ``RGB`` with at least one pixel.

    Raises:
        MissingFileError: there is no such file.
        InputError: the file is not an image, is truncated, or is implausibly large (a decompression bomb).

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "grey.png"
        >>> Image.new("L", (4, 2), color=7).save(path)
        >>> read_image(path).mode, read_image(path).getpixel((0, 0))
        ('RGB', (7, 7, 7))
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"image file {path} does not exist")
    return decode_image(path, str(path))


def decode_image(source: Path | BinaryIO, name: str) -> Image.Image:
    """Decode all of a file to RGB; ``name`` is what an :class:`InputError` calls it if that fails."""
    try:
        with Image.open(source) as image:
            if 0 in image.size:
                raise ValueError("it has no pixels")
            return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged content makes decoders raise nearly anything
        raise InputError(f"{name} cannot be read as an image: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to RGB, decoding what was not decoded yet."""
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey levels at 255, which turns nearly every such picture white; keep the high
        # byte.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
