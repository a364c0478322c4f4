"""E2VPT (Han et al. 2023, "E2VPT: An Effective and Efficient Approach for Visual Prompt Tuning")."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast.arguments import check_whole_number
from spt_fast.errors import InputError
from spt_fast.pooling import Pool
from spt_fast.prompted_block import PromptKeysValues, prompt_keys_values
from spt_fast.prompted_vit import PromptedViT
from spt_fast.prototypes import Prototypes


class E2VPTViT(PromptedViT):
    """Deep input prompts, and key-value prompts inside the attention of every block.

    Block ``i`` sees fresh prompts ``P_i`` in its input, as in VPT-Deep, and its attention, behind all projections, one
    set of learnable rows ``P_kv`` that keys and values share::

        K' = [P_kv, K]    V' = [P_kv, V]    softmax(Q K'^T / sqrt(d)) V'

    Every input prompt is cut into ``S`` equal segments, each multiplied by its entry in ``segment_mask``, 1 or 0, which
    all blocks share. A pruned segment is zero; a pruned prompt is gone: :mod:`spt_fast.pruned_training`, which
    chooses both, makes a model of the prompts that are left.

    Args:
        backbone: a timm ``VisionTransformer``, see :class:`~spt_fast.PromptedViT`.
        prompts: where the input prompts start, :class:`~spt_fast.Prototypes` or a tensor ``[L, P, D]``.
        num_classes: outputs of ``model.head``.
        pool: what the head sees, see :class:`~spt_fast.tuned_vit.TunedViT`.
        num_key_value_prompts: rows of ``P_kv`` in each block.
        num_segments: ``S``, a divisor of ``D``.
        train_prompts: ``False`` keeps the input prompts as they are.
        prompt_dropout: dropout on the input prompts' entries in training.
        checkpoint_blocks: less memory, for a second forward pass.

    Attributes:
        key_value_prompts: ``[L, H, num_key_value_prompts, d]``, from a normal distribution of deviation 0.02.
        segment_mask: ``[P, S]``, does not learn.

    Raises:
        InputError: numbers or prompts that do not fit, and as :class:`~spt_fast.PromptedViT`.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = E2VPTViT(backbone, torch.randn(2, 5, 192), num_classes=10)
        >>> {name: tuple(value.shape) for name, value in model.task_state().items() if "head" not in name}
        {'prompts': (2, 5, 192), 'key_value_prompts': (2, 3, 5, 64), 'segment_mask': (5, 8)}
    """

    name: ClassVar[str] = "e2vpt"

    def __init__(
        self,
        backbone: VisionTransformer,
        prompts: Prototypes | Tensor,
        *,
        num_classes: int,
        pool: Pool | None = None,
        num_key_value_prompts: int = 5,
        num_segments: int = 8,
        train_prompts: bool = True,
        prompt_dropout: float = 0.0,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__(
            backbone,
            prompts,
            num_classes=num_classes,
            pool=pool,
            train_prompts=train_prompts,
            prompt_dropout=prompt_dropout,
            checkpoint_blocks=checkpoint_blocks,
        )
        depth, width = len(backbone.blocks), backbone.embed_dim
        if not self.deep:
            raise InputError(
                f"e2vpt takes deep prompts [{depth}, P, {width}], got {list(self.prompts.shape)}"
            )
        check_whole_number("num_key_value_prompts", num_key_value_prompts)
        check_whole_number("num_segments", num_segments)
        if width % num_segments:
            raise InputError(f"num_segments must divide the width {width}, got {num_segments}")
        attn: Any = backbone.blocks[0].attn
        head_width = attn.qkv.out_features // (3 * attn.num_heads)
        shape = (depth, attn.num_heads, num_key_value_prompts, head_width)
        self.key_value_prompts = nn.Parameter(torch.empty(shape, device=self.device))
        nn.init.trunc_normal_(self.key_value_prompts, std=0.02)
        self.segment_mask = nn.Parameter(
            torch.ones(self.num_prompts, num_segments, device=self.device), requires_grad=False
        )

    @property
    def options(self) -> dict[str, Any]:
        segments, key_values = self.segment_mask.shape[1], self.key_value_prompts.shape[2]
        return {**super().options, "num_key_value_prompts": key_values, "num_segments": segments}

    def block_prompts(self, index: int, x: Tensor) -> Tensor:
        segments = super().block_prompts(index, x).unflatten(-1, (self.segment_mask.shape[-1], -1))
        # A mask for each image, [B, P, S], makes prompts for each image.
        return (segments * self.segment_mask.to(x.dtype)[..., None]).flatten(-2)

    def block_keys_values(self, index: int, block: Any, prompts: Tensor) -> PromptKeysValues:
        keys, values, *_ = prompt_keys_values(block, prompts)
        own = self.key_value_prompts[index].expand(*keys.shape[:-2], -1, -1)
        return PromptKeysValues(
            torch.cat([keys, own.to(keys.dtype)], dim=-2), torch.cat([values, own.to(values.dtype)], dim=-2)
        )
