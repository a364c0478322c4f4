"""What each of two processes does.

It writes what this process ended with to FOLDER/rank{0,1}.pt; the test judges.
"""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import learned, squares, tiny_model

from spt_fast import TrainingConfig, evaluate, train
from spt_fast.optimizer import PromptAdamW

CONFIG = TrainingConfig(
    epochs=2,
    warmup_epochs=1,
    batch_size=2,
    learning_rate=0.01,
    seed=5,
    ema_decay=0.7,
    dtype="float32",
    checkpoint_minutes=0.0,
)
ONE_STEP = TrainingConfig(epochs=1, warmup_epochs=0, batch_size=4, seed=5, dtype="float32")
IMAGES = 11  # shares of 6 and 5; 3 steps of 2 images, the last of which the second process takes with one
WIDE = TrainingConfig(epochs=3, warmup_epochs=1, batch_size=16, learning_rate=0.02, seed=6, dtype="float32")
WIDE_IMAGES = 6 * 32 + 9


class Interruption(Exception):
    """Stops a run in the middle."""


def interrupt_after(steps: int) -> Any:
    seen = []

    def progress(stage: str, done: int, total: int | None) -> None:
        seen.append(stage)
        if len(seen) == steps:
            raise Interruption

    return progress


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {}

    # train() joins and leaves the process group itself. Each process starts elsewhere and names another folder.
    model = tiny_model(seed=rank)
    straight = train(
        model, squares(IMAGES), squares(5, seed=1), output=folder / f"straight{rank}", config=CONFIG
    )
    results["straight"] = learned(model)
    results["straight_metrics"] = straight.metrics
    results["left_group"] = not dist.is_initialized()

    # Again, when the other process may still be busy with the end of the first call.
    time.sleep(0.7 * (1 - rank))
    again = tiny_model(seed=rank)
    train(again, squares(IMAGES), squares(5, seed=1), output=folder / f"again{rank}", config=CONFIG)
    results["again"] = learned(again)

    time.sleep(0.7 * (1 - rank))
    dist.init_process_group("gloo")
    results["sees"] = (dist.get_rank(), dist.get_world_size())

    model = tiny_model(seed=9)
    judged = [evaluate(model, squares(count, seed=2), batch_size=3) for count in (7, 1)]
    results["evaluations"] = [judgement.as_dict() for judgement in judged]

    gradients: dict[str, torch.Tensor] = {}
    step = PromptAdamW.step

    def recording_step(optimizer: PromptAdamW, closure: Any = None) -> Any:
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return step(optimizer, closure)

    PromptAdamW.step = recording_step  # type: ignore[method-assign]
    model = tiny_model(seed=3)
    train(model, squares(8), output=folder / f"one_step{rank}", config=ONE_STEP)
    PromptAdamW.step = step  # type: ignore[method-assign]
    results["gradients"], results["after_step"] = gradients, learned(model)

    model = tiny_model(seed=10 * rank)
    data = squares(WIDE_IMAGES, recipe="fgvc")
    wide = train(model, data, squares(7, seed=1), output=folder / f"wide{rank}", config=WIDE)
    results["wide"], results["wide_metrics"] = learned(model), wide.metrics

    # Interrupted in the middle of the second epoch, in a folder that both know; the second process comes late.
    output = folder / "resumed"
    time.sleep(0.7 * rank)
    try:
        train(
            tiny_model(seed=0),
            squares(IMAGES),
            squares(5, seed=1),
            output=output,
            config=CONFIG,
            progress=interrupt_after(4),
        )
    except Interruption:
        results["interrupted"] = True
    dist.barrier()  # new processes would find the state that rank 0 has written by now
    time.sleep(0.7 * (1 - rank))
    model = tiny_model(seed=20 + rank)
    resumed = train(model, squares(IMAGES), squares(5, seed=1), output=output, config=CONFIG, resume=True)
    results["resumed"], results["resumed_metrics"] = learned(model), resumed.metrics

    # Every other image is unreadable, and a batch is one image: often one process has something to learn from alone.
    data = squares(12, unreadable={index: folder / f"bad{rank}_{index}.jpg" for index in range(1, 12, 2)})
    model = tiny_model(seed=4)
    half = train(model, data, output=folder / f"half{rank}", config=replace(CONFIG, batch_size=1))
    results["half"], results["half_skipped"] = learned(model), half.skipped

    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
