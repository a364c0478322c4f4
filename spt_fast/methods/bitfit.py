"""BitFit (Zaken et al. 2022), "Bias" in Table 3: the backbone's bias vectors learn, and nothing else in it."""

from __future__ import annotations

from typing import ClassVar

from timm.models.vision_transformer import VisionTransformer

from spt_fast.methods.own_backbone import own_backbone
from spt_fast.pooling import Pool
from spt_fast.tuned_vit import TunedViT


class BitFitViT(TunedViT):
    """A backbone whose biases learn (of Linear layers, LayerNorms and the patch embedding), with a linear head.

    See :class:`~spt_fast.tuned_vit.TunedViT` for the arguments.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
        >>> list(BitFitViT(backbone, num_classes=10).added_parameters())[:3]
        ['backbone.patch_embed.proj.bias', 'backbone.blocks.0.norm1.bias', 'backbone.blocks.0.attn.qkv.bias']
    """

    name: ClassVar[str] = "bitfit"

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        num_classes: int,
        pool: Pool | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__(backbone, num_classes=num_classes, pool=pool, checkpoint_blocks=checkpoint_blocks)
        self.backbone = own_backbone(backbone, lambda name: name.endswith("bias"))
