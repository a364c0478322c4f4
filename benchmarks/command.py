"""What the benchmark commands share: progress bars, the machine's name, one sentence for a mistake."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import spt_fast
from benchmarks.image_folder import load_images
from spt_fast.devices import device_name
from spt_fast.errors import SptFastError

console = Console()


@contextmanager
def mistakes_in_one_sentence() -> Iterator[None]:
    """Print a mistake of the caller as one sentence on stderr and leave with exit code 1."""
    try:
        yield
    except SptFastError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


def load_with_progress(path: Path, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """:func:`benchmarks.image_folder.load_images` with a progress bar."""
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        return load_images(
            path, size, on_progress=lambda read, total: progress.update(task, completed=read, total=total)
        )


def installed_versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are there."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was measured, for its json record."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "spt_fast": spt_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            **installed_versions("triton", "cupy-cuda13x", "scikit-learn", "faiss-cpu", "flash-kmeans"),
        },
        "commit": commit.stdout.strip() or None,
        "date": date.today().isoformat(),
    }
