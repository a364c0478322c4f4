"""Cached images are those of the data set, whatever happened to the files meanwhile."""

import copy
import errno
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.numpy import load_file
from tiny import squares
from torch.multiprocessing import get_context
from torchvision.transforms import v2
from training_cases import Interruption, interrupt_after

from spt_fast.data import CachedImages, ImageDataset, cache_images, load_dataset, make_loader, make_transform
from spt_fast.data import cache as cache_module
from spt_fast.data.image_shard import ImageShard, writing_shard
from spt_fast.data.tar_member import TarMember
from spt_fast.data.transforms import ImageTransform
from spt_fast.errors import InputError, MissingFileError
from spt_fast.files import LEFTOVER_PREFIX

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHARD_IMAGES = 4


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD_IMAGES", SHARD_IMAGES)
    monkeypatch.setattr(cache_module, "REPORT_EVERY", 1)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The images that were decoded, as they are."""
    seen: list[int] = []
    picture = ImageDataset.picture

    def recording(dataset: ImageDataset, index: int) -> Image.Image:
        seen.append(index)
        return picture(dataset, index)

    monkeypatch.setattr(ImageDataset, "picture", recording)
    return seen


def transform(recipe: str = "fgvc", train: bool = True, size: int = 8) -> ImageTransform:
    return make_transform(recipe, image_size=size, mean=MEAN, std=STD, train=train)


def write_photo(path: Path, seed: int) -> None:
    """Noise of random size, as JPEG or PNG, grey or coloured."""
    random = np.random.default_rng(seed)
    height, width = random.integers(9, 40, 2)
    shape = (height, width) if seed % 5 == 3 else (height, width, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """11 photos of two classes, which make three shards."""
    for number in range(11):
        name = f"{number:02d}.{'png' if number % 2 else 'jpg'}"
        write_photo(tmp_path / "photos" / ("cat" if number < 6 else "dog") / name, number)
    return tmp_path / "photos"


def opened(photos: Path, **kwargs: Any) -> ImageDataset:
    return load_dataset(photos, "trainval", **{"transform": transform(), "seed": 5, **kwargs})


def assert_same_images(ours: ImageDataset, expected: ImageDataset) -> None:
    assert len(ours) == len(expected) and ours.targets == expected.targets
    assert ours.samples == expected.samples and ours.classes == expected.classes
    for index in [*range(len(expected)), -1]:
        a, b = ours[index], expected[index]
        if a is None or b is None:
            assert a is b, index
        else:
            assert a[1] == b[1] and a[0].dtype == b[0].dtype and torch.equal(a[0], b[0]), index


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def identities(folder: Path) -> list[tuple[int, int]]:
    """What changes when a file is written again."""
    return [(path.stat().st_ino, path.stat().st_mtime_ns) for path in shard_paths(folder)]


def change(path: Path, where: int, by: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= by
    path.write_bytes(content)


# ---------------------------------------------------------------- the same images


@pytest.mark.parametrize(
    "made",
    [
        transform("fgvc", train=True),
        transform("fgvc", train=False),
        transform("vtab", train=True),
        None,
        v2.Compose([v2.RandomCrop(8), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]),
    ],
    ids=["random_crop", "centre_crop", "resize", "none", "another"],
)
def test_cached_images_are_those_of_the_data_set(made: Any, photos: Path, tmp_path: Path) -> None:
    dataset = opened(photos, transform=made)
    cached = cache_images(dataset, tmp_path / "cache")
    for epoch in (0, 3):
        for each in (dataset, cached):
            each.set_epoch(epoch)
        assert_same_images(cached, dataset)
    prepare = made.prepare if isinstance(made, ImageTransform) else lambda image: image
    for index in range(len(dataset)):
        expected = np.asarray(prepare(dataset.picture(index)))
        assert cached.pixels(index).dtype == np.uint8
        np.testing.assert_array_equal(cached.pixels(index), expected)
        assert tuple(cached.sizes[index]) == expected.shape[:2]
    assert cached.sizes.dtype == np.int64 and cached.sizes.shape == (11, 2)
    assert cached.nbytes == sum(cached.pixels(index).nbytes for index in range(11))
    attributes = ("transform", "strict", "seed", "epoch", "name", "recipe", "shards")
    assert all(getattr(cached, name) == getattr(dataset, name) for name in attributes)
    if made is not None:
        assert torch.equal(cached.blank(), dataset.blank())
    with pytest.raises(IndexError):
        cached[11]
    state = torch.get_rng_state()
    cached[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_pixels_are_a_read_only_view_of_the_file(photos: Path, tmp_path: Path) -> None:
    cached = cache_images(opened(photos), tmp_path)
    assert np.shares_memory(cached.pixels(2), cached.pixels(2))
    with pytest.raises(ValueError, match="read-only"):
        cached.pixels(2)[0, 0, 0] = 1
    descriptors = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert not any(str(tmp_path) in target for target in descriptors), "a map holds a file descriptor"
    assert sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines()) >= 3


def test_batches_of_loaders_are_the_same(photos: Path, tmp_path: Path) -> None:
    dataset = opened(photos)
    (photos / "cat" / "02.jpg").write_bytes(b"not an image")
    cached = cache_images(dataset, tmp_path / "cache")
    for num_workers in (0, 2):
        loaders = [
            make_loader(each, batch_size=3, shuffle=True, epoch=2, seed=1, num_workers=num_workers)
            for each in (cached, dataset)
        ]
        for (images, labels), (expected, expected_labels) in zip(*loaders, strict=True):
            assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
        assert loaders[0].skipped == loaders[1].skipped == [str(photos / "cat" / "02.jpg")]


def test_subset_keeps_images_and_augmentation(photos: Path, tmp_path: Path) -> None:
    dataset = opened(photos)
    cached = cache_images(dataset, tmp_path)
    indices = [9, 2, -1, 2, 5, 0]
    ours, expected = cached.subset(indices), dataset.subset(indices)
    assert isinstance(ours, CachedImages)
    for epoch in (0, 1):
        ours.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert_same_images(ours, expected)
    assert ours.nbytes == sum(ours.pixels(index).nbytes for index in range(6))
    assert ours.nbytes == cached.nbytes * ours.sizes.prod(1).sum() // cached.sizes.prod(1).sum()
    assert_same_images(ours.subset(torch.tensor([1, 4])), expected.subset([1, 4]))
    assert_same_images(cached, dataset.with_transform(dataset.transform))
    with pytest.raises(InputError, match="is empty"):
        cached.subset([])


def test_another_transform_must_prepare_in_the_same_way(photos: Path, tmp_path: Path) -> None:
    dataset = opened(photos, transform=transform("vtab", size=16))
    cached = cache_images(dataset, tmp_path)
    flipping = ImageTransform(
        [v2.Resize((16, 16))],
        [v2.RandomHorizontalFlip()],
        size=(16, 16),
        mean=[0.5] * 3,
        std=[0.1] * 3,
    )
    other = cached.with_transform(flipping)
    assert isinstance(other, CachedImages) and other.transform is flipping
    assert_same_images(other, dataset.with_transform(flipping))
    assert_same_images(cached, dataset)
    for wrong in (transform("vtab", size=17), transform("fgvc"), transform("fgvc", train=False), None):
        with pytest.raises(InputError, match=r"transform must prepare images as .*size=\[16, 16\]"):
            cached.with_transform(wrong)
    whole = cache_images(dataset.with_transform(None), tmp_path)
    assert_same_images(whole.with_transform(transform("fgvc")), dataset.with_transform(transform("fgvc")))


def test_images_in_memory_and_in_archives(tmp_path: Path, decoded: list[int]) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for number in range(3):
            photo = tmp_path / f"{number}.png"
            write_photo(photo, number)
            archive.add(photo, f"a/{number}.png")
    with tarfile.open(tmp_path / "train-0.tar") as archive:
        members = [
            TarMember(tmp_path / "train-0.tar", found.offset_data, found.size, found.name)
            for found in archive.getmembers()
        ]
    palette = Image.new("P", (5, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    memory = [palette, Image.new("I;16", (3, 2), 40_000), Image.new("RGBA", (3, 3), (1, 2, 3, 4))]
    sources: list[Any] = [*members, *memory, tmp_path / "0.png", str(tmp_path / "1.png")]
    dataset = ImageDataset(
        [(source, 0) for source in sources], ["a"], transform=transform(), name="all kinds"
    )
    cached = cache_images(dataset, tmp_path / "cache")
    assert_same_images(cached, dataset)
    decoded.clear()
    assert_same_images(cache_images(dataset, tmp_path / "cache"), cached)
    assert decoded == []
    palette.putpalette([0, 0, 0, 10, 20, 31])  # the same indices into other colours
    cached = cache_images(dataset, tmp_path / "cache")
    assert decoded == [0, 1, 2, 3] and cached.pixels(3)[0, 0].tolist() == [10, 20, 31]
    os.utime(tmp_path / "train-0.tar", ns=(1, 1))
    os.utime(tmp_path / "1.png", ns=(1, 1))
    decoded.clear()
    assert_same_images(cache_images(dataset, tmp_path / "cache"), cached)
    assert decoded == list(range(8))


class Painted:
    """A source that is none of this package's."""

    def __init__(self, colour: str) -> None:
        self.colour = colour

    def fingerprint(self) -> str:
        return f"painted {self.colour}"


