"""kmeans_step and kmeans_assign in C++ for CPUs: one pass over the tokens, vector instructions chosen at run time.

The library is built from ``kernels/cpu`` into ``kernels/_native`` when the package is installed, or by hand
(``cmake -B build && cmake --build build``). ``SPT_FAST_INSTRUCTION_SET`` asks for one of its instruction sets.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .kmeans_torch import common_offset

ENVIRONMENT_VARIABLE = "SPT_FAST_INSTRUCTION_SET"
LIBRARY = Path(__file__).resolve().parent / "_native" / "spt_fast_cpu.so"
HOW_TO_BUILD = (
    "install again where there is a C++ compiler, or in a checkout: cmake -B build && cmake --build build"
)

# These agree with kernels/cpu/kmeans.h.
ABI_VERSION = 1
ELEMENT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Tokens(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("layers", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("layer_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("feature_stride", ctypes.c_int64),
        ("clusters", ctypes.c_int64),
        ("centroids", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
    ]


def kmeans_step(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, counts and inertia in one pass; they do not depend on the number of threads."""
    sums = torch.empty_like(centroids, memory_format=torch.contiguous_format)
    counts = torch.empty(centroids.shape[:-1], dtype=torch.int64)
    inertia = torch.empty(centroids.shape[:-2], dtype=torch.float64)
    _call("spt_fast_kmeans_step", x, centroids, sums, counts, inertia)
    return sums, counts, inertia


def kmeans_assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every token and how far it is, the distance formed from the differences themselves."""
    labels = torch.empty(x.shape[:-1], dtype=torch.int64)
    sq_distances = torch.empty(x.shape[:-1], dtype=torch.float32)
    _call("spt_fast_kmeans_assign", x, centroids, labels, sq_distances)
    return labels, sq_distances


def why_not(x: Tensor, centroids: Tensor) -> str | None:
    """Why these tokens cannot be taken here, or ``None`` if they can."""
    if x.device.type != "cpu":
        return f"the tokens are on {x.device.type}"
    _, reason = load(LIBRARY)
    return reason or _why_not_asked_for(os.environ.get(ENVIRONMENT_VARIABLE, ""))


def instruction_sets() -> list[str]:
    """The instruction sets that can be asked for here, best first; none if there is no library.

    Example:
        >>> instruction_sets()[-1:] in ([], ["portable"])
        True
    """
    library, _ = load(LIBRARY)
    return (
        [name for name, runs_here in built_instruction_sets(library).items() if runs_here] if library else []
    )


def instruction_set() -> str:
    """The instruction set that the next call uses.

    Raises:
        RuntimeError: none can be used; the message says why.
    """
    asked = os.environ.get(ENVIRONMENT_VARIABLE, "")
    reason = load(LIBRARY)[1] or _why_not_asked_for(asked)
    if reason:
        raise RuntimeError(reason)
    return asked or instruction_sets()[0]


@cache
def load(path: Path) -> tuple[Any, str | None]:
    """The library, or ``None`` and why it cannot be used."""
    if not path.exists():
        return None, f"the native library was not built ({HOW_TO_BUILD})"
    try:
        library = ctypes.CDLL(str(path))
        version = library.spt_fast_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"the native library cannot be loaded: {error} ({HOW_TO_BUILD})"
    if version != ABI_VERSION:
        return (
            None,
            f"the native library is of another version: {version}, not {ABI_VERSION} ({HOW_TO_BUILD})",
        )
    library.spt_fast_instruction_set.restype = ctypes.c_char_p
    for function, outputs in ((library.spt_fast_kmeans_step, 3), (library.spt_fast_kmeans_assign, 2)):
        function.argtypes = (ctypes.c_void_p, ctypes.c_int32, *[ctypes.c_void_p] * outputs)
    return library, None


@cache
def built_instruction_sets(library: Any) -> dict[str, bool]:
    """Name -> whether this processor has it, in the library's own order, which is best first."""
    found: dict[str, bool] = {}
    while name := library.spt_fast_instruction_set(len(found)):
        found[name.decode()] = bool(library.spt_fast_instruction_set_runs_here(len(found)))
    return found


def _call(function: str, x: Tensor, centroids: Tensor, *outputs: Tensor) -> None:
    library, _ = load(LIBRARY)
    names = list(built_instruction_sets(library))
    layered = x if x.ndim == 3 else x[None]
    layers, count, width = layered.shape
    if layers == 0:
        return
    layer_stride, token_stride, feature_stride = layered.stride()
    offsets = common_offset(x, centroids).contiguous()
    centroids = centroids.contiguous()
    tokens = _Tokens(
        data=x.data_ptr(),
        type=ELEMENT_TYPES[x.dtype],
        threads=torch.get_num_threads(),
        layers=layers,
        count=count,
        width=width,
        layer_stride=layer_stride,
        token_stride=token_stride,
        feature_stride=feature_stride,
        clusters=centroids.shape[-2],
        centroids=centroids.data_ptr(),
        offsets=offsets.data_ptr(),
    )
    pointers = [output.data_ptr() for output in outputs]
    if getattr(library, function)(ctypes.byref(tokens), names.index(instruction_set()), *pointers):
        raise MemoryError(f"{function}: not enough memory")


def _why_not_asked_for(name: str) -> str | None:
    if not name or name in instruction_sets():
        return None
    if name in built_instruction_sets(load(LIBRARY)[0]):
        return f"{ENVIRONMENT_VARIABLE}={name}: this processor does not have these instructions"
    choice = ", ".join(instruction_sets())
    return f"{ENVIRONMENT_VARIABLE}={name}: there is no such instruction set; choose from {choice}"
