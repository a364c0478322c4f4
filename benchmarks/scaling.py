"""How time and memory grow with the tokens of a stream, and how time shrinks with processes.

    python -m benchmarks.scaling                               # this device's sizes
    python -m benchmarks.scaling --device cpu --tokens 1000000 --tokens 100000000

Every size has a process of its own (``benchmarks.streaming``; with several devices or cores, one torchrun), so that its
memory is its own too. A slope of 1 is time in proportion to tokens, of 0 memory that does not grow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from benchmarks.ceilings import Ceilings
from benchmarks.command import DeviceOption, MinutesOption, ResultsOption, console, measuring, show
from benchmarks.growth import slope
from benchmarks.kmeans_cases import pass_limit
from benchmarks.record import RESULTS, ROOT, Record, Row
from benchmarks.streaming import made_up_chunks
from benchmarks.summary import middle
from spt_fast.clustering import KMeans
from spt_fast.devices import choose_device

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Tokens by library. scikit-learn's runs on CPUs only, and takes as long again.
SIZES: dict[str, dict[str, list[int]]] = {
    "cpu": {"spt-fast": [10**5, 10**6, 10**7, 10**8], "scikit-learn": [10**5, 10**6, 10**7]},
    "cuda": {"spt-fast": [10**5, 10**6, 10**7, 10**8, 10**9]},
}
WIDTH, CHUNK = {"cpu": 192, "cuda": 768}, {"cpu": 65_536, "cuda": 1 << 20}
# Tokens that several processes share.
SHARED = {"cpu": 10**7, "cuda": 10**8}
# How much worse than exact clusters those of a stream may be, before their time counts.
TOLERANCE = 0.1
EXTRAS = {
    "tokens/s": lambda row: f"{row['case']['tokens'] / min(row['seconds']):.3g}",
    "peak MB": lambda row: f"{row['peak_bytes'] / 1e6:,.0f}",
    "inertia per token": lambda row: f"{row['inertia_per_token']:.5g}",
}


@app.command()
def main(
    context: typer.Context,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Of a stream; may be repeated.")] = None,
    features: Annotated[int | None, typer.Option(min=1, help="Their width.")] = None,
    clusters: Annotated[int, typer.Option(min=1, help="Clusters.")] = 20,
    processes: Annotated[
        list[int] | None, typer.Option(min=1, help="Processes that share a stream; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of every size.")] = 3,
    device: DeviceOption = "auto",
    minutes: MinutesOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Time and memory as tokens and devices grow, streaming; slopes on the log-log plot."""
    with measuring("scaling", context, device, results, minutes, rounds=rounds) as (record, ceilings):
        chosen = choose_device(device)
        kind = chosen.type
        width = features or WIDTH[kind]
        exact = exact_inertia(width, clusters, chosen)
        common = {"features": width, "clusters": clusters}
        sizes = SIZES[kind] if tokens is None else dict.fromkeys(SIZES[kind], tokens)
        for library, amounts in sizes.items():
            for amount in amounts:
                if not record.may_begin():
                    return
                case = {**common, "processes": 1, "tokens": amount}
                add(record, ceilings, case, library, exact, chosen, rounds)
        for count in processes or sensible_processes(kind):
            if not record.may_begin():
                return
            # On a CPU a process is a core; all cores in one process are what is measured above.
            case = {**common, "processes": count, "threads": 1, "tokens": SHARED[kind]}
            if kind == "cuda":
                del case["threads"]
            add(record, ceilings, case, "spt-fast", exact, chosen, rounds)
        show_slopes(record.rows)


def sensible_processes(kind: str) -> list[int]:
    """One, two, four ... as many as there are devices, or cores."""
    there = torch.cuda.device_count() if kind == "cuda" else os.cpu_count() or 1
    return [1 << power for power in range(4) if 1 << power <= there]


def exact_inertia(features: int, clusters: int, device: torch.device) -> float:
    """Per token, what exact k-means reaches on a part of the stream."""
    part = made_up_chunks(CHUNK["cpu"], features, device, rank=0)[0]
    return float(KMeans(clusters, random_state=0).fit(part).inertia_) / len(part)


def add(
    record: Record,
    ceilings: Ceilings,
    case: Row,
    library: str,
    exact: float,
    device: torch.device,
    rounds: int,
) -> None:
    """Add the row of one size, and print it."""
    peer = f"{library} MiniBatchKMeans"
    try:
        outcome = run_once(case, library, device, rounds)
        found = outcome["inertia_per_token"]
        if not found < (1 + TOLERANCE) * exact:
            raise RuntimeError(f"its inertia is {found / exact:.2f} times that of exact k-means")
    except RuntimeError as error:
        record.missing(case, peer, str(error))
    else:
        dtype = "float32" if device.type == "cpu" else "bfloat16"
        record.measured(
            case,
            peer,
            outcome["seconds"],
            limit=pass_limit(ceilings, {"layers": 1, **case}, dtype),
            peak_bytes=outcome["peak_bytes"],
            inertia_per_token=found,
        )
    record.save()
    show(f"{case['tokens']:,} tokens, processes: {case['processes']}", record.rows[-1:], extras=EXTRAS)


def run_once(case: Row, library: str, device: torch.device, rounds: int) -> Row:
    """What a process (or torchrun) of its own printed.

    Raises:
        RuntimeError: it failed; the message is the last that it said.
    """
    launcher = [sys.executable]
    if case["processes"] > 1:
        count = str(case["processes"])
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    options = {
        "tokens": case["tokens"],
        "features": case["features"],
        "clusters": case["clusters"],
        "chunk": CHUNK[device.type],
        "library": library,
        "rounds": rounds,
        "device": "auto" if device.type == "cuda" else "cpu",
        **({"threads": case["threads"]} if "threads" in case else {}),
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [*launcher, "-m", "benchmarks.streaming", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"failed: {(done.stderr.strip() or 'it said nothing').splitlines()[-1]}")
    outcome: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return outcome


def show_slopes(rows: Sequence[Row]) -> None:
    """Print how time and memory grow with the tokens, for each library that ran at several sizes."""
    for peer in dict.fromkeys(row["peer"] for row in rows):
        alone = [row for row in rows if row["peer"] == peer and "threads" not in row["case"]]
        own = [row for row in alone if row["kind"] == "measured" and row["case"]["processes"] == 1]
        times, memory = (
            slope([(row["case"]["tokens"], value(row)) for row in own])
            for value in (middle, lambda row: float(row["peak_bytes"]))
        )
        if times is not None and memory is not None:
            console.print(
                f"{peer}: time grows with the power {times:.2f} of the tokens, memory with {memory:.2f}"
            )


if __name__ == "__main__":
    app()
