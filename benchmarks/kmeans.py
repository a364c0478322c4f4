"""One Lloyd iteration: our backends against FAISS, scikit-learn and flash-kmeans on the same tokens and centres.

    python -m benchmarks.kmeans                                # 200,000 x 768, K=20, on this CPU
    python -m benchmarks.kmeans --device cuda --layers 12 --tokens 1060000 --clusters 20 --clusters 100

Every peer runs from the same centres; its time for one iteration is the difference between a long and a short run,
divided by the iterations between them, so that what it does once (copies, norms) does not count. Peers take turns,
round by round. A table shows medians with their quartiles, how much of that time one read of the tokens would take, and
the inertia that each ends with, so that nobody is fast by being wrong. A peer that is not installed is a row that says
so.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from benchmarks.command import console, machine, mistakes_in_one_sentence
from benchmarks.timing import timed
from spt_fast.clustering import plus_plus, seeded_generator
from spt_fast.devices import choose_device
from spt_fast.files import write_text
from spt_fast.kernels import available_backends, kmeans_step

app = typer.Typer(pretty_exceptions_enable=False)

Iterate = Callable[[int], Tensor]  # runs so many iterations, returns the centres [L, K, D]


@dataclass
class Peer:
    """One way to iterate, and what was measured of it; ``missing`` says why it cannot run here."""

    name: str
    dtype: str
    iterate: Iterate | None = None
    missing: str | None = None
    inertia: float = math.nan
    milliseconds: list[float] = field(default_factory=list)

    def run(self, count: int) -> Tensor:
        assert self.iterate is not None
        return self.iterate(count)


@app.command()
def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    layers: Annotated[int, typer.Option(min=1, help="Independent clusterings in one launch, L.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each, T.")] = 200_000,
    width: Annotated[list[int] | None, typer.Option(help="Features, D; may be repeated.")] = None,
    clusters: Annotated[list[int] | None, typer.Option(help="Clusters, K; may be repeated.")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations between short and long run.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every peer has its turn.")] = 7,
    output: Annotated[Path | None, typer.Option(help="Write all samples to this json file.")] = None,
) -> None:
    """Time one Lloyd iteration of every backend and peer."""
    with mistakes_in_one_sentence():
        chosen = choose_device(device)
    record: dict[str, Any] = {"machine": machine(chosen), "layers": layers, "tokens": tokens, "rows": []}
    for features in width or [768]:
        x = made_up_tokens(layers, tokens, features, chosen)
        for count in clusters or [20]:
            rows = compare(x, count, iterations, rounds)
            record["rows"] += rows
            show(f"L={layers} T={tokens:,} D={features} K={count} on {record['machine']['device']}", rows)
    if output is not None:
        write_text(output, json.dumps(record, indent=1) + "\n")


def made_up_tokens(layers: int, tokens: int, features: int, device: torch.device) -> Tensor:
    """float32 ``[L, T, D]`` on the CPU, bfloat16 on a GPU: overlapping clusters around an offset that all share."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.empty(layers, tokens, features, device=device, dtype=dtype)
    for layer in x:
        centers = torch.randn(64, features, device=device, generator=generator) + 1
        for part in layer.split(1 << 20):
            own = torch.randint(64, (len(part),), device=device, generator=generator)
            noise = torch.randn(part.shape, device=device, generator=generator)
            part.copy_(centers[own] + 2 * noise)
    return x


