"""The comparison of starts: three disjoint sets of images, each start at its own best rate, nothing done twice."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import compare_starts

RATES = compare_starts.LEARNING_RATES


class InlinePool:
    """Runs jobs at once, in this process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def submit(self, function: Any, *args: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Jobs in the order they are run; a run's accuracy is a made-up function of start and rate."""
    done: list[dict[str, Any]] = []
    best = {"kmeans": RATES[3], "uniform": RATES[1]}

    def run(job: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
        done.append(job)
        accuracy = 0.8 if job["learning_rate"] == best[job["start"]] else 0.5
        tested = {"test_accuracy": accuracy + job["seed"] / 100} if job["test"] else {}
        return {**job, "val_accuracy": accuracy, "prototype_seconds": 1.0, "train_seconds": 2.0, **tested}

    monkeypatch.setattr(compare_starts, "run", run)
    monkeypatch.setattr(compare_starts, "ProcessPoolExecutor", InlinePool)
    return done


def invoke(output: Path, *more: str) -> Any:
    arguments = [
        "--data",
        "digits",
        "--output",
        str(output),
        "--starts",
        "kmeans",
        "--starts",
        "uniform",
        *more,
    ]
    return CliRunner().invoke(compare_starts.app, arguments)


def test_each_start_is_tested_at_its_own_best_rate_with_every_seed(jobs: list, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    assert invoke(output).exit_code == 0
    tested = [(job["start"], job["learning_rate"], job["seed"]) for job in jobs if job["test"]]
    assert tested == [("kmeans", RATES[3], seed) for seed in range(3)] + [
        ("uniform", RATES[1], seed) for seed in range(3)
    ]
    assert {job["lr_scale"] for job in jobs if job["test"]} == {"rms"}
    swept = [job for job in jobs if not job["test"]]
    assert len(swept) == 2 * 2 * len(RATES)  # starts x scales x rates
    results = json.loads(output.read_text())
    assert len(results["runs"]) == len(jobs) and results["machine"]["versions"]["torch"]


def test_finished_runs_are_not_done_again(jobs: list, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    invoke(output)
    content = json.loads(output.read_text())
    content["runs"] = content["runs"][:-4]
    output.write_text(json.dumps(content))
    jobs.clear()
    assert invoke(output).exit_code == 0
    assert len(jobs) == 4


def test_results_of_another_setting_are_refused(jobs: list, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    invoke(output)
    before = output.read_text()
    assert invoke(output, "--epochs", "9").exit_code == 1
    assert output.read_text() == before
