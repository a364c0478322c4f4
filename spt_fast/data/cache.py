"""Every image decoded once: a folder of shards, from which later epochs and later runs read through memory maps.

What is kept of an image is what the transform's preparation makes of it, which is the same in every epoch. A shard
knows the files that it was made from by their size and time, and is made again when one of them changes.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from spt_fast.distributed import gathered_numbers, world
from spt_fast.errors import InputError, MissingFileError, SptFastError
from spt_fast.files import LEFTOVER_PREFIX
from spt_fast.progress import Progress

from .dataset import ImageDataset, Transform
from .image_shard import ImageShard, writing_shard
from .images import to_rgb
from .tar_member import TarMember
from .transforms import ImageTransform

SHARD_IMAGES = 256
# A thread spends its time waiting for the disk, or in a checksum, which lets the others run.
CHECKING_THREADS = 8
REPORT_EVERY = 16  # images
# A file that is being written grows all the time; one that has not for so long never will.
ABANDONED_SECONDS = 24 * 3600

Outcomes = Generator["int | Exception", None, None]


class CachedImages(ImageDataset):
    """The images of a data set, decoded: :func:`cache_images` makes them.

    Everything else is as in the data set: samples, classes, transform, seed, and what ``dataset[index]`` gives, bit for
    bit. It can be sent to other processes, which map the same files.

    Args:
        dataset: the images.
        files: the shards that hold them, in order.

    Attributes:
        sizes: int64 [n, 2], height and width in pixels of every image as it is kept; 0, 0 for one that could not be
            read.
    """

    def __init__(self, dataset: ImageDataset, files: Sequence[ImageShard]) -> None:
        super().__init__(
            dataset.samples,
            dataset.classes,
            transform=dataset.transform,
            strict=dataset.strict,
            seed=dataset.seed,
            recipe=dataset.recipe,
            name=dataset.name,
            shards=dataset.shards,
        )
        self.epoch = dataset.epoch
        self.sizes = np.concatenate([file.sizes for file in files]).astype(np.int64)
        self._files = list(files)
        self._places = np.arange(len(self.sizes))

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels of all images."""
        return int(3 * self.sizes.prod(axis=1).sum())

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | None:
        """The image ``[3, H, W]`` float32 and its label; None for an unreadable file unless ``strict``."""
        pixels = self._kept(index)
        if pixels is None:
            if self.strict:
                self.picture(index)  # raises what the data set that is not cached raises
                raise self._unreadable(index)
            return None
        transform = self.transform.finish if isinstance(self.transform, ImageTransform) else self.transform
        image = self._transformed(Image.fromarray(pixels), int(index) % len(self), transform)
        return image, self.samples[index][1]

    def pixels(self, index: int) -> np.ndarray:
        """Image ``index`` as it is kept, uint8 [H, W, 3]: a read-only view into the memory map.

        Raises:
            InputError: its file could not be read, or the cache was removed or replaced while in use.
        """
        pixels = self._kept(index)
        if pixels is None:
            raise self._unreadable(index)
        return pixels

    def subset(self, indices: Sequence[int]) -> CachedImages:
        """The images at ``indices``, in that order, with all the classes."""
        chosen = [operator.index(index) for index in indices]
        smaller = super().subset(chosen)
        assert isinstance(smaller, CachedImages)
        smaller._places = self._places[chosen]
        smaller.sizes = self.sizes[chosen]
        return smaller

    def with_transform(self, transform: Transform | None) -> CachedImages:
        """The same images behind another transform.

        Raises:
            InputError: the transform prepares images in another way than those that are kept.
        """
        kept, wanted = preparation(self.transform), preparation(transform)
        if wanted != kept:
            raise InputError(
                f"transform must prepare images as those that are kept of {self.name} ({kept}), got {wanted}"
            )
        other = super().with_transform(transform)
        assert isinstance(other, CachedImages)
        return other

    def _kept(self, index: int) -> np.ndarray | None:
        file, row = divmod(int(self._places[operator.index(index)]), len(self._files[0].sizes))
        return self._files[file].image(row)

    def _unreadable(self, index: int) -> InputError:
        return InputError(f"{self.describe(index)} could not be read as an image when it was cached")


