"""One training step of a prompted ViT: ours against VPT-Deep by plain concatenation, and against no prompts at all.

    python -m benchmarks.train_step --model vit_small_patch16_224 --model vit_base_patch16_224
    python -m benchmarks.train_step --device cuda --batch-size 128 --peers cuda

A step is forward pass, cross-entropy, backward pass and AdamW on prompts and head; weights and images are random. Peers
take turns, round by round, and each has to reproduce the logits and the prompt gradient of the first before its
time counts. "Useful" arithmetic is what the function itself takes (no prompt rows, no gradient that nobody reads): the
same for all peers of a row, so a share of the matmul peak that is measured in the same run can be compared.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.table import Table
from torch import Tensor, nn

from benchmarks.command import console, machine, mistakes_in_one_sentence
from benchmarks.timing import matmul_peak, timed
from spt_fast.backbones import embed, load_backbone
from spt_fast.devices import choose_device
from spt_fast.errors import InputError
from spt_fast.files import write_text
from spt_fast.low_precision import WeightDtype, check_weight_dtype, quantize_blocks
from spt_fast.pooling import reads_prefix_only
from spt_fast.prompted_vit import PromptedViT
from tests.naive_vpt import naive_forward

app = typer.Typer(pretty_exceptions_enable=False)
CLASSES = 100


@dataclass
class Way:
    """A way to take the step.

    Attributes:
        name: for the table.
        kind: ``"ours"``, ``"naive"`` or ``"bare"`` (no prompts, but gradients as if there were).
        weights: dtype of the frozen weights.
        autocast: whether float32 weights are cast at every use.
        compiled: whether it runs through torch.compile.
        weight_dtype: 8-bit weights of the blocks.
    """

    name: str
    kind: str
    weights: torch.dtype = torch.bfloat16
    autocast: bool = False
    compiled: bool = False
    weight_dtype: WeightDtype | None = None


OURS, OURS_COMPILED = Way("spt-fast", "ours"), Way("spt-fast, compiled", "ours", compiled=True)
NAIVE, NAIVE_COMPILED = Way("naive VPT", "naive"), Way("naive VPT, compiled", "naive", compiled=True)
BARE, BARE_COMPILED = Way("no prompts", "bare"), Way("no prompts, compiled", "bare", compiled=True)
PEERS = {
    "eager": [OURS, NAIVE, BARE],
    "compiled": [OURS_COMPILED, NAIVE_COMPILED, BARE_COMPILED],
    "low-precision": [
        OURS,
        OURS_COMPILED,
        Way("spt-fast, int8", "ours", weight_dtype="int8"),
        Way("spt-fast, int8, compiled", "ours", compiled=True, weight_dtype="int8"),
        Way("spt-fast, float8", "ours", weight_dtype="float8"),
        Way("spt-fast, float8, compiled", "ours", compiled=True, weight_dtype="float8"),
    ],
    "cuda": [
        OURS,
        OURS_COMPILED,
        NAIVE,
        NAIVE_COMPILED,
        Way("naive VPT, autocast", "naive", torch.float32, autocast=True),
        Way("naive VPT, autocast, compiled", "naive", torch.float32, autocast=True, compiled=True),
        Way("naive VPT, float32", "naive", torch.float32),
        BARE,
        BARE_COMPILED,
    ],
}


@dataclass
class Peer:
    """A way with its own copy of everything, and what was measured of it."""

    way: Way
    step: Callable[[], float] | None = None
    missing: str | None = None
    milliseconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


@app.command()
def main(
    model: Annotated[list[str] | None, typer.Option(help="A timm ViT; may be repeated.")] = None,
    num_prompts: Annotated[
        list[int] | None, typer.Option(help="Prompts of a block; may be repeated.")
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Images of a step; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    peers: Annotated[str, typer.Option(help=f"Who takes part: {', '.join(PEERS)}.")] = "eager",
    compile_mode: Annotated[str, typer.Option(help="Mode of torch.compile, where it is used.")] = "default",
    rounds: Annotated[int, typer.Option(min=1, help="Times that every peer has its turn.")] = 7,
    output: Annotated[Path | None, typer.Option(help="Write all samples to this json file.")] = None,
) -> None:
    """Time one training step of every peer."""
    with mistakes_in_one_sentence():
        chosen = choose_device(device)
        if peers not in PEERS:
            raise InputError(f"--peers must be one of {', '.join(PEERS)}, got {peers}")
    peak = matmul_peak(chosen)
    record: dict[str, Any] = {
        "machine": machine(chosen),
        "compile_mode": compile_mode,
        "matmul_peak_tflops": peak,
        "rows": [],
    }
    for name in model or ["vit_small_patch16_224"]:
        for images in batch_size or [16]:
            for prompts in num_prompts or [20, 100, 200]:
                rows = compare(name, images, prompts, PEERS[peers], chosen, compile_mode, rounds)
                for row in rows:
                    if "ms" in row:
                        row["tflops"] = row["useful_tflop"] / statistics.median(row["ms"]) * 1e3
                        row["share_of_matmul_peak"] = row["tflops"] / peak
                record["rows"] += rows
                show(f"{name}, batch {images}, P={prompts}, {record['machine']['device']}", rows)
                if output is not None:  # after every table: what was measured is not lost
                    write_text(output, json.dumps(record, indent=1) + "\n")


def compare(
    name: str, batch: int, prompts: int, ways: list[Way], device: torch.device, mode: str, rounds: int
) -> list[dict[str, Any]]:
    """A row for each peer, its samples in milliseconds among them; times of one round lie next to each other."""
    torch.manual_seed(0)
    backbone = load_backbone(name).to(device)
    inputs = (
        torch.randn(batch, 3, *backbone.patch_embed.img_size, device=device),
        torch.randint(CLASSES, (batch,), device=device),
    )
    start = torch.randn(len(backbone.blocks), prompts, backbone.embed_dim, device=device)
    head = nn.Linear(backbone.embed_dim, CLASSES, device=device)
    peers, expected = [], None
    for way in ways:
        torch._dynamo.reset()
        peer = Peer(way)
        peers.append(peer)
        try:
            peer.step, outcome = prepare(way, backbone, start, head, inputs, mode)
            for _ in range(3):
                peer.step()
            peer.peak_bytes = peak_bytes(peer.step, device)
        except (torch.OutOfMemoryError, InputError) as error:
            peer.step, peer.missing = None, str(error).splitlines()[0]
            continue
        if way.kind == "bare":
            continue
        expected = expected or outcome
        for ours, theirs in zip(expected, outcome, strict=True):
            difference = ((ours - theirs).norm() / theirs.norm()).item()
            if not difference < (0.1 if way.weight_dtype is None else 0.3):
                raise RuntimeError(f"{way.name} computes something else: relative error {difference:.2g}")
    for _ in range(rounds):
        for peer in peers:
            if peer.step is not None:
                peer.milliseconds.append(1e3 * peer.step())
    common = {"model": name, "batch_size": batch, "num_prompts": prompts, "device": device.type}
    rows = []
    for peer in peers:
        row = common | {"peer": peer.way.name, "weights": str(peer.way.weights).removeprefix("torch.")}
        if peer.step is None:
            rows.append(row | {"missing": peer.missing})
        else:
            useful = step_flops(backbone, batch, 0 if peer.way.kind == "bare" else prompts) / 1e12
            rows.append(
                row | {"ms": peer.milliseconds, "peak_bytes": peer.peak_bytes, "useful_tflop": useful}
            )
    return rows


def prepare(
    way: Way,
    backbone: Any,
    start: Tensor,
    head: nn.Linear,
    inputs: tuple[Tensor, Tensor],
    mode: str,
) -> tuple[Callable[[], float], tuple[Tensor, Tensor]]:
    """The timed step of a way, and the logits and prompt gradient of its first pass."""
    images, labels = inputs[0].to(way.weights), inputs[1]
    device = images.device
    if way.weight_dtype is not None:
        check_weight_dtype(way.weight_dtype, device)
        backbone = copy.deepcopy(backbone)
        quantize_blocks(backbone, way.weight_dtype)
    if way.kind == "ours":
        model = PromptedViT(backbone, start, num_classes=CLASSES).cast_backbone(way.weights).train()
        model.head.load_state_dict(head.state_dict())
        prompts, own_head = model.prompts, model.head
        forward: Callable[[Tensor], Tensor] = model
    else:
        own = copy.deepcopy(backbone).to(way.weights)
        own_head = copy.deepcopy(head)
        if way.kind == "naive":
            prompts = nn.Parameter(start.clone())

            def forward(images: Tensor) -> Tensor:
                # float32 masters, as anyone who trains has them
                return naive_forward(own, prompts.to(way.weights), _Cast(own_head), images)
        else:
            prompts = nn.Parameter(torch.zeros(own.embed_dim, device=device))

            def forward(images: Tensor) -> Tensor:
                tokens = embed(own, images) + prompts.to(way.weights)
                features = own.forward_head(own.norm(own.blocks(tokens)), pre_logits=True)
                return _Cast(own_head)(features)

    if way.compiled:
        forward = torch.compile(forward, mode=mode)
    learned = [prompts, *own_head.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=1e-6, fused=True)
    casting = torch.autocast(device.type, torch.bfloat16) if way.autocast else nullcontext()

    def passes() -> Tensor:
        if way.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with casting:
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        return logits

    def step() -> None:
        passes()
        optimizer.step()
        optimizer.zero_grad()

    logits = passes()
    assert prompts.grad is not None
    outcome = logits.detach().float().clone(), prompts.grad.float().clone()
    optimizer.zero_grad()
    return lambda: timed(device, step), outcome


class _Cast(nn.Module):
    """A float32 head on features of any dtype."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features.to(self.head.weight.dtype))


