"""Prototypes from as many images as ImageNet-1k has, in one pass: how long, and how much of it the backbone takes.

    python -m benchmarks.imagenet_stream --device cuda                  # all 1,281,167 images, ten minutes or so
    python -m benchmarks.imagenet_stream --device cuda --minutes 2      # as many as fit, and what all would take

Mini-batch k-means over the tokens of all blocks of a ViT-B/16, 3.0 G of them, through ``build_prototypes``. The same
few batches of random images come again and again: what is streamed is as large as ImageNet, what lies on the device is
not, and no disk is measured. Beside it stands the same stream with the forward passes alone: without them there are no
tokens to cluster. Before a time counts, the prototypes have to fit the tokens nearly as well as exact k-means of these
few batches, which are the same tokens.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.ceilings import Ceilings
from benchmarks.command import DeviceOption, MinutesOption, ResultsOption, console, measuring, show
from benchmarks.naming import counted
from benchmarks.prototypes import MODELS, TOLERANCE, block_tokens, build_limit
from benchmarks.random_backbone import load_on
from benchmarks.record import RESULTS, Record, Row
from benchmarks.streaming import MEMORY
from benchmarks.summary import middle
from benchmarks.timing import synchronized_seconds
from spt_fast import Prototypes, build_prototypes
from spt_fast.backbones import image_settings
from spt_fast.devices import choose_device
from spt_fast.kernels import kmeans_step
from spt_fast.tokens import stream_layer_tokens

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Of the whole stream, and of the part that says how many fit into the time.
IMAGES = {"cpu": 512, "cuda": 1_281_167}
FIRST_PART = {"cpu": 128, "cuda": 25_600}
# Different batches; the rest of the stream is these again.
POOL = 4
# Of the time that is left, the part that is chosen after the first takes about this share.
FILLED = 0.8
PASSES = 100  # of the exact k-means that the result is compared with
STREAMED, FORWARD = "spt-fast, mini-batch k-means", "forward passes alone"


@app.command()
def main(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="A timm ViT with random weights, instead of the device's own.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Images of the stream; default: 512 on a CPU, ImageNet's on a GPU."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prototypes of a block.")] = 20,
    device: DeviceOption = "auto",
    minutes: MinutesOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Prototypes from a stream as long as ImageNet's, and the share of the backbone's forward passes."""
    begun = time.monotonic()
    with measuring("imagenet_stream", context, device, results, minutes) as (record, ceilings):
        chosen = choose_device(device)
        name, arguments, batch = MODELS[chosen.type]
        if model is not None:
            name, arguments = model, {}
        torch.manual_seed(0)
        backbone = load_on(chosen, name, **arguments)
        if chosen.type == "cuda":
            backbone = backbone.to(torch.bfloat16)
        size = image_settings(backbone)["image_size"]
        pool = [torch.randn(batch_size or batch, 3, *size, device=chosen) for _ in range(POOL)]
        work = Work(name, backbone, pool, num_prompts)
        whole = IMAGES[chosen.type] if images is None else images
        parts: list[tuple[float, float]] = []
        amount = min(whole, FIRST_PART[chosen.type])
        if not record.may_begin():
            return
        warm_up(work)
        best = exact_inertia(work)
        parts += measure(record, ceilings, work, amount, best)
        left = math.inf if minutes is None else 60 * minutes - (time.monotonic() - begun)
        more = affordable(amount, spent(record), left, whole)
        if parts and more > amount:
            parts += measure(record, ceilings, work, more, best)
        if parts and max(amount, more) < whole:
            extrapolate(record, work, parts, whole)


@dataclass(frozen=True)
class Work:
    """What is streamed through what.

    Attributes:
        model: timm's name of the backbone.
        backbone: the frozen ViT, on its device.
        pool: different batches ``[B, 3, H, W]`` on the device.
        num_prompts: prototypes of a block.
    """

    model: str
    backbone: Any
    pool: list[Tensor]
    num_prompts: int

    @property
    def device(self) -> torch.device:
        return self.pool[0].device

    def case(self, images: int) -> Row:
        """A stream of so many images; ``tokens`` are those of one of the layers."""
        return {
            "model": self.model,
            "layers": len(self.backbone.blocks),
            "clusters": self.num_prompts,
            "processes": 1,
            "tokens": images * self.backbone.patch_embed.num_patches,
        }

    def prototypes(self, images: int) -> Prototypes:
        """Of a stream of so many images."""
        built: Prototypes = build_prototypes(
            self.backbone,
            RecycledBatches(self.pool, images),
            num_prompts=self.num_prompts,
            method="minibatch_kmeans",
        )
        return built

    def forward(self, images: int) -> None:
        """The layer tokens of a stream, which nobody uses."""
        for _ in stream_layer_tokens(self.backbone, RecycledBatches(self.pool, images)):
            pass


