"""What is installed on this machine and what it can run."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from spt_fast._version import __version__
from spt_fast.backbones import bundled_backbones
from spt_fast.devices import device_name
from spt_fast.kernels import available_backends, unavailable_backends
from spt_fast.kernels.kmeans_cpu import instruction_sets

PACKAGES = (
    "torch",
    "triton",
    "timm",
    "torchvision",
    "scikit-learn",
    "safetensors",
    "cupy-cuda13x",
    "torchao",
)


def machine_facts() -> dict[str, dict[str, Any]]:
    """Versions, devices, kernel backends and bundled backbones, as json-able sections of named facts.

    Example:
        >>> facts = machine_facts()
        >>> list(facts)
        ['version', 'device', 'kernel backends', 'kernel backends that cannot run', 'bundled']
        >>> facts["bundled"]["backbones"]
        ['vit_tiny_mae_cifar10']
    """
    return {
        "version": {"spt-fast": __version__, "python": platform.python_version()}
        | {package: _installed(package) for package in PACKAGES},
        "device": _devices(),
        "kernel backends": dict(available_backends()),
        "kernel backends that cannot run": {
            f"{op} {name}": reason
            for op, reasons in unavailable_backends().items()
            for name, reason in reasons.items()
        },
        "bundled": {"backbones": bundled_backbones()},
    }


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    instructions = torch.backends.cpu.get_cpu_capability()
    cpu = device_name(torch.device("cpu"))
    devices = {"cpu": f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {instructions}"}
    devices["cpu kernels"] = ", ".join(instruction_sets()[:1]) or "not built"
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = device_name(torch.device("cuda", index))
    if not torch.cuda.is_available():
        built = "no GPU is visible" if torch.version.cuda else "this torch is built without CUDA"
        devices["cuda"] = f"none: {built}"
    return devices
