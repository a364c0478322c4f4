"""Table 1 of the paper, measured again: what it costs to build the prototypes of a data set, end to end.

    python -m benchmarks.prototypes                            # this device's model, 5,394 images
    python -m benchmarks.prototypes --model vit_base_patch16_224 --images 500

End to end is from images in memory to the prototypes of every block: forward pass of the backbone and clustering. The
images are as many as CUB-200-2011 trains on: random crops of photographs that come with scikit-learn, so that
tokens are those of natural images. Beside our times stand the paper's own, quoted, and what its approach
(scikit-learn's k-means, one block after the other; its clustering code was not released) would take here, extrapolated
from small shares of the images. Before a time counts, clusters have to fit the tokens as well as scikit-learn's.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sklearn.cluster import KMeans as ScikitLearnKMeans
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.functional import normalize, resize

from benchmarks.ceilings import Ceilings, Limit, name_of
from benchmarks.command import DeviceOption, MinutesOption, ResultsOption, measuring, show
from benchmarks.random_backbone import load_on
from benchmarks.record import RESULTS, Record, Row
from benchmarks.timing import synchronized_seconds
from spt_fast import Prototypes, build_prototypes
from spt_fast.backbones import image_settings
from spt_fast.building import Method
from spt_fast.devices import choose_device
from spt_fast.kernels import kmeans_step
from spt_fast.tokens import stream_layer_tokens

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

CUB_IMAGES = 5394
FRACTIONS = (0.1, 0.3, 0.5, 0.7, 1.0)
METHODS: dict[Method, str] = {
    "kmeans": "k-means",
    "minibatch_kmeans": "mini-batch k-means",
    "mean_pool": "mean pooling",
    "max_pool": "max pooling",
    "random_sample": "random sample",
}
DAY = 86_400.0
SOURCE = "Wang et al. 2024, Table 1: CUB-200-2011, ViT-B/16, their hardware"
PAPER = {
    "K-means": [days * DAY for days in (0.10, 0.30, 1.70, 6.20, 27.30)],
    "mean pooling": [4.83, 13.20, 21.80, 29.19, 42.63],
    "max pooling": [7.20, 19.93, 32.80, 45.11, 64.86],
    "random sample": [5.30, 14.65, 24.13, 32.50, 43.56],
}
# Name, arguments, and images at a time.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "cpu": (
        "vit_tiny_patch16_224",
        {"checkpoint": "bundled:vit_tiny_mae_cifar10", "img_size": 32, "patch_size": 4},
        64,
    ),
    "cuda": ("vit_base_patch16_224", {}, 256),
}
# What the extrapolation starts from, and where prototypes are compared with scikit-learn's.
SMALL_FRACTIONS = (0.005, 0.01, 0.02)
RELEASED = "scikit-learn KMeans, block after block"
# By how much the inertia of clusters may exceed that of scikit-learn's: other seeds find other optima.
TOLERANCE = {"kmeans": 0.05, "minibatch_kmeans": 0.1}
# Work that is done sooner is done three times.
SHORT_SECONDS = 1.5
EXTRAS = {"inertia per token": lambda row: f"{row['inertia_per_token']:.4g}"}


@app.command()
def main(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="A timm ViT with random weights, instead of the device's own.")
    ] = None,
    images: Annotated[int, typer.Option(min=200, help="Images of the data set.")] = CUB_IMAGES,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prototypes of a block.")] = 20,
    fraction: Annotated[
        list[float] | None, typer.Option(min=0.001, max=1.0, help="Share of the images; may be repeated.")
    ] = None,
    device: DeviceOption = "auto",
    minutes: MinutesOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """The paper's Table 1 again: k-means, pooling and sampling over shares of a CUB-sized data set."""
    with measuring("prototypes", context, device, results, minutes) as (record, ceilings):
        chosen = choose_device(device)
        name, arguments, batch = MODELS[chosen.type]
        if model is not None:
            name, arguments = model, {}
        backbone = load_on(chosen, name, **arguments)
        if chosen.type == "cuda":
            backbone = backbone.to(torch.bfloat16)
        batches = cropped_photographs(images, batch, chosen, **image_settings(backbone))
        common = {"model": name, "images": images, "num_prompts": num_prompts}
        build(backbone, batches[:1], "kmeans", num_prompts, 1.0)  # warm-up
        judge = Judge(backbone, batches, num_prompts)
        for share in fraction or FRACTIONS:
            if not record.may_begin():
                return
            compare(record, ceilings, {**common, "fraction": share}, backbone, batches, judge)
            record.save()
        extrapolate(record, common, backbone, batches, fraction or list(FRACTIONS))


