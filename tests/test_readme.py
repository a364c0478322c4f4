"""The README is true: its commands run in order, its program runs, its figures are those of the committed results."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from command_line import run as spt_fast
from PIL import Image

from benchmarks.readme import measured_section, with_measured
from benchmarks.record import newest
from benchmarks.starts import load_starts

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    return [shlex.split(line) for block in blocks("sh") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the photos the README speaks of: cats are reddish, dogs bluish."""
    root = tmp_path_factory.mktemp("readme")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 3), ("test", 3)):
        for name, tint in (("cat", (90, 0, 0)), ("dog", (0, 0, 90))):
            (root / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(0, 160, (40, 50, 3), generator=generator) + torch.tensor(tint)
                Image.fromarray(noise.to(torch.uint8).numpy()).save(
                    root / f"photos/{split}/{name}/{index}.jpg"
                )
    return root


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=False, timeout=600)


def test_make_targets_exist() -> None:
    targets = [command[1:] for command in commands() if command[0] == "make"]
    assert targets
    for arguments in targets:
        # -n: `make test` is what runs this test.
        done = run(["make", "-n", *arguments], ROOT)
        assert done.returncode == 0, done.stderr


def test_spt_fast_commands_run_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ours = [command[1:] for command in commands() if command[0] == "spt-fast"]
    assert {"prototypes", "train", "eval", "predict", "info"} <= {arguments[0] for arguments in ours}
    for arguments in ours:
        done = spt_fast(*arguments)
        assert done.code == 0, f"spt-fast {shlex.join(arguments)}\n{done.err}"
        assert "Traceback" not in done.err


def test_benchmark_commands_are_understood() -> None:
    found = [command for command in commands() if command[:2] == ["python", "-m"]]
    assert found
    for command in found:
        module = importlib.import_module(command[2])
        # Parsed, not run: they take many minutes. Each has a test of its own.
        typer.main.get_command(module.app).make_context(command[2], command[3:])


def test_the_programs_run(folder: Path) -> None:
    programs = blocks("python")
    assert len(programs) == 3
    for program in programs:
        done = run([sys.executable, "-c", program], folder)
        assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "digits" / "last.safetensors").exists()


def test_figures_are_those_of_the_committed_results() -> None:
    """Whoever changes one without the other runs ``python -m benchmarks.report``."""
    assert with_measured(README, measured_section(newest(), load_starts())) == README
