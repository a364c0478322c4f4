"""What ``spt-fast ablate`` refuses: in one sentence, and before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import TINY, check_refused, make_photos, run

from spt_fast import TrainingConfig
from spt_fast.ablations import ABLATIONS, Choices, ModelSource, Workplace, run_ablation
from spt_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ["--pool", "avg", "--epochs", "1", "--batch-size", "8", "--dtype", "float32", "--workers", "0"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("refused") / "photos")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("cross-task", ["give --data at least twice"]),
        ("cross-task --data {photos}", ["--data", "was given 2 times, expected different ones"]),
        ("cross-task --data {photos}/none", ["none' does not exist"]),
        ("cross-task --data {photos}/train", ["split 'test'"]),
        ("model-size --model vit_tiny_patch16_224", ["--model vit_tiny_patch16_224 was given 2 times"]),
        (
            "model-size --model vit_tiny_patch16_224 --checkpoint a.pth --checkpoint a.pth",
            ["--model vit_tiny_patch16_224, a.pth was given 2 times"],
        ),
        ("few-shot --values 1,x", ["--values must be numbers", "'1,x'"]),
        ("few-shot --values 1,1", ["--values must be different numbers, got 1, 1"]),
        ("few-shot --values nan", ["each of values must be a finite number, got nan"]),
        ("few-shot --values inf", ["each of values must be a finite number, got inf"]),
        ("few-shot --values 0.5", ["values of few-shot must be whole numbers", "0.5"]),
        ("few-shot --values 1,9", ["4 images of a class", "shots=9"]),
        ("long-tail --values nan", ["each of values must be a finite number, got nan"]),
        ("long-tail --values 0.5", ["imbalance must be at least 1", "0.5"]),
        ("training-fraction --values 1.5", ["values of training-fraction must be in (0, 1], got 1.5"]),
        ("prototype-fraction --values 0.5,1.5", ["values of prototype-fraction must be in (0, 1], got 1.5"]),
        ("prototype-fraction --values 0", ["values of prototype-fraction must be in (0, 1], got 0"]),
        ("prototype-fraction --values nan", ["each of values must be a finite number, got nan"]),
        (
            "prompt-length --num-prompts 2 --num-prompts 2",
            ["--num-prompts must be different numbers, got 2, 2"],
        ),
        (
            "prompt-length --num-prompts 0",
            ["prompt-length (num_prompts) must be whole numbers of at least 1"],
        ),
        ("layers --num-prompts 0", ["num_prompts must be a whole number of at least 1, got 0"]),
        ("layers --shallow-prompts 0", ["shallow_prompts must be a whole number of at least 1, got 0"]),
        ("sampling --lr -1", ["learning_rate must be positive and finite, got -1.0"]),
        ("sampling --lr nan", ["learning_rate must be positive and finite, got nan"]),
        ("sampling --lrs -0.1,0.1", ["learning_rate must be positive and finite, got -0.1"]),
        ("sampling --lrs 0.1,nan", ["learning_rate must be positive and finite, got nan"]),
        ("sampling --lrs 0.1,inf", ["learning_rate must be positive and finite, got inf"]),
        ("sampling --lrs 0", ["learning_rate must be positive and finite, got 0.0"]),
        ("sampling --lrs=", ["--lrs must be numbers separated by commas, got ''"]),
        ("sampling --paper-column dtd", ["paper-column must be", "cub200", "'dtd'"]),
        ("sampling --split test", ["test_split 'test' has images of split 'test'"]),
        ("sampling --test-split train", ["test_split 'train' has images of split 'train'"]),
        ("sampling --lrs 1,0.1 --val-split train", ["choose_split 'train' has images of split 'train'"]),
        ("sampling --lrs 1,0.1 --val-split test", ["choose_split 'test' has images of test_split 'test'"]),
    ],
)
def test_a_command_that_cannot_be_is_refused(
    command: str, words: list[str], photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "made" / "output"
    name, *options = command.format(photos=photos).split()
    arguments = [*TINY, "--data", photos, "--output", output, *SHORT, *options, "--seeds", 1]
    check_refused(run("ablate", name, *arguments), *words)
    assert not output.parent.exists()


def test_what_is_trained_on_does_not_stand_for_test_images(tmp_path: Path) -> None:
    other = make_photos(tmp_path / "two", {"train": 4, "val": 2})
    arguments = [*TINY, "--data", other, "--output", tmp_path / "output", *SHORT, "--split", "trainval"]
    check_refused(run("ablate", "nmi", *arguments), "test_split 'val' has images of split 'trainval'")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sampling --lr 1 --lrs 1,2", "--lr is the rate of all runs"),
        ("sampling --data {photos}", "--data was given 2 times"),
        ("sampling --values 1", "--values are for"),
        ("layers --num-prompts 1 --num-prompts 2", "only prompt-length"),
        ("sampling --checkpoint a.pth --checkpoint b.pth", "--checkpoint was given 2 times for 1 --model"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    command: str, words: str, photos: Path, tmp_path: Path
) -> None:
    name, *options = command.format(photos=photos).split()
    arguments = [*TINY, "--data", photos, "--output", tmp_path / "output", *SHORT, *options]
    check_refused(run("ablate", name, *arguments), words, code=2)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("rates", [(-1.0,), (0.1, float("nan")), (0.1, 0.0), (float("inf"), 0.1)])
def test_learning_rates_that_cannot_be_are_refused(rates: tuple[float, ...], tmp_path: Path) -> None:
    place = Workplace(
        (ModelSource("vit_tiny_patch16_224"),),
        ("digits",),
        tmp_path / "output",
        TrainingConfig(),
        choose_split="val",
    )
    with pytest.raises(InputError, match="learning_rate must be positive and finite"):
        run_ablation(ABLATIONS["nmi"](Choices()), place, learning_rates=rates)
    assert not place.output.exists()
