"""Searches: judged by doing the same by hand, interrupted anywhere, continued with other points."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import two_sweep_processes
from command_line import TINY, check_refused, make_photos
from command_line import run as run_command
from forked_processes import finish, run_together, start
from PIL import Image
from safetensors.torch import load_file
from search_cases import PHOTOS
from sklearn.model_selection import ParameterSampler
from tiny import tiny_backbone
from training_cases import Interruption, interrupt_after, read_csv
from two_sweep_processes import CONFIG, SPACE, images_of

import spt_fast.sweep
import spt_fast.sweep_folder
from spt_fast import PromptedViT, TrainingConfig, build_prototypes, evaluate, load_adapter, train
from spt_fast.data import ImageDataset, make_loader
from spt_fast.errors import InputError
from spt_fast.sweep import SweepResult, sweep

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = (0, 3)
MODEL = {"pool": "avg", "prompt_dropout": 0.1}


def search(output: Path, **changes: Any) -> SweepResult:
    arguments: dict[str, Any] = {
        "images": images_of(),
        "space": SPACE,
        "seeds": SEEDS,
        "config": CONFIG,
        "model": MODEL,
        "prototype_batch_size": 5,
        **changes,
    }
    return sweep(arguments.pop("backbone", None) or tiny_backbone(), output=output, **arguments)


class Watched:
    """Images that count how often one of a split was decoded, and splits that were opened."""

    def __init__(self) -> None:
        self.decoded: Counter[tuple[str, bool]] = Counter()
        self.opened: Counter[tuple[str, bool]] = Counter()
        self._images = images_of()

    def __call__(self, split: str, train: bool) -> ImageDataset:
        self.opened[split, train] += 1
        images = self._images(split, train)
        transform = images.transform

        def counting(image: Image.Image) -> torch.Tensor:
            self.decoded[split, train] += 1
            return transform(image)  # type: ignore[misc]

        return images.with_transform(counting)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepResult, Watched, list[str]]:
    """An uninterrupted search, what it looked at and the stages that it reported."""
    torch.set_num_threads(1)
    watched, stages = Watched(), []
    output = tmp_path_factory.mktemp("sweeps") / "straight"
    result = search(output, images=watched, progress=lambda stage, done, total: stages.append(stage))
    return result, watched, stages


def table(output: Path) -> list[dict[str, str]]:
    return [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in read_csv(output / "results.csv")
    ]


def check_same(output: Path, expected: Path) -> None:
    """All that was found, but for the seconds."""
    assert table(output) == table(expected)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (output, expected)]
    assert summaries[0] == summaries[1]
    for adapter in summaries[0]["adapters"]:
        one, other = load_file(output / adapter), load_file(expected / adapter)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not list(output.glob("prototypes/*.partial"))


# What is found.


def by_hand(
    config: TrainingConfig, num_prompts: int, seed: int, split: str, judged_on: str, output: Path
) -> float:
    """Accuracy on ``judged_on`` after the last epoch on ``split``, without any of the search."""
    images, backbone = images_of(), tiny_backbone()
    loader = make_loader(images(split, False), batch_size=5, shuffle=True, seed=SEEDS[0])
    prototypes = build_prototypes(backbone, loader, num_prompts=num_prompts, seed=SEEDS[0])
    torch.manual_seed(seed)
    model = PromptedViT(backbone, prototypes, num_classes=3, **MODEL)
    train(model, images(split, True), output=output, config=replace(config, seed=seed))
    return evaluate(model, images(judged_on, False)).accuracy


def test_it_finds_what_one_finds_by_hand(
    straight: tuple[SweepResult, Watched, list[str]], tmp_path: Path
) -> None:
    result = straight[0]
    rows = table(result.output)
    assert [row["point"] for row in rows] == [
        f"learning_rate={rate},num_prompts={length}"
        for rate in SPACE["learning_rate"]
        for length in SPACE["num_prompts"]
    ]
    means = []
    for row in rows:
        config = replace(CONFIG, learning_rate=float(row["learning_rate"]))
        length = int(row["num_prompts"])
        expected = [
            by_hand(config, length, seed, "train", "val", tmp_path / f"{row['point']}-{seed}")
            for seed in SEEDS
        ]
        assert [float(row[f"val_accuracy_seed_{seed}"]) for seed in SEEDS] == expected
        assert float(row["val_accuracy_mean"]) == pytest.approx(np.mean(expected), rel=1e-12)
        assert float(row["val_accuracy_std"]) == pytest.approx(np.std(expected, ddof=1), rel=1e-12)
        assert (row["runs"], row["failure"]) == ("2", "")
        means.append(np.mean(expected))
    assert len(set(means)) > 1, "nothing is chosen between equals"
    chosen = rows[int(np.argmax(means))]
    assert result.point == chosen["point"]
    assert result.parameters == {
        "learning_rate": float(chosen["learning_rate"]),
        "num_prompts": int(chosen["num_prompts"]),
    }
    assert result.val_accuracy_mean == max(means)

    config = replace(CONFIG, learning_rate=result.parameters["learning_rate"])
    length = result.parameters["num_prompts"]
    tested = [by_hand(config, length, seed, "trainval", "test", tmp_path / f"best-{seed}") for seed in SEEDS]
    assert result.test_accuracies == tested
    assert result.test_accuracy_mean == pytest.approx(np.mean(tested), rel=1e-12)
    assert result.test_accuracy_std == pytest.approx(np.std(tested, ddof=1), rel=1e-12, abs=1e-12)
    summary = json.loads((result.output / "summary.json").read_text())
    assert summary == result.summary() and summary["test_accuracies"] == tested
    for adapter, accuracy in zip(result.adapters, tested, strict=True):
        model = load_adapter(result.output / adapter, tiny_backbone())
        assert evaluate(model, images_of()("test", False)).accuracy == accuracy


def test_images_are_looked_at_as_little_as_possible(
    straight: tuple[SweepResult, Watched, list[str]],
) -> None:
    """One pass over train for prototypes of all lengths, one over train + val for the best, test once a seed."""
    result, watched, _ = straight
    sizes = two_sweep_processes.SIZES
    runs = len(SEEDS) * len(result.points)
    assert watched.decoded == {
        ("train", False): sizes["train"],
        ("trainval", False): sizes["trainval"],
        ("train", True): sizes["train"] * CONFIG.epochs * runs,
        ("val", False): sizes["val"] * CONFIG.epochs * runs,
        ("trainval", True): sizes["trainval"] * CONFIG.epochs * len(SEEDS),
        ("test", False): sizes["test"] * len(SEEDS),
    }
    assert set(watched.opened.values()) == {1}
    kept = {path.name for path in (result.output / "prototypes").iterdir()}
    best = result.parameters["num_prompts"]
    assert kept == {"train-2.safetensors", "train-4.safetensors", f"trainval-{best}.safetensors"}


def pretend_to_train(
    monkeypatch: pytest.MonkeyPatch, accuracies: Callable[[TrainingConfig], float]
) -> list[TrainingConfig]:
    """Instead of training, only files: their last accuracy is as said, their best one is 1."""
    trained: list[TrainingConfig] = []

    def pretend(
        model: PromptedViT,
        data: ImageDataset,
        val: ImageDataset | None = None,
        *,
        output: Path,
        config: TrainingConfig,
        metadata: dict[str, Any],
        **_: Any,
    ) -> None:
        trained.append(config)
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.json").write_text(json.dumps({**metadata, "training": asdict(config)}))
        last = None if val is None else accuracies(config)
        summary = {"best_accuracy": 1.0, "final_accuracy": last, "train_seconds": 2.0, "skipped": 0}
        (output / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(spt_fast.sweep, "train", pretend)
    return trained


@pytest.mark.parametrize("seed", range(4))
def test_the_best_is_the_first_of_the_highest_means(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(seed)
    rates = [0.5**exponent for exponent in range(12)]
    # Eighths, so that equal means are exactly equal; the highest is there twice, from the same seeds in another order.
    drawn = {rate: generator.integers(8, size=3) / 8 for rate in rates}
    one, other = generator.choice(rates, size=2, replace=False)
    drawn[one] = np.array([1.0, 0.875, 1.0])
    drawn[other] = np.roll(drawn[one], 1)
    pretend_to_train(monkeypatch, lambda config: float(drawn[config.learning_rate][config.seed]))
    result = search(tmp_path, space={"learning_rate": rates}, seeds=(0, 1, 2), start={"method": "uniform"})
    means = [np.mean(drawn[rate]) for rate in rates]
    assert result.parameters == {"learning_rate": rates[int(np.argmax(means))]}
    assert [row["val_accuracy_mean"] for row in result.points] == means
    assert [row["seconds"] for row in result.points] == [6.0] * len(rates)


def test_points_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = pretend_to_train(monkeypatch, lambda config: 0.5)
    space = {"learning_rate": np.logspace(-4, -1, 5), "mixup": [0.0, 0.2], "weight_decay": [0.1, 0.2]}
    result = search(tmp_path, space=space, seeds=(7,), trials=6, start={"method": "uniform"})
    lists = {name: list(values) for name, values in space.items()}
    expected = list(ParameterSampler(lists, 6, random_state=7))
    assert [{name: row[name] for name in space} for row in result.points] == expected
    assert len(trained) == 7 and len({row["point"] for row in result.points}) == 6
    assert result.test_accuracy_std is None and result.points[0]["val_accuracy_std"] is None
    # As many as there are, or more: all of them.
    whole = search(tmp_path / "all", space={"mixup": [0.0, 0.2]}, trials=9, start={"method": "uniform"})
    assert [row["mixup"] for row in whole.points] == [0.0, 0.2]


@pytest.mark.parametrize("space", [{}, {"learning_rate": [0.02], "num_prompts": [2]}])
def test_one_point_is_not_validated(space: dict[str, Any], tmp_path: Path) -> None:
    watched = Watched()
    result = search(tmp_path / "run", images=watched, space=space, num_prompts=2)
    assert {split for split, _ in watched.opened} == {"trainval", "test"}
    assert not (tmp_path / "run" / "trials").exists()
    assert result.val_accuracy_mean is result.val_accuracy_std is None
    rate = space.get("learning_rate", [CONFIG.learning_rate])[0]
    expected = [
        by_hand(replace(CONFIG, learning_rate=rate), 2, seed, "trainval", "test", tmp_path / f"hand-{seed}")
        for seed in SEEDS
    ]
    assert result.test_accuracies == expected
    assert read_csv(tmp_path / "run" / "results.csv")[0]["val_accuracy_mean"] == ""


def test_points_that_diverge_have_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = {"learning_rate": [1e30, 0.05]}
    found = search(tmp_path, space=space, model={"pool": "avg"})
    failed, good = read_csv(tmp_path / "results.csv")
    assert failed["val_accuracy_mean"] == failed["val_accuracy_seed_0"] == "" and failed["runs"] == "0"
    assert "no longer finite" in failed["failure"] and not good["failure"]
    assert found.parameters == {"learning_rate": 0.05}
    # It has failed for good, and is not tried with the other seed.
    trained = pretend_to_train(monkeypatch, lambda config: 0.5)
    search(tmp_path, space=space, model={"pool": "avg"})
    assert not trained and not (tmp_path / "trials" / "learning_rate=1e+30" / "seed-3").exists()
    monkeypatch.undo()
    with pytest.raises(InputError, match="none of the 2 points .* could be trained.*no longer finite"):
        search(tmp_path / "all", space={"learning_rate": [1e30, 1e31]}, model={"pool": "avg"})


# Going on.


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 1.0])
def test_interrupted_and_called_again(
    share: float, straight: tuple[SweepResult, Watched, list[str]], tmp_path: Path
) -> None:
    expected, _, stages = straight
    with pytest.raises(Interruption):
        search(tmp_path, progress=interrupt_after(1 + round(share * (len(stages) - 1))))
    # Neither where the backbone's object nor where the images come from matters, and torch's random state does not.
    torch.manual_seed(1234)
    result = search(tmp_path)
    check_same(tmp_path, expected.output)
    assert result.summary() == expected.summary()


def test_interrupted_again_and_again(
    straight: tuple[SweepResult, Watched, list[str]], tmp_path: Path
) -> None:
    watched, attempts = Watched(), 0
    while True:
        attempts += 1
        try:
            search(tmp_path, images=watched, progress=interrupt_after(23))
            break
        except Interruption:
            assert attempts < 20
    assert attempts > 3
    check_same(tmp_path, straight[0].output)


@pytest.mark.parametrize("number", [1, 4, 10, 13])
def test_interrupted_before_a_file_is_written(
    number: int,
    straight: tuple[SweepResult, Watched, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Record, tables, scores and summary, in the order in which they are written."""
    calls: list[Path] = []
    original = spt_fast.sweep.write_text

    def interrupted(path: Path, text: str) -> None:
        calls.append(path)
        if len(calls) == number:
            raise Interruption
        original(path, text)

    for module in (spt_fast.sweep, spt_fast.sweep_folder):
        monkeypatch.setattr(module, "write_text", interrupted)
    with pytest.raises(Interruption):
        search(tmp_path)
    monkeypatch.undo()
    search(tmp_path)
    check_same(tmp_path, straight[0].output)


