"""Batches made on a device have the images, order and augmentation of the CPU's loader, which is the judge.

Everything runs on CPU tensors here; ``tests/gpu/test_device_batches_cuda.py`` is about what is different on a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv
from typer.testing import CliRunner

from benchmarks import command, data_path
from benchmarks.ceilings import Ceilings
from spt_fast.data import (
    ImageDataset,
    ImageTransform,
    device_batches,
    device_transforms,
    make_loader,
    make_transform,
)
from spt_fast.data.cache import CachedImages, cache_images
from spt_fast.data.device_batches import DeviceImages, padded_groups
from spt_fast.data.device_transforms import (
    Crop,
    draw_crops,
    normalize_images,
    resize_crops,
    resized_vertically_first,
    supports,
)
from spt_fast.errors import InputError

CPU = torch.device("cpu")
# Three that cannot be told from their sum or order, as a mean and a standard deviation of ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_pixels(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise of all grey levels, or black and white alone: the hardest edges there are."""
    if generator.random() < 0.3:
        return 255 * generator.integers(0, 2, (height, width, 3), dtype=np.uint8)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def photos(
    folder: Path, count: int, *, seed: int = 0, bad: tuple[int, ...] = (), **kwargs: Any
) -> ImageDataset:
    """``count`` noisy images of random odd sizes in memory; those in ``bad`` are files that are no images."""
    generator = np.random.default_rng(seed)
    samples: list[Any] = []
    for index in range(count):
        height, width = generator.integers(5, 70, 2)
        if index in bad:
            path = folder / f"{index}.jpg"
            path.write_bytes(b"not an image")
            samples.append((path, index % 3))
        else:
            samples.append((Image.fromarray(random_pixels(generator, height, width)), index % 3))
    return ImageDataset(samples, ["a", "b", "c"], name="noise", **kwargs)


def transform_of(recipe: str = "fgvc", *, train: bool = True, size: Any = (14, 19)) -> ImageTransform:
    return make_transform(recipe, image_size=size, mean=MEAN, std=STD, train=train)


def cached(folder: Path, count: int, *, transform: Any = None, **kwargs: Any) -> CachedImages:
    data = photos(folder, count, transform=transform or transform_of(), **kwargs)
    return cache_images(data, folder / "cache")


# Drawing


