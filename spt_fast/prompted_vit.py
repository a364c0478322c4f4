"""PromptedViT: a frozen vision transformer, a few learnable prompts, and a linear head.

The deep form is exact but does less than it looks: prompts are no rows of the sequence (see
:mod:`spt_fast.prompted_block`), the last block computes only the rows that the pooling reads, and no gradient flows
into the tokens that enter the first block.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast.arguments import check_flag, check_share
from spt_fast.backbones import check_backbone
from spt_fast.errors import InputError
from spt_fast.pooling import Pool, reads_prefix_only
from spt_fast.prompted_block import PromptKeysValues, prompt_keys_values, prompted_block
from spt_fast.prototypes import Prototypes
from spt_fast.tuned_vit import TunedViT


class DeepPromptedViT(TunedViT):
    """What methods with prompts before every block have in common; they override :meth:`block_prompts`.

    See :class:`~spt_fast.tuned_vit.TunedViT` for the arguments.
    """

    takes_prompts: ClassVar[bool] = True

    def encode(self, images: Tensor, *, every_token: bool) -> tuple[Tensor, Tensor | None]:
        """Eq. 6/13. Returns the image's own tokens, of the last block only those that are read, and the last block's
        prompt outputs where the pooling reads them."""
        x = self.embed(images)
        last = len(self.backbone.blocks) - 1
        for index in range(last):
            x = self._run(index, x, self.block_prompts(index, x))
        prompts = self.block_prompts(last, x)
        num_tokens = x.shape[1]
        if self.pool == "avg_with_prompts":
            x = self._run(last, x, prompts, torch.cat([x, prompts.expand(x.shape[0], -1, -1)], dim=1))
            return x[:, :num_tokens], x[:, num_tokens:]
        if not every_token and reads_prefix_only(self.backbone, self.pool):
            return self._run(last, x, prompts, x[:, : self.backbone.num_prefix_tokens]), None
        return self._run(last, x, prompts), None

    def block_prompts(self, index: int, x: Tensor) -> Tensor:
        """The prompts of a block in the dtype of ``x``, the tokens ``[B, N, D]`` that enter it: ``[P, D]``, or
        ``[B, P, D]`` where they differ between images."""
        raise NotImplementedError

    def block_keys_values(self, index: int, block: Any, prompts: Tensor) -> PromptKeysValues:
        """What the tokens of a block attend to beside each other; called with the block's weights in place."""
        return prompt_keys_values(block, prompts)

    def _run(self, index: int, x: Tensor, prompts: Tensor, queries: Tensor | None = None) -> Tensor:
        return self.run_block(self._prompted_block, self.backbone.blocks[index], x, prompts, queries, index)

    def _prompted_block(
        self, block: Any, x: Tensor, prompts: Tensor, queries: Tensor | None, index: int
    ) -> Tensor:
        return prompted_block(block, x, self.block_keys_values(index, block, prompts), queries=queries)