class PaintedImages(ImageDataset):
    def picture(self, index: int) -> Image.Image:
        source: Any = self.samples[index][0]
        return Image.new("RGB", (9, 9), source.colour)


def test_sources_that_give_their_own_fingerprint(tmp_path: Path) -> None:
    colours = ["red", "green", "blue", "white", "black", "red"]
    samples: list[Any] = [(Painted(colour), 0) for colour in colours]
    dataset = PaintedImages(samples, ["a"], transform=transform())
    assert_same_images(cache_images(dataset, tmp_path), dataset)
    before = identities(tmp_path)
    samples[4][0].colour = "yellow"
    assert cache_images(dataset, tmp_path).pixels(4)[0, 0].tolist() == [255, 255, 0]
    after = identities(tmp_path)
    assert before[0] == after[0] and before[1] != after[1]


# ---------------------------------------------------------------- the files


def test_the_same_bytes_with_any_number_of_workers(photos: Path, tmp_path: Path) -> None:
    (photos / "dog" / "07.png").write_bytes(b"broken")
    made = {}
    for name, num_workers in (("a", 0), ("b", 2)):
        state = torch.get_rng_state()
        assert_same_images(
            cache_images(opened(photos), tmp_path / name, num_workers=num_workers), opened(photos)
        )
        assert torch.equal(torch.get_rng_state(), state)
        made[name] = contents(tmp_path / name)
    assert len(made["a"]) == 3 and made["a"] == made["b"]
    # Nor does it matter where the data is.
    shutil.copytree(photos, tmp_path / "elsewhere" / "photos")
    cache_images(opened(tmp_path / "elsewhere" / "photos"), tmp_path / "d")
    assert list(contents(tmp_path / "d").values()) == list(made["a"].values())


