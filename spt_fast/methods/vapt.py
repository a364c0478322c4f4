"""VAPT (Le et al. 2025, arXiv 2501.18936): visual prompts that are functions of the image's own tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast.arguments import check_share, check_whole_number
from spt_fast.backbones import check_backbone
from spt_fast.errors import InputError
from spt_fast.pooling import Pool
from spt_fast.prompted_vit import DeepPromptedViT, prompt_values
from spt_fast.prototypes import Prototypes


class VaptViT(DeepPromptedViT):
    """Deep prompts that every image makes for itself, from the patch tokens that enter each block.

    In block ``i``, with its patch tokens ``X`` as a grid ``[h, w, D]``::

        X_conv = kernel_i * LayerNorm_i(X)          one K x K kernel for all channels, no padding
        G      = aggregation_i X_conv + bias_i      [P, (h - K + 1)(w - K + 1)] over positions, from zero
        P_i    = G + up relu(down G) + prompts_i    down [r, D] and up [D, r] are shared by all blocks

    The prompts enter the block as those of VPT do, in front of its first norm. Kernel and aggregation are both linear
    over positions and the same for all channels, so the two are one matrix ``[P, h w]`` for the whole batch, and the
    convolved tokens are never made. The authors' code keeps VPT's fixed prompts in the first block; here all are alike.

    Args:
        backbone: a timm ``VisionTransformer``, see :class:`~spt_fast.PromptedViT`.
        prompts: a bias ``[L, P, D]`` that is added to the prompts and learns with them, for example prototypes;
            ``None``: there is none.
        num_prompts: ``P`` where ``prompts`` is ``None``.
        num_classes: outputs of ``model.head``.
        pool: what the head sees, see :class:`~spt_fast.tuned_vit.TunedViT`.
        kernel_size: ``K``.
        hidden_dim: ``r``.
        channel_dropout: share of the channels of the aggregated tokens that training leaves out, drawn for every image.
        checkpoint_blocks: less memory, for a second forward pass.

    Attributes:
        token_projectors: LayerNorm, kernel and aggregation of each block.
        down: ``nn.Linear(D, r)``, without bias.
        up: ``nn.Linear(r, D)``, without bias.
        prompts: ``[L, P, D]`` or ``None``.

    Raises:
        InputError: prompts or numbers that do not fit, images whose grid of patches is not the backbone's own.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = VaptViT(backbone, num_prompts=5, num_classes=10)
        >>> model(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 10])
    """

    name: ClassVar[str] = "vapt"

    def __init__(
        self,
        backbone: VisionTransformer,
        prompts: Prototypes | Tensor | None = None,
        *,
        num_prompts: int | None = None,
        num_classes: int,
        pool: Pool | None = None,
        kernel_size: int = 3,
        hidden_dim: int = 8,
        channel_dropout: float = 0.1,
        checkpoint_blocks: bool = False,
    ) -> None:
        check_backbone(backbone)
        depth, width = len(backbone.blocks), backbone.embed_dim
        if (prompts is None) == (num_prompts is None):
            raise InputError("vapt takes either prompts or num_prompts, got both or neither")
        bias = None if prompts is None else prompt_values(prompts, backbone)
        if bias is not None and len(bias) != depth:
            raise InputError(f"vapt takes deep prompts [{depth}, P, {width}], got {list(bias.shape)}")
        if num_prompts is not None:
            check_whole_number("num_prompts", num_prompts)
        grid: tuple[int, int] = backbone.patch_embed.grid_size
        check_whole_number("kernel_size", kernel_size)
        if kernel_size > min(grid):
            raise InputError(
                f"kernel_size must be from 1 to {min(grid)}, the patches in a row, got {kernel_size}"
            )
        check_whole_number("hidden_dim", hidden_dim)
        check_share("channel_dropout", channel_dropout)
        super().__init__(backbone, num_classes=num_classes, pool=pool, checkpoint_blocks=checkpoint_blocks)
        self.num_prompts: int = num_prompts if bias is None else bias.shape[1]  # type: ignore[assignment]
        self._options = {
            "kernel_size": kernel_size,
            "hidden_dim": hidden_dim,
            "channel_dropout": channel_dropout,
        }
        self.prompts: nn.Parameter | None = (
            None if bias is None else nn.Parameter(bias.to(self.device, copy=True))
        )
        self.token_projectors = nn.ModuleList(
            TokenProjector(grid, width, self.num_prompts, kernel_size, channel_dropout) for _ in range(depth)
        ).to(self.device)
        self.down = nn.Linear(width, hidden_dim, bias=False).to(self.device)
        self.up = nn.Linear(hidden_dim, width, bias=False).to(self.device)

    @property
    def options(self) -> dict[str, Any]:
        number = {} if self.prompts is not None else {"num_prompts": self.num_prompts}
        return {**self._options, **number}

    def embed(self, images: Tensor) -> Tensor:
        x = super().embed(images)
        height, width = images.shape[2:]
        made_for = tuple(self.backbone.patch_embed.grid_size)
        grid = tuple(self.backbone.patch_embed.dynamic_feat_size((height, width)))
        # A kernel slides over rows and columns: as many patches in another shape are another grid.
        if grid != made_for:
            raise InputError(
                f"vapt was made for images of {made_for[0]} x {made_for[1]} patches and got images of "
                f"{grid[0]} x {grid[1]}"
            )
        return x

    def block_prompts(self, index: int, x: Tensor) -> Tensor:
        tokens = self.token_projectors[index](x[:, self.backbone.num_prefix_tokens :])
        down, up = self.down.weight.to(x.dtype), self.up.weight.to(x.dtype)
        prompts = tokens + F.linear(F.linear(tokens, down).relu(), up)
        return prompts if self.prompts is None else prompts + self.prompts[index].to(x.dtype)


class TokenProjector(nn.Module):
    """From the patch tokens of one block to as many vectors as there are prompts.

    Args:
        grid: patches in a column and in a row of the image.
        width: of the tokens, ``D``.
        num_prompts: ``P``.
        kernel_size: ``K``.
        channel_dropout: share of the channels that training leaves out.

    Attributes:
        norm: LayerNorm of the tokens.
        kernel: ``[1, 1, K, K]``, from a standard normal distribution.
        aggregation: ``[P, 1, h - K + 1, w - K + 1]``, from zero.
        bias: ``[P]``, from zero.
    """

    def __init__(
        self, grid: tuple[int, int], width: int, num_prompts: int, kernel_size: int, channel_dropout: float
    ) -> None:
        super().__init__()
        positions = [length - kernel_size + 1 for length in grid]
        self.norm = nn.LayerNorm(width)
        self.kernel = nn.Parameter(torch.randn(1, 1, kernel_size, kernel_size))
        self.aggregation = nn.Parameter(torch.zeros(num_prompts, 1, *positions))
        self.bias = nn.Parameter(torch.zeros(num_prompts))
        self.channel_dropout = nn.Dropout1d(channel_dropout)

    def forward(self, patches: Tensor) -> Tensor:
        """``[B, h w, D]`` to ``[B, P, D]``."""
        # The convolution's transpose takes it to the other side of the product.
        matrix = F.conv_transpose2d(self.aggregation, self.kernel).flatten(1)
        dtype = patches.dtype
        weight, bias = self.norm.weight.to(dtype), self.norm.bias.to(dtype)
        aggregated = matrix.to(dtype) @ F.layer_norm(patches, weight.shape, weight, bias, self.norm.eps)
        return self.channel_dropout(aggregated.mT).mT + self.bias.to(dtype)[:, None]
