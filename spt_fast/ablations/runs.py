"""One run of an ablation: what it starts from, how it is trained and judged, and what is kept of it."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from spt_fast.ablations.subsets import Subset, class_sizes, subset
from spt_fast.ablations.variants import Variant, digest, exact
from spt_fast.ablations.workplace import Part, Workplace, open_backbone, open_images
from spt_fast.adapters import Adapter
from spt_fast.analysis import effective_clusters, layer_mutual_information
from spt_fast.data import ImageDataset, make_loader
from spt_fast.errors import DivergedError
from spt_fast.files import write_text
from spt_fast.kept_prototypes import kept_prototypes
from spt_fast.methods import METHODS, build_model
from spt_fast.per_class import confusion_matrix, per_class_accuracy
from spt_fast.pooling import Pool
from spt_fast.prototypes import Prototypes
from spt_fast.sweep_folder import read_json
from spt_fast.training import train


@dataclass(frozen=True)
class Start:
    """Prototypes that runs start from, for several numbers of prompts.

    Attributes:
        settings: json of how they are built and from which images.
        lengths: the numbers of prompts.
    """

    settings: str
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of their files."""
        settings = json.loads(self.settings)
        return f"{settings['method']}-{digest(settings)}"


@dataclass(frozen=True)
class Run:
    """A variant with a learning rate and a seed, judged on one part of the images.

    Attributes:
        variant: what is trained.
        learning_rate: base rate.
        seed: everything random follows from it: the part of the training images, prototypes, head, order.
        part: the images it is judged on.
    """

    variant: Variant
    learning_rate: float
    seed: int
    part: Part

    def folder(self, workplace: Workplace) -> Path:
        """Where it is kept."""
        name = f"lr={exact(self.learning_rate)},seed={self.seed},{self.part}"
        return workplace.output / "runs" / self.variant.name / name

    def outcome(self, workplace: Workplace) -> dict[str, Any] | None:
        """What :func:`execute` found; ``None`` if the run is not over."""
        found: dict[str, Any] | None = read_json(self.folder(workplace) / "outcome.json")
        return found

    @property
    def start(self) -> Start | None:
        """What its prompts start from; ``None`` where the method needs no prototypes."""
        variant = self.variant
        if variant.init is None:
            return None
        assert variant.num_prompts is not None
        settings = {
            "method": variant.init,
            "depth": METHODS[variant.method].depth,
            "layers": variant.layers,
            "data_fraction": variant.data_fraction,
            "seed": self.seed,
            "data": variant.start_data,
            "backbone": variant.backbone,
            "subset": None if variant.subset is None else asdict(variant.subset),
        }
        return Start(json.dumps(settings), (variant.num_prompts,))


def build_start(workplace: Workplace, start: Start) -> dict[int, Prototypes]:
    """The prototypes of a start, by number of prompts: read, or built and kept."""
    settings = json.loads(start.settings)
    data, backbone, chosen = (settings.pop(name) for name in ("data", "backbone", "subset"))

    def images() -> ImageDataset:
        return _training_images(workplace, data, backbone, chosen, settings["seed"], augmented=False)

    return kept_prototypes(
        open_backbone(workplace, backbone),
        images,
        start.lengths,
        folder=workplace.output / "prototypes",
        name=start.name,
        start={**settings, "capture": workplace.capture},
        batch_size=workplace.prototype_batch_size,
        num_workers=workplace.config.num_workers,
    )