def compare(x: Tensor, clusters: int, iterations: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each peer, its samples in milliseconds per iteration among them."""
    start = torch.stack([plus_plus(layer[:20_000], clusters, seeded_generator(0)) for layer in x])
    peers = [*our_backends(x, start), *(theirs_on_cpu if x.device.type == "cpu" else theirs_on_gpu)(x, start)]
    present = [peer for peer in peers if peer.iterate is not None]
    for peer in present:  # warm-up, and what its iterations are worth
        centers = peer.run(1 + iterations)
        peer.inertia = float(kmeans_step(x, centers.to(x.device)).inertia.sum())
    reads: list[float] = []
    for _ in range(rounds):
        reads.append(1e3 * timed(x.device, x.amax))
        for peer in present:
            short, long = (timed(x.device, peer.run, count) for count in (1, 1 + iterations))
            peer.milliseconds.append(1e3 * (long - short) / iterations)
    what = "the fastest of these reads"
    if x.device.type == "cuda":
        reads, what = copy_floor(x, rounds), "the rate of a copy"
    floor = min(reads)
    rows: list[dict[str, Any]] = [{"peer": f"one read, at {what}", "dtype": name_of(x.dtype), "ms": reads}]
    for peer in peers:
        row = {"peer": peer.name, "dtype": peer.dtype, "features": x.shape[2], "clusters": clusters}
        if peer.iterate is None:
            rows.append(row | {"missing": peer.missing})
            continue
        # Half as many bytes are read in half the time.
        own_floor = floor * getattr(torch, peer.dtype).itemsize / x.itemsize
        share = own_floor / statistics.median(peer.milliseconds)
        rows.append(row | {"ms": peer.milliseconds, "inertia": peer.inertia, "share_of_one_read": share})
    return rows


def our_backends(x: Tensor, start: Tensor) -> list[Peer]:
    """Every backend that runs on this device, in every precision that matters there."""
    fitting = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}[x.device.type]
    dtypes = [x] if x.device.type == "cuda" else [x, x.bfloat16()]

    def lloyd(tokens: Tensor, backend: str) -> Iterate:
        def iterate(count: int) -> Tensor:
            centers = start
            for _ in range(count):
                step = kmeans_step(tokens, centers, backend=backend)
                centers = torch.where(
                    step.counts[..., None] > 0, step.sums / step.counts.clamp(min=1)[..., None], centers
                )
            return centers

        return iterate

    here = available_backends()["kmeans_step"]
    return [
        Peer(f"spt-fast {backend}", name_of(tokens.dtype), lloyd(tokens, backend))
        for tokens in dtypes
        for backend in fitting
        if backend in here
    ]


def theirs_on_cpu(x: Tensor, start: Tensor) -> list[Peer]:
    """FAISS and scikit-learn, layer after layer."""
    arrays, starts = x.numpy(), start.numpy()

    def sklearn(count: int) -> Tensor:
        from sklearn.cluster import KMeans

        centers = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has not converged; nobody asked it to
            for tokens, own in zip(arrays, starts, strict=True):
                lloyd = KMeans(
                    len(own), init=own, n_init=1, max_iter=count, tol=0, algorithm="lloyd", copy_x=False
                )
                centers.append(torch.from_numpy(lloyd.fit(tokens).cluster_centers_))
        return torch.stack(centers)

    def faiss(count: int) -> Tensor:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        centers = []
        for tokens, own in zip(arrays, starts, strict=True):
            lloyd = faiss.Kmeans(
                own.shape[1], len(own), niter=count, max_points_per_centroid=len(tokens), seed=0
            )
            lloyd.train(tokens, init_centroids=own)
            centers.append(torch.tensor(lloyd.centroids))
        return torch.stack(centers)

    return [optional("scikit-learn", sklearn, "sklearn"), optional("FAISS", faiss, "faiss")]


def theirs_on_gpu(x: Tensor, start: Tensor) -> list[Peer]:
    """flash-kmeans, all layers at once."""

    def flash(count: int) -> Tensor:
        from flash_kmeans import batch_kmeans_Euclid

        own = start.to(x.dtype)
        return batch_kmeans_Euclid(x, start.shape[1], max_iters=count, tol=-1.0, init_centroids=own)[
            1
        ].float()

    return [optional("flash-kmeans", flash, "flash_kmeans", name_of(x.dtype))]


def optional(name: str, iterate: Iterate, module: str, dtype: str = "float32") -> Peer:
    """A peer, if its package is installed."""
    try:
        __import__(module)
    except ImportError:
        return Peer(name, dtype, missing=f"{module} is not installed")
    return Peer(name, dtype, iterate)


def copy_floor(x: Tensor, rounds: int) -> list[float]:
    """Milliseconds to read ``x`` once at the rate at which a large copy moves bytes."""
    part = x.flatten()[: 1 << 30]
    target = torch.empty_like(part)
    seconds = []
    for _ in range(rounds):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(10):
            target.copy_(part)
        events[1].record()
        torch.cuda.synchronize()
        seconds.append(events[0].elapsed_time(events[1]) / 10)
    return [each * x.nbytes / (2 * part.nbytes) for each in seconds]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    table = Table(title=title, title_justify="left")
    for header in ("", "dtype", "ms per iteration", "quartiles", "one read is", "inertia"):
        table.add_column(header, justify="left" if header in ("", "dtype") else "right")
    for row in rows:
        if "ms" not in row:
            table.add_row(row["peer"], row["dtype"], row["missing"], "", "", "")
            continue
        ms = row["ms"]
        quartiles = statistics.quantiles(ms, n=4) if len(ms) > 1 else [ms[0]] * 3
        table.add_row(
            row["peer"],
            row["dtype"],
            f"{statistics.median(ms):.2f}",
            f"{quartiles[0]:.2f} .. {quartiles[2]:.2f}",
            f"{row['share_of_one_read']:.0%}" if "share_of_one_read" in row else "",
            f"{row['inertia']:.6g}" if "inertia" in row else "",
        )
    console.print(table)


if __name__ == "__main__":
    app()