def cache_images(
    dataset: ImageDataset,
    folder: str | os.PathLike[str],
    *,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> CachedImages:
    """Decode all images into files, or open those of an earlier call.

    The files lie in a folder of their own in ``folder``, which other data sets can share. Those that are whole and were
    made from the images as they are now are kept; the rest is made, so that an interrupted call goes on where it was.
    With several processes (torchrun) each checks and makes its share; all of them must see the same ``folder``.

    Args:
        dataset: the images. A transform of :func:`make_transform` prepares them before they are kept; others get
            them at their own size.
        folder: where to keep them; made if missing. They take 3 bytes a pixel.
        num_workers: processes that decode; 0 decodes in this one.
        progress: called as ``progress("decoding", images, total)`` while there is something to decode; counts this
            process's share.

    Returns:
        The same data set, reading from the files. An unreadable image is remembered as such.

    Raises:
        InputError: a file of the cache cannot be written, a preparation that does not say what it does, or
            a ``strict`` data set with an image that cannot be read.
        MissingFileError: a ``strict`` data set with an image that is not there.

    Warns:
        UserWarning: a file of the cache is damaged; it is made again.

    Example:
        >>> import tempfile
        >>> from spt_fast.data import load_dataset, make_transform
        >>> transform = make_transform("vtab", image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, train=True)
        >>> digits = load_dataset("digits", "val", transform=transform)
        >>> cached = cache_images(digits, tempfile.mkdtemp())
        >>> cached.pixels(0).shape, cached.nbytes == 200 * 32 * 32 * 3
        ((32, 32, 3), True)
        >>> torch.equal(cached[7][0], digits[7][0])
        True
    """
    if num_workers < 0:
        raise InputError(f"num_workers must be 0 or more, got {num_workers}")
    cache = _Cache(dataset, Path(folder).expanduser())
    rank, world_size = world()

    def make_share() -> None:
        missing = cache.missing(range(rank, len(cache.paths), world_size))
        _build(cache, missing, num_workers, progress)
        if rank == 0:
            cache.remove_stale()

    _in_all_processes(make_share)
    return CachedImages(dataset, [cache.opened(number) for number in range(len(cache.paths))])


def preparation(transform: Transform | None) -> str:
    """What is done to an image before it is kept.

    Raises:
        InputError: a preparation step whose ``repr`` does not say what it does, or not the same in every process.

    Example:
        >>> from spt_fast.data import make_transform
        >>> preparation(make_transform("fgvc", image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, train=True))
        'decode'
    """
    description = "; ".join(["decode", *map(repr, _steps(transform))])
    if re.search(r" at 0x[0-9a-f]|<lambda>", description):
        raise InputError(
            f"transform must have preparation steps whose repr says what they do, got {description!r}"
        )
    return description


class _Cache:
    """The folder of one data set: which shards belong there, and whether they do.

    Attributes:
        parts (list[range]): the images of each shard.
        paths (list[Path]): the files of the shards.
    """

    def __init__(self, dataset: ImageDataset, folder: Path) -> None:
        self.dataset = dataset
        self._preparation = preparation(dataset.transform)
        root = _common_root([source for source, _ in dataset.samples])
        steps = [type(step).__name__ for step in _steps(dataset.transform)]
        readable = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join([dataset.name, *(steps or ["decoded"])]))
        # Two data sets may have one name: where their files are tells them apart.
        identity = json.dumps([dataset.name, os.path.realpath(root) if root else "", self._preparation])
        self._place = folder / f"{readable.strip('-.')[:100]}-{_hash(identity.encode())[:10]}"
        end = len(dataset)
        self.parts = [range(start, min(start + SHARD_IMAGES, end)) for start in range(0, end, SHARD_IMAGES)]
        self.paths = [self._place / f"{number:05d}.safetensors" for number in range(len(self.parts))]
        # What the sources are is looked up before they are read: what changes meanwhile is found by the next call.
        with ThreadPoolExecutor(CHECKING_THREADS) as pool:
            self._origins = list(pool.map(lambda part: self._origin_now(part, root), self.parts))

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Those of the shards that are to be made."""
        with ThreadPoolExecutor(CHECKING_THREADS) as pool:
            faults = list(pool.map(self._fault, numbers))
        for fault in faults:
            if isinstance(fault, InputError):
                warnings.warn(f"{fault}; it is made again", stacklevel=5)  # of whoever calls cache_images
        return [number for number, fault in zip(numbers, faults, strict=True) if fault is not None]

    def make(self, number: int) -> Generator[int, None, None]:
        """Decode the images of a shard into its file; yields how many more are done from time to time."""
        part = self.parts[number]
        waiting = 0
        with writing_shard(self.paths[number], len(part), self._origins[number]) as add:
            for index in part:
                if waiting == REPORT_EVERY:
                    yield waiting
                    waiting = 0
                add(self._prepared(index))
                waiting += 1
        yield waiting

    def opened(self, number: int) -> ImageShard:
        """A shard that is known to be whole, mapped: it then stays readable even if another process replaces it."""
        if not os.path.isfile(self.paths[number]):
            raise InputError(
                f"{self.paths[number]} is not there although a process has made it, "
                "expected a folder that all processes see"
            )
        shard = ImageShard(self.paths[number])
        if shard.origin != self._origins[number]:
            raise InputError(
                f"{shard.path} was replaced by another process that caches a data set called {self.dataset.name} too; "
                "expected it to be cached once at a time"
            )
        shard.map()
        return shard

    def remove_stale(self) -> None:
        """Remove the shards that a larger data set had, and what a process that was killed left half-written."""
        for path in self._place.glob("*.safetensors"):
            shard = re.fullmatch(r"[0-9]{5,}", path.stem)
            half = path.name.startswith(LEFTOVER_PREFIX)
            # What cannot be removed does no harm: the folder may be one that can only be read.
            with suppress(OSError):
                if (shard and int(path.stem) >= len(self.paths)) or (
                    half and time.time() - path.stat().st_mtime > ABANDONED_SECONDS
                ):
                    path.unlink()

    def _fault(self, number: int) -> InputError | str | None:
        """Why a shard is to be made; an error where it should have been whole."""
        path = self.paths[number]
        if not os.path.exists(path):
            return "it is not there"
        try:
            shard = ImageShard(path, check=True)
        except InputError as error:
            return error
        if shard.origin != self._origins[number]:
            return "it was made from something else"
        if self.dataset.strict and not shard.sizes.all():
            # Trying again raises the error that says why, or finds the image readable.
            return "an image could not be read"
        return None

    def _origin_now(self, part: range, root: str) -> dict[str, str]:
        sources = [_fingerprint(self.dataset.samples[index][0], root) for index in part]
        return {"preparation": self._preparation, "source": _hash(json.dumps(sources).encode())}

    def _prepared(self, index: int) -> np.ndarray | None:
        try:
            image = self.dataset.picture(index)
        except (InputError, MissingFileError):
            if self.dataset.strict:
                raise
            return None
        if isinstance(self.dataset.transform, ImageTransform):
            image = self.dataset.transform.prepare(image)
        if image.mode != "RGB":
            raise InputError(
                f"transform must prepare RGB images, got one of mode {image.mode} from {self._preparation}"
            )
        return np.asarray(image)


class _Making(IterableDataset):
    """Iterating makes shards, each worker its share; gives how many images were done, or the error that ended it."""

    def __init__(self, cache: _Cache, numbers: Sequence[int]) -> None:
        self._cache = cache
        self._numbers = numbers

    def __iter__(self) -> Outcomes:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            for number in self._numbers[first::step]:
                yield from self._cache.make(number)
        except (SptFastError, OSError) as error:
            # Raised here, it would become the traceback of a worker instead of one sentence.
            yield error


def _build(cache: _Cache, numbers: Sequence[int], num_workers: int, progress: Progress | None) -> None:
    total = sum(len(cache.parts[number]) for number in numbers)
    done = 0
    # Closed whatever happens, so that half a file is removed now and not when an exception is forgotten.
    with closing(_made(_Making(cache, numbers), min(num_workers, len(numbers)))) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
            done += outcome
            if progress is not None:
                progress("decoding", done, total)


def _made(making: _Making, num_workers: int) -> Outcomes:
    if num_workers == 0:
        with closing(iter(making)) as outcomes:
            yield from outcomes
        return
    # A worker writes whole files, so that no pixels travel between processes. The generator keeps torch's random state.
    loader: DataLoader[Any] = DataLoader(
        making,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=8,
        in_order=False,
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except BaseException as error:
        # The workers remove what they have half-written when the loader's iterator is forgotten. An interruption of
        # that iterator would remember it.
        traceback.clear_frames(error.__traceback__)
        raise


def _in_all_processes(work: Callable[[], None]) -> None:
    """Work until all processes have done theirs; an error in one is an error in all."""
    failure: Exception | None = None
    try:
        work()
    except Exception as error:
        failure = error
    failed = gathered_numbers([int(failure is not None)]).flatten().tolist()
    if failure is not None:
        raise failure
    if any(failed):
        raise InputError(
            f"process {failed.index(1)} could not cache its share of the images; its own error says why"
        )


def _steps(transform: Transform | None) -> list[torch.nn.Module]:
    return transform.preparation if isinstance(transform, ImageTransform) else []


def _common_root(sources: Sequence[Any]) -> str:
    """The innermost folder that all files are in; empty without files."""
    parents = {os.path.dirname(file) for file in map(_file, sources) if file}
    # Whole names end in a separator, so that /data/cub is no part of /data/cub-2011.
    prefix = os.path.commonprefix([os.path.join(parent, "") for parent in parents])
    return prefix[: prefix.rfind(os.sep) + 1]


def _file(source: Any) -> str:
    """The absolute path of the file that an image is in; empty for one in memory."""
    if isinstance(source, TarMember):
        source = source.path
    return os.path.abspath(source) if isinstance(source, (str, os.PathLike)) else ""


def _fingerprint(source: Any, root: str) -> list[Any]:
    """What is the same as long as an image is; json-able."""
    if isinstance(source, Image.Image):
        image = to_rgb(source)
        return [*image.size, _hash(image.tobytes())]
    try:
        if not isinstance(source, (str, os.PathLike)):
            return [source.fingerprint()]
        status = os.stat(source)
        return [_file(source)[len(root) :], status.st_size, status.st_mtime_ns]
    except OSError:
        return [_file(source)[len(root) :], "not there"]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
