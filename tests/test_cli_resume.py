"""Commands that are interrupted, and the same commands with --resume: they end as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import (
    TINY,
    TRAIN,
    check_equal,
    check_refused,
    environment,
    files,
    last,
    make_photos,
    run,
    wait_for,
)
from forked_processes import start
from safetensors import safe_open
from safetensors.torch import load_file

import spt_fast
from spt_fast.files import LEFTOVER_PREFIX
from spt_fast.prototypes_checkpoint import Checkpoint
from spt_fast.training_config import TrainingConfig


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos")


def interrupted_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, with Ctrl-C when it has returned ``calls`` times."""
    remaining = iter(range(calls - 1, -1, -1))

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        if next(remaining) == 0:
            raise KeyboardInterrupt
        return result

    return wrapped


@pytest.mark.parametrize("method", ["kmeans", "minibatch_kmeans"])
def test_prototypes_go_on_after_ctrl_c(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    name = "p{num_prompts}.safetensors"
    (tmp_path / "straight").mkdir()
    arguments = ["prototypes", *TINY, "--data", photos, "--method", method, "--batch-size", 3, "--json"]
    arguments += ["--num-prompts", 4, "--num-prompts", 6, "--checkpoint-minutes", 0, "--output"]
    assert run(*arguments, tmp_path / "straight" / name).code == 0
    output = tmp_path / "resumed" / name
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", interrupted_after(3, Checkpoint.save))
        done = run(*arguments, output)
    assert done.code == 130 and "--resume goes on" in done.err
    assert "Traceback" not in done.err and not done.out
    assert files(tmp_path / "resumed") == {name + ".partial"}
    check_refused(run(*arguments, output, "--resume", "--seed", 1), "seed=0", "seed=1")
    done = run(*arguments, output, "--resume")
    assert done.code == 0, done.err
    for number in (4, 6):
        path = f"p{number}.safetensors"
        check_equal(load_file(tmp_path / "resumed" / path), load_file(tmp_path / "straight" / path))
    assert files(tmp_path / "resumed") == {"p4.safetensors", "p6.safetensors"}


def progress_of(partial: Path) -> int:
    """Batches that an unfinished stream has taken in, or passes that k-means has made."""
    if not partial.exists():
        return 0
    with safe_open(partial, "pt") as opened:
        passes = [name for name in opened.keys() if name.endswith("/lloyd.iterations")]  # noqa: SIM118
        if passes:
            return int(opened.get_tensor(passes[0]).max())
        return json.loads(opened.metadata()["json"])["batches"]


@pytest.mark.parametrize(("method", "num_prompts", "far"), [("kmeans", 12, 5), ("minibatch_kmeans", 2, 140)])
def test_prototypes_go_on_after_kill(
    tmp_path: Path, one_thread: None, method: str, num_prompts: int, far: int
) -> None:
    # The first 128 images of the stream fill its sample.
    many = make_photos(tmp_path / "many", {"train": 80, "val": 1})
    output, straight = tmp_path / "killed.safetensors", tmp_path / "straight.safetensors"
    partial = output.with_name(output.name + ".partial")
    arguments = [
        "prototypes",
        *TINY,
        "--data",
        str(many),
        "--method",
        method,
        "--num-prompts",
        str(num_prompts),
    ]
    arguments += ["--batch-size", "1", "--json", "--output"]
    (process,) = start(run, *arguments, output, "--checkpoint-minutes", 0)
    wait_for(lambda: progress_of(partial) >= far, process.is_alive)
    process.kill()
    process.join()
    assert partial.exists() and not output.exists(), "it was finished before it was killed"
    done = run(*arguments, output, "--resume")
    assert done.code == 0 and done.json["images"] == 240, done.err
    assert run(*arguments, straight).code == 0
    check_equal(load_file(output), load_file(straight))
    # Whoever is killed in the middle of a save leaves the half of a hidden file (ours, or one that safetensors writes).
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith((LEFTOVER_PREFIX, ".tmp"))}
    assert left == {"many", output.name, straight.name}


def test_training_goes_on_after_ctrl_c(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spt_fast import training_run

    train = ["train", *TINY, *TRAIN, "--data", photos, "--epochs", 2, "--json", "--output"]
    assert run(*train, tmp_path / "straight").code == 0
    output = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "save_adapter", interrupted_after(3, training_run.save_adapter))
        done = run(*train, output)
    assert (
        done.code == 130 and "--resume goes on" in done.err and "Traceback" not in done.err and not done.out
    )

    # What would not be the same run is refused, also where an option is merely left out.
    other = ["train", *TINY, "--data", photos, "--output", output, "--resume", "--epochs", 2]
    check_refused(run(*other), "num_prompts=4", "num_prompts=20")
    check_refused(run(*train, output, "--resume", "--method", "uniform"), "'kmeans'", "'uniform'")
    check_refused(
        run(*train, output, "--resume", "--lr", 3),
        f"learning_rate={TrainingConfig.learning_rate}",
        "learning_rate=3.0",
    )
    check_refused(run(*train, output, "--resume", "--pool", "token"), "pool='avg'", "pool='token'")
    check_refused(run(*train, output, "--resume", "-k", "mlp_ratio=2"), "backbone=")
    fewer = make_photos(tmp_path / "fewer", {"train": 2, "val": 2})
    check_refused(run(*train, output, "--resume", "--data", fewer), "images=12", "images=6")
    prompts = tmp_path / "other.safetensors"
    spt_fast.Prototypes(torch.randn(2, 4, 48)).save(prompts)
    without_start = [*TINY, "--data", photos, "--output", output, "--resume"]
    check_refused(run("train", *without_start, "--prompts", prompts), "other prompts")

    done = run(*train, output, "--resume")
    assert done.code == 0, done.err
    check_equal(last(output), last(tmp_path / "straight"))


def test_training_goes_on_after_kill(photos: Path, tmp_path: Path, one_thread: None) -> None:
    output = tmp_path / "killed"
    train = ["train", *TINY, *TRAIN, "--data", str(photos), "--epochs", "30", "--json", "--output"]
    (process,) = start(run, *train, output)
    wait_for((output / "checkpoint.pt").exists, process.is_alive)
    process.kill()
    process.join()
    assert not (output / "summary.json").exists(), "it was finished before it was killed"
    # What is there can be read.
    assert run("eval", "--adapter", output / "last.safetensors", "--data", photos).code == 0
    assert run(*train, output, "--resume").code == 0
    assert run(*train, tmp_path / "straight").code == 0
    check_equal(last(output), last(tmp_path / "straight"))


def test_as_a_process_of_its_own(photos: Path, tmp_path: Path) -> None:
    """Ctrl-C from a terminal, and the standard output of --json."""
    output = tmp_path / "run"
    train = [
        "train",
        *TINY,
        *TRAIN,
        "--data",
        str(photos),
        "--epochs",
        "1000",
        "--json",
        "--output",
        str(output),
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "spt_fast.cli", *train],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A test run in the background of a script ignores Ctrl-C, and its children would as well.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        wait_for((output / "checkpoint.pt").exists, lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not out
    assert "Traceback" not in err and "--resume goes on" in err
    assert "/1000" in err, "no progress was shown"

    done = subprocess.run(
        [sys.executable, "-m", "spt_fast.cli", "eval", "--adapter", str(output / "last.safetensors")]
        + ["--data", str(photos), "--json"],
        env=environment(),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 6
    assert "evaluating" in done.stderr
