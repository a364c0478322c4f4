"""Batches made on a GPU are those of the CPU's loader, whatever else is set, and the host does not wait for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spt_fast.data import ImageDataset, cache, make_loader, make_transform
from spt_fast.data.device_batches import DeviceImages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EPOCH: dict[str, Any] = {"batch_size": 16, "shuffle": True, "seed": 2, "epoch": 3}


@pytest.fixture(params=["fgvc", "vtab"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> ImageDataset:
    """Noisy images of odd sizes around 224 pixels, two of which are no images."""
    generator = np.random.default_rng(0)
    samples: list[Any] = []
    for index in range(50):
        height, width = generator.integers(30, 700, 2)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        samples.append((Image.fromarray(pixels), index % 3))
    for index in (7, 30):
        samples[index] = (tmp_path / f"{index}.jpg", 0)
        samples[index][0].write_bytes(b"not an image")
    size: dict[str, Any] = {"image_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    transform = make_transform(request.param, train=True, **size)
    return ImageDataset(samples, ["a", "b", "c"], transform=transform)


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def check_equal(got: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    assert len(got) == len(expected)
    for (images, labels), (right_images, right_labels) in zip(got, expected, strict=True):
        assert images.is_cuda and labels.is_cuda and images.is_contiguous()
        assert torch.equal(labels.cpu(), right_labels)
        # A grey level is 0.017: all of them are the same.
        torch.testing.assert_close(images.cpu(), right_images, rtol=0, atol=2e-6)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("budget", [None, 0], ids=["resident", "copied"])
def test_batches_are_those_of_the_loader(data: ImageDataset, budget: int | None, tmp_path: Path) -> None:
    images = DeviceImages(cache.cache_images(data, tmp_path), torch.device("cuda"), budget=budget)
    assert images.resident == (budget is None)
    loader, batches = make_loader(data, **EPOCH), images.batches(**EPOCH)
    expected = list(loader)
    for name in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(name)
        check_equal(list(batches), expected)
        assert torch.get_float32_matmul_precision() == name
    with torch.autocast("cuda", torch.bfloat16):
        check_equal(list(batches), expected)
    assert batches.skipped == loader.skipped and len(batches.skipped) == 2


@pytest.mark.parametrize("budget", [None, 0], ids=["resident", "copied"])
def test_the_host_runs_ahead_of_the_device(data: ImageDataset, budget: int | None, tmp_path: Path) -> None:
    """It never waits, and what it writes for a later batch does not reach an earlier one."""
    images = DeviceImages(cache.cache_images(data, tmp_path), torch.device("cuda"), budget=budget)
    expected = [(images.cpu(), labels.cpu()) for images, labels in images.batches(**EPOCH)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = []
        for batch in images.batches(**EPOCH):
            got.append(batch)
            torch.cuda._sleep(50_000_000)  # about 30 ms, in which the host prepares the next batch
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_equal(got, expected)
