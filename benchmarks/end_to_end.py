"""From JPEG files on disk to a trained adapter: what every part of the way takes, and what images add to steps.

    python -m benchmarks.end_to_end                            # this device's sizes
    python -m benchmarks.end_to_end --device cuda --epochs 10

On a GPU as many photos as CUB-200-2011 trains on, of the usual 500 x 375 pixels, are decoded into an image cache;
k-means over all their tokens makes prototypes for every block of a ViT-B/16, whose prompts are trained a few epochs.
Next to these epochs the same steps are timed on a batch that lies on the device all the time: what the epochs take
longer is what images add, and what a run does between its steps. The photos are made before, which no time includes.

Before a time counts, the clusters have to fit images they were not made from as well as scikit-learn's do, the batches
have to show what Pillow and torchvision make of the files, and the steps have to compute what timm's own blocks give.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.ceilings import Ceilings, Limit, name_of
from benchmarks.command import (
    DeviceOption,
    MinutesOption,
    ResultsOption,
    RoundsOption,
    console,
    measuring,
    show,
)
from benchmarks.prototypes import MODELS, block_tokens, build_limit, scikit_learn
from benchmarks.prototypes import TOLERANCE as WORSE_CLUSTERS
from benchmarks.random_backbone import load_on
from benchmarks.record import RESULTS, Record, Row
from benchmarks.summary import middle
from benchmarks.timing import synchronized_seconds, take_turns
from benchmarks.train_step import TOLERANCE as OTHER_STEP
from benchmarks.train_step import step_limit, step_operations
from benchmarks.train_step_ways import CLASSES, OURS, OURS_COMPILED, Task, expected_outcome, prepare
from spt_fast import (
    PromptedViT,
    Prototypes,
    TrainingConfig,
    TrainingResult,
    build_prototypes,
    train,
)
from spt_fast.backbones import image_settings
from spt_fast.data import CachedImages, ImageDataset, cache_images, load_dataset, make_loader, make_transform
from spt_fast.devices import choose_device
from spt_fast.errors import InputError
from spt_fast.feeding import ImageFeed, workers_for
from spt_fast.kernels import kmeans_step
from spt_fast.replayed_call import ReplayedCall
from spt_fast.run_folder import RunFolder
from spt_fast.training import training_dtype
from spt_fast.training_run import TrainingRun

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

QUALITY = 90
# By how much an entry of a normalised batch may differ: about half a grey level.
OTHER_IMAGES = 0.01
MOST_WORKERS = 16
PAPER_EPOCHS = 100
Batch = tuple[Tensor, Tensor]
TRAINING, ALONE = "spt-fast, images from the cache", "the same steps, one batch on the device"


@dataclass(frozen=True)
class Sizes:
    """How much there is to do; the fields are the options of the same names."""

    images: int
    classes: int
    height: int
    width: int
    batch_size: int
    epochs: int
    num_prompts: int = 20


SIZES = {
    "cpu": Sizes(images=320, classes=10, height=94, width=125, batch_size=32, epochs=3),
    "cuda": Sizes(images=5394, classes=200, height=375, width=500, batch_size=64, epochs=5),
}


@app.command()
def main(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="A timm ViT with random weights, instead of the device's own.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=2, help="Photos.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Class folders that they are in.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Of a photo, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Of a photo, in pixels.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Images.")] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Prompts of a block.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=2, help="Passes over the photos; the first is not counted.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Train through torch.compile; default: on a GPU."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that decode; default: one for each core, up to 16.")
    ] = None,
    device: DeviceOption = "auto",
    rounds: RoundsOption = 3,
    minutes: MinutesOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """From JPEG files to a trained adapter, and what images add to the steps of training."""
    given = {
        "images": images,
        "classes": classes,
        "height": height,
        "width": width,
        "batch_size": batch_size,
        "num_prompts": num_prompts,
        "epochs": epochs,
    }
    with (
        measuring("end_to_end", context, device, results, minutes, rounds=rounds) as (record, ceilings),
        tempfile.TemporaryDirectory() as folder,
    ):
        chosen = choose_device(device)
        sizes = replace(
            SIZES[chosen.type], **{name: each for name, each in given.items() if each is not None}
        )
        if sizes.images < sizes.classes:
            raise InputError(f"--images must be --classes={sizes.classes} or more, got {sizes.images}")
        name, arguments, _ = MODELS[chosen.type]
        if model is not None:
            name, arguments = model, {}
        compiled = chosen.type == "cuda" if compile is None else compile
        record.content["settings"]["compile"] = compiled
        torch.manual_seed(0)
        setup = Setup(
            name,
            load_on(chosen, name, **arguments),
            sizes,
            Path(folder),
            workers or min(MOST_WORKERS, os.cpu_count() or 1),
            TrainingConfig(
                epochs=sizes.epochs,
                warmup_epochs=1,
                batch_size=sizes.batch_size,
                # Small: what a step takes does not depend on it, and random backbones are never thrown off by it.
                learning_rate=1e-3,
                compile=compiled,
            ),
        )
        if record.may_begin():
            write_photos(setup.photos, sizes, setup.workers)
            measure(record, ceilings, setup, rounds)


@dataclass(frozen=True)
class Setup:
    """Everything that is the same from the files to the adapter.

    Attributes:
        model: timm's name of the backbone.
        backbone: it, in float32 on the device.
        sizes: how much there is to do.
        folder: where files go.
        workers: processes that decode.
        config: how to train.
    """

    model: str
    backbone: Any
    sizes: Sizes
    folder: Path
    workers: int
    config: TrainingConfig

    @property
    def device(self) -> torch.device:
        return next(iter(self.backbone.parameters())).device

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen weights and activations."""
        return training_dtype(self.config.dtype, self.device)

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    def case(self, part: str, **more: Any) -> Row:
        """The case of a part of the setup."""
        sizes = self.sizes
        return {
            "pass": part,
            "model": self.model,
            "images": sizes.images,
            "height": sizes.height,
            "width": sizes.width,
            "batch_size": sizes.batch_size,
            "num_prompts": sizes.num_prompts,
            **more,
        }

    def data(self, *, train: bool) -> ImageDataset:
        """All photos as they are trained on, or as prototypes are made from them."""
        transform = make_transform("fgvc", train=train, **image_settings(self.backbone))
        return load_dataset(self.photos, "trainval", layout="folder", transform=transform)

    def cached(self, *, train: bool) -> CachedImages:
        """The same, decoded into files."""
        return cache_images(self.data(train=train), self.folder / "cache", num_workers=self.workers)

    def prompted(self, prototypes: Prototypes) -> PromptedViT:
        torch.manual_seed(0)
        return PromptedViT(self.backbone, prototypes, num_classes=self.sizes.classes)