def test_safetensors_reads_the_files(photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / "05.png").write_bytes(b"broken")
    cached = cache_images(opened(photos), tmp_path)
    path = shard_paths(tmp_path)[1]
    tensors = load_file(path)
    for row, index in enumerate(range(4, 8)):
        start, end = tensors["offsets"][row : row + 2]
        assert tuple(tensors["sizes"][row]) == tuple(cached.sizes[index])
        pixels = tensors["pixels"][start:end].reshape(*tensors["sizes"][row], 3)
        if index == 5:
            assert pixels.size == 0
        else:
            np.testing.assert_array_equal(pixels, cached.pixels(index))
    header = path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")]
    assert json.loads(header)["__metadata__"]["format"] == "spt_fast.images.1"


def test_folders_are_named_after_what_is_in_them(photos: Path, tmp_path: Path) -> None:
    cache_images(opened(photos), tmp_path / "cache")
    cache_images(opened(photos, transform=transform("fgvc", train=False)), tmp_path / "cache")
    cache_images(load_dataset(photos, "train", transform=transform("vtab")), tmp_path / "cache")
    cache_images(load_dataset(photos, "train", transform=transform("vtab", size=9)), tmp_path / "cache")
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "cache").iterdir())
    assert names == [
        "photos-train-Resize",
        "photos-train-Resize",
        "photos-trainval-Resize-CenterCrop",
        "photos-trainval-decoded",
    ]
    strange = squares(3)
    strange.name = "../../a b/ü\n" + 300 * "x"
    cache_images(strange, tmp_path / "strange")
    (place,) = (tmp_path / "strange").iterdir()
    assert place.name.startswith("a-b-xxx") and len(place.name) < 130


