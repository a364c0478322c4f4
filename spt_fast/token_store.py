"""Where the tokens of a whole data set are kept while they are read again and again: as near as they fit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Literal

import numpy as np
import torch
from torch import Tensor

from spt_fast.devices import free_memory
from spt_fast.errors import InputError

Budget = int | Literal["auto"]
Place = Literal["device memory", "host memory", "disk", "nowhere"]

# Left to the model, the kernels' scratch and everybody else.
SHARE_OF_FREE_MEMORY = 0.5
# Batches are joined to chunks of this size: a pass then takes few launches, each of which fills the device.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


class TokenStore:
    """A re-iterable of chunks ``[L, t, D]``, each where it is kept.

    Tokens stay on their device as long as they fit into the budget; then they move to host memory (from a GPU), then to
    a memory-map on disk, in bfloat16, if a folder for it is named; and if there is none they are kept nowhere, but made
    again at every pass.

    Args:
        make: makes the tokens, batch by batch ``[L, t, D]``; called again for every pass if they are kept nowhere.
        budget: bytes of tokens to keep in the memory of the device they are made on; ``"auto"`` is half of what is free
            there. Host memory behind a GPU is always used up to half of what is free.
        cache: the folder for the memory-map; ``None`` uses none.
        remake: whether ``make`` may be called more than once.

    Attributes:
        place: where the tokens are.
        why: a sentence about it.

    Raises:
        InputError: the tokens fit nowhere and cannot be made again.

    Example:
        >>> store = TokenStore(lambda: iter(torch.randn(4, 2, 10, 3)), budget=10_000)
        >>> store.place, sum(chunk.shape[1] for chunk in store)
        ('device memory', 40)
    """

    def __init__(
        self,
        make: Callable[[], Iterable[Tensor]],
        *,
        budget: Budget = "auto",
        cache: str | os.PathLike[str] | None = None,
        remake: bool = True,
    ) -> None:
        self._make = make
        self._budget = budget
        self._cache = cache
        self._chunks: list[Tensor] = []
        self._on_disk: list[tuple[int, tuple[int, ...]]] = []  # where in the file, and which shape
        self._file: IO[bytes] | None = None
        self.place: Place = "device memory"
        self.why = ""
        self._collect(remake)

    def __iter__(self) -> Iterator[Tensor]:
        if self.place == "nowhere":
            yield from _joined(self._make())
        yield from self._chunks
        # Mapped for as long as they are looked at: each map holds a file descriptor, of which there are few.
        yield from (self._mapped(*place) for place in self._on_disk)

    def _collect(self, remake: bool) -> None:
        size = 0
        limit: float | None = None
        for chunk in _joined(self._make()):
            if limit is None:
                self._device = chunk.device
                limit = self._limit(chunk.device)
            size += chunk.nbytes
            while self.place in ("device memory", "host memory") and size > limit:
                limit = self._move_on(size, limit, remake)
            if self.place == "nowhere":
                self._chunks = []
                return
            self._keep(chunk)
        self.why = self.why or f"they take {_in_words(size)}, and {_in_words(limit or 0)} may be used"

    def _move_on(self, size: int, limit: float, remake: bool) -> float:
        """The next farther place; returns its limit."""
        over = f"they take more than the {_in_words(limit)} that may be used of {self.place}"
        kept, self._chunks = self._chunks, []
        if self.place == "device memory" and self._device.type != "cpu":
            self.place, self.why = "host memory", over
            limit = self._limit(torch.device("cpu"))
        elif self._cache is not None:
            self.place, self.why = "disk", f"{over}; {os.fspath(self._cache)} was named as a cache"
            os.makedirs(self._cache, exist_ok=True)
            # Without a name from the start: whatever ends this process, nothing is left behind.
            self._file = tempfile.TemporaryFile(dir=self._cache)  # noqa: SIM115 (lives as long as the store)
            limit = float("inf")
        elif remake:
            self.place, self.why = "nowhere", f"{over}, and no cache on disk was named"
            return limit
        else:
            raise InputError(
                f"images can be read only once, and their tokens cannot be kept: {over}; pass re-iterable images, a "
                "token_cache or a larger token_budget"
            )
        for chunk in kept:
            self._keep(chunk)
        return limit

    def _keep(self, chunk: Tensor) -> None:
        if self.place == "disk":
            self._on_disk.append(self._written(chunk))
        else:
            self._chunks.append(chunk.cpu() if self.place == "host memory" else chunk)

    def _written(self, chunk: Tensor) -> tuple[int, tuple[int, ...]]:
        assert self._file is not None
        offset = self._file.seek(0, os.SEEK_END)
        bits = chunk.to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        bits.numpy().tofile(self._file)
        self._file.flush()
        return offset, tuple(bits.shape)

    def _mapped(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        assert self._file is not None
        bits = np.memmap(self._file, dtype=np.int16, mode="r+", offset=offset, shape=shape)
        return torch.from_numpy(bits).view(torch.bfloat16)

    def _limit(self, device: torch.device) -> float:
        if self._budget != "auto" and device == self._device:
            return self._budget
        return SHARE_OF_FREE_MEMORY * free_memory(device)


def _joined(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same tokens in larger chunks."""
    waiting: list[Tensor] = []
    size = 0
    for batch in batches:
        waiting.append(batch)
        size += batch.nbytes
        if size >= CHUNK_BYTES.get(batch.device.type, CHUNK_BYTES["cuda"]):
            yield torch.cat(waiting, dim=1)
            waiting, size = [], 0
    if waiting:
        yield torch.cat(waiting, dim=1)


def _in_words(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}" if unit != "bytes" else f"{size:.0f} bytes"
