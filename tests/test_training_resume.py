"""No interruption changes the result of a training run."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import learned, squares, tiny_backbone, tiny_model
from training_cases import (
    CONFIG,
    IMAGES,
    STEPS,
    VARIANTS,
    Case,
    Interruption,
    assert_same,
    assert_same_result,
    child_environment,
    interrupt_after,
    read_csv,
    scalars,
    without_seconds,
)

import spt_fast.training_run
from spt_fast import train
from spt_fast.backbones import source_of
from spt_fast.errors import CheckpointError, InputError

pytestmark = pytest.mark.usefixtures("one_thread")


# Interruption and resume


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_and_resumed_equals_uninterrupted(variant: str, tmp_path: Path) -> None:
    case = Case(variant, tmp_path)
    expected_model, expected = case.run("straight")
    assert expected.skipped == 2
    for steps in (1, 5, 6):  # in the first epoch, in the second, and at its end, before anything else is done
        with pytest.raises(Interruption):
            case.run(f"stopped{steps}", progress=interrupt_after(steps))
        model, result = case.run(f"stopped{steps}", seed=1, resume=True)
        # A frozen prompt is part of the state as well: the fresh model started from another one.
        assert_same(learned(model), learned(expected_model))
        assert_same_result(result, expected)


def test_interrupted_after_every_step(tmp_path: Path) -> None:
    case = Case("everything", tmp_path)
    expected_model, expected = case.run("straight")
    # The step that ends an epoch is saved with what follows it, so every call has to get one step further.
    for attempt in range(3 * STEPS):
        try:
            model, result = case.run("stopped", seed=attempt, resume=True, progress=interrupt_after(2))
            break
        except Interruption:
            continue
    assert attempt >= STEPS
    assert_same(learned(model), learned(expected_model))
    assert_same_result(result, expected)


@pytest.mark.parametrize(
    "module, where",
    [
        (spt_fast.training_run, "evaluate_feed"),
        (spt_fast.training_run, "save_adapter"),
        (spt_fast.run_folder, "write_text"),
    ],
)
def test_interrupted_at_the_end_of_an_epoch(
    module: Any, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("moving_average", tmp_path)
    expected_model, expected = case.run("straight")
    original, calls = getattr(module, where), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise Interruption
        return original(*args, **kwargs)

    monkeypatch.setattr(module, where, interrupted)
    with pytest.raises(Interruption):
        case.run("stopped")
    monkeypatch.undo()
    model, result = case.run("stopped", seed=1, resume=True)
    assert_same(learned(model), learned(expected_model))
    assert_same_result(result, expected)


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """kill -9 in the second epoch, in a process of its own."""
    child = (
        "import os, signal, sys, pathlib, torch, training_cases as t; torch.set_num_threads(1); "
        "case = t.Case('everything', pathlib.Path(sys.argv[1])); "
        "case.run('killed', progress=t.interrupt_after(5, lambda: os.kill(os.getpid(), signal.SIGKILL)))"
    )
    done = subprocess.run([sys.executable, "-c", child, str(tmp_path)], env=child_environment(), timeout=120)
    assert done.returncode == -signal.SIGKILL
    case = Case("everything", tmp_path)
    expected_model, expected = case.run("straight")
    model, result = case.run("killed", seed=1, resume=True)
    assert_same(learned(model), learned(expected_model))
    assert_same_result(result, expected)


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    case = Case("moving_average", tmp_path)
    expected_model, expected = case.run("run")
    model, result = case.run("run", seed=1, resume=True)
    assert_same(learned(model), learned(expected_model))
    assert result == expected


def test_resume_without_anything_to_resume_starts(tmp_path: Path) -> None:
    case = Case("plain", tmp_path)
    expected_model, expected = case.run("straight")
    model, result = case.run("new", resume=True)
    assert_same(learned(model), learned(expected_model))
    # A run that was stopped before its first state had been written starts as well.
    case.config = replace(case.config, checkpoint_minutes=1e9)
    with pytest.raises(Interruption):
        case.run("stopped", progress=interrupt_after(2))
    model, _ = case.run("stopped", resume=True)
    assert_same(learned(model), learned(expected_model))


def test_resume_may_change_what_does_not_change_the_result(tmp_path: Path) -> None:
    case = Case("augmentation", tmp_path)
    expected_model, _ = case.run("straight")
    with pytest.raises(Interruption):
        case.run("stopped", progress=interrupt_after(5))
    case.config = replace(case.config, num_workers=1, checkpoint_minutes=1e9)
    model, _ = case.run("stopped", seed=1, resume=True)
    assert_same(learned(model), learned(expected_model))


def test_events_of_a_resumed_run_are_those_of_one(tmp_path: Path) -> None:
    case = Case("plain", tmp_path)
    case.config = replace(case.config, epochs=7)
    with pytest.raises(Interruption):
        case.run("run", progress=interrupt_after(11))
    _, result = case.run("run", resume=True)
    assert [step for step, _ in scalars(result.output, "val/accuracy")] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in scalars(result.output, "train/batch_loss")] == [10, 20]


def test_events_survive_resuming_where_an_epoch_is_one_step(tmp_path: Path) -> None:
    config = replace(CONFIG, batch_size=32)
    data, val = squares(IMAGES), squares(3, seed=1)
    with pytest.raises(Interruption):
        train(tiny_model(), data, val, output=tmp_path, config=config, progress=interrupt_after(3))
    train(tiny_model(), data, val, output=tmp_path, config=config, resume=True)
    assert [step for step, _ in scalars(tmp_path, "val/accuracy")] == [1, 2, 3]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was stopped in its second epoch."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interruption):
        train(tiny_model(), squares(IMAGES), output=output, config=CONFIG, progress=interrupt_after(5))
    return output


@pytest.mark.parametrize(
    "field, value",
    [
        ("epochs", 4),
        ("warmup_epochs", 0),
        ("batch_size", 7),
        ("learning_rate", 0.02),
        ("lr_scale", "none"),
        ("min_learning_rate", 0.0),
        ("weight_decay", 0.0),
        ("head_weight_decay", 0.0),
        ("label_smoothing", 0.1),
        ("mixup", 0.1),
        ("ema_decay", 0.5),
        ("dtype", "bfloat16"),
        ("seed", 1),
    ],
)
def test_resume_with_another_configuration_is_refused(stopped: Path, field: str, value: Any) -> None:
    before = (stopped / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match=rf"\b{field}={getattr(CONFIG, field)!r} .*\b{field}={value!r}"):
        train(
            tiny_model(),
            squares(IMAGES),
            output=stopped,
            config=replace(CONFIG, **{field: value}),
            resume=True,
        )
    assert (stopped / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    "what, model_kwargs, images",
    [
        ("prompts", {"deep": False}, IMAGES),
        ("classes", {"num_classes": 4}, IMAGES),
        ("train_prompts", {"train_prompts": False}, IMAGES),
        ("prompt_dropout", {"prompt_dropout": 0.5}, IMAGES),
        ("pool", {"pool": "token"}, IMAGES),
        ("backbone", {"backbone": 1}, IMAGES),
        ("images", {}, IMAGES + 1),
    ],
)
def test_resume_of_another_model_or_data_is_refused(
    stopped: Path, what: str, model_kwargs: dict[str, Any], images: int
) -> None:
    if "backbone" in model_kwargs:
        model_kwargs = {"backbone": tiny_backbone(seed=1)}
    with pytest.raises(InputError, match=rf"\b{what}="):
        train(tiny_model(**model_kwargs), squares(images), output=stopped, config=CONFIG, resume=True)


def test_resume_with_weights_of_another_precision_is_refused(stopped: Path) -> None:
    model = tiny_model()
    model.backbone.spt_fast_source = {**source_of(model.backbone), "weight_dtype": "int8"}
    with pytest.raises(InputError, match=r"\bweight_dtype=None .*\bweight_dtype='int8'"):
        train(model, squares(IMAGES), output=stopped, config=CONFIG, resume=True)


def test_resume_from_a_damaged_state_is_refused(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    state = tmp_path / "run" / "checkpoint.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="checkpoint.pt is not the state of a training run"):
        train(tiny_model(), squares(IMAGES), output=tmp_path / "run", config=CONFIG, resume=True)


def test_an_existing_run_is_refused(stopped: Path) -> None:
    files = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="already holds a run"):
        train(tiny_model(), squares(IMAGES), output=stopped, config=CONFIG)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == files


def test_overwrite_starts_clean(tmp_path: Path) -> None:
    val = squares(6, seed=1)
    train(tiny_model(), squares(IMAGES), val, output=tmp_path, config=replace(CONFIG, epochs=4))
    config = replace(CONFIG, epochs=2, seed=8)
    # Stopped at once: nothing of the old run is left to be mistaken for the new one's.
    with pytest.raises(Interruption):
        train(
            tiny_model(),
            squares(IMAGES),
            output=tmp_path,
            config=config,
            overwrite=True,
            progress=interrupt_after(1),
        )
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "config.json", "tensorboard"]
    model = tiny_model()
    result = train(model, squares(IMAGES), output=tmp_path, config=config, overwrite=True)
    assert not (tmp_path / "best.safetensors").exists()
    assert [row["epoch"] for row in read_csv(tmp_path / "metrics.csv")] == ["1", "2"]
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2]
    fresh = tiny_model()
    expected = train(fresh, squares(IMAGES), output=tmp_path / "fresh", config=config)
    assert_same(learned(model), learned(fresh))
    assert without_seconds(result.metrics) == without_seconds(expected.metrics)
