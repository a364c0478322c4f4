"""The README is true: its commands run in order, its program runs, its figures are those of the committed results."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

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
    for split, count in (("train", 8), ("val", 3)):
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


def test_spt_fast_commands_run_in_order(folder: Path) -> None:
    ours = [command[1:] for command in commands() if command[0] == "spt-fast"]
    assert {"prototypes", "train", "eval", "predict", "info"} <= {arguments[0] for arguments in ours}
    for arguments in ours:
        done = run([sys.executable, "-m", "spt_fast.cli", *arguments], folder)
        assert done.returncode == 0, f"spt-fast {shlex.join(arguments)}\n{done.stderr}"
        assert "Traceback" not in done.stderr


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


def test_times_are_those_of_the_committed_results() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "kmeans-cpu.json").read_text())["rows"]
    medians = [statistics.median(row["ms"]) for row in rows if "ms" in row]
    assert len(medians) == 7
    (ours,) = (
        statistics.median(row["ms"])
        for row in rows
        if (row["peer"], row["dtype"]) == ("spt-fast cpu", "float32")
    )
    for median in medians:
        assert f"| {median:.1f} | {median / ours:.1f}x |" in README


def committed(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / name).read_text())["rows"]
    return rows


def ratio(row: dict[str, Any], to: dict[str, Any]) -> str:
    return f"{statistics.median(a / b for a, b in zip(row['ms'], to['ms'], strict=True)):.2f}x"


def test_training_steps_are_those_of_the_committed_results() -> None:
    names = {"vit_small_patch16_224": "ViT-S/16", "vit_base_patch16_224": "ViT-B/16"}
    cells: dict[tuple[str, str], list[str]] = {}
    rows = committed("train-step-cpu.json")
    for ours, *others in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert ours["peer"] == "spt-fast"
        for row in others:
            cells.setdefault((names[row["model"]], row["peer"]), []).append(ratio(row, ours))
    assert len(cells) == 4
    for (model, peer), ratios in cells.items():
        assert f"| {model} | {peer} | {' | '.join(ratios)} |" in README


def test_attention_is_that_of_the_committed_results() -> None:
    rows = committed("attention-cpu.json")
    ratios = [ratio(theirs, ours) for ours, theirs in zip(rows[::2], rows[1::2], strict=True)]
    assert f"| ViT-B/16 | the attention alone | {' | '.join(ratios)} |" in README


def test_many_tasks_take_what_the_committed_results_say() -> None:
    mixed, alone, loop = committed("multi-task-cpu.json")
    assert f"| one task, one batch | {ratio(alone, mixed)} |" in README
    assert f"| task by task | {ratio(loop, mixed)} |" in README


def test_low_precision_costs_what_the_committed_results_say() -> None:
    rows = [row for row in committed("low-precision-cpu.json") if "missing" not in row]
    assert [row["weights"] for row in rows] == ["float32", "int8"]
    for row in rows:
        accuracies = [
            f"{100 * statistics.mean(row[name]):.1f} ± {100 * statistics.pstdev(row[name]):.1f} %"
            for name in ("accuracy", "accuracy_on_float32")
        ]
        seconds = statistics.median(row["train_seconds"]) / statistics.median(rows[0]["train_seconds"])
        assert f"| {row['weights']} | {' | '.join(accuracies)} | {seconds:.2f}x |" in README


@pytest.mark.parametrize("data", ["cifar10", "digits"])
def test_accuracies_are_those_of_the_committed_results(data: str) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / f"starts-{data}.json").read_text())
    tested: dict[str, list[float]] = {}
    for outcome in results["runs"]:
        if outcome["test"]:
            tested.setdefault(outcome["start"], []).append(outcome["test_accuracy"])
    assert {"kmeans", "random_sample", "uniform"} <= set(tested)
    for start, accuracies in tested.items():
        shown = f"{100 * statistics.mean(accuracies):.1f} ± {100 * statistics.stdev(accuracies):.1f}"
        assert shown in README, f"{data}, {start}: {shown}"
