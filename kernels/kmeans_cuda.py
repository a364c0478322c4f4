"""kmeans_step and kmeans_assign in CUDA C++ (the folder ``cuda``): on Hopper a step reads every token once.

CUDA kernels are launched through CuPy on torch's current stream, with the addresses of torch's tensors: nothing is
copied between the two. They come from a cubin that CMake built from these very sources, else NVRTC compiles each one
at its first use.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from .kmeans_torch import common_offset

SOURCES = Path(__file__).with_name("cuda")
NATIVE = Path(__file__).with_name("_native")

ELEMENTS = {torch.bfloat16: "Bfloat16", torch.float16: "Float16", torch.float32: "Float32"}

# As in the sources; the tests compare.
PLAIN_COPY, ASYNC_COPY, BULK_COPY = 0, 1, 2
FUSED_SHAPES = [  # (tiles of 128 features, tiles of 8 clusters, second terms in shared memory) as in kmeans.cu
    (2, 3, False),
    (2, 8, False),
    (3, 3, False),
    (3, 6, False),
    (6, 3, False),
    (8, 3, True),
]
RING_TOKENS, RING_WARPS, MOST_STAGES = 32, 8, 6
ASSIGN_TOKENS, ASSIGN_ROW_BYTES = 128, 144
ASSIGN_CLUSTER_TILES = (4, 8, 12)
ACCUMULATE_TOKENS, ACCUMULATE_FEATURES = 64, 128


@dataclass(frozen=True)
class Gpu:
    """What a launch is planned by; shared memory in bytes."""

    multiprocessors: int
    shared_memory_per_block: int
    bulk_copies: bool  # compute capability 9.0 and up


@dataclass(frozen=True)
class Kernel:
    """One entry point: ``Kernel("ASSIGN", ("Float32", 4))`` is ``assign_Float32_4``."""

    macro: str
    options: tuple[str | int, ...]

    @property
    def name(self) -> str:
        return "_".join([self.macro.lower(), *map(str, self.options)])

    @property
    def definition(self) -> str:
        return f"{self.macro}({', '.join(map(str, self.options))})"


@dataclass(frozen=True)
class Launch:
    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    shared_memory: int


@dataclass(frozen=True)
class AssignPlan:
    """kmeans_assign: centroids prepared, padded to whole tiles; then one pass over the tokens."""

    prepare: Launch
    assign: Launch
    padded_clusters: int
    padded_width: int
    whole_vectors: bool  # every row of the tokens is a run of aligned 16 byte pieces


@dataclass(frozen=True)
class FusedPlan:
    """kmeans_step in one pass; ``stages`` tiles of tokens in shared memory."""

    prepare: Launch
    fused: Launch
    reduce: Launch
    padded_clusters: int
    padded_width: int
    stages: int
    copy_mode: int


@dataclass(frozen=True)
class TwoPassPlan:
    """kmeans_step where sums or centroids are too large for one multiprocessor, or tokens are float32."""

    assign: AssignPlan
    accumulate: Launch
    reduce: Launch
    clusters_per_slice: int


def plan_step(x: Tensor, clusters: int, gpu: Gpu) -> FusedPlan | TwoPassPlan:
    """How a step over ``x`` ``[L, T, D]`` runs on ``gpu``; looks at shape, strides, type and alignment only.

    A fused step takes half-precision tokens and the smallest kernel whose features and clusters hold theirs, with two
    tiles or more in shared memory: one to work on, one on its way.
    """
    layers, tokens, width = x.shape
    for feature_tiles, cluster_tiles, low_in_shared in FUSED_SHAPES:
        if x.dtype == torch.float32 or width > 128 * feature_tiles or clusters > 8 * cluster_tiles:
            continue
        rest, stage = fused_shared_memory(feature_tiles, cluster_tiles, low_in_shared)
        stages = min(MOST_STAGES, (gpu.shared_memory_per_block - rest) // stage)
        if stages < 2:
            continue
        shares = min(gpu.multiprocessors, layers * ceil_divide(tokens, RING_TOKENS))
        options = (ELEMENTS[x.dtype], feature_tiles, cluster_tiles, str(low_in_shared).lower())
        copy_mode = PLAIN_COPY
        if has_whole_vectors(x):
            copy_mode = BULK_COPY if gpu.bulk_copies else ASYNC_COPY
        return FusedPlan(
            prepare=_prepare(x, 8 * cluster_tiles),
            fused=Launch(
                Kernel("FUSED_STEP", options), (shares, 1, 1), 32 * RING_WARPS, rest + stages * stage
            ),
            reduce=_reduce(x, clusters, gpu),
            padded_clusters=8 * cluster_tiles,
            padded_width=128 * feature_tiles,
            stages=stages,
            copy_mode=copy_mode,
        )
    # Sums of as many clusters as let four blocks share a multiprocessor, in slices of equal size.
    bytes_per_cluster = 4 * ACCUMULATE_FEATURES + 4
    slices = ceil_divide(clusters * bytes_per_cluster, gpu.shared_memory_per_block // 4)
    per_slice = ceil_divide(clusters, slices)
    feature_slices = ceil_divide(width, ACCUMULATE_FEATURES)
    shares = max(1, 8 * gpu.multiprocessors // (feature_slices * slices))
    shares = min(shares, layers * ceil_divide(tokens, ACCUMULATE_TOKENS))
    return TwoPassPlan(
        assign=plan_assign(x, clusters, gpu),
        accumulate=Launch(
            Kernel("ACCUMULATE", (ELEMENTS[x.dtype],)),
            (shares, feature_slices, ceil_divide(clusters, per_slice)),
            64,
            per_slice * 4 * ACCUMULATE_FEATURES + ceil_divide(per_slice, 2) * 8 + 2 * 8,
        ),
        reduce=_reduce(x, clusters, gpu),
        clusters_per_slice=per_slice,
    )


def plan_assign(x: Tensor, clusters: int, gpu: Gpu) -> AssignPlan:
    """How an assignment of ``x`` ``[L, T, D]`` runs on ``gpu``: two blocks per multiprocessor, so that one loads while
    the other multiplies."""
    layers, tokens, width = x.shape
    # The fewest passes over the tokens, then the least padding. float32 tokens take all a lane's registers for 4.
    sizes = (4,) if x.dtype == torch.float32 else ASSIGN_CLUSTER_TILES
    cluster_tiles = min(sizes, key=lambda size: (ceil_divide(clusters, 8 * size), size))
    terms = 1 if x.dtype == torch.float32 else 2
    padded_clusters = ceil_divide(clusters, 8 * cluster_tiles) * 8 * cluster_tiles
    blocks = min(2 * gpu.multiprocessors, layers * ceil_divide(tokens, ASSIGN_TOKENS))
    return AssignPlan(
        prepare=_prepare(x, padded_clusters),
        assign=Launch(
            Kernel("ASSIGN", (ELEMENTS[x.dtype], cluster_tiles)),
            (blocks, 1, 1),
            256,
            (ASSIGN_TOKENS + 8 * cluster_tiles * terms) * ASSIGN_ROW_BYTES,
        ),
        padded_clusters=padded_clusters,
        padded_width=ceil_divide(width * x.itemsize, 128) * 128 // x.itemsize,
        whole_vectors=has_whole_vectors(x),
    )


def fused_shared_memory(feature_tiles: int, cluster_tiles: int, low_in_shared: bool) -> tuple[int, int]:
    """Bytes that a block of the fused step needs besides its ring, and for each stage of the ring."""
    clusters, width = 8 * cluster_tiles, 128 * feature_tiles
    low = RING_WARPS * feature_tiles * cluster_tiles * 32 * 8 if low_in_shared else 0
    dots = RING_WARPS * RING_TOKENS * 8 * (cluster_tiles | 1) * 4
    norms = RING_WARPS * RING_TOKENS * 4
    barriers = MOST_STAGES * 8
    rest = barriers + low + dots + norms + width * 4 + clusters * 4 * 3 + RING_TOKENS * 4 + RING_WARPS * 8
    return rest, RING_TOKENS * (width + 8) * 2


def has_whole_vectors(x: Tensor) -> bool:
    """Is every row ``x[l, t]`` a run of 16 byte pieces at addresses that are multiples of 16?"""
    (layers, tokens, width), (layer_stride, token_stride, feature_stride) = x.shape, x.stride()
    starts = [x.data_ptr(), width * x.itemsize]
    starts += [layer_stride * x.itemsize] if layers > 1 else []
    starts += [token_stride * x.itemsize] if tokens > 1 else []
    return feature_stride == 1 and all(start % 16 == 0 for start in starts)


def ceil_divide(a: int, b: int) -> int:
    return -(-a // b)


def _prepare(x: Tensor, padded_clusters: int) -> Launch:
    return Launch(Kernel("PREPARE", (ELEMENTS[x.dtype],)), (x.shape[0] * padded_clusters, 1, 1), 128, 64)


def _reduce(x: Tensor, clusters: int, gpu: Gpu) -> Launch:
    blocks = min(ceil_divide(clusters * x.shape[2], 256), 4 * gpu.multiprocessors)
    return Launch(Kernel("REDUCE", ("partials",)), (blocks, x.shape[0], 1), 256, 0)


Run = Callable[[Launch, Sequence[int]], None]


def run_step(x: Tensor, centroids: Tensor, gpu: Gpu, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Launches a step; ``run`` starts one kernel with its arguments, addresses and numbers alike."""
    if x.ndim == 2:
        sums, counts, inertia = run_step(x[None], centroids[None], gpu, run)
        return sums[0], counts[0], inertia[0]
    (layers, tokens, width), clusters = x.shape, centroids.shape[1]
    sums = x.new_zeros((layers, clusters, width), dtype=torch.float32)
    counts = x.new_zeros((layers, clusters), dtype=torch.int64)
    inertia = x.new_zeros(layers, dtype=torch.float64)
    if x.numel() == 0:
        return sums, counts, inertia
    plan = plan_step(x, clusters, gpu)
    if isinstance(plan, FusedPlan):
        shares, tile = plan.fused.grid[0], RING_TOKENS
    else:
        shares, tile = plan.accumulate.grid[0], ACCUMULATE_TOKENS
    slots = shares + layers - 1  # see Work in work.cuh
    partials = [
        x.new_empty((slots, clusters, width), dtype=torch.float32),
        x.new_empty((slots, clusters), dtype=torch.int32),
        x.new_empty(slots, dtype=torch.float64),
    ]
    if isinstance(plan, FusedPlan):
        centroids = centroids.contiguous()
        prepared = _prepared(x, centroids, plan, run)
        run(
            plan.fused,
            [*_tokens(x), centroids.data_ptr(), clusters, *_addresses(prepared), *_addresses(partials)]
            + [plan.stages, plan.copy_mode],
        )
    else:
        labels, sq_distances = _assign(x, centroids, plan.assign, run)
        run(
            plan.accumulate,
            [*_tokens(x), clusters, plan.clusters_per_slice, labels.data_ptr(), sq_distances.data_ptr()]
            + _addresses(partials),
        )
    run(
        plan.reduce,
        [*_addresses(partials), layers, tokens, tile, shares, width, clusters]
        + _addresses([sums, counts, inertia]),
    )
    return sums, counts, inertia


