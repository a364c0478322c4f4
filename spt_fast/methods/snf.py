"""SNF (Wang et al., CVPR 2023): the shortcuts of the frozen backbone become learned normalising flows."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast.arguments import check_whole_number
from spt_fast.pooling import Pool
from spt_fast.tuned_vit import TunedViT


class PlanarFlow(nn.Module):
    """``z + u tanh(w . z + b)`` on tokens ``[B, N, D]``: a shift along ``u`` that depends on the position along ``w``.

    It is invertible as long as ``w . u > -1``. ``u`` starts at zero, so that it starts as the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(width))
        self.w = nn.Parameter(torch.empty(width).uniform_(-0.01, 0.01))
        self.b = nn.Parameter(torch.zeros(1))

    def forward(self, z: Tensor) -> Tensor:
        u, w, b = (each.to(z.dtype) for each in (self.u, self.w, self.b))
        return z + u * torch.tanh((z @ w + b).unsqueeze(-1))


class Flow(nn.Module):
    """The flow of one shortcut: ``exp(log_sigma) * x + mu``, then planar flows; it starts as the identity.

    Args:
        width: ``D``.
        length: number of planar flows.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.zeros(width))
        self.mu = nn.Parameter(torch.zeros(width))
        self.planar = nn.ModuleList(PlanarFlow(width) for _ in range(length))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.addcmul(self.mu.to(x.dtype), x, self.log_sigma.exp().to(x.dtype))
        for planar in self.planar:
            z = planar(z)
        return z


class SnfViT(TunedViT):
    """A frozen backbone in which a flow ``f``, not the identity, carries the tokens past each sublayer.

    A block is, of its tokens ``x``,

        ``x <- f_1(x) + Attention(LN(x))``, then ``x <- f_2(x) + MLP(LN(x))``:

    The paper argues that frozen layers pass errors on, that the shortcuts are the cheapest place to correct them, and
    that an invertible correction loses no information. ``f`` scales and shifts every entry, then applies planar flows
    (Rezende and Mohamed 2015).

    Args:
        backbone: see :class:`~spt_fast.tuned_vit.TunedViT`, like all that is not explained here.
        flow_length: planar flows in a shortcut. Without any, ViT-B has the 0.036 M parameters that the abstract speaks
            of; with one, those of Table 3.

    Raises:
        InputError: a negative ``flow_length``.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model, images = SnfViT(backbone, num_classes=10), torch.randn(4, 3, 32, 32)
        >>> model(images).shape
        torch.Size([4, 10])
        >>> bool((model.forward_features(images) - backbone(images)).abs().max() < 1e-4)  # so far
        True
    """

    name: ClassVar[str] = "snf"

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        num_classes: int,
        flow_length: int = 1,
        pool: Pool | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        check_whole_number("flow_length", flow_length, at_least=0)
        super().__init__(backbone, num_classes=num_classes, pool=pool, checkpoint_blocks=checkpoint_blocks)
        self.flow_length = flow_length
        width = backbone.embed_dim

        def flows() -> nn.ModuleList:
            return nn.ModuleList(Flow(width, flow_length) for _ in backbone.blocks).to(self.device)

        self.past_attention = flows()
        self.past_mlp = flows()

    @property
    def options(self) -> dict[str, Any]:
        return {"flow_length": self.flow_length}

    def block(self, block: Any, x: Tensor, index: int) -> Tensor:
        x = self.past_attention[index](x) + block.ls1(block.attn(block.norm1(x)))
        return self.past_mlp[index](x) + block.ls2(block.mlp(block.norm2(x)))
