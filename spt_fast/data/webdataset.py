"""WebDataset shards: uncompressed tar files in which each sample is an image and a label of the same key.

The shards of a split have its name in theirs (``train-000000.tar``, ``imagenet1k-validation-00.tar``) or lie in a
folder of that name (``train/000000.tar``); shards without any split are all training images. Where there are no
validation shards, a stratified tenth of the training images is held out.

A shard is not streamed: its headers are read once, which gives the place of every image. So an epoch can be resumed
anywhere without reading what comes before, and its order does not depend on the number of workers.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

from torchvision.datasets.folder import IMG_EXTENSIONS

from spt_fast.errors import InputError

from .dataset import Sample
from .folder import SPLIT_OF_FOLDER
from .splits import split_off_validation
from .tar_member import TarMember

RECIPE = "fgvc"
LOOKS_LIKE = "WebDataset shards (train-000000.tar or train/000000.tar, not compressed)"
CLASS_NAMES = "classes.txt"
# A mistaken label, such as an id of eight digits, would otherwise become that many classes.
MAX_CLASSES = 1_000_000
# Archives end with zeros up to a whole record. More of them are the part of a download that never came.
LONGEST_END = 1 << 20  # bytes
UNREADABLE = (tarfile.TarError, OSError, ValueError, OverflowError)  # what tarfile raises for damaged files
LOOKED_AT = 64  # members that show whether an archive holds labelled samples


def recognise(folder: Path) -> bool:
    found = _tar_files(folder)
    if not found:
        return False
    beside = (path for depth in ("*/*", "*/*/*") for path in folder.glob(depth))
    if not any(path.suffix.lower() in IMG_EXTENSIONS for path in beside):
        return True
    # An archive beside class folders is often what they were unpacked from: it has images, but no labels.
    return _begins_with_samples(found[0][0])


def read(folder: Path, split: str) -> tuple[list[Sample], list[str]]:
    """The samples of ``split`` in the order of the shards, and the class names.

    The names are the lines of ``classes.txt`` in ``folder``. Without that file they are the numbers up to the largest
    label of any split, for which the shards of every split are looked through.

    Raises:
        InputError: no shards, a split that is not there, a damaged shard, a sample without an image or a label, no
            images, or labels without a name; the message names shard and member.
    """
    shards = _shards(folder)
    if split not in shards and (split == "test" or "train" not in shards):
        raise InputError(f"split {split!r} is not in {folder}, which has: {', '.join(sorted(shards))}")

    names = ["train", "val"] if split == "trainval" else [split]
    present = [name for name in names if name in shards] or ["train"]
    samples: list[Sample] = [sample for name in present for sample in _samples(shards[name])]
    if not samples:
        raise InputError(
            f"the {present[0]} shards of {folder} have no images (looked for {' '.join(IMG_EXTENSIONS)})"
        )
    classes = _class_names(folder, samples, [path for paths in shards.values() for path in paths])
    if split in ("trainval", "test") or "val" in shards:
        return samples, classes
    kept, held = split_off_validation(samples, folder)
    return (kept if split == "train" else held), classes


def shard_lengths(samples: Sequence[Sample]) -> list[int]:
    """The number of consecutive samples in each shard, for ``ImageDataset(shards=...)``."""
    paths = (source.path for source, _ in samples if isinstance(source, TarMember))
    return [len(list(members)) for _, members in groupby(paths)]


# Which shards there are


def _tar_files(folder: Path) -> list[tuple[Path, str]]:
    """Each tar file, sorted, with the words that may say which split it belongs to."""
    found = [(path, path.stem) for path in sorted(folder.glob("*.tar"))]
    for name in SPLIT_OF_FOLDER:
        found += [(path, name) for path in sorted((folder / name).glob("*.tar"))]
    return [(path, words) for path, words in found if path.is_file() and not path.name.startswith(".")]


def _shards(folder: Path) -> dict[str, list[Path]]:
    shards: dict[str, list[Path]] = {}
    places: dict[str, tuple[Path, str]] = {}
    without = []
    for path, words in _tar_files(folder):
        named = {word for word in re.findall("[a-z]+", words.lower()) if word in SPLIT_OF_FOLDER}
        if not named:
            without.append(path)
            continue
        if len(named) > 1:
            raise InputError(f"shard {path} has the names of several splits: {', '.join(sorted(named))}")
        place = (path.parent, named.pop())
        split = SPLIT_OF_FOLDER[place[1]]
        if places.setdefault(split, place) != place:
            # A copy in two places would train on everything twice.
            raise InputError(
                f"data folder {folder} has two sets of {split} shards: {shards[split][0]} and {path}"
            )
        shards.setdefault(split, []).append(path)
    if shards and without:
        raise InputError(f"shard {without[0]} names no split, as others in {folder} do")
    if without:
        return {"train": without}
    if not shards:
        raise InputError(f"data folder {folder} has no tar files, expected {LOOKS_LIKE}")
    return shards


def _class_names(folder: Path, samples: list[Sample], shards: list[Path]) -> list[str]:
    path = folder / CLASS_NAMES
    if not path.is_file():
        return [str(label) for label in range(1 + max(label for _, label in _samples(shards)))]
    try:
        classes = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except ValueError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    if not all(classes):
        raise InputError(f"{path}:{classes.index('') + 1} is empty, expected one class name a line")
    for source, label in samples:
        if label >= len(classes):
            raise InputError(f"label {label} of {source} has no line in {path}, which has {len(classes)}")
    return classes


def _begins_with_samples(shard: Path) -> bool:
    try:
        with tarfile.open(shard, "r:") as archive:
            found = {_key_and_kind(member.name) for member in islice(archive, LOOKED_AT)}
    except UNREADABLE:
        return False
    return any({(key, "cls"), (key, "json")} & found for key, kind in found if kind == "image")


# What is in them


def _samples(shards: list[Path]) -> Iterator[tuple[TarMember, int]]:
    for path in shards:
        status = path.stat()
        yield from _scan(path, status.st_size, status.st_mtime_ns)


# Training opens two splits of the same shards. What is kept here are the members that the data sets hold anyway.
@cache
def _scan(shard: Path, size: int, mtime_ns: int) -> tuple[tuple[TarMember, int], ...]:
    """The images of one shard, with labels, in the order in which their keys begin."""
    try:
        with shard.open("rb") as file:
            return tuple(
                (parts["image"], _label(parts, file)) for parts in _parts(shard, file) if "image" in parts
            )
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{shard} cannot be read as an uncompressed tar file: {error}") from error


def _parts(shard: Path, file: BinaryIO) -> list[dict[str, TarMember]]:
    """What each sample has of ``image``, ``cls`` and ``json``."""
    parts_of: dict[str, dict[str, TarMember]] = {}
    for member in _members(shard, file):
        key, kind = _key_and_kind(member.name)
        if kind is None:
            continue
        parts = parts_of.setdefault(key, {})
        if kind in parts:
            raise InputError(
                f"{shard}: {member.name!r} is a second {kind} of one sample, the first is {parts[kind].name!r}"
            )
        if not member.isreg() or member.issparse():
            raise InputError(f"{shard}: {member.name!r} is a link or sparse, expected a plain file")
        parts[kind] = TarMember(shard, member.offset_data, member.size, member.name)
    for parts in parts_of.values():
        if "cls" in parts and "image" not in parts:
            raise InputError(
                f"{shard}: {parts['cls'].name!r} has no image beside it (looked for {' '.join(IMG_EXTENSIONS)})"
            )
    return list(parts_of.values())


def _key_and_kind(name: str) -> tuple[str, str | None]:
    """Up to the first dot of the base name; ``image``, ``cls``, ``json``, or None for what is of no use here."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    kind = "image" if f".{extension.lower()}" in IMG_EXTENSIONS else extension.lower()
    # No stem: hidden files such as the ._0.jpg of other file systems.
    return folder + slash + stem, kind if stem and kind in ("image", "cls", "json") else None