def test_progress_is_told_only_while_there_is_something_to_decode(photos: Path, tmp_path: Path) -> None:
    for num_workers in (0, 2):
        calls: list[Any] = []
        folder = tmp_path / str(num_workers)
        for _ in range(2):
            cache_images(
                opened(photos),
                folder,
                num_workers=num_workers,
                progress=lambda *call, calls=calls: calls.append(call),
            )
        assert [call[0] for call in calls] == ["decoding"] * 11
        assert [call[1:] for call in calls] == [(done, 11) for done in range(1, 12)]


# ---------------------------------------------------------------- sources that change


def test_only_shards_whose_sources_changed_are_made_again(
    photos: Path, tmp_path: Path, decoded: list[int]
) -> None:
    cache = tmp_path / "cache"
    cache_images(opened(photos), cache)
    before = identities(cache)
    assert decoded == list(range(11))

    def rebuilt(expected: list[int]) -> None:
        """Images that were decoded by another call, and that everything is right afterwards."""
        nonlocal before
        decoded.clear()
        cached = cache_images(opened(photos), cache)
        assert decoded == expected
        after = identities(cache)
        same = [number for number, (a, b) in enumerate(zip(before, after, strict=False)) if a == b]
        assert same == [
            number for number in range(min(len(before), len(after))) if number * 4 not in expected
        ]
        before = after
        assert_same_images(cached, opened(photos))

    rebuilt([])
    write_photo(photos / "cat" / "05.png", 77)  # changed
    rebuilt([4, 5, 6, 7])
    os.utime(photos / "dog" / "10.jpg", ns=(1, 1))  # perhaps changed
    rebuilt([8, 9, 10])
    write_photo(photos / "dog" / "11.png", 11)  # added at the end
    rebuilt([8, 9, 10, 11])
    write_photo(photos / "dog" / "12.png", 12)
    rebuilt([12])
    (photos / "cat" / "04.jpg").unlink()  # everything behind moves, and one shard is too many
    rebuilt([4, 5, 6, 7, 8, 9, 10, 11])
    assert len(shard_paths(cache)) == 3

    (place,) = cache.iterdir()
    half = f"{LEFTOVER_PREFIX}0000"
    for name in (f"{half}2-abandoned.safetensors", f"{half}1-growing.safetensors", "mine.safetensors"):
        (place / name).write_bytes(b"half")
    for name in (f"{half}2-abandoned.safetensors", "mine.safetensors"):
        os.utime(place / name, (1, 1))
    cache_images(opened(photos), cache)
    names = ["00000", "00001", "00002", f"{half}1-growing", "mine"]
    assert {path.name for path in place.iterdir()} == {f"{name}.safetensors" for name in names}


