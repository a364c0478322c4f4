"""Compare starts of deep prompts, and rules for their learning rate, on real images with the bundled backbone.

Three disjoint sets of images: every run trains on the first, its base learning rate is chosen on the second, and only
the chosen runs are judged on the third. Runs differ in the start, the learning rate and the seed alone.

    python -m benchmarks.compare_starts --data digits --output benchmarks/results/starts-digits.json
    python -m benchmarks.compare_starts --data cifar10/train.zip --test-data cifar10/val.zip --output ...

A finished run is never done twice: the command goes on with whatever is missing from its output file.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import spt_fast
from benchmarks.command import console, mistakes_in_one_sentence
from benchmarks.image_sets import image_sets
from benchmarks.record import machine
from spt_fast.data import ImageDataset, make_loader
from spt_fast.devices import choose_device
from spt_fast.errors import InputError
from spt_fast.files import write_text

LEARNING_RATES = (3.2e-3, 1e-2, 3.2e-2, 1e-1, 3.2e-1)
STARTS = ("kmeans", "random_sample", "mean_pool", "uniform")
NAMES = {
    "kmeans": "SPT-Deep, k-means",
    "random_sample": "SPT-Deep, random sample",
    "mean_pool": "SPT-Deep, mean pooling",
    "max_pool": "SPT-Deep, max pooling",
    "minibatch_kmeans": "SPT-Deep, mini-batch k-means",
    "uniform": "VPT-Deep, uniform",
}
NUM_PROMPTS = 20
TRAIN_PER_CLASS = VAL_PER_CLASS = 100

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    data: Annotated[str, typer.Option(help="digits, or an ImageFolder (or a zip of one) of 32x32 images.")],
    output: Annotated[Path, typer.Option(help="Results as json; finished runs in it are kept.")],
    test_data: Annotated[
        str | None, typer.Option(help="ImageFolder or zip to test on; not for digits.")
    ] = None,
    starts: Annotated[list[str] | None, typer.Option(help="Starts to compare; all if not given.")] = None,
    lr_scales: Annotated[
        list[str] | None, typer.Option(help="rms, none; the first is tested. Both if not given.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Seeds of the tested runs; rates are chosen on seed 0.")
    ] = 3,
    epochs: Annotated[int, typer.Option(min=2, help="Passes over the training images.")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, the cores being shared out.")] = 2,
) -> None:
    """Sweep the learning rate per start, then test each start at its own best rate with several seeds."""
    starts, lr_scales = starts or list(STARTS), lr_scales or ["rms", "none"]
    setting = {"data": Path(data).stem, "epochs": epochs, "num_prompts": NUM_PROMPTS, "batch_size": 32}

    def job(start: str, scale: str, rate: float, seed: int = 0, test: bool = False) -> dict[str, Any]:
        return {
            **setting,
            "start": start,
            "lr_scale": scale,
            "learning_rate": rate,
            "seed": seed,
            "test": test,
        }

    with (
        mistakes_in_one_sentence(),
        tempfile.TemporaryDirectory() as work,
        ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_share_cores, initargs=(jobs,)) as pool,
    ):
        results = _Results(output, setting)
        where = {"data": data, "test_data": test_data, "work": work}
        for scale in lr_scales:
            sweep = [job(start, scale, rate) for rate, start in itertools.product(LEARNING_RATES, starts)]
            results.complete(pool, sweep, where)
            if scale == lr_scales[0]:
                chosen = [(start, results.best_rate(start, scale)) for start in starts]
                tested = [
                    job(start, scale, rate, seed, True) for start, rate in chosen for seed in range(seeds)
                ]
                results.complete(pool, tested, where)
        results.show(starts, lr_scales)


class _Results:
    """The json file of results, kept whole after every run."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "setting": setting,
            "machine": machine(choose_device()),
            "runs": [],
        }
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["setting"] != setting:
                raise InputError(
                    f"{path} holds results of {kept['setting']}, not of {setting}; name another --output"
                )
            self.content["runs"] = kept["runs"]

    def complete(
        self, pool: ProcessPoolExecutor, wanted: list[dict[str, Any]], where: dict[str, Any]
    ) -> None:
        """Do the runs that are missing."""
        missing = [job for job in wanted if self.find(**job) is None]
        futures = [pool.submit(run, job, where) for job in missing]
        for done, future in enumerate(as_completed(futures), start=1):
            outcome = future.result()
            self.content["runs"].append(outcome)
            write_text(self.path, json.dumps(self.content, indent=1) + "\n")
            print(f"{done}/{len(missing)}", {k: outcome[k] for k in ("start", "lr_scale", "learning_rate", "seed")},
                  f"val {outcome['val_accuracy']:.3f}", flush=True)  # fmt: skip

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        for outcome in self.content["runs"]:
            if all(outcome.get(key) == value for key, value in wanted.items()):
                return outcome
        return None

    def swept(self, start: str, scale: str) -> dict[float, float]:
        """Learning rate -> validation accuracy."""
        found = (
            (rate, self.find(start=start, lr_scale=scale, learning_rate=rate, test=False))
            for rate in LEARNING_RATES
        )
        return {rate: outcome["val_accuracy"] for rate, outcome in found if outcome is not None}

    def best_rate(self, start: str, scale: str) -> float:
        accuracies = self.swept(start, scale)
        return max(accuracies, key=lambda rate: accuracies[rate])

    def show(self, starts: list[str], scales: list[str]) -> None:
        rates = [f"{rate:g}" for rate in LEARNING_RATES]
        swept = Table("start", "lr_scale", *rates, "within 1 point", title="validation accuracy by base rate")
        for scale, start in itertools.product(scales, starts):
            accuracies = self.swept(start, scale)
            best = max(accuracies.values())
            near = [rate for rate, accuracy in accuracies.items() if accuracy >= best - 0.01]
            cells = [f"{accuracies[rate]:.1%}" for rate in LEARNING_RATES]
            swept.add_row(start, scale, *cells, f"{min(near):g} .. {max(near):g}")
        console.print(swept)
        tested = Table(
            "start", "base rate", "test accuracy", "seconds", title="test accuracy at the chosen rate"
        )
        for start in starts:
            rate = self.best_rate(start, scales[0])
            chosen = {"start": start, "learning_rate": rate, "lr_scale": scales[0], "test": True}
            runs = [run for run in self.content["runs"] if chosen.items() <= run.items()]
            correct = [run["test_accuracy"] for run in runs]
            spread = f" +- {statistics.stdev(correct):.1%}" if len(correct) > 1 else ""
            seconds = statistics.mean(run["prototype_seconds"] + run["train_seconds"] for run in runs)
            tested.add_row(
                NAMES[start], f"{rate:g}", f"{statistics.mean(correct):.1%}{spread}", f"{seconds:.0f}"
            )
        console.print(tested)


