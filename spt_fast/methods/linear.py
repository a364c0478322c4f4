"""Linear probing: nothing is added, the head alone learns."""

from __future__ import annotations

from typing import ClassVar

from spt_fast.tuned_vit import TunedViT


class LinearViT(TunedViT):
    """A frozen backbone with a linear head; see :class:`~spt_fast.tuned_vit.TunedViT` for its arguments.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> list(LinearViT(backbone, num_classes=10).task_state())
        ['head.weight', 'head.bias']
    """

    name: ClassVar[str] = "linear"
