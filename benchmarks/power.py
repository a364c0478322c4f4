"""Joules that a GPU takes for a piece of work, where NVML counts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import synchronized_seconds

# The counter moves in steps of tens of milliseconds; over this long they are a few percent.
SECONDS = 0.5


def joules(device: torch.device, work: Callable[[], Any]) -> float | None:
    """The energy of one call of ``work``, averaged over half a second of calls; ``None`` where nobody counts it."""
    counter = energy_counter(device)
    if counter is None:
        return None
    once = synchronized_seconds(device, work)
    calls = max(3, round(SECONDS / max(once, 1e-6)))

    def repeat() -> None:
        for _ in range(calls):
            work()

    before = counter()
    synchronized_seconds(device, repeat)
    return (counter() - before) / calls


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """Joules that the GPU has taken since its driver was loaded, as a function; ``None`` without NVML."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        # NVML does not know CUDA_VISIBLE_DEVICES, so the device is found by its identity.
        identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(identity)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no NVML, no permission, or a GPU without a counter: all mean that there is no figure
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
