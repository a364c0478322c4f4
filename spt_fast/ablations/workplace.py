"""What all runs of an ablation have in common, and what a process opens of it once: backbones and decoded images."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer

from spt_fast.ablations.splits import HELD_OUT, check_splits
from spt_fast.ablations.subsets import class_sizes, drawn
from spt_fast.backbones import backbone_identity, image_settings, load_backbone
from spt_fast.data import ImageDataset, cache_images, load_dataset, make_transform
from spt_fast.data.splits import stratified_split
from spt_fast.devices import choose_device
from spt_fast.errors import InputError
from spt_fast.experiment_records import described_images
from spt_fast.feeding import workers_for
from spt_fast.pooling import Pool
from spt_fast.progress import Progress
from spt_fast.tokens import Capture
from spt_fast.training_config import TrainingConfig

# The images to train on, to choose learning rates on, and to judge on.
Part = Literal["train", "choose", "test"]
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class ModelSource:
    """Arguments of :func:`spt_fast.load_backbone` as plain values that can be sent to other processes.

    Attributes:
        name: timm's name of the model.
        checkpoint: its weights.
        pretrained: let timm download them.
        kwargs: json of what else :func:`timm.create_model` is given.
        seed: of the weights, where there are none to load.
    """

    name: str
    checkpoint: str | None = None
    pretrained: bool = False
    kwargs: str = "{}"
    seed: int = 0


@dataclass(frozen=True)
class Workplace:
    """What all runs of an ablation have in common.

    Attributes:
        models: the backbones.
        data: the data sets, each a folder as :func:`spt_fast.data.load_dataset` takes it.
        output: the folder of the ablation.
        config: how to train; its learning rate and seed are those of a run.
        split: the images to train on.
        choose_split: those that learning rates are chosen on; ``"held-out"`` is a part of ``split`` that is then not
            trained on; ``None``: nothing is chosen.
        test_split: those that are judged on.
        images_per_class: at most so many training images of a class, evenly drawn; ``None``: all.
        max_test_images: at most so many images of ``test_split``, evenly drawn; ``None``: all.
        pool: what the head sees, see :class:`spt_fast.PromptedViT`.
        layout, recipe, strict: how images are read and transformed.
        capture: what counts as a layer's tokens.
        prototype_batch_size: images at a time while prototypes are built.
        device: where to work.

    Raises:
        InputError: the images to train on, to choose on and to judge on are not different ones.
    """

    models: tuple[ModelSource, ...]
    data: tuple[str, ...]
    output: Path
    config: TrainingConfig
    split: str = "train"
    choose_split: str | None = None
    test_split: str = "test"
    images_per_class: int | None = None
    max_test_images: int | None = None
    pool: Pool | None = None
    layout: str = "auto"
    recipe: str = "auto"
    strict: bool = False
    capture: Capture = "paper"
    prototype_batch_size: int = 32
    device: str = "auto"

    def __post_init__(self) -> None:
        check_splits(self.split, self.choose_split, self.test_split)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the images that are looked at."""
        return ("train", "test") if self.choose_split is None else ("train", "choose", "test")

    def record(self) -> dict[str, Any]:
        """What must be equal for another call to go on in the same folder, as json."""
        free = ("learning_rate", "seed", "num_workers", "checkpoint_minutes", "snapshot_interval")
        return {
            "models": {
                str(index): backbone_identity(open_backbone(self, index)) for index in range(len(self.models))
            },
            "data": {
                f"{index}/{part}": described_images(_images(self, part, augmented=False, data=index))
                for index in range(len(self.data))
                for part in self.parts
            },
            "config": {name: value for name, value in asdict(self.config).items() if name not in free},
            "pool": self.pool,
            "capture": self.capture,
            "prototype_batch_size": self.prototype_batch_size,
        }


@lru_cache(maxsize=1)  # several large ones would not fit onto a device
def open_backbone(workplace: Workplace, index: int = 0) -> VisionTransformer:
    """A backbone on the device, loaded once in a process."""
    source = workplace.models[index]
    torch.manual_seed(source.seed)
    backbone = load_backbone(
        source.name,
        checkpoint=source.checkpoint,
        pretrained=source.pretrained,
        **json.loads(source.kwargs),
    )
    return backbone.to(choose_device(workplace.device))


