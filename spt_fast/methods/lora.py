"""LoRA (Hu et al. 2021) by the PEFT library: low-rank changes of the backbone's weight matrices."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typing_extensions import Self

from spt_fast.arguments import check_share, check_whole_number
from spt_fast.errors import InputError, UnsupportedModelError
from spt_fast.methods.own_backbone import own_backbone
from spt_fast.pooling import Pool
from spt_fast.tuned_vit import TunedViT

# Where each layer lies in a block.
LAYERS = {
    "qkv": "attn.qkv",
    "q": "attn.qkv.q",
    "k": "attn.qkv.k",
    "v": "attn.qkv.v",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


class SplitProjection(nn.Module):
    """timm's fused projection to queries, keys and values as three layers, whose weights are views of its own."""

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        width = qkv.out_features // 3
        for part, name in enumerate("qkv"):
            layer = nn.Linear(qkv.in_features, width, bias=qkv.bias is not None, device="meta")
            for entry, value in qkv.named_parameters():
                rows = value.detach()[part * width : (part + 1) * width]
                setattr(layer, entry, nn.Parameter(rows, requires_grad=False))
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.children()], dim=-1)


class LoraViT(TunedViT):
    """A backbone with ``W x + b + (alpha / rank) B A x`` in the place of ``W x + b``, for some layers of each block.

    ``A`` ``[rank, in]`` and ``B`` ``[out, rank]`` learn, ``W`` and ``b`` do not; ``B`` starts at zero, and with it the
    change. Needs the PEFT library (``pip install spt-fast[lora]``).

    Args:
        backbone: see :class:`~spt_fast.tuned_vit.TunedViT`, like all that is not explained here.
        rank: of the change.
        alpha: its scale, in units of ``rank``.
        dropout: on what enters ``A``, in training.
        layers: which layers change: ``"qkv"`` (queries, keys and values by one ``A``), ``"q"``, ``"k"``, ``"v"``,
            ``"proj"``, ``"fc1"``, ``"fc2"``. The paper's own choice is ``("q", "v")``; ``("qkv",)`` is one product
            less and, at the same rank, as many parameters.

    Raises:
        InputError: ``rank`` or ``alpha`` below 1, ``dropout`` outside [0, 1), unknown layers.
        UnsupportedModelError: the library is not installed; or a backbone that is sharded, has 8-bit weights, or lacks
            one of the layers in any of its blocks.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
        >>> model = LoraViT(backbone, num_classes=10, rank=4, layers=("q", "v"))
        >>> [tuple(value.shape) for value in model.added_parameters().values()]
        [(4, 192), (192, 4), (4, 192), (192, 4)]
    """

    name: ClassVar[str] = "lora"

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        num_classes: int,
        rank: int = 8,
        alpha: int = 8,
        dropout: float = 0.0,
        layers: Sequence[str] = ("qkv",),
        pool: Pool | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        check_whole_number("rank", rank)
        check_whole_number("alpha", alpha)
        check_share("dropout", dropout)
        listed = [layers] if isinstance(layers, str) else layers
        if (
            not isinstance(listed, (list, tuple))
            or not listed
            or any(each not in [*LAYERS] for each in listed)
        ):
            raise InputError(f"layers must be some of {', '.join(LAYERS)}, got {layers!r}")
        layers = list(listed)
        parts = {"q", "k", "v"} & set(layers)
        if "qkv" in layers and parts:
            raise InputError(
                f"layers has qkv and parts of it ({', '.join(sorted(parts))}); name one or the other"
            )
        super().__init__(backbone, num_classes=num_classes, pool=pool, checkpoint_blocks=checkpoint_blocks)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.layers = layers
        self.backbone = own_backbone(backbone)
        if parts:
            block: Any
            for block in self.backbone.blocks:
                block.attn.qkv = SplitProjection(block.attn.qkv)
        self._check_layers()
        self._add_matrices()

    def _check_layers(self) -> None:
        """PEFT would pass over what a block does not have."""
        block: Any
        for index, block in enumerate(self.backbone.blocks):
            there = {path for path, module in block.named_modules() if isinstance(module, nn.Linear)}
            missing = [layer for layer in self.layers if LAYERS[layer] not in there]
            if missing:
                raise UnsupportedModelError(
                    f"lora is to change layers={self.layers}, and block {index}, whose MLP is a "
                    f"{type(block.mlp).__name__}, has no {', '.join(missing)}"
                )

    def _add_matrices(self) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model  # takes seconds, and only LoRA needs it
        except ImportError as error:
            raise UnsupportedModelError(
                f"lora needs the PEFT library: pip install spt-fast[lora] ({error})"
            ) from error
        paths = "|".join(LAYERS[layer].replace(".", r"\.") for layer in self.layers)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=rf"blocks\.\d+\.({paths})",
        )
        inject_adapter_in_model(config, self.backbone)
        for value in self.backbone.parameters():
            if value.requires_grad:  # made in the dtype of the frozen weights
                value.data = value.data.to(torch.promote_types(value.dtype, torch.float32))

    @property
    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, "layers": self.layers}

    def cast_backbone(self, dtype: torch.dtype) -> Self:
        """Compute in ``dtype`` from now on, see :meth:`spt_fast.tuned_vit.TunedViT.cast_backbone`; frozen weights of
        fewer bits are cast to it, as a copy."""
        frozen = next(self.backbone.parameters()).dtype
        if dtype.itemsize > frozen.itemsize:
            # An optimizer may hold what learns: that stays the same.
            learning = {id(value): value for value in self.backbone.parameters() if value.requires_grad}
            self.backbone = copy.deepcopy(self.backbone, learning)
            for value in self.backbone.parameters():
                if not value.requires_grad:
                    value.data = value.data.to(dtype)
        return super().cast_backbone(dtype)

    def train(self, mode: bool = True) -> Self:
        """Set training mode for all that was added, the dropout inside the backbone included."""
        super().train(mode)
        for name, module in self.backbone.named_modules():
            if name.endswith("lora_dropout"):
                module.train(mode)
        return self