class PromptedViT(DeepPromptedViT):
    """A frozen timm ViT with learnable prompts (SPT, VPT) and a linear classifier.

    Args:
        backbone: a timm ``VisionTransformer``; it is frozen, put in eval mode and kept there.
        prompts: where the prompts start: a :class:`~spt_fast.Prototypes` or a tensor ``[L, P, D]`` (deep: fresh prompts
            for every block, Eq. 6/13) or ``[1, P, D]`` (shallow: prompts enter the first block and travel through all
            of them, Eq. 4-5/11-12). Copied, as float32 unless it is float64.
        num_classes: outputs of ``model.head``.
        pool: what the head sees, see :class:`~spt_fast.tuned_vit.TunedViT`.
        train_prompts: ``False`` keeps the prompts as they are and trains the head alone (Table 4a).
        prompt_dropout: dropout on the prompts' entries in training, drawn for every image as in VPT.
        checkpoint_blocks: less memory, for a second forward pass, see :class:`~spt_fast.tuned_vit.TunedViT`.

    Attributes:
        prompts: the one parameter of learnable prompts, ``[L, P, D]`` or ``[1, P, D]``.
        head: ``nn.Linear(D, num_classes)``.
        compile_mode: how it runs: ``"eager"``, or a mode of ``torch.compile`` (see :meth:`compile`).
        classes: names of the outputs, where they are known (after :func:`spt_fast.load_adapter`), else ``None``.

    Raises:
        UnsupportedModelError: the backbone cannot be prompted.
        InputError: prompts that do not fit the backbone, an unknown ``pool``, ``num_classes < 1``.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = PromptedViT(backbone, torch.randn(2, 5, 192), num_classes=10, pool="avg")
        >>> model(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 10])
    """

    name: ClassVar[str] = "prompted"

    def __init__(
        self,
        backbone: VisionTransformer,
        prompts: Prototypes | Tensor,
        *,
        num_classes: int,
        pool: Pool | None = None,
        train_prompts: bool = True,
        prompt_dropout: float = 0.0,
        checkpoint_blocks: bool = False,
    ) -> None:
        check_backbone(backbone)
        values = prompt_values(prompts, backbone)
        check_share("prompt_dropout", prompt_dropout)
        check_flag("train_prompts", train_prompts)
        super().__init__(backbone, num_classes=num_classes, pool=pool, checkpoint_blocks=checkpoint_blocks)
        self.prompts = nn.Parameter(values.to(self.device, copy=True), requires_grad=train_prompts)
        self.prompt_dropout = nn.Dropout(prompt_dropout)

    @property
    def num_prompts(self) -> int:
        """Prompt tokens per block, ``P``."""
        return self.prompts.shape[1]

    @property
    def deep(self) -> bool:
        """Whether every block has prompts of its own."""
        return self.prompts.shape[0] == len(self.backbone.blocks)

    @property
    def options(self) -> dict[str, Any]:
        return {"train_prompts": self.prompts.requires_grad, "prompt_dropout": self.prompt_dropout.p}

    def encode(self, images: Tensor, *, every_token: bool) -> tuple[Tensor, Tensor | None]:
        if self.deep:
            return super().encode(images, every_token=every_token)
        return self._shallow(self.embed(images))

    def block_prompts(self, index: int, x: Tensor) -> Tensor:
        prompts = self.prompts[index]
        if self.training and self.prompt_dropout.p > 0:
            prompts = self.prompt_dropout(prompts.expand(x.shape[0], -1, -1))
        return prompts.to(x.dtype)

    def _shallow(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 4-5/11-12: prompts are ordinary rows of the sequence all the way, so none of theirs can be left out.
        They stand behind the others: attention does not look at the order of its rows."""
        num_tokens = x.shape[1]
        x = torch.cat([x, self.block_prompts(0, x).expand(x.shape[0], -1, -1)], dim=1)
        for block in self.backbone.blocks:
            x = self.run_block(prompted_block, block, x)
        return x[:, :num_tokens], x[:, num_tokens:]


def prompt_values(prompts: Prototypes | Tensor, backbone: VisionTransformer) -> Tensor:
    """What prompts start from, checked, as float32 unless it is float64."""
    values = prompts.values if isinstance(prompts, Prototypes) else prompts
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise InputError(
            f"prompts must be Prototypes or a floating point tensor, got {type(values).__name__}"
        )
    depth, width = len(backbone.blocks), backbone.embed_dim
    if (
        values.ndim != 3
        or values.shape[0] not in (1, depth)
        or values.shape[1] < 1
        or values.shape[2] != width
    ):
        raise InputError(
            f"prompts must be [{depth}, P, {width}] (deep) or [1, P, {width}] (shallow) with P >= 1 for this backbone, "
            f"got {list(values.shape)}"
        )
    if not torch.isfinite(values).all():
        raise InputError("prompts hold NaN or infinite values")
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
