"""The state of a training run: what changes from step to step, and what of it is on disk."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from spt_fast.adapters import save_adapter
from spt_fast.backbones import backbone_identity, source_of
from spt_fast.data import ImageDataset
from spt_fast.distributed import all_reduced
from spt_fast.errors import CheckpointError, InputError
from spt_fast.evaluation import evaluate
from spt_fast.files import atomic_path, write_text
from spt_fast.optimizer import PromptAdamW, cosine_schedule
from spt_fast.prompted_vit import PromptedViT
from spt_fast.training_config import TrainingConfig

# TensorBoard draws what stands before a slash into one group.
EVENT_NAMES = {
    "train_loss": "train/loss",
    "train_accuracy": "train/accuracy",
    "val_loss": "val/loss",
    "val_accuracy": "val/accuracy",
}


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
        output: folder with ``last.safetensors``, ``best.safetensors``, ``metrics.csv``, ``config.json`` and
            TensorBoard's events.
    """

    metrics: list[dict[str, Any]]
    best_accuracy: float | None
    best_epoch: int | None
    train_seconds: float
    skipped: int
    output: Path


class TrainingRun:
    """The state of one training run: what changes from step to step, and what of it is on disk."""

    def __init__(
        self,
        model: PromptedViT,
        train_data: ImageDataset,
        output: Path,
        config: TrainingConfig,
        metadata: dict[str, Any],
        writes: bool,
    ) -> None:
        self.model = model
        self.config = config
        self.output = output
        self.metadata = metadata
        self.writes = writes
        self.images = len(train_data)
        self.backbone = backbone_identity(model.backbone)["weights"]
        self.classes = train_data.classes if len(train_data.classes) == model.head.out_features else None
        self.world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self.steps_per_epoch = math.ceil(math.ceil(len(train_data) / self.world_size) / config.batch_size)
        self.optimizer = PromptAdamW(
            model.prompts,
            model.head,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            head_weight_decay=config.head_weight_decay,
            lr_scale=config.lr_scale,
        )
        self.schedule = cosine_schedule(
            self.optimizer,
            steps=config.epochs * self.steps_per_epoch,
            warmup_steps=config.warmup_epochs * self.steps_per_epoch,
            min_learning_rate=config.min_learning_rate,
        )
        self.learned = nn.ModuleDict({"head": model.head})
        self.learned.register_parameter("prompts", model.prompts)
        self.ema = ModelEmaV3(self.learned, decay=config.ema_decay) if config.ema_decay else None
        self.epoch = self.batch = 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=model.prompts.device)
        self.metrics: list[dict[str, Any]] = []
        self.best: tuple[float, int] | None = None
        self.skipped = 0
        self.seconds_before = 0.0
        self.started = self.saved = time.perf_counter()
        self.log: SummaryWriter | None = None

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
        free = ("num_workers", "checkpoint_minutes")
        record = {
            **{name: value for name, value in asdict(self.config).items() if name not in free},
            "prompts": list(model.prompts.shape),
            "train_prompts": model.prompts.requires_grad,
            "prompt_dropout": model.prompt_dropout.p,
            "pool": model.pool,
            "classes": model.head.out_features,
            "images": self.images,
            "processes": self.world_size,
            "backbone": self.backbone,
            "weight_dtype": source_of(model.backbone)["weight_dtype"],
        }
        return json.loads(json.dumps(record))

    def begin(self, *, resume: bool, overwrite: bool) -> None:
        state_file, config_file = self.output / "checkpoint.pt", self.output / "config.json"
        if resume and state_file.exists():
            self._load(state_file)
        elif self.writes and config_file.exists() and not (resume or overwrite):
            raise InputError(
                f"output {self.output} already holds a run; resume it, overwrite it or name another folder"
            )
        if self.writes:
            if self.step == 0:
                for stale in (
                    "checkpoint.pt",
                    "best.safetensors",
                    "last.safetensors",
                    "metrics.csv",
                    "summary.json",
                ):
                    (self.output / stale).unlink(missing_ok=True)
                for events in (self.output / "tensorboard").glob("events.*"):
                    events.unlink()
            write_text(
                config_file, json.dumps({**self.metadata, "training": asdict(self.config)}, indent=2) + "\n"
            )
            self.log = SummaryWriter(str(self.output / "tensorboard"), purge_step=self.step + 1)

    def update(self, loss: Tensor, correct: Tensor, count: int) -> None:
        """Take the optimizer step for the gradients at hand, and count its batch."""
        self.schedule.step_update(self.step + 1)
        # A batch without a readable image teaches nothing; but ranks only stay equal if all of them step.
        if count or self.world_size > 1:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.learned)
        # Summed over processes in every step, so that rank 0 can save at any of them without asking the others.
        self.sums += all_reduced(
            torch.stack([loss.double(), correct.double(), loss.new_tensor(count, dtype=torch.float64)])
        )
        self.batch += 1
        if self.log is not None and self.step % 10 == 0:
            self.log.add_scalar("train/batch_loss", loss / max(1, count), self.step)
        minutes = (time.perf_counter() - self.saved) / 60
        if minutes >= self.config.checkpoint_minutes and self.batch < self.steps_per_epoch:
            self._save()

    def end_epoch(self, val_data: ImageDataset | None) -> None:
        loss, correct, count = self.sums.tolist()
        if not count:
            raise InputError("no training image could be read")
        if not loss < float("inf"):
            raise InputError(
                f"the training loss is no longer finite in epoch {self.epoch + 1}; "
                f"lower learning_rate={self.config.learning_rate}"
            )
        # Not the loader's count: that of a resumed epoch begins where it was resumed.
        self.skipped = self.world_size * math.ceil(self.images / self.world_size) - int(count)
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "train_loss": loss / count,
            "train_accuracy": correct / count,
            "val_loss": None,
            "val_accuracy": None,
            "learning_rate": self.optimizer.param_groups[-1]["lr"],
        }
        with self._averaged():
            if val_data is not None:
                judged = evaluate(self.model, val_data, num_workers=self.config.num_workers)
                row |= {"val_loss": judged.loss, "val_accuracy": judged.accuracy}
                if self.best is None or judged.accuracy > self.best[0]:
                    self.best = (judged.accuracy, self.epoch + 1)
                    self._save_adapter("best.safetensors")
            self._save_adapter("last.safetensors")
        self.metrics.append({**row, "seconds": self.seconds})
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums.zero_()
        if self.writes:
            write_text(self.output / "metrics.csv", _csv(self.metrics))
        if self.log is not None:
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    self.log.add_scalar(EVENT_NAMES.get(name, name), value, self.epoch)
        self._save()

    def finish(self) -> TrainingResult:
        if self.ema is not None:
            self.learned.load_state_dict(self.ema.module.state_dict())
        best_accuracy, best_epoch = self.best or (None, None)
        seconds = self.metrics[-1]["seconds"]
        result = TrainingResult(self.metrics, best_accuracy, best_epoch, seconds, self.skipped, self.output)
        if self.log is not None:
            self.log.close()
        if self.writes:
            summary = {
                "best_accuracy": best_accuracy,
                "best_epoch": best_epoch,
                "final_accuracy": self.metrics[-1]["val_accuracy"],
                "train_seconds": seconds,
                "skipped": self.skipped,
                "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            }
            write_text(self.output / "summary.json", json.dumps(summary, indent=2) + "\n")
        return result

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

    def _save_adapter(self, name: str) -> None:
        if self.writes:
            metadata = {**self.metadata, "training": asdict(self.config)}
            save_adapter(self.output / name, self.model, classes=self.classes, metadata=metadata)

    def _save(self) -> None:
        if not self.writes:
            return
        self.saved = time.perf_counter()
        state = {
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
        }
        with atomic_path(self.output / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.model.prompts.device, weights_only=True)
            theirs = state["record"]
        except Exception as error:
            raise CheckpointError(f"{path} is not the state of a training run: {error}") from error
        for key, value in self.record.items():
            if theirs.get(key) != value:
                raise InputError(
                    f"the run in {self.output} has {key}={theirs.get(key)!r} "
                    f"and this call asks for {key}={value!r}"
                )
        self.learned.load_state_dict(state["learned"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.sums = state["sums"]
        self.metrics, self.skipped, self.seconds_before = state["metrics"], state["skipped"], state["seconds"]
        self.best = None if state["best"] is None else tuple(state["best"])


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
