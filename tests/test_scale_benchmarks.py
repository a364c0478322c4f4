"""Benchmarks of training at scale, at sizes that take seconds: what is recorded, and that who is wrong has no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_benchmarks import TINY, peers, results
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import command, end_to_end, imagenet_stream, large_model, prototypes
from benchmarks.ceilings import Ceilings
from benchmarks.naming import title
from benchmarks.page import page
from benchmarks.readme import measured_section
from benchmarks.record import Record
from spt_fast import PromptedViT, build_prototypes, load_backbone

PHOTOS = ("--images", "22", "--classes", "3", "--height", "40", "--width", "50", "--workers", "1")
ON_THE_WAY = (*PHOTOS, "--batch-size", "8", "--num-prompts", "3", "--epochs", "3", "--rounds", "2")
LARGE = ("--depth", "3", "--embed-dim", "48", "--num-heads", "3", "--batch-size", "3", "--rounds", "1")
STREAM = ("--batch-size", "16", "--num-prompts", "3")
ALL = [(end_to_end, ON_THE_WAY), (large_model, LARGE), (imagenet_stream, STREAM)]


@pytest.fixture(autouse=True)
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some, without the seconds that it takes to measure them."""
    some = Ceilings(copy=3e10, read=3e10, matmul={"float32": 2e11, "bfloat16": 4e11}, samples={})
    monkeypatch.setattr(command, "measure_ceilings", lambda device: some)


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of the CPU's own; 16 patches."""
    arguments = {"img_size": 32, "patch_size": 8, "depth": 2}
    monkeypatch.setitem(prototypes.MODELS, "cpu", (TINY, arguments, 16))
    return arguments


