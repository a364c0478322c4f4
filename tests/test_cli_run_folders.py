"""The folder of ``spt-fast train``: one run lies in it, trained once or pruned between, and no other is mixed in."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import TINY, check_refused, files, make_photos, run
from test_cli_resume import interrupted_after

SHORT = [*TINY, "--pool", "avg", "--batch-size", 4, "--dtype", "float32", "--recipe", "vtab", "--epochs", 2]
VPT = ["--method", "vpt_deep", "--num-prompts", 2]
E2VPT = ["--method", "e2vpt", "--num-prompts", 4]
PRUNED = [*E2VPT, "--method-option", "prune_tokens=0.5"]
LINEAR = ["--method", "linear"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def train(photos: Path, tmp_path: Path):
    return lambda *typed: run("train", *SHORT, "--data", photos, "--output", tmp_path / "run", *typed)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(monkeypatch: pytest.MonkeyPatch, train, *typed: object, saves: int = 2):
    from spt_fast import training_run

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "save_adapter", interrupted_after(saves, training_run.save_adapter))
        done = train(*typed)
    assert done.code == 130, done.err
    return done


def test_a_pruned_run_is_a_run(train, tmp_path: Path) -> None:
    assert train(*PRUNED).code == 0
    before = contents(tmp_path / "run")
    check_refused(train(*LINEAR), "already holds a run")
    check_refused(train(*VPT), "already holds a run")
    check_refused(train(*E2VPT, "--resume"), "prunes prompts and this call does not")
    assert contents(tmp_path / "run") == before


def test_a_pruned_run_that_was_interrupted_is_resumed_as_one(train, tmp_path: Path, monkeypatch) -> None:
    done = interrupt(monkeypatch, train, *PRUNED, saves=3)
    assert "--resume goes on" in done.err
    before = contents(tmp_path / "run")
    for other in (E2VPT, LINEAR):
        check_refused(train(*other, "--resume"), "prunes prompts and this call does not")
    assert contents(tmp_path / "run") == before
    assert train(*PRUNED, "--resume").code == 0
    assert (tmp_path / "run" / "rewound" / "summary.json").exists()


def test_a_run_without_pruning_is_not_resumed_with_it(train, tmp_path: Path, monkeypatch) -> None:
    interrupt(monkeypatch, train, *E2VPT, saves=3)
    before = contents(tmp_path / "run")
    check_refused(train(*PRUNED, "--resume"), "does not prune prompts and this call does")
    assert contents(tmp_path / "run") == before


def left_by(run_alone) -> set[str]:
    """Names without those that carry a time or a process."""
    return {name for name in run_alone if "events.out" not in name}


@pytest.mark.parametrize(("first", "then"), [(PRUNED, LINEAR), (VPT, PRUNED), (VPT, LINEAR), (PRUNED, VPT)])
def test_overwrite_leaves_nothing_of_the_earlier_run(
    photos: Path, tmp_path: Path, train, first: list[str], then: list[str]
) -> None:
    assert train(*first, "--snapshot-interval", 1).code == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    done = train(*then, "--overwrite")
    assert done.code == 0, done.err
    alone = run("train", *SHORT, "--data", photos, "--output", tmp_path / "alone", *then)
    assert alone.code == 0
    assert left_by(files(tmp_path / "run")) == left_by(files(tmp_path / "alone")) | {"notes.txt"}


def test_a_folder_that_holds_no_run_is_left_alone(train, tmp_path: Path) -> None:
    """Other runs and files below a folder are not of a run in it."""
    other = tmp_path / "run" / "trained"
    other.mkdir(parents=True)
    for name in ("config.json", "last.safetensors"):
        (other / name).write_text("of another run")
    (tmp_path / "run" / "prompts.safetensors").write_text("made by hand")
    assert train(*LINEAR).code == 0
    assert {path.name for path in other.iterdir()} == {"config.json", "last.safetensors"}
    assert (tmp_path / "run" / "prompts.safetensors").exists()


def test_another_method_is_refused_before_prototypes_are_built(train, tmp_path: Path, monkeypatch) -> None:
    interrupt(monkeypatch, train, "--method", "snf", saves=3)
    before = contents(tmp_path / "run")
    done = train("--method", "spt_deep", "--num-prompts", 2, "--resume")
    check_refused(done, "--method snf", "--method spt_deep")
    assert contents(tmp_path / "run") == before


def test_a_start_that_the_run_did_not_have_is_refused(train, tmp_path: Path, monkeypatch) -> None:
    vapt = ["--method", "vapt", "--num-prompts", 2]
    interrupt(monkeypatch, train, *vapt, saves=3)
    before = contents(tmp_path / "run")
    check_refused(train(*vapt, "--init", "mean_pool", "--resume"), "started without prompts.safetensors")
    assert contents(tmp_path / "run") == before


def test_ctrl_c_tells_how_to_go_on_without_prompts(train, monkeypatch) -> None:
    assert "--resume goes on" in interrupt(monkeypatch, train, "--method", "adapter", saves=3).err
    assert train("--method", "adapter", "--resume").code == 0


def test_ctrl_c_before_anything_is_there_to_go_on_from(train, monkeypatch) -> None:
    assert "--resume" not in interrupt(monkeypatch, train, "--method", "adapter", saves=1).err


def test_analyze_names_the_runs_of_a_pruned_one(photos: Path, tmp_path: Path, train) -> None:
    assert train(*PRUNED).code == 0
    analyze = ["analyze", "--data", photos, "--output", tmp_path / "looked", "--images", 4, "--nearest", 2]
    folder = tmp_path / "run"
    check_refused(run(*analyze, "--run", folder), str(folder / "trained"), str(folder / "rewound"))
    assert run(*analyze, "--run", folder / "rewound").code == 0
