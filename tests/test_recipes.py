"""Recipes: all hold together, their numbers are the paper's, and what is wrong with a file is said in a sentence."""

from __future__ import annotations

import json
import random
import shlex
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
import yaml
from typer.testing import CliRunner

import spt_fast.cli
from spt_fast import PromptedViT, TrainingConfig, load_backbone
from spt_fast.cli.recipes import commands, recipes
from spt_fast.data import LAYOUTS, RECIPES
from spt_fast.errors import CheckpointError, InputError, MissingFileError
from spt_fast.recipe import (
    PRETRAININGS,
    SIZES,
    DatasetFacts,
    Recipe,
    dataset_facts,
    explain_counts,
    fetch_weights,
    load_recipe,
    recipe_names,
    vtab_tasks,
)

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
BACKBONES = [f"{pretraining}-{size}" for pretraining in PRETRAININGS for size in SIZES]
CONFIG_KEYS = set(TrainingConfig.__dataclass_fields__)

# Table S1 of the paper, in its order; * where the division into train and val is random.
TABLE = """
    cub200                200   5394*   600*   5794
    nabirds               555  21536*  2393*  24633
    flowers               102   1020   1020    6149
    dogs                  120  10800*  1200*   8580
    cars                  196   7329*   815*   8041
    caltech101            102    800    200    6084
    cifar100              100    800    200   10000
    dtd                    47    800    200    1880
    flowers102            102    800    200    6149
    pets                   37    800    200    3669
    svhn                   10    800    200   26032
    sun397                397    800    200   21750
    patch_camelyon          2    800    200   32768
    eurosat                10    800    200    5400
    resisc45               45    800    200    6300
    retinopathy             5    800    200   42670
    clevr_count             8    800    200   15000
    clevr_distance          6    800    200   15000
    dmlab                   6    800    200   22735
    kitti_distance          4    800    200     711
    dsprites_location      16    800    200   73728
    dsprites_orientation   16    800    200   73728
    smallnorb_azimuth      18    800    200   12150
    smallnorb_elevation     9    800    200   12150
"""