def measure(record: Record, ceilings: Ceilings, setup: Setup, rounds: int) -> None:
    """Go the way part by part, as far as there is time, and add the rows of each."""
    prototypes, before = measure_prototypes(record, ceilings, setup)
    if prototypes is None or not record.may_begin():
        return
    made: list[CachedImages] = []
    before += synchronized_seconds(setup.device, lambda: made.append(setup.cached(train=True)))
    batch = first_batch(setup, made[0])
    trained = measure_training(record, ceilings, setup, prototypes, made[0], batch)
    if trained is None:
        return
    add_whole(record, setup, before, trained)
    record.save()
    show("from files to an adapter", record.rows[-2:])
    if record.may_begin():
        measure_steps(record, ceilings, setup, prototypes, batch, rounds)


def measure_prototypes(record: Record, ceilings: Ceilings, setup: Setup) -> tuple[Prototypes | None, float]:
    """Decode and cluster; the prototypes, if they are good ones, and the seconds."""
    backbone = copy.deepcopy(setup.backbone).to(setup.dtype)
    made: dict[str, Any] = {}

    def decode() -> None:
        made["images"] = setup.cached(train=False)

    def cluster() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lloyd still moving a little after its 300 passes
            made["prototypes"] = build_prototypes(
                backbone, batches_of(setup, made["images"]), num_prompts=setup.sizes.num_prompts
            )

    decoding, clustering = (synchronized_seconds(setup.device, work) for work in (decode, cluster))
    prototypes: Prototypes = made["prototypes"]
    case, peer = setup.case("prototypes"), "spt-fast, decoding and k-means"
    objection = objection_to_clusters(setup, backbone, prototypes)
    if objection is not None:
        record.missing(case, peer, objection)
        return None, 0.0
    record.measured(
        case,
        peer,
        [decoding + clustering],
        limit=build_limit(ceilings, backbone, setup.sizes.images, setup.dtype),
        decoding_seconds=decoding,
        clustering_seconds=clustering,
        tokens_kept=prototypes.metadata["tokens_kept"],
    )
    record.save()
    show(
        f"prototypes from {setup.sizes.images:,} JPEG files",
        record.rows[-1:],
        extras={
            "decoding": lambda row: f"{row['decoding_seconds']:.2f} s",
            "k-means": lambda row: f"{row['clustering_seconds']:.2f} s",
        },
    )
    return prototypes, decoding + clustering


