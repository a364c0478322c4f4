"""A small search, and what each of two processes does with it.

It writes what this process found to FOLDER/rank{0,1}.json; the test judges.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tiny import squares, tiny_backbone
from training_cases import Interruption, interrupt_after

from spt_fast import TrainingConfig
from spt_fast.data import ImageDataset
from spt_fast.sweep import SweepResult, sweep

SIZES = {"train": 14, "val": 9, "trainval": 23, "test": 15}
SPACE = {"learning_rate": [1e-3, 0.05], "num_prompts": [2, 4]}
CONFIG = TrainingConfig(
    epochs=2, warmup_epochs=1, batch_size=8, dtype="float32", num_workers=0, checkpoint_minutes=0.0
)


def images_of(seed: int = 0, extra: int = 0) -> Callable[[str, bool], ImageDataset]:
    """Squares for every split; ``extra`` more of them for test."""

    def images(split: str, train: bool) -> ImageDataset:
        count = SIZES[split] + (extra if split == "test" else 0)
        return squares(count, seed=10 * seed + list(SIZES).index(split))

    return images


def search(output: Path, **arguments: Any) -> SweepResult:
    space = {"learning_rate": [1e-3, 0.05]}
    chosen = {"space": space, "config": CONFIG, "model": {"pool": "avg"}, "num_prompts": 3, **arguments}
    return sweep(tiny_backbone(), images_of(), output=output, **chosen)


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    # The processes need not see the same disk: each is told another folder, and what lies in that of rank 0 counts.
    found: dict[str, Any] = {"straight": search(folder / f"straight{rank}").summary()}
    dist.init_process_group("gloo")
    try:
        search(folder / f"resumed{rank}", progress=interrupt_after(6))
    except Interruption:
        found["interrupted"] = True
    dist.barrier()
    shared = folder / "resumed0"  # a run that goes on is read by all processes
    found["resumed"] = search(shared).summary()
    found["again"] = search(shared).summary()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
