"""Backbones with random weights, for benchmarks of what does not depend on them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from spt_fast import load_backbone


def load_on(device: torch.device, name: str, **arguments: Any) -> Any:
    """:func:`spt_fast.load_backbone`, with weights that are drawn on the device unless a checkpoint holds them.

    A CPU draws those of a ViT-H for longer than most benchmarks take.

    Example:
        >>> load_on(torch.device("cpu"), "vit_tiny_patch16_224", depth=1).embed_dim
        192
    """
    with nullcontext() if "checkpoint" in arguments else device:
        return load_backbone(name, **arguments).to(device)
