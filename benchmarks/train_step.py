"""One training step of a prompted ViT: ours against VPT-Deep by plain concatenation, and against no prompts at all.

    python -m benchmarks.train_step                            # this device's sizes
    python -m benchmarks.train_step --model vit_base_patch16_224 --num-prompts 0 --num-prompts 20
    python -m benchmarks.train_step --peers low-precision

A step is forward pass, cross-entropy, backward pass and AdamW; weights and images are random. Each way has to
reproduce the logits and the prompt gradient that timm's own blocks give in float32 before its time counts. Its limit is
the arithmetic of the function itself (no prompt rows, no gradient that nobody reads), the same for all that compute it.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.ceilings import Ceilings, Limit
from benchmarks.command import DeviceOption, MinutesOption, ResultsOption, measuring, show
from benchmarks.memory import peak_tensor_bytes
from benchmarks.power import joules
from benchmarks.random_backbone import load_on
from benchmarks.record import RESULTS, Record, Row
from benchmarks.summary import middle
from benchmarks.timing import Work, take_turns
from benchmarks.train_step_ways import (
    CLASSES,
    PEERS,
    WITHOUT_PROMPTS,
    Step,
    Task,
    Way,
    expected_outcome,
    prepare,
)
from spt_fast.devices import choose_device
from spt_fast.errors import InputError
from spt_fast.pooling import reads_prefix_only

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

SMALL, BASE, LARGE, HUGE = (
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
)
# Model, images, prompts and who takes part, the most telling first.
PLANS = {
    "cpu": [
        (SMALL, 8, 20, "published"),
        (SMALL, 8, 100, "eager"),
        (SMALL, 8, 0, ""),
        *((SMALL, 8, prompts, "eager") for prompts in (10, 50, 200)),
        (BASE, 4, 20, "eager"),
        (SMALL, 8, 20, "compiled"),
    ],
    "cuda": [
        (BASE, 64, 20, "replayed"),
        (BASE, 64, 100, "replayed"),
        (BASE, 64, 0, ""),
        *((LARGE, 64, prompts, "replayed") for prompts in (20, 100)),
        (BASE, 64, 20, "compiled"),
        *((BASE, 64, prompts, "replayed") for prompts in (10, 50, 200)),
        (HUGE, 64, 20, "eager"),
        (SMALL, 64, 20, "replayed"),
        (BASE, 64, 20, "published"),
    ],
}
ROUNDS = {"cpu": 4, "cuda": 15}
# Relative errors in norm against float32: rounding in bfloat16 or 8 bits through a dozen blocks and back.
TOLERANCE = {None: 0.1, "int8": 0.3, "float8": 0.3}
EXTRAS = {
    "images/s": lambda row: f"{row['case']['batch_size'] / middle(row):.1f}",
    "TFLOP/s": lambda row: f"{row['limit']['operations'] / middle(row) / 1e12:.3g}",
    "peak MB": lambda row: f"{row['peak_bytes'] / 1e6:,.0f}",
    "J/image": lambda row: f"{row['joules_per_image']:.3g}" if row["joules_per_image"] else "",
}


@app.command()
def main(
    context: typer.Context,
    model: Annotated[list[str] | None, typer.Option(help="A timm ViT; may be repeated.")] = None,
    num_prompts: Annotated[
        list[int] | None, typer.Option(min=0, help="Prompts of a block, 0 is none; may be repeated.")
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Images; may be repeated.")] = None,
    peers: Annotated[str, typer.Option(help=f"Who takes part: {', '.join(PEERS)}.")] = "eager",
    brief: Annotated[
        bool,
        typer.Option("--brief", help="Of the default sizes only those of one model, without torch.compile."),
    ] = False,
    compile_mode: Annotated[str, typer.Option(help="Mode of torch.compile, where it is used.")] = "default",
    device: DeviceOption = "auto",
    rounds: Annotated[int | None, typer.Option(min=1, help="Times that every peer has its turn.")] = None,
    minutes: MinutesOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """A training step against naive VPT, no prompts, linear probe and full fine-tuning."""
    settings = {"compile_mode": compile_mode}
    with measuring("train_step", context, device, results, minutes, **settings) as (record, ceilings):
        if peers not in PEERS:
            raise InputError(f"--peers must be one of {', '.join(PEERS)}, got {peers}")
        chosen = choose_device(device)
        plan = PLANS[chosen.type]
        if brief:
            plan = [each for each in plan if each[0] == plan[0][0] and each[3] not in ("all", "compiled")]
        if model or num_prompts or batch_size or peers != "eager":
            plan = [
                (name, images, prompts, peers if prompts else "")
                for name in model or [SMALL]
                for images in batch_size or [8]
                for prompts in num_prompts or [20, 100, 200]
            ]
        for name, images, prompts, who in plan:
            if not record.may_begin():
                return
            case = {"model": name, "batch_size": images, "num_prompts": prompts}
            ways = PEERS[who] if prompts else WITHOUT_PROMPTS
            compare(record, ceilings, case, ways, chosen, compile_mode, rounds or ROUNDS[chosen.type])
            record.save()


def compare(
    record: Record,
    ceilings: Ceilings,
    case: Row,
    ways: list[Way],
    device: torch.device,
    compile_mode: str,
    rounds: int,
) -> None:
    """Add a row for each way."""
    task = make_task(case, device)
    expected = {kind: expected_outcome(task, prompted=kind) for kind in {way.prompted for way in ways}}
    steps: dict[str, Step] = {}
    reasons: dict[str, str] = {}
    facts: dict[str, Row] = {}
    for way in ways:
        torch._dynamo.reset()
        try:
            step = prepare(way, task, compile_mode)
            error = max(
                ((ours - theirs).norm() / theirs.norm()).item()
                for ours, theirs in zip(step.outcome, expected[way.prompted], strict=True)
            )
            if not error < TOLERANCE[way.weight_dtype]:
                reasons[way.name] = f"computes something else: relative error {error:.2g}"
                continue
            step.take()
            facts[way.name] = {
                "relative_error": error,
                "peak_bytes": peak_tensor_bytes(device, step.launch),
                "joules_per_image": _per_image(joules(device, step.take), case),
            }
        except (torch.OutOfMemoryError, InputError) as failure:
            reasons[way.name] = str(failure).splitlines()[0]
            continue
        steps[way.name] = step
    works: dict[str, Work] = {name: lambda number, step=step: step.take() for name, step in steps.items()}  # type: ignore[misc]
    samples = take_turns(device, works, rounds, warmup=1)
    before = len(record.rows)
    for way in ways:
        if way.name in samples:
            limit = step_limit(ceilings, task, way)
            record.measured(case, way.name, samples[way.name], limit=limit, **facts[way.name])
        else:
            record.missing(case, way.name, reasons[way.name])
    shown = f"{case['model']}, batch {case['batch_size']}, P={case['num_prompts']}"
    show(shown, record.rows[before:], against=ways[0].name, extras=EXTRAS)


def make_task(case: Row, device: torch.device) -> Task:
    """Random weights, prompts, images and labels; what a step costs does not depend on them."""
    torch.manual_seed(0)
    backbone = load_on(device, case["model"])
    width, images = backbone.embed_dim, case["batch_size"]
    return Task(
        backbone,
        prompts=torch.randn(len(backbone.blocks), case["num_prompts"], width, device=device),
        head=nn.Linear(width, CLASSES, device=device),
        images=torch.randn(images, 3, *backbone.patch_embed.img_size, device=device),
        labels=torch.randint(CLASSES, (images,), device=device),
    )


def step_limit(ceilings: Ceilings, task: Task, way: Way) -> Limit:
    """The least time: the arithmetic of what learns, or every weight read once forward and once backward."""
    weights = sum(parameter.numel() for parameter in task.backbone.parameters())
    dtype = "float32" if way.weights == torch.float32 and not way.autocast else "bfloat16"
    reads = {"linear": 1, "full": 3}.get(way.kind, 2)
    return ceilings.limit(
        moved_bytes=reads * weights * getattr(torch, dtype).itemsize,
        operations=step_operations(task.backbone, len(task.images), task.prompts.shape[1], way.kind),
        dtype=dtype,
    )


def step_operations(backbone: Any, batch: int, prompts: int, kind: str = "ours") -> int:
    """Multiplications and additions of one step that somebody reads the result of.

    Args:
        backbone: the ViT; its own pooling counts.
        batch: images.
        prompts: of each block.
        kind: as :class:`benchmarks.train_step_ways.Way`: ``"linear"`` has no backward pass through the backbone,
            ``"full"`` gradients of every weight.
    """
    tokens = backbone.patch_embed.num_patches + backbone.num_prefix_tokens
    prefix = backbone.num_prefix_tokens if reads_prefix_only(backbone, None) else tokens
    width, depth = backbone.embed_dim, len(backbone.blocks)
    patches = 2 * batch * backbone.patch_embed.num_patches * backbone.patch_embed.proj.weight.numel()
    # Backward: each product once more for its input (none in a linear probe), and once more for its weight.
    times = {"linear": 1, "full": 3}.get(kind, 2)
    total = patches * (2 if kind == "full" else 1)
    for index, block in enumerate(backbone.blocks):
        rows = prefix if index == depth - 1 else tokens
        mlp = sum(layer.weight.numel() for layer in block.mlp.modules() if isinstance(layer, nn.Linear))
        projections = 2 * batch * (2 * tokens + rows) * width * width
        outer = 2 * batch * rows * (width * width + mlp)
        attention = 4 * batch * rows * (tokens + prompts) * width
        keys_values = 2 * prompts * 2 * width * width
        # Into the first block's tokens no gradient goes, unless what makes them learns.
        total += projections * (1 if index == 0 and kind not in ("linear", "full") else times)
        # Each product of an attention has two inputs.
        total += times * outer + (1 if kind == "linear" else 3) * attention + 2 * keys_values
    return total


def _per_image(energy: float | None, case: Row) -> float | None:
    return None if energy is None else energy / case["batch_size"]


if __name__ == "__main__":
    app()
