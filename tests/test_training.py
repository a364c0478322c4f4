"""Training on a tiny random backbone: that it learns, what it writes, and what it refuses."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CLASSES, learned, squares, tiny_backbone, tiny_model
from training_cases import CONFIG, IMAGES, LONGER, STEPS, assert_same, read_csv, scalars, without_seconds

from spt_fast import Adapter, PromptedViT, TrainingConfig, TrainingResult, evaluate, load_adapter, train
from spt_fast.data import make_loader
from spt_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


# What one run learns, writes and leaves alone


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[PromptedViT, TrainingResult, dict[str, Any]]:
    """A run long enough to learn; the model, the result, and copies from before."""
    backbone = tiny_backbone()
    model = tiny_model(backbone=backbone)
    before = {
        "backbone": {name: value.clone() for name, value in backbone.state_dict().items()},
        "learned": learned(model),
        "object": backbone,
    }
    result = train(
        model,
        squares(36),
        squares(12, seed=1),
        output=tmp_path_factory.mktemp("runs") / "run",
        config=LONGER,
        metadata={"start": {"method": "kmeans"}},
    )
    return model, result, before


def test_learns(finished: Any) -> None:
    model, result, _ = finished
    losses = [row["train_loss"] for row in result.metrics]
    assert losses[-1] < losses[0] / 3
    assert result.best_accuracy >= 0.9 and result.metrics[-1]["val_accuracy"] >= 0.9
    assert evaluate(model, squares(30, seed=2)).accuracy >= 0.9


def test_metrics_are_what_evaluation_finds(finished: Any) -> None:
    model, result, _ = finished
    judged = evaluate(model, squares(12, seed=1))
    assert judged.loss == pytest.approx(result.metrics[-1]["val_loss"], rel=1e-5)
    assert judged.accuracy == result.metrics[-1]["val_accuracy"]
    assert [row["epoch"] for row in result.metrics] == [1, 2, 3, 4, 5]
    assert result.metrics[0]["learning_rate"] == pytest.approx(0.01)
    assert result.metrics[-1]["learning_rate"] == 1e-8
    best = max(row["val_accuracy"] for row in result.metrics)
    assert result.best_accuracy == best
    assert result.best_epoch == next(r["epoch"] for r in result.metrics if r["val_accuracy"] == best)
    seconds = [row["seconds"] for row in result.metrics]
    assert seconds == sorted(seconds) and result.train_seconds == seconds[-1] > 0


def test_evaluation_leaves_the_mode_and_counts_every_image(finished: Any, tmp_path: Path) -> None:
    model, _, _ = finished
    data = squares(7, seed=4, unreadable={2: tmp_path / "bad.jpg"})
    whole = evaluate(model.train(), data)
    assert model.training and not model.backbone.training
    assert not evaluate(model.eval(), data).loss > whole.loss * 1.0001 and not model.training
    assert (whole.images, whole.skipped) == (6, 1)
    images, labels = next(iter(make_loader(data, batch_size=7)))
    with torch.no_grad():
        logits = model(images)
    assert whole.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert whole.accuracy == pytest.approx((logits.argmax(dim=1) == labels).double().mean().item())
    assert evaluate(model, data, batch_size=2).loss == pytest.approx(whole.loss, rel=1e-5)


def test_writes_adapters(finished: Any) -> None:
    model, result, before = finished
    images = torch.randn(3, 3, 16, 16)
    last = load_adapter(result.output / "last.safetensors", before["object"])
    assert last.classes == CLASSES
    assert_same(learned(last), learned(model))
    assert torch.equal(last(images), model.eval()(images))
    best = load_adapter(result.output / "best.safetensors", before["object"])
    assert evaluate(best, squares(12, seed=1)).accuracy == result.best_accuracy
    record = Adapter.load(result.output / "last.safetensors").config
    assert record["start"] == {"method": "kmeans"} and record["training"]["epochs"] == 5


def test_writes_metrics_summary_and_config(finished: Any) -> None:
    model, result, _ = finished
    rows = read_csv(result.output / "metrics.csv")
    columns = [
        "epoch",
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
        "learning_rate",
        "seconds",
    ]
    assert list(rows[0]) == columns == list(result.metrics[0])
    assert [{name: float(value) for name, value in row.items()} for row in rows] == result.metrics
    summary = json.loads((result.output / "summary.json").read_text())
    assert summary["best_accuracy"] == result.best_accuracy and summary["best_epoch"] == result.best_epoch
    assert summary["final_accuracy"] == result.metrics[-1]["val_accuracy"]
    assert summary["trainable_parameters"] == 2 * 3 * 32 + 32 * 3 + 3
    config = json.loads((result.output / "config.json").read_text())
    assert TrainingConfig(**config["training"]) == LONGER
    assert config["start"] == {"method": "kmeans"}


def test_writes_tensorboard_events(finished: Any) -> None:
    _, result, _ = finished
    for name in ("val_accuracy", "train_loss"):
        logged = scalars(result.output, name.replace("_", "/"))
        assert [step for step, _ in logged] == [1, 2, 3, 4, 5]
        assert [value for _, value in logged] == pytest.approx([r[name] for r in result.metrics], rel=1e-6)
    assert [step for step, _ in scalars(result.output, "train/batch_loss")] == [10, 20]


def test_leaves_no_temporary_files(finished: Any) -> None:
    _, result, _ = finished
    assert sorted(os.listdir(result.output)) == [
        "best.safetensors",
        "checkpoint.pt",
        "config.json",
        "last.safetensors",
        "metrics.csv",
        "summary.json",
        "tensorboard",
    ]


def test_changes_prompts_and_head_alone(finished: Any) -> None:
    model, _, before = finished
    assert model.backbone is before["object"]
    assert_same(dict(model.backbone.state_dict()), before["backbone"])
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    after = learned(model)
    for name, value in before["learned"].items():
        assert (after[name] != value).all(), name


def test_frozen_prompts_stay(tmp_path: Path) -> None:
    model = tiny_model(train_prompts=False)
    before = learned(model)
    train(model, squares(IMAGES), output=tmp_path, config=CONFIG)
    assert torch.equal(model.prompts, before["prompts"])
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_without_validation_data(tmp_path: Path) -> None:
    result = train(tiny_model(), squares(IMAGES), output=tmp_path, config=replace(CONFIG, epochs=1))
    assert result.best_accuracy is None and result.best_epoch is None
    assert (
        result.metrics[0]["val_accuracy"] is None and read_csv(tmp_path / "metrics.csv")[0]["val_loss"] == ""
    )
    assert (tmp_path / "last.safetensors").exists() and not (tmp_path / "best.safetensors").exists()


def test_val_interval_always_includes_the_last_epoch(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=5, val_interval=3)
    result = train(tiny_model(), squares(8), squares(3, seed=1), output=tmp_path, config=config)
    assert [row["val_loss"] is None for row in result.metrics] == [True, True, False, True, False]


def test_first_epoch_is_a_hand_written_loop(tmp_path: Path) -> None:
    config = replace(
        CONFIG, epochs=1, warmup_epochs=0, lr_scale="none", label_smoothing=0.1, weight_decay=0.3
    )
    model, data = tiny_model(), squares(IMAGES)
    result = train(model, data, output=tmp_path, config=config)
    by_hand = tiny_model()
    optimizer = torch.optim.AdamW(
        [
            {"params": [by_hand.prompts], "weight_decay": 0.3},
            {"params": list(by_hand.head.parameters()), "weight_decay": 0.02},
        ]
    )
    total = 0.0
    for step, (images, labels) in enumerate(make_loader(data, batch_size=8, shuffle=True, seed=3), start=1):
        for group in optimizer.param_groups:
            cosine = (1 + torch.cos(torch.tensor(torch.pi * step / STEPS, dtype=torch.float64)).item()) / 2
            group["lr"] = 1e-8 + (0.01 - 1e-8) * cosine
        loss = F.cross_entropy(by_hand(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
    for name, value in learned(by_hand).items():
        torch.testing.assert_close(learned(model)[name], value, rtol=1e-4, atol=1e-6)
    assert result.metrics[0]["train_loss"] == pytest.approx(total / IMAGES, rel=1e-5)


def test_moving_average_is_what_is_judged_saved_and_left_in_the_model(tmp_path: Path) -> None:
    """With a decay near 1 hardly anything moves, however much is learned."""
    model = tiny_model()
    before = learned(model)
    config = replace(CONFIG, ema_decay=1 - 1e-9)
    result = train(model, squares(IMAGES), squares(6, seed=1), output=tmp_path, config=config)
    for name, value in before.items():
        torch.testing.assert_close(learned(model)[name], value, rtol=0.0, atol=1e-6)
    assert len({row["val_loss"] for row in without_seconds(result.metrics)}) == 1
    assert result.metrics[-1]["train_loss"] < result.metrics[0]["train_loss"]
    adapter = Adapter.load(tmp_path / "last.safetensors")
    assert torch.equal(adapter.prompts, model.prompts)


def test_same_seed_same_result_and_another_seed_another(tmp_path: Path) -> None:
    models = [tiny_model(prompt_dropout=0.2) for _ in range(3)]
    for number, (model, seed) in enumerate(zip(models, (3, 3, 4), strict=True)):
        torch.manual_seed(number)  # the caller's own random state plays no part
        train(model, squares(IMAGES), output=tmp_path / str(number), config=replace(CONFIG, seed=seed))
    assert_same(learned(models[0]), learned(models[1]))
    assert not torch.equal(models[0].prompts, models[2].prompts)


# Input that is not as it should be


@pytest.mark.parametrize(
    "field, value",
    [
        ("epochs", 0),
        ("warmup_epochs", -1),
        ("warmup_epochs", 101),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("lr_scale", "mean"),
        ("min_learning_rate", -1e-9),
        ("weight_decay", -0.1),
        ("weight_decay", float("nan")),
        ("head_weight_decay", -0.1),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("mixup", -1.0),
        ("mixup", float("nan")),
        ("ema_decay", 0.0),
        ("ema_decay", 1.0),
        ("dtype", "float16"),
        ("seed", -1),
        ("num_workers", -1),
        ("val_interval", 0),
        ("checkpoint_minutes", -1.0),
        ("checkpoint_minutes", float("nan")),
    ],
)
def test_bad_configuration_is_named(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{field} must be .+, got {value!r}$"):
        TrainingConfig(**{field: value})


def test_the_defaults_are_the_papers_but_for_the_scale() -> None:
    config = asdict(TrainingConfig())
    assert (config["epochs"], config["warmup_epochs"], config["batch_size"]) == (100, 10, 32)
    assert (config["min_learning_rate"], config["lr_scale"]) == (1e-8, "rms")
    assert (config["label_smoothing"], config["mixup"], config["ema_decay"]) == (0.0, 0.0, None)


def test_diverging_loss_is_an_error_that_names_the_learning_rate(tmp_path: Path) -> None:
    config = replace(CONFIG, learning_rate=1e30, warmup_epochs=0)
    with pytest.raises(InputError, match=r"no longer finite in epoch \d; lower learning_rate=1e\+30"):
        train(tiny_model(), squares(IMAGES), output=tmp_path, config=config)


def test_more_classes_than_outputs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train_data has 3 classes and the head 2 outputs"):
        train(tiny_model(num_classes=2), squares(IMAGES), output=tmp_path / "run", config=CONFIG)
    with pytest.raises(InputError, match="data has 3 classes and the model 2"):
        evaluate(tiny_model(num_classes=2), squares(3))
    assert not (tmp_path / "run").exists()


def test_more_outputs_than_classes_are_numbered(tmp_path: Path) -> None:
    train(tiny_model(num_classes=5), squares(8), output=tmp_path, config=replace(CONFIG, epochs=1))
    assert Adapter.load(tmp_path / "last.safetensors").config["classes"] == ["0", "1", "2", "3", "4"]


def test_unreadable_images_are_left_out_and_counted(tmp_path: Path) -> None:
    bad = {index: tmp_path / f"{index}.jpg" for index in (0, 7, 20)}
    model = tiny_model()
    result = train(model, squares(IMAGES, unreadable=bad), output=tmp_path / "run", config=CONFIG)
    assert result.skipped == 3
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped"] == 3
    assert all(torch.isfinite(value).all() for value in learned(model).values())


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_a_batch_with_nothing_readable_takes_no_step(mixup: float, tmp_path: Path) -> None:
    """One readable image, batches of one: as a run over that image alone with the same number of steps."""
    bad = {index: tmp_path / f"{index}.jpg" for index in range(5) if index != 3}
    data = squares(5, unreadable=bad)
    config = replace(CONFIG, epochs=1, warmup_epochs=0, batch_size=1, mixup=mixup)
    config = replace(config, min_learning_rate=config.learning_rate)  # the same rate in every step
    model, alone = tiny_model(), tiny_model()
    result = train(model, data, output=tmp_path / "run", config=config)
    train(alone, squares(5).subset([3]), output=tmp_path / "alone", config=config)
    assert result.skipped == 4
    for name, value in learned(alone).items():  # an image mixed with itself is itself, but for rounding
        torch.testing.assert_close(learned(model)[name], value, rtol=1e-5, atol=1e-6)


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    data = squares(3, unreadable={index: tmp_path / f"{index}.jpg" for index in range(3)})
    with pytest.raises(InputError, match="no training image could be read"):
        train(tiny_model(), data, output=tmp_path / "run", config=CONFIG)
    with pytest.raises(InputError, match="no image of squares could be read"):
        evaluate(tiny_model(), data)
    with pytest.raises(InputError, match="no image of squares could be read"):
        train(tiny_model(), squares(IMAGES), data, output=tmp_path / "validated", config=CONFIG)


def test_strict_data_raises(tmp_path: Path) -> None:
    data = squares(IMAGES, unreadable={7: tmp_path / "bad.jpg"}, strict=True)
    with pytest.raises(InputError, match="bad.jpg cannot be read as an image"):
        train(tiny_model(), data, output=tmp_path / "run", config=CONFIG)


# Number formats and compilation


def test_bfloat16_is_for_the_backbone_alone(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = tiny_model(backbone=backbone)
    config = replace(LONGER, dtype="bfloat16")
    result = train(model, squares(36), squares(12, seed=1), output=tmp_path, config=config)
    assert {parameter.dtype for parameter in model.backbone.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in learned(model).values()} == {torch.float32}
    assert_same(dict(backbone.state_dict()), before)
    assert result.best_accuracy is not None and result.best_accuracy >= 0.9
    # Steps smaller than a bfloat16 can hold would be lost if prompts were kept in it.
    assert not torch.equal(model.prompts, model.prompts.bfloat16().float())
    # What it learned belongs to the caller's backbone as well.
    assert (
        evaluate(load_adapter(tmp_path / "last.safetensors", backbone), squares(12, seed=1)).accuracy >= 0.9
    )


def test_compiled_training_is_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile makes of the step, without compiling it; tests/test_training_step.py compiles it as well."""
    compiled = []

    def compile_step(function: Any, **options: Any) -> Any:
        compiled.append(options)
        return torch_compile(function, backend="aot_eager", **options)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_step)
    models = [tiny_model(backbone=tiny_backbone(depth=1), deep=False) for _ in range(2)]
    for model, compile in zip(models, (False, True), strict=True):
        config = replace(CONFIG, epochs=1, batch_size=4, compile=compile)
        result = train(model, squares(8), squares(4), output=tmp_path / str(compile), config=config)
        assert (result.compile_seconds is not None) == compile
    assert len(compiled) == 1
    for name, value in learned(models[0]).items():
        torch.testing.assert_close(learned(models[1])[name], value, rtol=1e-3, atol=1e-4)
    saved = load_adapter(tmp_path / "True" / "last.safetensors", models[0].backbone)
    assert_same(learned(saved), learned(models[1]))
