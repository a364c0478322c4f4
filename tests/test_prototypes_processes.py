"""build_prototypes and the prototypes command under torchrun: two processes with unequal shares find what one finds."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import two_prototype_processes
from command_line import TINY, files, make_photos
from forked_processes import finish, run_together, start
from tiny import tiny_backbone
from torch import Tensor
from two_prototype_processes import IMAGES, STREAM, make_streams_small, share

import spt_fast.prototype_clustering
from spt_fast import Prototypes, build_prototypes
from spt_fast.backbones import image_settings
from spt_fast.cli.inputs import open_backbone
from spt_fast.clustering import seeding
from spt_fast.data import load_dataset, make_loader, make_transform
from spt_fast.errors import InputError

PATCHES = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a first launch was killed in the middle, and a second one went to its end."""
    folder = tmp_path_factory.mktemp("two")
    photos = make_photos(folder / "photos", {"train": 5, "val": 1})
    (photos / "train" / "red" / "2.png").write_text("this is no image")
    _, killed = finish(start(two_prototype_processes.killed, folder, world_size=2))
    assert killed == -signal.SIGKILL
    assert (folder / "stream0").exists() and not (folder / "stream1").exists()
    run_together(two_prototype_processes.whole, folder, 2)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture
def small_streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = seeding.TOKENS_PER_CLUSTER, seeding.MOST_TOKENS
    module = spt_fast.prototype_clustering
    before_micro = module.MICRO_CLUSTERS, module.MICRO_CLUSTERS_PER_PROMPT
    make_streams_small()
    yield
    seeding.TOKENS_PER_CLUSTER, seeding.MOST_TOKENS = before
    module.MICRO_CLUSTERS, module.MICRO_CLUSTERS_PER_PROMPT = before_micro


def one_after_the_other(shares: list[list[Tensor]]) -> list[Tensor]:
    """As k-means counts the processes' images."""
    return [torch.cat([batch for own in shares for batch in own])]


def side_by_side(shares: list[list[Tensor]]) -> list[Tensor]:
    """As the processes' batches make the batches of a stream."""
    steps = max(map(len, shares))
    return [torch.cat([own[index] for own in shares if index < len(own)]) for index in range(steps)]


SHARES = [share(0), share(1)]


def check_equal(found: dict[str, Any], expected: dict[str, Any] | Prototypes) -> None:
    """To the last bit."""
    expected = expected if isinstance(expected, dict) else vars(expected)
    for name in ("values", "counts", "inertia"):
        assert torch.equal(found[name], expected[name]), name