def cropped_photographs(
    count: int,
    batch: int,
    device: torch.device,
    *,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> list[Tensor]:
    """Normalised ``[batch, 3, H, W]``: random crops of different sizes out of two photographs, some mirrored.

    They are made on the device and kept by the host.
    """
    generator = np.random.default_rng(0)
    photographs = [
        torch.from_numpy(np.array(each)).permute(2, 0, 1).to(device) for each in load_sample_images().images
    ]

    def crop() -> Tensor:
        photograph = photographs[generator.integers(len(photographs))]
        _, height, width = photograph.shape
        side = int(generator.integers(64, height + 1))
        top, left = generator.integers(height - side + 1), generator.integers(width - side + 1)
        part = resize(photograph[:, top : top + side, left : left + side], list(image_size), antialias=True)
        return part.flip(2) if generator.random() < 0.5 else part

    pixels = torch.stack([crop() for _ in range(count)]).cpu()
    return [normalize(part.float() / 255, list(mean), list(std)) for part in pixels.split(batch)]


class Judge:
    """What prototypes are worth on some of the tokens, compared with scikit-learn's k-means of the same tokens."""

    def __init__(self, backbone: Any, batches: list[Tensor], num_prompts: int) -> None:
        # Images from all over the set, few enough for scikit-learn.
        spread = torch.cat(batches)[:: max(1, sum(map(len, batches)) // 64)]
        self.tokens = block_tokens(backbone, spread.split(len(batches[0])))
        self.best = self.inertia_per_token(scikit_learn(self.tokens, num_prompts))

    def inertia_per_token(self, centers: Tensor) -> float:
        """Averaged over blocks and tokens."""
        step = kmeans_step(self.tokens, centers.to(self.tokens.device))
        return float(step.inertia.sum()) / int(step.counts.sum())

    def objection(self, prototypes: Prototypes, method: str) -> str | None:
        """Why prototypes are too bad to be timed, or ``None``.

        Clusters have to fit the tokens; tokens that are drawn or pooled have to lie where the tokens lie.
        """
        if method in TOLERANCE:
            above = self.inertia_per_token(prototypes.values) / self.best - 1
            if above < TOLERANCE[method]:
                return None
            return f"prototypes fit the tokens worse than scikit-learn's: inertia {above:+.0%}"
        low, high = (bound.float().cpu() for bound in self.tokens.aminmax(dim=1, keepdim=True))
        # These tokens are some of all, so that others may lie a little outside.
        inside = (prototypes.values - low > low - high) & (high - prototypes.values > low - high)
        return None if inside.all() else "prototypes lie where no tokens are"


def build(
    backbone: Any, batches: list[Tensor], method: Method, num_prompts: int, fraction: float
) -> Prototypes:
    """The prototypes of every block, images being sent to the device as they are needed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lloyd still moving a little after its 300 passes
        built: Prototypes = build_prototypes(
            backbone, batches, num_prompts=num_prompts, method=method, data_fraction=fraction
        )
    return built


def compare(
    record: Record, ceilings: Ceilings, case: Row, backbone: Any, batches: list[Tensor], judge: Judge
) -> None:
    """Add our rows for one share of the images, and the paper's where it gives them."""
    before = len(record.rows)
    device = next(backbone.parameters()).device
    for method, name in METHODS.items():
        built: list[Prototypes] = []

        def work(method: Method = method, built: list[Prototypes] = built) -> None:
            built.append(build(backbone, batches, method, case["num_prompts"], case["fraction"]))

        seconds = [synchronized_seconds(device, work)]
        while seconds[0] < SHORT_SECONDS and len(seconds) < 3:
            seconds.append(synchronized_seconds(device, work))
        objection = judge.objection(built[0], method)
        if objection is not None:
            record.missing(case, name, objection)
            continue
        limit = build_limit(ceilings, backbone, built[0].metadata["images"], judge.tokens.dtype)
        worth = judge.inertia_per_token(built[0].values)
        record.measured(case, name, seconds, limit=limit, inertia_per_token=worth)
    if case["fraction"] in FRACTIONS:
        for name, figures in PAPER.items():
            seconds_there = figures[FRACTIONS.index(case["fraction"])]
            record.quoted(case, f"paper: {name}", seconds_there, SOURCE)
    shown = f"{case['fraction']:.0%} of {case['images']:,} images, {case['model']}, P={case['num_prompts']}"
    show(shown, record.rows[before:], against=METHODS["kmeans"], extras=EXTRAS)


def extrapolate(
    record: Record, common: Row, backbone: Any, batches: list[Tensor], fractions: Sequence[float]
) -> None:
    """Time scikit-learn's k-means on small shares, and add what it would take on the larger ones."""
    images = torch.cat(batches)
    measured: list[tuple[float, float]] = []
    for share in SMALL_FRACTIONS:
        some = images[: max(common["num_prompts"], round(share * len(images)))].split(len(batches[0]))
        begun = time.perf_counter()
        scikit_learn(block_tokens(backbone, some), common["num_prompts"])
        measured.append((sum(map(len, some)) / len(images), time.perf_counter() - begun))
    for share in fractions:
        # Iterations grow with the tokens as well, so that a line is what it takes at least.
        seconds = proportional(measured) * share
        rule = f"in proportion to the images, from {max(measured)[0]:.0%} of them, the largest share that was measured"
        record.extrapolated({**common, "fraction": share}, RELEASED, seconds, rule, measured)
    show(f"extrapolated from {measured[-1][0]:.0%} of the images", record.rows[-len(fractions) :])


def proportional(measured: Sequence[tuple[float, float]]) -> float:
    """Seconds for all images, by the largest share that was measured.

    Example:
        >>> proportional([(0.01, 1.0), (0.02, 3.0)])
        150.0
    """
    share, seconds = max(measured)
    return seconds / share


@torch.no_grad()
def block_tokens(backbone: Any, batches: Sequence[Tensor]) -> Tensor:
    """All tokens that enter each block, ``[L, T, D]``."""
    parts = [
        torch.stack(list(each.values())).flatten(1, 2) for each in stream_layer_tokens(backbone, batches)
    ]
    return torch.cat(parts, dim=1)


def scikit_learn(tokens: Tensor, clusters: int) -> Tensor:
    """Its k-means as it comes, block after block."""
    fits = [ScikitLearnKMeans(clusters, random_state=0).fit(own) for own in tokens.float().cpu().numpy()]
    return torch.stack([torch.from_numpy(each.cluster_centers_) for each in fits]).float()


def build_limit(ceilings: Ceilings, backbone: Any, images: int, dtype: torch.dtype) -> Limit:
    """At least every image passes all blocks but the last, and every token is read once."""
    depth, width = len(backbone.blocks), backbone.embed_dim
    patches = backbone.patch_embed.num_patches
    tokens = patches + backbone.num_prefix_tokens
    weights = sum(parameter.numel() for parameter in backbone.blocks[:-1].parameters() if parameter.ndim == 2)
    attention = (depth - 1) * 2 * tokens * tokens * width
    embedding = patches * backbone.patch_embed.proj.weight.numel()
    return ceilings.limit(
        moved_bytes=images * patches * depth * width * dtype.itemsize,
        operations=2 * images * (tokens * weights + attention + embedding),
        dtype=name_of(dtype),
    )


if __name__ == "__main__":
    app()