@cache  # memory maps: they cost nothing while they are not looked at
def open_images(
    workplace: Workplace, part: Part, *, augmented: bool = False, data: int = 0, backbone: int = 0
) -> ImageDataset:
    """Images decoded once for all processes, opened once in each.

    Args:
        workplace: what they are of.
        part: which of them.
        augmented: behind the transform for training, not that for looking.
        data: which data set.
        backbone: which backbone they are sized for.

    Raises:
        InputError: no such split, or a class without images to hold out.
    """
    images = _images(workplace, part, augmented=augmented, data=data, backbone=backbone)
    return cache_images(images, workplace.output / "images")


def decode_images(workplace: Workplace, progress: Progress | None) -> None:
    """Decode what is not decoded yet, so that the processes of the runs only have to open it."""
    for backbone, data, part in itertools.product(
        range(len(workplace.models)), range(len(workplace.data)), workplace.parts
    ):
        for augmented in (False, True) if part == "train" else (False,):
            images = _images(workplace, part, augmented=augmented, data=data, backbone=backbone)
            workers = workers_for(images, 32, workplace.config.num_workers, device=torch.device("cpu"))
            cache_images(images, workplace.output / "images", num_workers=workers, progress=progress)


def _images(
    workplace: Workplace, part: Part, *, augmented: bool, data: int, backbone: int = 0
) -> ImageDataset:
    """The images of a part behind their transform."""
    images = listed_images(workplace, part, data)
    recipe = images.recipe if workplace.recipe == "auto" else workplace.recipe
    settings = image_settings(open_backbone(workplace, backbone))
    return images.with_transform(make_transform(recipe, train=augmented, **settings))


@cache  # a folder of many files takes a second
def _listed(data: str, split: str, layout: str, strict: bool) -> ImageDataset:
    return load_dataset(data, split, layout=layout, strict=strict)


def listed_images(workplace: Workplace, part: Part, data: int = 0) -> ImageDataset:
    """The images of a part as they lie on the disk, with a name that says which they are; none is read.

    Raises:
        InputError: no such split, or a class without images to hold out.
        MissingFileError: no such folder.
    """
    from_training = part == "train" or (part == "choose" and workplace.choose_split == HELD_OUT)
    split = (
        workplace.split
        if from_training
        else workplace.choose_split
        if part == "choose"
        else workplace.test_split
    )
    assert split is not None
    images = _listed(workplace.data[data], split, workplace.layout, workplace.strict)
    if not from_training:
        most = workplace.max_test_images if part == "test" else None
        if most is None or most >= len(images):
            return images
        _, held = stratified_split(images.targets, most)
        return _named(images, held, f"{most} images")
    sizes = class_sizes(images)
    most = workplace.images_per_class
    kept = sizes if most is None else [min(most, size) for size in sizes]
    if workplace.choose_split == HELD_OUT and most is None:
        kept = [size - max(1, round(HELD_OUT_SHARE * size)) for size in kept]
    if part == "train":
        if kept == sizes:
            return images
        return _named(images, drawn(images, kept, seed=0), f"{most or 'most'} of each class")
    held = drawn(images, kept, seed=0, after=kept)
    left = class_sizes(images.subset(held)) if held else [0] * len(sizes)
    if not all(left) or not all(kept):
        without = next(index for index in range(len(sizes)) if not left[index] or not kept[index])
        raise InputError(
            f"{images.name} has {sizes[without]} images of {images.classes[without]}, too few to choose learning rates "
            "on some of them and to train on others; name another split to choose on, or fewer images of a class"
        )
    return _named(images, held, "held out")


def _named(images: ImageDataset, indices: list[int], words: str) -> ImageDataset:
    part = images.subset(indices)
    part.name = (
        f"{images.name}, {words}"  # decoded images of different choices must not be taken for each other
    )
    return part
