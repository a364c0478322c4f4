"""The state of a training run: what changes from step to step, and what a resumed run goes on from."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from spt_fast.adapters import save_adapter
from spt_fast.backbones import backbone_identity, source_of
from spt_fast.data import ImageDataset, batches_per_epoch
from spt_fast.distributed import world
from spt_fast.errors import DivergedError, InputError
from spt_fast.evaluation import evaluate_feed
from spt_fast.feeding import ImageFeed
from spt_fast.optimizer import PromptAdamW, cosine_schedule
from spt_fast.run_folder import RunFolder
from spt_fast.training_config import TrainingConfig
from spt_fast.training_step import TrainingStep
from spt_fast.tuned_vit import HEAD, TunedViT

STEPS_PER_LOG = 10


@dataclass(frozen=True)
class TrainingResult:
    """What :func:`train` measured and wrote.

    Attributes:
        metrics: one dict per epoch: ``epoch`` (from 1), ``train_loss``, ``train_accuracy``, ``val_loss``,
            ``val_accuracy`` (0 to 1; ``None`` where it was not measured), ``learning_rate`` (base, at the epoch's end),
            ``seconds`` (of training since the start, validation included).
        best_accuracy: highest validation accuracy; ``None`` without validation data.
        best_epoch: the epoch it was reached in.
        train_seconds: wall-clock seconds, over all interrupted parts.
        skipped: unreadable training files in the last epoch.
        data_wait: share of the training time from the second epoch on (of the first if there is no other), 0 to 1, that
            was spent in waiting for images.
        compile_seconds: what the first step took where it was compiled, else ``None``.
        output: folder with ``last.safetensors``, ``best.safetensors``, ``metrics.csv``, ``config.json`` and
            TensorBoard's events.
    """

    metrics: list[dict[str, Any]]
    best_accuracy: float | None
    best_epoch: int | None
    train_seconds: float
    skipped: int
    output: Path
    data_wait: float = 0.0
    compile_seconds: float | None = None


class TrainingRun:
    """The state of one training run.

    Args:
        model: the model, in the dtype and on the device it is trained in.
        train_data: the training images.
        folder: where the run is kept.
        config: how it is trained.
        metadata: json-able entries for the records of the run and its adapters.
    """

    def __init__(
        self,
        model: TunedViT,
        train_data: ImageDataset,
        folder: RunFolder,
        config: TrainingConfig,
        metadata: dict[str, Any],
    ) -> None:
        self.model = model
        self.config = config
        self.folder = folder
        self.metadata = {**metadata, "training": asdict(config)}
        self.images = len(train_data)
        self.backbone = backbone_identity(model.backbone)["weights"]
        self.classes = train_data.classes if len(train_data.classes) == model.head.out_features else None
        self.steps_per_epoch = batches_per_epoch(
            train_data, batch_size=config.batch_size, world_size=world()[1]
        )
        self.optimizer = PromptAdamW(
            getattr(model, "prompts", None),
            model.head,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            head_weight_decay=config.head_weight_decay,
            lr_scale=config.lr_scale,
            fused=True,
            others=[
                (parameter, model.learning_rate_scale(name))
                for name, parameter in model.added_parameters().items()
            ],
        )
        self.schedule = cosine_schedule(
            self.optimizer,
            steps=config.epochs * self.steps_per_epoch,
            warmup_steps=config.warmup_epochs * self.steps_per_epoch,
            min_learning_rate=config.min_learning_rate,
        )
        # A module, as timm's moving average wants it; its names cannot hold dots.
        self.learned = nn.ParameterDict(
            {name.replace(".", "/"): value for name, value in model.task_state().items()}
        )
        self.ema = ModelEmaV3(self.learned, decay=config.ema_decay) if config.ema_decay else None
        # Loss, hits and images of the epoch so far, of all processes: rank 0 can save without asking the others.
        self.sums = torch.zeros(3, dtype=torch.float64, device=model.device)
        self.take_step = TrainingStep(
            model,
            self.optimizer,
            self.sums,
            batch_size=config.batch_size,
            label_smoothing=config.label_smoothing,
            average=self._average if self.ema is not None else None,
            compile=config.compile,
        )
        self.epoch = self.batch = 0
        self.metrics: list[dict[str, Any]] = []
        self.best: tuple[float, int] | None = None
        self.skipped = 0
        self.seconds_before = 0.0
        self.waits: list[
            tuple[float, float]
        ] = []  # of each epoch: seconds of waiting for images, and of training
        self.started = self.saved = self.epoch_started = time.perf_counter()
        self.unlogged: list[tuple[int, Tensor]] = []

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def record(self) -> dict[str, Any]:
        """What must be equal for a run to be the continuation of another."""
        model = self.model
        # How images are decoded and how often the state is saved leave no trace in the result.
        free = ("num_workers", "checkpoint_minutes", "snapshot_interval")
        record = {
            "method": model.name,
            **{name: value for name, value in asdict(self.config).items() if name not in free},
            **model.options,
            **{name: list(value.shape) for name, value in model.task_state().items() if name not in HEAD},
            "pool": model.pool,
            "classes": model.head.out_features,
            "images": self.images,
            "processes": world()[1],
            "backbone": self.backbone,
            "weight_dtype": source_of(model.backbone)["weight_dtype"],
        }
        return json.loads(json.dumps(record))

    def begin(self, *, resume: bool, overwrite: bool) -> None:
        if resume and self.folder.has_state():
            self._load()
        elif not (resume or overwrite):
            self.folder.refuse_to_replace()
        self.folder.open(self.metadata, step=self.step)
        if self.config.snapshot_interval is not None and self.step == 0:
            self._save_snapshot()

    def advance(self, images: Tensor, labels: Tensor, targets: Tensor | None) -> None:
        """Take the optimizer step for a batch; see :class:`TrainingStep`."""
        self.schedule.step_update(self.step + 1)
        self.take_step(images, labels, targets)
        self.batch += 1
        if self.step % STEPS_PER_LOG == 0:
            self.unlogged.append((self.step, self.take_step.totals.clone()))
        minutes = (time.perf_counter() - self.saved) / 60
        if minutes >= self.config.checkpoint_minutes and self.batch < self.steps_per_epoch:
            self._save()

    def end_epoch(self, waited: float, val_feed: ImageFeed | None) -> None:
        """Judge the model and save everything.

        Args:
            waited: seconds of waiting for images in this epoch.
            val_feed: images to judge on; ``None``: not now.
        """
        loss, correct, count = self.sums.tolist()
        trained = time.perf_counter() - self.epoch_started
        if not count:
            raise InputError("no training image could be read")
        if not loss < float("inf"):
            raise DivergedError(
                f"the training loss is no longer finite in epoch {self.epoch + 1}; "
                f"lower learning_rate={self.config.learning_rate}"
            )
        # Not the loader's count: that of a resumed epoch begins where it was resumed.
        self.skipped = self.images - int(count)
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "train_loss": loss / count,
            "train_accuracy": correct / count,
            "val_loss": None,
            "val_accuracy": None,
            "learning_rate": self.optimizer.param_groups[-1]["lr"],
        }
        with self._averaged():
            if val_feed is not None:
                judged = evaluate_feed(self.model, val_feed)
                row |= {"val_loss": judged.loss, "val_accuracy": judged.accuracy}
                if self.best is None or judged.accuracy > self.best[0]:
                    self.best = (judged.accuracy, self.epoch + 1)
                    self._save_adapter("best.safetensors")
            self._save_adapter("last.safetensors")
            self.epoch, self.batch = self.epoch + 1, 0
            if self.config.snapshot_interval is not None and self.epoch % self.config.snapshot_interval == 0:
                self._save_snapshot()
        self.metrics.append({**row, "seconds": self.seconds})
        self.waits.append((waited, trained))
        self.sums.zero_()
        self.folder.log_epoch(row, self.metrics)
        self._save()
        self.epoch_started = time.perf_counter()

    def finish(self) -> TrainingResult:
        if self.ema is not None:
            self.learned.load_state_dict(self.ema.module.state_dict())
        best_accuracy, best_epoch = self.best or (None, None)
        # In the first epoch the disk's cache is cold and code is compiled.
        waited, trained = map(sum, zip(*(self.waits[1:] or self.waits), strict=True))
        result = TrainingResult(
            self.metrics,
            best_accuracy,
            best_epoch,
            self.metrics[-1]["seconds"],
            self.skipped,
            self.folder.path,
            waited / trained,
            self.take_step.compile_seconds,
        )
        self.folder.close(
            {
                "best_accuracy": best_accuracy,
                "best_epoch": best_epoch,
                "final_accuracy": self.metrics[-1]["val_accuracy"],
                "train_seconds": result.train_seconds,
                "data_wait": result.data_wait,
                "compile_seconds": result.compile_seconds,
                "skipped": self.skipped,
                "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            }
        )
        return result

    def _average(self) -> None:
        assert self.ema is not None
        self.ema.update(self.learned)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model with the moving average of its weights, where there is one, for the length of the block."""
        if self.ema is None:
            yield
            return
        own = {name: value.clone() for name, value in self.learned.state_dict().items()}
        self.learned.load_state_dict(self.ema.module.state_dict())
        try:
            yield
        finally:
            self.learned.load_state_dict(own)

    def _save_snapshot(self) -> None:
        self._save_adapter(f"snapshots/epoch-{self.epoch:04d}.safetensors")

    def _save_adapter(self, name: str) -> None:
        if self.folder.writes:
            path = self.folder.path / name
            save_adapter(path, self.model, classes=self.classes, metadata=self.metadata)

    def _save(self) -> None:
        self.folder.log_batches(self.unlogged)
        self.unlogged.clear()
        if not self.folder.writes:
            return
        self.saved = time.perf_counter()
        self.folder.save_state(
            {
                "record": self.record,
                "learned": self.learned.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "epoch": self.epoch,
                "batch": self.batch,
                "sums": self.sums,
                "metrics": self.metrics,
                "best": self.best,
                "skipped": self.skipped,
                "seconds": self.seconds,
                "waits": self.waits,
            }
        )

    def _load(self) -> None:
        state = self.folder.load_state(self.model.device)
        for key, value in self.record.items():
            if state["record"].get(key) != value:
                raise InputError(
                    f"the run in {self.folder.path} has {key}={state['record'].get(key)!r} "
                    f"and this call asks for {key}={value!r}"
                )
        self.learned.load_state_dict(state["learned"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.sums.copy_(state["sums"])  # in place: the step adds to it
        self.metrics, self.skipped, self.seconds_before = state["metrics"], state["skipped"], state["seconds"]
        self.waits = state["waits"]
        self.best = None if state["best"] is None else tuple(state["best"])
