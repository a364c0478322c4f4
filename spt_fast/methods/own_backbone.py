"""A backbone that a task may change: a copy in structure, sharing the weights that stay frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from spt_fast.backbones import CLASSIFIER_PREFIXES, backbone_identity, source_of
from spt_fast.errors import UnsupportedModelError
from spt_fast.pooling import Pool
from spt_fast.sharded_block import is_sharded
from spt_fast.tuned_vit import TunedViT


def own_backbone(
    backbone: VisionTransformer, learns: Callable[[str], bool] = lambda name: False
) -> VisionTransformer:
    """A copy whose modules can be replaced and whose chosen weights learn, while the original stays as it is.

    Args:
        backbone: the model.
        learns: which parameters learn, by name; these are copied, the others shared. timm's own classifier never does.
            Where any do, the copy is float32 at least: steps of training are too small for 16 bits, and layers do not
            mix dtypes.

    Returns:
        The copy. To adapters it is the same backbone as the original; no other model can be built on it.

    Raises:
        UnsupportedModelError: a backbone of 8-bit weights or one that is sharded, whose weights cannot learn.
    """
    if is_sharded(backbone):
        raise UnsupportedModelError(
            "the backbone is sharded, and this method changes its blocks; do not shard it"
        )
    if source_of(backbone)["weight_dtype"] is not None:
        raise UnsupportedModelError(
            "the backbone has 8-bit weights, and this method changes it; load it without weight_dtype"
        )

    learning = {
        name
        for name, _ in backbone.named_parameters()
        if learns(name) and not name.startswith(CLASSIFIER_PREFIXES)
    }
    own: dict[int, nn.Parameter] = {}
    for name, value in backbone.named_parameters():
        dtype = torch.promote_types(value.dtype, torch.float32) if learning else value.dtype
        if name in learning:
            own[id(value)] = nn.Parameter(value.detach().to(dtype, copy=True))
        elif value.dtype == dtype:
            own[id(value)] = value
        else:
            own[id(value)] = nn.Parameter(value.detach().to(dtype), requires_grad=False)
    # deepcopy takes what the memo holds instead of copying it.
    copied = copy.deepcopy(backbone, own)
    copied.spt_fast_identity = backbone_identity(backbone)  # type: ignore[assignment]
    copied.spt_fast_changes = True  # type: ignore[assignment]
    return copied


class LearningBackboneViT(TunedViT):
    """A model that adds nothing: some of the backbone's own weights learn, in a copy of it.

    See :class:`~spt_fast.tuned_vit.TunedViT` for the arguments; a method says which weights in :meth:`learns`.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        num_classes: int,
        pool: Pool | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__(backbone, num_classes=num_classes, pool=pool, checkpoint_blocks=checkpoint_blocks)

        def learns(name: str) -> bool:
            # timm's own pooling alone reads it; under another it would never get a gradient.
            unread = pool is not None and name.startswith("attn_pool.")
            return self.learns(name) and not unread

        self.backbone = own_backbone(backbone, learns)

    @staticmethod
    def learns(name: str) -> bool:
        """Whether the parameter of this name learns."""
        raise NotImplementedError