class RecycledBatches:
    """So many images out of a few batches that come again and again; the same every time they are iterated.

    Args:
        pool: the batches.
        images: how many images; the last batch is cut.

    Example:
        >>> batches = RecycledBatches([torch.zeros(4, 1), torch.ones(4, 1)], images=10)
        >>> [(len(batch), batch.mean().item()) for batch in batches]
        [(4, 0.0), (4, 1.0), (2, 0.0)]
    """

    def __init__(self, pool: Sequence[Tensor], images: int) -> None:
        self._pool = pool
        self._images = images

    def __iter__(self) -> Iterator[Tensor]:
        done = number = 0
        while done < self._images:
            batch = self._pool[number % len(self._pool)][: self._images - done]
            done, number = done + len(batch), number + 1
            yield batch


def warm_up(work: Work) -> None:
    """Compile kernels and start threads, on every path that is timed."""
    few = len(work.pool[0]) + 1
    work.prototypes(few)
    work.forward(few)


def measure(
    record: Record, ceilings: Ceilings, work: Work, images: int, best: float
) -> list[tuple[float, float]]:
    """Add the rows of a stream of so many images; its images and seconds, if its prototypes are good ones."""
    case, made = work.case(images), []
    memory = MEMORY[work.device.type](work.device)
    seconds = synchronized_seconds(work.device, lambda: made.append(work.prototypes(images)))
    peak = memory.peak_bytes()
    found = inertia_per_token(work, made[0].values)
    if not found < (1 + TOLERANCE["minibatch_kmeans"]) * best:
        record.missing(case, STREAMED, f"its inertia is {found / best:.2f} times that of exact k-means")
        return []
    alone = synchronized_seconds(work.device, lambda: work.forward(images))
    limit = build_limit(ceilings, work.backbone, images, next(work.backbone.parameters()).dtype)
    facts = {"images": images, "peak_bytes": peak, "inertia_per_token": found}
    record.measured(case, STREAMED, [seconds], limit=limit, **facts)
    record.measured(case, FORWARD, [alone], images=images)
    record.save()
    tokens = case["layers"] * case["tokens"]
    extras: dict[str, Callable[[Row], str]] = {
        "tokens/s": lambda row: f"{tokens / middle(row):.3g}",
        "images/s": lambda row: f"{images / middle(row):,.0f}",
        "peak MB": lambda row: f"{row['peak_bytes'] / 1e6:,.0f}",
    }
    show(f"{counted(images, 'image')}, {tokens:,} tokens", record.rows[-2:], against=STREAMED, extras=extras)
    console.print(f"the forward passes take {alone / seconds:.0%} of the time")
    return [(float(images), seconds)]


def spent(record: Record) -> float:
    """Seconds of everything that was measured so far."""
    return sum(middle(row) for row in record.rows if row["kind"] == "measured")


def affordable(images: int, seconds: float, left: float, whole: int) -> int:
    """How many images fit into the time that is left, up to ``whole``; 0 if no more than there were already.

    Args:
        images: that were measured.
        seconds: they took.
        left: seconds.
        whole: the most.

    Example:
        >>> affordable(100, 10.0, 50.0, 1000), affordable(100, 10.0, 500.0, 300), affordable(100, 10.0, 5.0, 1000)
        (400, 300, 0)
    """
    # Within floating point, so that all that was asked for is not missed by a rounding.
    fit = whole if left == math.inf else min(whole, int(FILLED * left / max(seconds, 1e-9) * images + 1e-6))
    return fit if fit > images else 0


def extrapolate(record: Record, work: Work, parts: Sequence[tuple[float, float]], images: int) -> None:
    """Add what a stream of so many images would take."""
    if len(parts) > 1:
        rule = "along the line through the two parts of the stream that were measured"
    else:
        rule = "in proportion to the images, from the part of the stream that was measured"
    record.extrapolated(work.case(images), STREAMED, seconds_of(images, parts), rule, parts)
    record.save()
    show(f"extrapolated to {counted(images, 'image')}", record.rows[-1:], against=STREAMED)


def seconds_of(images: int, parts: Sequence[tuple[float, float]]) -> float:
    """By the line through two measured parts, or in proportion to one.

    Example:
        >>> seconds_of(1000, [(100, 3.0), (200, 5.0)]), seconds_of(1000, [(100, 3.0)])
        (21.0, 30.0)
    """
    last, seconds = parts[-1]
    if len(parts) == 1:
        return images / last * seconds
    first, seconds_before = parts[-2]
    return seconds + (images - last) * (seconds - seconds_before) / (last - first)


def exact_inertia(work: Work) -> float:
    """Per token, what exact k-means of the pool reaches on one of its batches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lloyd still moving a little
        exact = build_prototypes(work.backbone, work.pool, num_prompts=work.num_prompts, max_iter=PASSES)
    return inertia_per_token(work, exact.values)


def inertia_per_token(work: Work, centers: Tensor) -> float:
    """On the first batch of the pool, averaged over blocks and tokens."""
    step = kmeans_step(block_tokens(work.backbone, work.pool[:1]), centers.to(work.device))
    return float(step.inertia.sum()) / int(step.counts.sum())


if __name__ == "__main__":
    app()