def test_a_photo_replaced_while_the_cache_is_open_is_found_by_the_next_call(
    photos: Path, tmp_path: Path
) -> None:
    cached = cache_images(opened(photos), tmp_path / "cache")
    before = [cached[index] for index in range(11)]
    write_photo(photos / "cat" / "01.png", 99)
    again = cache_images(opened(photos), tmp_path / "cache")
    assert_same_images(again, opened(photos))
    for index, old in enumerate(before):  # mapped before: what it was is still there
        ours = cached[index]
        assert ours is not None and old is not None and torch.equal(ours[0], old[0])


def test_data_sets_leave_each_other_alone(photos: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(photos, tmp_path / "other" / "photos")
    datasets = [
        opened(photos),
        opened(photos, transform=transform("fgvc", train=False)),
        opened(tmp_path / "other" / "photos"),  # of the same name
        squares(9),
    ]
    for dataset in datasets:
        cache_images(dataset, cache)
    (cache / "notes.txt").write_text("mine")
    before = identities(cache)
    assert len(before) == 3 * 3 + 3
    for dataset in datasets:
        assert_same_images(cache_images(dataset, cache), dataset)
    assert identities(cache) == before and (cache / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------- unreadable images


def break_photos(photos: Path) -> None:
    (photos / "cat" / "01.png").write_bytes(b"not an image")
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        content, "JPEG"
    )
    (photos / "cat" / "04.jpg").write_bytes(content.getvalue()[:900])


def test_unreadable_images_are_remembered(photos: Path, tmp_path: Path, decoded: list[int]) -> None:
    break_photos(photos)
    dataset = opened(photos)
    (photos / "dog" / "09.png").unlink()
    first = cache_images(dataset, tmp_path / "cache")
    decoded.clear()
    for cached in (first, cache_images(dataset, tmp_path / "cache")):
        assert [index for index in range(11) if cached[index] is None] == [1, 4, 9]
        assert decoded == []
        assert cached.sizes[[1, 4, 9]].tolist() == [[0, 0]] * 3 and cached.sizes.all(axis=1).sum() == 8
        for index in (1, 4, 9):
            with pytest.raises(
                InputError, match=f"{dataset.samples[index][0]} could not be read as an image"
            ):
                cached.pixels(index)
    assert_same_images(first, dataset)
    for index in (1, 4, 9):
        strict = copy.copy(first)
        strict.strict = dataset.strict = True
        with pytest.raises((InputError, MissingFileError)) as ours:
            strict[index]
        with pytest.raises((InputError, MissingFileError)) as expected:
            dataset[index]
        assert str(ours.value) == str(expected.value) and type(ours.value) is type(expected.value)
    write_photo(photos / "cat" / "01.png", 1)  # mended while in use
    with pytest.raises(InputError, match="could not be read as an image when it was cached"):
        strict[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_strict_data_set_gives_the_error_that_it_gives_uncached(
    num_workers: int, photos: Path, tmp_path: Path
) -> None:
    break_photos(photos)
    dataset = opened(photos, strict=True)
    with pytest.raises(InputError) as expected:
        dataset[4]
    with pytest.raises(InputError) as first_expected:
        dataset[1]
    messages = {str(expected.value), str(first_expected.value)}
    with pytest.raises(InputError) as ours:
        cache_images(dataset, tmp_path / "cache", num_workers=num_workers)
    assert str(ours.value) in messages
    assert len(contents(tmp_path / "cache")) <= 1  # the shard that has no bad image, if it was begun

    # What a lenient one has made does not hide the error.
    dataset.strict = False
    cache_images(dataset, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    dataset.strict = True
    with pytest.raises(InputError) as ours:
        cache_images(dataset, tmp_path / "cache", num_workers=num_workers)
    assert str(ours.value) in messages and contents(tmp_path / "cache") == before
    (photos / "cat" / "01.png").unlink()
    write_photo(photos / "cat" / "04.jpg", 4)
    with pytest.raises(MissingFileError, match=r"01\.png does not exist"):
        cache_images(dataset, tmp_path / "cache", num_workers=num_workers)


# ---------------------------------------------------------------- damage and interruption


def test_damaged_files_are_noticed_and_made_again(photos: Path, tmp_path: Path, decoded: list[int]) -> None:
    dataset = opened(photos)
    cache_images(dataset, tmp_path / "cache")
    whole = contents(tmp_path / "cache")
    path = shard_paths(tmp_path / "cache")[1]

    def truncate() -> None:
        os.truncate(path, path.stat().st_size - 1)

    damages: list[tuple[Callable[[], None], str]] = [
        (lambda: change(path, -5), "its checksum is wrong"),
        (truncate, r"it has \d+ bytes, expected \d+"),
        (lambda: path.write_bytes(b""), "it does not begin with the header"),
        (lambda: path.write_bytes(path.read_bytes() + b"\0"), r"it has \d+ bytes, expected \d+"),
        (lambda: path.write_bytes(path.read_bytes().replace(b"images.1", b"images.2")), "its format is"),
        (lambda: change(path, path.read_bytes().index(b'"source":"') + 12), "."),
    ]
    for damage, why in damages:
        damage()
        decoded.clear()
        with pytest.warns(UserWarning, match=f"{path} is no intact file of cached images: {why}") as caught:
            cached = cache_images(dataset, tmp_path / "cache")
        assert len(caught) == 1 and caught[0].filename == __file__
        assert decoded == [4, 5, 6, 7] and contents(tmp_path / "cache") == whole
        assert_same_images(cached, dataset)


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    path = tmp_path / "0.safetensors"
    images = [
        random.integers(0, 256, (3, 4, 3), dtype=np.uint8),
        None,
        random.integers(0, 256, (2, 1, 3), np.uint8),
    ]
    with writing_shard(path, 3, {"source": "some", "preparation": "none"}) as add:
        for image in images:
            add(image)
    whole = path.read_bytes()
    shard = ImageShard(path, check=True)
    for row, image in enumerate(images):
        ours = shard.image(row)
        assert (ours is None and image is None) or np.array_equal(ours, image)
    assert shard.origin == {"source": "some", "preparation": "none"}
    for where in range(len(whole)):
        path.write_bytes(whole)
        change(path, where, int(random.integers(1, 256)))
        with pytest.raises(InputError, match="is no intact file of cached images"):
            ImageShard(path, check=True)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="is no intact file of cached images"):
            ImageShard(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"__metadata__":{"format":"spt_fast.images.1","checksum":"0"},"sizes":{"shape":[-1,2]},"pixels":{"shape":[9]}}',
        b'{"__metadata__":{"format":"spt_fast.images.1","checksum":0},"sizes":{"shape":["x"]},"pixels":{"shape":[[]]}}',
        b'{"__metadata__":{"format":"spt_fast.images.1","checksum":"0"},"sizes":{"shape":[1e9,2]},"pixels":{"shape":[9]}}',
        b'{"__metadata__":{"format":["spt_fast.images.1"],"checksum":"0"},"sizes":{"shape":[1]},"pixels":{"shape":[9]}}',
    ],
)
def test_a_hostile_header_is_one_sentence(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "0.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 100)
    with pytest.raises(InputError, match="is no intact file of cached images"):
        ImageShard(path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupted_call_is_continued(
    num_workers: int, photos: Path, tmp_path: Path, decoded: list[int]
) -> None:
    for number in range(11, 24):
        write_photo(photos / "dog" / f"{number:02d}.png", number)
    dataset = opened(photos)
    cache_images(dataset, tmp_path / "whole")
    decoded.clear()
    with pytest.raises(Interruption):
        cache_images(
            dataset, tmp_path / "cache", num_workers=num_workers, progress=interrupt_after(13 + num_workers)
        )
    finished = contents(tmp_path / "cache")
    whole = contents(tmp_path / "whole")
    # Three whole shards and one image of the next; workers may have gone on meanwhile, one of them for a shard or more.
    assert len(finished) == 3 if num_workers == 0 else len(finished) >= 1
    assert finished.items() <= whole.items()  # nothing half-written beside them
    before = dict(zip(finished, identities(tmp_path / "cache"), strict=True))
    decoded.clear()
    cached = cache_images(dataset, tmp_path / "cache")
    assert len(decoded) == 24 - 4 * len(finished)
    assert contents(tmp_path / "cache") == whole
    after = dict(zip(whole, identities(tmp_path / "cache"), strict=True))
    assert before.items() <= after.items()
    assert_same_images(cached, dataset)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interruption_at_any_moment_leaves_nothing_half_written(
    num_workers: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = ImageDataset.picture

    def slow(dataset: ImageDataset, index: int) -> Image.Image:
        time.sleep(0.1)
        return picture(dataset, index)

    def interrupt(*_: Any) -> None:
        raise Interruption

    monkeypatch.setattr(ImageDataset, "picture", slow)
    monkeypatch.setattr(cache_module, "REPORT_EVERY", 2)  # half-written for longer than between two reports
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(Interruption) as interruption:
            signal.setitimer(signal.ITIMER_REAL, 0.35)
            cache_images(opened(photos), tmp_path / "cache", num_workers=num_workers)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # Now, while the error and what it refers to are still there.
    assert interruption.value is not None and not multiprocessing.active_children()
    left = [Path(name).name for name in contents(tmp_path / "cache")]
    assert set(left) <= {"00000.safetensors", "00001.safetensors", "00002.safetensors"}
    assert_same_images(cache_images(opened(photos), tmp_path / "cache"), opened(photos))


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may become larger than 3,000 bytes: to who writes it, that is a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.usefixtures("small_files")
def test_a_full_disk_is_one_sentence(num_workers: int, tmp_path: Path) -> None:
    dataset = squares(9)  # of 16 x 16 pixels: a whole shard has 3,072 bytes of them, the last one 768
    message = rf"{tmp_path}.*/0000\d.safetensors cannot be written: {os.strerror(errno.EFBIG)}$"
    with pytest.raises(InputError, match=message):
        cache_images(dataset, tmp_path, num_workers=num_workers)
    assert contents(tmp_path) == {}


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"00000.safetensors cannot be written: Not a directory"):
        cache_images(squares(3), tmp_path / "file")
    cache_images(squares(3), tmp_path / "cache")
    (path,) = shard_paths(tmp_path / "cache")
    path.unlink()
    path.mkdir()
    with (
        pytest.warns(UserWarning, match="Is a directory; it is made again"),
        pytest.raises(InputError, match="cannot be written: Is a directory"),
    ):
        cache_images(squares(3), tmp_path / "cache")


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_workers must be 0 or more, got -1"):
        cache_images(squares(3), tmp_path, num_workers=-1)
    kwargs: dict[str, Any] = {"size": (8, 8), "mean": [0.5] * 3, "std": [0.5] * 3}
    secret = ImageTransform([v2.Lambda(lambda image: image)], [], **kwargs)
    with pytest.raises(InputError, match=r"repr says what they do, got .*Lambda\("):
        cache_images(squares(3).with_transform(secret), tmp_path)
    grey = ImageTransform([v2.Grayscale()], [], **kwargs)
    with pytest.raises(InputError, match="transform must prepare RGB images, got one of mode L"):
        cache_images(squares(3).with_transform(grey), tmp_path)
    assert contents(tmp_path) == {}


# ---------------------------------------------------------------- several processes


def test_pickled_cached_images_map_the_files_again(photos: Path, tmp_path: Path) -> None:
    dataset = opened(photos)
    cached = cache_images(dataset, tmp_path / "cache")
    sent = pickle.dumps(cached)
    assert len(sent) < 10_000 < cached.nbytes
    assert_same_images(pickle.loads(sent), dataset)
    subset = pickle.loads(pickle.dumps(cached.subset([8, 1])))
    assert_same_images(subset, dataset.subset([8, 1]))

    # Files that changed meanwhile are never taken for those that were opened, not even without ``strict``.
    late = pickle.loads(sent)
    write_photo(photos / "cat" / "02.jpg", 55)
    cache_images(opened(photos), tmp_path / "cache")
    with pytest.raises(InputError, match=r"00000.safetensors was removed or replaced"):
        late[2]
    assert late[5] is not None
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(InputError, match=r"00002.safetensors was removed or replaced"):
        late[10]
    assert_same_images(cached.subset([5, 6]), dataset.subset([5, 6]))  # mapped before


@pytest.mark.slow
def test_spawned_workers_read_the_files(tmp_path: Path) -> None:
    dataset = squares(9, recipe="fgvc")
    cached = cache_images(dataset, tmp_path)
    loader: Any = torch.utils.data.DataLoader(
        cached, batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    for (ours, label), index in zip(loader, range(9), strict=True):
        expected = dataset[index]
        assert expected is not None and torch.equal(ours, expected[0]) and label == expected[1]


def in_processes(count: int, work: Callable[..., None], *args: Any) -> list[int]:
    """Exit codes of so many forked processes, each of which does ``work(rank, *args)``."""
    context: Any = get_context("fork")
    processes = [context.Process(target=work, args=(rank, *args)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def cache_in_group(rank: int, folder: Path, photos: Path, strict: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    calls: list[Any] = []
    outcome: Any = None
    try:
        dataset = opened(photos, strict=strict)
        cached = cache_images(dataset, folder / "cache", progress=lambda *call: calls.append(call))
        assert_same_images(cached, dataset)
    except InputError as error:
        outcome = str(error)
    (folder / f"{rank}.json").write_text(json.dumps([calls, outcome]))
    dist.barrier()
    dist.destroy_process_group()


def test_processes_of_a_group_share_the_work(photos: Path, tmp_path: Path) -> None:
    cache_images(opened(photos), tmp_path / "alone")
    (tmp_path / "both").mkdir()
    assert in_processes(2, cache_in_group, tmp_path / "both", photos, False) == [0, 0]
    results = [json.loads((tmp_path / "both" / f"{rank}.json").read_text()) for rank in range(2)]
    assert [calls[-1] for calls, _ in results] == [["decoding", 7, 7], ["decoding", 4, 4]]
    assert [outcome for _, outcome in results] == [None, None]
    assert contents(tmp_path / "both" / "cache") == contents(tmp_path / "alone")

    # An error in one is an error in both, and none waits for the other for ever.
    (tmp_path / "strict").mkdir()
    (photos / "cat" / "05.png").write_bytes(b"not an image")
    assert in_processes(2, cache_in_group, tmp_path / "strict", photos, True) == [0, 0]
    outcomes = [json.loads((tmp_path / "strict" / f"{rank}.json").read_text())[1] for rank in range(2)]
    assert outcomes[0].startswith("process 1 could not cache its share")
    assert "05.png cannot be read as an image" in outcomes[1]
    assert len(contents(tmp_path / "strict" / "cache")) == 2


def test_unrelated_processes_can_make_the_same_cache_at_once(photos: Path, tmp_path: Path) -> None:
    cache_images(opened(photos), tmp_path / "alone")
    cache_images(opened(photos), tmp_path / "both")
    exits = in_processes(3, make_again, tmp_path / "both", photos)
    assert exits == [0, 0, 0]
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")


def make_again(rank: int, folder: Path, photos: Path) -> None:
    """Every process believes that nothing is there yet, and writes all of it over what others write and read."""
    torch.set_num_threads(1)
    cache_module._Cache._fault = lambda cache, number: "it is not there"  # type: ignore[method-assign]
    for _ in range(5):
        assert_same_images(cache_images(opened(photos), folder), opened(photos))
