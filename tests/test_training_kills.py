"""Nothing is lost: killed ten times at random moments, in one process and in two, by torchrun, on a full disk."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_processes import FORKS, finish, start
from killed_processes import IMAGES, LONG, attempt_in_processes, run
from tiny import squares, tiny_model
from training_cases import TESTS, assert_same, child_environment

from spt_fast import Adapter, train
from spt_fast.files import LEFTOVER_PREFIX

pytestmark = pytest.mark.usefixtures("one_thread")
KILLS = 10
# More of them take minutes: each restart imports torch twice. SPT_FAST_RESTARTS=10 asks for them.
RESTARTS = int(os.environ.get("SPT_FAST_RESTARTS", "1"))


def adapters(output: Path) -> dict[str, torch.Tensor]:
    """Of the last and the best epoch."""
    tensors = {}
    for name in ("last", "best"):
        adapter = Adapter.load(output / f"{name}.safetensors")
        tensors |= {f"{name} prompts": adapter.prompts, f"{name} head": adapter.head_weight}
    return tensors


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_ten_times_ends_with_the_same_adapter(tmp_path: Path, world_size: int) -> None:
    for attempt in range(KILLS):
        codes = attempt_in_processes(tmp_path / "killed", attempt, world_size=world_size, kill=True)
        assert codes[attempt % world_size] == -signal.SIGKILL, "it was over before it could be killed"
        assert not (tmp_path / "killed" / "summary.json").exists()
    assert (
        attempt_in_processes(tmp_path / "killed", KILLS, world_size=world_size, kill=False)
        == [0] * world_size
    )
    straight = tmp_path / "straight"
    assert attempt_in_processes(straight, 0, world_size=world_size, kill=False) == [0] * world_size
    assert_same(adapters(tmp_path / "killed"), adapters(straight))
    assert not list((tmp_path / "killed").glob(f"{LEFTOVER_PREFIX}*"))


def test_torchrun_starts_killed_processes_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "--max-restarts",
        str(RESTARTS),
        str(TESTS / "killed_processes.py"),
        str(tmp_path / "restarted"),
    ]
    done = subprocess.run(command, env=child_environment(), timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Signal 9") + done.stderr.count("exitcode: -9") >= RESTARTS, done.stderr
    assert attempt_in_processes(tmp_path / "straight", 0, world_size=2, kill=False) == [0, 0]
    assert_same(adapters(tmp_path / "restarted"), adapters(tmp_path / "straight"))


def _train_until_no_file_may_grow(output: Path, told: Any) -> None:
    """After the first epoch no file may be larger than a few bytes: what a full disk does to a writer."""
    kept: list[bytes] = []
    steps_per_epoch = -(-IMAGES // LONG.batch_size)
    steps = 0

    def progress(stage: str, done: int, total: int | None) -> None:
        nonlocal steps
        steps += 1
        if steps == steps_per_epoch + 1:
            kept.append((output / "checkpoint.pt").read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        if steps == steps_per_epoch + 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            unchanged = (output / "checkpoint.pt").read_bytes() == kept[0]
            told.put((unchanged, sorted(os.listdir(output)), [str(each.message) for each in warned]))
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.warns(RuntimeWarning) as warned:
        run(output, progress=progress)


def test_a_full_disk_keeps_the_state_before_and_says_so(tmp_path: Path) -> None:
    told = FORKS.SimpleQueue()
    assert finish(start(_train_until_no_file_may_grow, tmp_path / "full", told)) == [-signal.SIGKILL]
    unchanged, names, warned = told.get()
    assert unchanged
    assert not any(name.startswith(LEFTOVER_PREFIX) for name in names)
    saved = [text for text in warned if "could not be saved" in text]
    assert len(saved) == 2  # one for each step
    for text in saved:
        assert str(tmp_path / "full") in text and "File too large" in text
        assert "the one before it is kept, training goes on" in text
    for name, attempt in (("full", 1), ("straight", 0)):
        assert attempt_in_processes(tmp_path / name, attempt, world_size=1, kill=False) == [0]
    assert_same(adapters(tmp_path / "full"), adapters(tmp_path / "straight"))


def test_leftovers_of_a_killed_writer_go(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    left = tmp_path / "run" / f"{LEFTOVER_PREFIX}checkpoint-abc.pt"
    left.write_bytes(b"half")
    other = tmp_path / "run" / ".somebody-else"
    other.write_bytes(b"theirs")
    train(tiny_model(), squares(5), output=tmp_path / "run", config=LONG)
    assert not left.exists() and other.exists()
