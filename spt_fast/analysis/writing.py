"""The folder of an analysis: its numbers as json, and its pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast.analysis.cluster_sizes import effective_clusters
from spt_fast.analysis.nearest_patches import Nearest
from spt_fast.analysis.pictures import (
    patch_with_context,
    write_cka,
    write_cluster_sizes,
    write_mmd,
    write_nmi,
    write_patches,
)
from spt_fast.analysis.prompt_sets import PromptSet
from spt_fast.analysis.streaming import PromptAnalysis
from spt_fast.data import ImageDataset, ImageTransform
from spt_fast.files import write_text


def shown(sets: Sequence[PromptSet]) -> list[str]:
    """The names of the sets to be drawn side by side: of a run the start and the end, and all others."""
    along = [each.epoch for each in sets if each.epoch is not None]
    return [each.name for each in sets if each.epoch is None or each.epoch in (min(along), max(along))]


def write_analysis(
    output: Path,
    found: PromptAnalysis,
    sets: Sequence[PromptSet],
    backbone: VisionTransformer,
    images: ImageDataset,
    seen: Sequence[int],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write ``analysis.json``, the charts, and the nearest patches of the sets that they were asked of.

    Args:
        output: the folder; what an earlier analysis left there is replaced.
        found: the numbers.
        sets: what was compared.
        backbone: whose tokens these are.
        images: the images, behind the transform that the backbone saw them through.
        seen: for each image that was looked at, its number in ``images``.
        facts: json-able, comes first in the record.

    Returns:
        The record in ``analysis.json``.
    """
    grid_width: int = backbone.patch_embed.grid_size[1]
    record = {
        **facts,
        "images": found.images,
        "tokens_per_block": found.tokens,
        "mmd_bandwidth": None if found.bandwidth is None else found.bandwidth.tolist(),
        "prompts": [_record_of(each, found) for each in sets],
        "nearest": {
            name: _record_of_patches(nearest, images, seen, grid_width)
            for name, nearest in found.nearest.items()
        },
    }
    # The record is complete or not there: after an interruption no old one stands beside new pictures.
    (output / "analysis.json").unlink(missing_ok=True)
    names = shown(sets)
    along = {each.epoch: found.nmi[each.name] for each in sets if each.epoch is not None}
    write_nmi(output / "nmi", {name: found.nmi[name] for name in names}, along)
    write_cka(output / "cka", {name: found.cka[name] for name in names})
    write_cluster_sizes(output / "cluster_sizes", {name: found.counts[name] for name in names})
    mmd = {name: found.mmd[name] for name in names if name in found.mmd}
    for stale in [*output.glob("nearest/block_*.png"), *output.glob("mmd.png"), *output.glob("mmd.svg")]:
        stale.unlink()
    if mmd:
        write_mmd(output / "mmd", mmd)
    for nearest in found.nearest.values():
        _write_nearest(output / "nearest", nearest, backbone, images, seen)
    write_text(output / "analysis.json", json.dumps(record, indent=1) + "\n")
    return record


def _record_of(prompts: PromptSet, found: PromptAnalysis) -> dict[str, Any]:
    name = prompts.name
    nmi, counts = found.nmi[name], found.counts[name]
    return {
        "name": name,
        "file": str(prompts.file),
        "epoch": prompts.epoch,
        "shape": list(prompts.values.shape),
        "nmi": nmi.tolist(),
        "nmi_mean": nmi.mean().item(),
        "cka": [[None if math.isnan(value) else value for value in row] for row in found.cka[name].tolist()],
        "mmd": found.mmd[name].tolist() if name in found.mmd else None,
        "tokens_of_prompts": counts.tolist(),
        "effective_clusters": effective_clusters(counts).tolist(),
        "tokens_of_prompts_when_built": None if prompts.counts is None else prompts.counts.tolist(),
        "effective_clusters_when_built": None
        if prompts.counts is None
        else effective_clusters(prompts.counts).tolist(),
    }


def _record_of_patches(
    nearest: Nearest, images: ImageDataset, seen: Sequence[int], grid_width: int
) -> list[list[list[dict[str, Any]]]]:
    """``[block][prompt][rank]``."""

    def patch(image: int, position: int, distance: float) -> dict[str, Any]:
        row, column = divmod(position, grid_width)
        return {"image": images.describe(seen[image]), "row": row, "column": column, "distance": distance}

    return [
        [[patch(*each) for each in zip(*of_prompt, strict=True)] for of_prompt in zip(*of_block, strict=True)]
        for of_block in zip(*(each.tolist() for each in nearest), strict=True)
    ]


def _write_nearest(
    folder: Path, nearest: Nearest, backbone: VisionTransformer, images: ImageDataset, seen: Sequence[int]
) -> None:
    grid_width: int = backbone.patch_embed.grid_size[1]
    patch_size: tuple[int, int] = backbone.patch_embed.patch_size
    pixels = {image: _pixels(images, seen[image]) for image in nearest.images.unique().tolist()}
    for block, (of_images, of_positions) in enumerate(
        zip(nearest.images.tolist(), nearest.positions.tolist(), strict=True)
    ):
        rows = [
            [
                patch_with_context(pixels[image], position // grid_width, position % grid_width, patch_size)
                for image, position in zip(*of_prompt, strict=True)
            ]
            for of_prompt in zip(of_images, of_positions, strict=True)
        ]
        write_patches(folder / f"block_{block:02d}.png", rows)


def _pixels(images: ImageDataset, index: int) -> Tensor:
    """An image as the backbone saw it, ``[3, H, W]`` in 0 .. 1."""
    item = images[index]
    assert item is not None and isinstance(images.transform, ImageTransform)
    image, _ = item
    mean, std = (
        image.new_tensor(value)[:, None, None] for value in (images.transform.mean, images.transform.std)
    )
    return (image * std + mean).clamp(0, 1)
