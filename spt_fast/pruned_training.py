"""Pruning of E2VPT's prompts (Han et al. 2023): train, leave out what matters least, start again with the rest."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast.adapters import Adapter, load_adapter, save_adapter
from spt_fast.arguments import check_share
from spt_fast.data import ImageDataset
from spt_fast.distributed import all_reduced, broadcast, from_rank_0, process_group
from spt_fast.errors import InputError
from spt_fast.feeding import ImageFeed
from spt_fast.files import write_text
from spt_fast.methods.e2vpt import E2VPTViT
from spt_fast.progress import Progress
from spt_fast.run_folder import (
    PRUNED_PARTS,
    PRUNED_RESULTS,
    refuse_other_kind,
    refuse_to_replace,
    remove_results,
)
from spt_fast.training import train
from spt_fast.training_config import TrainingConfig
from spt_fast.training_run import TrainingResult


@dataclass(frozen=True)
class Pruning:
    """Which input prompts are left, and what of them.

    Attributes:
        kept: the prompts, in order.
        segment_mask: for each of them and each of its segments 1, or 0 where it is pruned.
    """

    kept: list[int]
    segment_mask: list[list[int]]


def importance(model: E2VPTViT, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """How much the loss depends on each input prompt and on each of its segments.

    With a mask of ones on prompts or segments, the importance of an entry is the mean over images of the size of the
    loss's derivative by it: what leaving it out would change, to first order. All blocks share the masks.

    Args:
        model: a trained model.
        batches: images ``[B, 3, H, W]`` and labels ``[B]``, on the model's device. The processes of a group add up
            what they find on theirs.

    Returns:
        Float64 ``[P]`` of prompts and ``[P, S]`` of segments.

    Raises:
        InputError: no images.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = E2VPTViT(backbone, torch.randn(2, 5, 192), num_classes=10, num_segments=4)
        >>> tokens, segments = importance(model, [(torch.randn(3, 3, 32, 32), torch.tensor([4, 0, 7]))])
        >>> tokens.shape, segments.shape
        (torch.Size([5]), torch.Size([5, 4]))
    """
    model.eval()
    shape = model.segment_mask.shape
    tokens = torch.zeros(shape[0], dtype=torch.float64, device=model.device)
    segments = torch.zeros(shape, dtype=torch.float64, device=model.device)
    count = torch.zeros(1, dtype=torch.float64, device=model.device)
    for images, labels in batches:
        # A mask for each image, so that each has derivatives of its own.
        mask = model.segment_mask.detach().repeat(len(labels), 1, 1).requires_grad_()
        logits = torch.func.functional_call(model, {"segment_mask": mask}, (images,))
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, mask)
        # The mask of a prompt multiplies all its segments.
        tokens += gradient.sum(dim=2).double().abs().sum(dim=0)
        segments += gradient.double().abs().sum(dim=0)
        count += len(labels)
    for sums in (tokens, segments, count):
        all_reduced(sums)
    if not count:
        raise InputError("there is no image to tell important prompts by")
    return tokens / count, segments / count


def choose(
    token_importance: Tensor, segment_importance: Tensor, *, tokens: float, segments: float
) -> Pruning:
    """Prune prompts, then segments of those that are left.

    Args:
        token_importance: ``[P]``, see :func:`importance`.
        segment_importance: ``[P, S]``.
        tokens: share of the prompts to prune, 0 to below 1, rounded down; the least important go.
        segments: share of the segments to prune in each prompt that is left.

    Raises:
        InputError: shares outside of [0, 1).

    Example:
        >>> choose(torch.tensor([3.0, 1.0]), torch.tensor([[1.0, 2.0], [5.0, 6.0]]), tokens=0.5, segments=0.5)
        Pruning(kept=[0], segment_mask=[[0, 1]])
    """
    _check_shares({"tokens": tokens, "segments": segments})
    num_prompts, num_segments = segment_importance.shape
    fewer_prompts, fewer_segments = _rounded_down(tokens, num_prompts), _rounded_down(segments, num_segments)
    kept = token_importance.argsort(stable=True)[fewer_prompts:].sort().values
    mask = torch.ones(len(kept), num_segments, dtype=torch.int64, device=kept.device)
    least = segment_importance[kept].argsort(dim=1, stable=True)[:, :fewer_segments]
    return Pruning(kept.tolist(), mask.scatter(1, least, 0).tolist())


def prune(model: E2VPTViT, pruning: Pruning, *, start: dict[str, Tensor] | None = None) -> E2VPTViT:
    """A model of the prompts that are left, on the same backbone.

    Args:
        model: the model of all prompts.
        pruning: what is left.
        start: what to rewind to, a :meth:`~spt_fast.tuned_vit.TunedViT.task_state` of ``model``; ``None`` goes on from
            where it is.
    """
    state = {**(model.task_state() if start is None else start)}
    state["prompts"] = state["prompts"][:, pruning.kept]
    mask = torch.tensor(pruning.segment_mask, device=model.device)
    state["segment_mask"] = state["segment_mask"][pruning.kept] * mask
    smaller = E2VPTViT(
        model.backbone,
        state["prompts"],
        num_classes=model.head.out_features,
        pool=model.pool,
        checkpoint_blocks=model.checkpoint_blocks,
        **model.options,
    )
    smaller.load_task_state(state)
    smaller.classes = model.classes
    return smaller


def train_pruned(
    model: E2VPTViT,
    train_data: ImageDataset,
    val_data: ImageDataset | None = None,
    *,
    output: str | os.PathLike[str],
    tokens: float,
    segments: float,
    config: TrainingConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[E2VPTViT, TrainingResult]:
    """Train, prune, rewind what is left to its start and train it again.

    ``output`` holds two runs of :func:`spt_fast.train`, ``trained`` with all prompts and ``rewound``, which counts, and
    beside them ``start.safetensors`` and ``pruning.json``.

    Args:
        model: the model of all prompts, where it starts; afterwards it holds the weights of the first run.
        train_data: training images; importance is measured on them, too.
        val_data: validation images.
        output: the folder.
        tokens: share of the prompts to prune.
        segments: share of the segments to prune in each prompt that is left.
        config: how to train, both times.
        resume: go on where ``output`` stopped, in either run; the start is then that of the first call.
        overwrite: replace what is in ``output``.
        metadata: json-able entries for the adapters' record; that of the second run has ``pruning`` beside them.
        progress: called with the images of the current epoch.

    Returns:
        The pruned model with its last weights, and the result of its run.

    Raises:
        InputError: ``output`` is in use (and neither ``resume`` nor ``overwrite``) or was pruned by other shares, and
            as :func:`spt_fast.train`.

    Warns:
        RuntimeWarning: a share of so few prompts or segments that it prunes none.
    """
    shares = {"tokens": tokens, "segments": segments}
    _check_shares(shares)
    for (name, share), number in zip(shares.items(), model.segment_mask.shape, strict=True):
        if share and not _rounded_down(share, number):
            warnings.warn(
                f"{share} of {number} {name} is less than one: none is pruned", RuntimeWarning, stacklevel=2
            )
    config, output = config or TrainingConfig(), Path(output)
    pruning_file, start_file = (output / name for name in PRUNED_RESULTS)
    trained, rewound = (output / part for part in PRUNED_PARTS)
    options: dict[str, Any] = {
        "config": config,
        "resume": resume,
        "overwrite": overwrite,
        "progress": progress,
    }
    with process_group(model.device) as (rank, world_size):
        goes_on = from_rank_0(lambda: _goes_on(start_file, shares, resume=resume, overwrite=overwrite))
        if rank == 0 and goes_on:
            model.load_task_state(dict(load_adapter(start_file, model.backbone).task_state()))
        elif rank == 0:
            remove_results(output)
            save_adapter(start_file, model, metadata={"pruning": shares})
        broadcast(list(model.task_state().values()))
        start = {name: value.detach().clone() for name, value in model.task_state().items()}
        train(model, train_data, val_data, output=trained, metadata=metadata, **options)

        record = from_rank_0(lambda: json.loads(pruning_file.read_text()) if pruning_file.exists() else None)
        if record is None:
            feed = ImageFeed(train_data, model.device, num_workers=config.num_workers)
            batches = feed.batches(batch_size=config.batch_size, rank=rank, world_size=world_size)
            found = importance(model, batches)
            record = {**shares, **asdict(choose(*found, tokens=tokens, segments=segments))}
            record |= {"token_importance": found[0].tolist(), "segment_importance": found[1].tolist()}
            if rank == 0:
                write_text(pruning_file, json.dumps(record, indent=1) + "\n")
        pruning = Pruning(record["kept"], record["segment_mask"])
        model = prune(model, pruning, start=start)
        metadata = {**(metadata or {}), "pruning": {**shares, **asdict(pruning)}}
        result = train(model, train_data, val_data, output=rewound, metadata=metadata, **options)
        return model, result


def _check_shares(shares: dict[str, float]) -> None:
    for name, share in shares.items():
        check_share(f"{name}, a share to prune,", share)


def _rounded_down(share: float, number: int) -> int:
    return int(share * number + 1e-9)  # 0.29 of 100 is 28.999999999999996


def _goes_on(start_file: Path, shares: dict[str, float], *, resume: bool, overwrite: bool) -> bool:
    """Whether there is something to go on from."""
    folder = start_file.parent
    if not (resume or overwrite):
        refuse_to_replace(folder)
    if not resume:
        return False
    refuse_other_kind(folder, prunes=True)
    if not start_file.exists():
        return False
    before = Adapter.load(start_file).config["pruning"]
    if before != shares:
        raise InputError(f"the run in {folder} prunes {before} and this call asks for {shares}")
    return True
