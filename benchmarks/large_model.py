"""Memory and speed of a training step of a large ViT: ours, ours with checkpoints, and naive VPT.

    python -m benchmarks.large_model                           # on a GPU ViT-H/14 with 64 images, 20 prompts a block
    python -m benchmarks.large_model --model vit_giant_patch14_224 --batch-size 32

The peak is that of everything a training process holds but the batch itself: frozen weights in the dtype of training,
prompts and head with their moments, and what the step keeps for its backward pass. Where the hardware has no room for a
peer, its row says so. Each has to reproduce, on a few images, the logits and the prompt gradient that timm's own blocks
give in float32 before its time counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.ceilings import Ceilings
from benchmarks.command import DeviceOption, MinutesOption, ResultsOption, measuring, show
from benchmarks.memory import peak_tensor_bytes
from benchmarks.random_backbone import load_on
from benchmarks.record import RESULTS, Record, Row
from benchmarks.summary import middle
from benchmarks.timing import Work, take_turns
from benchmarks.train_step import TOLERANCE, step_limit
from benchmarks.train_step_ways import CLASSES, NAIVE, OURS, Task, expected_outcome, prepare
from spt_fast import PromptedViT
from spt_fast.devices import choose_device
from spt_fast.optimizer import PromptAdamW
from spt_fast.training import training_dtype
from spt_fast.training_step import TrainingStep

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Model, images and rounds.
SIZES = {"cpu": ("vit_tiny_patch16_224", 8, 3), "cuda": ("vit_huge_patch14_224", 64, 10)}
JUDGED_IMAGES = 2
EXTRAS = {
    "images/s": lambda row: f"{row['case']['batch_size'] / middle(row):.1f}",
    "peak GB": lambda row: f"{row['peak_bytes'] / 1e9:.2f}",
}


@app.command()
def main(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="A timm ViT, instead of the device's own.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks, instead of the model's own.")] = None,
    embed_dim: Annotated[int | None, typer.Option(min=1, help="Width, instead of the model's own.")] = None,
    num_heads: Annotated[int | None, typer.Option(min=1, help="Heads, instead of the model's own.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of a block.")] = 20,
    device: DeviceOption = "auto",
    rounds: Annotated[int | None, typer.Option(min=1, help="Times that every peer has its turn.")] = None,
    minutes: MinutesOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Memory and speed of a training step of a large ViT, with and without checkpoints, against naive VPT."""
    with measuring("large_model", context, device, results, minutes) as (record, ceilings):
        chosen = choose_device(device)
        usual, images, usual_rounds = SIZES[chosen.type]
        shape = {"depth": depth, "embed_dim": embed_dim, "num_heads": num_heads}
        given = {name: value for name, value in shape.items() if value is not None}
        case = {
            "model": model or usual,
            **given,
            "batch_size": batch_size or images,
            "num_prompts": num_prompts,
        }
        if record.may_begin():
            compare(record, ceilings, case, made_task(case, given, chosen), rounds or usual_rounds)


@dataclass(frozen=True)
class Contender:
    """Who takes a training step.

    Attributes:
        name: for the tables.
        prepared: makes a step for a task; it holds weights of its own.
        outcome: the logits and the prompt gradient that it computes for a task.
    """

    name: str
    prepared: Callable[[Task], Callable[[], Any]]
    outcome: Callable[[Task], list[Tensor]]


def contenders(dtype: torch.dtype) -> list[Contender]:
    """Ours first; all with frozen weights in ``dtype``."""
    naive = replace(NAIVE, weights=dtype)
    return [
        _ours("spt-fast", dtype, checkpoint_blocks=False),
        _ours("spt-fast, checkpoint_blocks", dtype, checkpoint_blocks=True),
        Contender(
            naive.name,
            lambda task: prepare(naive, task, "default").take,
            lambda task: prepare(naive, task, "default").outcome,
        ),
    ]


