"""The command line as tests call it: in this process, on tiny folders of photos, judged by what it printed and left."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from spt_fast.cli import main

ROOT = Path(__file__).resolve().parent.parent
# Random weights: 16 patches of 8 x 8, width 48, two blocks.
TINY = shlex.split(
    "--model vit_tiny_patch16_224 -k img_size=32 -k patch_size=8 -k embed_dim=48 -k depth=2 -k num_heads=3 --device cpu"
)
TRAIN = shlex.split("--pool avg --num-prompts 4 --batch-size 4 --dtype float32 --recipe vtab")
COLOURS = {"blue": (0, 0, 120), "green": (0, 120, 0), "red": (120, 0, 0)}
COUNTS = {"train": 4, "val": 2, "test": 3}  # images of each colour


@dataclass
class Done:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*arguments: object, backend: str | None = None) -> Done:
    """What ``spt-fast *arguments`` does, in this process; ``backend`` is what ``SPT_FAST_BACKEND`` says."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")  # wide, so that no sentence is broken into lines
        patch.delenv("SPT_FAST_BACKEND", raising=False)
        if backend is not None:
            patch.setenv("SPT_FAST_BACKEND", backend)
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        patch.setattr(sys, "argv", ["spt-fast", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def environment() -> dict[str, str]:
    """For ``spt-fast`` as a process of its own."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def wait_for(condition: Callable[[], bool], running: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert running(), "it ended before it could be stopped"
        assert time.monotonic() < deadline, "it does not come to the point"
        time.sleep(0.01)


def make_photos(
    root: Path, counts: dict[str, int] = COUNTS, colours: tuple[str, ...] = tuple(COLOURS)
) -> Path:
    """``root/<split>/<colour>/<n>.png``: noise with a tint that gives the class away."""
    generator = torch.Generator().manual_seed(0)
    for split, count in counts.items():
        for colour in colours:
            folder = root / split / colour
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 130, (36, 40, 3), generator=generator) + torch.tensor(
                    COLOURS[colour]
                )
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{index}.png")
    return root


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check_refused(done: Done, *words: str, code: int = 1) -> None:
    """One sentence on standard error that has ``words``, and nothing on standard output."""
    assert done.code == code, done
    assert "Traceback" not in done.err and not done.out, done
    if code == 1:
        mistakes = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(mistakes) == 1 and done.err.rstrip().endswith(mistakes[0]), done.err
    for word in words:
        assert word in done.err, (word, done.err)


def last(output: Path) -> dict[str, Tensor]:
    return load_file(output / "last.safetensors")


def check_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