def run_assign(x: Tensor, centroids: Tensor, gpu: Gpu, run: Run) -> tuple[Tensor, Tensor]:
    """Launches an assignment, as :func:`run_step`."""
    if x.ndim == 2:
        labels, sq_distances = run_assign(x[None], centroids[None], gpu, run)
        return labels[0], sq_distances[0]
    if x.numel() == 0:
        return x.new_empty(x.shape[:2], dtype=torch.int64), x.new_empty(x.shape[:2], dtype=torch.float32)
    return _assign(x, centroids, plan_assign(x, centroids.shape[1], gpu), run)


def _assign(x: Tensor, centroids: Tensor, plan: AssignPlan, run: Run) -> tuple[Tensor, Tensor]:
    labels = x.new_empty(x.shape[:2], dtype=torch.int64)
    sq_distances = x.new_empty(x.shape[:2], dtype=torch.float32)
    centroids = centroids.contiguous()
    prepared = _prepared(x, centroids, plan, run)
    run(
        plan.assign,
        [*_tokens(x), centroids.data_ptr(), centroids.shape[1], *_addresses(prepared)]
        + [plan.padded_clusters, plan.padded_width, labels.data_ptr(), sq_distances.data_ptr()]
        + [int(plan.whole_vectors)],
    )
    return labels, sq_distances


