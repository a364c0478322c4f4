"""The developer suite and the comparison of its runs, on made up json in the form of pytest-benchmark's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, environment
from typer.testing import CliRunner, Result

from benchmarks import regressions

MACHINE = {
    "device": "Toaster 3000",
    "cpu": "Toaster 3000",
    "cores": 2,
    "threads": 2,
    "versions": {"torch": "2.11.0", "numpy": "2.0"},
}
REFERENCES = {"test_copy": 1.0, "test_matmul": 2.0, "test_other": 3.0}


def write(
    path: Path,
    medians: dict[str, float],
    *,
    spread: float = 0.01,
    references: float = 1.0,
    **machine: Any,
) -> Path:
    """A run: seconds by test, whose quartiles are ``spread`` of the median away from it on both sides."""

    def entry(name: str, median: float, group: str | None) -> dict[str, Any]:
        stats = {"median": median, "q1": median * (1 - spread), "q3": median * (1 + spread)}
        return {"group": group, "fullname": f"benchmarks/test_x.py::{name}", "stats": stats}

    entries = [entry(name, median, None) for name, median in medians.items()]
    entries += [entry(name, references * seconds, "reference") for name, seconds in REFERENCES.items()]
    content = {"machine_info": {"spt_fast": {**MACHINE, **machine}}, "benchmarks": entries}
    path.write_text(json.dumps(content))
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(regressions.app, [str(each) for each in arguments], env={"COLUMNS": "200"})


def judged(before: Path, now: Path) -> dict[str, str]:
    """Test -> slower, faster or same."""
    old, new = regressions.load(before), regressions.load(now)
    drift = regressions.drift_between(old, new)
    assert drift is not None
    return {
        each.name.partition("::")[2]: "slower" if each.slower else "faster" if each.faster else "same"
        for each in regressions.changes(old, new, drift)
    }


def test_slower_and_faster_beyond_the_noise(tmp_path: Path) -> None:
    medians = {"much": 1.0, "little": 1.0, "gain": 1.0, "small gain": 1.0}
    before = write(tmp_path / "before", medians)
    # The noise is 2 %, of which the smallest difference that counts makes 5.
    now = write(tmp_path / "now", {"much": 1.07, "little": 1.04, "gain": 1 / 1.07, "small gain": 1 / 1.04})
    assert judged(before, now) == {
        "much": "slower",
        "little": "same",
        "gain": "faster",
        "small gain": "same",
    }


def test_the_noise_of_both_runs_counts(tmp_path: Path) -> None:
    before = write(tmp_path / "before", {"much": 1.0, "little": 1.0}, spread=0.2)
    now = write(tmp_path / "now", {"much": 1.35, "little": 1.25}, spread=0.1)
    assert judged(before, now) == {"much": "slower", "little": "same"}


def test_a_slower_machine_is_no_slower_code(tmp_path: Path) -> None:
    before = write(tmp_path / "before", {"as the machine": 1.0, "as before": 1.0, "more": 1.0})
    now = write(tmp_path / "now", {"as the machine": 1.5, "as before": 1.0, "more": 2.0}, references=1.5)
    assert judged(before, now) == {"as the machine": "same", "as before": "faster", "more": "slower"}
    done = invoke(now, before)
    assert done.exit_code == 0 and "the machine itself takes 1.50x as long" in done.output


def test_one_odd_reference_does_not_decide(tmp_path: Path) -> None:
    before, now = write(tmp_path / "before", {"ours": 1.0}), write(tmp_path / "now", {"ours": 1.0})
    content = json.loads(now.read_text())
    odd = next(each for each in content["benchmarks"] if each["fullname"].endswith("test_matmul"))
    odd["stats"] = {name: 10 * value for name, value in odd["stats"].items()}
    now.write_text(json.dumps(content))
    assert judged(before, now) == {"ours": "same"}


def test_slowness_is_told_and_no_error(tmp_path: Path) -> None:
    before = write(tmp_path / "before", {"ours": 1.0, "steady": 1.0})
    now = write(tmp_path / "now", {"ours": 3.0, "steady": 1.0})
    done = invoke(now, before)
    assert done.exit_code == 0
    (line,) = (line for line in done.output.splitlines() if "::ours" in line)
    assert all(words in line for words in ("1.00 s", "3.00 s", "3.00x", "5%"))
    assert "1 slower, 0 faster, 1 within the noise" in done.output and "::steady" not in done.output


def test_new_and_missing_tests_are_named(tmp_path: Path) -> None:
    before = write(tmp_path / "before", {"ours": 1.0, "gone": 1.0})
    now = write(tmp_path / "now", {"ours": 1.0, "new": 1.0})
    done = invoke(now, before)
    assert done.exit_code == 0
    assert "::gone was not run" in done.output and "::new has no baseline" in done.output
    assert judged(before, now) == {"ours": "same"}


def test_without_a_common_reference_it_says_so(tmp_path: Path) -> None:
    before, now = write(tmp_path / "before", {"ours": 1.0}), write(tmp_path / "now", {"ours": 2.0})
    content = json.loads(now.read_text())
    content["benchmarks"] = [each for each in content["benchmarks"] if each["group"] is None]
    now.write_text(json.dumps(content))
    done = invoke(now, before)
    assert done.exit_code == 0 and "no reference workload" in done.output and "2.00x" in done.output


def test_other_versions_are_noted(tmp_path: Path) -> None:
    before = write(tmp_path / "before", {"ours": 1.0})
    now = write(tmp_path / "now", {"ours": 1.0}, versions={"torch": "2.12.0", "faiss-cpu": "1.9"})
    done = invoke(now, before)
    assert done.exit_code == 0
    for sentence in (
        "torch was 2.11.0 and is 2.12.0",
        "numpy was 2.0 and is not there",
        "faiss-cpu was not there and is 1.9",
    ):
        assert sentence in done.output


@pytest.mark.parametrize("fact", ["device", "cpu", "cores", "threads"])
def test_another_machine_is_refused(tmp_path: Path, fact: str) -> None:
    before = write(tmp_path / "before", {"ours": 1.0}, **{fact: 7})
    done = invoke(write(tmp_path / "now", {"ours": 1.0}), before)
    assert done.exit_code == 1 and f"another machine: its {fact} is 7" in done.output


def test_the_first_run_becomes_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regressions, "BASELINES", tmp_path / "baselines")
    kept = tmp_path / "baselines" / "toaster-3000.json"
    first = write(tmp_path / "first", {"ours": 1.0})
    done = invoke(first)
    assert done.exit_code == 0 and "is the baseline now" in done.output
    assert kept.read_text() == first.read_text()
    second = write(tmp_path / "second", {"ours": 2.0})
    assert "1 slower" in invoke(second).output and kept.read_text() == first.read_text()
    assert invoke(second, "--replace").exit_code == 0 and kept.read_text() == second.read_text()
    assert "0 slower" in invoke(second).output


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "holds no run"),
        ("[]", "holds no run"),
        ('{"benchmarks": [], "machine_info": {}}', "holds no run"),
        (json.dumps({"machine_info": {"spt_fast": MACHINE}, "benchmarks": []}), "holds no run"),
        (
            json.dumps(
                {
                    "machine_info": {"spt_fast": MACHINE},
                    "benchmarks": [
                        {"group": None, "fullname": "x", "stats": {"median": 0, "q1": 0, "q3": 0}}
                    ],
                }
            ),
            "holds no run",
        ),
    ],
)
@pytest.mark.parametrize("broken", ["baseline", "current"])
def test_an_unreadable_file_is_one_sentence(
    tmp_path: Path, broken: str, content: str | None, words: str
) -> None:
    bad, good = tmp_path / "bad", write(tmp_path / "good", {"ours": 1.0})
    if content is not None:
        bad.write_text(content)
    done = invoke(bad, good) if broken == "current" else invoke(good, bad)
    assert done.exit_code == 1 and done.exception.__class__ is SystemExit
    assert done.output.startswith(f"error: {bad} {words}") and done.output.count("\n") == 1


def test_the_developer_suite_can_be_collected() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "--quiet",
        "-p",
        "no:cacheprovider",
        "benchmarks",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for test in (
        "test_clustering.py::test_kmeans_step[torch-bfloat16-",
        "test_clustering.py::test_minibatch_partial_fit",
        "test_attention.py::test_forward_and_backward[100-bfloat16-torch]",
        "test_models.py::test_training_step[20]",
        "test_references.py::test_copy",
    ):
        assert f"benchmarks/{test}" in done.stdout, test
