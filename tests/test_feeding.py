"""Where batches come from: the loader's own batches, as many workers as help, and what was waited for."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import squares

from spt_fast.data import cache_images, make_loader
from spt_fast.data.dataset import ImageDataset
from spt_fast.feeding import ImageFeed, prototype_loader, skipped_by_all, workers_for

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def on_disk(count: int, folder: Path) -> ImageDataset:
    """Coloured squares as files."""
    data = squares(count, recipe="fgvc")
    samples = []
    for index, (picture, label) in enumerate(data.samples):
        path = folder / f"{index}.png"
        picture.save(path)  # type: ignore[union-attr]
        samples.append((path, label))
    return ImageDataset(samples, data.classes, transform=data.transform, name="files")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_loaders(num_workers: int, tmp_path: Path) -> None:
    data = on_disk(21, tmp_path)
    (tmp_path / "4.png").write_bytes(b"no image")
    feed = ImageFeed(data, CPU, num_workers=num_workers)
    order: dict[str, Any] = {
        "batch_size": 4,
        "shuffle": True,
        "seed": 3,
        "epoch": 2,
        "start_batch": 1,
        "rank": 1,
        "world_size": 2,
    }
    loader = make_loader(data, **order)
    expected = list(loader)
    found = list(feed.batches(**order))
    assert len(found) == len(expected) == 2
    for (images, labels), (same_images, same_labels) in zip(found, expected, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    assert feed.skipped == loader.skipped


def test_waiting_is_what_the_host_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time between batches counts, what is done with them does not; the clock is ours."""
    clock = [100.0]
    monkeypatch.setattr("spt_fast.feeding.time.perf_counter", lambda: clock[0])
    data = squares(6)
    original = data.transform

    def slow(image: Any) -> Any:
        clock[0] += 0.5
        return original(image)

    feed = ImageFeed(data.with_transform(slow), CPU)
    for _ in range(2):
        for _ in feed.batches(batch_size=2):
            clock[0] += 10
    assert feed.waited == pytest.approx(2 * 6 * 0.5)
    assert time.perf_counter() == clock[0]


def test_as_many_workers_as_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = on_disk(64, tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert workers_for(files, 1, device=CPU) == 6  # the cores
    assert workers_for(files, 8, device=CPU) == 2  # four batches for each
    assert workers_for(files, 32, device=CPU) == 0
    assert workers_for(files, 32, 5, device=CPU) == 5 and workers_for(files, 1, 0, device=CPU) == 0
    assert workers_for(squares(64), 1, device=GPU) == 0  # in memory
    cached = cache_images(files, tmp_path / "cache")
    assert workers_for(cached, 1, device=CPU) == 0 and workers_for(cached, 1, device=GPU) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers_for(files, 1, device=CPU) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert workers_for(files, 1, device=GPU) == 8  # no more


@pytest.mark.parametrize("method", ["kmeans", "mean_pool"])
def test_prototypes_see_every_image_once_or_the_same_batch_everywhere(
    method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = on_disk(10, tmp_path)
    (tmp_path / "3.png").write_bytes(b"no image")
    shares = []
    for rank in range(3):
        monkeypatch.setattr("spt_fast.feeding.world", lambda rank=rank: (rank, 3))
        shares.append(prototype_loader(data, method, batch_size=2, seed=1, device=CPU))
    indices = [[index for batch in loader.batch_sampler for index in batch] for loader in shares]
    if method == "kmeans":
        assert sorted(index for share in indices for index in share) == list(range(10))
    else:
        assert indices[0] == indices[1] == indices[2] != list(range(10))
        list(shares[0])
        assert skipped_by_all(shares[0]) == 1
