"""Layer tokens: the patch tokens that enter each block of a backbone (Eq. 1-2), streamed batch by batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Literal, get_args

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast.backbones import check_backbone, check_images, embed
from spt_fast.errors import InputError

Capture = Literal["paper", "released"]


@torch.no_grad()
def layer_tokens(
    backbone: VisionTransformer,
    images: Tensor,
    *,
    layers: Collection[int] | None = None,
    capture: Capture = "paper",
) -> dict[int, Tensor]:
    """The tokens ``E_i`` entering the blocks of ``backbone`` for one batch.

    Args:
        backbone: a timm ``VisionTransformer``.
        images: ``[B, 3, H, W]``.
        layers: which ``i`` in ``0 .. L-1`` to return; ``None`` is all. Blocks beyond the last one are not run.
        capture: ``"paper"``: patch tokens only, ``E_0`` being patch embedding plus position embedding, exactly what
            enters the first block. ``"released"``: as the authors' released code does it: layer 0 is the patch
            embedding without position embedding, deeper layers keep the class (and register) tokens.

    Returns:
        ``{i: [B, n, D]}`` in the dtype and on the device of the backbone; ``n`` is the number of patches, plus the
        prefix tokens for ``i > 0`` under ``"released"``.

    Raises:
        InputError: images of the wrong shape, with NaN or infinite values, or an unknown layer or capture.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> {i: tuple(t.shape) for i, t in layer_tokens(backbone, torch.randn(4, 3, 32, 32)).items()}
        {0: (4, 16, 192), 1: (4, 16, 192)}
    """
    check_backbone(backbone)
    if capture not in get_args(Capture):
        raise InputError(f"capture must be one of {', '.join(get_args(Capture))}, got {capture!r}")
    prefix = backbone.num_prefix_tokens
    captured = block_inputs(backbone, images, layers=layers)
    if capture == "paper":
        return {index: x[:, prefix:] for index, x in captured.items()}
    if 0 in captured:
        first = next(backbone.parameters())
        captured[0] = backbone.patch_embed(images.to(first.device, first.dtype)).flatten(1, -2)
    return captured


@torch.no_grad()
def block_inputs(
    backbone: VisionTransformer, images: Tensor, *, layers: Collection[int] | None = None
) -> dict[int, Tensor]:
    """The whole sequences that enter the blocks of ``backbone`` for one batch, prefix tokens first.

    Args:
        backbone: a timm ``VisionTransformer``.
        images: ``[B, 3, H, W]``.
        layers: which blocks in ``0 .. L-1``; ``None`` is all. Blocks beyond the last one are not run.

    Returns:
        ``{i: [B, N, D]}`` in ascending order, in the dtype and on the device of the backbone.

    Raises:
        InputError: images of the wrong shape, with NaN or infinite values, or an unknown layer.
    """
    depth = len(check_backbone(backbone).blocks)
    wanted = sorted(range(depth) if layers is None else set(layers))
    if not wanted or wanted[0] < 0 or wanted[-1] >= depth:
        raise InputError(f"layers must be some of 0 .. {depth - 1}, got {wanted}")
    check_images(backbone, images)
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if not finite.all():
        raise InputError(
            f"images hold NaN or infinite values, first in row {int((~finite).nonzero()[0])} of the batch"
        )

    first = next(backbone.parameters())
    x = embed(backbone, images.to(first.device, first.dtype, non_blocking=True))
    captured = {}
    for index in range(wanted[-1] + 1):
        if index in wanted:
            captured[index] = x
        if index < wanted[-1]:
            x = backbone.blocks[index](x)
    return captured


def stream_layer_tokens(
    backbone: VisionTransformer,
    images: Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    layers: Collection[int] | None = None,
    capture: Capture = "paper",
) -> Iterator[dict[int, Tensor]]:
    """:func:`layer_tokens` of batch after batch; only one batch per layer is alive at a time.

    Args:
        images: an iterable of ``[B, 3, H, W]`` tensors or ``(images, labels)`` pairs, for example a DataLoader.

    Raises:
        InputError: as :func:`layer_tokens`, naming the batch.
    """
    for index, batch in enumerate(image_batches(images)):
        if len(batch):
            try:
                yield layer_tokens(backbone, batch, layers=layers, capture=capture)
            except InputError as error:
                raise InputError(f"batch {index}: {error}") from error


def image_batches(images: Iterable[Tensor | tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """The images of an iterable of batches, with or without labels."""
    for batch in images:
        first = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
        if not isinstance(first, Tensor):
            raise InputError(
                f"images must yield tensors [B, 3, H, W] or (images, labels) pairs, got {type(first).__name__}"
            )
        yield first
