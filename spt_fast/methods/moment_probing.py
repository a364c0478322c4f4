"""Moment Probing (Gao et al., ICCV 2023): a linear head on first and second moments of the final tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast.arguments import check_whole_number
from spt_fast.backbones import final_norm
from spt_fast.errors import InputError
from spt_fast.pooling import Pool, pooled
from spt_fast.tuned_vit import TunedViT


class SecondMoments(nn.Module):
    """Multi-head convolutional cross-covariance: from tokens ``[B, N, D]`` to features ``[B, out_features]``.

    Tokens are projected to ``hidden`` dimensions and split into ``heads``, ``X_1 .. X_H`` of ``[N, w]``, each behind a
    LayerNorm. Neighbouring heads give ``C_h = X_h^T X_{h+1} / N`` ``[w, w]``, each column scaled to length 1; two
    convolutions with stride 2 reduce these ``H - 1`` maps. As in the authors' code one number is subtracted from all
    entries of ``X_h`` before the product, their mean.

    Args:
        embed_dim: ``D``.
        hidden: ``H w``.
        heads: ``H``.
    """

    def __init__(self, embed_dim: int, hidden: int, heads: int) -> None:
        super().__init__()
        width, maps = hidden // heads, heads - 1
        self.heads = heads
        self.project = nn.Linear(embed_dim, hidden)
        self.norm = nn.LayerNorm(width)
        self.reduce = nn.Sequential(
            nn.Conv2d(maps, maps, kernel_size=3, stride=2, bias=False),
            nn.GELU(),
            nn.Conv2d(maps, maps, kernel_size=3, stride=2, bias=False),
        )
        nn.init.trunc_normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)
        self.out_features = maps * _reduced(width) ** 2

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.project(tokens).unflatten(-1, (self.heads, -1)))
        x = x - x.mean(dim=(1, 3), keepdim=True)
        maps = torch.einsum("bnhi, bnhj -> bhij", x[:, :, :-1], x[:, :, 1:]) / x.shape[1]
        return self.reduce(F.normalize(maps, dim=2)).flatten(1)


class Recalibration(nn.Module):
    """Scale and shift of MP+ for every token, ``W_w r`` and ``W_b r`` with ``r = ReLU(W_down x)`` shared by both.

    ``W_w`` and ``W_b`` start at zero, and so does the change.
    """

    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(embed_dim, width, bias=False)
        self.weight = nn.Linear(width, embed_dim, bias=False)
        self.bias = nn.Linear(width, embed_dim, bias=False)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.weight.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        down, weight, bias = (layer.weight.to(x.dtype) for layer in (self.down, self.weight, self.bias))
        shared = F.relu(F.linear(x, down))
        return F.linear(shared, weight), F.linear(shared, bias)


class MomentProbingViT(TunedViT):
    """A frozen backbone under a head that also sees how the features of its patch tokens vary together.

    The logits are ``(W_1 z + b_1 + W_2 s + b_2) / 2``: ``z`` is what any head sees, the class token or mean behind the
    final norm, and ``s`` are the :class:`SecondMoments` of the patch tokens behind the final norm. Without
    recalibration nothing inside the backbone learns, and no gradient enters it.

    MP+ (``recalibration=16``) also adjusts the MLP of every block: ``x <- x + (1 + w) * MLP(LN(x)) + b`` with ``w`` and
    ``b`` from ``x`` itself, see :class:`Recalibration`.

    Args:
        backbone: see :class:`~spt_fast.tuned_vit.TunedViT`, like all that is not explained here.
        hidden: dimensions that tokens are projected to.
        heads: parts that they are split into.
        recalibration: width inside the recalibration of MP+; 0 for none.

    Raises:
        InputError: fewer than 2 heads, a ``hidden`` that they do not divide or that leaves each fewer than 7
            dimensions, a negative ``recalibration``.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = MomentProbingViT(backbone, num_classes=10, hidden=64)
        >>> model(torch.randn(4, 3, 32, 32)).shape, model.moments(torch.randn(4, 16, 192)).shape
        (torch.Size([4, 10]), torch.Size([4, 27]))
    """

    name: ClassVar[str] = "moment_probing"

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        num_classes: int,
        hidden: int = 512,
        heads: int = 4,
        recalibration: int = 0,
        pool: Pool | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        check_whole_number("hidden", hidden)
        check_whole_number("heads", heads, at_least=2)
        check_whole_number("recalibration", recalibration, at_least=0)
        if hidden % heads or _reduced(hidden // heads) < 1:
            raise InputError(f"hidden must be a multiple of heads={heads}, 7 times or more, got {hidden}")
        super().__init__(backbone, num_classes=num_classes, pool=pool, checkpoint_blocks=checkpoint_blocks)
        self.hidden = hidden
        self.heads = heads
        self.recalibration = recalibration
        width = backbone.embed_dim
        self.moments = SecondMoments(width, hidden, heads)
        self.moment_head = nn.Linear(self.moments.out_features, num_classes)
        nn.init.trunc_normal_(self.moment_head.weight, std=0.02)
        nn.init.zeros_(self.moment_head.bias)
        blocks = backbone.blocks if recalibration else ()
        self.recalibrations = nn.ModuleList(Recalibration(width, recalibration) for _ in blocks)
        for added in (self.moments, self.moment_head, self.recalibrations):
            added.to(self.device)

    @property
    def options(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "heads": self.heads, "recalibration": self.recalibration}

    def forward(self, images: Tensor) -> Tensor:
        with self._precision():
            x, _ = self.encode(images, every_token=True)
            first = pooled(self.backbone, self.pool, x)
            patches = final_norm(self.backbone)(x[:, self.backbone.num_prefix_tokens :])
        dtype = self.head.weight.dtype
        second = self.moments(patches.to(dtype))
        return (self.head(first.to(dtype)) + self.moment_head(second)) / 2

    def block(self, block: Any, x: Tensor, index: int) -> Tensor:
        if not self.recalibration:
            return block(x)
        x = x + block.ls1(block.attn(block.norm1(x)))
        weight, bias = self.recalibrations[index](x)
        return x + block.ls2((1 + weight) * block.mlp(block.norm2(x)) + bias)


def _reduced(width: int) -> int:
    """What two convolutions of kernel 3 and stride 2 leave of a width."""
    for _ in range(2):
        width = (width - 3) // 2 + 1
    return width