def _prepared(x: Tensor, centroids: Tensor, plan: AssignPlan | FusedPlan, run: Run) -> list[Tensor]:
    """Centroids ``[L, K, D]`` as the kernels want them (prepare.cuh)."""
    layers, clusters, width = centroids.shape
    padded = (layers, plan.padded_clusters, plan.padded_width)
    middle = common_offset(x, centroids).contiguous()
    prepared = [
        x.new_empty(padded),
        x.new_empty(padded if x.dtype != torch.float32 else 0),
        x.new_empty(padded[:2], dtype=torch.float32),
        x.new_empty(padded[:2], dtype=torch.float32),
        x.new_empty((layers, plan.padded_width), dtype=torch.float32),
    ]
    run(
        plan.prepare,
        [centroids.data_ptr(), middle.data_ptr(), clusters, width, plan.padded_clusters, plan.padded_width]
        + _addresses(prepared),
    )
    return prepared


def _tokens(x: Tensor) -> list[int]:
    return [x.data_ptr(), *x.stride(), *x.shape]


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def kmeans_step(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, counts and inertia of the clusters; the contract is :func:`spt_fast.kernels.kmeans_step`'s."""
    return run_step(x, centroids, _gpu(x.device.index), functools.partial(_run, x.device))


def kmeans_assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and squared distances; the contract is :func:`spt_fast.kernels.kmeans_assign`'s."""
    return run_assign(x, centroids, _gpu(x.device.index), functools.partial(_run, x.device))


def why_not(x: Tensor, centroids: Tensor) -> str | None:
    """Why these tensors cannot be taken here, or ``None``."""
    if x.device.type != "cuda":
        return f"tokens are on {x.device.type}"
    if not _has_cupy():
        return "CuPy is not installed (pip install cupy-cuda13x)"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def reads_tokens_once(x: Tensor, centroids: Tensor) -> bool:
    """Whether a step is one pass over the tokens that copies them in bulk: what it is faster in than Triton.

    Measured on an H100, bfloat16, a million tokens of 768 features: 0.83 ms against 1.29 ms with 20 clusters; with 100,
    which take two passes, 10.4 ms against 2.7 ms.
    """
    layers = x if x.ndim == 3 else x[None]
    plan = plan_step(layers, centroids.shape[-2], _gpu(x.device.index))
    return isinstance(plan, FusedPlan) and plan.copy_mode == BULK_COPY


@functools.cache
def _has_cupy() -> bool:
    return importlib.util.find_spec("cupy") is not None


@functools.cache
def _gpu(device: int) -> Gpu:
    properties: Any = torch.cuda.get_device_properties(device)
    return Gpu(
        multiprocessors=properties.multi_processor_count,
        shared_memory_per_block=properties.shared_memory_per_block_optin,
        bulk_copies=properties.major >= 9,
    )


def _run(device: torch.device, launch: Launch, arguments: Sequence[int]) -> None:
    import cupy

    with cupy.cuda.Device(device.index), _cupy_stream(torch.cuda.current_stream(device)):
        function = _function(device.index, launch.kernel)
        if function.max_dynamic_shared_size_bytes < launch.shared_memory:
            function.max_dynamic_shared_size_bytes = launch.shared_memory
        values = tuple(numpy.int64(value) for value in arguments)
        function(launch.grid, (launch.threads, 1, 1), values, shared_mem=launch.shared_memory)


def _cupy_stream(stream: torch.cuda.Stream) -> Any:
    """CuPy's view of torch's stream."""
    import cupy

    # CuPy 14 and later, where the other is deprecated; it wants a protocol that not every torch knows.
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index)


