"""Methods of tuning on a GPU: what they compute, and that they train there, plainly and as one compiled step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from judged_vits import NUM_CLASSES, make_images, make_vit, random_loss, relative_error
from naive_prompts import make_prompts, randomise
from tiny import squares, tiny_backbone

from spt_fast import TrainingConfig, train
from spt_fast.methods import METHODS, build_model
from spt_fast.sampling import uniform
from spt_fast.tuned_vit import TunedViT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch embedding is a convolution, which cuDNN would carry out in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def logits_and_gradients(model: TunedViT) -> dict[str, torch.Tensor]:
    images = make_images(model.backbone).to(model.device, next(model.backbone.parameters()).dtype)
    logits = model.eval()(images).cpu()
    random_loss(logits).backward()
    learning = {name: value for name, value in model.task_state().items() if value.requires_grad}
    assert all(value.grad is not None for value in learning.values())
    return {"logits": logits.detach(), **{name: value.grad.cpu() for name, value in learning.items()}}  # type: ignore[union-attr]


@pytest.mark.parametrize("vit", ["registers", "qk_norm"])
@pytest.mark.parametrize("method", ["gate_vpt", "e2vpt", "vapt"])
def test_prompt_methods_compute_what_they_do_on_the_cpu_in_float64(method: str, vit: str) -> None:
    outcomes = []
    for device in ("cpu", "cuda"):
        backbone = make_vit(vit)
        torch.manual_seed(0)
        prompts = make_prompts(backbone, 1 if METHODS[method].depth == "shallow" else len(backbone.blocks))
        model = build_model(method, backbone, num_classes=NUM_CLASSES, prompts=prompts)
        randomise(model, 0.1)
        outcomes.append(logits_and_gradients(model.double() if device == "cpu" else model.to(device)))
    expected, actual = outcomes
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-3, name


def trained(method: str, folder: Path, *, compile: bool) -> Any:
    backbone = tiny_backbone().cuda()
    torch.manual_seed(0)
    options: dict[str, Any] = {"pool": "avg"}
    depth = METHODS[method].depth
    if METHODS[method].init is not None:
        rows = len(backbone.blocks) if depth == "deep" else 1
        options["prompts"] = uniform(backbone, rows, 5, torch.default_generator)
    elif depth is not None:
        options["num_prompts"] = 5
    model = build_model(method, backbone, num_classes=3, **options)
    config = TrainingConfig(
        epochs=12, warmup_epochs=1, batch_size=8, learning_rate=METHODS[method].learning_rate, compile=compile
    )
    return train(model, squares(60), squares(30, seed=1), output=folder, config=config)


def assert_learned(result: Any) -> None:
    """The loss falls, and below that of a guess among three classes, 1.10."""
    first, *_, last = (row["train_loss"] for row in result.metrics)
    assert last < min(0.9, first)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str, tmp_path: Path) -> None:
    assert_learned(trained(method, tmp_path, compile=False))


@pytest.mark.parametrize("method", ["gate_vpt", "e2vpt", "vapt", "lora"])
@pytest.mark.filterwarnings("error:the step could not be recorded:RuntimeWarning")
def test_methods_train_as_one_compiled_step(method: str, tmp_path: Path) -> None:
    result = trained(method, tmp_path, compile=True)
    assert result.compile_seconds is not None
    assert_learned(result)