def test_interrupted_between_two_lengths_of_one_pass(
    straight: tuple[SweepResult, Watched, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With minibatch_kmeans a length alone is not what it is among others."""
    start = {"method": "minibatch_kmeans"}
    search(tmp_path / "straight", start=start)
    original, saved = spt_fast.sweep.Prototypes.save, []

    def interrupted(self: Any, path: Path) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise Interruption
        original(self, path)

    monkeypatch.setattr(spt_fast.sweep.Prototypes, "save", interrupted)
    with pytest.raises(Interruption):
        search(tmp_path / "stopped", start=start)
    monkeypatch.undo()
    search(tmp_path / "stopped", start=start)
    check_same(tmp_path / "stopped", tmp_path / "straight")
    name = "prototypes/train-4.safetensors"
    one, other = load_file(tmp_path / "stopped" / name), load_file(tmp_path / "straight" / name)
    assert torch.equal(one["values"], other["values"])


def search_until_killed(output: Path, steps: int) -> None:
    search(output, progress=interrupt_after(steps, lambda: os.kill(os.getpid(), signal.SIGKILL)))


def test_killed_and_called_again(straight: tuple[SweepResult, Watched, list[str]], tmp_path: Path) -> None:
    """kill -9 in the middle of the runs, in a process of its own."""
    half = len(straight[2]) // 2
    assert finish(start(search_until_killed, tmp_path / "run", half)) == [-signal.SIGKILL]
    assert not (tmp_path / "run" / "summary.json").exists()
    search(tmp_path / "run")
    check_same(tmp_path / "run", straight[0].output)


def test_a_finished_search_is_only_read(
    straight: tuple[SweepResult, Watched, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = straight[0]
    before = {path: path.stat().st_mtime_ns for path in expected.output.rglob("*.safetensors")}
    watched = Watched()
    result = search(expected.output, images=watched)
    assert not watched.decoded
    assert result == expected
    assert {path: path.stat().st_mtime_ns for path in expected.output.rglob("*.safetensors")} == before


def test_test_is_scored_once(straight: tuple[SweepResult, Watched, list[str]], tmp_path: Path) -> None:
    watched = Watched()
    size = two_sweep_processes.SIZES["test"]

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage.startswith("best point, seed 3: epoch"):  # the first seed has been scored
            raise Interruption

    with pytest.raises(Interruption):
        search(tmp_path, images=watched, progress=stop)
    assert watched.decoded["test", False] == size
    search(tmp_path, images=watched)
    assert watched.decoded["test", False] == 2 * size
    check_same(tmp_path, straight[0].output)


def test_another_space_adds_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = {0.1: 0.2, 0.2: 0.5, 0.3: 0.4, 0.4: 0.9}
    trained = pretend_to_train(monkeypatch, lambda config: accuracies[config.learning_rate])

    def interrupted(*_: Any, **__: Any) -> None:
        raise Interruption

    def tried(space: dict[str, Sequence[Any]], **changes: Any) -> tuple[list[tuple[Any, ...]], SweepResult]:
        trained.clear()
        found = search(tmp_path, space=space, **{"start": {"method": "uniform"}, "seeds": (0,), **changes})
        return [(each.learning_rate, each.weight_decay, each.seed) for each in trained], found

    decay = CONFIG.weight_decay
    ran, found = tried({"learning_rate": [0.1, 0.2]})
    assert ran == [(0.1, decay, 0), (0.2, decay, 0), (0.2, decay, 0)]  # the last one on train + val
    ran, found = tried({"learning_rate": [0.2, 0.3]})
    assert ran == [(0.3, decay, 0)] and found.parameters["learning_rate"] == 0.2
    assert [row["learning_rate"] for row in found.points] == [0.1, 0.2, 0.3]
    # A better one is trained on train + val in place of the one before, and scored.
    score = tmp_path / "best" / "seed-0" / "test.json"
    score.write_text(json.dumps({**json.loads(score.read_text()), "accuracy": 0.123}))
    with monkeypatch.context() as patch:
        patch.setattr(spt_fast.sweep, "evaluate", interrupted)
        with pytest.raises(Interruption):
            tried({"learning_rate": [0.4]})
    assert [each.learning_rate for each in trained] == [0.4, 0.4]
    ran, found = tried({"learning_rate": [0.4]})
    assert [rate for rate, *_ in ran] == [0.4] and found.test_accuracies != [0.123]
    # A parameter more: points that have its old value are the same as before.
    ran, found = tried({"learning_rate": [0.1, 0.2], "weight_decay": [decay, 0.5]})
    assert ran == [(0.1, 0.5, 0), (0.2, 0.5, 0)]
    assert [(row["learning_rate"], row["weight_decay"]) for row in found.points] == [
        *((rate, decay) for rate in (0.1, 0.2, 0.3, 0.4)),
        *((rate, 0.5) for rate in (0.1, 0.2)),
    ]
    # A seed more: points that do not have it, and are not asked for, are left out.
    ran, found = tried({"learning_rate": [0.1, 0.2]}, seeds=(0, 5))
    assert ran == [(0.1, decay, 5), (0.2, decay, 5), (0.2, decay, 0), (0.2, decay, 5)]
    assert [row["learning_rate"] for row in found.points] == [0.1, 0.2]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "backbone": ({"backbone": lambda: tiny_backbone(seed=1)}, "backbone.weights"),
    "images": ({"images": lambda: images_of(seed=1, extra=1)}, "data.test.images=15 .* data.test.images=16"),
    "config": ({"config": replace(CONFIG, epochs=3)}, "config.epochs=2 .* config.epochs=3"),
    "start": ({"start": {"method": "uniform", "depth": "shallow"}}, "start.depth='deep' .*'shallow'"),
    "model": ({"model": {"pool": "token"}}, "model.pool='avg'"),
    "seeds": ({"seeds": (1, 0)}, "start.seed=0 .* start.seed=1"),
    "metadata": ({"metadata": {"images": {"recipe": "fgvc"}}}, "metadata.images.recipe=None .*'fgvc'"),
    "num_prompts": ({"num_prompts": 3}, "num_prompts=20 .* num_prompts=3"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_search_is_refused(other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_to_train(monkeypatch, lambda config: config.learning_rate)
    base = {"start": {"method": "uniform"}, "seeds": (0,), "space": {"learning_rate": [0.1, 0.2]}}
    search(tmp_path, **base)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changes, message = OTHERS[other]
    changes = {name: value() if callable(value) else value for name, value in changes.items()}
    with pytest.raises(InputError, match=f"the sweep in .* has {message}"):
        search(tmp_path, **{**base, **changes})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "notes.txt").write_text("mine")
    again = search(tmp_path, **{**base, **changes, "overwrite": True})
    assert again.parameters == {"learning_rate": 0.2}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_how_the_work_is_done_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = pretend_to_train(monkeypatch, lambda config: config.learning_rate)
    base = {"seeds": (0,), "space": {"learning_rate": [0.1, 0.2]}}
    search(tmp_path, start={"method": "uniform"}, **base)
    trained.clear()
    search(
        tmp_path,
        start={"method": "uniform", "token_budget": 0},
        config=replace(CONFIG, num_workers=1, checkpoint_minutes=9.0, learning_rate=0.7),
        model={**MODEL, "checkpoint_blocks": True},
        **base,
    )
    assert not trained


# What is refused before any work.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"lr": [0.1]}}, "space has 'lr', expected names among .*learning_rate"),
        ({"space": {"seed": [0, 1]}}, "space has 'seed'"),
        ({"space": {"learning_rate": []}}, r"space\['learning_rate'\] is empty"),
        ({"space": {"learning_rate": 0.1}}, r"space\['learning_rate'\] must be a list of values"),
        ({"space": {"lr_scale": "rms"}}, r"space\['lr_scale'\] must be a list of values to try, got 'rms'"),
        ({"space": {"learning_rate": [0.1, 0.1]}}, "has 0.1 twice"),
        ({"space": {"learning_rate": [0.1, -1.0]}}, "learning_rate must be positive and finite, got -1.0"),
        ({"space": {"learning_rate": [0.1, "high"]}}, "space has a value of the wrong kind .*high"),
        ({"space": {"num_prompts": [2, 0]}}, "num_prompts must be a whole number of at least 1, got 0"),
        ({"num_prompts": 0, "space": {}}, "num_prompts must be a whole number of at least 1, got 0"),
        ({"seeds": ()}, r"seeds must be different whole numbers of at least 0, got \[\]"),
        ({"seeds": (0, -1)}, r"got \[0, -1\]"),
        ({"seeds": (1, 1)}, r"got \[1, 1\]"),
        ({"trials": 0}, "trials must be a whole number of at least 1, got 0"),
        ({"start": {"num_prompts": 3}}, "start has 'num_prompts', expected names among .*method"),
        ({"start": {"method": "magic"}}, "method must be one of .*'magic'"),
        ({"model": {"num_classes": 3}}, "model has 'num_classes', expected names among .*pool"),
        ({"model": {"pool": "max"}}, "pool must be .*'max'"),
        ({"metadata": {"where": Path("x")}}, "start, model and metadata must be json-able"),
    ],
)
def test_mistakes_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    watched = Watched()
    with pytest.raises(InputError, match=message):
        search(tmp_path / "run", images=watched, **changes)
    assert not watched.decoded
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_start_that_is_refused_does_not_bind_the_next(tmp_path: Path) -> None:
    """More prompts than tokens is found only after the images have been counted."""
    with pytest.raises(InputError, match="fewer than num_prompts"):
        search(tmp_path, space={}, num_prompts=1000)
    assert not (tmp_path / "sweep.json").exists()
    search(tmp_path, space={}, num_prompts=2, seeds=(1,))


# Two processes.


def test_two_processes(tmp_path: Path) -> None:
    run_together(two_sweep_processes.main, tmp_path, 2)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["interrupted"] and second["interrupted"]
    assert first == second
    assert first["straight"] == first["resumed"] == first["again"]
    assert table(tmp_path / "resumed0") == table(tmp_path / "straight0")
    # Each process was told another folder: the second one has written none.
    assert not [path for path in tmp_path.glob("*1/**/*") if path.is_file()]


# The command.

SWEEP = [
    "sweep",
    *TINY,
    *PHOTOS,
    "--recipe",
    "vtab",
    "--lr",
    0.001,
    "--lr",
    0.05,
    "--num-prompts",
    2,
    "--num-prompts",
    3,
]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = make_photos(tmp_path / "photos")
    output = tmp_path / "run"
    arguments = [*SWEEP, "--data", photos, "--output", output, "--seed", 0, "--seed", 1, "--batch-size", 4]
    calls = []

    def interrupted(*positional: Any, **keywords: Any) -> Any:
        calls.append(positional)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*positional, **keywords)

    monkeypatch.setattr(spt_fast.sweep, "train", interrupted)
    done = run_command(*arguments)
    assert done.code == 130 and "the same command goes on" in done.err and not done.out
    done = run_command(*arguments, "--json")
    assert done.code == 0, done.err
    assert len(calls) == 4 + 5 + 2  # the one that was interrupted again, the others, and the best
    assert done.json["output"] == str(output)
    assert [(row["learning_rate"], row["num_prompts"], row["runs"]) for row in done.json["points"]] == [
        (rate, length, 2) for rate in (0.001, 0.05) for length in (2, 3)
    ]
    assert done.json["seeds"] == [0, 1] and len(done.json["test_accuracies"]) == 2
    # Test is not kept decoded: it is looked at once.
    kept = {path.name.split("-vtab")[0] for path in (output / "images").iterdir()}
    assert len(kept) == 3 and not any("test" in name for name in kept), kept

    adapter = output / done.json["adapters"][0]
    judged = run_command(
        "eval", "--adapter", adapter, "--data", photos, "--split", "test", "--json", "--device", "cpu"
    )
    assert judged.code == 0, judged.err
    assert judged.json["accuracy"] == done.json["test_accuracies"][0]

    shown = run_command(*arguments)
    assert (
        shown.code == 0 and "best" in shown.out and "test accuracy" in shown.out and str(adapter) in shown.out
    )
    assert len(calls) == 11
    check_refused(run_command(*arguments, "--method", "uniform"), "start.method='kmeans'", "'uniform'")
    more = run_command(*arguments, "--lr", 0.1, "--trials", 1, "--json")
    assert more.code == 0 and len(more.json["points"]) in (4, 5), more.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", -1], ["learning_rate", "got -1"]),
        (["--seed", 1, "--seed", 1], ["seeds must be different"]),
        (["--data", "nowhere"], ["nowhere", "does not exist"]),
        (["--image-cache", "FILE"], ["--image-cache: FILE is a file"]),
        (["--data", "untested"], ["split 'test' is not in untested"]),
    ],
)
def test_what_the_command_refuses(
    options: list[Any], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos(tmp_path / "photos", {"train": 2, "val": 1, "test": 1})
    make_photos(tmp_path / "untested", {"train": 2, "val": 1})
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("this is no folder")
    check_refused(run_command("sweep", *TINY, *PHOTOS, "--data", photos, "--output", "run", *options), *words)
    assert not os.path.exists("run")
