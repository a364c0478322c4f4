"""Ablations: judged by doing the same by hand, interrupted, gone on with, in one process and in several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from command_line import TINY, check_refused, make_photos, run
from safetensors.torch import save_file
from training_cases import read_csv

import spt_fast.ablations.running
from spt_fast import Adapter, TrainingConfig, build_prototypes, evaluate, load_backbone, train
from spt_fast.ablations import ABLATIONS, Choices, ModelSource, Workplace, run_ablation
from spt_fast.ablations.definitions import STARTS, TITLES, WITH_VALUES
from spt_fast.ablations.runs import Run, execute
from spt_fast.ablations.splits import HELD_OUT, usual_choose_split, usual_test_split
from spt_fast.ablations.workplace import open_backbone, open_images
from spt_fast.analysis import normalized_mutual_information
from spt_fast.building import Method as Start
from spt_fast.cli.ablate import Name
from spt_fast.data import make_loader
from spt_fast.errors import InputError
from spt_fast.methods import METHODS, build_model
from spt_fast.tokens import layer_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
CONFIG = TrainingConfig(epochs=2, warmup_epochs=0, batch_size=4, dtype="float32", num_workers=0)
SHORT = ["--pool", "avg", "--epochs", "1", "--batch-size", "8", "--dtype", "float32", "--workers", "0"]
SECONDS = ("prototype_seconds_mean", "prototype_seconds_std", "train_seconds_mean", "train_seconds_std")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("ablations") / "photos")


def workplace(photos: Path, output: Path, **changes: Any) -> Workplace:
    source = ModelSource("vit_tiny_patch16_224", kwargs=json.dumps(KWARGS))
    common: dict[str, Any] = {"models": (source,), "data": (str(photos),), "output": output, "config": CONFIG}
    return Workplace(**{**common, "pool": "avg", "recipe": "vtab", "device": "cpu", **changes})


def cells(output: Path) -> list[dict[str, Any]]:
    """The cells of a table without what differs from run to run."""
    found = json.loads((output / "table.json").read_text())["cells"]
    return [{name: value for name, value in cell.items() if name not in SECONDS} for cell in found]


# What is found.


def test_a_run_is_what_one_does_by_hand(photos: Path, tmp_path: Path) -> None:
    place = workplace(photos, tmp_path / "ablation")
    variants = ABLATIONS["sampling"](Choices(num_prompts=3)).variants
    variant = next(each for each in variants if (each.row, each.column) == ("K-means", "learnable"))
    outcome = execute(place, Run(variant, 0.02, 5, "test"))
    backbone = open_backbone(place)
    training, looking = (open_images(place, "train", augmented=each) for each in (True, False))
    loader = make_loader(looking, batch_size=32, shuffle=True, seed=5)
    start = build_prototypes(backbone, loader, num_prompts=3, seed=5)
    torch.manual_seed(5)
    model = build_model("spt_deep", backbone, num_classes=3, prompts=start, pool="avg")
    train(model, training, output=tmp_path / "hand", config=replace(CONFIG, learning_rate=0.02, seed=5))
    assert outcome["accuracy"] == evaluate(model, open_images(place, "test")).accuracy
    assert outcome["train_images"] == 12 and outcome["judged_images"] == 9
    assert outcome["largest_class"] == outcome["smallest_class"] == 4
    assert outcome["trainable_parameters"] == 2 * 3 * 48 + 49 * 3
    theirs, ours = (
        Adapter.load(folder / "last.safetensors")
        for folder in (tmp_path / "hand", place.output / "runs" / variant.name / "lr=0.02,seed=5,test")
    )
    assert theirs.prompts is not None and ours.prompts is not None
    assert torch.equal(theirs.prompts, ours.prompts) and torch.equal(theirs.head_weight, ours.head_weight)
    counts = start.counts.double().numpy()
    shares = counts / counts.sum(axis=1, keepdims=True)
    expected = np.exp(-(shares * np.log(shares)).sum(axis=1))
    assert outcome["clusters_by_block"] == pytest.approx(expected.tolist(), rel=1e-12)


def test_the_nmi_of_every_epoch_is_that_of_its_prompts(photos: Path, tmp_path: Path) -> None:
    place = workplace(photos, tmp_path)
    variant = ABLATIONS["nmi"](Choices(num_prompts=3)).variants[0]
    one = Run(variant, 0.05, 0, "test")
    outcome = execute(place, one)
    images = torch.stack([open_images(place, "train")[index][0] for index in range(12)])
    tokens = layer_tokens(open_backbone(place), images)
    assert len(outcome["nmi_by_epoch"]) == 1 + CONFIG.epochs
    for epoch, by_block in enumerate(outcome["nmi_by_block"]):
        file = one.folder(place) / "snapshots" / f"epoch-{epoch:04d}.safetensors"
        prompts = Adapter.load(file).prompts
        assert prompts is not None
        for block, nmi in enumerate(by_block):
            of_block = tokens[block].flatten(0, 1).double()
            expected = normalized_mutual_information(prompts[block].double(), of_block)
            assert nmi == pytest.approx(expected.item(), rel=1e-9)
        assert outcome["nmi_by_epoch"][epoch] == pytest.approx(np.mean(by_block), rel=1e-12)
    assert outcome["nmi_by_epoch"][0] != outcome["nmi_by_epoch"][-1]


# The command: a table that is the same however often it was interrupted.


def test_a_command_goes_on_in_several_processes_and_refuses_another_experiment(
    photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "lengths"
    command = ["ablate", "prompt-length", *TINY, "--data", photos, "--output", output, *SHORT]
    command += ["--recipe", "vtab", "--num-prompts", 2, "--num-prompts", 3, "--seeds", 2, "--json"]
    done = run(*command)
    assert done.code == 0, done.err
    found = done.json["cells"]
    assert [(cell["row"], cell["column"]) for cell in found] == [
        (row, column) for column in ("SPT-Deep", "VPT-Deep") for row in ("2", "3")
    ]
    assert all(cell["runs"] == 2 and len(cell["accuracies"]) == 2 for cell in found)
    assert all(cell["learning_rate"] == METHODS["spt_deep"].learning_rate for cell in found)
    assert len(read_csv(output / "table.csv")) == 4
    first, pictures = cells(output), [(output / f"figure.{kind}").read_bytes() for kind in ("png", "svg")]
    outcomes = sorted(output.glob("runs/*/*/outcome.json"))
    assert len(outcomes) == 8 and not list(output.rglob("checkpoint.pt"))
    # One run was never finished, and its prototypes are gone as well.
    outcomes[0].unlink()
    times = {file: file.stat().st_mtime_ns for file in outcomes[1:]}
    for file in output.glob("prototypes/*"):
        file.unlink()
    assert run(*command, "--jobs", 2).code == 0
    assert cells(output) == first
    assert [(output / f"figure.{kind}").read_bytes() for kind in ("png", "svg")] == pictures
    assert {file: file.stat().st_mtime_ns for file in outcomes[1:]} == times
    check_refused(run(*command, "--epochs", 2), "config.epochs=1", "config.epochs=2", "name another folder")
    assert cells(output) == first


def test_a_small_set_of_methods_has_the_shape_of_the_papers_table(photos: Path, tmp_path: Path) -> None:
    command = ["ablate", "few-shot", *TINY, "--data", photos, "--output", tmp_path, *SHORT, "--seeds", 1]
    done = run(*command, "--recipe", "vtab", "--values", "1,2", "--num-prompts", 2)
    assert done.code == 0, done.err
    assert "one seed" in done.out
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2] == "| images a class |  | accuracy | mean of classes | effective clusters | base rate |"
    places = [tuple(line.split(" | ")[:2]) for line in lines[4:10]]
    assert places == [(f"| {shots}", name) for name in ("SPT-Deep", "VPT-Deep", "Linear") for shots in (1, 2)]
    # Only prototypes of clustering have clusters.
    clusters = [line.split(" | ")[4] for line in lines[4:10]]
    assert all(1 <= float(each) <= 2 for each in clusters[:2]) and clusters[2:] == [""] * 4
    images = {
        cell["row"]: cell["train_images_mean"] for cell in cells(tmp_path) if "train_images_mean" in cell
    }
    assert not images  # shown only where it is what differs
    outcomes = [json.loads(file.read_text()) for file in tmp_path.glob("runs/*/*/outcome.json")]
    assert sorted({outcome["train_images"] for outcome in outcomes}) == [3, 6]
    assert "paper" not in lines[2]


# Learning rates.


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Runs in the order they are made; accuracies are made up: SPT is best at 0.1, VPT at 0.01, linear diverges."""
    made: list[Run] = []

    def pretend(place: Workplace, one: Run) -> dict[str, Any]:
        made.append(one)
        best = {"spt_deep": 0.1, "vpt_deep": 0.01}.get(one.variant.method)
        if best is None or one.learning_rate == 1.0:
            outcome: dict[str, Any] = {"failure": "the training loss is no longer finite"}
        else:
            accuracy = (0.8 if one.learning_rate == best else 0.5) + one.seed / 100
            outcome = {"accuracy": accuracy, "train_seconds": 1.0}
        one.folder(place).mkdir(parents=True)
        (one.folder(place) / "outcome.json").write_text(json.dumps(outcome))
        return outcome

    monkeypatch.setattr(spt_fast.ablations.running, "execute", pretend)
    monkeypatch.setattr(spt_fast.ablations.running, "build_start", lambda *_: {})
    return made


