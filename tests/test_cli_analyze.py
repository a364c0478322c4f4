"""``spt-fast analyze``: its numbers are those of the library, its files are whole, its mistakes one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, TRAIN, check_refused, files, make_photos, run
from PIL import Image

from spt_fast import Adapter, Prototypes
from spt_fast.analysis import normalized_mutual_information
from spt_fast.analysis.pictures import patch_with_context
from spt_fast.analysis.prompt_sets import prompts_of_run
from spt_fast.backbones import image_settings
from spt_fast.data import load_dataset, make_transform
from spt_fast.tokens import layer_tokens

CHARTS = {f"{name}.{suffix}" for name in ("nmi", "cka", "mmd", "cluster_sizes") for suffix in ("png", "svg")}
# In the order of this seed, nine images come after the one that cannot be read.
LOOK = ["--device", "cpu", "--nearest", 3, "--seed", 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, one of which cannot be read, a run with snapshots, and prototypes for every block and for the first."""
    root = tmp_path_factory.mktemp("analyze")
    make_photos(root / "photos")
    (root / "photos/train/green/2.png").write_bytes(b"no image")
    for arguments in (
        ["train", "--output", root / "run", "--epochs", 2, "--snapshot-interval", 1, *TRAIN],
        ["prototypes", "--output", root / "deep.safetensors", "--num-prompts", 5],
        ["prototypes", "--output", root / "shallow.safetensors", "--num-prompts", 1, "--depth", "shallow"],
    ):
        done = run(*arguments, "--data", root / "photos", *TINY)
        assert done.code == 0, done.err
    return root


def analyze(folder: Path, *arguments: Any) -> Any:
    return run("analyze", "--data", folder / "photos", *arguments)


@pytest.fixture(scope="module")
def of_run(folder: Path) -> dict[str, Any]:
    done = analyze(folder, "--run", folder / "run", "--output", folder / "out", *LOOK, "--json")
    assert done.code == 0, done.err
    assert "skipped an unreadable image" in done.err
    assert done.json == json.loads((folder / "out/analysis.json").read_text())
    return done.json


def test_a_run_is_compared_from_its_start_to_its_end(folder: Path, of_run: dict[str, Any]) -> None:
    """Its tokens are judged by the library's functions on images that are read one by one."""
    assert files(folder / "out") == CHARTS | {
        "analysis.json",
        "nearest",
        *(f"nearest/block_0{i}.png" for i in (0, 1)),
    }
    assert [entry["name"] for entry in of_run["prompts"]] == ["epoch 0", "epoch 1", "epoch 2"]
    assert (of_run["images"], of_run["tokens_per_block"], of_run["skipped"]) == (11, 11 * 16, 1)
    adapter = Adapter.load(folder / "run/last.safetensors")
    torch.manual_seed(0)
    backbone = adapter.load_backbone()
    photos = load_dataset(
        folder / "photos", "train", transform=make_transform("vtab", train=False, **image_settings(backbone))
    )
    readable = {photos.describe(i): photos[i][0] for i in range(len(photos)) if photos[i] is not None}
    tokens = torch.stack(list(layer_tokens(backbone, torch.stack(list(readable.values()))).values()))
    first, last = of_run["prompts"][0], of_run["prompts"][2]
    start = Prototypes.load(folder / "run/prompts.safetensors").values
    for entry, prompts in ((first, start), (last, adapter.prompts)):
        expected = normalized_mutual_information(prompts, tokens.flatten(1, 2)).tolist()
        assert entry["nmi"] == pytest.approx(expected, abs=1e-6)
        assert [sum(counts) for counts in entry["tokens_of_prompts"]] == [11 * 16] * 2
    assert first["nmi"] != last["nmi"]

    # The patches shown are the nearest, and they stand where the record says they do.
    assert of_run["nearest"].keys() == {"epoch 2"}
    paths = list(readable)
    for block, of_block in enumerate(of_run["nearest"]["epoch 2"]):
        distances = (tokens[block] - adapter.prompts[block][:, None, None]).norm(dim=-1)
        for prompt, patches in enumerate(of_block):
            best = distances[prompt].min(dim=1).values.sort().values[:3].tolist()
            assert [patch["distance"] for patch in patches] == pytest.approx(best, abs=1e-4)
            for patch in patches:
                there = distances[prompt, paths.index(patch["image"]), 4 * patch["row"] + patch["column"]]
                assert patch["distance"] == pytest.approx(there.item(), abs=1e-4)


def test_the_same_call_writes_the_same_bytes(folder: Path, of_run: dict[str, Any]) -> None:
    (folder / "again/nearest").mkdir(parents=True)
    (folder / "again/nearest/block_07.png").write_bytes(b"of an earlier analysis")
    done = analyze(folder, "--run", folder / "run", "--output", folder / "again", *LOOK)
    assert done.code == 0 and "epoch 2" in done.out and "epoch 1" not in done.out, done
    assert files(folder / "again") == files(folder / "out")
    for name in files(folder / "out") - {"nearest"}:
        assert (folder / "again" / name).read_bytes() == (folder / "out" / name).read_bytes(), name