@pytest.fixture(scope="module")
def loaded() -> list[Recipe]:
    """All recipes that come with the package."""
    return [load_recipe(name) for name in recipe_names()]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A yaml file of one's own with these keys, or with this text."""

    def make(content: dict[str, Any] | str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return make


# What comes with the package.


def test_a_recipe_for_every_data_set_and_backbone(loaded: list[Recipe]) -> None:
    names = [recipe.name for recipe in loaded]
    assert len(names) == len(set(names)) == 26 * 3 * 3 and names == recipe_names()
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(BACKBONES)
    assert {path.stem for path in (FOLDER / "datasets").glob("*.yaml")} == set(dataset_facts())
    for recipe in loaded:
        dataset, backbone = recipe.name.split("-", 1)
        assert recipe.dataset == dataset_facts()[dataset]
        file = yaml.safe_load((FOLDER / f"{backbone}.yaml").read_text())
        assert (recipe.model, recipe.pool) == (file["model"], file["pool"])
        assert recipe.options["transform"] == recipe.dataset.transform


def test_released_commands_belong_to_recipes() -> None:
    for path in (FOLDER / "released").glob("*.yaml"):
        assert set(yaml.safe_load(path.read_text())["recipes"]) <= set(recipe_names())


def test_data_sets_are_those_of_table_s1() -> None:
    facts = dataset_facts()
    rows = [line.split() for line in TABLE.strip().splitlines()]
    assert list(facts) == [*(row[0] for row in rows), "imagenet1k", "inat2018"]
    for number, (name, *numbers) in enumerate(rows, start=1):
        classes, train, val, test = (int(each.rstrip("*")) for each in numbers)
        found = facts[name]
        assert (found.num_classes, found.train, found.val, found.test) == (classes, train, val, test)
        assert found.splits_are_random == numbers[1].endswith("*")
        assert found.row == number and found.counts_from == "Table S1"
        assert found.transform == ("fgvc" if number <= 5 else "vtab")
    assert [
        (facts[name].num_classes, facts[name].train, facts[name].val) for name in ("imagenet1k", "inat2018")
    ] == [
        (1000, 1281167, 50000),
        (8142, 437513, 24426),
    ]


def test_data_sets_are_named_as_the_readers_know_them() -> None:
    for facts in dataset_facts().values():
        assert facts.layout in LAYOUTS and facts.transform in RECIPES and facts.folders
    tasks = vtab_tasks()
    assert [task.name for task in tasks] == list(dataset_facts())[5:24]
    groups = [task.group for task in tasks]
    assert groups == ["natural"] * 7 + ["specialized"] * 4 + ["structured"] * 8
    folders = [folder for task in tasks for folder in task.folders]
    assert len(folders) == len(set(folders)), "a folder of VTAB-1k must name one task"


def test_values_of_the_paper_and_of_the_released_commands() -> None:
    command = {"min_learning_rate": 1e-8, "warmup_epochs": 10, "batch_size": 64, "weight_decay": 0.01}
    expected = {
        "cub200-mae-vitb": {**command, "learning_rate": 0.05, "head_weight_decay": 0.5},
        "dogs-mocov3-vitb": {**command, "learning_rate": 0.001, "head_weight_decay": 3.0},
        "dogs-sup21k-vitb": {**command, "learning_rate": 0.001, "head_weight_decay": 3.0},
    }
    paper = {
        "epochs": 100,
        "warmup_epochs": 10,
        "min_learning_rate": 1e-8,
        "lr_scale": "none",
        "num_prompts": 20,
        "depth": "deep",
        "method": "kmeans",
    }
    grids = load_recipe("cars-mae-vitl").search
    for name in recipe_names():
        recipe = load_recipe(name)
        assert {key: recipe.options[key] for key in paper} == paper
        assert recipe.options["pool"] == ("avg_with_prompts" if "-mae-" in name else "token")
        if name in expected:
            assert {key: recipe.options[key] for key in expected[name]} == expected[name]
            assert recipe.options["ema_decay"] is not None and not recipe.search
            assert any("random_sample" in note for note in recipe.notes)
            for key in ("learning_rate", "weight_decay", "head_weight_decay"):
                assert expected[name][key] in grids[key]
        else:
            assert recipe.options["batch_size"] == 32 and "ema_decay" not in recipe.options
            assert set(recipe.search) == {"learning_rate", "weight_decay", "head_weight_decay"}
            for key, values in recipe.search.items():
                assert values == sorted(values) and 2 <= len(values) <= 5 and recipe.options[key] in values


def test_every_value_says_where_it_comes_from(loaded: list[Recipe]) -> None:
    for recipe in loaded:
        untold = {*recipe.options, *recipe.search, "weights_url"} - {"pretrained"} - set(recipe.sources)
        assert not untold, (recipe.name, untold)


def test_weights_are_timms_or_a_released_file_or_none(loaded: list[Recipe]) -> None:
    files = {
        "mae-vitb": "mae_pretrain_vit_base.pth",
        "mae-vitl": "mae_pretrain_vit_large.pth",
        "mae-vith": "mae_pretrain_vit_huge.pth",
        "mocov3-vitb": "linear-vit-b-300ep.pth.tar",
    }
    for recipe in loaded:
        backbone = recipe.name.split("-", 1)[1]
        assert recipe.weights_file == files.get(backbone)
        assert recipe.pretrained == backbone.startswith("sup21k")
        if backbone in ("mocov3-vitl", "mocov3-vith"):
            assert any("--checkpoint" in note for note in recipe.notes)


def test_every_configuration_can_be_trained_with(loaded: list[Recipe]) -> None:
    for recipe in loaded:
        chosen = {key: recipe.options[key] for key in CONFIG_KEYS & recipe.options.keys()}
        assert recipe.training_config() == TrainingConfig(**chosen)
        for key, values in recipe.search.items():
            for value in values:
                assert recipe.training_config(**{key: value}) == TrainingConfig(**{**chosen, key: value})


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_take_prompts(backbone: str) -> None:
    """The architecture at an eighth of its width, on images of 2 x 2 patches."""
    recipe = load_recipe(f"dtd-{backbone}")
    assert timm.is_model(recipe.model)
    assert not recipe.pretrained or recipe.model in timm.list_pretrained(recipe.model.split(".")[0] + "*")
    width, depth, heads, patch = {
        "vitb": (768, 12, 12, 16),
        "vitl": (1024, 24, 16, 16),
        "vith": (1280, 32, 16, 14),
    }[backbone.split("-")[1]]
    torch.manual_seed(0)
    model = PromptedViT(
        load_backbone(recipe.model, embed_dim=width // 8, img_size=2 * patch),
        torch.randn(depth, 3, width // 8),
        num_classes=recipe.dataset.num_classes,
        pool=recipe.pool,
    ).eval()
    blocks = model.backbone.blocks
    assert len(blocks) == depth and blocks[0].attn.num_heads == heads
    assert model.backbone.patch_embed.patch_size == (patch, patch)
    images = torch.randn(2, 3, 2 * patch, 2 * patch)
    logits = model(images)
    assert logits.shape == (2, 47) and torch.isfinite(logits).all()
    logits.square().sum().backward()
    assert model.prompts.grad is not None and (model.prompts.grad.abs().amax(dim=(1, 2)) > 0).all()


# Files of one's own.

OWN: dict[str, Any] = {
    "dataset": {
        "name": "photos",
        "title": "Photos",
        "num_classes": 3,
        "transform": "fgvc",
        "train": 90,
        "val": 10,
    },
    "model": "vit_tiny_patch16_224",
    "pool": "avg",
    "options": {"epochs": 5, "learning_rate": 0.02, "num_prompts": 8},
    "search": {"learning_rate": [0.01, 0.02], "num_prompts": [4, 8]},
    "sources": {"learning_rate": "tried"},
    "notes": ["Mine."],
}


def test_own_file(write: Callable[..., Path]) -> None:
    recipe = load_recipe(write(OWN))
    assert recipe == load_recipe(str(write(OWN))) and recipe.name == "mine"
    assert (recipe.dataset.title, recipe.dataset.trainval, recipe.dataset.test) == ("Photos", 100, None)
    assert recipe.options == {
        **OWN["options"],
        "model": "vit_tiny_patch16_224",
        "pretrained": False,
        "pool": "avg",
        "transform": "fgvc",
    }
    # No warm-up is asked for: a tenth of the epochs, as on the command line.
    assert recipe.training_config() == TrainingConfig(epochs=5, warmup_epochs=0, learning_rate=0.02)
    assert (
        recipe.search == OWN["search"] and recipe.notes == OWN["notes"] and recipe.sources == OWN["sources"]
    )
    assert load_recipe(write({"dataset": "dtd", "model": "m"})).dataset == dataset_facts()["dtd"]


def test_numbers_without_a_point_are_numbers(write: Callable[..., Path]) -> None:
    values = "options: {learning_rate: 1e-3, ema_decay: 9E-1}, search: {learning_rate: [1e-3, 2]}"
    recipe = load_recipe(write(f"{{dataset: dtd, model: m, {values}}}"))
    assert recipe.options["learning_rate"] == 0.001 and recipe.options["ema_decay"] == 0.9
    assert recipe.search == {"learning_rate": [0.001, 2]}


def test_what_is_written_out_is_read_again(loaded: list[Recipe], tmp_path: Path) -> None:
    chosen = [*random.Random(0).sample(loaded, 12), load_recipe("cub200-mae-vitb")]
    for recipe in chosen:
        path = tmp_path / f"{recipe.name}.json"
        path.write_text(json.dumps(recipe.as_dict()))
        assert load_recipe(path) == recipe


def with_changes(**changes: Any) -> dict[str, Any]:
    return {**OWN, **changes}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (with_changes(modle="x"), ["'modle'", "did you mean model?"]),
        (with_changes(options={"learningrate": 1}), ["options", "'learningrate'", "learning_rate"]),
        (with_changes(options={"pool": "avg"}), ["options", "'pool'"]),
        (with_changes(search={"rate": [1]}), ["search", "'rate'"]),
        (with_changes(sources={"rate": "x"}), ["sources", "'rate'"]),
        (with_changes(sources={"epochs": 3}), ["sources", "epochs", "text", "3"]),
        (with_changes(options={"epochs": 2.5}), ["options", "epochs", "a whole number", "2.5"]),
        (with_changes(options={"epochs": True}), ["options", "epochs", "a whole number", "True"]),
        (with_changes(options={"learning_rate": "fast"}), ["learning_rate", "a finite number", "'fast'"]),
        (with_changes(options={"weight_decay": float("inf")}), ["weight_decay", "a finite number", "inf"]),
        (with_changes(options={"compile": 1}), ["compile", "true or false", "1"]),
        (with_changes(options={"method": "magic"}), ["method", "kmeans", "'magic'"]),
        (with_changes(options={"lr_scale": None}), ["lr_scale", "rms or none", "None"]),
        (with_changes(options=[1]), ["options", "keys and values", "[1]"]),
        (with_changes(options={"learning_rate": -1}), ["options", "learning_rate", "positive", "-1"]),
        (with_changes(options={"num_prompts": 0}), ["options", "num_prompts", "at least 1", "0"]),
        (with_changes(options={"data_fraction": 2}), ["options", "data_fraction", "(0, 1]", "2"]),
        (with_changes(options={"prompt_dropout": 1}), ["options", "prompt_dropout", "[0, 1)", "1"]),
        (with_changes(search={"learning_rate": 0.1}), ["search", "learning_rate", "a list", "0.1"]),
        (with_changes(search={"learning_rate": []}), ["search", "learning_rate", "none"]),
        (with_changes(search={"learning_rate": [0.1, "x"]}), ["search", "learning_rate", "'x'"]),
        (with_changes(search={"learning_rate": [0.1, 0]}), ["search", "learning_rate", "positive", "0"]),
        (with_changes(search={"epochs": [5, 5]}), ["search", "epochs", "different", "5 twice"]),
        (with_changes(pool="max"), ["pool", "avg_with_prompts", "'max'"]),
        (with_changes(pretrained="yes"), ["pretrained", "true or false", "'yes'"]),
        (with_changes(weights_url="https://x.org/"), ["weights_url", "'https://x.org/'"]),
        (with_changes(weights_url="https://x.org/w.pth", pretrained=True), ["weights_url", "null"]),
        (with_changes(notes="one"), ["notes", "a list", "'one'"]),
        (with_changes(dataset="cub20"), ["dataset", "'cub20'", "did you mean cub200"]),
        (with_changes(dataset={"name": "x"}), ["dataset", "'title'", "missing"]),
        (with_changes(dataset={**OWN["dataset"], "train": 0}), ["dataset", "train", "at least 1", "0"]),
        (with_changes(dataset={**OWN["dataset"], "layout": "zip"}), ["dataset", "layout", "'zip'"]),
        (with_changes(dataset={**OWN["dataset"], "group": "odd"}), ["dataset", "group", "'odd'"]),
        ({"dataset": "dtd"}, ["'model'", "missing"]),
        ({"dataset": "dtd", 3: "x"}, ["3"]),
        ("- a list", ["keys and values", "list"]),
        ("", ["keys and values"]),
        ("{", ["not yaml"]),
        ("a: !!int x", ["not yaml"]),
        ("[" * 1500, ["not yaml"]),
    ],
)
def test_mistakes_in_a_file_are_named(write: Callable[..., Path], content: Any, words: list[str]) -> None:
    path = write(content)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    sentence = str(caught.value)
    assert sentence.startswith(str(path)) and "\n" not in sentence
    for word in words:
        assert word in sentence, sentence


def test_a_file_makes_nothing_but_plain_values(write: Callable[..., Path], tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    with pytest.raises(InputError, match="not yaml"):
        load_recipe(write(f"model: !!python/object/apply:os.mkdir ['{trap}']\ndataset: dtd\n"))
    assert not trap.exists()


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="'cub200-mae-vit'; did you mean .*cub200-mae-vitb"):
        load_recipe("cub200-mae-vit")
    with pytest.raises(InputError, match="expected DATASET-PRETRAINING-SIZE"):
        load_recipe("?")
    with pytest.raises(MissingFileError, match="nowhere.yaml"):
        load_recipe("nowhere.yaml")
    with pytest.raises(InputError, match="learning_rate"):
        load_recipe("dtd-mae-vitb").training_config(learning_rate=0)


def test_recipes_do_not_share_what_can_be_changed() -> None:
    first = load_recipe("dtd-mae-vitb")
    before = json.dumps(first.as_dict())
    for changed in (first.options, first.sources, first.search, first.notes, first.search["learning_rate"]):
        changed.clear()
    dataset_facts().clear()
    assert json.dumps(load_recipe("dtd-mae-vitb").as_dict()) == before


# The released weights.


def released_at(path: Path) -> Recipe:
    return replace(load_recipe("dtd-mae-vitb"), weights_url=path.as_uri())


def test_weights_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there" / "weights.pth"
    there.parent.mkdir()
    there.write_bytes(random.Random(0).randbytes(300_000))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    got = fetch_weights(released_at(there))
    assert got == tmp_path / "hub" / "checkpoints" / "weights.pth" and got.read_bytes() == there.read_bytes()
    assert list(got.parent.iterdir()) == [got]
    there.unlink()
    assert fetch_weights(released_at(there)) == got
    with pytest.raises(CheckpointError):
        fetch_weights(released_at(there), tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no network"), RuntimeError("no network"), ConnectionError("no network")]
)
def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(url: str, target: str, **_: Any) -> None:
        Path(target).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    recipe = load_recipe("dtd-mae-vitb")
    with pytest.raises(CheckpointError) as caught:
        fetch_weights(recipe, tmp_path)
    sentence = str(caught.value)
    for word in (recipe.weights_url, "no network", "--checkpoint FILE", str(tmp_path)):
        assert word in sentence
    assert "\n" not in sentence and not list(tmp_path.iterdir())


def test_weights_that_nobody_released(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none were released .* --checkpoint FILE"):
        fetch_weights(load_recipe("dtd-mocov3-vitl"), tmp_path)
    with pytest.raises(InputError, match="timm downloads them, --pretrained"):
        fetch_weights(load_recipe("dtd-sup21k-vitl"), tmp_path)


# Numbers of a copy on disk.


def right(facts: DatasetFacts) -> dict[str, tuple[int, int]]:
    counts = {split: getattr(facts, split) for split in ("train", "val", "trainval", "test")}
    return {split: (count, facts.num_classes) for split, count in counts.items() if count is not None}


@pytest.mark.parametrize("name", dataset_facts())
def test_one_sentence_for_every_number_that_differs(name: str) -> None:
    facts = dataset_facts()[name]
    assert explain_counts(facts, right(facts)) == [] and explain_counts(facts, {}) == []
    rng = random.Random(name)
    for _ in range(20):
        found = right(facts)
        wrong = rng.sample(sorted(found), rng.randint(1, len(found)))
        for split in wrong:
            images, classes = found[split]
            found[split] = (max(1, images + rng.choice([-1, 1]) * rng.randint(1, images)), classes)
        differing = [split for split in found if found[split] != right(facts)[split]]
        sentences = explain_counts(facts, found)
        assert [sentence.split()[0] for sentence in sentences] == differing
        for split, sentence in zip(differing, sentences, strict=True):
            for number in (found[split][0], right(facts)[split][0]):
                assert f"{number:,}" in sentence
            assert facts.title in sentence and facts.counts_from in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("name", "found", "why"),
    [
        ("cub200", {"train": (5994, 200)}, ["these are train and val together, the 600 validation images"]),
        ("cub200", {"train": (5994, 200), "val": (600, 200)}, ["these are train and val together"]),
        (
            "cub200",
            {"train": (5395, 200), "val": (599, 200)},
            ["right 5,994, divided by another rule (the paper's"] * 2,
        ),
        (
            "flowers",
            {"train": (1836, 102), "val": (204, 102)},
            ["divided by another rule (the published lists"] * 2,
        ),
        (
            "cub200",
            {"train": (11788, 200)},
            ["all images of the data set, those of the test split among them"],
        ),
        ("cub200", {"train": (10609, 200), "val": (1179, 200)}, ["all 11,788 images of the data set"] * 2),
        ("cub200", {"trainval": (5994, 200), "test": (600, 200)}, ["this is the size of val"]),
        ("imagenet1k", {"train": (1281166, 1000)}, ["1 image (0.0%) is missing"]),
        ("cars", {"test": (8000, 196)}, ["41 images (0.5%) are missing"]),
        ("cars", {"test": (0, 196)}, ["8,041 images (100.0%) are missing"]),
        ("cars", {"test": (8042, 196)}, ["1 image too many"]),
        (
            "cars",
            {"train": (10800, 120), "val": (1200, 120), "test": (8580, 120)},
            ["numbers of Stanford Dogs"] * 4,
        ),
        ("flowers102", {"train": (1020, 102), "test": (6149, 102)}, ["numbers of Oxford Flowers"]),
        ("clevr_count", {"train": (800, 6)}, ["numbers of Clevr/distance or DMLab"]),
        ("clevr_count", {"train": (800, 6), "test": (15000, 6)}, ["numbers of Clevr/distance"]),
        (
            "svhn",
            {"train": (800, 11), "val": (200, 11)},
            ["one too many, as where labels are counted from 1"],
        ),
        ("caltech101", {"train": (800, 101)}, ["one is missing, as after"]),
        ("nabirds", {"train": (21536, 404)}, ["151 are missing"]),
        ("nabirds", {"train": (21536, 1011)}, ["456 too many"]),
        ("sun397", {"train": (800, 397), "val": (200, 150)}, []),
        ("sun397", {"val": (200, 398)}, ["one too many"]),
    ],
)
def test_explanations(name: str, found: dict[str, tuple[int, int]], why: list[str]) -> None:
    sentences = explain_counts(dataset_facts()[name], found)
    assert len(sentences) == len(why), sentences
    for sentence, words in zip(sentences, why, strict=True):
        assert words in sentence


def test_a_data_set_of_unknown_size_has_no_wrong_size() -> None:
    facts = DatasetFacts(name="x", title="X", num_classes=3, transform="vtab")
    assert explain_counts(facts, {"train": (5, 3), "val": (7, 3)}) == []
    half = replace(facts, train=9)
    (sentence,) = explain_counts(half, {"train": (5, 3), "val": (7, 3)})
    assert "4 images (44.4%) are missing" in sentence


def test_counts_that_cannot_be() -> None:
    facts = dataset_facts()["dtd"]
    with pytest.raises(InputError, match="'valid', expected train, val, trainval, test"):
        explain_counts(facts, {"valid": (1, 1)})
    with pytest.raises(InputError, match="at least 0"):
        explain_counts(facts, {"val": (-1, 47)})


# The command.


def called(*arguments: str) -> str:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(recipes)
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def words_of(text: str) -> set[str]:
    """Without the lines of tables."""
    return set(text.replace("│", " ").split())


def test_command_lists_names() -> None:
    assert json.loads(called("--json")) == recipe_names()
    assert {*dataset_facts(), *PRETRAININGS, *SIZES} <= words_of(called())


def test_command_shows_a_recipe() -> None:
    for name in ("sun397-mocov3-vith", "cub200-mae-vitb", "dogs-sup21k-vitl"):
        recipe = load_recipe(name)
        assert json.loads(called(name, "--json")) == recipe.as_dict()
        shown = called(name)
        assert f"spt-fast train --recipe {name} " in shown
        words = words_of(shown)
        for key in {*recipe.options, *recipe.search} - {"pretrained"}:
            assert key in words
        for note in recipe.notes:
            assert f"- {note}" in shown
    with pytest.raises(InputError, match="there is no recipe 'x'"):
        called("x")


def test_the_commands_it_shows_run_with_these_values(
    loaded: list[Recipe], write: Callable[..., Path]
) -> None:
    """Read as ``spt-fast train`` and ``spt-fast sweep`` read them."""
    called_there = {"num_workers": "workers", "transform": "recipe"}
    zeros = {"warmup_epochs": 0, "weight_decay": 0, "num_workers": 0, "compile": True, "prompt_dropout": 0.5}
    changed = with_changes(options={**OWN["options"], **zeros, "layers": "last", "min_learning_rate": 1e-5})
    file = write(changed)
    some = random.sample(loaded, 40)  # reading takes a while
    for recipe, typed in [*((each, each.name) for each in some), (load_recipe(file), str(file))]:
        for spt, command, *words in commands(recipe, typed):
            assert spt == "spt-fast"
            runs: Any = typer.main.get_command(spt_fast.cli.app).commands[command]
            read = runs.make_context(command, words).params
            for key, value in recipe.options.items():
                there = read[called_there.get(key, key)] if command == "train" else read.get(key, value)
                if command == "sweep" and isinstance(there, list):
                    assert there == recipe.search.get(key, [value]), key
                elif key == "warmup_epochs" and there is None:
                    assert value == recipe.options["epochs"] // 10
                elif command == "train":
                    assert there == (value if key != "pool" or value else "timm"), key
            unreleased = recipe.weights_url is None and not recipe.pretrained
            assert read["checkpoint"] == ("FILE" if unreleased else None)


def test_a_recipe_and_a_folder_of_images_are_enough() -> None:
    app: Any = typer.main.get_command(spt_fast.cli.app)
    for command, recipe, output in (
        ("train", "cub200-mae-vitb", "runs/cub200-mae-vitb"),
        ("sweep", "cub200-mae-vitb", "runs/cub200-mae-vitb-sweep"),
        ("vtab", "mae-vitb", "runs/vtab-mae-vitb"),
    ):
        words = ["--recipe", recipe, "--data", "d"]
        read = app.commands[command].make_context(command, list(words)).params
        assert read["model"] == "vit_base_patch16_224" and read["output"] == Path(output)
        read = app.commands[command].make_context(command, [*words, "--output", "here"]).params
        assert read["output"] == Path("here")


def test_what_is_typed_comes_before_the_recipe() -> None:
    train: Any = typer.main.get_command(spt_fast.cli.app).commands["train"]
    words = shlex.split("--recipe cub200-mae-vitb --data d --output o --lr 0.2 --epochs 30 --pool avg")
    read = train.make_context("train", words).params
    assert (read["learning_rate"], read["epochs"], read["pool"]) == (0.2, 30, "avg")
    assert (read["head_weight_decay"], read["batch_size"], read["warmup_epochs"]) == (0.5, 64, None)
    assert read["recipe"] == "fgvc"