@pytest.fixture
def wrong_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all prompted ViTs: they are sure of the first class."""
    real = PromptedViT.forward

    def forward(model: PromptedViT, images: Tensor) -> Tensor:
        logits = real(model, images)
        return logits + 30 * torch.eye(logits.shape[1])[0]

    monkeypatch.setattr(PromptedViT, "forward", forward)


def check_shown(record: dict[str, Any]) -> None:
    """The page and the README can show it."""
    name = title(record["benchmark"])
    assert name in page([record]).replace("&#x27;", "'") and name in measured_section([record], {})


def reasons(record: dict[str, Any]) -> dict[str, str]:
    return {row["peer"]: row["reason"] for row in record["rows"] if row["kind"] == "missing"}


# From files to an adapter


@pytest.mark.parametrize("compiled", [False, True])
def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    # What it does about compiled steps (padding, settings) is tried without the minute that compiling takes.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    record = results(end_to_end, tmp_path, *ON_THE_WAY, *(["--compile"] if compiled else []))
    assert record["settings"] == {"rounds": 2, "compile": compiled}
    (first,) = peers(record, **{"pass": "prototypes"}).values()
    assert first["kind"] == "measured" and len(first["seconds"]) == 1
    assert first["seconds"][0] == pytest.approx(first["decoding_seconds"] + first["clustering_seconds"])

    epochs = peers(record, **{"pass": "training epoch"})
    assert list(epochs) == [end_to_end.TRAINING, end_to_end.ALONE]
    trained, alone = epochs.values()
    assert len(trained["seconds"]) == len(alone["seconds"]) == 2
    assert 0 <= trained["data_wait"] <= 1 and (trained["compile_seconds"] is not None) == compiled
    (step,) = peers(record, **{"pass": "training step"}).values()
    assert step["peer"] == ("spt-fast, compiled" if compiled else "spt-fast") and len(step["seconds"]) == 5
    # 8 + 8 + 6 images are 22 / 8 batches, but for what is done once a step.
    operations = [row["limit"]["operations"] for row in (trained, alone, step)]
    assert operations[0] == operations[1] == pytest.approx(22 / 8 * operations[2], rel=0.02)

    (whole,) = peers(record, **{"pass": "all"}, epochs=3).values()
    before = whole["seconds"][0] - trained["first_epoch_seconds"] - sum(trained["seconds"])
    assert before > first["seconds"][0]  # the images that are trained on are decoded as well
    (hundred,) = peers(record, **{"pass": "all"}, epochs=100).values()
    assert hundred["kind"] == "extrapolated" and len(hundred["measured"]) == 3
    each = sum(trained["seconds"]) / 2
    assert hundred["value_seconds"] == pytest.approx(whole["seconds"][0] + 97 * each)
    check_shown(record)


def test_an_epoch_alone_has_the_batches_of_the_epoch() -> None:
    for images, batch_size in ((22, 8), (16, 8), (3, 8)):
        slow = [len(part) for part in torch.arange(images).split(batch_size)]
        assert list(end_to_end.batch_sizes(images, batch_size)) == slow


def test_photos_are_always_the_same_in_folders_of_their_classes(tmp_path: Path) -> None:
    sizes = end_to_end.Sizes(images=7, classes=3, height=20, width=30, batch_size=4, epochs=2)
    contents = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        end_to_end.write_photos(folder, sizes, workers)
        contents.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jpg")})
    assert contents[0] == contents[1] and len(set(contents[0].values())) == 7
    assert {path.parts[0] for path in contents[0]} == {"0000", "0001", "0002"}


def test_bad_clusters_have_no_time_and_nothing_is_trained_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any, **options: Any) -> Any:
        built = build_prototypes(*arguments, **options)
        built.values.mul_(10)
        return built

    monkeypatch.setattr(end_to_end, "build_prototypes", build)
    record = results(end_to_end, tmp_path, *ON_THE_WAY)
    (reason,) = reasons(record).values()
    assert "worse than scikit-learn" in reason and len(record["rows"]) == 1


@pytest.mark.parametrize("what", ["pixels", "images"])
def test_other_images_have_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    real = end_to_end.first_batch

    def first_batch(*arguments: Any) -> tuple[Tensor, Tensor]:
        images, labels = real(*arguments)
        return (images + 0.02, labels) if what == "pixels" else (images, labels.flip(0))

    monkeypatch.setattr(end_to_end, "first_batch", first_batch)
    record = results(end_to_end, tmp_path, *ON_THE_WAY)
    assert f"feeds other {what}" in reasons(record)[end_to_end.TRAINING]
    assert [row["kind"] for row in record["rows"]] == ["measured", "missing"]


@pytest.mark.usefixtures("wrong_logits")
def test_wrong_steps_have_no_time(tmp_path: Path) -> None:
    found = reasons(results(end_to_end, tmp_path, *ON_THE_WAY))
    assert list(found) == [end_to_end.ALONE, "spt-fast"]
    assert all("computes something else" in reason for reason in found.values())


def test_what_was_measured_stays_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = end_to_end.measure_prototypes

    def measure_prototypes(record: Record, *arguments: Any) -> Any:
        found = real(record, *arguments)
        record._deadline = 0.0
        return found

    monkeypatch.setattr(end_to_end, "measure_prototypes", measure_prototypes)
    done = CliRunner().invoke(
        end_to_end.app, ["--device", "cpu", *ON_THE_WAY, "--results", str(tmp_path), "--minutes", "9"]
    )
    assert done.exit_code == 0 and "incomplete" in done.output
    (file,) = tmp_path.iterdir()
    assert file.name.endswith("-end_to_end-partial.json")
    assert [row["case"]["pass"] for row in json.loads(file.read_text())["rows"]] == ["prototypes"]


def test_a_class_without_photos_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        end_to_end.app, ["--device", "cpu", "--images", "3", "--classes", "4", "--results", str(tmp_path)]
    )
    assert done.exit_code == 1 and "--images must be --classes=4 or more, got 3" in done.output


# A large model


def test_large_model(tmp_path: Path) -> None:
    record = results(large_model, tmp_path, *LARGE)
    rows = peers(record, model=TINY, depth=3, embed_dim=48, batch_size=3, num_prompts=20)
    assert list(rows) == ["spt-fast", "spt-fast, checkpoint_blocks", "naive VPT"]
    assert all(row["kind"] == "measured" and row["relative_error"] < 0.1 for row in rows.values())
    plain, checkpointed, naive = (row["peak_bytes"] for row in rows.values())
    assert checkpointed < plain < naive
    backbone = load_backbone(TINY, depth=3, embed_dim=48, num_heads=3)
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    # In bfloat16 where the processor is good at it.
    assert checkpointed > 2 * weights
    assert len({row["limit"]["operations"] for row in rows.values()}) == 1  # they compute the same function
    check_shown(record)


def test_a_large_model_that_does_not_fit_is_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate more")

    monkeypatch.setattr(large_model, "prepare", prepare)
    record = results(large_model, tmp_path, *LARGE)
    assert reasons(record) == {"naive VPT": "CUDA out of memory."} and len(record["rows"]) == 3


@pytest.mark.usefixtures("wrong_logits")
def test_a_large_model_that_is_wrong_has_no_time(tmp_path: Path) -> None:
    found = reasons(results(large_model, tmp_path, *LARGE))
    assert list(found) == ["spt-fast", "spt-fast, checkpoint_blocks"]
    assert all("computes something else" in reason for reason in found.values())


# A stream as long as ImageNet


def test_a_stream_that_fits_is_measured_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(imagenet_stream.FIRST_PART, "cpu", 40)
    record = results(imagenet_stream, tmp_path, *STREAM, "--images", "150")
    found = [(row["peer"], row["kind"], row["images"], row["case"]["tokens"]) for row in record["rows"]]
    assert found == [
        (peer, "measured", images, 16 * images)
        for images in (40, 150)
        for peer in (imagenet_stream.STREAMED, imagenet_stream.FORWARD)
    ]
    part, _, whole, _ = record["rows"]
    assert whole["limit"]["operations"] == pytest.approx(150 / 40 * part["limit"]["operations"])
    assert all(row["peak_bytes"] >= 0 and row["inertia_per_token"] > 0 for row in (part, whole))
    check_shown(record)


@pytest.mark.parametrize("more", [0, 100])
def test_a_stream_that_does_not_fit_is_extrapolated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    monkeypatch.setitem(imagenet_stream.FIRST_PART, "cpu", 40)
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(imagenet_stream, "affordable", lambda *arguments: asked.append(arguments) or more)
    record = results(imagenet_stream, tmp_path, *STREAM, "--images", "1000000", "--minutes", "9")
    ((images, seconds, left, whole),) = asked
    measured = [row["seconds"][0] for row in record["rows"] if row["kind"] == "measured"]
    assert images == 40 and whole == 1_000_000 and 0 < left < 9 * 60
    assert seconds == pytest.approx(sum(measured[:2]))  # both, because both are to be measured again
    *_, last = record["rows"]
    assert last["kind"] == "extrapolated" and last["case"]["tokens"] == 16_000_000
    streams = measured[::2]
    assert last["measured"] == [[size, each] for size, each in zip((40, more), streams, strict=False)]
    if more:
        growth = (streams[1] - streams[0]) / 60
        assert last["value_seconds"] == pytest.approx(streams[0] + growth * (1_000_000 - 40))
    else:
        assert last["value_seconds"] == pytest.approx(streams[0] * 25_000)
    check_shown(record)


def test_a_stream_with_bad_prototypes_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = imagenet_stream.Work.prototypes

    def built(work: imagenet_stream.Work, images: int) -> Any:
        found = real(work, images)
        found.values.mul_(3)
        return found

    monkeypatch.setattr(imagenet_stream.Work, "prototypes", built)
    record = results(imagenet_stream, tmp_path, *STREAM, "--images", "40")
    (reason,) = reasons(record).values()
    assert "times that of exact k-means" in reason and len(record["rows"]) == 1


@pytest.mark.parametrize("images", [1, 16, 40, 75])
def test_batches_that_come_again_are_a_stream(images: int, small_model: dict[str, Any]) -> None:
    pool = list(torch.randn(3, 16, 3, 32, 32, generator=torch.Generator().manual_seed(images)))
    stream = imagenet_stream.RecycledBatches(pool, images)
    whole = torch.cat(pool * 2)[:images]
    for _ in range(2):
        assert torch.equal(torch.cat(list(stream)), whole)
    work = imagenet_stream.Work(TINY, load_backbone(TINY, **small_model), pool, num_prompts=2)
    expected = build_prototypes(
        work.backbone, list(whole.split(16)), num_prompts=2, method="minibatch_kmeans"
    )
    assert torch.equal(work.prototypes(images).values, expected.values)
    assert expected.metadata["images"] == images


@pytest.mark.parametrize(("module", "arguments"), ALL)
def test_nothing_is_begun_when_the_time_is_up(
    tmp_path: Path, module: Any, arguments: tuple[str, ...]
) -> None:
    done = CliRunner().invoke(
        module.app, ["--device", "cpu", *arguments, "--minutes", "0", "--results", str(tmp_path)]
    )
    assert done.exit_code == 1 and "measured nothing" in done.output
    assert not list(tmp_path.iterdir())
