"""Accuracy against seconds: what each start of deep prompts has reached by when, prototypes included.

    python -m benchmarks.accuracy_speed                        # scikit-learn's digits
    python -m benchmarks.accuracy_speed --data photos          # photos/train/<class>/*.jpg, photos/val/<class>/*.jpg
    python -m benchmarks.accuracy_speed --data cifar10/train.zip --test-data cifar10/val.zip --epochs 10

Runs differ in the start and the seed alone: same model, images and base learning rate. After every epoch the model is
judged on images it does not train on; that takes all of them equally long and is part of the seconds. VPT's uniform
start costs nothing to make. ``benchmarks.compare_starts`` gives each start a learning rate of its own.
"""

from __future__ import annotations

import statistics
import tempfile
import warnings
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import spt_fast
from benchmarks.command import DeviceOption, MinutesOption, ResultsOption, measuring, show
from benchmarks.image_sets import training_and_test
from benchmarks.record import RESULTS, Record, Row
from spt_fast.building import Method
from spt_fast.data import ImageDataset, make_loader
from spt_fast.devices import choose_device
from spt_fast.errors import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

STARTS: dict[Method, str] = {
    "kmeans": "SPT-Deep, k-means",
    "minibatch_kmeans": "SPT-Deep, mini-batch k-means",
    "mean_pool": "SPT-Deep, mean pooling",
    "max_pool": "SPT-Deep, max pooling",
    "random_sample": "SPT-Deep, random sample",
    "uniform": "VPT-Deep, uniform",
}
BACKBONE: dict[str, Any] = {"checkpoint": "bundled:vit_tiny_mae_cifar10", "img_size": 32, "patch_size": 4}
EXTRAS = {
    "prototypes": lambda row: f"{statistics.median(curve[0][0] for curve in row['curves']):.2f} s",
    "accuracy": lambda row: f"{statistics.mean(row['test_accuracy']):.1%}",
}


@app.command()
def main(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(help="digits, a folder of splits, or with --test-data an ImageFolder or a zip of one."),
    ] = "digits",
    test_data: Annotated[
        str | None, typer.Option(help="ImageFolder or zip to judge on, if --data has no splits.")
    ] = None,
    images_per_class: Annotated[
        int, typer.Option(min=1, help="Training images of a class, and at most as many test images.")
    ] = 100,
    start: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(STARTS)}; may be repeated. All if not given.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of a block.")] = 20,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each start.")] = 1,
    device: DeviceOption = "auto",
    minutes: MinutesOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Accuracy against seconds for every start of deep prompts, on real images."""
    config = spt_fast.TrainingConfig(epochs=epochs, warmup_epochs=max(1, epochs // 10))
    settings = {"batch_size": config.batch_size, "learning_rate": config.learning_rate, "seeds": seeds}
    with measuring("accuracy_speed", context, device, results, minutes, **settings) as (record, _):
        wanted = [name for name in STARTS if not start or name in start]
        unknown = set(start or []) - set(wanted)
        if unknown:
            raise InputError(f"--start must be one of {', '.join(STARTS)}, got {', '.join(sorted(unknown))}")
        backbone = spt_fast.load_backbone("vit_tiny_patch16_224", **BACKBONE).to(choose_device(device))
        training, test = training_and_test(data, test_data, backbone, images_per_class)
        case = {
            "data": Path(data).parent.name or data if data.endswith(".zip") else Path(data).name,
            "images": len(training),
            "num_prompts": num_prompts,
            "epochs": epochs,
        }
        curves: dict[Method, list[list[list[float]]]] = {name: [] for name in wanted}
        for seed, name in product(range(seeds), wanted):
            if not record.may_begin():
                break
            curves[name].append(curve(name, backbone, training, test, num_prompts, config, seed))
            record.rows.clear()
            for each, found in curves.items():
                if found:
                    add(record, case, STARTS[each], found, len(training.classes))
            record.save()
        title = f"{case['data']}, {len(training)} images, {epochs} epochs, P={num_prompts}"
        show(title, record.rows, against=STARTS[wanted[0]], extras=EXTRAS)


def curve(
    method: Method,
    backbone: Any,
    training: ImageDataset,
    test: ImageDataset,
    num_prompts: int,
    config: spt_fast.TrainingConfig,
    seed: int,
) -> list[list[float]]:
    """Seconds and accuracy: with the prototypes, before any step, and after every epoch."""
    loader = make_loader(training, shuffle=True, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lloyd still moving a little after its 300 passes
        start = spt_fast.build_prototypes(backbone, loader, num_prompts=num_prompts, method=method, seed=seed)
    spent = start.metadata["seconds"]
    torch.manual_seed(seed)
    model = spt_fast.PromptedViT(backbone, start, num_classes=len(training.classes), pool="avg")
    before = spt_fast.evaluate(model, test).accuracy
    with tempfile.TemporaryDirectory() as folder:
        own = spt_fast.TrainingConfig(**{**vars(config), "seed": seed})
        trained = spt_fast.train(model, training, test, output=folder, config=own)
    reached = [[spent + row["seconds"], row["val_accuracy"]] for row in trained.metrics]
    return [[spent, before], *reached]


def add(record: Record, case: Row, peer: str, curves: list[list[list[float]]], classes: int) -> None:
    """Add the row of a start; one that learned nothing has no time to compare."""
    accuracy = [each[-1][1] for each in curves]
    # Half-way between guessing and knowing would be a high bar after few epochs; twice as good as guessing is not.
    if min(accuracy) < 2 / classes:
        record.missing(case, peer, f"did not learn: accuracy {min(accuracy):.1%} with {classes} classes")
    else:
        seconds = [each[-1][0] for each in curves]
        record.measured(case, peer, seconds, curves=curves, test_accuracy=accuracy)


if __name__ == "__main__":
    app()