def check_close(found: dict[str, Any], expected: Prototypes) -> None:
    """Up to sums in another order."""
    torch.testing.assert_close(found["values"], expected.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(found["counts"], expected.counts)
    torch.testing.assert_close(found["inertia"], expected.inertia, atol=0, rtol=1e-6)
    for name in ("images", "tokens"):
        assert found["metadata"][name] == expected.metadata[name]


def test_both_processes_end_with_the_same(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0].keys() == ranks[1].keys()
    for name, found in ranks[0].items():
        if isinstance(found, dict) and "values" in found:
            if found["counts"] is None:
                assert torch.equal(found["values"], ranks[1][name]["values"])
            else:
                check_equal(found, ranks[1][name])
            assert found["metadata"]["images"] == ranks[1][name]["metadata"]["images"]
        elif isinstance(found, dict):
            for number in found:
                check_equal(found[number], ranks[1][name][number])


def test_kmeans_is_that_of_one_process_with_all_images(ranks: list[dict[str, Any]]) -> None:
    job: dict[str, Any] = {"num_prompts": 4, "seed": 4}
    alone = build_prototypes(tiny_backbone(), one_after_the_other(SHARES), **job)
    assert alone.metadata["images"] == IMAGES and (alone.counts.sum(dim=1) == IMAGES * PATCHES).all()
    check_close(ranks[0]["kmeans"], alone)
    released = build_prototypes(tiny_backbone(), one_after_the_other(SHARES), capture="released", **job)
    check_close(ranks[0]["kmeans, released"], released)
    several = build_prototypes(tiny_backbone(), one_after_the_other(SHARES), **{**job, "num_prompts": [3, 6]})
    for number, each in several.items():
        check_close(ranks[0]["kmeans, several"][number], each)


def test_each_process_keeps_its_tokens_where_they_fit(ranks: list[dict[str, Any]]) -> None:
    name = "kmeans, kept differently"
    check_equal(ranks[0][name], ranks[0]["kmeans"])
    kept = [found[name]["metadata"]["tokens_kept"].split(":")[0] for found in ranks]
    assert kept == ["device memory", "nowhere"]
    assert ranks[1][name]["metadata"]["images"] == IMAGES


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_a_process_may_have_no_images(ranks: list[dict[str, Any]], depth: Any) -> None:
    backbone = tiny_backbone()
    kmeans = build_prototypes(backbone, share(0), num_prompts=4, seed=4, depth=depth)
    check_close(ranks[1][f"kmeans, {depth}, nothing in one"], kmeans)
    for rank, where in enumerate(("one", "the other")):
        stream = build_prototypes(backbone, share(rank), num_prompts=3, depth=depth, **STREAM)
        for each in ranks:
            check_close(each[f"stream, {depth}, nothing in {where}"], stream)


def test_a_stream_takes_in_the_batches_of_both(ranks: list[dict[str, Any]], small_streams: None) -> None:
    alone = build_prototypes(tiny_backbone(), side_by_side(SHARES), num_prompts=3, **STREAM)
    assert alone.metadata["images"] == IMAGES and (alone.counts.sum(dim=1) == IMAGES * PATCHES).all()
    check_close(ranks[0]["stream"], alone)
    several = build_prototypes(tiny_backbone(), side_by_side(SHARES), num_prompts=[3, 6], **STREAM)
    for number, each in several.items():
        check_close(ranks[0]["stream, several"][number], each)
        assert (each.counts.sum(dim=1) == IMAGES * PATCHES).all()


def test_a_killed_stream_goes_on_from_the_disk_of_the_first_process(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        check_equal(found["stream, resumed"], found["stream"])
        assert found["stream, resumed"]["metadata"]["images"] == IMAGES


def test_herding_takes_in_the_batches_of_both(ranks: list[dict[str, Any]]) -> None:
    for name, images in {"mmd": side_by_side(SHARES), "mmd, nothing in one": share(0)}.items():
        alone = build_prototypes(tiny_backbone(), images, num_prompts=4, seed=4, method="mmd")
        for found in ranks:
            torch.testing.assert_close(found[name]["values"], alone.values, atol=1e-4, rtol=1e-4)
            for fact in ("images", "tokens"):
                assert found[name]["metadata"][fact] == alone.metadata[fact]
            for fact in ("bandwidths", "squared_mmd"):
                assert found[name]["metadata"][fact] == pytest.approx(alone.metadata[fact], rel=1e-3)


def test_interrupted_kmeans_goes_on_from_the_disk_of_the_first_process(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    assert [found["kept"] for found in ranks] == [True, False]
    for found in ranks:
        check_equal(found["kmeans, resumed"], found["kmeans"])
    assert not [path for path in files(folder) if path.startswith(("kmeans0", "kmeans1", "stream"))]


def test_one_process_does_not_go_on_with_the_stream_of_two(tmp_path: Path, monkeypatch: Any) -> None:
    def interrupt(stage: str, done: int, total: int | None) -> None:
        if done > 4:
            raise KeyboardInterrupt

    job: dict[str, Any] = {**STREAM, "checkpoint": tmp_path / "unfinished", "checkpoint_minutes": 0}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("spt_fast.building.world", lambda: (0, 2))
        build_prototypes(tiny_backbone(), share(0), num_prompts=3, progress=interrupt, **job)
    with pytest.raises(InputError, match="was begun with processes=2 and this call asks for processes=1"):
        build_prototypes(tiny_backbone(), share(0), num_prompts=3, resume=True, **job)


def test_mistakes_are_the_same_sentence_in_both(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for method in ("kmeans", "minibatch_kmeans"):
            assert found[f"too few, {method}"] == (
                "there are 208 patch tokens, fewer than num_prompts=1000; use more images"
            )
            assert found[f"none, {method}"] == "images yields no image"


@pytest.mark.parametrize("method", ["kmeans", "minibatch_kmeans"])
def test_the_command_under_torchrun(
    ranks: list[dict[str, Any]], folder: Path, small_streams: None, method: Any
) -> None:
    (code, out, err), (other_code, other_out, other_err) = (each[f"command, {method}"] for each in ranks)
    assert code == other_code == 0, (err, other_err)
    assert not other_out and "prototypes skipped an unreadable image" in err
    result = json.loads(out)
    assert (result["images"], result["skipped"], result["tokens_per_block"]) == (14, 1, 14 * PATCHES)

    pairs = TINY[TINY.index("-k") : TINY.index("--device")][1::2]
    backbone = open_backbone("vit_tiny_patch16_224", None, False, pairs, "cpu", 0)
    transform = make_transform("fgvc", train=False, **image_settings(backbone))
    data = load_dataset(folder / "photos", "train", transform=transform)
    loaders = [make_loader(data, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    shares = [[images for images, _ in loader] for loader in loaders]
    images = one_after_the_other(shares) if method == "kmeans" else side_by_side(shares)
    found = Prototypes.load(folder / f"{method}.safetensors")
    check_close(vars(found), build_prototypes(backbone, images, num_prompts=3, method=method))
    assert (found.counts.sum(dim=1) == 14 * PATCHES).all()
