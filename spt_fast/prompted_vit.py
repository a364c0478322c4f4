"""PromptedViT: a frozen vision transformer, a few learnable prompts, and a linear head.

The deep form is exact but does less than it looks: prompts are no rows of the sequence (see
:mod:`spt_fast.prompted_block`), the last block computes only the rows that the pooling reads, and no gradient flows
into the tokens that enter the first block.
"""

from __future__ import annotations

import copy
from typing import Any, get_args

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spt_fast.backbones import check_backbone, embed, freeze, image_settings
from spt_fast.compile_modes import EAGER, measure_modes
from spt_fast.errors import InputError
from spt_fast.pooling import Pool, pooled, reads_prefix_only
from spt_fast.prompted_block import prompt_keys_values, prompted_block
from spt_fast.prototypes import Prototypes
from spt_fast.sharded_block import call_with_weights, is_sharded


class PromptedViT(nn.Module):
    """A frozen timm ViT with learnable prompts (SPT, VPT) and a linear classifier.

    Args:
        backbone: a timm ``VisionTransformer``; it is frozen, put in eval mode and kept there.
        prompts: where the prompts start: a :class:`~spt_fast.Prototypes` or a tensor ``[L, P, D]`` (deep: fresh prompts
            for every block, Eq. 6/13) or ``[1, P, D]`` (shallow: prompts enter the first block and travel through all
            of them, Eq. 4-5/11-12). Copied, as float32 unless it is float64.
        num_classes: outputs of ``model.head``.
        pool: what the head sees. ``None``: timm's own head path for this backbone over its prefix and patch tokens;
            ``"token"``: the final norm of the class token; ``"avg"``: the mean of the patch tokens, then the final norm
            (as MAE is fine-tuned); ``"avg_with_prompts"``: the mean of everything but the class token, the prompts'
            outputs included, then the final norm (as the released code of SPT does for MAE).
        train_prompts: ``False`` keeps the prompts as they are and trains the head alone (Table 4a).
        prompt_dropout: dropout on the prompts' entries in training, drawn for every image as in VPT.
        checkpoint_blocks: keep only what enters each block for the backward pass and compute the block again there:
            a fraction of the memory, for a second forward pass.

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
        super().__init__()
        check_backbone(backbone)
        values = prompts.values if isinstance(prompts, Prototypes) else prompts
        _check_prompts(values, backbone)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise InputError(f"num_classes must be a whole number of at least 1, got {num_classes!r}")
        if pool is not None and pool not in get_args(Pool):
            raise InputError(f"pool must be None or one of {', '.join(get_args(Pool))}, got {pool!r}")
        if pool is None and not backbone.global_pool:
            raise InputError("pool=None takes timm's own pooling, and this backbone has none; name a pool")
        if pool == "token" and not backbone.has_class_token:
            raise InputError(
                "pool='token' needs a class token, which this backbone does not have; use pool='avg'"
            )
        if not 0 <= prompt_dropout < 1:
            raise InputError(f"prompt_dropout must be in [0, 1), got {prompt_dropout}")
        self.backbone = freeze(backbone)
        self.pool = pool
        self.checkpoint_blocks = checkpoint_blocks
        self.compile_mode = EAGER
        self.classes: list[str] | None = None
        dtype = torch.promote_types(values.dtype, torch.float32)
        self.prompts = nn.Parameter(values.detach().to(dtype, copy=True), requires_grad=train_prompts)
        self.prompt_dropout = nn.Dropout(prompt_dropout)
        self.head = nn.Linear(backbone.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.to(next(backbone.parameters()).device)

    @property
    def num_prompts(self) -> int:
        """Prompt tokens per block, ``P``."""
        return self.prompts.shape[1]

    @property
    def deep(self) -> bool:
        """Whether every block has prompts of its own."""
        return self.prompts.shape[0] == len(self.backbone.blocks)

    def train(self, mode: bool = True) -> PromptedViT:
        """Set training mode for prompts and head; the frozen backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def cast_backbone(self, dtype: torch.dtype) -> PromptedViT:
        """Use a copy of the backbone in ``dtype`` from now on; prompts and head keep theirs. Returns ``self``.

        The frozen weights are cast once here instead of at every use, as autocast would; the caller's own backbone
        object stays as it is.
        """
        own = next(self.backbone.parameters()).dtype
        if own != dtype:
            if is_sharded(self.backbone):
                raise InputError(
                    f"the sharded backbone is {own} and cannot become {dtype}; cast it, then shard it"
                )
            self.backbone = copy.deepcopy(self.backbone).to(dtype)
        return self

    def compile(self, mode: str | None = None, *, images: Tensor | None = None, **options: Any) -> None:
        """Run through ``torch.compile`` from now on, in the mode that is fastest here.

        Call it when the model is on its device, in its dtype and in the mode (training or eval) it will be used in.

        Args:
            mode: a mode of ``torch.compile``, or ``"eager"`` for none; ``None`` tries those that there are for the
                device, plain eager execution among them, and keeps the fastest.
            images: a batch to measure with, as it will be given; ``None`` takes 32 images of noise.
            **options: passed on to ``torch.compile``.

        After it ``compile_mode`` is the mode, and ``compile_seconds`` what a step took in each mode that was tried.

        Example:
            >>> from spt_fast import load_backbone
            >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
            >>> model = PromptedViT(backbone, torch.randn(2, 5, 192), num_classes=10).eval()
            >>> model.compile("eager")
            >>> model.compile_mode
            'eager'
        """

        def use(chosen: str) -> None:
            if chosen == EAGER:
                self._compiled_call_impl = None
            else:
                super(PromptedViT, self).compile(mode=chosen, **options)
            self.compile_mode = chosen

        self.compile_seconds: dict[str, float] = {}
        if mode is None:
            if images is None:
                image_size = image_settings(self.backbone)["image_size"]
                channels = getattr(self.backbone, "in_chans", 3)
                images = torch.randn(32, channels, *image_size, device=self.prompts.device)
            self.compile_seconds = measure_modes(self, images, use)
            mode = min(self.compile_seconds, key=self.compile_seconds.__getitem__)
        use(mode)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of ``images`` ``[B, 3, H, W]``."""
        pooled = self.forward_features(images)
        return self.head(pooled.to(self.head.weight.dtype))

    def forward_features(self, images: Tensor) -> Tensor:
        """What the head sees: ``[B, D]``."""
        x = embed(self.backbone, images)
        x, prompt_outputs = self._deep(x) if self.deep else self._shallow(x)
        return pooled(self.backbone, self.pool, x, prompt_outputs)

    def _deep(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Eq. 6/13. Returns the image's own tokens, of the last block only those that the pooling reads, and the last
        block's prompt outputs where it reads them."""
        *blocks, last = self.backbone.blocks
        for block, prompts in zip(blocks, self.prompts, strict=False):
            x = self._run(block, x, self._block_prompts(prompts, x))
        prompts = self._block_prompts(self.prompts[-1], x)
        num_tokens = x.shape[1]
        if self.pool == "avg_with_prompts":
            x = self._run(last, x, prompts, torch.cat([x, prompts.expand(x.shape[0], -1, -1)], dim=1))
            return x[:, :num_tokens], x[:, num_tokens:]
        if reads_prefix_only(self.backbone, self.pool):
            return self._run(last, x, prompts, x[:, : self.backbone.num_prefix_tokens]), None
        return self._run(last, x, prompts), None

    def _shallow(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 4-5/11-12: prompts are ordinary rows of the sequence all the way, so none of theirs can be left out.
        They stand behind the others: attention does not look at the order of its rows."""
        num_tokens = x.shape[1]
        x = torch.cat([x, self._block_prompts(self.prompts[0], x).expand(x.shape[0], -1, -1)], dim=1)
        for block in self.backbone.blocks:
            x = self._run(block, x)
        return x[:, :num_tokens], x[:, num_tokens:]

    def _run(
        self, block: nn.Module, x: Tensor, prompts: Tensor | None = None, queries: Tensor | None = None
    ) -> Tensor:
        call = (_block_with_prompts, block, x, prompts, queries)
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(call_with_weights, *call, use_reentrant=False)
        return call_with_weights(*call)

    def _block_prompts(self, prompts: Tensor, x: Tensor) -> Tensor:
        """Prompts of one block as it takes them: ``[P, D]``, or ``[B, P, D]`` where dropout makes them differ."""
        if self.training and self.prompt_dropout.p > 0:
            prompts = self.prompt_dropout(prompts.expand(x.shape[0], -1, -1))
        return prompts.to(x.dtype)


def _block_with_prompts(block: Any, x: Tensor, prompts: Tensor | None, queries: Tensor | None) -> Tensor:
    keys_values = None if prompts is None else prompt_keys_values(block, prompts)
    return prompted_block(block, x, keys_values, queries=queries)


def _check_prompts(values: Tensor, backbone: VisionTransformer) -> None:
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
