"""Many tasks in one batch: MultiTaskViT against one task alone, and against a loop over the tasks.

    python -m benchmarks.multi_task                            # ViT-S/16 in bfloat16 on this CPU
    python -m benchmarks.multi_task --model vit_base_patch16_224 --device cuda --batch-size 256

Every task has its own random prompts and head. The images are the same for all three: in one batch of mixed tasks, in
one batch of a single task, and task by task in small batches. Peers take turns, round by round; mixed batch and loop
have to agree in all logits before their times count.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from benchmarks.command import console, machine, mistakes_in_one_sentence
from benchmarks.timing import timed
from spt_fast import MultiTaskViT, PromptedViT, load_backbone
from spt_fast.devices import choose_device
from spt_fast.files import write_text

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
@torch.inference_mode()
def main(
    model: Annotated[str, typer.Option(help="A timm ViT.")] = "vit_small_patch16_224",
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks.")] = 16,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of a task's block.")] = 20,
    num_classes: Annotated[int, typer.Option(min=1, help="Classes of a task.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Images.")] = 32,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Times that every peer has its turn.")] = 9,
    output: Annotated[Path | None, typer.Option(help="Write all samples to this json file.")] = None,
) -> None:
    """Time one batch of mixed tasks."""
    with mistakes_in_one_sentence():
        chosen = choose_device(device)
    torch.manual_seed(0)
    backbone = load_backbone(model).to(chosen, torch.bfloat16)
    shape = (len(backbone.blocks), num_prompts, backbone.embed_dim)
    alone = {
        f"task {number}": PromptedViT(backbone, torch.randn(shape), num_classes=num_classes).eval()
        for number in range(tasks)
    }
    mixed = MultiTaskViT(backbone, alone)
    images = torch.randn(batch_size, 3, *backbone.patch_embed.img_size, device=chosen, dtype=torch.bfloat16)
    names = [f"task {number}" for number in torch.randint(tasks, (batch_size,)).tolist()]

    def loop() -> Tensor:
        logits = torch.empty(batch_size, num_classes, device=chosen)
        for name in sorted(set(names)):
            own = torch.tensor([each == name for each in names], device=chosen)
            logits[own] = alone[name](images[own])
        return logits

    ways: dict[str, Callable[[], Tensor]] = {
        "mixed tasks, one batch": lambda: mixed(images, names),
        "one task, one batch": lambda: alone["task 0"](images),
        "task by task": loop,
    }
    agreed, looped = ways["mixed tasks, one batch"](), loop()
    error = ((agreed - looped).norm() / looped.norm()).item()
    if not error < 0.05:
        raise RuntimeError(f"the mixed batch computes something else: relative error {error:.2g}")
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, work in ways.items():
            milliseconds = 1e3 * timed(chosen, work)
            if number >= 2:  # the first are warm-up
                samples[name].append(milliseconds)
    record: dict[str, Any] = {
        "machine": machine(chosen),
        "model": model,
        "tasks": tasks,
        "num_prompts": num_prompts,
        "num_classes": num_classes,
        "batch_size": batch_size,
        "rows": [{"peer": name, "ms": ms} for name, ms in samples.items()],
    }
    table = Table(
        title=f"{model}, {tasks} tasks, batch {batch_size}, {record['machine']['device']}",
        title_justify="left",
    )
    for header in ("", "ms", "time of the mixed batch"):
        table.add_column(header, justify="left" if not header else "right")
    first = samples["mixed tasks, one batch"]
    for name, ms in samples.items():
        ratio = statistics.median(a / b for a, b in zip(ms, first, strict=True))
        table.add_row(name, f"{statistics.median(ms):.1f}", f"{ratio:.2f}x")
    console.print(table)
    if output is not None:
        write_text(output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    app()
