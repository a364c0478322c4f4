"""Parts of ablations: subsets of images, accuracy by class, tables with the paper's numbers, figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import squares, tiny_model

from spt_fast import TrainingConfig, evaluate
from spt_fast.ablations import ABLATIONS, Ablation, Choices, Finished, Subset, subset
from spt_fast.ablations.figures import write_figures
from spt_fast.ablations.paper_values import PAPER_TABLES, paper_settings
from spt_fast.ablations.runs import Run
from spt_fast.ablations.subsets import class_sizes, drawn
from spt_fast.ablations.tables import arranged, cells_of, notes_of, write_tables
from spt_fast.ablations.variants import exact
from spt_fast.ablations.workplace import ModelSource, Workplace
from spt_fast.cli.ablate import _config_of, _paper_settings
from spt_fast.errors import InputError
from spt_fast.per_class import confusion_matrix, per_class_accuracy
from spt_fast.recipe import load_recipe

ABOUT = {"test_split": "test", "choose_split": None, "jobs": 1}


# Subsets.


@pytest.mark.parametrize("imbalance", [1.0, 10.0, 50.0, 100.0])
def test_a_long_tail_is_exponential(imbalance: float) -> None:
    sizes = Subset("imbalance", imbalance).counts([700, 500, 900, 600, 500, 800])
    exact = [500 / imbalance ** (index / 5) for index in range(6)]
    assert all(
        abs(size - value) <= 1 and size <= value + 1e-9 for size, value in zip(sizes, exact, strict=True)
    )
    assert sizes[0] == 500 and sizes == sorted(sizes, reverse=True)


def test_a_long_tail_loses_no_image_to_rounding() -> None:
    assert Subset("imbalance", 49).counts([98, 98]) == [98, 2]
    for ratio in range(2, 50):
        for steps in range(1, 5):
            exact_sizes = [3 * ratio ** (steps - index) for index in range(steps + 1)]
            available = [exact_sizes[0]] * (steps + 1)
            assert Subset("imbalance", ratio**steps).counts(available) == exact_sizes


def test_a_smaller_subset_lies_in_a_larger_one_and_has_the_asked_numbers() -> None:
    images = squares(60).subset([index for index in range(60) if index % 3 or index < 30])
    assert class_sizes(images) == [10, 20, 20]
    counts = {
        ("shots", 4): [4, 4, 4],
        ("fraction", 0.33): [3, 7, 7],
        ("fraction", 0.01): [1, 1, 1],
        ("fraction", 1.0): [10, 20, 20],
        ("imbalance", 10): [10, 3, 1],
    }
    for seed in (0, 1):
        chosen = {key: subset(images, Subset(*key), seed=seed) for key in counts}  # type: ignore[arg-type]
        picked = {key: {id(source) for source, _ in part.samples} for key, part in chosen.items()}
        for key, part in chosen.items():
            assert class_sizes(part) == counts[key] and len(picked[key]) == len(part)
        assert picked["fraction", 0.01] < picked["shots", 4] < picked["fraction", 1.0]
    again = subset(images, Subset("shots", 4), seed=1)
    assert [id(source) for source, _ in again.samples] == [id(s) for s, _ in chosen["shots", 4].samples]
    other = subset(images, Subset("shots", 4), seed=0)
    assert {id(source) for source, _ in other.samples} != picked["shots", 4]
    first = drawn(images, [4, 4, 4], seed=3)
    second = drawn(images, [5, 5, 9], seed=3, after=[4, 4, 4])
    assert not set(first) & set(second) and len(second) == 19


def test_subsets_that_cannot_be_are_refused() -> None:
    for kind, value in (("shots", 0), ("shots", 1.5), ("fraction", 0), ("fraction", 1.1), ("imbalance", 0.5)):
        with pytest.raises(InputError, match=f"{kind} must be"):
            Subset(kind, value)  # type: ignore[arg-type]
    for kind in ("shots", "fraction", "imbalance"):
        for value in (float("nan"), float("inf")):
            with pytest.raises(InputError, match=f"{kind} must be .*, got {value}"):
                Subset(kind, value)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kind must be one of fraction, shots, imbalance"):
        Subset("share", 1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fewer than shots=5"):
        subset(squares(12), Subset("shots", 5), seed=0)
    with pytest.raises(InputError, match="no image of blue"):
        subset(squares(2), Subset("shots", 1), seed=0)


# Accuracy by class.


def test_the_confusion_matrix_counts_every_image_once(tmp_path: Path) -> None:
    images = squares(31, seed=4, unreadable={7: tmp_path / "broken.png"})
    model = tiny_model().eval()
    expected = torch.zeros(3, 3, dtype=torch.int64)
    with torch.no_grad():
        for index in range(31):
            pair = images[index]
            if pair is not None:
                expected[pair[1], model(pair[0][None]).argmax()] += 1
    model.train()
    confusion = confusion_matrix(model, images, batch_size=4, num_workers=0)
    assert model.training and confusion.dtype == torch.int64 and confusion.sum() == 30
    assert torch.equal(confusion, expected)
    assert confusion.trace().item() / 30 == evaluate(model, images, num_workers=0).accuracy
    own = per_class_accuracy(confusion)
    assert own == [expected[label, label].item() / expected[label].sum().item() for label in range(3)]
    with pytest.raises(InputError, match="data has 3 classes and the model 2"):
        confusion_matrix(tiny_model(num_classes=2), images)


# Variants and runs.


def test_choices_that_cannot_be_are_refused() -> None:
    for number in (0, -1, 1.5):
        with pytest.raises(
            InputError, match=f"num_prompts must be a whole number of at least 1, got {number}"
        ):
            Choices(num_prompts=number)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="shallow_prompts must be a whole number of at least 1"):
            Choices(shallow_prompts=number)  # type: ignore[arg-type]
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(InputError, match=f"each of values must be a finite number, got {value}"):
            Choices(values=(0.5, value))
    for name in ("prototype-fraction", "training-fraction"):
        for value in (0, -0.1, 1.5):
            with pytest.raises(InputError, match=rf"values of {name} must be in \(0, 1\], got {value}"):
                ABLATIONS[name](Choices(values=(0.5, value)))


def test_variants_with_different_numbers_have_different_places() -> None:
    values = (0.304, 0.296, 1.0)
    for name in ("prototype-fraction", "training-fraction"):
        rows = [variant.row for variant in ABLATIONS[name](Choices(values=values)).variants]
        assert rows[:3] == ["30.4%", "29.6%", "100%"]
    close = ABLATIONS["long-tail"](Choices(values=(10.0, 10.0000001))).variants
    assert [variant.row for variant in close[:2]] == ["10", "10.0000001"]


@pytest.mark.parametrize(
    ("name", "choices", "row"),
    [
        ("cross-task", Choices(data=("a", "b", "a")), "'a'"),
        ("model-size", Choices(models=("s", "s")), "'s'"),
        ("prompt-length", Choices(values=(2, 2)), "'2'"),
        ("few-shot", Choices(values=(2, 2)), "'2'"),
        ("training-fraction", Choices(values=(0.1, 0.1 + 1e-12)), "'10%'"),
    ],
)
def test_two_variants_in_one_place_are_refused(name: str, choices: Choices, row: str) -> None:
    with pytest.raises(InputError, match=rf"variants of {name} must have places of their own.*row {row}"):
        ABLATIONS[name](choices)
    variants = ABLATIONS["nmi"](Choices()).variants
    with pytest.raises(InputError, match="got 2 in row 'SPT-Deep' and column 'accuracy'"):
        Ablation("mine", "Mine", None, [*variants, variants[0]], "courses", "method")


def test_nearly_equal_rates_have_folders_and_entries_of_their_own(tmp_path: Path) -> None:
    ablation, made = finished("nmi")
    place = Workplace((ModelSource("vit_tiny_patch16_224"),), ("digits",), tmp_path, TrainingConfig())
    rates = (0.03, 0.0001, 0.1234567, 0.1234568)
    folders = [Run(made[0].variant, rate, 0, "test").folder(place).name for rate in rates]
    assert folders == [f"lr={rate},seed=0,test" for rate in ("0.03", "0.0001", "0.1234567", "0.1234568")]
    tried = Finished(made[0].variant, 0.03, (0,), made[0].outcomes, dict.fromkeys(rates, 0.5))
    assert list(cells_of(ablation, [tried])[0]["tried"]) == [exact(rate) for rate in rates]
    assert float(exact(1 / 3)) == 1 / 3 and exact(np.float64(0.1)) == "0.1" and exact(100.0) == "100"
    assert exact(np.float64(1 / 3)) == exact(1 / 3)


@pytest.mark.parametrize(
    ("split", "choose_split", "test_split", "words"),
    [
        ("test", None, "test", "test_split 'test' has images of split 'test', which are trained on"),
        ("trainval", None, "val", "test_split 'val' has images of split 'trainval', which are trained on"),
        ("train", None, "trainval", "test_split 'trainval' has images of split 'train'"),
        (
            "trainval",
            "val",
            "test",
            "choose_split 'val' has images of split 'trainval', which are trained on",
        ),
        ("train", "train", "test", "choose_split 'train' has images of split 'train'"),
        ("train", "test", "test", "choose_split 'test' has images of test_split 'test', which are judged on"),
        ("test", "val", "trainval", "choose_split 'val' has images of test_split 'trainval'"),
        ("trainval", "held-out", "val", "test_split 'val' has images of split 'trainval'"),
    ],
)
def test_splits_that_share_images_are_refused(
    split: str, choose_split: str | None, test_split: str, words: str, tmp_path: Path
) -> None:
    splits = {"split": split, "choose_split": choose_split, "test_split": test_split}
    with pytest.raises(InputError, match=words):
        Workplace((ModelSource("tiny"),), ("digits",), tmp_path, TrainingConfig(), **splits)  # type: ignore[arg-type]


# Tables and figures, from made-up outcomes.


def finished(name: str, choices: Choices = Choices(), seeds: int = 2) -> tuple[Any, list[Finished]]:  # noqa: B008
    """Every variant with accuracies 0.50, 0.52 ... for its place."""
    ablation = ABLATIONS[name](choices)
    made = []
    for place, variant in enumerate(ablation.variants):
        outcomes = tuple(
            {
                "accuracy": 0.5 + 0.01 * place + 0.02 * seed,
                "train_seconds": 2.0 + seed,
                "prototype_seconds": 0.5,
                "trainable_parameters": 1234,
                "nmi_by_epoch": [0.1, 0.2 + 0.1 * seed],
            }
            for seed in range(seeds)
        )
        made.append(Finished(variant, 0.03, tuple(range(seeds)), outcomes, {}))
    return ablation, made


def test_a_table_has_means_deviations_and_the_papers_numbers_where_they_are_asked_for(tmp_path: Path) -> None:
    ablation, made = finished("sampling")
    plain = cells_of(ablation, made)
    assert plain[3]["accuracy_mean"] == pytest.approx(0.54) and not any(cell["paper"] for cell in plain)
    assert plain[3]["accuracy_std"] == pytest.approx(np.std([0.53, 0.55], ddof=1))
    header, rows = arranged(ablation, plain)
    assert header == ["start of the prompts", "frozen", "learnable"]
    assert rows[1] == ["K-means", "52.00 ± 1.41", "59.00 ± 1.41"]
    header, rows = arranged(ablation, cells_of(ablation, made, paper_settings("cub200-mae")))
    assert header[2] == "frozen, paper (cub200, MAE)" and header[3:] == ["learnable"]
    assert [row[2] for row in rows] == ["25.3", "39.2", "37.7", "37", "37.8", "", ""]
    cells = cells_of(ablation, made, paper_settings("caltech101"))
    write_tables(tmp_path, ablation, cells, ABOUT)
    kept = json.loads((tmp_path / "table.json").read_text())
    assert kept["cells"] == cells and kept["cells"][1]["paper"] == {
        "caltech101-mae accuracy": 84.1,
        "caltech101-sup21k accuracy": 87.8,
    }
    assert "over 2 seeds" in (tmp_path / "table.md").read_text()


def test_a_table_says_where_classes_of_a_long_tail_are_as_small_as_can_be() -> None:
    ablation, made = finished("long-tail", seeds=1)
    for largest, words in ((100, None), (99, "Imbalance 100:"), (10, "Imbalance 50, 100:")):
        for each in made:
            each.outcomes[0]["largest_class"] = largest
        notes = [note for note in notes_of(ablation, cells_of(ablation, made), ABOUT) if "Imbalance" in note]
        assert len(notes) == (words is not None) and all(note.startswith(str(words)) for note in notes)


def test_the_papers_numbers_have_the_differences_that_it_prints() -> None:
    """Table 4a and S2 print in brackets what each start is better by than the random one."""
    printed = {
        ("sampling", "frozen"): {
            "K-means": (3.5, 5.9, 13.8, 10.6),
            "Mean pooling": (1.9, 4.4, 12.4, 8.0),
            "Max pooling": (2.4, 5.2, 11.7, 8.1),
            "Random sample": (2.6, 5.0, 12.5, 8.7),
        },
        ("layers", "shallow"): {"first": (3.5, 28.9), "last": (1.7, 22.4), "same": (3.5, 28.9)},
        ("layers", "deep"): {"first": (0.7, 8.2), "last": (1.4, 8.5), "same": (2.1, 11.8)},
    }
    compared = 0
    for table in PAPER_TABLES:
        for row, gains in printed.get((table.ablation, table.column), {}).items():
            base = table.rows.get("Random init (VPT)") or table.rows["random"]
            # 0.1: differences of numbers that were rounded first.
            assert np.subtract(table.rows[row], base) == pytest.approx(np.array(gains), abs=0.11)  # type: ignore
            compared += len(gains)
    assert compared == 16 + 12
    for name in ("dtd", "cub", "cub200-mae-vitb"):
        with pytest.raises(InputError, match="paper-column must be cub200 or caltech101"):
            paper_settings(name)


def test_a_recipe_brings_its_training_and_the_papers_columns() -> None:
    released, other = load_recipe("cub200-mae-vitb"), load_recipe("dtd-sup21k-vitb")
    assert _paper_settings(None, released) == [("cub200", "mae")] and _paper_settings(None, other) == []
    assert len(_paper_settings("caltech101", released)) == 3
    config = _config_of(released)
    assert config.ema_decay == released.options["ema_decay"] is not None
    assert config.head_weight_decay == released.options["head_weight_decay"]


def test_every_row_with_a_number_of_the_paper_is_in_our_table() -> None:
    for table in PAPER_TABLES:
        variants = ABLATIONS[table.ablation](Choices()).variants
        rows = {variant.row for variant in variants if variant.column == table.column}
        assert set(table.rows) <= rows, table


def test_columns_of_a_matrix_are_normalised_and_failures_are_named(tmp_path: Path) -> None:
    ablation, made = finished("cross-task", Choices(data=("a", "b", "c")), seeds=1)
    accuracies = [[0.9, 0.2, 0.5], [0.7, 0.6, 0.5], [0.8, 0.3, 0.5]]
    made = [
        Finished(each.variant, 0.03, (0,), ({"accuracy": value, "train_seconds": 1.0},), {})
        for each, value in zip(made, sum(accuracies, []), strict=True)
    ]
    cells = cells_of(ablation, made)
    assert [cell["normalized"] for cell in cells] == pytest.approx([1, 0, 1, 0, 1, 1, 0.5, 0.25, 1])
    made[4] = Finished(made[4].variant, 0.03, (0,), ({"failure": "no longer finite"},), {})
    made[0] = Finished(made[0].variant, None, (0,), (), {0.1: None})
    cells = cells_of(ablation, made)
    assert arranged(ablation, cells)[1][1][2] == arranged(ablation, cells)[1][0][1] == "failed"
    write_tables(tmp_path, ablation, cells, ABOUT)
    text = (tmp_path / "table.md").read_text()
    assert "b, b: no longer finite" in text and "none of the learning rates" in text
    write_figures(tmp_path, ablation, cells)
    assert ">failed<" in (tmp_path / "figure.svg").read_text() or (tmp_path / "figure.png").stat().st_size


@pytest.mark.parametrize("name", ["layers", "prompt-length", "nmi"])
def test_figures_are_the_same_for_the_same_cells(name: str, tmp_path: Path) -> None:
    ablation, made = finished(name)
    drawn_bytes = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        files = write_figures(folder, ablation, cells_of(ablation, made))
        drawn_bytes.append([file.read_bytes() for file in files])
    assert drawn_bytes[0] == drawn_bytes[1] and drawn_bytes[0][0].startswith(b"\x89PNG")
