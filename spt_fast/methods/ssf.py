"""SSF (Lian et al. 2022): every operation of the frozen backbone is followed by a learned scale and shift."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import GluMlp, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast.arguments import check_number
from spt_fast.backbones import embed
from spt_fast.errors import UnsupportedModelError
from spt_fast.pooling import Pool
from spt_fast.tuned_vit import TunedViT


class ScaleShift(nn.Module):
    """``gamma * y + beta``, entry by entry, on the last dimension of ``y``.

    Args:
        width: of that dimension.
        std: standard deviation around 1 and 0 that ``gamma`` and ``beta`` are drawn with.
    """

    def __init__(self, width: int, std: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + std * torch.randn(width))
        self.shift = nn.Parameter(std * torch.randn(width))

    def forward(self, y: Tensor) -> Tensor:
        return torch.addcmul(self.shift.to(y.dtype), y, self.scale.to(y.dtype))


class SsfViT(TunedViT):
    """A frozen backbone whose features are scaled and shifted, ``y <- gamma * y + beta``, after every operation.

    The operations are those of the paper and its code: the patch embedding; of every block ``norm1``, ``qkv``,
    ``proj``, ``norm2``, ``fc1`` and ``fc2``; and the final norm. The last pair acts on what the head sees, which for a
    class token or a mean is the same as acting before the pooling. All of them could be merged into the frozen weights.

    Args:
        backbone: see :class:`~spt_fast.tuned_vit.TunedViT`, like all that is not explained here.
        init_std: ``gamma`` starts as ``N(1, init_std^2)`` and ``beta`` as ``N(0, init_std^2)``; 0.02 as published, 0
            starts from the frozen backbone as it is.

    Raises:
        InputError: a negative ``init_std``.
        UnsupportedModelError: blocks whose MLP is not two layers ``fc1`` and ``fc2``.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = SsfViT(backbone, num_classes=10)
        >>> model(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 10])
        >>> [f"{name} {len(each.scale)}" for name, each in model.after[0].items()]
        ['norm1 192', 'qkv 576', 'proj 192', 'norm2 192', 'fc1 768', 'fc2 192']
    """

    name: ClassVar[str] = "ssf"

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        num_classes: int,
        init_std: float = 0.02,
        pool: Pool | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        check_number("init_std", init_std, at_least=0)
        super().__init__(backbone, num_classes=num_classes, pool=pool, checkpoint_blocks=checkpoint_blocks)
        self.init_std = init_std
        width = backbone.embed_dim
        self.after_patch_embed = ScaleShift(width, init_std)
        self.after = nn.ModuleList()
        for block in backbone.blocks:
            widths = {"norm1": width, "norm2": width, **_layer_widths(block)}
            order = ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")
            self.after.append(nn.ModuleDict({name: ScaleShift(widths[name], init_std) for name in order}))
        self.after_final_norm = ScaleShift(width, init_std)
        for added in (self.after_patch_embed, self.after, self.after_final_norm):
            added.to(self.device)

    @property
    def options(self) -> dict[str, Any]:
        return {"init_std": self.init_std}

    def embed(self, images: Tensor) -> Tensor:
        return embed(self.backbone, images, self.after_patch_embed)

    def block(self, block: Any, x: Tensor, index: int) -> Tensor:
        attn, mlp = block.attn, block.mlp
        after: Any = self.after[index]
        hidden = after["norm1"](block.norm1(x))
        out = attn.norm(_attention(attn, after["qkv"](attn.qkv(hidden))))
        gate = getattr(attn, "gate", None)
        if gate is not None:
            out = out * gate(hidden).sigmoid()
        x = x + block.ls1(after["proj"](attn.proj(out)))
        hidden = after["fc1"](mlp.fc1(after["norm2"](block.norm2(x))))
        return x + block.ls2(after["fc2"](mlp.fc2(mlp.norm(_activation(mlp, hidden)))))

    def forward_features(self, images: Tensor, *, patch_grid: bool = False) -> Tensor:
        features = super().forward_features(images, patch_grid=patch_grid)
        return self.after_final_norm(features.movedim(1, -1)).movedim(-1, 1)


def _layer_widths(block: Any) -> dict[str, int]:
    mlp = block.mlp
    if type(mlp) not in (Mlp, GluMlp):
        raise UnsupportedModelError(
            f"ssf needs blocks whose MLP has the layers fc1 and fc2, got a {type(mlp).__name__}"
        )
    layers = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": mlp.fc1, "fc2": mlp.fc2}
    return {name: layer.out_features for name, layer in layers.items()}


def _attention(attn: Any, qkv: Tensor) -> Tensor:
    """From queries, keys and values ``[B, N, 3 D]`` side by side to ``[B, N, D]``."""
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, scale=attn.scale).transpose(1, 2).flatten(2)


def _activation(mlp: Any, hidden: Tensor) -> Tensor:
    if isinstance(mlp, Mlp):
        return mlp.act(hidden)
    first, second = hidden.chunk(2, dim=-1)
    return first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