def test_each_variant_is_judged_at_its_own_best_rate(
    photos: Path, tmp_path: Path, pretended: list[Run]
) -> None:
    place = workplace(photos, tmp_path, choose_split="val")
    ablation = ABLATIONS["few-shot"](Choices(values=(1,)))
    rates = (1.0, 0.1, 0.01)
    finished = run_ablation(ablation, place, seeds=(0, 4), learning_rates=rates)
    assert [each.learning_rate for each in finished] == [0.1, 0.01, None]
    assert finished[0].tried == {1.0: None, 0.1: 0.8, 0.01: 0.5}
    chosen = [(one.variant.method, one.learning_rate, one.seed) for one in pretended if one.part == "choose"]
    assert chosen == [(variant.method, rate, 0) for variant in ablation.variants for rate in rates]
    tested = [(one.variant.method, one.learning_rate, one.seed) for one in pretended if one.part == "test"]
    assert tested == [
        ("spt_deep", 0.1, 0),
        ("spt_deep", 0.1, 4),
        ("vpt_deep", 0.01, 0),
        ("vpt_deep", 0.01, 4),
    ]
    assert [outcome["accuracy"] for outcome in finished[1].outcomes] == pytest.approx([0.8, 0.84])
    pretended.clear()
    run_ablation(ablation, place, seeds=(0, 4, 5), learning_rates=rates)
    assert [(one.seed, one.part) for one in pretended] == [(5, "test")] * 2


