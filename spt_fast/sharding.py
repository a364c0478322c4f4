"""A frozen backbone that is too large for one device: its blocks lie in shards on all of them (PyTorch's FSDP2).

A block's weights come together when it runs, forwards and backwards, and go apart again; as they are frozen, nothing is
ever sent back. Everything else of a prompted model is small and stays whole in every process.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from spt_fast.backbones import backbone_identity
from spt_fast.errors import InputError
from spt_fast.sharded_block import enable_calls, is_sharded


def shard_blocks(backbone: VisionTransformer, device: torch.device) -> VisionTransformer:
    """Spread the weights of every block over the processes of the group, in place.

    Call it in every process, after the weights were loaded (on the CPU if no device holds them all) and cast to the
    dtype they are used in, and before the backbone is prompted.

    Args:
        backbone: a frozen timm ``VisionTransformer``, the same in every process.
        device: where this process computes.

    Returns:
        ``backbone``, on ``device``; this process keeps one ``world_size``-th of each block.

    Raises:
        InputError: no process group was joined, or the blocks are sharded already.
    """
    if not dist.is_initialized():
        raise InputError(
            "a backbone is sharded over the processes of torch.distributed, and there is no group"
        )
    if is_sharded(backbone):
        raise InputError("the blocks of this backbone are sharded already")
    backbone.spt_fast_identity = backbone_identity(backbone)  # type: ignore[assignment]
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in backbone.blocks:
        # Each by itself: they run without the backbone's own forward.
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        enable_calls(block)
    return backbone.to(device)
