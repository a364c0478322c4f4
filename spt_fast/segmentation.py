"""Semantic segmentation with a tuned ViT: a linear classifier of patches, brought up to the size of the image."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from spt_fast.arguments import check_whole_number
from spt_fast.errors import InputError
from spt_fast.tuned_vit import TunedViT


class SegmentationViT(nn.Module):
    """A tuned ViT that gives every pixel a class.

    ``model.head`` sees each patch by itself (a 1 x 1 convolution over the grid of patches), and its answers are
    interpolated between the middles of the patches. What learns is what learns in ``model``: for a
    :class:`~spt_fast.PromptedViT` prompts and head. So ``save_adapter(path, segmenter.model)`` stores the task, and
    ``SegmentationViT(load_adapter(path, backbone))`` has it back.

    Args:
        model: the tuned ViT; its pooling does not matter here.
        num_classes: gives ``model`` a new head with so many outputs; ``None`` takes the head that it has.

    Attributes:
        model: the tuned ViT.
        head: ``model.head``, ``nn.Linear(D, num_classes)``.

    Raises:
        InputError: ``model`` is no :class:`~spt_fast.tuned_vit.TunedViT`, or ``num_classes < 1``.

    Example:
        >>> import torch
        >>> from spt_fast import PromptedViT, load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = PromptedViT(backbone, torch.randn(2, 5, 192), num_classes=7)
        >>> SegmentationViT(model)(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 7, 32, 32])
    """

    def __init__(self, model: TunedViT, num_classes: int | None = None) -> None:
        super().__init__()
        if not isinstance(model, TunedViT):
            raise InputError(f"model must be a TunedViT such as PromptedViT, got {type(model).__name__}")
        if num_classes is not None:
            check_whole_number("num_classes", num_classes)
            old = model.head.weight
            model.head = nn.Linear(old.shape[1], num_classes, device=old.device, dtype=old.dtype)
            nn.init.trunc_normal_(model.head.weight, std=0.02)
            nn.init.zeros_(model.head.bias)
            model.classes = None
        self.model = model

    @property
    def head(self) -> nn.Linear:
        """The classifier of patches."""
        return self.model.head

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes, H, W]`` of ``images`` ``[B, 3, H, W]``."""
        features = self.model.forward_features(images, patch_grid=True)
        patches = self.head(features.movedim(1, -1).to(self.head.weight.dtype)).movedim(-1, 1)
        return F.interpolate(patches, size=images.shape[2:], mode="bilinear", align_corners=False)