def test_variants_that_are_the_same_share_their_runs(
    photos: Path, tmp_path: Path, pretended: list[Run]
) -> None:
    ablation = ABLATIONS["layers"](Choices())
    finished = run_ablation(ablation, workplace(photos, tmp_path), seeds=(0,))
    assert len(finished) == 8 and len(pretended) == 7  # shallow: first = same


def test_nothing_is_chosen_on_what_is_judged(photos: Path, tmp_path: Path) -> None:
    ablation = ABLATIONS["few-shot"](Choices(values=(1,)))
    with pytest.raises(InputError, match="2 learning rates need images to choose on"):
        run_ablation(ablation, workplace(photos, tmp_path), learning_rates=(1.0, 0.1))
    assert usual_test_split(str(photos), "auto") == "test"
    other = make_photos(tmp_path / "two", {"train": 4, "val": 2})
    assert usual_test_split(str(other), "auto") == "val"
    assert usual_choose_split("train", "test") == "val"
    for split, test_split in (("train", "val"), ("trainval", "test"), ("val", "test"), ("test", "trainval")):
        assert usual_choose_split(split, test_split) == HELD_OUT
    for most, kept, held in ((2, 2, 2), (3, 3, 1), (None, 3, 1)):
        place = workplace(other, tmp_path, test_split="val", choose_split=HELD_OUT, images_per_class=most)
        parts = {part: open_images(place, part) for part in ("train", "choose", "test")}
        files = {part: {str(source) for source, _ in images.samples} for part, images in parts.items()}
        assert [len(parts[part]) for part in ("train", "choose", "test")] == [3 * kept, 3 * held, 6]
        assert not files["train"] & files["choose"] and not files["train"] & files["test"]
        assert {"train" in file for file in files["choose"]} == {True}
    with pytest.raises(InputError, match="too few to choose learning rates"):
        open_images(replace(place, images_per_class=4), "choose")


