"""Gated prompt tuning (Yoo et al. 2023, "Improving Visual Prompt Tuning for Self-supervised Vision Transformers")."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast.arguments import check_number
from spt_fast.errors import InputError
from spt_fast.pooling import Pool
from spt_fast.prompted_block import prompted_block
from spt_fast.prompted_vit import PromptedViT
from spt_fast.prototypes import Prototypes

# Where the authors' code keeps temperatures.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 10.0


class GatedPromptViT(PromptedViT):
    """Shallow prompts with a gate behind each block and a temperature in each block's attention.

    Prompts ``Z_0`` enter the first block and travel through all of them as rows of the sequence. Behind block ``i`` a
    gate says how much of what the block made of them goes on::

        Z_i = g_i * block_i(Z_{i-1}) + (1 - g_i) * Z_{i-1}        g_i = sigmoid(gate_logits[i])

    so that with closed gates prompts reach the blocks that need them as they are. There is no gate behind the last
    block. All attention in block ``i``, of prompts and tokens, is ``softmax(Q K^T / (temperatures[i] * sqrt(d)))``; a
    temperature counts as no less than 0.01 and no more than 10.

    Args:
        backbone: a timm ``VisionTransformer``, see :class:`~spt_fast.PromptedViT`.
        prompts: where the prompts start, :class:`~spt_fast.Prototypes` or a tensor ``[1, P, D]``.
        num_classes: outputs of ``model.head``.
        pool: what the head sees, see :class:`~spt_fast.tuned_vit.TunedViT`.
        gate_logit: where the gates' logits start: nearly closed, as in the example of the authors' code.
        train_prompts: ``False`` keeps the prompts as they are.
        prompt_dropout: dropout on the prompts' entries in training.
        checkpoint_blocks: less memory, for a second forward pass.

    Attributes:
        gate_logits: ``[L - 1]``.
        temperatures: ``[L]``, from 1.

    Raises:
        InputError: prompts of another shape, a ``gate_logit`` that is no finite number, and as
            :class:`~spt_fast.PromptedViT`.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = GatedPromptViT(backbone, torch.randn(1, 5, 192), num_classes=10)
        >>> {name: tuple(value.shape) for name, value in model.added_parameters().items()}
        {'gate_logits': (1,), 'temperatures': (2,)}
    """

    name: ClassVar[str] = "gate_vpt"

    def __init__(
        self,
        backbone: VisionTransformer,
        prompts: Prototypes | Tensor,
        *,
        num_classes: int,
        pool: Pool | None = None,
        gate_logit: float = -5.0,
        train_prompts: bool = True,
        prompt_dropout: float = 0.0,
        checkpoint_blocks: bool = False,
    ) -> None:
        check_number("gate_logit", gate_logit)
        super().__init__(
            backbone,
            prompts,
            num_classes=num_classes,
            pool=pool,
            train_prompts=train_prompts,
            prompt_dropout=prompt_dropout,
            checkpoint_blocks=checkpoint_blocks,
        )
        if self.prompts.shape[0] != 1:
            raise InputError(
                f"gate_vpt takes shallow prompts [1, P, {backbone.embed_dim}], got {list(self.prompts.shape)}"
            )
        self.gate_logit = float(gate_logit)
        depth = len(backbone.blocks)
        self.gate_logits = nn.Parameter(torch.full((depth - 1,), self.gate_logit, device=self.device))
        self.temperatures = nn.Parameter(torch.ones(depth, device=self.device))

    @property
    def options(self) -> dict[str, Any]:
        return {**super().options, "gate_logit": self.gate_logit}

    def learning_rate_scale(self, name: str) -> float:
        # Adam moves a number by about the rate whatever its size: at that of prompts, 30 steps would take a temperature
        # from its start to the end of its range.
        return 0.1 if name == "temperatures" else 1.0

    def encode(self, images: Tensor, *, every_token: bool) -> tuple[Tensor, Tensor | None]:
        x = self.embed(images)
        num_tokens = x.shape[1]
        prompts = self.block_prompts(0, x).expand(x.shape[0], -1, -1)
        gates = self.gate_logits.sigmoid().to(x.dtype)
        # A step may carry a temperature out of the range, and the gradient brings it back.
        inside = self.temperatures.clamp(LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE)
        temperatures = (self.temperatures + (inside - self.temperatures).detach()).to(x.dtype)
        for index, block in enumerate(self.backbone.blocks):
            sequence = torch.cat([x, prompts], dim=1)
            sequence = self.run_block(_block_at_temperature, block, sequence, temperatures[index])
            x, outputs = sequence[:, :num_tokens], sequence[:, num_tokens:]
            prompts = outputs if index == len(gates) else torch.lerp(prompts, outputs, gates[index])
        return x, prompts


def _block_at_temperature(block: Any, x: Tensor, temperature: Tensor) -> Tensor:
    return prompted_block(block, x, temperature=temperature)