def _ours(name: str, dtype: torch.dtype, *, checkpoint_blocks: bool) -> Contender:
    def model_of(task: Task) -> PromptedViT:
        # A copy, as everybody has, also where the dtype is that of the original.
        model = PromptedViT(
            copy.deepcopy(task.backbone).to(dtype),
            task.prompts,
            num_classes=CLASSES,
            checkpoint_blocks=checkpoint_blocks,
        )
        model.head.load_state_dict(task.head.state_dict())
        return model.train()

    def prepared(task: Task) -> Callable[[], None]:
        model = model_of(task)
        optimizer = PromptAdamW(
            model.prompts, model.head, lr=1e-6, weight_decay=0.0, head_weight_decay=0.0, fused=True
        )
        sums = torch.zeros(3, dtype=torch.float64, device=task.device)
        step = TrainingStep(model, optimizer, sums, batch_size=len(task.images))
        return lambda: step(task.images, task.labels)

    def outcome(task: Task) -> list[Tensor]:
        model = model_of(task)
        logits = model(task.images)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), task.labels), model.prompts)
        return [logits.detach().float(), gradient]

    return Contender(name, prepared, outcome)


def compare(record: Record, ceilings: Ceilings, case: Row, task: Task, rounds: int) -> None:
    """Add a row for each contender."""
    dtype = training_dtype("auto", task.device)
    few = replace(task, images=task.images[:JUDGED_IMAGES], labels=task.labels[:JUDGED_IMAGES])
    expected = expected_outcome(few, prompted=True)
    steps: dict[str, Callable[[], Any]] = {}
    facts: dict[str, Row] = {}
    reasons: dict[str, str] = {}
    everybody = contenders(dtype)
    for each in everybody:
        try:
            error = max(
                ((ours - theirs).norm() / theirs.norm()).item()
                for ours, theirs in zip(each.outcome(few), expected, strict=True)
            )
            if not error < TOLERANCE[None]:
                reasons[each.name] = f"computes something else: relative error {error:.2g}"
                continue
            step, peak = with_peak(each, task)
        except torch.OutOfMemoryError as failure:
            reasons[each.name] = str(failure).splitlines()[0]
            continue
        steps[each.name] = step
        facts[each.name] = {"relative_error": error, "peak_bytes": peak}
    works: dict[str, Work] = {name: lambda number, step=step: step() for name, step in steps.items()}  # type: ignore[misc]
    samples = take_turns(task.device, works, rounds, warmup=1)
    limit = step_limit(ceilings, task, replace(OURS, weights=dtype))
    for each in everybody:
        if each.name in samples:
            record.measured(case, each.name, samples[each.name], limit=limit, **facts[each.name])
        else:
            record.missing(case, each.name, reasons[each.name])
    record.save()
    shown = f"{case['model']}, batch {case['batch_size']}, P={case['num_prompts']}"
    show(shown, record.rows, against=everybody[0].name, extras=EXTRAS)


def with_peak(contender: Contender, task: Task) -> tuple[Callable[[], Any], int]:
    """Its step, and the most bytes held while it was made and taken for the first time."""
    made: list[Callable[[], Any]] = []

    def work() -> None:
        made.append(contender.prepared(task))
        made[0]()

    peak = peak_tensor_bytes(task.device, work)
    return made[0], peak


def made_task(case: Row, shape: Row, device: torch.device) -> Task:
    """Random weights, prompts, images and labels; what a step costs does not depend on them."""
    torch.manual_seed(0)
    backbone = load_on(device, case["model"], **shape)
    images = case["batch_size"]
    return Task(
        backbone,
        prompts=torch.randn(len(backbone.blocks), case["num_prompts"], backbone.embed_dim, device=device),
        head=nn.Linear(backbone.embed_dim, CLASSES, device=device),
        images=torch.randn(images, 3, *backbone.patch_embed.img_size, device=device),
        labels=torch.randint(CLASSES, (images,), device=device),
    )


if __name__ == "__main__":
    app()