def batches_of(setup: Setup, images: ImageDataset) -> Any:
    """As the command line reads images for prototypes."""
    return make_loader(
        images,
        batch_size=setup.sizes.batch_size,
        shuffle=True,
        num_workers=workers_for(images, setup.sizes.batch_size, device=setup.device),
        pin_memory=setup.device.type == "cuda",
    )


def objection_to_clusters(setup: Setup, backbone: Any, prototypes: Prototypes) -> str | None:
    """Why prototypes are too bad to be timed: scikit-learn's, from one half of a batch, fit the other half better."""
    images, _ = next(
        iter(make_loader(setup.data(train=False), batch_size=setup.sizes.batch_size, shuffle=True))
    )
    seen, held_out = (block_tokens(backbone, [half]) for half in images.to(setup.device).chunk(2))
    theirs = scikit_learn(seen, setup.sizes.num_prompts)
    ours, best = (
        float(kmeans_step(held_out, centers.to(setup.device)).inertia.sum())
        for centers in (prototypes.values, theirs)
    )
    if ours / best - 1 < WORSE_CLUSTERS["kmeans"]:
        return None
    return f"prototypes fit the tokens worse than scikit-learn's: inertia {ours / best - 1:+.0%}"


def measure_training(
    record: Record,
    ceilings: Ceilings,
    setup: Setup,
    prototypes: Prototypes,
    images: CachedImages,
    batch: Batch,
) -> TrainingResult | None:
    """Train, unless the images are not the right ones; the first epoch, in which code is compiled, is no sample."""
    case = setup.case("training epoch")
    objection = objection_to_batch(setup, batch)
    if objection is not None:
        record.missing(case, TRAINING, objection)
        return None
    trained = train(setup.prompted(prototypes), images, output=setup.folder / "run", config=setup.config)
    torch._dynamo.reset()
    if trained.skipped:
        record.missing(case, TRAINING, f"passed over {trained.skipped} images")
        return None
    ends = [row["seconds"] for row in trained.metrics]
    record.measured(
        case,
        TRAINING,
        [end - begin for begin, end in pairwise(ends)],
        limit=epoch_limit(ceilings, setup),
        data_wait=trained.data_wait,
        first_epoch_seconds=ends[0],
        compile_seconds=trained.compile_seconds,
    )
    return trained


def first_batch(setup: Setup, images: CachedImages) -> Batch:
    """What training sees first."""
    batch: Batch = next(ImageFeed(images, setup.device).batches(**first_epoch(setup)))
    return batch


def first_epoch(setup: Setup) -> dict[str, Any]:
    """The order of its images."""
    return {"batch_size": setup.sizes.batch_size, "shuffle": True, "seed": 0, "epoch": 0}