def test_a_patch_is_shown_in_the_middle_of_its_neighbours() -> None:
    pixels = torch.zeros(3, 16, 24)
    pixels[0, 4:8, 16:20] = 1  # row 1, column 4 of patches of 4 x 4
    inside = patch_with_context(pixels, 1, 4, (4, 4))
    middle, left = (inside.size[0] // 2, inside.size[1] // 2), (inside.size[0] // 6, inside.size[1] // 2)
    assert inside.getpixel(middle) == (255, 0, 0) and inside.getpixel(left) == (0, 0, 0)
    corner = patch_with_context(pixels, 0, 0, (4, 4))
    assert corner.getpixel(middle) == (0, 0, 0) and corner.getpixel(left) == (255, 255, 255)


def test_prototypes_of_all_blocks_and_of_the_first(folder: Path) -> None:
    output = folder / "prototypes"
    both = ["--prompts", folder / "deep.safetensors", "--prompts", folder / "shallow.safetensors"]
    done = analyze(folder, *both, "--output", output, "--images", 4, "--per", "image", *TINY, "--json")
    assert done.code == 0, done.err
    deep, shallow = done.json["prompts"]
    assert (deep["name"], deep["shape"], len(deep["nmi"])) == ("deep", [2, 5, 48], 2)
    assert (
        deep["tokens_of_prompts_when_built"] == Prototypes.load(folder / "deep.safetensors").counts.tolist()
    )
    assert shallow["nmi"] == [0] and len(shallow["cka"]) == len(shallow["cka"][0]) == 1
    assert deep["mmd"] is not None and shallow["mmd"] is None  # there is one prompt, and so no pair
    assert done.json["nearest"].keys() == {"shallow"} and files(output / "nearest") == {"block_00.png"}
    assert done.json["images"] <= 4 and done.json["nmi_per"] == "image"
    with Image.open(output / "nearest/block_00.png") as grid:
        assert grid.size[1] < 100  # a row for the one prompt

    alone = analyze(
        folder, "--prompts", folder / "shallow.safetensors", "--output", output, "--images", 4, *TINY
    )
    assert alone.code == 0 and not files(output) & {"mmd.png", "mmd.svg"}, alone.err


def test_mistakes_are_one_sentence(folder: Path) -> None:
    last = folder / "run/last.safetensors"
    rest = ["--output", folder / "never"]

    def refuse(*arguments: Any, code: int = 1, words: str) -> None:
        check_refused(analyze(folder, *arguments, *rest), words, code=code)

    refuse(code=2, words="name --adapter, --prompts or --run")
    refuse("--prompts", folder / "deep.safetensors", code=2, words="--prompts needs --model")
    refuse("--adapter", last, *TINY, code=2, words="an adapter knows its backbone")
    refuse("--adapter", last, "--adapter", last, words="was given 2 times")
    refuse("--adapter", folder / "deep.safetensors", words="is not an adapter")
    refuse("--run", folder / "photos", words="holds no training run")
    (folder / "half").mkdir()
    (folder / "half/last.safetensors").write_bytes(last.read_bytes())
    refuse("--run", folder / "half", words="half/metrics.csv does not exist")
    (folder / "half/metrics.csv").write_text("epoch,train_loss\n")
    refuse("--run", folder / "half", words="is not the table of a run's epochs")
    (folder / "other.safetensors").write_bytes((folder / "deep.safetensors").read_bytes())
    wide = [*TINY[:2], "-k", "img_size=32", "-k", "patch_size=8", "-k", "depth=2", "--device", "cpu"]
    refuse("--prompts", folder / "other.safetensors", *wide, words="other must be [2, P, 192]")
    assert not (folder / "never").exists()


def test_methods_without_prompts_and_other_backbones_are_refused(folder: Path) -> None:
    last = folder / "run/last.safetensors"
    shared = ["--pool", "avg", "--batch-size", 4, "--dtype", "float32", "--recipe", "vtab", "--epochs", 1]
    for name, own in (("linear", ["--method", "linear"]), ("elsewhere", ["--seed", 1])):
        done = run("train", "--data", folder / "photos", "--output", folder / name, *shared, *own, *TINY)
        assert done.code == 0, done.err
    linear = analyze(folder, "--adapter", folder / "linear/last.safetensors", "--output", folder / "never")
    check_refused(linear, "an adapter of linear, which has no prompts to look at")
    (folder / "elsewhere.safetensors").write_bytes((folder / "elsewhere/last.safetensors").read_bytes())
    two = ["--adapter", last, "--adapter", folder / "elsewhere.safetensors"]
    check_refused(
        analyze(folder, *two, "--output", folder / "never"), "elsewhere.safetensors", "another backbone"
    )


def test_a_run_without_snapshots_has_a_start_and_an_end(folder: Path, tmp_path: Path) -> None:
    """Also one that was interrupted: its last adapter is that of the last epoch in its table."""
    for name in ("prompts.safetensors", "last.safetensors"):
        (tmp_path / name).write_bytes((folder / "run" / name).read_bytes())
    table = (folder / "run/metrics.csv").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.csv").write_text("".join(table[:2]))
    start, end = prompts_of_run(tmp_path)
    assert (start.name, start.epoch, end.name, end.epoch) == ("epoch 0", 0, "epoch 1", 1)
    assert torch.equal(start.values, Prototypes.load(tmp_path / "prompts.safetensors").values)
    assert torch.equal(end.values, Adapter.load(tmp_path / "last.safetensors").prompts)
    assert start.counts is not None and end.counts is None
