"""Adapters (Houlsby et al. 2019): a small bottleneck behind the frozen sublayers of every block."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast.arguments import check_whole_number
from spt_fast.errors import InputError
from spt_fast.pooling import Pool
from spt_fast.tuned_vit import TunedViT

Placement = Literal["pfeiffer", "houlsby"]


class Bottleneck(nn.Module):
    """``h + W_up GELU(W_down h + b_down) + b_up`` on tokens ``[B, N, D]``, which starts as the identity.

    Args:
        embed_dim: ``D``.
        width: rows of ``W_down``.
    """

    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(embed_dim, width)
        self.up = nn.Linear(width, embed_dim)
        nn.init.xavier_uniform_(self.down.weight)
        for start_at_zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start_at_zero)

    def forward(self, h: Tensor) -> Tensor:
        down = F.linear(h, self.down.weight.to(h.dtype), self.down.bias.to(h.dtype))
        return h + F.linear(F.gelu(down), self.up.weight.to(h.dtype), self.up.bias.to(h.dtype))


class AdapterViT(TunedViT):
    """A frozen backbone with a trained bottleneck ``A`` behind its sublayers, before their residual connection.

    With ``"houlsby"`` (Houlsby et al. 2019) a block is, of its tokens ``x``,

        ``x <- x + A_1(Attention(LN(x)))``, then ``x <- x + A_2(MLP(LN(x)))``;

    with ``"pfeiffer"`` (Pfeiffer et al. 2020) there is ``A_2`` alone, which does about as well with half of the
    parameters, and is what VPT and SPT compare with.

    Args:
        backbone: see :class:`~spt_fast.tuned_vit.TunedViT`, like all that is not explained here.
        bottleneck: width inside an adapter; VPT divides ``D`` by 8, 64 or 256, and 768 / 64 = 12 gives the number of
            parameters in Tables 3 and S4.
        placement: ``"pfeiffer"`` or ``"houlsby"``.

    Raises:
        InputError: a bottleneck below 1, or an unknown placement.

    Example:
        >>> import torch
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = AdapterViT(backbone, num_classes=10, bottleneck=4)
        >>> model(torch.randn(4, 3, 32, 32)).shape, len(model.added_parameters())
        (torch.Size([4, 10]), 8)
    """

    name: ClassVar[str] = "adapter"

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        num_classes: int,
        bottleneck: int = 12,
        placement: Placement = "pfeiffer",
        pool: Pool | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        check_whole_number("bottleneck", bottleneck)
        if placement not in get_args(Placement):
            raise InputError(f"placement must be one of {', '.join(get_args(Placement))}, got {placement!r}")
        super().__init__(backbone, num_classes=num_classes, pool=pool, checkpoint_blocks=checkpoint_blocks)
        self.bottleneck = bottleneck
        self.placement = placement

        def adapters() -> nn.ModuleList:
            return nn.ModuleList(Bottleneck(backbone.embed_dim, bottleneck) for _ in backbone.blocks).to(
                self.device
            )

        self.after_attention = adapters() if placement == "houlsby" else None
        self.after_mlp = adapters()

    @property
    def options(self) -> dict[str, Any]:
        return {"bottleneck": self.bottleneck, "placement": self.placement}

    def block(self, block: Any, x: Tensor, index: int) -> Tensor:
        attended = block.ls1(block.attn(block.norm1(x)))
        x = x + (attended if self.after_attention is None else self.after_attention[index](attended))
        return x + self.after_mlp[index](block.ls2(block.mlp(block.norm2(x))))