def objection_to_batch(setup: Setup, batch: Batch) -> str | None:
    """Why the first batch is not what Pillow and torchvision make of the files, or ``None``."""
    images, labels = batch
    expected, expected_labels = next(iter(make_loader(setup.data(train=True), **first_epoch(setup))))
    if images.shape != expected.shape or not torch.equal(labels.cpu(), expected_labels):
        return "feeds other images"
    off = float((images.cpu() - expected).abs().max())
    return None if off < OTHER_IMAGES else f"feeds other pixels: off by up to {off:.2g}"


def add_whole(record: Record, setup: Setup, before: float, trained: TrainingResult) -> None:
    """Add what the whole way took, and what it would take with as many epochs as the paper trains for.

    Args:
        record: where to.
        setup: the way.
        before: seconds of everything before the first step.
        trained: the rest.
    """
    ends = [row["seconds"] for row in trained.metrics]
    record.measured(setup.case("all", epochs=len(ends)), "spt-fast", [before + ends[-1]])
    each = (ends[-1] - ends[0]) / (len(ends) - 1)
    record.extrapolated(
        setup.case("all", epochs=PAPER_EPOCHS),
        "spt-fast",
        before + ends[0] + (PAPER_EPOCHS - 1) * each,
        "all that is done once, and every epoch like those after the first",
        [(epoch, before + end) for epoch, end in enumerate(ends, start=1)],
    )


def measure_steps(
    record: Record, ceilings: Ceilings, setup: Setup, prototypes: Prototypes, batch: Batch, rounds: int
) -> None:
    """Time an epoch's steps without its images, and the step that ``benchmarks.train_step`` times."""
    images, labels = batch
    model = setup.prompted(prototypes)
    task = Task(setup.backbone, model.prompts.detach().clone(), copy.deepcopy(model.head), images, labels)
    run = TrainingRun(
        model, setup.data(train=True), RunFolder(setup.folder / "unused", writes=False), setup.config, {}
    )
    model.cast_backbone(setup.dtype).train()
    case = setup.case("training epoch")
    objection = objection_to_loss(run, task)
    if objection is not None:
        record.missing(case, ALONE, objection)
    else:
        for _ in range(ReplayedCall.WARM_UP):
            run.take_step(images, labels)

        def epoch() -> None:
            for size in batch_sizes(setup.sizes.images, setup.sizes.batch_size):
                run.take_step(images[:size], labels[:size])

        seconds = [synchronized_seconds(setup.device, epoch) for _ in range(rounds)]
        record.measured(case, ALONE, seconds, limit=epoch_limit(ceilings, setup))
    record.save()
    show_epochs(setup, [row for row in record.rows if row["case"] == case])
    torch._dynamo.reset()
    if record.may_begin():
        measure_plain_step(record, ceilings, setup, task, rounds)


def show_epochs(setup: Setup, rows: list[Row]) -> None:
    """Print the epochs with and without their images, and what the images add."""
    images = setup.sizes.images
    extras: dict[str, Any] = {
        "images/s": lambda row: f"{images / middle(row):,.0f}",
        "waiting": lambda row: f"{row['data_wait']:.1%}",
    }
    show(f"an epoch of {images:,} images", rows, against=ALONE, extras=extras)
    measured = [middle(row) for row in rows if row["kind"] == "measured"]
    if len(measured) == 2:
        console.print(f"what the images add to the steps: {measured[0] / measured[1] - 1:+.1%}")


def epoch_limit(ceilings: Ceilings, setup: Setup) -> Limit:
    """The least time for the steps of an epoch; see :func:`benchmarks.train_step.step_limit`."""
    images, backbone = setup.sizes.images, setup.backbone
    steps = sum(1 for _ in batch_sizes(images, setup.sizes.batch_size))
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    return ceilings.limit(
        moved_bytes=2 * steps * weights * setup.dtype.itemsize,
        operations=step_operations(backbone, images, setup.sizes.num_prompts),
        dtype=name_of(setup.dtype),
    )


def objection_to_loss(run: TrainingRun, task: Task) -> str | None:
    """Why the first loss of a run's own step is not that of timm's blocks in float32, or ``None``."""
    logits, _ = expected_outcome(task, prompted=True)
    expected = F.cross_entropy(logits, task.labels).item()
    run.take_step(task.images, task.labels)
    loss, _, images = run.take_step.totals.tolist()
    off = abs(loss / images - expected) / expected
    return None if off < OTHER_STEP[None] else f"computes something else: its loss is off by {off:.0%}"


