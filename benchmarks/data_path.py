"""Images per second from JPEG files to normalised batches: ours against torchvision's ways and Kornia.

    python -m benchmarks.data_path                            # 200 photos of 500 x 375 pixels
    python -m benchmarks.data_path --device cuda --images 2000

Every way makes the same epoch: random resized crop, horizontal flip and normalisation at 224 x 224, with the crops that
the transform itself draws. The photos are smooth noise. The first batch of every way has to show what Pillow and
torchvision make of the files, up to a few grey levels where others resample differently, before its time counts; how
many is in the record. What is done once, in the first epoch alone, is not in the samples but beside them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from benchmarks.command import (
    DeviceOption,
    MinutesOption,
    ResultsOption,
    RoundsOption,
    console,
    measuring,
    show,
)
from benchmarks.kmeans_cases import first_line
from benchmarks.record import RESULTS, installed_versions
from benchmarks.summary import middle
from benchmarks.timing import Work, synchronized_seconds, take_turns
from spt_fast.data import ImageDataset, ImageTransform, make_loader, make_transform
from spt_fast.data.cache import CachedImages, cache_images
from spt_fast.data.dataset import mixed_seed
from spt_fast.data.device_batches import DeviceImages
from spt_fast.data.device_transforms import Crop, draw_crops

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

IMAGES = {"cpu": 200, "cuda": 1000}
HEIGHT, WIDTH = 375, 500  # of most photos on the web that data sets were made from
SIZE = 224
QUALITY = 90
# Mean difference in grey levels from the reference. Without antialiasing it is 1 to 2; another crop is off by 20.
TOLERANCE = 4.0
REFERENCE = "Pillow and torchvision, 1 process"

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass
class Way:
    """One way to make an epoch.

    Attributes:
        name: for tables.
        epoch: from its number to its batches; ``None`` if ``missing`` says why that cannot be.
        facts: what else is known of it: ``once_seconds``, what it does before its first epoch.
    """

    name: str
    epoch: Callable[[int], Batches] | None = None
    missing: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@app.command()
def main(
    context: typer.Context,
    images: Annotated[
        int | None, typer.Option(min=1, help="Photos; default: 200 on a CPU, 1000 on a GPU.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images.")] = 64,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that decode; default: one for each core, up to 8.")
    ] = None,
    device: DeviceOption = "auto",
    rounds: RoundsOption = 3,
    minutes: MinutesOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Images per second from JPEG files to normalised batches."""
    with (
        measuring("data_path", context, device, results, minutes, rounds=rounds) as (record, _),
        tempfile.TemporaryDirectory() as folder,
    ):
        chosen = torch.device(record.content["machine"]["device_type"])
        count = images or IMAGES[chosen.type]
        processes = workers or min(8, os.cpu_count() or 1)
        record.content["machine"]["versions"] |= installed_versions("torchvision", "pillow", "kornia")
        case = {"images": count, "height": HEIGHT, "width": WIDTH, "size": SIZE, "batch_size": batch_size}
        data = photos(Path(folder), count)
        found = list(ways(data, Path(folder) / "cache", chosen, batch_size, processes))
        (reference,) = (way for way in found if way.name == REFERENCE)
        assert reference.epoch is not None
        expected = next(reference.epoch(0))
        for way in found:
            way.missing = way.missing or fault(way, expected)
        works = {way.name: whole_epoch(way) for way in found if way.missing is None}
        samples = take_turns(chosen, works, rounds, warmup=1)
        for way in found:
            if way.missing is None:
                record.measured(case, way.name, samples[way.name], **way.facts)
            else:
                record.missing(case, way.name, way.missing)
        extras: dict[str, Callable[[Any], str]] = {
            "images/s": lambda row: f"{count / middle(row):,.0f}",
            "once": lambda row: f"{row['once_seconds']:.1f} s",
            "grey levels off": lambda row: f"{row['grey_levels_off']:.2g}",
        }
        show(f"{count} photos, batches of {batch_size}", record.rows, against=found[0].name, extras=extras)
        console.print("once: decoding into the cache, and copying to the device; not in the other times")


def ways(
    data: ImageDataset, folder: Path, device: torch.device, batch_size: int, workers: int
) -> Iterator[Way]:
    """Ours first, and of ours the one that training takes on this device."""
    begun = time.perf_counter()
    cached = cache_images(data, folder)
    decoding = {"once_seconds": time.perf_counter() - begun}
    cpu_way = loader_epochs(cached, device, batch_size, 0)
    by_cpu = Way("spt-fast, cached, torchvision on the CPU, 1 process", cpu_way, facts=decoding)
    if device.type == "cpu":
        yield by_cpu
    for name, budget in (("on the device", None), ("copied from the cache", 0)):
        seconds, images = timed(device, partial(DeviceImages, cached, device, budget=budget))
        if images.resident == (budget is None):
            once = {"once_seconds": decoding["once_seconds"] + seconds}
            yield Way(f"spt-fast, pixels {name}", device_epochs(images, batch_size), facts=once)
        else:
            yield Way(
                f"spt-fast, pixels {name}", missing="the pixels do not fit into half of the free memory"
            )
    if device.type != "cpu":
        yield by_cpu
    yield Way(REFERENCE, loader_epochs(data, device, batch_size, 0))
    many = loader_epochs(data, device, batch_size, workers)
    yield Way(f"Pillow and torchvision, {workers} worker process{'es' * (workers > 1)}", many)
    seconds, pixels = timed(device, partial(all_pixels, cached, device))
    once = {"once_seconds": decoding["once_seconds"] + seconds}
    yield Way("torchvision on tensors, one by one", tensor_epochs(cached, pixels, batch_size), facts=once)
    if find_spec("kornia") is None:
        yield Way("Kornia", missing="kornia is not installed")
    else:
        yield Way("Kornia", kornia_epochs(cached, pixels, batch_size), facts=once)


