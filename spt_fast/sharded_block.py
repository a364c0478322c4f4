"""A block whose weights may lie in shards on several processes (see :mod:`spt_fast.sharding`): what it was before, and
how anything but its own forward runs on it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method


def is_sharded(backbone: VisionTransformer) -> bool:
    """Whether the blocks' weights are spread over processes."""
    return isinstance(backbone.blocks[0], FSDPModule)


def original_class(module: nn.Module) -> type:
    """The class of a module as it was before it was sharded."""
    kind = type(module)
    return kind.__bases__[1] if isinstance(module, FSDPModule) else kind


def call_with_weights(function: Callable[..., Any], block: nn.Module, *arguments: Any) -> Any:
    """``function(block, *arguments)``, with all weights of the block in place while it runs."""
    if isinstance(block, FSDPModule):
        return block.with_weights(function, *arguments)  # type: ignore[operator]
    return function(block, *arguments)


def enable_calls(block: nn.Module) -> None:
    """Let :func:`call_with_weights` work on a block that has just been sharded."""
    block.with_weights = MethodType(_call_with, block)  # type: ignore[assignment]
    register_fsdp_forward_method(block, "with_weights")


def _call_with(block: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(block, *arguments)
