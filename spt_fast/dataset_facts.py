"""What the paper says about its data sets, and what may have happened where a copy on disk has other numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_type_hints

from spt_fast.data import LAYOUTS, SPLITS
from spt_fast.errors import InputError
from spt_fast.yaml_files import checked, read_yaml


@dataclass(frozen=True)
class DatasetFacts:
    """A data set as it was used in the paper.

    Attributes:
        name: as in the names of recipes, for example ``"cub200"``.
        title: as the paper writes it.
        num_classes: number of classes.
        transform: the transform it is used with, a name for :func:`spt_fast.data.make_transform`.
        train: number of training images without those of ``val``; ``None`` where it is not known.
        val: number of validation images.
        test: number of test images; ``None`` where the validation images are what is judged on.
        layout: the layout copies of it usually have, a name for :func:`spt_fast.data.load_dataset`.
        benchmark: ``"FGVC"``, ``"VTAB-1k"``, ``"large"``, or ``None`` for a data set of your own.
        group: of a VTAB-1k task.
        row: its place among the data sets of Table S1, counted from 1; ``None`` where it is not in it.
        folders: names that the folder of a copy usually has.
        splits_are_random: train and val were drawn at random and are not published.
        counts_from: who says these numbers.
        notes: sentences about it.
    """

    name: str
    title: str
    num_classes: int
    transform: Literal["fgvc", "vtab"]
    train: int | None = None
    val: int | None = None
    test: int | None = None
    layout: str = "auto"
    benchmark: Literal["FGVC", "VTAB-1k", "large"] | None = None
    group: Literal["natural", "specialized", "structured"] | None = None
    row: int | None = None
    folders: tuple[str, ...] = ()
    splits_are_random: bool = False
    counts_from: str = "the recipe"
    notes: tuple[str, ...] = ()

    @property
    def trainval(self) -> int | None:
        """Number of images in train and val together."""
        return None if self.train is None or self.val is None else self.train + self.val


def facts_from(values: dict[str, Any], where: str) -> DatasetFacts:
    """The facts that a yaml file holds under their names.

    Raises:
        InputError: an unknown or missing key, or a value that cannot be; the message begins with ``where``.
    """
    found = checked(
        values,
        get_type_hints(DatasetFacts),
        where,
        required=("name", "title", "num_classes", "transform"),
    )
    for key in ("num_classes", "train", "val", "test", "row"):
        if found.get(key) is not None and found[key] < 1:
            raise InputError(f"{where}: {key} must be at least 1, got {found[key]}")
    if found.get("layout", "auto") not in LAYOUTS:
        raise InputError(f"{where}: layout must be one of {', '.join(LAYOUTS)}, got {found['layout']!r}")
    found |= {key: tuple(each) for key, each in found.items() if isinstance(each, list)}
    return DatasetFacts(**found)


def dataset_facts() -> dict[str, DatasetFacts]:
    """The paper's 26 data sets by name: those of Table S1 in its order, then ImageNet-1k and iNaturalist 2018.

    Example:
        >>> cub = dataset_facts()["cub200"]
        >>> cub.title, cub.num_classes, cub.train, cub.val, cub.test
        ('CUB-200-2011', 200, 5394, 600, 5794)
    """
    return dict(_all_facts())


def vtab_tasks() -> list[DatasetFacts]:
    """The 19 tasks of VTAB-1k in the order of Table S1.

    Example:
        >>> [task.name for task in vtab_tasks()][:3]
        ['caltech101', 'cifar100', 'dtd']
    """
    return [facts for facts in _all_facts().values() if facts.benchmark == "VTAB-1k"]


@cache
def _all_facts() -> dict[str, DatasetFacts]:
    folder = files("spt_fast.recipes") / "datasets"
    found = [
        facts_from({"name": file.name.removesuffix(".yaml"), **read_yaml(file)}, f"datasets/{file.name}")
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    ]
    found.sort(key=lambda facts: (facts.row is None, facts.row, facts.name))
    return {facts.name: facts for facts in found}


def explain_counts(facts: DatasetFacts, found: dict[str, tuple[int, int]]) -> list[str]:
    """Compare a copy of a data set on disk with the numbers of the paper.

    Args:
        facts: the data set that the copy should be.
        found: for each split (``"train"``, ``"val"``, ``"trainval"``, ``"test"``) that was looked at, its number of
            images and the number of classes that its reader knows: those of the whole data set, not only those of the
            images in this split.

    Returns:
        A sentence for every number of images that differs, and one for every wrong number of classes, with what
        explains it where that can be told from the numbers. Empty if all is as it should be.

    Raises:
        InputError: an unknown split, or a number that cannot be.

    Example:
        >>> found = {"train": (800, 47), "test": (1780, 47)}
        >>> explain_counts(dataset_facts()["dtd"], found)  # doctest: +NORMALIZE_WHITESPACE
        ['test has 1,780 images where Table S1 says 1,880 for DTD: 100 images (5.3%) are missing, as after an incomplete
        download or extraction']
    """
    for split, counts in found.items():
        if split not in SPLITS:
            raise InputError(f"found has the split {split!r}, expected {', '.join(SPLITS)}")
        if min(counts) < 0:
            raise InputError(f"found[{split!r}] must be two numbers of at least 0, got {counts!r}")
    others = _others_with(facts, found)
    sentences = []
    for split, (images, _) in found.items():
        expected = getattr(facts, split)
        if expected is not None and images != expected:
            why = others or _why_images(facts, found, split)
            sentences.append(
                f"{split} has {_count(images, 'image')} where {facts.counts_from} says {expected:,} for "
                f"{facts.title}: {why}"
            )
    # A reader usually knows the same classes for all splits: one wrong number is one sentence.
    wrong: dict[int, list[str]] = {}
    for split, (images, classes) in found.items():
        # So few images cannot show all classes, whoever counted.
        all_could_be_seen = images >= facts.num_classes or classes > facts.num_classes
        if classes != facts.num_classes and all_could_be_seen:
            wrong.setdefault(classes, []).append(split)
    for classes, splits in wrong.items():
        why = others or _why_classes(classes - facts.num_classes)
        has = "has" if len(splits) == 1 else "have"
        sentences.append(
            f"{' and '.join(splits)} {has} {_count(classes, 'class')} where {facts.counts_from} says "
            f"{facts.num_classes:,} for {facts.title}: {why}"
        )
    return sentences


def _others_with(facts: DatasetFacts, found: dict[str, tuple[int, int]]) -> str:
    """Which other data sets have exactly these numbers, as an explanation; empty if none has."""
    others = [
        other.title
        for other in _all_facts().values()
        if other.name != facts.name
        and all(
            tuple(counts) == (getattr(other, split), other.num_classes) for split, counts in found.items()
        )
    ]
    return f"these are the numbers of {' or '.join(others)}" if others else ""


def _why_images(facts: DatasetFacts, found: dict[str, tuple[int, int]], split: str) -> str:
    images, expected = found[split][0], getattr(facts, split)
    total = None if facts.trainval is None or facts.test is None else facts.trainval + facts.test
    both = "train" in found and "val" in found
    together = found["train"][0] + found["val"][0] if both else None
    if split in ("train", "trainval") and images == total:
        return "these are all images of the data set, those of the test split among them"
    if split == "train" and images == facts.trainval:
        return (
            f"these are train and val together, the {_count(facts.val or 0, 'validation image')} have not been "
            "split off"
        )
    if split in ("train", "val") and together is not None and together == facts.trainval:
        known = (
            "the paper's own random division is not published"
            if facts.splits_are_random
            else "the published lists divide them otherwise"
        )
        return f"train and val together are the right {together:,}, divided by another rule ({known})"
    if split in ("train", "val") and together is not None and together == total:
        return f"train and val together are all {total:,} images of the data set, those of the test split among them"
    for other in SPLITS:
        if other != split and images == getattr(facts, other):
            return f"this is the size of {other}"
    if images < expected:
        missing = expected - images
        are = "is" if missing == 1 else "are"
        return (
            f"{_count(missing, 'image')} ({missing / expected:.1%}) {are} missing, as after an incomplete download or "
            "extraction"
        )
    return f"{_count(images - expected, 'image')} too many, such as duplicates or images of another split"


def _why_classes(surplus: int) -> str:
    if surplus == 1:
        return (
            "one too many, as where labels are counted from 1 or a folder beside the classes is taken for one"
        )
    if surplus > 0:
        return f"{surplus:,} too many, as in another data set or another version of it"
    if surplus == -1:
        return "one is missing, as after an incomplete extraction or where a class for the background is left out"
    return f"{-surplus:,} are missing, as in another data set or after an incomplete download or extraction"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"