def test_rates_are_chosen_on_images_held_out_where_val_has_another_use(
    photos: Path, tmp_path: Path, pretended: list[Run]
) -> None:
    command = ["ablate", "few-shot", *TINY, "--data", photos, *SHORT, "--lrs", "0.1,0.01", "--values", "1"]
    for name, options, judged in (("a", ["--split", "trainval"], 9), ("b", ["--test-split", "val"], 6)):
        done = run(*command, *options, "--seeds", 1, "--output", tmp_path / name)
        assert done.code == 0, done.err
        assert "best on the training images held out" in done.out
        assert ("The variants are not judged on test images: the val images stand for them." in done.out) == (
            name == "b"
        )
        record = json.loads((tmp_path / name / "ablation.json").read_text())["data"]
        assert record["0/test"]["images"] == judged and "held out" in record["0/choose"]["name"]
    assert {one.part for one in pretended} == {"choose", "test"}


def test_one_architecture_with_two_checkpoints_has_two_rows(
    photos: Path, tmp_path: Path, pretended: list[Run]
) -> None:
    for seed, name in enumerate(("mae", "moco")):
        torch.manual_seed(seed)
        save_file(
            load_backbone("vit_tiny_patch16_224", **KWARGS).state_dict(), tmp_path / f"{name}.safetensors"
        )
    weights = [tmp_path / f"{name}.safetensors" for name in ("mae", "moco")]
    command = ["ablate", "model-size", *TINY, *TINY[:2], "--data", photos, *SHORT, "--seeds", 1]
    command += ["--output", tmp_path / "sizes", "--checkpoint", weights[0], "--checkpoint", weights[1]]
    done = run(*command)
    assert done.code == 0, done.err
    rows = [line.split(" | ")[0] for line in (tmp_path / "sizes" / "table.md").read_text().splitlines()[4:6]]
    assert rows == [f"| vit_tiny_patch16_224, {name}.safetensors" for name in ("mae", "moco")]
    assert len({cell["backbone"] for cell in cells(tmp_path / "sizes")}) == 2 and len(pretended) == 4


# What is asked for.


def test_the_command_knows_all_ablations() -> None:
    assert get_args(Name) == tuple(ABLATIONS) and set(WITH_VALUES) < set(ABLATIONS)
    assert set(get_args(Start)) - set(STARTS) == {"minibatch_kmeans"}  # as kmeans, for more tokens
    assert set(TITLES) == set(METHODS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_variants_of_a_column_differ_in_one_thing(name: str) -> None:
    ablation = ABLATIONS[name](Choices(data=("a", "b"), models=("s", "m")))
    free = {
        "sampling": {"init", "method"},  # a uniform start is VPT
        "layers": {"layers", "init", "method"},
        "cross-task": {"start_data"},
        "prompt-length": {"num_prompts"},
        "prototype-fraction": {"data_fraction"},
        "model-size": {"backbone"},
        "methods": {"method", "init", "num_prompts"},
        "nmi": {"method", "init"},
    }.get(name, {"subset"})
    for column in {variant.column for variant in ablation.variants}:
        own = [variant for variant in ablation.variants if variant.column == column]
        assert len({variant.row for variant in own}) == len(own)
        differing = {
            key for key in own[0].settings for variant in own if variant.settings[key] != own[0].settings[key]
        }
        assert differing and differing <= free, (name, column, differing)
