"""Full fine-tuning: every weight of the backbone learns."""

from __future__ import annotations

from typing import ClassVar

from spt_fast.methods.own_backbone import LearningBackboneViT


class FullViT(LearningBackboneViT):
    """A backbone all of whose weights learn, with a linear head; the caller's own backbone stays as it is.

    An adapter of it is as large as the backbone. See :class:`~spt_fast.tuned_vit.TunedViT` for the arguments.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = FullViT(backbone, num_classes=10)
        >>> all(value.requires_grad for value in model.parameters())
        True
    """

    name: ClassVar[str] = "full"

    @staticmethod
    def learns(name: str) -> bool:
        return True
