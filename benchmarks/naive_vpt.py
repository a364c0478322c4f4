"""Visual prompt tuning by plain concatenation: slow, short, and the definition that the fast model is judged by.

Nothing here knows how the package computes a prompted ViT. A block is timm's own module, run on the sequence
`[prefix tokens, prompts, patch tokens]`; everything else is slicing and means.
"""

from typing import Any

import torch
from torch import Tensor, nn


def naive_forward(
    backbone: Any, prompts: Tensor, head: nn.Module, images: Tensor, *, pool: str | None = None
) -> Tensor:
    """Logits `[B, num_classes]` of a frozen timm ViT with prompts concatenated for every image.

    `prompts` is `[L, P, D]` (deep: every block gets its own prompts, their outputs are dropped) or `[1, P, D]`
    (shallow: the prompts enter the first block and travel through all of them). `pool` is None (timm's own head),
    `"token"`, `"avg"` or `"avg_with_prompts"`. Differentiable in everything; the dtype is the backbone's.
    """
    if backbone.training:
        raise ValueError("naive_forward: the backbone is in training mode; its dropouts must be off")
    prefix, prompt_outputs, patches = last_block_outputs(backbone, prompts, images)

    if pool is None:
        tokens = torch.cat([prefix, patches], dim=1)
        features = backbone.forward_head(backbone.norm(tokens), pre_logits=True)
    elif pool == "token":
        features = final_norm(backbone)(prefix)[:, 0]
    elif pool == "avg":
        features = final_norm(backbone)(patches.mean(dim=1))
    elif pool == "avg_with_prompts":
        tokens = torch.cat([prefix, prompt_outputs, patches], dim=1)
        without_class_token = tokens[:, 1:] if has_class_token(backbone) else tokens
        features = final_norm(backbone)(without_class_token.mean(dim=1))
    else:
        raise ValueError(f"naive_forward: unknown pool {pool!r}")
    return head(features)


def last_block_outputs(backbone: Any, prompts: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What leaves the last block, before any final norm: prefix tokens, prompts and patch tokens, each `[B, :, D]`."""
    tokens = backbone.patch_embed(images)
    tokens = backbone._pos_embed(tokens)
    tokens = backbone.patch_drop(tokens)
    tokens = backbone.norm_pre(tokens)

    num_prefix, num_prompts = backbone.num_prefix_tokens, prompts.shape[1]
    prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
    is_deep = len(prompts) == len(backbone.blocks)
    inserted = for_every_image(prompts[0], images)

    for index, block in enumerate(backbone.blocks):
        if is_deep:
            inserted = for_every_image(prompts[index], images)
        sequence = block(torch.cat([prefix, inserted, patches], dim=1))
        prefix = sequence[:, :num_prefix]
        inserted = sequence[:, num_prefix : num_prefix + num_prompts]
        patches = sequence[:, num_prefix + num_prompts :]
    return prefix, inserted, patches


def for_every_image(prompts: Tensor, images: Tensor) -> Tensor:
    """`[P, D]` -> `[B, P, D]`."""
    return torch.stack([prompts] * len(images))


def has_class_token(backbone: Any) -> bool:
    return backbone.cls_token is not None


def final_norm(backbone: Any) -> nn.Module:
    """timm puts its one final norm before the pooling (`norm`) or behind it (`fc_norm`); the other is an identity."""
    return backbone.fc_norm if isinstance(backbone.norm, nn.Identity) else backbone.norm
