"""What 8-bit frozen weights cost in accuracy and gain in time, on real digits with the bundled backbone.

    python -m benchmarks.low_precision

For every precision of the frozen weights: SPT-Deep is trained from the same prototypes with several seeds, and its test
accuracy is measured as trained, and again with the adapter moved to a backbone of full precision. A precision that
cannot run here is a row that says why. Times of a step at real sizes: ``benchmarks.train_step --peers low-precision``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.table import Table

import spt_fast
from benchmarks.command import console, machine, mistakes_in_one_sentence
from spt_fast.backbones import image_settings
from spt_fast.data import load_dataset, make_loader, make_transform
from spt_fast.devices import choose_device
from spt_fast.errors import InputError
from spt_fast.files import write_text
from spt_fast.low_precision import WeightDtype

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 4,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of a block.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each precision.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Write all results to this json file.")] = None,
) -> None:
    """Train and judge at every precision."""
    with mistakes_in_one_sentence():
        chosen = choose_device(device)
    record: dict[str, Any] = {
        "machine": machine(chosen),
        "epochs": epochs,
        "num_prompts": num_prompts,
        "rows": [],
    }
    for weight_dtype in (None, *get_args(WeightDtype)):
        record["rows"].append(measure(weight_dtype, epochs, num_prompts, seeds, chosen))
        if output is not None:
            write_text(output, json.dumps(record, indent=1) + "\n")
    show(record["rows"])


def measure(
    weight_dtype: WeightDtype | None, epochs: int, num_prompts: int, seeds: int, device: torch.device
) -> dict[str, Any]:
    """The row of one precision."""
    row: dict[str, Any] = {"weights": weight_dtype or "float32"}
    try:
        backbone = load(weight_dtype).to(device)
    except InputError as error:
        return row | {"missing": str(error)}
    full = load(None).to(device)
    settings = image_settings(full)
    training, test = (
        load_dataset("digits", split, transform=make_transform("vtab", train=False, **settings))
        for split in ("train", "test")
    )
    row |= {"accuracy": [], "accuracy_on_float32": [], "train_seconds": []}
    for seed in range(seeds):
        start = spt_fast.build_prototypes(full, make_loader(training), num_prompts=num_prompts, seed=seed)
        torch.manual_seed(seed)
        model = spt_fast.PromptedViT(backbone, start, num_classes=10, pool="avg")
        config = spt_fast.TrainingConfig(epochs=epochs, warmup_epochs=1, seed=seed, dtype="float32")
        with tempfile.TemporaryDirectory() as folder:
            result = spt_fast.train(model, training, output=folder, config=config)
            moved = spt_fast.load_adapter(Path(folder) / "last.safetensors", full)
        row["train_seconds"].append(result.train_seconds)
        row["accuracy"].append(spt_fast.evaluate(model, test).accuracy)
        row["accuracy_on_float32"].append(spt_fast.evaluate(moved, test).accuracy)
    return row


def load(weight_dtype: WeightDtype | None) -> Any:
    return spt_fast.load_backbone(
        "vit_tiny_patch16_224",
        checkpoint="bundled:vit_tiny_mae_cifar10",
        weight_dtype=weight_dtype,
        img_size=32,
        patch_size=4,
    )


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table: means with standard deviations."""
    table = Table(title="digits, SPT-Deep", title_justify="left")
    for header in (
        "frozen weights",
        "test accuracy",
        "its adapter on float32 weights",
        "seconds of training",
    ):
        table.add_column(header)
    for row in rows:
        if "missing" in row:
            table.add_row(row["weights"], row["missing"], "", "")
            continue
        cells = [
            f"{100 * statistics.mean(row[name]):.1f} ± {100 * statistics.pstdev(row[name]):.1f} %"
            for name in ("accuracy", "accuracy_on_float32")
        ]
        table.add_row(row["weights"], *cells, f"{statistics.median(row['train_seconds']):.1f}")
    console.print(table)


if __name__ == "__main__":
    app()
