"""What each of two processes does.

Training on a backbone in shards, and the same on a whole one; results go to FOLDER/rank{0,1}.pt, the test judges.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import learned, squares, tiny_backbone, tiny_model
from training_cases import CONFIG

from spt_fast import build_prototypes, train
from spt_fast.backbones import backbone_identity
from spt_fast.errors import InputError
from spt_fast.sharding import shard_blocks


def local_numbers(backbone: torch.nn.Module) -> int:
    """How many weights of the blocks lie in this process."""
    return sum(
        getattr(parameter, "to_local", lambda p=parameter: p)().numel()
        for parameter in backbone.blocks.parameters()
    )


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    device = torch.device("cpu")
    results: dict[str, Any] = {}
    try:
        shard_blocks(tiny_backbone(), device)
    except InputError as error:
        results["without_group"] = str(error)
    dist.init_process_group("gloo")

    whole, sharded = tiny_backbone(), shard_blocks(tiny_backbone(), device)
    results["numbers"] = local_numbers(whole), local_numbers(sharded)
    results["identities"] = backbone_identity(whole) == backbone_identity(sharded)
    try:
        shard_blocks(sharded, device)
    except InputError as error:
        results["twice"] = str(error)

    config = replace(CONFIG, epochs=2)
    for name, backbone in (("whole", whole), ("sharded", sharded)):
        for checkpoint_blocks in (False, True):
            model = tiny_model(backbone=backbone, checkpoint_blocks=checkpoint_blocks)
            run = f"{name}{'_checkpointed' * checkpoint_blocks}"
            trained = train(model, squares(20), squares(7, seed=1), output=folder / run, config=config)
            results[run] = learned(model), [row["val_loss"] for row in trained.metrics]
        images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))[rank::2]
        built = build_prototypes(backbone, [images], num_prompts=3, method="kmeans")
        results[f"{name}_prototypes"] = built.values
    results["numbers_after"] = local_numbers(sharded)
    try:
        tiny_model(backbone=sharded).cast_backbone(torch.bfloat16)
    except InputError as error:
        results["cast"] = str(error)

    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
