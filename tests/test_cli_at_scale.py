"""``spt-fast train`` with all that keeps it fed and fast: the same adapter every way, and warnings that explain."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from command_line import TINY, TRAIN, check_equal, check_refused, environment, last, make_photos, run

from spt_fast import Prototypes

COUNTS = {"train": 5, "val": 2, "test": 3}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos", COUNTS)


@pytest.fixture(scope="module")
def straight(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without any of it, with random crops."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    done = run(
        "train", *TINY, *TRAIN, "--recipe", "fgvc", "--data", photos, "--epochs", 2, "--output", output
    )
    assert done.code == 0, done.err
    return output


def train_words(data: Path, output: Path, *more: object) -> list[object]:
    words = ["train", *TINY, *TRAIN, "--recipe", "fgvc", "--data", data, "--epochs", 2, "--output", output]
    return [*words, *more]


def test_images_are_decoded_once_for_all_runs(
    photos: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    done = run(*train_words(photos, tmp_path / "first", "--image-cache", cache, "--json"))
    assert done.code == 0, done.err
    assert 0 <= done.json["data_wait"] <= 1
    assert (
        json.loads((tmp_path / "first" / "summary.json").read_text())["data_wait"] == done.json["data_wait"]
    )
    shards = {path: path.read_bytes() for path in cache.rglob("*.safetensors")}
    assert len(shards) == 3  # to train on, to look at for prototypes, to validate on

    def refuse(path: object) -> None:
        raise AssertionError(f"{path} was decoded again")

    monkeypatch.setattr("spt_fast.data.dataset.read_image", refuse)
    done = run(*train_words(photos, tmp_path / "second", "--image-cache", cache, "--workers", 0))
    assert done.code == 0, done.err
    assert {path: path.read_bytes() for path in cache.rglob("*.safetensors")} == shards
    for name in ("first", "second"):
        check_equal(last(tmp_path / name), last(straight))


def test_a_damaged_cache_is_made_again(photos: Path, straight: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert run(*train_words(photos, tmp_path / "first", "--image-cache", cache)).code == 0
    shards = {path: path.read_bytes() for path in cache.rglob("*.safetensors")}
    for path, content in shards.items():
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    done = run(*train_words(photos, tmp_path / "second", "--image-cache", cache))
    assert done.code == 0, done.err
    assert done.err.count("checksum is wrong; it is made again") == 3 and str(cache) in done.err
    assert {path: path.read_bytes() for path in cache.rglob("*.safetensors")} == shards
    check_equal(last(tmp_path / "second"), last(straight))


def test_tar_shards_are_read_where_they_lie(photos: Path, tmp_path: Path) -> None:
    """The photos as WebDataset shards train, and the adapter judges them as it judges the folder."""
    shards = tmp_path / "shards"
    shards.mkdir()
    classes = sorted(path.name for path in (photos / "train").iterdir())
    (shards / "classes.txt").write_text("\n".join(classes) + "\n")
    for split in COUNTS:
        pictures = sorted((photos / split).glob("*/*.png"))
        for number in range(2):
            with tarfile.open(shards / f"{split}-{number}.tar", "w") as archive:
                for index, path in enumerate(pictures[number::2]):
                    label = str(classes.index(path.parent.name)).encode()
                    for suffix, content in ((".png", path.read_bytes()), (".cls", label)):
                        member = tarfile.TarInfo(f"{index:04d}{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    done = run(*train_words(shards, tmp_path / "run", "--json"))
    assert done.code == 0, done.err
    judged = [
        run(
            "eval",
            "--adapter",
            tmp_path / "run" / "last.safetensors",
            "--data",
            data,
            "--split",
            "test",
            "--json",
        )
        for data in (shards, photos)
    ]
    assert [each.json["images"] for each in judged] == [9, 9], judged
    assert judged[0].json["accuracy"] == judged[1].json["accuracy"]
    assert judged[0].json["loss"] == pytest.approx(judged[1].json["loss"], rel=1e-6)


def test_a_recipe_of_ones_own(photos: Path, straight: Path, tmp_path: Path) -> None:
    """Its values are the defaults, what is typed comes first, and what is on disk is compared with what it says."""
    recipe = {
        "name": "photos",
        "dataset": {
            "name": "photos",
            "title": "Coloured photos",
            "num_classes": 4,
            "transform": "fgvc",
            "train": 21,
            "val": 6,
            "test": 9,
        },
        "model": "vit_tiny_patch16_224",
        "pool": "avg",
        "options": {"num_prompts": 4, "batch_size": 4, "epochs": 7, "dtype": "float32", "learning_rate": 0.5},
        "search": {"learning_rate": [0.5, 0.05]},
    }
    file = tmp_path / "photos.yaml"
    file.write_text(yaml.safe_dump(recipe))
    words = ["--recipe", file, *TINY[2:], "--data", photos, "--checkpoint", tmp_path / "missing.pth"]
    check_refused(run("train", *words, "--output", tmp_path / "no"), "missing.pth")
    words = ["--recipe", file, "--model", "vit_tiny_patch16_224", *TINY[2:], "--data", photos]
    done = run("train", *words, "--output", tmp_path / "run", "--epochs", 2, "--lr", 0.03)
    assert done.code == 0, done.err
    check_equal(last(tmp_path / "run"), last(straight))
    for words in ("train has 15 images where", "21", "6 images", "the recipe says 4 for"):
        assert words in done.err, done.err
    assert "to a search" not in done.err
    words = [
        "--recipe",
        file,
        *TINY[2:],
        "--data",
        photos,
        "--prompts",
        tmp_path / "run" / "prompts.safetensors",
    ]
    done = run("train", *words, "--model", "vit_tiny_patch16_224", "--output", tmp_path / "b", "--epochs", 1)
    assert done.code == 0 and "photos leaves learning_rate to a search" in done.err, done.err
    assert "val has" not in done.err and "test has" not in done.err
    without = run("train", "--recipe", file, *TINY[2:], "--data", photos, "--output", tmp_path / "none")
    check_refused(without, "photos: its weights were not released; --checkpoint names yours")


def test_two_processes_with_a_backbone_in_shards(photos: Path, tmp_path: Path) -> None:
    """One command line; the steps of two processes with four images each are those of one with eight."""
    alone = train_words(photos, tmp_path / "alone", "--method", "uniform", "--batch-size", 8)
    assert run(*alone).code == 0
    more = ["--method", "uniform", "--shard-backbone", "--image-cache", tmp_path / "cache", "--resume"]
    words = map(str, train_words(photos, tmp_path / "shards", *more))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "spt_fast.cli", *words, "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "shards")
    ours, expected = last(tmp_path / "shards"), last(tmp_path / "alone")
    start = Prototypes.load(tmp_path / "alone" / "prompts.safetensors").values
    assert (expected["prompts"] - start).abs().max() > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_shards_and_8_bit_weights_do_not_go_together(photos: Path, tmp_path: Path) -> None:
    words = train_words(photos, tmp_path / "run", "--shard-backbone", "--weight-dtype", "int8")
    check_refused(run(*words), "--shard-backbone and --weight-dtype do not go together")
    check_refused(run(*train_words(photos, tmp_path / "run", "--shard-backbone")), "there is no group")
