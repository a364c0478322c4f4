"""How benchmarks take the time: in turns, on data that no cache holds, after a warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A piece of work is given the number of its round, to choose among copies of its inputs.
Work = Callable[[int], Any]

# More than any last-level cache holds, for the sweep that empties a GPU's.
FLUSH_BYTES = 256 << 20
# So often it is swept: half a millisecond on a fast GPU, in which the host can queue what follows.
SWEEPS = 6


def take_turns(
    device: torch.device, works: Mapping[str, Work], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every piece of work in every round; samples with the same index were taken side by side.

    What disturbs the machine for a while disturbs all that take their turn, so that ratios within a round are steadier
    than times. Each round begins with another piece of work: none always follows the same one.

    On a GPU a sample is the time between two events around the call, after its L2 cache was swept; on a CPU it is wall
    time. The first ``warmup`` rounds are not counted.

    Example:
        >>> samples = take_turns(torch.device("cpu"), {"one": lambda n: n, "two": lambda n: 2 * n}, rounds=3)
        >>> {name: len(seconds) for name, seconds in samples.items()}
        {'one': 3, 'two': 3}
    """
    clock = EventClock(device) if device.type == "cuda" else wall_seconds
    samples: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(warmup + rounds):
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            seconds = clock(works[name], number)
            if number >= warmup:
                samples[name].append(seconds)
    return samples


def wall_seconds(work: Work, number: int) -> float:
    begun = time.perf_counter()
    work(number)
    return time.perf_counter() - begun


class EventClock:
    """Times work on a GPU between two events, after everything it might find in the L2 cache was swept out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.swept = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, work: Work, number: int) -> float:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        # The sweep is still running while the host queues what follows: short work does not wait for the host.
        for _ in range(SWEEPS):
            self.swept.fill_(number % 2 + 1)
        begun.record()
        work(number)
        ended.record()
        torch.cuda.synchronize(self.device)
        return begun.elapsed_time(ended) / 1e3


def synchronized_seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Wall time until ``work`` is done on the device: for work that takes seconds and waits for the device anyway."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def rotated(*tensors: Tensor, most_bytes: int = 4 << 30) -> list[tuple[Tensor, ...]]:
    """Copies of the tensors, enough to be four times the last-level cache: who walks through them finds none in it.

    The first is the tensors themselves. Gradients are asked of the copies as of the originals.
    """
    size = sum(tensor.nbytes for tensor in tensors)
    wanted = 4 * last_level_cache_bytes(tensors[0].device)
    copies = max(1, min(-(-wanted // max(1, size)), most_bytes // max(1, size), 64))
    return [
        tensors,
        *(
            tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors)
            for _ in range(copies - 1)
        ),
    ]


def last_level_cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [32 << 20]  # where nobody tells: a common size
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            number, unit = file.read_text().strip()[:-1], file.read_text().strip()[-1]
            sizes.append(int(number) << {"K": 10, "M": 20}.get(unit, 0))
    return max(sizes)
