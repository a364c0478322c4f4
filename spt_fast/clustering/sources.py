"""Tokens in whatever form they come, as chunks ``[L, t, D]`` that can be read again and again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spt_fast.errors import InputError

TOKEN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What is converted or moved on the way is taken in pieces of this many bytes, as the kernels will see them.
CHUNK_BYTES = 64 << 20
# Entries looked at together, in float64, by a CPU: they should stay in its cache.
ENTRIES = 1 << 22


@dataclass(frozen=True)
class Form:
    """How tokens came, so that results can go back in the same form.

    Attributes:
        numpy: as a numpy array (or something like one), not as a torch tensor.
        layered: with a leading layer axis.
        dtype: the dtype of a numpy array.
    """

    numpy: bool
    layered: bool
    dtype: np.dtype | None = None

    def returned(self, result: Tensor, dtype: np.dtype | None = None) -> Any:
        """``result`` ``[L, ...]`` as the caller expects it: ``[...]`` for one set of tokens, numpy for numpy."""
        if not self.layered:
            result = result[0]
        if not self.numpy:
            return result
        array = result.cpu().numpy()[()]  # a single number comes as such
        return array if dtype is None else array.astype(dtype, copy=False)


class Source:
    """Tokens that can be read in chunks, as often as needed.

    Args:
        chunks: a re-iterable of ``(tokens [L, t, D], weights [L, t] or None)``.
        form: how they came; ``None`` if ``chunks.form`` tells once they are being read.
        in_memory: whether one label per token may be kept as well.
        length: how many tokens of a layer there are here; ``None`` until they have been read, if nobody knows before.
        weighted: whether tokens have weights.

    Attributes:
        replicated: every process has all the tokens, not a share of its own.
        expected: layers and features that every chunk must have; ``None`` takes any.
        sound: refuse NaN and infinite tokens while reading.
    """

    def __init__(
        self,
        chunks: Any,
        form: Form | None,
        *,
        in_memory: bool,
        length: int | None,
        weighted: bool = False,
    ) -> None:
        self._chunks = chunks
        self._form = form
        self.in_memory = in_memory
        self.length = length
        self.weighted = weighted
        self.replicated = False
        self.expected: tuple[int, int] | None = None
        self.sound = False

    @classmethod
    def of_sample(cls, tokens: Tensor, weights: Tensor | None = None) -> Source:
        """Tokens ``[L, n, D]``, with weights ``[L, n]`` or without, that every process has alike."""
        source = cls.of_chunk(tokens, weights)
        source.replicated = True
        return source

    @classmethod
    def of_chunk(cls, tokens: Tensor, weights: Tensor | None = None) -> Source:
        """Tokens ``[L, T, D]``, with weights ``[L, T]`` or without, of which every process has its own."""
        form = Form(numpy=False, layered=True)
        length, weighted = tokens.shape[1], weights is not None
        return cls([(tokens, weights)], form, in_memory=True, length=length, weighted=weighted)

    @property
    def form(self) -> Form:
        """How the tokens came."""
        return self._chunks.form if self._form is None else self._form

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        passed = 0
        for tokens, weights in self._chunks:
            if self.expected not in (None, (tokens.shape[0], tokens.shape[2])):
                layers, features = self.expected
                wanted = ["T", features] if layers == 1 else [layers, "T", features]
                raise InputError(f"X must be {wanted}, as it was when fitted, got {list(tokens.shape)}")
            if self.sound:
                unsound = first_unsound(tokens)
                refuse_unsound(unsound if unsound < 0 else passed + unsound)
            passed += tokens.shape[1]
            if self.weighted and weights is None:  # other processes have weights
                weights = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
            yield tokens, weights
        if self.length not in (None, passed):
            raise InputError(
                f"X yielded {self.length} tokens when it was read first, and {passed} when it was read again"
            )
        self.length = passed


def open_source(
    x: Any,
    sample_weight: Any = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Source:
    """Look at what the caller passed as ``X``.

    Args:
        x: a tensor or numpy array (memory-maps too) ``[T, D]`` or ``[L, T, D]``, or a re-iterable of such chunks.
        sample_weight: how much each token of ``[T, D]`` counts, ``[T]``.
        device: where to work; ``None`` works where the tokens are.
        dtype: the dtype to work in; ``None`` keeps float32, float16 and bfloat16, and takes all else as float32.

    Raises:
        InputError: something else, or weights that do not fit.
    """
    if dtype not in (None, *TOKEN_DTYPES):
        raise InputError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if isinstance(x, (Tensor, np.ndarray)):
        return _array_source(x, sample_weight, device, dtype)
    if sample_weight is not None:
        raise InputError("sample_weight needs X as one array [T, D], got chunks")
    if iter(x) is x:
        raise InputError(
            f"X can be read only once, as it is an iterator ({type(x).__name__}); pass a list of chunks or an object "
            "whose __iter__ starts over"
        )
    return Source(_Chunks(x, device, dtype), None, in_memory=False, length=None)


def as_chunk(x: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor or array as tokens ``[L, T, D]`` to work on; copied only if the device or dtype asks for it."""
    if not isinstance(x, (Tensor, np.ndarray)) or x.ndim not in (2, 3):
        came = list(x.shape) if isinstance(x, (Tensor, np.ndarray)) else type(x).__name__
        raise InputError(
            f"X must be a tensor or array [T, D] or [L, T, D], or chunks of that form, got {came}"
        )
    if isinstance(x, np.ndarray):
        x = _as_tensor(x)
    tokens = x.detach() if x.ndim == 3 else x.detach()[None]
    return tokens.to(device=device, dtype=_working(tokens.dtype, dtype))


