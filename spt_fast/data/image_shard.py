"""One file of decoded images, read through a memory map.

It is a safetensors file, so that other tools can read it too, of three tensors in this order: ``sizes`` int64 [n, 2]
(height and width of each image; 0, 0 where there is none), ``offsets`` int64 [n + 1] (where each image begins in
``pixels``, and where the last one ends) and ``pixels`` uint8 (all images one after the other, each [H, W, 3]). The
metadata is the format's name, where the images came from, and a CRC-32 of everything else in the file.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from spt_fast.errors import InputError
from spt_fast.files import atomic_path

FORMAT = "spt_fast.images.1"
Add = Callable[["np.ndarray | None"], None]

_INT = np.dtype("<i8")
_ALIGNMENT = 64
_MOST_HEADER_BYTES = 1 << 20
_MOST_PIXEL_BYTES = 10**18
_PIECE_BYTES = 1 << 20
_NO_CHECKSUM = "0" * 8


@contextmanager
def writing_shard(path: Path, count: int, origin: Mapping[str, str]) -> Iterator[Add]:
    """Write a shard of ``count`` images, which appears when the block ends without an error.

    The pixels go to disk as they come: a shard of large photographs need not fit into memory.

    Args:
        path: the file.
        count: how many images will come, 1 or more.
        origin: where they come from, as texts by name.

    Yields:
        A function to call with each image in turn, uint8 [H, W, 3], or None for one that could not be read.

    Raises:
        InputError: the file cannot be written, because the disk is full for example. What was there before stays.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "0.safetensors"
        >>> with writing_shard(path, 2, {"source": "nowhere"}) as add:
        ...     add(np.full((2, 5, 3), 7, np.uint8))
        ...     add(None)
        >>> ImageShard(path).image(0).shape, ImageShard(path).image(1)
        ((2, 5, 3), None)
    """
    sizes = np.zeros((count, 2), _INT)
    added, checksum = 0, 0
    error_of_caller: BaseException | None = None
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            file.seek(len(_header(count, 0, origin, _NO_CHECKSUM)) + _table_bytes(count))

            def add(image: np.ndarray | None) -> None:
                nonlocal added, checksum
                if image is not None:
                    pixels = np.ascontiguousarray(image).data
                    sizes[added] = image.shape[:2]
                    checksum = zlib.crc32(pixels, checksum)
                    try:
                        file.write(pixels)
                    except OSError as error:
                        raise _unwritable(path, error) from error
                added += 1

            try:
                yield add
            except BaseException as error:
                error_of_caller = error
                raise
            assert added == count, (added, count)
            offsets = _offsets(sizes)
            tables = sizes.tobytes() + offsets.tobytes()
            blank = _header(count, int(offsets[-1]), origin, _NO_CHECKSUM)
            checksum = zlib.crc32(blank + tables, checksum)
            file.seek(0)
            file.write(_header(count, int(offsets[-1]), origin, f"{checksum:08x}") + tables)
    except OSError as error:
        if error is error_of_caller:
            raise
        raise _unwritable(path, error) from error


class ImageShard:
    """The images in one file.

    It can be pickled: the copy maps the file again when an image is asked for.

    Args:
        path: the file.
        check: compute the checksum of the whole file, which reads all of it.

    Attributes:
        path (Path): the file.
        sizes: int64 [n, 2], height and width of each image; 0, 0 where there is none.
        origin (dict[str, str]): where the images came from.

    Raises:
        InputError: the file is no such file, or damaged; the sentence says why.
    """

    def __init__(self, path: Path, *, check: bool = False) -> None:
        self.path = path
        self._pixels: np.ndarray | None = None
        try:
            with path.open("rb") as file:
                self._read(file)
                if check:
                    self._check(file)
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}

    def image(self, row: int) -> np.ndarray | None:
        """Image ``row``, uint8 [H, W, 3], a read-only view into the memory map; None if it could not be read.

        Raises:
            InputError: the file was replaced by another one before it was mapped.
        """
        height, width = self.sizes[row].tolist()
        if not height * width:
            return None
        if self._pixels is None:
            self.map()
        assert self._pixels is not None
        return self._pixels[self._offsets[row] : self._offsets[row + 1]].reshape(height, width, 3)

    def map(self) -> None:
        """Map the file, unless it is mapped.

        Raises:
            InputError: the file is gone, or was replaced by another one since it was opened.
        """
        if self._pixels is not None:
            return
        length = len(self._header) + _table_bytes(len(self.sizes)) + int(self._offsets[-1])
        try:
            # Unlike numpy's maps, torch's hold no file descriptor: a million images are thousands of files. A private
            # map is never written back.
            whole = torch.from_file(str(self.path), shared=False, size=length, dtype=torch.uint8).numpy()
        except RuntimeError as error:
            raise self._replaced() from error
        # The header has the checksum in it: the same header is the same file.
        if whole[: len(self._header)].tobytes() != self._header:
            raise self._replaced()
        whole.flags.writeable = False
        self._pixels = whole[length - int(self._offsets[-1]) :]

    def _read(self, file: BinaryIO) -> None:
        """Everything but the pixels. Nothing is believed of a file that may come from anywhere."""
        start = file.read(8)
        self._header = start + file.read(min(int.from_bytes(start, "little"), _MOST_HEADER_BYTES))
        try:
            header = json.loads(self._header[8:])
            count, num_bytes = header["sizes"]["shape"][0], header["pixels"]["shape"][0]
            metadata = header["__metadata__"]
            self._checksum = metadata.pop("checksum")
            name = metadata.pop("format")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged("it does not begin with the header of one") from error
        if name != FORMAT:
            raise self._damaged(f"its format is {name!r}, expected {FORMAT!r}")
        self.origin: dict[str, str] = metadata
        if not all(type(number) is int and 0 <= number <= _MOST_PIXEL_BYTES for number in (count, num_bytes)):
            raise self._damaged("its header is not as it was written")
        if self._header != _header(count, num_bytes, self.origin, self._checksum):
            raise self._damaged("its header is not as it was written")
        length = len(self._header) + _table_bytes(count) + num_bytes
        if os.fstat(file.fileno()).st_size != length:
            raise self._damaged(f"it has {os.fstat(file.fileno()).st_size} bytes, expected {length}")
        self._tables = file.read(_table_bytes(count))
        numbers = np.frombuffer(self._tables, _INT)
        self.sizes, self._offsets = numbers[: 2 * count].reshape(count, 2), numbers[2 * count :]
        if (
            (self.sizes < 0).any()
            or (self._offsets != _offsets(self.sizes)).any()
            or self._offsets[-1] != num_bytes
        ):
            raise self._damaged("its sizes and offsets do not belong together")

    def _check(self, file: BinaryIO) -> None:
        checksum = 0
        piece = memoryview(bytearray(_PIECE_BYTES))
        # Through reads instead of the map: a failing disk is then an error, not the end of the process.
        while length := file.readinto(piece):  # type: ignore[attr-defined]
            checksum = zlib.crc32(piece[:length], checksum)
        blank = _header(len(self.sizes), int(self._offsets[-1]), self.origin, _NO_CHECKSUM)
        if f"{zlib.crc32(blank + self._tables, checksum):08x}" != self._checksum:
            raise self._damaged("its checksum is wrong")

    def _damaged(self, why: str) -> InputError:
        return InputError(f"{self.path} is no intact file of cached images: {why}")

    def _replaced(self) -> InputError:
        return InputError(
            f"{self.path} was removed or replaced after it was opened, expected it to stay while in use"
        )


def _offsets(sizes: np.ndarray) -> np.ndarray:
    """Where images of these sizes [n, 2] begin, and where the last one ends, int64 [n + 1]."""
    return np.concatenate([np.zeros(1, _INT), np.cumsum(3 * sizes[:, 0] * sizes[:, 1])]).astype(_INT)


def _table_bytes(count: int) -> int:
    """Bytes of ``sizes`` and ``offsets`` of ``count`` images."""
    return (2 * count + count + 1) * _INT.itemsize


def _header(count: int, num_bytes: int, origin: Mapping[str, str], checksum: str) -> bytes:
    """The header of a safetensors file; its length does not depend on ``num_bytes`` and ``checksum``."""

    def text(num_bytes: int) -> bytes:
        sizes_end, offsets_end = 16 * count, _table_bytes(count)
        header = {
            "__metadata__": {"format": FORMAT, **origin, "checksum": checksum},
            "sizes": {"dtype": "I64", "shape": [count, 2], "data_offsets": [0, sizes_end]},
            "offsets": {"dtype": "I64", "shape": [count + 1], "data_offsets": [sizes_end, offsets_end]},
            "pixels": {
                "dtype": "U8",
                "shape": [num_bytes],
                "data_offsets": [offsets_end, offsets_end + num_bytes],
            },
        }
        return json.dumps(header, separators=(",", ":")).encode()

    length = -(-(8 + len(text(_MOST_PIXEL_BYTES))) // _ALIGNMENT) * _ALIGNMENT - 8
    return length.to_bytes(8, "little") + text(num_bytes).ljust(length)


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written: {error.strerror or error}")
