"""Folders of class folders, as torchvision's ImageFolder reads them.

Either ``DIR/train/<class>/*.jpg`` with ``DIR/val`` (or ``valid``, ``validation``) and ``DIR/test`` beside it,
or ``DIR/<class>/*.jpg``. Where there is no validation folder, a stratified tenth of the training images is
held out.
"""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from spt_fast.errors import InputError

from .dataset import Sample
from .splits import split_off_validation

RECIPE = "fgvc"
LOOKS_LIKE = "class folders, or train/, val/ and test/ folders of class folders"
SPLIT_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def recognise(folder: Path) -> bool:
    return bool(_subfolders(folder))


def read(folder: Path, split: str) -> tuple[list[Sample], list[str]]:
    """The samples and class names (sorted folder names) of ``split``.

    Raises:
        InputError: no class folders, no images, a split that is not there, or splits that disagree on the
            classes.
    """
    roots = _split_roots(folder)
    if split not in roots and (split == "test" or "train" not in roots):
        raise InputError(f"split {split!r} is not in {folder}, which has: {', '.join(sorted(roots))}")

    reference = roots["train"] if "train" in roots else roots[split]
    classes = _subfolders(reference)
    if not classes:
        raise InputError(
            f"data folder {reference} has no class folders, expected {reference}/<class>/<image>"
        )
    for root in roots.values():
        unknown = sorted(set(_subfolders(root)) - set(classes))
        if unknown:
            raise InputError(f"{root} has classes that {reference} has not: {', '.join(unknown)}")

    if split == "test" or (split == "val" and "val" in roots):
        return _images(roots[split], classes, may_lack_classes=True), classes

    train = _images(roots["train"], classes)
    if split == "trainval" and "val" in roots:
        return train + _images(roots["val"], classes, may_lack_classes=True), classes
    if split == "trainval" or "val" in roots:
        return train, classes
    kept, held = split_off_validation(train, roots["train"])
    return (kept if split == "train" else held), classes


def _split_roots(folder: Path) -> dict[str, Path]:
    """The folder of each split; a folder of classes is all training images."""
    names = _subfolders(folder)
    if "train" not in names and not (names and set(names) <= set(SPLIT_OF_FOLDER)):
        return {"train": folder}
    roots: dict[str, Path] = {}
    for name in names:
        split = SPLIT_OF_FOLDER.get(name)
        if split in roots:
            raise InputError(f"data folder {folder} has two {split} folders: {roots[split].name} and {name}")
        if split is not None:
            roots[split] = folder / name
    return roots


def _subfolders(folder: Path) -> list[str]:
    """Sorted names, without hidden ones such as .git or .ipynb_checkpoints."""
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )


def _is_image(path: str) -> bool:
    name = Path(path).name
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _images(root: Path, classes: list[str], *, may_lack_classes: bool = False) -> list[Sample]:
    index_of = {name: index for index, name in enumerate(classes)}
    samples = make_dataset(root, index_of, is_valid_file=_is_image, allow_empty=True)
    if not samples:
        raise InputError(
            f"data folder {root} has no images in its class folders (looked for {' '.join(IMG_EXTENSIONS)})"
        )
    without = sorted(set(range(len(classes))) - {label for _, label in samples})
    if without and not may_lack_classes:
        raise InputError(
            f"class folder {root / classes[without[0]]} has no images (looked for {' '.join(IMG_EXTENSIONS)})"
        )
    return list(samples)
