"""A backbone that a task may change: a copy in structure, sharing the weights that stay frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from spt_fast.backbones import CLASSIFIER_PREFIXES, backbone_identity, source_of
from spt_fast.errors import InputError
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

    Returns:
        The copy. To adapters it is the same backbone as the original.

    Raises:
        InputError: a backbone of 8-bit weights or one that is sharded, whose weights cannot learn.
    """
    if is_sharded(backbone):
        raise InputError("the backbone is sharded, and this method changes its blocks; do not shard it")
    if source_of(backbone)["weight_dtype"] is not None:
        raise InputError(
            "the backbone has 8-bit weights, and this method changes it; load it without weight_dtype"
        )

    def chosen(name: str) -> bool:
        return learns(name) and not name.startswith(CLASSIFIER_PREFIXES)

    # deepcopy takes what the memo holds instead of copying it.
    shared: dict[int, Any] = {
        id(value): value for name, value in backbone.named_parameters() if not chosen(name)
    }
    copied = copy.deepcopy(backbone, shared)
    copied.spt_fast_identity = backbone_identity(backbone)  # type: ignore[assignment]
    for name, value in copied.named_parameters():
        if chosen(name):
            value.requires_grad_()
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
        self.backbone = own_backbone(backbone, self.learns)

    @staticmethod
    def learns(name: str) -> bool:
        """Whether the parameter of this name learns."""
        raise NotImplementedError
