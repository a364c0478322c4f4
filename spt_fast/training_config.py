"""How to train: every choice in one place, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from spt_fast.errors import InputError
from spt_fast.optimizer import LearningRateScale

Dtype = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; the defaults are the paper's (Sec. 4.1) except ``lr_scale``, and the rates and decays, which the
    paper chooses for every data set.

    Attributes:
        epochs: passes over the training images.
        warmup_epochs: epochs of linear warm-up, before the cosine.
        batch_size: images per step on each process.
        learning_rate: base rate of AdamW, for head, prompts and whatever else learns.
        lr_scale: ``"rms"``: each block's prompt rate is multiplied by the root mean square of its start;
            ``"none"``: one rate for all, as in the paper. See :mod:`spt_fast.optimizer`.
        min_learning_rate: where the cosine ends.
        weight_decay: of the prompts, and of matrices that a method adds.
        head_weight_decay: of the head.
        label_smoothing: of the cross-entropy.
        mixup: alpha of mixup; 0 is off.
        ema_decay: decay of an exponential moving average of prompts and head, which is then what is evaluated and
            saved; ``None`` is off.
        dtype: of the frozen weights and activations: ``"bfloat16"``, ``"float32"``, or ``"auto"``: bfloat16 where the
            device computes in it. Prompts and head stay float32.
        compile: run forward and backward pass through torch.compile.
        seed: of the order of images, augmentation, dropout and mixup.
        num_workers: processes that decode images; ``None``: as many as there are cores and use for, see
            :class:`spt_fast.feeding.ImageFeed`.
        val_interval: validate after every this many epochs, and after the last.
        checkpoint_minutes: save the state of training at least this often, and after every epoch.
        snapshot_interval: keep the adapters of the start and of every this many epochs in ``snapshots/``; ``None``:
            keep none.
    """

    epochs: int = 100
    warmup_epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 3e-2
    lr_scale: LearningRateScale = "rms"
    min_learning_rate: float = 1e-8
    weight_decay: float = 1e-2
    head_weight_decay: float = 1e-2
    label_smoothing: float = 0.0
    mixup: float = 0.0
    ema_decay: float | None = None
    dtype: Dtype = "auto"
    compile: bool = False
    seed: int = 0
    num_workers: int | None = None
    val_interval: int = 1
    checkpoint_minutes: float = 5.0
    snapshot_interval: int | None = None

    def __post_init__(self) -> None:
        wrong = {
            "epochs": self.epochs < 1 and "at least 1",
            "warmup_epochs": not 0 <= self.warmup_epochs <= self.epochs
            and f"between 0 and epochs={self.epochs}",
            "batch_size": self.batch_size < 1 and "at least 1",
            "learning_rate": not 0 < self.learning_rate < math.inf and "positive and finite",
            "lr_scale": self.lr_scale not in get_args(LearningRateScale) and "rms or none",
            "min_learning_rate": not self.min_learning_rate >= 0 and "at least 0",
            "weight_decay": not self.weight_decay >= 0 and "at least 0",
            "head_weight_decay": not self.head_weight_decay >= 0 and "at least 0",
            "label_smoothing": not 0 <= self.label_smoothing < 1 and "in [0, 1)",
            "mixup": not self.mixup >= 0 and "at least 0",
            "ema_decay": self.ema_decay is not None and not 0 < self.ema_decay < 1 and "between 0 and 1",
            "dtype": self.dtype not in get_args(Dtype) and "auto, bfloat16 or float32",
            "seed": self.seed < 0 and "at least 0",
            "num_workers": self.num_workers is not None and self.num_workers < 0 and "at least 0",
            "val_interval": self.val_interval < 1 and "at least 1",
            "snapshot_interval": self.snapshot_interval is not None
            and self.snapshot_interval < 1
            and "at least 1",
            "checkpoint_minutes": not self.checkpoint_minutes >= 0 and "at least 0",
        }
        for name, expected in wrong.items():
            if expected:
                raise InputError(f"{name} must be {expected}, got {getattr(self, name)!r}")
