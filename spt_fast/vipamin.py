"""VIPAMIN: prompts that start where a block's attention looks, and partly where its outputs do not reach.

Park and Chung, "VIPAMIN: Visual Prompt Initialization via Embedding Selection and Subspace Expansion", NeurIPS 2025
(arXiv 2510.16446). From random prompts and one batch of images, block by block:

*matching* replaces each prompt by the mean of the patch positions whose keys are nearest to its own key;
*orthogonalising* takes from its value what the block's own attention outputs can express already.

A start is ``(1 - lambda) * matched + lambda * orthogonal``. What the paper's formulas leave open is chosen so: tokens
are those that enter each block of the backbone without prompts, as for every other start; keys are taken as attention
compares them, behind the block's first norm; values with their bias, but as in the paper's formula without that norm,
so that what comes back through the pseudo-inverse is again a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from spt_fast.errors import InputError
from spt_fast.low_precision import EightBitLinear
from spt_fast.prompted_block import prompt_keys_values
from spt_fast.tokens import block_inputs

# The most positions that a prompt is the mean of, unless somebody says otherwise; the paper tries 2, 8, 32 and 128.
NEIGHBORS = 32


class Vipamin(NamedTuple):
    """Starts of one block.

    Attributes:
        values: float64 ``[P, D]``.
        free_dimensions: of how many dimensions the space is that the block's attention outputs leave free.
    """

    values: Tensor
    free_dimensions: int


def vipamin(
    block: Any, prompts: Tensor, tokens: Tensor, *, neighbors: int, weight: float, num_prefix_tokens: int = 0
) -> Vipamin:
    """Matching and orthogonalising together, of one block.

    Args:
        block: timm's pre-norm ``Block``, in eval mode.
        prompts: random ones, ``[P, D]``.
        tokens: what enters the block, ``[B, N, D]``, prefix tokens first.
        neighbors: ``k``, of how many positions a matched prompt is the mean.
        weight: ``lambda`` in ``[0, 1]``, the share of the orthogonal part.
        num_prefix_tokens: how many of the ``N`` positions are no patches; prompts are not matched to these.

    Raises:
        InputError: more neighbours than patches.
    """
    averages = matched(block, prompts, tokens, neighbors=neighbors, num_prefix_tokens=num_prefix_tokens)
    basis = output_basis(block, tokens)
    beyond = orthogonal(block, prompts, basis)
    return Vipamin((1 - weight) * averages + weight * beyond, len(basis) - basis.shape[1])


@torch.no_grad()
def matched(
    block: Any, prompts: Tensor, tokens: Tensor, *, neighbors: int, num_prefix_tokens: int = 0
) -> Tensor:
    """Each prompt's mean of the ``k`` patch positions with the nearest keys, float64 ``[P, D]``.

    A position's token is its mean over the batch, a key the mean over heads and batch, and the nearest are those of the
    highest cosine.

    Args:
        block, prompts, tokens, neighbors, num_prefix_tokens: as :func:`vipamin` takes them.

    Raises:
        InputError: more neighbours than patches.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
        >>> tokens = torch.randn(2, 16, 192)
        >>> everywhere = matched(backbone.blocks[0], torch.randn(5, 192), tokens, neighbors=16)
        >>> torch.allclose(everywhere.float(), tokens.mean(dim=(0, 1)).expand(5, -1), atol=1e-5)
        True
    """
    patches = tokens[:, num_prefix_tokens:]
    if not 1 <= neighbors <= patches.shape[1]:
        raise InputError(
            f"vipamin_neighbors must be from 1 to the {patches.shape[1]} patches of an image, got {neighbors}"
        )
    prompt_keys = prompt_keys_values(block, prompts.to(tokens)).keys.mean(dim=0, dtype=torch.float64)
    keys = prompt_keys_values(block, patches).keys.mean(dim=(0, 1), dtype=torch.float64)
    cosines = F.normalize(prompt_keys, dim=1) @ F.normalize(keys, dim=1).T
    nearest = cosines.topk(neighbors, dim=1).indices
    return patches.mean(dim=0, dtype=torch.float64)[nearest].mean(dim=1)


@torch.no_grad()
def output_basis(block: Any, tokens: Tensor) -> Tensor:
    """An orthonormal basis of what the block's attention gives, float64 ``[D, r]``.

    It spans the attention outputs of all ``N`` positions, prefix tokens among them, heads side by side before the
    output projection, averaged over the batch; ``r`` is their rank, at most ``N``.

    Args:
        block: timm's pre-norm ``Block``, in eval mode.
        tokens: ``[B, N, D]``.
    """
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, -1)).transpose(1, 3).unbind(2)
    out = F.scaled_dot_product_attention(attn.q_norm(q).to(v), attn.k_norm(k).to(v), v, scale=attn.scale)
    outputs = out.mean(dim=0, dtype=torch.float64).transpose(0, 1).flatten(1)
    left, sizes, _ = torch.linalg.svd(outputs.T, full_matrices=False)
    return left[:, sizes > _smallest(outputs) * sizes[0]]


@torch.no_grad()
def orthogonal(block: Any, prompts: Tensor, basis: Tensor) -> Tensor:
    """Prompts whose values are those of ``prompts`` without their part in ``basis``, float64 ``[P, D]``.

    The value of a prompt ``p`` is ``W_V p + b_V``. What is left of it, ``(I - V V^T)(W_V p + b_V)``, goes back through
    the pseudo-inverse of ``W_V``; where ``W_V`` has full rank, the values of the result are orthogonal to the basis. A
    basis of the whole space leaves nothing: the results are all the same then, the prompt whose value is nearest to 0.

    Args:
        block: timm's ``Block``.
        prompts: ``[P, D]``.
        basis: ``V``, orthonormal ``[D, r]``.
    """
    weight, bias = _value_projection(block.attn.qkv)
    values = prompts.double() @ weight.T + bias
    left_over = values - (values @ basis) @ basis.T
    return (left_over - bias) @ torch.linalg.pinv(weight, rtol=_smallest(weight)).T


def vipamin_starts(
    backbone: VisionTransformer,
    images: Tensor,
    prompts: Sequence[Tensor],
    *,
    layers: Sequence[int],
    neighbors: int | None = None,
    weight: float,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Starts for some blocks of a backbone from one batch of images.

    Args:
        backbone: the frozen timm ViT.
        images: ``[B, 3, H, W]``.
        prompts: random ones, ``[layers, P, D]`` each; all are made from one pass over the images.
        layers: of which blocks, in ascending order.
        neighbors: as :func:`vipamin` takes it; ``None``: 32, or all patches of an image if it has fewer.
        weight: as :func:`vipamin` takes it.

    Returns:
        The starts, float32 ``[layers, P, D]`` for each of ``prompts``, and what there is to know about them.

    Raises:
        InputError: more neighbours than patches, or images that do not suit the backbone.
    """
    inputs = block_inputs(backbone, images, layers=layers)
    num_prefix_tokens = backbone.num_prefix_tokens
    patches = inputs[layers[0]].shape[1] - num_prefix_tokens
    neighbors = min(NEIGHBORS, patches) if neighbors is None else neighbors
    numbers = [each.shape[1] for each in prompts]
    starts = [
        vipamin(
            backbone.blocks[layer],
            torch.cat([each[row] for each in prompts]),
            inputs[layer],
            neighbors=neighbors,
            weight=weight,
            num_prefix_tokens=num_prefix_tokens,
        )
        for row, layer in enumerate(layers)
    ]
    facts = {
        "tokens": len(images) * patches,
        "vipamin_neighbors": neighbors,
        "vipamin_free_dimensions": [start.free_dimensions for start in starts],
    }
    values = torch.stack([start.values for start in starts]).float()
    return list(values.split(numbers, dim=1)), facts


def _value_projection(qkv: Any) -> tuple[Tensor, Tensor | float]:
    """The weight ``W_V`` ``[D, D]`` and the bias ``[D]`` of values, float64, of a plain or an 8-bit layer."""
    first = 2 * qkv.out_features // 3
    stored = qkv.numbers.double() * qkv.scale if isinstance(qkv, EightBitLinear) else qkv.weight.double()
    return stored[first:], 0.0 if qkv.bias is None else qkv.bias[first:].double()


def _smallest(matrix: Tensor) -> float:
    """Below which share of the greatest a singular value is taken for rounding, of a matrix that came from float32."""
    return max(matrix.shape) * torch.finfo(torch.float32).eps
