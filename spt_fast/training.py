"""Training what a task learns: the loop; its choices and its state have modules of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.v2 import MixUp

from spt_fast.data import ImageDataset
from spt_fast.devices import prefers_bfloat16
from spt_fast.distributed import broadcast, process_group
from spt_fast.errors import InputError
from spt_fast.feeding import ImageFeed
from spt_fast.progress import Progress
from spt_fast.run_folder import RunFolder
from spt_fast.training_config import Dtype, TrainingConfig
from spt_fast.training_run import TrainingResult, TrainingRun
from spt_fast.tuned_vit import TunedViT


def train(
    model: TunedViT,
    train_data: ImageDataset,
    val_data: ImageDataset | None = None,
    *,
    output: str | os.PathLike[str],
    config: TrainingConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train what ``model`` has beside its frozen backbone, prompts and head for example, in place.

    Started by torchrun, the processes take their steps together, each on its share of each epoch: ``W`` processes with
    batches of ``B`` do what one with batches of ``W * B`` does. Only the gradients of what learns travel; rank 0
    writes. A process group that is joined already is used.

    Args:
        model: the model, on the device to train on. Its frozen weights are replaced by a copy in ``config.dtype``.
        train_data: training images, with a transform.
        val_data: validation images; ``None`` trains without looking.
        output: a folder for adapters, metrics and the state of training.
        config: how to train.
        resume: go on from the state in ``output`` if there is one; the result is that of a run never interrupted.
        overwrite: replace an earlier run in ``output``.
        metadata: json-able entries for the adapters' record, for example how the prompts were started.
        progress: called with the images of the current epoch.

    Returns:
        :class:`TrainingResult`; ``model`` holds the last weights (their moving average under ``ema_decay``).

    Raises:
        InputError: ``output`` already holds a run (and neither ``resume`` nor ``overwrite``) or one with another
            configuration, or data of more classes than the head.
        DivergedError: the loss is no longer finite.
    """
    config = config or TrainingConfig()
    output = Path(output)
    if len(train_data.classes) > model.head.out_features:
        raise InputError(
            f"train_data has {len(train_data.classes)} classes and the head {model.head.out_features} outputs"
        )
    try:
        json.dumps(metadata)
    except TypeError as error:
        raise InputError(f"metadata must be json-able: {error}") from None
    device = model.device
    with process_group(device) as (rank, world_size):
        broadcast(list(model.task_state().values()))
        run = TrainingRun(model, train_data, RunFolder(output, writes=rank == 0), config, metadata or {})
        run.begin(resume=resume, overwrite=overwrite)
        model.cast_backbone(training_dtype(config.dtype, device))
        feed = ImageFeed(train_data, device, num_workers=config.num_workers)
        val_feed = None if val_data is None else ImageFeed(val_data, device, num_workers=config.num_workers)
        mixup = MixUp(alpha=config.mixup, num_classes=model.head.out_features) if config.mixup else None
        no_targets = torch.zeros(0, model.head.out_features, device=device)
        order: dict[str, Any] = {
            "batch_size": config.batch_size,
            "shuffle": True,
            "seed": config.seed,
            "rank": rank,
            "world_size": world_size,
        }

        if config.compile and progress is not None:
            progress("compiling the first step", 0, None)
        while run.epoch < config.epochs:
            model.train()
            waited = feed.waited
            for images, labels in feed.batches(**order, epoch=run.epoch, start_batch=run.batch):
                # Everything random in a step follows from (seed, step, rank): resuming needs no generator state.
                torch.manual_seed((config.seed * 1_000_003 + run.step) * world_size + rank)
                targets = None
                if mixup is not None:
                    images, targets = mixup(images, labels) if len(labels) else (images, no_targets)
                run.advance(images, labels, targets)
                if progress is not None:
                    done = min(run.batch * config.batch_size * world_size, len(train_data))
                    progress(f"epoch {run.epoch + 1}/{config.epochs}", done, len(train_data))
            last = run.epoch + 1 == config.epochs
            validate = last or (run.epoch + 1) % config.val_interval == 0
            run.end_epoch(feed.waited - waited, val_feed if validate else None)
        return run.finish()


def training_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """What ``TrainingConfig.dtype`` stands for on a device."""
    if name == "auto":
        name = "bfloat16" if prefers_bfloat16(device) else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32
