"""The suite of benchmarks, on small scripts in place of its sections."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import wait_for
from forked_processes import finish, start
from typer.testing import CliRunner, Result

from benchmarks import BENCHMARKS, suite

SUCCEEDS = "import pathlib, sys; pathlib.Path(sys.argv[1], 'written.json').write_text('1')"
FAILS = "import sys; sys.exit(7)"
# Holds a lock, and so does a child of it, which will not leave when asked to.
OVERRUNS = """
import fcntl, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)  # and so it is in the child
lock = open(pathlib.Path(sys.argv[1], "lock"), "w")
fcntl.flock(lock, fcntl.LOCK_EX)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=[lock.fileno()])
pathlib.Path(sys.argv[1], "begun").write_text(str(child.pid))
time.sleep(600)
"""
# As a benchmark does, it writes what it has when it is interrupted.
INTERRUPTED = """
import pathlib, sys, time
try:
    pathlib.Path(sys.argv[1], "begun").write_text("1")
    time.sleep(600)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1], "saved").write_text("1")
"""

Sections = Callable[..., list[tuple[str, float]]]


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> Sections:
    """Replace the sections by scripts, ``name=(minutes, script)``; what ran, and in how many minutes, is returned."""

    def replace(**scripts: tuple[float, str]) -> list[tuple[str, float]]:
        ran: list[tuple[str, float]] = []

        def section(name: str, share: float, script: str) -> suite.Section:
            def command(device: str, minutes: float, results: Path) -> list[str]:
                assert device == "cpu"
                ran.append((name, minutes))
                return [sys.executable, "-c", script, str(results)]

            return suite.Section({"cpu": share}, command)

        table = {name: section(name, *each) for name, each in scripts.items()}
        monkeypatch.setattr(suite, "SECTIONS", table)
        return ran

    return replace


def invoke(results: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        suite.app, ["--device", "cpu", "--results", str(results), *arguments], env={"COLUMNS": "200"}
    )


def state(results: Path) -> dict[str, Any]:
    return json.loads((results / "suite.json").read_text())


def statuses(results: Path) -> dict[str, str]:
    return {name: each["status"] for name, each in state(results)["sections"].items()}


def test_a_section_that_fails_does_not_stop_the_others(sections: Sections, tmp_path: Path) -> None:
    ran = sections(first=(1.0, FAILS), second=(1.0, SUCCEEDS))
    done = invoke(tmp_path)
    assert done.exit_code == 1 and [name for name, _ in ran] == ["first", "second"]
    assert statuses(tmp_path) == {"first": "failed", "second": "finished"}
    found = state(tmp_path)
    assert found["sections"]["first"]["return_code"] == 7
    assert found["sections"]["second"]["return_code"] == 0
    assert (
        found["sections"]["second"]["files"] == ["written.json"] and not found["sections"]["first"]["files"]
    )
    assert {"device", "commit", "versions"} <= set(found["machine"]) and found["started"]
    assert any("second" in line and "written.json" in line for line in done.output.splitlines())
    assert "failed, exit code 7" in done.output


def test_when_all_succeed_so_does_the_suite(sections: Sections, tmp_path: Path) -> None:
    sections(first=(1.0, SUCCEEDS), second=(1.0, SUCCEEDS))
    assert invoke(tmp_path).exit_code == 0


def test_one_that_overruns_is_killed_with_its_children(
    sections: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "GRACE", 0.2)
    sections(first=(5 / 60, OVERRUNS), second=(1.0, SUCCEEDS))
    assert invoke(tmp_path, "--section", "first").exit_code == 1
    assert statuses(tmp_path) == {"first": "timed out"}
    assert state(tmp_path)["sections"]["first"]["return_code"] == -signal.SIGKILL
    assert (tmp_path / "begun").exists(), "it was killed before its child was there"
    deadline = time.monotonic() + 10
    with (tmp_path / "lock").open() as lock:
        while True:  # until the system has done away with the child, and with its lock
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "the child is alive"
                time.sleep(0.01)


def test_what_one_leaves_over_goes_to_the_next(sections: Sections, tmp_path: Path) -> None:
    ran = sections(first=(6.0, SUCCEEDS), second=(3.0, SUCCEEDS))
    invoke(tmp_path, "--minutes", "6")  # two thirds of what they usually have
    (_, first), (_, second) = ran
    assert 3.5 < first <= 4.0 and 5.0 < second <= 6.0


def test_no_section_begins_when_the_time_is_over(
    sections: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "LIMIT", 10.0)  # so that the first may take it all
    ran = sections(first=(0.04, INTERRUPTED), second=(0.04, SUCCEEDS))
    assert invoke(tmp_path).exit_code == 1 and [name for name, _ in ran] == ["first"]
    assert (tmp_path / "saved").exists(), "it was not interrupted but killed"
    assert statuses(tmp_path) == {"first": "timed out", "second": "timed out"}


def test_resuming_passes_over_what_is_finished(sections: Sections, tmp_path: Path) -> None:
    sections(first=(1.0, SUCCEEDS), second=(1.0, FAILS), third=(1.0, SUCCEEDS))
    invoke(tmp_path, "--section", "first", "--section", "second")
    started = state(tmp_path)["started"]
    ran = sections(first=(1.0, FAILS), second=(1.0, SUCCEEDS), third=(1.0, SUCCEEDS))
    assert invoke(tmp_path, "--resume").exit_code == 0
    assert [name for name, _ in ran] == ["second", "third"]
    assert statuses(tmp_path) == {"first": "finished", "second": "finished", "third": "finished"}
    assert state(tmp_path)["started"] == started
    assert invoke(tmp_path, "--resume").exit_code == 0 and len(ran) == 2
    assert invoke(tmp_path).exit_code == 1 and len(ran) == 5  # not resumed, it begins again


@pytest.mark.parametrize("fact", ["commit", "device"])
def test_resuming_another_commit_or_device_is_refused(sections: Sections, tmp_path: Path, fact: str) -> None:
    ran = sections(first=(1.0, SUCCEEDS), second=(1.0, SUCCEEDS))
    invoke(tmp_path, "--section", "first")
    content = state(tmp_path)
    content["machine"][fact] = "another"
    (tmp_path / "suite.json").write_text(json.dumps(content))
    done = invoke(tmp_path, "--resume")
    assert done.exit_code == 1 and f"is of {fact} another" in done.output and len(ran) == 1
    assert state(tmp_path) == content


@pytest.mark.parametrize("content", ["no json", "[]", '{"sections": {"first": {"mood": "good"}}}'])
def test_a_state_that_is_none_is_refused(sections: Sections, tmp_path: Path, content: str) -> None:
    ran = sections(first=(1.0, SUCCEEDS))
    (tmp_path / "suite.json").write_text(content)
    done = invoke(tmp_path, "--resume")
    assert done.exit_code == 1 and "suite.json does not say" in done.output and not ran


def test_training_at_scale_is_measured_on_gpus_alone(tmp_path: Path) -> None:
    done = invoke(tmp_path, "--at-scale")
    assert done.exit_code == 1 and "--at-scale is measured on a GPU, not on cpu" in done.output
    assert set(suite.chosen_sections(None, torch.device("cuda"), at_scale=True)) == {
        "end_to_end",
        "large_model",
        "imagenet_stream",
    }


def test_an_unknown_section_is_refused(sections: Sections, tmp_path: Path) -> None:
    sections(first=(1.0, SUCCEEDS))
    done = invoke(tmp_path, "--section", "last")
    assert done.exit_code == 1 and "one of first on cpu, got last" in done.output


def run_two(arguments: tuple[str, ...], printed: Path) -> None:
    """A suite of two scripts, the second of which takes long, in a process of its own."""

    def section(script: str) -> suite.Section:
        return suite.Section({"cpu": 5.0}, lambda *given: [sys.executable, "-c", script, str(given[-1])])

    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    suite.SECTIONS = {"first": section(SUCCEEDS), "second": section(INTERRUPTED)}
    suite.app(arguments)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_what_can_be_resumed(
    sections: Sections, tmp_path: Path, how: signal.Signals
) -> None:
    printed = tmp_path / "printed"
    (process,) = start(run_two, ("--device", "cpu", "--results", str(tmp_path)), printed)
    wait_for((tmp_path / "begun").exists, process.is_alive)
    # What is on disk now is what a suite leaves that is killed outright.
    assert statuses(tmp_path) == {"first": "finished", "second": "interrupted"}
    assert process.pid is not None
    os.kill(process.pid, how)
    assert finish([process]) == [130]
    output = printed.read_text()
    assert "--resume goes on" in output and "Traceback" not in output
    assert (tmp_path / "saved").exists() and statuses(tmp_path)["second"] == "interrupted"
    ran = sections(first=(1.0, FAILS), second=(1.0, SUCCEEDS))
    assert invoke(tmp_path, "--resume").exit_code == 0 and [name for name, _ in ran] == ["second"]


def test_the_real_sections_are_benchmarks_in_little_time(tmp_path: Path) -> None:
    assert set(suite.SECTIONS) - {"tests"} <= set(BENCHMARKS)
    for device, at_scale, most in (("cuda", False, 8.9), ("cuda", True, 5.6), ("cpu", False, 8.9)):
        sections = suite.chosen_sections(None, torch.device(device), at_scale)
        shares = [each.minutes[device] for each in sections.values()]
        assert sum(shares) == pytest.approx(most, abs=0.1)  # as the help of --minutes says
    on_gpu_alone = {name for name, each in suite.SECTIONS.items() if "cpu" not in each.minutes}
    assert on_gpu_alone == {"tests", "end_to_end", "large_model", "imagenet_stream"}
    assert next(iter(suite.SECTIONS)) == "tests"
    command = suite.SECTIONS["train_step"].command("cpu", 2.0, tmp_path)
    common = ("--minutes", f"{suite.BEGINNING * 2:.2f}", "--results", str(tmp_path))
    assert command[1:] == [
        *("-m", "benchmarks.train_step", "--device", "cpu", *common, "--rounds", "3", "--brief")
    ]
    on_gpu = suite.SECTIONS["train_step"].command("cuda", 2.0, tmp_path)
    assert on_gpu[1:] == ["-m", "benchmarks.train_step", "--device", "cuda", *common]
