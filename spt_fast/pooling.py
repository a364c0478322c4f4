"""From the tokens that leave the last block to what the head sees."""

from __future__ import annotations

from typing import Literal

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast.backbones import final_norm

Pool = Literal["token", "avg", "avg_with_prompts"]

# timm's ways to a head that read prefix tokens alone when the pooling is "token".
PREFIX_HEADS = (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head)


def pooled(
    backbone: VisionTransformer, pool: Pool | None, x: Tensor, prompt_outputs: Tensor | None = None
) -> Tensor:
    """What the head sees.

    Args:
        backbone: the model whose last block made the tokens.
        pool: as for :class:`~spt_fast.PromptedViT`.
        x: prefix tokens, then patch tokens ``[B, N, D]``; prefix tokens alone will do where
            :func:`reads_prefix_only`.
        prompt_outputs: ``[B, P, D]``; only read by ``"avg_with_prompts"``.

    Returns:
        ``[B, D]``.
    """
    if pool is None:
        return backbone.forward_head(backbone.norm(x), pre_logits=True)
    if pool == "token":
        return final_norm(backbone)(x[:, 0])
    if pool == "avg":
        return final_norm(backbone)(x[:, backbone.num_prefix_tokens :].mean(dim=1))
    assert prompt_outputs is not None
    averaged = x[:, 1:] if backbone.has_class_token else x
    return final_norm(backbone)(torch.cat([prompt_outputs, averaged], dim=1).mean(dim=1))


def reads_prefix_only(backbone: VisionTransformer, pool: Pool | None) -> bool:
    """Whether :func:`pooled` looks at no token behind the prefix tokens (class, distillation, registers)."""
    if pool is not None:
        return pool == "token"
    plain_head = type(backbone).forward_head in PREFIX_HEADS
    return plain_head and backbone.global_pool == "token" and backbone.attn_pool is None
