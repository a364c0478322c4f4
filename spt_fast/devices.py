"""Which device to work on, what it is called, and what it is good at."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

from spt_fast.errors import InputError

CONTROL_GROUP = Path("/sys/fs/cgroup")


def choose_device(name: str = "auto") -> torch.device:
    """A device that can be used here.

    Args:
        name: a torch device name (``"cpu"``, ``"cuda"``, ``"cuda:1"``), or ``"auto"``: this process's accelerator if
            there is one (``LOCAL_RANK`` under torchrun), else the CPU.

    Raises:
        InputError: torch does not know the name, or the device is not there.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used here: {reason}") from None
    return device


def device_name(device: torch.device) -> str:
    """The name of the hardware behind ``device``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.cpu.get_capabilities().get("cpu_name") or platform.machine()


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether a transformer runs faster in bfloat16 than in float32 on ``device``.

    True for CUDA devices that compute in it and for CPUs with AMX. AVX-512's bfloat16 dot instructions alone are not
    enough: with them a training step of ViT-Tiny took twice as long as in float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken on ``device`` now; on the CPU within the limit of its control group, if it has one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = 1024 * int(line.split()[1])
    with suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        most, used = (int((CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
        # Files that were read are kept as long as nobody needs their memory.
        used -= int(statistics.get("active_file", 0)) + int(statistics.get("inactive_file", 0))
        free = min(free, most - used)
    return max(0, free)
