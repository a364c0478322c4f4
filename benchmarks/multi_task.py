"""Many tasks in one batch: MultiTaskViT against one task alone, and against a loop over the tasks.

    python -m benchmarks.multi_task                            # ViT-S/16 in bfloat16
    python -m benchmarks.multi_task --model vit_base_patch16_224 --device cuda --batch-size 256

Every task has its own random prompts and head. The images are the same for all three: in one batch of mixed tasks, in
one batch of a single task, and task by task in small batches. The mixed batch has to agree with timm's own blocks in
float32, prompts being plain tokens, and so have the others, before their times count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.command import DeviceOption, MinutesOption, ResultsOption, RoundsOption, measuring, show
from benchmarks.naive_vpt import naive_forward
from benchmarks.random_backbone import load_on
from benchmarks.record import RESULTS
from benchmarks.timing import rotated, take_turns
from spt_fast import MultiTaskViT, PromptedViT
from spt_fast.devices import choose_device

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Relative error in norm against float32: rounding in bfloat16 through a dozen blocks.
TOLERANCE = 0.05


@app.command()
@torch.inference_mode()
def main(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A timm ViT.")] = "vit_small_patch16_224",
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks.")] = 16,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of a task's block.")] = 20,
    num_classes: Annotated[int, typer.Option(min=1, help="Classes of a task.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Images.")] = 32,
    device: DeviceOption = "auto",
    rounds: RoundsOption = 9,
    minutes: MinutesOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """A batch of many tasks against one task alone and against a loop over tasks."""
    settings = {"rounds": rounds, "num_classes": num_classes}
    with measuring("multi_task", context, device, results, minutes, **settings) as (record, _):
        chosen = choose_device(device)
        torch.manual_seed(0)
        full = load_on(chosen, model)
        images = torch.randn(batch_size, 3, *full.patch_embed.img_size, device=chosen)
        names = [f"task {number}" for number in torch.randint(tasks, (batch_size,)).tolist()]
        shape = (len(full.blocks), num_prompts, full.embed_dim)
        starts = {f"task {number}": torch.randn(shape, device=chosen) for number in range(tasks)}
        backbone = load_on(chosen, model)
        backbone.load_state_dict(full.state_dict())
        backbone.to(torch.bfloat16)
        alone = {
            name: PromptedViT(backbone, start, num_classes=num_classes).eval()
            for name, start in starts.items()
        }
        mixed = MultiTaskViT(backbone, alone)
        owns = {
            name: torch.tensor([each == name for each in names], device=chosen) for name in sorted(set(names))
        }

        def loop(images: Tensor) -> Tensor:
            logits = torch.empty(batch_size, num_classes, device=chosen)
            for name, own in owns.items():
                logits[own] = alone[name](images[own])
            return logits

        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "mixed tasks, one batch": lambda images: mixed(images, names),
            "one task, one batch": alone["task 0"],
            "task by task": loop,
        }
        expected = torch.empty(batch_size, num_classes, device=chosen)
        for name, own in owns.items():
            expected[own] = naive_forward(full, starts[name], alone[name].head, images[own])
        first_task = naive_forward(full, starts["task 0"], alone["task 0"].head, images)
        copies = rotated(images.bfloat16())
        case = {"model": model, "tasks": tasks, "batch_size": batch_size, "num_prompts": num_prompts}
        wrong = {}
        for name, way in ways.items():
            right = first_task if name == "one task, one batch" else expected
            error = ((way(copies[0][0]) - right).norm() / right.norm()).item()
            if not error < TOLERANCE:
                wrong[name] = f"computes something else: relative error {error:.2g}"
        works = {
            name: lambda number, way=way: way(copies[number % len(copies)][0])
            for name, way in ways.items()
            if name not in wrong
        }
        samples = take_turns(chosen, works, rounds)
        for name in ways:
            if name in wrong:
                record.missing(case, name, wrong[name])
            else:
                record.measured(case, name, samples[name])
        show(f"{model}, {tasks} tasks, batch {batch_size}", record.rows, against="mixed tasks, one batch")


if __name__ == "__main__":
    app()
