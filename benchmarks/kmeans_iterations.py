"""One Lloyd iteration of every peer.

Its time is the difference between a long and a short run, divided by the iterations between them: what a library does
once, such as copies and norms, does not count.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from benchmarks.ceilings import Ceilings
from benchmarks.command import show
from benchmarks.kmeans_cases import (
    EXTRAS,
    Case,
    first_line,
    in_case,
    made_up_tokens,
    pass_limit,
    title,
    worth,
)
from benchmarks.kmeans_peers import Peer, best_backend, first_centers, lloyd, peers_on
from benchmarks.record import Record
from benchmarks.timing import Work, rotated, synchronized_seconds, take_turns

# By how much the inertia after equally many iterations may differ from the definition's: rounding decides a few labels.
TOLERANCE = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 5e-3}
CHECKED_ITERATIONS = 3
# What the iterations between short and long run have to last to stand out.
SECONDS = {"cpu": 0.02, "cuda": 0.002}
MOST_ITERATIONS = 20


def compare_iterations(
    record: Record, ceilings: Ceilings, case: Case, device: torch.device, rounds: int
) -> None:
    """Add a row for each peer."""
    copies = [x for (x,) in rotated(made_up_tokens(case, device), most_bytes=1 << 30)]
    start = first_centers(copies[0], case["clusters"])
    expected = worth(copies[0], lloyd(copies[0], start, CHECKED_ITERATIONS, backend="torch"))
    peers = list(peers_on(copies))
    found = {peer.name: _check(peer, start, expected) for peer in peers}
    runnable = [peer for peer in peers if peer.missing is None]
    most = _iterations_until_rest(copies[0], start) - 2
    between = {peer.name: _iterations(peer, start, most) for peer in runnable if most > 0}
    works: dict[str, Work] = {}
    for peer in runnable if most > 0 else []:
        works[f"{peer.name}, short"] = partial(peer.run, start, 1)
        works[f"{peer.name}, long"] = partial(peer.run, start, 1 + between[peer.name])
    samples = take_turns(device, works, rounds, warmup=1)
    own, before = in_case("iteration", case), len(record.rows)
    for peer in peers:
        if peer.missing is not None:
            record.missing(own, peer.name, peer.missing)
            continue
        if most <= 0:
            record.missing(own, peer.name, "these tokens come to rest after too few iterations to time one")
            continue
        pairs = zip(samples[f"{peer.name}, long"], samples[f"{peer.name}, short"], strict=True)
        seconds = [(long - short) / between[peer.name] for long, short in pairs]
        if min(seconds) <= 0:
            record.missing(own, peer.name, "an iteration is too short to be told from what is done once")
        else:
            limit = pass_limit(ceilings, case, peer.dtype)
            record.measured(own, peer.name, seconds, limit=limit, inertia=found[peer.name])
    show(title("one Lloyd iteration", case), record.rows[before:], against=peers[0].name, extras=EXTRAS)


def _check(peer: Peer, start: Tensor, expected: float) -> float:
    """The inertia after a few iterations; a peer that fails or is wrong is missing from here on."""
    if peer.missing is not None:
        return math.nan
    try:
        inertia = worth(peer.tokens[0], peer.run(start, CHECKED_ITERATIONS))
    except Exception as error:
        peer.missing = first_line(error)
        return math.nan
    off = inertia / expected - 1
    if not abs(off) < TOLERANCE[peer.dtype]:
        peer.missing = f"computes something else: its inertia differs by {off:+.2%}"
    return inertia


def _iterations_until_rest(x: Tensor, start: Tensor) -> int:
    """After how many iterations no centre moves any more, at most the most that are timed.

    From then on a library may stop, however many iterations it was told to do.
    """
    centers = start
    for number in range(MOST_ITERATIONS + 2):
        moved = lloyd(x, centers, 1, backend=best_backend(x))
        if torch.equal(moved, centers):
            return number
        centers = moved
    return MOST_ITERATIONS + 2


def _iterations(peer: Peer, start: Tensor, most: int) -> int:
    """How many iterations stand out from the noise of a run."""
    device = start.device
    short, long = (
        min(synchronized_seconds(device, partial(peer.run, start, count)) for _ in range(2))
        for count in (1, 4)
    )
    each = max((long - short) / 3, 1e-6)
    # A run that does much once varies by a share of it.
    wanted = max(SECONDS[device.type], 0.3 * short)
    return min(max(2, math.ceil(wanted / each)), most)
