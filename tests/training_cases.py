"""Training runs for tests: small enough for seconds, stoppable anywhere, compared bit for bit."""

import csv
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import squares, tiny_model
from torch import Tensor

from spt_fast import Adapter, PromptedViT, TrainingConfig, TrainingResult, train

TESTS = Path(__file__).parent
IMAGES, STEPS = 22, 3  # 8 + 8 + 6 images an epoch
CONFIG = TrainingConfig(
    epochs=3,
    warmup_epochs=1,
    batch_size=8,
    learning_rate=0.01,
    head_weight_decay=0.02,
    seed=3,
    dtype="float32",
    checkpoint_minutes=0.0,
)
LONGER = TrainingConfig(epochs=5, warmup_epochs=1, batch_size=8, learning_rate=0.01, dtype="float32")


class Interruption(BaseException):
    """Stops a run, as KeyboardInterrupt does."""


def interrupt_after(
    steps: int, how: Callable[[], None] | None = None
) -> Callable[[str, int, int | None], None]:
    """A progress callback that stops the run after so many steps of this call."""
    calls = 0

    def progress(stage: str, done: int, total: int | None) -> None:
        nonlocal calls
        calls += 1
        if calls == steps:
            if how is not None:
                how()
            raise Interruption

    return progress


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), f"{name} differs by {(ours[name] - value).abs().max()}"


def assert_same_result(ours: TrainingResult, expected: TrainingResult) -> None:
    """All but the seconds, in memory and in the folder."""
    assert without_seconds(ours.metrics) == without_seconds(expected.metrics)
    assert (ours.best_accuracy, ours.best_epoch) == (expected.best_accuracy, expected.best_epoch)
    assert ours.skipped == expected.skipped
    for name in ("best.safetensors", "last.safetensors"):
        a, b = (Adapter.load(result.output / name) for result in (ours, expected))
        assert_same(
            {"prompts": a.prompts, "head": a.head_weight}, {"prompts": b.prompts, "head": b.head_weight}
        )
    a_rows, b_rows = (read_csv(result.output / "metrics.csv") for result in (ours, expected))
    assert without_seconds(a_rows) == without_seconds(b_rows)


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


# Interruption and resume

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: (TrainingConfig, PromptedViT, data)
    "plain": ({}, {}, {}),
    "moving_average": ({"ema_decay": 0.8}, {}, {}),
    "mixup": ({"mixup": 0.8}, {}, {}),
    "dropout": ({}, {"prompt_dropout": 0.3}, {}),
    "smoothing": ({"label_smoothing": 0.2, "lr_scale": "none"}, {"deep": False}, {}),
    "augmentation": ({}, {}, {"recipe": "fgvc"}),
    "shards": ({}, {}, {"recipe": "fgvc", "shards": [9, 1, 12]}),
    "frozen_prompts": ({"ema_decay": 0.5}, {"train_prompts": False}, {}),
    "everything": (
        {"ema_decay": 0.8, "mixup": 0.8, "label_smoothing": 0.1, "val_interval": 2},
        {"prompt_dropout": 0.3},
        {"recipe": "fgvc"},
    ),
}


class Case:
    """One variant: the same call again and again, each time with new objects that start elsewhere."""

    def __init__(self, variant: str, folder: Path) -> None:
        config, self.model_kwargs, self.data_kwargs = VARIANTS[variant]
        self.config = replace(CONFIG, **config)
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def run(self, output: str, *, seed: int = 0, **kwargs: Any) -> tuple[PromptedViT, TrainingResult]:
        model = tiny_model(seed, **self.model_kwargs)
        bad = {5: self.folder / "bad.jpg", 11: self.folder / "worse.jpg"}
        data = squares(IMAGES, unreadable=bad, **self.data_kwargs)
        val = squares(9, seed=1)
        return model, train(model, data, val, output=self.folder / output, config=self.config, **kwargs)


def child_environment() -> dict[str, str]:
    paths = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
