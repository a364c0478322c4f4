"""Which splits an ablation trains, chooses learning rates and judges on; no two of them may share images."""

from __future__ import annotations

from spt_fast.data import load_dataset
from spt_fast.errors import InputError, MissingFileError

# Not a split of the data: a part of the images to train on that is then not trained on.
HELD_OUT = "held-out"


def check_splits(split: str, choose_split: str | None, test_split: str) -> None:
    """Raise unless the images to train on, to choose learning rates on and to judge on are different ones.

    Args:
        split: the images to train on.
        choose_split: those to choose on; ``None``: nothing is chosen.
        test_split: those to judge on.

    Raises:
        InputError: two of them share images.
    """
    for name, own, other_name, other, use in (
        ("test_split", test_split, "split", split, "trained"),
        ("choose_split", choose_split, "split", split, "trained"),
        ("choose_split", choose_split, "test_split", test_split, "judged"),
    ):
        if own is not None and _share_images(own, other):
            raise InputError(
                f"{name} {own!r} has images of {other_name} {other!r}, which are {use} on; the images to train on, to "
                "choose learning rates on and to judge on must be different ones"
            )


def usual_test_split(data: str, layout: str) -> str:
    """The split to judge on where none was named: test, or val if there is no test.

    Example:
        >>> usual_test_split("digits", "auto")
        'test'
    """
    try:
        load_dataset(data, "test", layout=layout)
    except (InputError, MissingFileError):
        load_dataset(data, "val", layout=layout)
        return "val"
    return "test"


def usual_choose_split(split: str, test_split: str) -> str:
    """The split to choose learning rates on where none was named: val, or held out if val has another use.

    Example:
        >>> usual_choose_split("train", "test"), usual_choose_split("trainval", "test")
        ('val', 'held-out')
    """
    return HELD_OUT if _share_images("val", split) or _share_images("val", test_split) else "val"


def _share_images(one: str, other: str) -> bool:
    return not _made_of(one).isdisjoint(_made_of(other))


def _made_of(split: str) -> set[str]:
    return {"train", "val"} if split == "trainval" else {split}