@pytest.mark.parametrize("augmentation", ["crop and flip", "crop", "flip"])
def test_crops_are_those_that_the_transform_draws(augmentation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by what torchvision's own modules ask of torchvision's functions when they run on images."""
    steps = {
        "crop": v2.RandomResizedCrop((6, 5), scale=(0.02, 1.0), ratio=(0.3, 3.0)),
        "flip": v2.RandomHorizontalFlip(0.4),
    }
    chosen = [steps[name] for name in augmentation.split(" and ")]
    transform = ImageTransform([], chosen, size=(6, 5), mean=list(MEAN), std=list(STD))
    asked: list[Any] = []
    generator = np.random.default_rng(1)
    sizes = [(int(h), int(w)) for h, w in generator.integers(1, 60, (200, 2))]
    sizes += [(1, 1), (1, 500), (500, 1)]  # those where torchvision gives up drawing
    seeds = [int(seed) for seed in generator.integers(0, 1 << 62, len(sizes))]
    call = v2.Transform._call_kernel

    def watched(self: Any, function: Any, image: Any, **parameters: Any) -> Any:
        asked.append((function, parameters))
        return call(self, function, image, **parameters)

    expected = []
    monkeypatch.setattr(v2.Transform, "_call_kernel", watched)
    for (height, width), seed in zip(sizes, seeds, strict=True):
        asked.clear()
        torch.manual_seed(seed)
        transform(Image.new("RGB", (width, height)))
        called = {function.__name__: parameters for function, parameters in asked}
        box = called.get("resized_crop", {"top": 0, "left": 0, "height": height, "width": width})
        expected.append(
            (*(box[name] for name in ("top", "left", "height", "width")), "horizontal_flip" in called)
        )
    monkeypatch.undo()
    state = torch.get_rng_state()
    crops = draw_crops(transform, sizes, seeds)
    assert torch.equal(torch.get_rng_state(), state)
    assert [tuple(crop) for crop in crops] == expected
    assert len(set(expected)) > 100 and {crop.flipped for crop in crops} == (
        {True, False} if "flip" in augmentation else {False}
    )


def test_what_a_device_can_do() -> None:
    crop, flip = v2.RandomResizedCrop((4, 4)), v2.RandomHorizontalFlip()

    def transform(*augmentation: torch.nn.Module) -> ImageTransform:
        return ImageTransform([], augmentation, size=(4, 4), mean=list(MEAN), std=list(STD))

    for steps in ((), (crop,), (flip,), (crop, flip)):
        assert supports(transform(*steps))
    others: list[tuple[torch.nn.Module, ...]] = [
        (flip, crop),
        (crop, crop),
        (flip, flip),
        (v2.ColorJitter(0.5),),
        (crop, v2.RandomErasing(), flip),
        (v2.RandomResizedCrop((4, 5)),),
        (v2.RandomResizedCrop((4, 4), interpolation=InterpolationMode.BICUBIC),),
        (v2.RandomVerticalFlip(),),
    ]
    for steps in others:
        assert not supports(transform(*steps))
        with pytest.raises(InputError, match="which only the loader of the CPU"):
            draw_crops(transform(*steps), [(9, 9)], [0])
    appended = transform(crop)
    appended.transforms.append(v2.RandomErasing())
    assert not supports(appended)
    assert not supports(None) and not supports(lambda image: torch.zeros(3, 4, 4))
    assert supports(transform_of("vtab")) and supports(transform_of("fgvc", train=False))


# Resizing


def resized_on_the_cpu(
    pixels: np.ndarray, crop: tuple[int, int, int, int], flipped: bool, size: tuple[int, int]
) -> Tensor:
    result = tv.resized_crop(Image.fromarray(pixels), *crop, size=list(size))
    return tv.pil_to_tensor(tv.horizontal_flip(result) if flipped else result)


def padded(crops: list[np.ndarray]) -> Tensor:
    """In one tensor with white around, which must not leak in."""
    rows, columns = (max(crop.shape[side] for crop in crops) for side in (0, 1))
    result = np.full((len(crops), rows, columns, 3), 255, dtype=np.uint8)
    for target, crop in zip(result, crops, strict=True):
        target[: crop.shape[0], : crop.shape[1]] = crop
    return torch.from_numpy(result)


def resized(images: list[np.ndarray], flipped: np.ndarray, size: tuple[int, int]) -> dict[int, Tensor]:
    """All images resized side by side: those whose rows Pillow resizes first, and the others."""
    heights, widths = (np.array([image.shape[side] for image in images]) for side in (0, 1))
    order = resized_vertically_first(heights, widths, size)
    found: dict[int, Tensor] = {}
    for way in (False, True):
        own = np.flatnonzero(order == way)
        if len(own):
            shapes = [torch.from_numpy(each[own]) for each in (heights, widths, flipped)]
            done = resize_crops(padded([images[each] for each in own]), *shapes, size, vertically_first=way)
            assert done.is_contiguous() and done.dtype == torch.uint8
            found |= dict(zip(own.tolist(), done, strict=True))
    return found


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_resizing_gives_the_grey_levels_of_pillow(
    seed: int, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up and down, by odd factors, of crops of all sizes side by side, among them single pixels, rows and columns."""
    if halves:  # how a GPU multiplies
        monkeypatch.setattr(device_transforms, "_sums_in_float64", device_transforms._sums_in_halves)
    generator = np.random.default_rng(seed)
    size = [(7, 7), (32, 23), (1, 3), (57, 64)][seed]
    shapes = [tuple(shape) for shape in generator.integers(1, [40, 90, 150][seed % 3], (20, 2))]
    shapes += [(1, 1), (1, 37), (41, 1), size, (size[0], 2 * size[1]), (2 * size[0], 3 * size[1])]
    images = [random_pixels(generator, height, width) for height, width in shapes]
    flipped = generator.integers(0, 2, len(images)).astype(bool)
    got = resized(images, flipped, size)
    for index, image in enumerate(images):
        expected = resized_on_the_cpu(image, (0, 0, *image.shape[:2]), bool(flipped[index]), size)
        assert torch.equal(got[index], expected), (shapes[index], size)


def test_weights_are_those_of_pillow_for_many_lengths() -> None:
    """Seen through single bright pixels of a line that Pillow resizes, whose grey levels weigh 255."""
    generator = np.random.default_rng(0)
    for size in generator.integers(1, 300, 25).tolist():
        lines = [
            generator.integers(0, 256, (1, length, 3), dtype=np.uint8)
            for length in generator.integers(1, 700, 12)
        ]
        got = resized(lines, np.zeros(len(lines)), (1, size))
        for index, line in enumerate(lines):
            expected = resized_on_the_cpu(line, (0, 0, 1, line.shape[1]), False, (1, size))
            assert torch.equal(got[index], expected), (line.shape[1], size)


def test_halves_are_exact_at_the_precision_of_tf32() -> None:
    """Factors fit 11 bits and sums fit float32's 24: what is left of a factor after rounding to 11 bits is nothing."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1700, (40,), generator=generator)
    weights = device_transforms._triangle_weights(lengths, 1700, 56, torch.zeros(40, dtype=torch.int64))
    levels = torch.randint(0, 256, (40, 1700, 5), generator=generator)
    exact = torch.bmm(weights.long(), levels)
    seen: list[Tensor] = []

    def multiply(left: Tensor, right: Tensor) -> Tensor:
        seen.extend((left, right))
        return torch.bmm(left, right)

    assert torch.equal(device_transforms._sums_in_halves(weights, levels, multiply).long(), exact)
    for factor in seen:
        mantissa, _ = torch.frexp(factor)
        assert torch.equal(mantissa * 2**11, (mantissa * 2**11).round())
    # All taps, all white: the largest sums there are.
    white = torch.full_like(levels, 255)
    assert torch.equal(
        device_transforms._sums_in_halves(weights, white, torch.bmm).long(), torch.bmm(weights.long(), white)
    )


def test_autocast_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_transforms, "_sums_in_float64", device_transforms._sums_in_halves)
    images = DeviceImages(cached(tmp_path, 8), CPU)
    plain, _ = images.batch(range(8), 0)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = images.batch(range(8), 0)
    assert torch.equal(plain, cast)


def test_normalizing_is_torchvisions() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    expected = tv.normalize(tv.to_dtype(levels, torch.float32, scale=True), list(MEAN), list(STD))
    got = normalize_images(levels, mean, std)
    assert torch.equal(got, expected) and got.is_contiguous()


# Batches


@pytest.mark.parametrize("budget", [None, 0], ids=["resident", "copied"])
@pytest.mark.parametrize("recipe, train", [("fgvc", True), ("fgvc", False), ("vtab", True)])
def test_batches_are_those_of_the_loader(
    recipe: str, train: bool, budget: int | None, tmp_path: Path
) -> None:
    transform = transform_of(recipe, train=train)
    data = photos(tmp_path, 23, bad=(4, 20), transform=transform, seed=3)
    data.seed = 11
    images = DeviceImages(cache_images(data, tmp_path / "cache"), CPU, budget=budget)
    assert images.resident == (budget is None)
    state = torch.get_rng_state()
    for arguments in (
        {"batch_size": 6},
        {"batch_size": 7, "shuffle": True, "seed": 5, "epoch": 2},
        {"batch_size": 4, "shuffle": True, "epoch": 1, "start_batch": 2, "rank": 1, "world_size": 2},
        {"batch_size": 5, "rank": 2, "world_size": 3},
    ):
        loader, ours = make_loader(data, **arguments), images.batches(**arguments)
        expected = list(loader)
        for _ in range(2):  # a second pass is the same
            got = list(ours)
            assert len(got) == len(ours) == len(expected)
            for (pixels, labels), (right_pixels, right_labels) in zip(got, expected, strict=True):
                assert torch.equal(labels, right_labels) and labels.dtype == torch.int64
                assert torch.equal(pixels, right_pixels) and pixels.is_contiguous()
            assert ours.skipped == loader.skipped
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_changes_with_epoch_and_seed(tmp_path: Path) -> None:
    data = cached(tmp_path, 5)
    images = DeviceImages(data, CPU)
    first, again, second = (images.batch(range(5), epoch)[0] for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)
    data.seed = 1
    assert not torch.equal(first, DeviceImages(data, CPU).batch(range(5), 0)[0])


def test_a_flip_alone_and_images_of_the_final_size_are_not_resampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("resampled")

    monkeypatch.setattr(device_batches, "resize_crops", never)
    resize, flip = v2.Resize((9, 11)), v2.RandomHorizontalFlip()
    transform = ImageTransform([resize], [flip], size=(9, 11), mean=list(MEAN), std=list(STD))
    data = photos(tmp_path, 12, transform=transform)
    images = DeviceImages(cache_images(data, tmp_path / "cache"), CPU)
    ((got, _),) = images.batches(batch_size=12, epoch=4)
    ((expected, _),) = make_loader(data, batch_size=12, epoch=4)
    assert torch.equal(got, expected)
    prepared = torch.stack(
        [data.with_transform(transform_of("vtab", size=(9, 11)))[index][0] for index in range(12)]
    )
    unflipped = [torch.equal(one, other) for one, other in zip(got, prepared, strict=True)]
    assert 0 < sum(unflipped) < 12


def test_a_strict_data_set_raises_and_a_batch_may_be_empty(tmp_path: Path) -> None:
    images = DeviceImages(cached(tmp_path, 6, bad=(2, 3)), CPU)
    batches = images.batches(batch_size=2)
    shapes = [(tuple(pixels.shape), tuple(labels.shape)) for pixels, labels in batches]
    assert shapes == [((2, 3, 14, 19), (2,)), ((0, 3, 14, 19), (0,)), ((2, 3, 14, 19), (2,))]
    assert batches.skipped == [str(tmp_path / "2.jpg"), str(tmp_path / "3.jpg")]
    images.dataset.strict = True
    with pytest.raises(InputError, match=r"2\.jpg cannot be read as an image"):
        list(images.batches(batch_size=2))


def test_an_empty_share_is_an_empty_batch(tmp_path: Path) -> None:
    batches = DeviceImages(cached(tmp_path, 3), CPU).batches(batch_size=2)
    batches._batches.batches.append([])
    *_, (pixels, labels) = batches
    assert pixels.shape == (0, 3, 14, 19) and labels.shape == (0,)
    assert pixels.dtype == torch.float32 and labels.dtype == torch.int64


def test_groups_bound_the_padding_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    heights, widths = generator.integers(1, 100, (2, 64))
    for most in (1, 500, 20_000, 1 << 30):
        groups = padded_groups(np.arange(64), heights, widths, most)
        assert sorted(position for group in groups for position in group) == list(range(64))
        for group in groups:
            assert len(group) == 1 or len(group) * heights[group].max() * widths[group].max() <= most
    some = np.array([9, 3, 40])
    assert sorted(padded_groups(some, heights, widths, 1)) == [[3], [9], [40]]
    assert (
        len(padded_groups(some, heights, widths, 30_000)) == 1
        and padded_groups(some[:0], heights, widths, 1) == []
    )
    images = DeviceImages(cached(tmp_path, 20), CPU)
    together, labels = images.batch(range(20), 0)
    monkeypatch.setattr(device_batches, "MOST_PADDED_PIXELS_ON_CPU", 3000)
    apart, same_labels = images.batch(range(20), 0)
    assert torch.equal(together, apart) and torch.equal(labels, same_labels)


def test_pixels_reach_the_device_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = cached(tmp_path, 20, bad=(0, 7, 19))
    whole = DeviceImages(data, CPU)._pixels
    for size in (1, 5_000, 1 << 20):
        monkeypatch.setattr(device_batches, "STAGING_BYTES", size)
        in_pieces = DeviceImages(data, CPU)._pixels
        assert whole is not None and in_pieces is not None and torch.equal(whole, in_pieces)


def test_the_budget_decides_where_pixels_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = cached(tmp_path, 4)
    assert DeviceImages(data, CPU, budget=data.nbytes).resident
    assert not DeviceImages(data, CPU, budget=data.nbytes - 1).resident
    monkeypatch.setattr(device_batches, "free_memory", lambda device: 2 * data.nbytes)
    assert DeviceImages(data, CPU).resident
    monkeypatch.setattr(device_batches, "free_memory", lambda device: 2 * data.nbytes - 1)
    assert not DeviceImages(data, CPU).resident
    with pytest.raises(InputError, match="budget must be 0 bytes or more, got -1"):
        DeviceImages(data, CPU, budget=-1)


def test_what_a_device_cannot_do_is_refused(tmp_path: Path) -> None:
    jitter = ImageTransform([], [v2.ColorJitter(0.5)], size=(8, 8), mean=list(MEAN), std=list(STD))
    with pytest.raises(InputError, match=r"ColorJitter.* \(make_loader\)"):
        DeviceImages(cached(tmp_path, 3, transform=jitter), CPU)
    unsized = ImageTransform([v2.Resize(8)], [], size=(8, 8), mean=list(MEAN), std=list(STD))
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(InputError, match="image 0 of noise is .* pixels after the transform's preparation"):
        DeviceImages(cached(other, 3, transform=unsized), CPU)
    with pytest.raises(InputError, match="batch_size must be 1 or more"):
        third = tmp_path / "third"
        third.mkdir()
        DeviceImages(cached(third, 3), CPU).batches(batch_size=0)


# The benchmark


def rows_of_the_benchmark(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Those of seven small photos, by peer."""
    some = Ceilings(copy=3e10, read=3e10, matmul={"float32": 2e11, "bfloat16": 4e11}, samples={})
    monkeypatch.setattr(command, "measure_ceilings", lambda device: some)
    for name, value in {"HEIGHT": 60, "WIDTH": 80, "SIZE": 24}.items():
        monkeypatch.setattr(data_path, name, value)
    arguments = ["--device", "cpu", "--images", "7", "--batch-size", "4", "--workers", "1", "--rounds", "2"]
    done = CliRunner().invoke(data_path.app, [*arguments, "--results", str(folder)])
    assert done.exit_code == 0, done.output + repr(done.exception)
    (file,) = folder.glob("*-data_path.json")
    record = json.loads(file.read_text())
    assert record["complete"] and {"torchvision", "pillow"} <= set(record["machine"]["versions"])
    return {row["peer"]: row for row in record["rows"]}


def test_the_benchmark_measures_all_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_path, "find_spec", lambda name: None)
    rows = rows_of_the_benchmark(tmp_path, monkeypatch)
    assert rows.pop("Kornia")["reason"] == "kornia is not installed"
    assert list(rows)[0] == "spt-fast, cached, torchvision on the CPU, 1 process" and len(rows) == 6
    for name, row in rows.items():
        assert row["kind"] == "measured" and len(row["seconds"]) == 2 and row["case"]["images"] == 7
        # torchvision on tensors rounds once, Pillow twice.
        assert (row["grey_levels_off"] == 0) == (name != "torchvision on tensors, one by one")
        assert ("once_seconds" in row) == (not name.startswith("Pillow"))


def test_a_way_that_is_wrong_or_fails_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError("built for another Python\nand more")

    real = data_path.drawn
    shifted = lambda *arguments: [Crop(0, 0, 9, 9, False) for _ in real(*arguments)]  # noqa: E731
    monkeypatch.setattr(data_path, "drawn", shifted)
    monkeypatch.setattr(data_path, "find_spec", lambda name: object())
    monkeypatch.setattr(data_path, "import_module", fail)
    rows = rows_of_the_benchmark(tmp_path, monkeypatch)
    assert "computes something else" in rows["torchvision on tensors, one by one"]["reason"]
    assert rows["Kornia"]["reason"] == "does not run here: built for another Python"
    assert rows["spt-fast, pixels on the device"]["kind"] == "measured"