def fault(way: Way, expected: tuple[Tensor, Tensor]) -> str | None:
    """Why a way has no time: it does not run, or its first batch shows something else. Notes how far it is off."""
    assert way.epoch is not None
    try:
        images, labels = next(way.epoch(0))
    except Exception as error:
        return first_line(error)
    if images.shape != expected[0].shape or not torch.equal(labels, expected[1]):
        return "makes other batches"
    # Mean and standard deviation are 1/2: a grey level is 2/255.
    off = (images - expected[0]).abs().mean().item() * 255 / 2
    way.facts["grey_levels_off"] = off
    return None if off < TOLERANCE else f"computes something else: {off:.3g} grey levels off in the mean"


def whole_epoch(way: Way) -> Work:
    """Makes all batches of the epoch whose number is that of the round, and uses none."""

    def work(number: int) -> None:
        assert way.epoch is not None
        for _ in way.epoch(number):
            pass

    return work


def timed(device: torch.device, make: Callable[[], Any]) -> tuple[float, Any]:
    """How long something took to make, and the thing."""
    made: list[Any] = []
    return synchronized_seconds(device, lambda: made.append(make())), made[0]


def photos(folder: Path, count: int) -> ImageDataset:
    """JPEG files of smooth noise with some grain, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(count):
        levels = torch.zeros(1, 3, HEIGHT, WIDTH)
        for cells, contrast in ((4, 60.0), (16, 30.0), (64, 15.0)):
            coarse = torch.randn(1, 3, cells, cells, generator=generator) * contrast
            levels += torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")
        levels += 4 * torch.randn(levels.shape, generator=generator) + 128
        pixels = levels[0].clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        path = folder / f"{index}.jpg"
        Image.fromarray(pixels).save(path, quality=QUALITY)
        samples.append((path, index % 10))
    half = (0.5, 0.5, 0.5)
    transform = make_transform("fgvc", image_size=SIZE, mean=half, std=half, train=True)
    return ImageDataset(samples, [str(label) for label in range(10)], transform=transform, name="photos")


def device_epochs(images: DeviceImages, batch_size: int) -> Callable[[int], Batches]:
    return lambda epoch: iter(images.batches(batch_size=batch_size, epoch=epoch))


def loader_epochs(
    data: ImageDataset, device: torch.device, batch_size: int, workers: int
) -> Callable[[int], Batches]:
    """Pillow's and torchvision's operations on every image, then a copy to the device."""

    def epoch(number: int) -> Batches:
        pinned = device.type == "cuda"
        loader = make_loader(
            data, batch_size=batch_size, epoch=number, num_workers=workers, pin_memory=pinned
        )
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return epoch


def all_pixels(cached: CachedImages, device: torch.device) -> list[Tensor]:
    """Every image uint8 ``[3, H, W]`` on the device."""
    pixels = (np.array(cached.pixels(index)) for index in range(len(cached)))
    return [torch.from_numpy(each).to(device).permute(2, 0, 1) for each in pixels]


def drawn(cached: CachedImages, indices: Sequence[int], epoch: int) -> list[Crop]:
    """The crops that all ways take."""
    transform = cached.transform
    assert isinstance(transform, ImageTransform)
    sizes = [(int(height), int(width)) for height, width in cached.sizes[list(indices)]]
    return draw_crops(transform, sizes, [mixed_seed(cached.seed, epoch, index) for index in indices])


def tensor_epochs(
    cached: CachedImages, pixels: Sequence[Tensor], batch_size: int
) -> Callable[[int], Batches]:
    """torchvision v2 on tensors where the pixels are, image by image because every crop has its own size."""
    half = [0.5, 0.5, 0.5]

    def epoch(number: int) -> Batches:
        for indices in in_batches(len(pixels), batch_size):
            finished = []
            for index, crop in zip(indices, drawn(cached, indices, number), strict=True):
                *box, flipped = crop
                image = tv.resized_crop(pixels[index], *box, size=[SIZE, SIZE], antialias=True)
                finished.append(tv.horizontal_flip(image) if flipped else image)
            images = tv.normalize(tv.to_dtype(torch.stack(finished), torch.float32, scale=True), half, half)
            yield images, labels_of(cached, indices, images.device)

    return epoch


def kornia_epochs(
    cached: CachedImages, pixels: Sequence[Tensor], batch_size: int
) -> Callable[[int], Batches]:
    """Kornia's batched crops, which need images of one size and have no antialiasing."""
    half = torch.full((3,), 0.5, device=pixels[0].device)

    def epoch(number: int) -> Batches:
        kornia = import_module("kornia")
        for indices in in_batches(len(pixels), batch_size):
            whole = torch.stack([pixels[index] for index in indices]).float() / 255
            crops = torch.tensor(drawn(cached, indices, number), device=whole.device)
            top, left, height, width, flipped = crops.float().t()
            right, bottom = left + width - 1, top + height - 1
            corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
            boxes = torch.stack([torch.stack(corner, dim=1) for corner in corners], dim=1)
            images = kornia.geometry.transform.crop_and_resize(whole, boxes, (SIZE, SIZE))
            mirrored = kornia.geometry.transform.hflip(images)
            images = torch.where(flipped.bool().view(-1, 1, 1, 1), mirrored, images)
            yield kornia.enhance.normalize(images, half, half), labels_of(cached, indices, whole.device)

    return epoch


def in_batches(count: int, batch_size: int) -> Iterator[range]:
    return (range(start, min(start + batch_size, count)) for start in range(0, count, batch_size))


def labels_of(cached: CachedImages, indices: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([cached.samples[index][1] for index in indices], device=device)


if __name__ == "__main__":
    app()