def _array_source(
    x: Tensor | np.ndarray,
    sample_weight: Any,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Source:
    numpy = isinstance(x, np.ndarray)
    form = Form(numpy=numpy, layered=x.ndim == 3, dtype=x.dtype if isinstance(x, np.ndarray) else None)
    weights = None if sample_weight is None else _weights(sample_weight, x)
    # A memory-map may be larger than memory: what has to be converted or moved is so piece by piece, at every pass.
    if (
        isinstance(x, np.memmap)
        and as_chunk(x[..., :1, :], device=device, dtype=dtype).data_ptr() != x.ctypes.data
    ):
        chunks: Any = _Slices(x, weights, device, dtype)
    else:
        tokens = as_chunk(x, device=device, dtype=dtype)
        chunks = [(tokens, None if weights is None else weights.to(tokens.device))]
    return Source(chunks, form, in_memory=True, length=x.shape[-2], weighted=weights is not None)


def in_parts(tokens: Tensor) -> tuple[Tensor, ...]:
    """``[L, T, D]`` cut into pieces ``[L, t, D]`` of which a copy in float64 is no burden."""
    entries = ENTRIES if tokens.device.type == "cpu" else 32 * ENTRIES
    return tokens.split(max(1, entries // max(1, tokens.shape[0] * tokens.shape[2])), dim=1)


def first_unsound(tokens: Tensor) -> int:
    """The first row of ``[L, T, D]`` with a NaN or infinite entry in any layer, or -1."""
    passed = 0
    for part in in_parts(tokens):
        # A sum is NaN or infinite as soon as one entry is.
        if not torch.isfinite(part.sum(dtype=torch.float64)):
            return passed + int((~torch.isfinite(part)).any(dim=2).any(dim=0).nonzero()[0])
        passed += part.shape[1]
    return -1


def refuse_unsound(row: int, rank: int | None = None) -> None:
    """Raise if ``row`` is one."""
    if row >= 0:
        where = "" if rank is None else f" of process {rank}"
        raise InputError(f"X holds NaN or infinite values, first in row {row}{where}")


def common_shape(shapes: list[list[int]]) -> tuple[int, int]:
    """Layers and features of the tokens, from what each process reports of its own: zeros if it has none."""
    known = {(layers, features) for layers, features in shapes if features}
    if len(known) > 1:
        raise InputError(f"X differs between processes in its number of layers or features: {sorted(known)}")
    return known.pop() if known else (0, 0)


class _Chunks:
    """The caller's chunks, brought into form and held to one shape."""

    def __init__(
        self, chunks: Iterable[Any], device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        self._chunks, self._device, self._dtype = chunks, device, dtype
        self.form = Form(numpy=False, layered=False)

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        shape: tuple[int, ...] | None = None
        for index, chunk in enumerate(self._chunks):
            tokens = as_chunk(chunk, device=self._device, dtype=self._dtype)
            own = (chunk.ndim, tokens.shape[0], tokens.shape[2])
            if shape not in (None, own):
                raise InputError(
                    f"X: chunk {index} is {list(chunk.shape)}, and the chunks before it differ in the number of axes, "
                    "layers or features"
                )
            shape = own
            self.form = Form(numpy=isinstance(chunk, np.ndarray), layered=chunk.ndim == 3)
            yield tokens, None


class _Slices:
    """A memory-map, converted or moved piece by piece."""

    def __init__(
        self,
        x: np.ndarray,
        weights: Tensor | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._x, self._weights, self._device, self._dtype = x, weights, device, dtype

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        length = self._x.shape[-2]
        rows = max(1, CHUNK_BYTES * length // max(1, self._x.nbytes))
        for start in range(0, max(length, 1), rows):
            tokens = as_chunk(self._x[..., start : start + rows, :], device=self._device, dtype=self._dtype)
            weights = self._weights
            yield tokens, None if weights is None else weights[:, start : start + rows].to(tokens.device)


def _as_tensor(x: np.ndarray) -> Tensor:
    if x.dtype.kind not in "biuf":
        raise InputError(f"X must hold real numbers, got {x.dtype}")
    if x.dtype not in (np.float32, np.float16):
        with np.errstate(over="ignore"):  # what becomes infinite is refused as such
            x = x.astype(np.float32)
    if any(stride < 0 or stride % x.itemsize for stride in x.strides):
        x = x.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only arrays: nothing here writes to tokens
        return torch.from_numpy(x)


def _working(own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    if own.is_complex:
        raise InputError(f"X must hold real numbers, got {own}")
    return asked or (own if own in TOKEN_DTYPES else torch.float32)


def _weights(sample_weight: Any, x: Tensor | np.ndarray) -> Tensor:
    if not isinstance(sample_weight, Tensor):
        sample_weight = np.asarray(sample_weight)
    weights = torch.as_tensor(sample_weight, dtype=torch.float32)
    if weights.ndim == 0:
        weights = weights.expand(x.shape[-2])
    if x.ndim != 2 or weights.shape != (x.shape[0],):
        raise InputError(
            f"sample_weight must hold one number for each token of X [T, D], got "
            f"{list(weights.shape)} for X {list(x.shape)}"
        )
    if not (torch.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise InputError("sample_weight must hold finite numbers of at least 0, and not only zeros")
    return weights[None]
