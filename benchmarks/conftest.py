"""How the developer suite, ``benchmarks/test_*.py``, takes its time: the same work in seconds, run after every change.

make bench             # compares it with this machine's baseline, see benchmarks/regressions.py
make bench-baseline    # makes this run the baseline
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.record import machine
from spt_fast.devices import choose_device

# Seconds for the counted rounds of one test, and how many rounds these may be.
SECONDS = 0.4
FEWEST, MOST = 7, 200

Measure = Callable[[Callable[[], Any]], None]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Say in the json what was measured and with which versions, as our records do."""
    machine_info["spt_fast"] = machine(choose_device())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return choose_device()


@pytest.fixture
def measure(benchmark: BenchmarkFixture, device: torch.device) -> Measure:
    """Time some work until the device is done with it, in as many rounds as fit into :data:`SECONDS`."""

    def run(work: Callable[[], Any]) -> None:
        def finished() -> None:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        for _ in range(2):  # warm-up: compilers and allocators
            begun = time.perf_counter()
            finished()
            seconds = time.perf_counter() - begun
        rounds = max(FEWEST, min(MOST, round(SECONDS / seconds)))
        benchmark.pedantic(finished, rounds=rounds, iterations=1)

    return run