_CACHE: dict[str, Any] = {}


def run(job: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    """One training run; ``job`` with ``val_accuracy`` (and ``test_accuracy``) and seconds added."""
    if "images" not in _CACHE:
        _CACHE["backbone"] = spt_fast.load_backbone(
            "vit_tiny_patch16_224", checkpoint="bundled:vit_tiny_mae_cifar10", img_size=32, patch_size=4
        )
        _CACHE["backbone"].to(choose_device())
        _CACHE["images"] = image_sets(
            where["data"], where["test_data"], _CACHE["backbone"], TRAIN_PER_CLASS, VAL_PER_CLASS
        )
    backbone, (training, validation, test) = _CACHE["backbone"], _CACHE["images"]
    start = _start(job, training, backbone, Path(where["work"]))
    config = spt_fast.TrainingConfig(
        epochs=job["epochs"],
        warmup_epochs=1,
        batch_size=job["batch_size"],
        learning_rate=job["learning_rate"],
        lr_scale=job["lr_scale"],
        seed=job["seed"],
        val_interval=job["epochs"],
        dtype="float32",
    )
    torch.manual_seed(job["seed"])
    model = spt_fast.PromptedViT(backbone, start, num_classes=len(training.classes), pool="avg")
    outcome = {**job, "prototype_seconds": start.metadata["seconds"]}
    with tempfile.TemporaryDirectory() as folder:
        try:
            trained = spt_fast.train(model, training, validation, output=folder, config=config)
        except InputError as error:
            # A rate that makes the loss overflow is an outcome of the sweep, not the end of it.
            if "no longer finite" not in str(error):
                raise
            return {
                **outcome,
                "val_accuracy": 1 / len(training.classes),
                "train_seconds": None,
                "diverged": True,
            }
    last = trained.metrics[-1]
    outcome |= {
        "val_accuracy": last["val_accuracy"],
        "val_loss": last["val_loss"],
        "train_loss": last["train_loss"],
    }
    outcome["train_seconds"] = trained.train_seconds
    if job["test"]:
        outcome["test_accuracy"] = spt_fast.evaluate(model, test).accuracy
    return outcome


def _start(job: dict[str, Any], training: ImageDataset, backbone: Any, work: Path) -> spt_fast.Prototypes:
    """Prototypes of this start and seed; built once and kept on disk for the other rates."""
    file = work / f"{job['data']}-{job['start']}-{job['seed']}.safetensors"
    if file.exists():
        return spt_fast.Prototypes.load(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = make_loader(training, shuffle=True, seed=job["seed"])
        built = spt_fast.build_prototypes(
            backbone, loader, num_prompts=job["num_prompts"], method=job["start"], seed=job["seed"]
        )
    built.save(file)
    return built


def _share_cores(jobs: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


if __name__ == "__main__":
    app()
