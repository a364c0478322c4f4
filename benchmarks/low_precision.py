"""What 8-bit frozen weights cost in accuracy and gain in time, on real digits with the bundled backbone.

    python -m benchmarks.low_precision

For every precision of the frozen weights: SPT-Deep is trained from the same prototypes with several seeds, and its test
accuracy is measured as trained, and again with the adapter moved to a backbone of full precision. A precision that
cannot run here is a row that says why. Times of a step at real sizes: ``benchmarks.train_step --peers low-precision``.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer

import spt_fast
from benchmarks.command import DeviceOption, MinutesOption, ResultsOption, measuring, show
from benchmarks.record import RESULTS, Row
from spt_fast.backbones import image_settings
from spt_fast.data import load_dataset, make_loader, make_transform
from spt_fast.devices import choose_device
from spt_fast.errors import InputError
from spt_fast.low_precision import WeightDtype

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _percent(name: str) -> Any:
    return lambda row: f"{100 * statistics.mean(row[name]):.1f} ± {100 * statistics.pstdev(row[name]):.1f} %"


EXTRAS = {"accuracy": _percent("accuracy"), "its adapter on float32 weights": _percent("accuracy_on_float32")}


@app.command()
def main(
    context: typer.Context,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 4,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of a block.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each precision.")] = 3,
    device: DeviceOption = "auto",
    minutes: MinutesOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Accuracy and time of training with 8-bit frozen weights."""
    with measuring("low_precision", context, device, results, minutes) as (record, _):
        chosen = choose_device(device)
        case = {"data": "digits", "epochs": epochs, "num_prompts": num_prompts}
        choices: tuple[WeightDtype | None, ...] = (None, *get_args(WeightDtype))
        for weight_dtype in choices:
            if not record.may_begin():
                return
            name = weight_dtype or "float32"
            try:
                facts = measure(weight_dtype, epochs, num_prompts, seeds, chosen)
            except InputError as error:
                record.missing(case, name, str(error))
            else:
                record.measured(case, name, facts.pop("seconds"), **facts)
            record.save()
        show("SPT-Deep on digits", record.rows, against="float32", extras=EXTRAS)


def measure(
    weight_dtype: WeightDtype | None, epochs: int, num_prompts: int, seeds: int, device: torch.device
) -> Row:
    """Seconds and accuracies of one precision, for every seed.

    Raises:
        InputError: it cannot run here.
    """
    backbone = load(weight_dtype).to(device)
    full = load(None).to(device)
    settings = image_settings(full)
    training, test = (
        load_dataset("digits", split, transform=make_transform("vtab", train=False, **settings))
        for split in ("train", "test")
    )
    facts: Row = {"seconds": [], "accuracy": [], "accuracy_on_float32": []}
    for seed in range(seeds):
        start = spt_fast.build_prototypes(full, make_loader(training), num_prompts=num_prompts, seed=seed)
        torch.manual_seed(seed)
        model = spt_fast.PromptedViT(backbone, start, num_classes=10, pool="avg")
        config = spt_fast.TrainingConfig(epochs=epochs, warmup_epochs=1, seed=seed, dtype="float32")
        with tempfile.TemporaryDirectory() as folder:
            result = spt_fast.train(model, training, output=folder, config=config)
            moved = spt_fast.load_adapter(Path(folder) / "last.safetensors", full)
        facts["seconds"].append(result.train_seconds)
        facts["accuracy"].append(spt_fast.evaluate(model, test).accuracy)
        facts["accuracy_on_float32"].append(spt_fast.evaluate(moved, test).accuracy)
    return facts


def load(weight_dtype: WeightDtype | None) -> Any:
    return spt_fast.load_backbone(
        "vit_tiny_patch16_224",
        checkpoint="bundled:vit_tiny_mae_cifar10",
        weight_dtype=weight_dtype,
        img_size=32,
        patch_size=4,
    )


if __name__ == "__main__":
    app()
