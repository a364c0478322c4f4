"""Training in two processes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import two_processes
from forked_processes import run_together
from tiny import learned, squares, tiny_model
from training_cases import assert_same, without_seconds

from spt_fast import Adapter, evaluate, train
from spt_fast.data import make_loader
from spt_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


# Several processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """What two_processes.py left: the results of both processes, and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    run_together(two_processes.main, folder, 2)
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second, folder


def test_processes_end_with_the_same_weights(ranks: Any) -> None:
    first, second, folder = ranks
    assert first["sees"] == (0, 2) and second["sees"] == (1, 2)
    assert first["left_group"] and second["left_group"]
    # They started from different ones: those of rank 0 count, for the moving average too.
    for run in ("straight", "after_step", "resumed", "half"):
        assert_same(second[run], first[run])
    assert without_seconds(first["straight_metrics"]) == without_seconds(second["straight_metrics"])
    assert_same(first["again"], first["straight"])
    assert torch.equal(
        Adapter.load(folder / "straight0" / "last.safetensors").prompts, first["straight"]["prompts"]
    )


def test_rank_0_alone_writes(ranks: Any) -> None:
    folder = ranks[2]
    assert (folder / "straight0" / "summary.json").exists()
    assert not (folder / "straight1").exists()


def test_gradients_are_averaged_over_processes(ranks: Any) -> None:
    first, second, _ = ranks
    model = tiny_model(seed=3)
    images, labels = next(iter(make_loader(squares(8), batch_size=8)))
    F.cross_entropy(model(images), labels).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for rank in (first, second):
                torch.testing.assert_close(rank["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_evaluation_of_two_processes_counts_every_image_once(ranks: Any) -> None:
    for rank in ranks[:2]:
        for count, judged in zip((7, 1), rank["evaluations"], strict=True):
            alone = evaluate(tiny_model(seed=9), squares(count, seed=2))
            assert judged["images"] == alone.images == count
            assert judged["accuracy"] == pytest.approx(alone.accuracy)
            assert judged["loss"] == pytest.approx(alone.loss, rel=1e-5)


def test_training_metrics_count_the_images_of_all_processes(ranks: Any) -> None:
    losses = [row["train_loss"] for row in ranks[0]["straight_metrics"]]
    assert losses[1] < losses[0]
    for row in ranks[0]["straight_metrics"]:
        hits = row["train_accuracy"] * two_processes.IMAGES
        assert hits == pytest.approx(round(hits))


def test_two_processes_are_one_with_batches_twice_as_large(ranks: Any, tmp_path: Path) -> None:
    """21 steps, three of them on batches that are not full, with random crops: the same images in the same order."""
    model = tiny_model(seed=0)
    config = replace(two_processes.WIDE, batch_size=2 * two_processes.WIDE.batch_size)
    data = squares(two_processes.WIDE_IMAGES, recipe="fgvc")
    alone = train(model, data, squares(7, seed=1), output=tmp_path, config=config)
    before = learned(tiny_model(seed=0))
    for rank in ranks[:2]:
        for name, value in learned(model).items():
            assert (value - before[name]).abs().max() > 0.01  # far more than they may differ
            torch.testing.assert_close(rank["wide"][name], value, rtol=1e-4, atol=1e-5)
        for ours, expected in zip(rank["wide_metrics"], alone.metrics, strict=True):
            assert ours["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
            assert ours["train_accuracy"] == expected["train_accuracy"]


def test_two_processes_interrupted_and_resumed(ranks: Any) -> None:
    for rank in ranks[:2]:
        assert rank["interrupted"]
        assert_same(rank["resumed"], rank["straight"])
        assert without_seconds(rank["resumed_metrics"]) == without_seconds(rank["straight_metrics"])


def test_processes_stay_together_when_one_has_nothing_readable(ranks: Any) -> None:
    for rank in ranks[:2]:
        assert rank["half_skipped"] == 6
        assert all(torch.isfinite(value).all() for value in rank["half"].values())


def test_resume_with_another_number_of_processes_is_refused(ranks: Any, tmp_path: Path) -> None:
    shutil.copytree(ranks[2] / "straight0", tmp_path / "run")
    with pytest.raises(InputError, match="processes=2 .* processes=1"):
        train(
            tiny_model(),
            squares(two_processes.IMAGES),
            output=tmp_path / "run",
            config=two_processes.CONFIG,
            resume=True,
        )
