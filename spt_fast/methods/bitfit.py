"""BitFit (Zaken et al. 2022), "Bias" in Table 3: the backbone's bias vectors learn, and nothing else in it."""

from __future__ import annotations

from typing import ClassVar

from spt_fast.methods.own_backbone import LearningBackboneViT


class BitFitViT(LearningBackboneViT):
    """A backbone whose biases learn (of Linear layers, LayerNorms and the patch embedding), with a linear head.

    See :class:`~spt_fast.tuned_vit.TunedViT` for the arguments.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
        >>> list(BitFitViT(backbone, num_classes=10).added_parameters())[:3]
        ['backbone.patch_embed.proj.bias', 'backbone.blocks.0.norm1.bias', 'backbone.blocks.0.attn.qkv.bias']
    """

    name: ClassVar[str] = "bitfit"

    @staticmethod
    def learns(name: str) -> bool:
        return name.endswith("bias")
