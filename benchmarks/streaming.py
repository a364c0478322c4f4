"""One stream of tokens through mini-batch k-means, in a process of its own so that its memory can be told from others'.

    python -m benchmarks.streaming --tokens 1000000
    torchrun --nproc-per-node 2 -m benchmarks.streaming --tokens 1000000    # each process takes its share

Prints one line of json: the seconds of each round, the inertia per token, and the most memory that the work held. It is
what ``benchmarks.scaling`` runs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.memory import AllocatedMemory, ResidentMemory
from benchmarks.timing import synchronized_seconds
from spt_fast.clustering import MiniBatchKMeans
from spt_fast.devices import choose_device
from spt_fast.distributed import process_group

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Different chunks that take turns: what is streamed is as large as asked, what lies in memory is not.
CHUNKS = 4
LONG_SECONDS = 10
MEMORY: dict[str, Any] = {"cpu": ResidentMemory, "cuda": AllocatedMemory}


@app.command()
def main(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the stream, over all processes.")],
    features: Annotated[int, typer.Option(min=1, help="Their width.")] = 192,
    clusters: Annotated[int, typer.Option(min=1, help="Clusters.")] = 20,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of a batch, over all processes.")] = 65_536,
    library: Annotated[str, typer.Option(help="spt-fast or scikit-learn.")] = "spt-fast",
    rounds: Annotated[int, typer.Option(min=1, help="How often.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of this process on a CPU.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Stream tokens through MiniBatchKMeans.partial_fit and print what it took."""
    chosen = choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    with process_group(chosen) as (rank, processes):
        pool = made_up_chunks(chunk // processes, features, chosen, rank)
        centers: list[Tensor] = []

        def work(amount: int = tokens // processes) -> None:
            take = TAKERS[library](clusters)
            for batch in stream(pool, amount):
                take(batch)
            centers.append(take.finish())

        memory = MEMORY[chosen.type](chosen)
        work(min(tokens // processes, 3 * len(pool[0])))  # warm-up: kernels are compiled, threads started
        seconds = [synchronized_seconds(chosen, work)]
        peak = memory.peak_bytes()
        # A long run is as good as several short ones.
        while len(seconds) < rounds and seconds[0] < LONG_SECONDS:
            seconds.append(synchronized_seconds(chosen, work))
        distances = torch.cdist(pool[0].float().cpu(), centers[-1].float().cpu())
        inertia = float(distances.min(dim=1).values.double().square().mean())
        if rank == 0:
            print(json.dumps({"seconds": seconds, "peak_bytes": peak, "inertia_per_token": inertia}))


class Ours:
    """spt-fast's estimator."""

    def __init__(self, clusters: int) -> None:
        self.model = MiniBatchKMeans(clusters, random_state=0)

    def __call__(self, batch: Tensor) -> None:
        self.model.partial_fit(batch)

    def finish(self) -> Tensor:
        # The centres are settled when they are asked for; that is part of the work.
        return torch.as_tensor(self.model.cluster_centers_)


class ScikitLearn:
    """scikit-learn's estimator of the same name."""

    def __init__(self, clusters: int) -> None:
        from sklearn.cluster import MiniBatchKMeans as Estimator

        self.model = Estimator(clusters, random_state=0, n_init=1)

    def __call__(self, batch: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.partial_fit(batch.numpy())

    def finish(self) -> Tensor:
        return torch.from_numpy(self.model.cluster_centers_)


TAKERS: dict[str, Callable[[int], Any]] = {"spt-fast": Ours, "scikit-learn": ScikitLearn}


def made_up_chunks(length: int, features: int, device: torch.device, rank: int) -> list[Tensor]:
    """Different batches of overlapping clusters: the same clusters in all processes, other tokens in each."""
    centers = torch.randn(64, features, generator=torch.Generator().manual_seed(0)) + 1
    generator = torch.Generator().manual_seed(1 + rank)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    chunks = []
    for _ in range(CHUNKS):
        own = torch.randint(64, (length,), generator=generator)
        noise = torch.randn(length, features, generator=generator)
        chunks.append((centers[own] + 2 * noise).to(device, dtype))
    return chunks


def stream(pool: list[Tensor], tokens: int) -> Iterator[Tensor]:
    """So many tokens, batch after batch."""
    done = number = 0
    while done < tokens:
        batch = pool[number % len(pool)][: tokens - done]
        done, number = done + len(batch), number + 1
        yield batch


if __name__ == "__main__":
    app()
