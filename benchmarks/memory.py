"""The most memory that a piece of work holds at a time, above what lay there before it began."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

# Kineto greets on stderr otherwise. Read when it is loaded, which is at its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_tensor_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """What tensors hold at most: by the allocator's count on a GPU, by the profiler's on a CPU.

    Example:
        >>> peak_tensor_bytes(torch.device("cpu"), lambda: (torch.randn(1000, 250) + 1).sum())
        2000004
    """
    if device.type == "cuda":
        memory = AllocatedMemory(device)
        work()
        return memory.peak_bytes()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        work()
    held = most = 0
    for _, change in sorted(_allocations(seen.profiler.kineto_results.experimental_event_tree())):
        held += change
        most = max(most, held)
    return most


def _allocations(events: Any) -> list[tuple[int, int]]:
    """When, and by how many bytes, what is allocated changed; frees are negative."""
    found, pending = [], list(events)
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag.name == "Allocation":
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return found


class AllocatedMemory:
    """What torch's allocator hands out at most on a GPU, from now on and above what it has handed out before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    def peak_bytes(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.before


class ResidentMemory:
    """What this process holds at most by the operating system's count (Linux), Python and libraries included.

    Counted from now on, above what it holds now.

    Example:
        >>> memory = ResidentMemory(torch.device("cpu"))
        >>> block = bytearray(b"x" * (50 << 20))
        >>> memory.peak_bytes() > 40 << 20
        True
    """

    def __init__(self, device: torch.device) -> None:
        del device  # there is one process, wherever it works
        with suppress(OSError):  # without permission the peak is that of the process so far
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")

    def peak_bytes(self) -> int:
        return _status("VmHWM") - self.before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)
