"""TunedViT: a frozen vision transformer, what a method of tuning adds to it, and a linear head.

Training, evaluation and adapters know this class alone; prompts (:mod:`spt_fast.prompted_vit`) are one way to fill it,
:mod:`spt_fast.methods` has the others.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any, ClassVar, get_args

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from spt_fast.arguments import check_flag, check_whole_number
from spt_fast.backbones import check_backbone, embed, final_norm, freeze, image_settings
from spt_fast.compile_modes import EAGER, measure_modes
from spt_fast.errors import InputError
from spt_fast.pooling import Pool, pooled
from spt_fast.sharded_block import call_with_weights, is_sharded

# What a model learns apart from what its method adds.
HEAD = ("head.weight", "head.bias")


class TunedViT(nn.Module):
    """What all methods of tuning have in common. A method overrides :meth:`embed`, :meth:`block` or :meth:`encode`.

    What a task learns and stores is every parameter outside ``backbone``, and those inside it that require a gradient;
    a method that changes the backbone works on a copy of its own.

    Args:
        backbone: a timm ``VisionTransformer``; it is frozen, put in eval mode and kept there.
        num_classes: outputs of ``model.head``.
        pool: what the head sees. ``None``: timm's own head path for this backbone over its prefix and patch tokens;
            ``"token"``: the final norm of the class token; ``"avg"``: the mean of the patch tokens, then the final norm
            (as MAE is fine-tuned); ``"avg_with_prompts"``: the mean of everything but the class token, the prompts'
            outputs included, then the final norm (as the released code of SPT does for MAE).
        checkpoint_blocks: keep only what enters each block for the backward pass and compute the block again there:
            a fraction of the memory, for a second forward pass.

    Attributes:
        name: of the kind of model, under which an adapter keeps it.
        takes_prompts: whether it is made from prompts, and has outputs of prompts for ``"avg_with_prompts"``.
        head: ``nn.Linear(D, num_classes)``.
        compile_mode: how it runs: ``"eager"``, or a mode of ``torch.compile`` (see :meth:`compile`).
        classes: names of the outputs, where they are known (after :func:`spt_fast.load_adapter`), else ``None``.

    Raises:
        UnsupportedModelError: the backbone cannot be tuned, or is another model's own copy, which that model changes.
        InputError: an unknown ``pool``, ``num_classes < 1``.
    """

    name: ClassVar[str]
    takes_prompts: ClassVar[bool] = False

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        num_classes: int,
        pool: Pool | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        check_backbone(backbone)
        check_whole_number("num_classes", num_classes)
        check_flag("checkpoint_blocks", checkpoint_blocks)
        if pool is not None and pool not in get_args(Pool):
            raise InputError(f"pool must be None or one of {', '.join(get_args(Pool))}, got {pool!r}")
        if pool == "avg_with_prompts" and not self.takes_prompts:
            raise InputError(
                f"pool='avg_with_prompts' needs prompts, and {self.name} has none; use pool='avg'"
            )
        if pool is None and not backbone.global_pool:
            raise InputError("pool=None takes timm's own pooling, and this backbone has none; name a pool")
        if pool == "token" and not backbone.has_class_token:
            raise InputError(
                "pool='token' needs a class token, which this backbone does not have; use pool='avg'"
            )
        self.backbone = freeze(backbone)
        self.pool = pool
        self.checkpoint_blocks = checkpoint_blocks
        self.compile_mode = EAGER
        self.compute_dtype: torch.dtype | None = None  # of autocast, where weights of the backbone learn
        self.classes: list[str] | None = None
        device = next(backbone.parameters()).device
        self.head = nn.Linear(backbone.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.head.to(device)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.head.weight.device

    @property
    def options(self) -> dict[str, Any]:
        """Json-able arguments of the constructor, with which an adapter makes the same model again; prompts, classes
        and pool are kept apart."""
        return {}

    def task_state(self) -> dict[str, nn.Parameter]:
        """What a task stores, by name: all parameters outside the backbone, and those that learn in it."""
        return {
            name: value
            for name, value in self.named_parameters()
            if not name.startswith("backbone.") or value.requires_grad
        }

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Take in what :meth:`task_state` gave.

        Raises:
            InputError: entries are missing, left over or of another shape.
        """
        own = self.task_state()
        problems = [f"{name} is missing" for name in own if name not in state]
        problems += [f"{name} has no place" for name in state if name not in own]
        problems += [
            f"{name} is {list(state[name].shape)} instead of {list(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ]
        if problems:
            raise InputError(f"what was stored does not fit a {self.name} model: {'; '.join(problems)}")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])

    def added_parameters(self) -> dict[str, nn.Parameter]:
        """What learns apart from the head and ``prompts``, by name."""
        known = ("prompts", *HEAD)
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and name not in known
        }

    def learning_rate_scale(self, name: str) -> float:
        """What the base learning rate is multiplied by for one of the :meth:`added_parameters`."""
        return 1.0

    def train(self, mode: bool = True) -> Self:
        """Set training mode for all that was added; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def cast_backbone(self, dtype: torch.dtype) -> Self:
        """Compute in ``dtype`` from now on; what learns keeps its own. Returns ``self``.

        Frozen weights are cast once, as a copy: the caller's own backbone object stays as it is. A backbone in which
        weights learn keeps them as they are, and runs under autocast where ``dtype`` has 16 bits.
        """
        own = next(self.backbone.parameters()).dtype
        if any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.compute_dtype = dtype if dtype != own and dtype.itemsize == 2 else None
        elif own != dtype:
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
            >>> from spt_fast import PromptedViT, load_backbone
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
                super(TunedViT, self).compile(mode=chosen, **options)
            self.compile_mode = chosen

        self.compile_seconds: dict[str, float] = {}
        if mode is None:
            if images is None:
                image_size = image_settings(self.backbone)["image_size"]
                channels = getattr(self.backbone, "in_chans", 3)
                images = torch.randn(32, channels, *image_size, device=self.device)
            self.compile_seconds = measure_modes(self, images, use)
            mode = min(self.compile_seconds, key=self.compile_seconds.__getitem__)
        use(mode)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of ``images`` ``[B, 3, H, W]``."""
        features = self.forward_features(images)
        return self.head(features.to(self.head.weight.dtype))

    def forward_features(self, images: Tensor, *, patch_grid: bool = False) -> Tensor:
        """What the head sees: ``[B, D]``; or dense features, one vector for every patch.

        Args:
            images: ``[B, 3, H, W]``.
            patch_grid: ``True`` returns ``[B, D, H / p, W / p]`` for ``p x p`` pixel patches: the final norm of every
                patch token, whatever the pooling, in the places of the patches in the image.

        Example:
            >>> from spt_fast import PromptedViT, load_backbone
            >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
            >>> model = PromptedViT(backbone, torch.randn(2, 5, 192), num_classes=10)
            >>> model.forward_features(torch.randn(4, 3, 32, 32), patch_grid=True).shape
            torch.Size([4, 192, 4, 4])
        """
        with self._precision():
            x, prompt_outputs = self.encode(images, every_token=patch_grid)
            if not patch_grid:
                return pooled(self.backbone, self.pool, x, prompt_outputs)
            patches = final_norm(self.backbone)(x[:, self.backbone.num_prefix_tokens :])
            height, width = images.shape[2:]
            grid = self.backbone.patch_embed.dynamic_feat_size((height, width))
            return patches.transpose(1, 2).unflatten(2, grid)

    def encode(self, images: Tensor, *, every_token: bool) -> tuple[Tensor, Tensor | None]:
        """The tokens that leave the last block.

        Args:
            images: ``[B, 3, H, W]``.
            every_token: ``False``: those that the pooling reads are enough.

        Returns:
            Prefix and patch tokens ``[B, N, D]``, or the prefix tokens alone; and the prompts' outputs ``[B, P, D]``
            where the pooling reads them.
        """
        x = self.embed(images)
        for index, block in enumerate(self.backbone.blocks):
            x = self.run_block(self.block, block, x, index)
        return x, None

    def embed(self, images: Tensor) -> Tensor:
        """The sequence ``[B, N, D]`` that enters the first block."""
        return embed(self.backbone, images)

    def block(self, block: Any, x: Tensor, index: int) -> Tensor:
        """Tokens ``[B, N, D]`` through the block of this index."""
        return block(x)

    def run_block(self, function: Callable[..., Any], block: nn.Module, *arguments: Any) -> Any:
        """``function(block, *arguments)`` with the block's weights in place, computed again in the backward pass if
        ``checkpoint_blocks``."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(call_with_weights, function, block, *arguments, use_reentrant=False)
        return call_with_weights(function, block, *arguments)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)
