"""K-means: one Lloyd iteration, and the time until it has converged, against the libraries people use.

    python -m benchmarks.kmeans                                # sweeps of D, K, T and L at this device's sizes
    python -m benchmarks.kmeans --tokens 200000 --features 768 --clusters 20 --clusters 100
    python -m benchmarks.kmeans --device cuda --layers 12 --tokens 1060000    # CUB-200-2011's tokens in ViT-B/16

All peers get the same tokens and the same initial centres. Whose centres after equally many iterations are worth less
than the definition's is wrong, and its time is not used.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Annotated

import typer

from benchmarks.command import DeviceOption, MinutesOption, ResultsOption, RoundsOption, measuring
from benchmarks.kmeans_iterations import compare_iterations
from benchmarks.kmeans_runs import compare_runs
from benchmarks.record import RESULTS
from spt_fast.devices import choose_device, free_memory

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Sweeps around one point, as (layers, tokens, features, clusters).
WIDTHS, NUMBERS, LAYERS = (192, 384, 768, 1024, 1280), (5, 20, 50, 100, 256), (1, 12, 24, 32)
SIZES = {
    "cpu": [
        *((1, 10_000, features, 20) for features in WIDTHS),
        *((1, 10_000, 768, clusters) for clusters in NUMBERS if clusters != 20),
        *((1, tokens, 192, 20) for tokens in (100_000, 1_000_000)),
        *((layers, 2_000, 384, 20) for layers in LAYERS),
    ],
    "cuda": [
        (1, 1_000_000, 768, 20),
        (12, 100_000, 768, 20),
        (1, 1_000_000, 768, 100),
        *((1, 1_000_000, features, 20) for features in WIDTHS if features != 768),
        *((1, 1_000_000, 768, clusters) for clusters in NUMBERS if clusters not in (20, 100)),
        *((1, tokens, 192, 20) for tokens in (100_000, 10_000_000)),
        (12, 1_060_000, 768, 20),
    ],
}
# Until convergence; the same form.
WHOLE_RUNS = {
    "cpu": [(1, 50_000, 384, 20), (1, 10_000, 768, 100)],
    "cuda": [(1, 1_000_000, 768, 20), (12, 100_000, 768, 20)],
}


@app.command()
def main(
    context: typer.Context,
    layers: Annotated[
        list[int] | None, typer.Option(help="Clusterings in one call, L; may be repeated.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of each, T; may be repeated.")] = None,
    features: Annotated[list[int] | None, typer.Option(help="Their width, D; may be repeated.")] = None,
    clusters: Annotated[list[int] | None, typer.Option(help="Clusters, K; may be repeated.")] = None,
    converge: Annotated[bool, typer.Option(help="Also time whole runs.")] = True,
    device: DeviceOption = "auto",
    rounds: RoundsOption = 4,
    minutes: MinutesOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """One Lloyd iteration and time to convergence, against FAISS, scikit-learn, flash-kmeans and others."""
    with measuring("kmeans", context, device, results, minutes, rounds=rounds) as (record, ceilings):
        chosen = choose_device(device)
        sizes, whole = SIZES[chosen.type], WHOLE_RUNS[chosen.type]
        if layers or tokens or features or clusters:
            asked = product(layers or [1], tokens or [20_000], features or [768], clusters or [20])
            sizes = whole = list(asked)
        # Whole runs first: the sweeps are what may be left out when the time is up.
        wanted = [(compare_runs, size) for size in whole if converge]
        for compare, size in [*wanted, *((compare_iterations, size) for size in sizes)]:
            if not record.may_begin():
                return
            case = dict(zip(("layers", "tokens", "features", "clusters"), size, strict=True))
            needed = math.prod(size[:3]) * (2 if chosen.type == "cuda" else 4)
            if 3 * needed > free_memory(chosen):
                record.missing(case, "all", f"{needed / 1e9:.3g} GB of tokens and copies do not fit here")
            else:
                compare(record, ceilings, case, chosen, rounds)
            record.save()


if __name__ == "__main__":
    app()