def measure_plain_step(record: Record, ceilings: Ceilings, setup: Setup, task: Task, rounds: int) -> None:
    """Add the training step as ``benchmarks.train_step`` takes it: no schedule, no sums, no graph."""
    # Its head has a number of classes of its own; labels only have to be among them.
    head = nn.Linear(task.backbone.embed_dim, CLASSES, device=setup.device)
    task = replace(task, head=head, labels=task.labels % CLASSES)
    own = replace(OURS_COMPILED if setup.config.compile else OURS, weights=setup.dtype)
    case = {
        "model": setup.model,
        "batch_size": setup.sizes.batch_size,
        "num_prompts": setup.sizes.num_prompts,
        "images": setup.sizes.images,
        "pass": "training step",
    }
    expected = expected_outcome(task, prompted=True)
    step = prepare(own, task, "default")
    error = max(
        ((ours - theirs).norm() / theirs.norm()).item()
        for ours, theirs in zip(step.outcome, expected, strict=True)
    )
    if not error < OTHER_STEP[None]:
        record.missing(case, own.name, f"computes something else: relative error {error:.2g}")
    else:
        samples = take_turns(setup.device, {own.name: lambda number: step.take()}, max(rounds, 5))
        record.measured(
            case,
            own.name,
            samples[own.name],
            limit=step_limit(ceilings, task, own),
            relative_error=error,
        )
    record.save()
    rates = {"images/s": lambda row: f"{setup.sizes.batch_size / middle(row):,.0f}"}
    show("the step of benchmarks.train_step", record.rows[-1:], against=own.name, extras=rates)


def batch_sizes(images: int, batch_size: int) -> Iterator[int]:
    """Of an epoch's batches, the last of which may be smaller.

    Example:
        >>> list(batch_sizes(10, 4))
        [4, 4, 2]
    """
    return (min(batch_size, images - start) for start in range(0, images, batch_size))


def write_photos(folder: Path, sizes: Sizes, workers: int) -> None:
    """JPEG files ``<class>/<number>.jpg``, always the same ones, made by several processes."""
    photos = _Photos(folder, sizes)
    for label in range(sizes.classes):
        (folder / f"{label:04d}").mkdir(parents=True)
    for _ in DataLoader(photos, batch_size=None, num_workers=min(workers, sizes.images)):
        pass


class _Photos(Dataset):
    """Getting an item writes a photo."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self._folder = folder
        self._sizes = sizes

    def __len__(self) -> int:
        return self._sizes.images

    def __getitem__(self, index: int) -> int:
        label = index % self._sizes.classes
        pixels = photo(index, label, self._sizes.height, self._sizes.width)
        Image.fromarray(pixels.numpy()).save(
            self._folder / f"{label:04d}" / f"{index:06d}.jpg", quality=QUALITY
        )
        return index


def photo(index: int, label: int, height: int, width: int) -> Tensor:
    """uint8 ``[height, width, 3]``: the colours of its class, smooth noise of its own, and some grain.

    Example:
        >>> photo(3, 1, 20, 30).shape, torch.equal(photo(3, 1, 20, 30), photo(4, 1, 20, 30))
        (torch.Size([20, 30, 3]), False)
    """
    common, own = torch.Generator().manual_seed(label), torch.Generator().manual_seed((1 << 32) + index)
    levels = torch.full((1, 3, height, width), 128.0)
    for generator, cells, contrast in ((common, 4, 50.0), (own, 4, 30.0), (own, 16, 30.0), (own, 64, 15.0)):
        coarse = torch.randn(1, 3, cells, cells, generator=generator) * contrast
        levels += F.interpolate(coarse, (height, width), mode="bilinear")
    levels += 4 * torch.randn(levels.shape, generator=own)
    return levels[0].clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()


if __name__ == "__main__":
    app()