def execute(workplace: Workplace, run: Run) -> dict[str, Any]:
    """Train and judge, going on where an earlier call was interrupted.

    Returns:
        The outcome, also written to ``outcome.json`` in the folder of the run: ``accuracy`` (0 to 1), ``per_class``
        (of each class, ``None`` for one without images), ``mean_per_class``, ``head``, ``medium`` and ``tail`` (mean
        accuracy of the thirds of the classes, in their order), ``train_images``, ``largest_class`` and
        ``smallest_class`` (their training images), ``judged_images``, ``train_seconds``, ``trainable_parameters``,
        ``prototype_seconds`` and, where prototypes were clustered, ``clusters_by_block`` and ``effective_clusters``
        (their mean); with ``snapshots`` also ``nmi_by_block`` (for each epoch from the start on), ``nmi_by_epoch``
        (mean over blocks), ``nmi_first`` and ``nmi_last``. A run that did not stay finite has only ``failure``.
    """
    variant, folder = run.variant, run.folder(workplace)
    backbone = open_backbone(workplace, variant.backbone)
    chosen = None if variant.subset is None else asdict(variant.subset)
    images = _training_images(workplace, variant.data, variant.backbone, chosen, run.seed, augmented=True)
    outcome: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    if run.start is not None:
        (prototypes,) = build_start(workplace, run.start).values()
        arguments["prompts"] = prototypes
        outcome |= _facts_of(prototypes)
    elif variant.num_prompts is not None:
        arguments["num_prompts"] = variant.num_prompts
    torch.manual_seed(run.seed)
    model = build_model(
        variant.method,
        backbone,
        num_classes=len(images.classes),
        pool=_pool(workplace, variant),
        **arguments,
        **variant.options,
    )
    config = replace(
        workplace.config,
        learning_rate=run.learning_rate,
        seed=run.seed,
        snapshot_interval=1 if variant.snapshots else None,
    )
    try:
        trained = train(model, images, output=folder, config=config, resume=True)
    except DivergedError as error:
        return _kept(folder, {"failure": str(error)})
    judged = open_images(workplace, run.part, data=variant.data, backbone=variant.backbone)
    confusion = confusion_matrix(model, judged, num_workers=workplace.config.num_workers)
    by_class = per_class_accuracy(confusion)
    thirds = dict(zip(("head", "medium", "tail"), _thirds(by_class), strict=True))
    outcome |= {
        "accuracy": confusion.trace().item() / confusion.sum().item(),
        "per_class": by_class,
        "mean_per_class": _mean(by_class),
        **thirds,
        "train_images": len(images),
        "largest_class": max(class_sizes(images)),
        "smallest_class": min(class_sizes(images)),
        "judged_images": int(confusion.sum()),
        "train_seconds": trained.train_seconds,
        "trainable_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
    }
    if variant.snapshots:
        looked_at = _training_images(
            workplace, variant.data, variant.backbone, chosen, run.seed, augmented=False
        )
        outcome |= _mutual_information(folder, backbone, looked_at, workplace)
    return _kept(folder, outcome)


def _mutual_information(
    folder: Path, backbone: VisionTransformer, images: ImageDataset, workplace: Workplace
) -> dict[str, Any]:
    """NMI (Eq. 8) of the prompts of every epoch, from the start on, all from one pass over the images."""
    snapshots = sorted((folder / "snapshots").glob("epoch-*.safetensors"))
    adapters = {file.stem: Adapter.load(file).prompts for file in snapshots}
    sets = {name: prompts for name, prompts in adapters.items() if prompts is not None}
    loader = make_loader(images, batch_size=workplace.prototype_batch_size)
    by_block = [values.tolist() for values in layer_mutual_information(sets, backbone, loader).values()]
    by_epoch = [statistics.fmean(values) for values in by_block]
    return {
        "nmi_by_block": by_block,
        "nmi_by_epoch": by_epoch,
        "nmi_first": by_epoch[0],
        "nmi_last": by_epoch[-1],
    }


def _pool(workplace: Workplace, variant: Variant) -> Pool | None:
    """Without prompts the mean of all tokens but the class token is that of the image's own."""
    has_prompts = METHODS[variant.method].model.takes_prompts
    return "avg" if workplace.pool == "avg_with_prompts" and not has_prompts else workplace.pool


def _training_images(
    workplace: Workplace,
    data: int,
    backbone: int,
    chosen: dict[str, Any] | None,
    seed: int,
    *,
    augmented: bool,
) -> ImageDataset:
    images = open_images(workplace, "train", augmented=augmented, data=data, backbone=backbone)
    return images if chosen is None else subset(images, Subset(**chosen), seed=seed)


def _facts_of(prototypes: Prototypes) -> dict[str, Any]:
    facts: dict[str, Any] = {"prototype_seconds": prototypes.metadata["seconds"]}
    if prototypes.counts is not None:
        by_block = effective_clusters(prototypes.counts).tolist()
        facts |= {"clusters_by_block": by_block, "effective_clusters": statistics.fmean(by_block)}
    return facts


def _thirds(by_class: list[float | None]) -> list[float | None]:
    """The mean of the first, the second and the last third of the classes; the middle one takes what is left over."""
    third = max(1, len(by_class) // 3)
    return [_mean(by_class[:third]), _mean(by_class[third:-third]), _mean(by_class[-third:])]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _kept(folder: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    write_text(folder / "outcome.json", json.dumps(outcome, indent=1) + "\n")
    # The run is over: what it would have been resumed from is the largest of its files.
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return outcome