def peak_bytes(step: Callable[[], float], device: torch.device) -> int | None:
    """What the step holds at most on a GPU, above what lies there between steps, weights excepted."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def step_flops(backbone: Any, batch: int, prompts: int) -> int:
    """Multiplications and additions of one step with class-token pooling that somebody reads."""
    tokens = backbone.patch_embed.num_patches + backbone.num_prefix_tokens
    prefix = backbone.num_prefix_tokens if reads_prefix_only(backbone, None) else tokens
    width, depth = backbone.embed_dim, len(backbone.blocks)
    patch = backbone.patch_embed.proj.weight.numel()
    total = 2 * batch * backbone.patch_embed.num_patches * patch
    for index, block in enumerate(backbone.blocks):
        rows = prefix if index == depth - 1 else tokens
        mlp = sum(layer.weight.numel() for layer in block.mlp.modules() if isinstance(layer, nn.Linear))
        projections = 2 * batch * (2 * tokens + rows) * width * width
        outer = 2 * batch * rows * (width * width + mlp)
        attention = 4 * batch * rows * (tokens + prompts) * width
        keys_values = 2 * prompts * 2 * width * width
        # Backward: each product once more for its input; those of an attention have two inputs.
        total += projections * (2 if index else 1) + 2 * outer + 3 * attention + 2 * keys_values
    return total


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """The rows as a table; ratios are medians of the ratios within a round."""
    table = Table(title=title, title_justify="left")
    for header in (
        "",
        "ms per step",
        "images/s",
        "time of spt-fast",
        "useful TFLOP/s",
        "of matmul peak",
        "peak GB",
    ):
        table.add_column(header, justify="left" if not header else "right")
    first = next(row for row in rows if "ms" in row)
    for row in rows:
        if "ms" not in row:
            table.add_row(row["peer"], row["missing"], *[""] * 5)
            continue
        ms = statistics.median(row["ms"])
        table.add_row(
            row["peer"],
            f"{ms:.1f}",
            f"{1e3 * row['batch_size'] / ms:.1f}",
            f"{ratio(row, first):.2f}x",
            f"{row['tflops']:.3g}",
            f"{row['share_of_matmul_peak']:.0%}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
        )
    console.print(table)


def ratio(row: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times as long ``row`` takes as ``other``: the median over rounds."""
    return statistics.median(a / b for a, b in zip(row["ms"], other["ms"], strict=True))


if __name__ == "__main__":
    app()
