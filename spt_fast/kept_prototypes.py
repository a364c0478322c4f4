"""Prototypes that many runs start from: built once for all numbers of prompts, and kept in files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from spt_fast.building import build_prototypes
from spt_fast.data import ImageDataset
from spt_fast.distributed import from_rank_0, world
from spt_fast.feeding import prototype_loader, skipped_by_all
from spt_fast.progress import Progress
from spt_fast.prototypes import Prototypes


def kept_prototypes(
    backbone: VisionTransformer,
    images: Callable[[], ImageDataset],
    lengths: Sequence[int],
    *,
    folder: Path,
    name: str,
    start: Mapping[str, Any],
    batch_size: int = 32,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> dict[int, Prototypes]:
    """Prototypes for every one of ``lengths``: those that are kept, the others from one pass over the images.

    Args:
        backbone: the frozen timm ViT, on the device to work on.
        images: opens the images, with the transform for looking at them; called only if something is to be built.
        lengths: numbers of prompts per block.
        folder: where they are kept, as ``NAME-LENGTH.safetensors``. One process (or one process group) at a time may
            work on a name.
        name: of what they are built from and how.
        start: arguments of :func:`spt_fast.build_prototypes` other than ``num_prompts``; ``method`` and ``seed`` are
            among them.
        batch_size: images at a time.
        num_workers: processes that decode, see :func:`spt_fast.feeding.workers_for`.
        progress: called with how far the building is.

    Returns:
        Prototypes by length, as :func:`spt_fast.build_prototypes` built them: ``values`` ``[L, P, D]`` or ``[1, P, D]``
        float32. Their metadata also has ``data``, ``skipped`` (unreadable files) and ``built_with`` (the lengths of
        their pass).
    """
    files = {length: folder / f"{name}-{length}.safetensors" for length in lengths}
    prototypes = from_rank_0(functools.partial(_whole_passes, files, folder, name))
    missing = [length for length in lengths if length not in prototypes]
    if missing:
        data = images()
        loader = prototype_loader(
            data,
            start["method"],
            batch_size=batch_size,
            seed=start["seed"],
            device=next(backbone.parameters()).device,
            num_workers=num_workers,
        )
        built = build_prototypes(
            backbone,
            loader,
            num_prompts=missing,
            checkpoint=folder / f"{name}-{'-'.join(map(str, missing))}.partial",
            resume=True,
            progress=progress,
            **start,
        )
        unreadable = skipped_by_all(loader)
        for length, each in built.items():
            each.metadata |= {"data": data.name, "skipped": unreadable, "built_with": missing}
            if world()[0] == 0:
                each.save(files[length])
        prototypes |= built
    return prototypes


def _whole_passes(files: dict[int, Path], folder: Path, name: str) -> dict[int, Prototypes]:
    """The kept prototypes whose pass was finished.

    An interruption may have come between two files of one pass. What a length gets may depend on the others (see
    ``method="minibatch_kmeans"``), so that pass is made again for all of them.
    """
    found = {length: Prototypes.load(file) for length, file in files.items() if file.exists()}
    return {
        length: each
        for length, each in found.items()
        if all((folder / f"{name}-{other}.safetensors").exists() for other in each.metadata["built_with"])
    }
