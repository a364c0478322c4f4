"""Training on a GPU: its steps are replayed as one CUDA graph, wait for nothing, and end where plain calls end.

Runs are compared by how far they end apart, as a share of how far training moved the weights. Sums that are added up in
another order differ by rounding, which Adam makes larger where a gradient is nearly zero; one step too few, too many or
with another rate is much more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_cases
from tiny import learned, squares, tiny_backbone, tiny_model
from training_cases import IMAGES, STEPS, Interruption

import spt_fast.feeding
import spt_fast.training_step
from spt_fast import PromptedViT, TrainingConfig, TrainingResult, train
from spt_fast.data import ImageDataset, cache_images
from spt_fast.data.device_batches import DeviceImages
from spt_fast.optimizer import PromptAdamW
from spt_fast.replayed_call import ReplayedCall
from spt_fast.training_step import TrainingStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("error:the step could not be recorded:RuntimeWarning"),
]
DEVICE = torch.device("cuda")
# Three steps an epoch, the last of six images. The third call is the last that is not replayed.
CONFIG = replace(training_cases.CONFIG, epochs=4, checkpoint_minutes=1e9)
CLOSE = 1e-2


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch embedding is a convolution, which cuDNN would carry out in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[ReplayedCall]:
    """All that training makes, in order."""
    made: list[ReplayedCall] = []

    class Watched(ReplayedCall):
        def __init__(self, function: Callable[..., None], device: torch.device) -> None:
            super().__init__(function, device)
            made.append(self)

    monkeypatch.setattr(spt_fast.training_step, "ReplayedCall", Watched)
    return made


def gpu_model(seed: int = 0, **kwargs: Any) -> PromptedViT:
    return tiny_model(seed, backbone=tiny_backbone().to(DEVICE), **kwargs)


def run(
    output: Path, data: ImageDataset | None = None, *, seed: int = 0, config: TrainingConfig, **kwargs: Any
) -> tuple[PromptedViT, TrainingResult]:
    model = gpu_model(seed)
    images = squares(IMAGES) if data is None else data
    return model, train(model, images, squares(9, seed=1), output=output, config=config, **kwargs)


def at_steps(actions: dict[int, Callable[[], None]]) -> Callable[[str, int, int | None], None]:
    """A progress callback that does something after some steps, counted from 1."""
    steps = 0

    def progress(stage: str, done: int, total: int | None) -> None:
        nonlocal steps
        if stage.startswith("epoch"):  # not compiling, for example
            steps += 1
            actions.get(steps, lambda: None)()

    return progress


def interrupt() -> None:
    raise Interruption


def apart(ours: PromptedViT, expected: PromptedViT) -> float:
    """The largest distance of any of the learned tensors, as a share of the way from the start to ``expected``."""
    start, there = learned(gpu_model()), learned(expected)
    shares = [
        ((value - there[name]).norm() / (there[name] - start[name]).norm()).item()
        for name, value in learned(ours).items()
    ]
    return max(shares)


def check_metrics(ours: TrainingResult, expected: TrainingResult) -> None:
    assert len(ours.metrics) == len(expected.metrics)
    for own, theirs in zip(ours.metrics, expected.metrics, strict=True):
        assert own["learning_rate"] == theirs["learning_rate"]
        for name in ("train_loss", "val_loss"):
            assert own[name] == pytest.approx(theirs[name], rel=1e-3), (own["epoch"], name)


def check_replayed(call: ReplayedCall, steps: int) -> None:
    assert call._graph is not None and not call._refused
    assert call._calls == steps > ReplayedCall.WARM_UP


@pytest.mark.parametrize(
    "variant", [{}, {"ema_decay": 0.8}, {"mixup": 0.8, "label_smoothing": 0.1}, {"compile": True}]
)
def test_a_replayed_run_ends_where_a_plain_one_ends(
    variant: dict[str, Any], calls: list[ReplayedCall], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = replace(CONFIG, **variant)
    replayed, result = run(tmp_path / "replayed", config=config)
    (call,) = calls
    check_replayed(call, CONFIG.epochs * STEPS)
    assert (result.compile_seconds is None) == ("compile" not in variant)

    def plainly(function: Callable[..., None], device: torch.device) -> Callable[..., None]:
        return function

    monkeypatch.setattr(spt_fast.training_step, "ReplayedCall", plainly)
    plain, expected = run(tmp_path / "plain", config=replace(config, compile=False))
    assert len(calls) == 1
    check_metrics(result, expected)
    assert apart(replayed, plain) < CLOSE


@pytest.mark.parametrize("interrupted_after", [2, 5], ids=["before recording", "after recording"])
def test_an_interrupted_run_ends_where_one_never_interrupted_ends(
    interrupted_after: int, calls: list[ReplayedCall], tmp_path: Path
) -> None:
    config = replace(CONFIG, ema_decay=0.8, checkpoint_minutes=0.0)
    whole, expected = run(tmp_path / "whole", config=config)
    with pytest.raises(Interruption):
        run(tmp_path / "parts", config=config, progress=at_steps({interrupted_after: interrupt}))
    # What another start has learned until here is replaced by what was saved.
    resumed, result = run(tmp_path / "parts", seed=1, config=config, resume=True)
    first, before, after = calls
    assert before._calls == interrupted_after
    check_replayed(first, CONFIG.epochs * STEPS)
    check_replayed(after, CONFIG.epochs * STEPS - interrupted_after)
    check_metrics(result, expected)
    assert apart(resumed, whole) < CLOSE


@pytest.mark.parametrize("seeded", [True, False])
def test_dropout_is_drawn_anew_in_every_replay(seeded: bool, calls: list[ReplayedCall]) -> None:
    """With weights that stay, on one batch, losses differ by what is dropped alone."""
    model = gpu_model(prompt_dropout=0.5).train()
    rates = {"lr": 0.0, "weight_decay": 0.0, "head_weight_decay": 0.0}
    optimizer = PromptAdamW(model.prompts, model.head, **rates, fused=True)
    sums = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    step = TrainingStep(model, optimizer, sums, batch_size=6)
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    labels = torch.arange(6, device=DEVICE) % 3
    before = learned(model)

    def loss(seed: int) -> float:
        if seeded:
            torch.manual_seed(seed)
        step(images, labels)
        return step.totals[0].item()

    torch.manual_seed(0)
    losses = [loss(seed) for seed in range(12)]
    check_replayed(calls[0], 12)
    replayed = losses[ReplayedCall.WARM_UP :]
    assert len({f"{each:.5f}" for each in replayed}) == len(replayed), losses
    if seeded:
        # A resumed run finds the masks that it would have seen.
        again = [loss(seed) for seed in range(ReplayedCall.WARM_UP, 12)]
        assert again == pytest.approx(replayed, rel=1e-5)
    for name, value in learned(model).items():
        assert torch.equal(value, before[name]), name


def waiting_is_an_error() -> None:
    """From now on."""
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=DEVICE).item()


def waiting_is_allowed() -> None:
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cached", [True, False], ids=["image cache", "loader"])
def test_no_step_waits_for_the_device(cached: bool, calls: list[ReplayedCall], tmp_path: Path) -> None:
    """Images, mixup, step, average and log of steps 6 to 10, the last of which is the one with fewer images."""
    data: ImageDataset = squares(78, recipe="fgvc")
    if cached:
        data = cache_images(data, tmp_path / "cache")
    config = replace(CONFIG, epochs=1, warmup_epochs=0, ema_decay=0.8, mixup=0.8, num_workers=0)
    reached: list[int] = []
    progress = at_steps({5: waiting_is_an_error, 10: waiting_is_allowed, 9: lambda: reached.append(9)})
    try:
        run(tmp_path / "run", data, config=config, progress=progress)
    finally:
        waiting_is_allowed()
    assert reached
    check_replayed(calls[0], 10)


def test_images_from_the_device_train_as_images_from_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device: list[DeviceImages] = []

    def kept(*arguments: Any, **options: Any) -> DeviceImages:
        on_device.append(DeviceImages(*arguments, **options))
        return on_device[-1]

    monkeypatch.setattr(spt_fast.feeding, "DeviceImages", kept)
    data = squares(IMAGES, recipe="fgvc", unreadable={5: tmp_path / "no-image.jpg"})
    config = replace(CONFIG, num_workers=0)
    plain, expected = run(tmp_path / "loader", data, config=config)
    assert not on_device
    model, result = run(tmp_path / "cached", cache_images(data, tmp_path / "cache"), config=config)
    assert [images.resident for images in on_device] == [True]
    assert result.skipped == expected.skipped == 1
    check_metrics(result, expected)
    assert apart(model, plain) < CLOSE


def test_a_run_that_leaves_out_a_step_ends_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes for the same end is not so wide that one of twelve steps would go unnoticed."""
    plain, _ = run(tmp_path / "plain", config=CONFIG)
    take = TrainingStep._take
    taken: list[int] = []

    def forgetful(step: TrainingStep, *tensors: Any) -> None:
        taken.append(len(tensors))
        if len(taken) != 8:
            take(step, *tensors)

    monkeypatch.setattr(TrainingStep, "_take", forgetful)
    other, _ = run(tmp_path / "other", config=CONFIG)
    assert len(taken) == CONFIG.epochs * STEPS and apart(other, plain) > 2 * CLOSE