@functools.cache
def _function(device: int, kernel: Kernel) -> Any:
    """The kernel on the current device, which is ``device``."""
    cubin = cubin_path(torch.cuda.get_device_capability(device))
    if cubin is not None and cubin.exists():
        return _cubin_module(device, cubin).get_function(kernel.name)
    import cupy

    module = cupy.RawModule(code=kernel_source(kernel), options=("-std=c++17", f"-I{SOURCES}"))
    return module.get_function(kernel.name)


@functools.cache
def _cubin_module(device: int, cubin: Path) -> Any:
    import cupy

    return cupy.RawModule(path=str(cubin))


def cubin_path(capability: tuple[int, int]) -> Path | None:
    """Where CMake puts the machine code for a GPU; its name tells which sources it was built from."""
    major, minor = capability
    architecture = "sm80" if major == 8 else "sm90a" if (major, minor) == (9, 0) else None
    return NATIVE / f"kmeans_{architecture}_{source_digest()}.cubin" if architecture else None


def kernel_source(kernel: Kernel) -> str:
    """What NVRTC compiles for one kernel. The digest is there for CuPy's cache, which does not look into includes."""
    return f'// {source_digest()}\n#define SPT_FAST_KERNEL {kernel.definition}\n#include "kmeans.cu"\n'


@functools.cache
def source_digest() -> str:
    """Of all sources; cuda/CMakeLists.txt computes the same."""
    files = sorted(SOURCES.glob("*.cu*"))
    return hashlib.sha256("".join(map(_digest, files)).encode()).hexdigest()[:12]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
