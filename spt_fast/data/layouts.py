"""One call for all layouts: which reader understands what lies on this disk."""

from __future__ import annotations

import os
from pathlib import Path

from spt_fast.errors import InputError, MissingFileError

from . import digits, fgvc, folder, vtab, webdataset
from .dataset import ImageDataset, Transform

SPLITS = ("train", "val", "trainval", "test")

# In the order "auto" asks them: lists first, because the images beside a list may lie in folders as well, and shards
# before folders, because their splits may.
_FOLDER_READERS = {"vtab": vtab, "fgvc": fgvc, "webdataset": webdataset, "folder": folder}
LAYOUTS = ("auto", *_FOLDER_READERS, "digits")


def load_dataset(
    data: str | os.PathLike[str],
    split: str = "train",
    *,
    layout: str = "auto",
    transform: Transform | None = None,
    strict: bool = False,
    seed: int = 0,
) -> ImageDataset:
    """Open one split of a data set.

    Args:
        data: a folder, or the word ``"digits"`` for scikit-learn's digits (a folder of that name is
            ``"./digits"``).
        split: ``"train"``, ``"val"``, ``"trainval"`` (both) or ``"test"``.
        layout: ``"folder"`` (class folders), ``"vtab"`` (VTAB-1k lists), ``"fgvc"`` (VPT's json lists),
            ``"webdataset"`` (shards of WebDataset), ``"digits"``, or ``"auto"``: whichever the files look like.
        transform: see :class:`ImageDataset`; the data set's ``recipe`` names the customary one.
        strict: an unreadable file is an error instead of being skipped and counted.
        seed: seed of the augmentation; the splits do not depend on it.

    Returns:
        The images, their labels and class names. Files are decoded only when asked for.

    Raises:
        MissingFileError: ``data``, a list of the layout or an image in that list does not exist.
        InputError: an unknown split or layout, no recognisable layout, a split that is not there, a malformed
            list or shard, no images, or splits that disagree on the classes.

    Example:
        >>> load_dataset("digits", "test")
        ImageDataset(digits/test: 797 images, 10 classes)
    """
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")

    if data == "digits" and layout in ("auto", "digits"):
        samples, classes = digits.read(split)
        shards = None
        recipe, name = digits.RECIPE, "digits"
    elif layout == "digits":
        raise InputError(f"data must be {digits.LOOKS_LIKE} for layout='digits', got {str(data)!r}")
    else:
        path = Path(data).expanduser()
        if not path.exists():
            raise MissingFileError(f"data {str(data)!r} does not exist, expected a folder or the word digits")
        if not path.is_dir():
            raise InputError(f"data {str(data)!r} is a file, expected a folder")
        reader = _FOLDER_READERS[_recognised(path) if layout == "auto" else layout]
        samples, classes = reader.read(path, split)
        shards = webdataset.shard_lengths(samples) if reader is webdataset else None
        recipe, name = reader.RECIPE, path.resolve().name
    return ImageDataset(
        samples,
        classes,
        transform=transform,
        strict=strict,
        seed=seed,
        recipe=recipe,
        name=f"{name}/{split}",
        shards=shards,
    )


def _recognised(path: Path) -> str:
    for layout, reader in _FOLDER_READERS.items():
        if reader.recognise(path):
            return layout
    looked_for = "; ".join(reader.LOOKS_LIKE for reader in _FOLDER_READERS.values())
    raise InputError(f"data folder {path} has no images in a layout that is known, looked for: {looked_for}")
