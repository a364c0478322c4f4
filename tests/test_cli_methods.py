"""``spt-fast train --method NAME``: what is chosen from what was typed, and that adapters of methods are served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import TINY, check_refused, make_photos, run

import spt_fast
from spt_fast.adapters import Adapter
from spt_fast.backbones import image_settings
from spt_fast.data import make_transform, read_image
from spt_fast.errors import InputError
from spt_fast.methods import METHODS

SHORT = [*TINY, "--pool", "avg", "--batch-size", 4, "--dtype", "float32", "--recipe", "vtab", "--epochs", 1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.mark.parametrize(
    ("typed", "rows", "number", "start"),
    [
        ("", 2, 20, "kmeans"),
        ("--depth shallow", 1, 100, "kmeans"),
        ("--method spt_shallow --num-prompts 3", 1, 3, "kmeans"),
        ("--method vpt_deep", 2, 20, "uniform"),
        ("--method vpt_shallow", 1, 100, "uniform"),
        ("--method vpt_deep --init mean_pool --num-prompts 2", 2, 2, "mean_pool"),
        ("--method random_sample --depth shallow --num-prompts 2", 1, 2, "random_sample"),
    ],
)
def test_prompts_follow_what_was_typed(
    photos: Path, tmp_path: Path, typed: str, rows: int, number: int, start: str
) -> None:
    done = run("train", *SHORT, "--data", photos, "--output", tmp_path / "run", *typed.split())
    assert done.code == 0, done.err
    adapter = Adapter.load(tmp_path / "run" / "last.safetensors")
    assert adapter.prompts is not None and adapter.prompts.shape[:2] == (rows, number)
    assert adapter.config["start"]["method"] == start


def test_given_prompts_decide_about_depth(photos: Path, tmp_path: Path) -> None:
    shallow = tmp_path / "shallow.safetensors"
    made = run(
        "prototypes", *TINY, "--data", photos, "--output", shallow, "--depth", "shallow", "--num-prompts", 3
    )
    assert made.code == 0, made.err
    train = ["train", *SHORT, "--data", photos, "--prompts", shallow]
    assert run(*train, "--output", tmp_path / "free").code == 0
    assert run(*train, "--output", tmp_path / "named", "--method", "vpt_shallow").code == 0
    check_refused(
        run(*train, "--output", tmp_path / "deep", "--method", "vpt_deep"), "[2, P, D]", "[1, 3, 48]"
    )
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("method", ["linear", "bitfit"])
def test_methods_without_prompts_are_trained_and_served(photos: Path, tmp_path: Path, method: str) -> None:
    output = tmp_path / "run"
    train = ["train", *SHORT, "--data", photos, "--output", output, "--method", method]
    done = run(*train, "--snapshot-interval", 1)
    assert done.code == 0, done.err
    config = json.loads((output / "config.json").read_text())
    assert config["method"] == method and "start" not in config
    assert config["training"]["learning_rate"] == METHODS[method].learning_rate
    assert [path.name for path in sorted((output / "snapshots").iterdir())] == [
        "epoch-0000.safetensors",
        "epoch-0001.safetensors",
    ]
    assert not (output / "prompts.safetensors").exists()
    adapter = output / "last.safetensors"
    judged = run("eval", "--adapter", adapter, "--data", photos, "--split", "test", "--json")
    assert judged.code == 0 and judged.json["images"] == 9, judged.err
    image = photos / "test" / "red" / "0.png"
    seen = run("predict", "--adapter", adapter, image, "--json", "--top", 3)
    assert seen.code == 0, seen.err
    torch.manual_seed(0)  # the backbone is random, and this the seed of the run
    model = spt_fast.load_adapter(adapter)
    transform = make_transform("vtab", train=False, **image_settings(model.backbone))
    with torch.no_grad():
        expected = dict(
            zip(model.classes, model(transform(read_image(image))[None])[0].softmax(0).tolist(), strict=True)
        )
    found = {each["class"]: each["probability"] for each in seen.json[0]["predictions"]}
    assert found == pytest.approx(expected, rel=1e-4)
    assert run(*train, "--resume", "--snapshot-interval", 1).code == 0
    check_refused(run(*train[:-1], "linear" if method == "bitfit" else "bitfit", "--resume"), "--method")


def test_e2vpt_is_trained_pruned_rewound_and_trained_again(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train = ["train", *SHORT, "--data", photos, "--output", output, "--method", "e2vpt", "--num-prompts", 4]
    pruned = ["--method-option", "prune_tokens=0.5", "--method-option", "prune_segments=0.25"]
    done = run(*train, *pruned, "--json")
    assert done.code == 0, done.err
    assert done.json["output"] == str(output / "rewound")
    adapter = output / "rewound" / "last.safetensors"
    before = Adapter.load(output / "trained" / "last.safetensors").prompts
    after = Adapter.load(adapter).prompts
    assert before is not None and after is not None and (before.shape[1], after.shape[1]) == (4, 2)
    judged = run("eval", "--adapter", adapter, "--data", photos, "--split", "test", "--json")
    assert judged.code == 0 and judged.json["images"] == 9, judged.err
    check_refused(run(*train, *pruned), "already holds a run")


def test_several_tasks_are_served_from_prompts_alone(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert run("train", *SHORT, "--data", photos, "--output", output, "--method", "linear").code == 0
    adapter = Adapter.load(output / "last.safetensors")
    torch.manual_seed(0)
    model = adapter.attach(adapter.load_backbone())
    with pytest.raises(InputError, match="adapter of linear"):
        spt_fast.MultiTaskViT(model.backbone, {"a": model})


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--method magic", ["method must be one of", "spt_deep", "moment_probing", "'magic'"]),
        ("--method lora --method-option rang=4", ["rang", "rank"]),
        ("--method linear --method-option rank", ["--method-option", "KEY=VALUE"]),
    ],
)
def test_mistakes_of_methods(photos: Path, tmp_path: Path, typed: str, words: list[str]) -> None:
    done = run("train", *SHORT, "--data", photos, "--output", tmp_path / "run", *typed.split())
    check_refused(done, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--method linear --num-prompts 5", ["--num-prompts", "linear has none"]),
        ("--method lora --init kmeans", ["--init", "lora has none"]),
        ("--method full --prompt-dropout 0.1", ["--prompt-dropout"]),
        ("--method vpt_deep --depth shallow", ["--depth shallow", "vpt_deep"]),
        ("--method vapt --method-option prune_tokens=0.5", ["prune_", "e2vpt"]),
        ("--method kmeans --init uniform", ["--method kmeans", "--init"]),
        ("--prompts p --init kmeans", ["--prompts", "--init"]),
    ],
)
def test_options_that_do_not_go_together(photos: Path, tmp_path: Path, typed: str, words: list[str]) -> None:
    done = run("train", *SHORT, "--data", photos, "--output", tmp_path / "run", *typed.split())
    check_refused(done, *words, code=2)