def _members(shard: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers of an archive, one after the other, and then an error unless it is whole."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # they are not needed again, and may be millions
            if member.size < 0:
                raise tarfile.ReadError(f"the size of {member.name!r} is negative")
            if not member.isdir():
                yield member
    # tarfile takes a damaged header for the end.
    file.seek(archive.offset)
    rest = file.read(LONGEST_END + 1)
    if not tarfile.BLOCKSIZE <= len(rest) <= LONGEST_END or rest.strip(b"\0"):
        raise InputError(
            f"{shard} is truncated or damaged: expected the end of an archive at byte {archive.offset} of "
            f"{file.seek(0, 2)}"
        )


def _label(parts: dict[str, TarMember], file: BinaryIO) -> int:
    """The integer in ``.cls``, or else the one in ``.json``."""
    image, source = parts["image"], parts.get("cls") or parts.get("json")
    if source is None:
        raise InputError(f"{image.path}: {image.name!r} has no label, expected a .cls or .json of its key")
    file.seek(source.offset)
    content = file.read(source.size)
    label: Any
    try:
        if "cls" in parts:
            label = int(content)
        else:
            fields = json.loads(content)
            label = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
    except (ValueError, RecursionError):
        label = None
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < MAX_CLASSES:
        expected = "an integer" if "cls" in parts else "a json object with an integer 'label' or 'cls'"
        raise InputError(
            f"{image.path}: {source.name!r} must hold {expected} from 0 to {MAX_CLASSES - 1}, "
            f"got {_shortened(content)}"
        )
    return label


def _shortened(content: bytes) -> str:
    return repr(content.decode(errors="replace")[:60])
