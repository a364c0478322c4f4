"""kmeans_step and kmeans_assign in Triton: scores and sums as products on tensor cores, all layers in one launch.

A step whose sums fit in registers is one launch: a program takes tiles of tokens in turn, labels a tile while reading
it from memory, adds it to its sums while it is still in the cache, and writes them once at the end. Otherwise it is
two: every label, then the sums of tokens sorted by label. (The second reading then comes from memory. With that many
clusters products take the time; chunks of tokens that stay in the cache would cost more in launches than they save.)
No atomics, and programs' sums are added in a fixed order: results repeat bit for bit.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import triton_device
from .kmeans_torch import common_offset
from .triton_device import capability, is_interpreted, power_of_two, processors
from .triton_launch import Described, launch

# Tensor cores cut sums off instead of rounding them: over more tiles a program's would lose float32's last digits.
MOST_TILES = 64


class Config(NamedTuple):
    """How a kernel is cut into pieces.

    Attributes:
        tile: tokens looked at together.
        clusters: clusters looked at together, a power of two.
        piece: features multiplied together.
        stages: pieces of tokens and centroids under way from memory at a time, the one in use included.
        warps: warps of a program.
    """

    tile: int
    clusters: int
    piece: int
    stages: int
    warps: int


def why_not(x: Tensor, centroids: Tensor) -> str | None:
    """Why the Triton kernels cannot take these tensors, or ``None``."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    return triton_device.why_not(x, "tokens", _a_kernel)


def kmeans_step(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, counts and inertia, in one launch or two (see the top of the module)."""
    if x.ndim == 2:
        sums, counts, inertia = kmeans_step(x[None], centroids[None])
        return sums[0], counts[0], inertia[0]
    layers, num_tokens, width = x.shape
    k = centroids.shape[1]
    if layers == 0:
        return (
            centroids.clone(),
            centroids.new_empty(0, k, dtype=torch.int64),
            x.new_empty(0, dtype=torch.float64),
        )
    config = step_config(width, k, x.dtype, wide_reads(x) > 1, capability(x))
    if config is None:
        labels, tile_inertia = _labels(x, centroids, per_token=False)
        sums, counts = _sums_by_label(x, labels, k)
        return sums, counts, tile_inertia.sum(dim=1)
    slots = slots_per_layer(layers, -(-num_tokens // config.tile), processors(x), MOST_TILES)
    partial_sums = x.new_empty(layers, slots, k, width, dtype=torch.float32)
    partial_counts = x.new_empty(layers, slots, k, dtype=torch.int32)
    partial_inertia = x.new_empty(layers, slots, dtype=torch.float64)
    _launch(
        "step_kernel",
        layers * slots,
        config,
        (
            x,
            *split_centroids(x, centroids, config.piece),
            partial_sums,
            partial_counts,
            partial_inertia,
        ),
        num_tokens,
        k,
        slots,
    )
    return (
        partial_sums.sum(dim=1, dtype=torch.float64).float(),
        partial_counts.sum(dim=1),
        partial_inertia.sum(dim=1),
    )


def kmeans_assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and squared distances, a tile of tokens for each program."""
    if x.ndim == 2:
        labels, sq_distances = kmeans_assign(x[None], centroids[None])
        return labels[0], sq_distances[0]
    return _labels(x, centroids, per_token=True)


def _labels(x: Tensor, centroids: Tensor, *, per_token: bool) -> tuple[Tensor, Tensor]:
    """Labels ``[L, T]`` and squared distances, of each token ``[L, T]`` or, sooner, float64 sums over tiles."""
    layers, num_tokens, width = x.shape
    k = centroids.shape[1]
    config = assign_config(width, k, x.dtype, wide_reads(x) > 1, capability(x))
    tiles = -(-num_tokens // config.tile)
    labels = x.new_empty(layers, num_tokens, dtype=torch.int64)
    distances = (
        x.new_empty(layers, num_tokens, dtype=torch.float32)
        if per_token
        else x.new_empty(layers, tiles, dtype=torch.float64)
    )
    if layers and num_tokens:
        _launch(
            "assign_kernel",
            layers * tiles,
            config,
            (x, *split_centroids(x, centroids, config.piece), labels, distances),
            num_tokens,
            k,
            tiles,
            PER_TOKEN=per_token,
        )
    return labels, distances


def _sums_by_label(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Tokens sorted by label, and each cluster's added up as they come: every token is read once, whatever ``k`` is."""
    layers, num_tokens, width = x.shape
    # The fewer bits, the fewer passes of the sort.
    short = labels.to(torch.int16 if k < 1 << 15 else torch.int32)
    ordered, order = short.sort(dim=1, stable=True)
    bounds = torch.arange(k + 1, dtype=short.dtype, device=x.device).expand(layers, -1).contiguous()
    starts = torch.searchsorted(ordered, bounds)
    config = accumulate_config(width, x.dtype)
    pieces = -(-width // config.piece)
    slots = shares_of_cluster(layers * k * pieces, num_tokens // k, 16 * processors(x))
    partial_sums = x.new_empty(layers, slots, k, width, dtype=torch.float32)
    _launch(
        "accumulate_kernel",
        layers * slots * k * pieces,
        config,
        (x, order, starts, partial_sums),
        num_tokens,
        k,
        slots,
    )
    return partial_sums.sum(dim=1, dtype=torch.float64).float(), starts.diff(dim=1)


# The shapes below are those that compile for compute capability 8.0, 9.0 and 10.0 without spilling registers, found by
# compiling. Few were timed against each other: a measurement on a GPU belongs here, as one more rule.


def step_config(
    width: int, k: int, dtype: torch.dtype, wide: bool, capability: tuple[int, int]
) -> Config | None:
    """Shape of the one-launch step, or ``None`` where its sums do not fit in registers.

    The sums take ``clusters x width`` float32 of a program's 64 K registers; what is left decides how many tokens go
    together. Without wide reads, pointers take what would be left.
    """
    if not wide:
        return None
    clusters = max(16, power_of_two(k))
    sums = clusters * width
    if dtype == torch.float32:
        return Config(16, clusters, 32, 3, 8) if clusters <= 32 and sums <= 32 * 192 else None
    if capability < (9, 0):  # products read their operands from registers, not from shared memory
        return Config(32, clusters, 64, 3, 8) if clusters <= 64 and sums <= 32 * 512 else None
    if clusters <= 32 and sums <= 32 * 1024:
        return Config(64, clusters, 64, 2 if sums > 32 * 768 else 3, 8)
    if (clusters <= 32 and sums <= 32 * 1280) or (clusters == 64 and sums <= 64 * 384):
        return Config(32, clusters, 64, 3, 8)
    return None


def assign_config(width: int, k: int, dtype: torch.dtype, wide: bool, capability: tuple[int, int]) -> Config:
    """Shape of the assignment: clusters of one block share a reading of the tokens.

    On an H100, bfloat16, a million tokens of 768 features, 128 tokens beside 128 clusters took 1.0 ms for 100 clusters
    and 2.0 ms for 256; 64 beside 64 took 2.0 ms and 3.8 ms.
    """
    clusters, piece = max(16, power_of_two(k)), max(16, power_of_two(width))
    if dtype == torch.float32:
        return Config(32, min(32, clusters), min(32, piece), 3, 8)
    if wide and clusters > 64 and capability[0] == 9:  # others spill registers
        return Config(128, 128, min(64, piece), 3, 8)
    return Config(64, min(64, clusters), min(64 if wide else 32, piece), 3, 8)


def accumulate_config(width: int, dtype: torch.dtype) -> Config:
    """Shape of the sums by label: ``tile`` tokens of a cluster together, ``piece`` of their features."""
    return Config(16, 1, min(256, max(16, power_of_two(width))), 4 if dtype != torch.float32 else 3, 4)


def constants(kernel: str, config: Config, x: Tensor) -> dict[str, Any]:
    """The compile-time arguments of a kernel."""
    half = x.dtype != torch.float32
    if kernel == "accumulate_kernel":
        return {
            "WIDTH": x.shape[2],
            "ROWS": config.tile,
            "SUM_PIECE": config.piece,
            "UNIT": wide_reads(x),
            "STAGES": config.stages,
        }
    chosen: dict[str, Any] = {
        "WIDTH": x.shape[2],
        "CLUSTERS": config.clusters,
        "TILE": config.tile,
        "UNIT": wide_reads(x),
        "STAGES": config.stages,
        # Three tf32 products would do for float32 tokens, but their operands do not fit in registers, and
        # Triton 3.6 compiles them to nothing for compute capability 10.0.
        "PRECISION": "ieee",
        "INTERPRETED": is_interpreted(_a_kernel()),
    }
    chosen |= {"TERMS": 2 if half else 1, "PIECE": config.piece}
    return chosen | {"SUM_PIECE": 2 * config.piece} if kernel == "step_kernel" else chosen


def options(config: Config) -> dict[str, int]:
    """How a kernel is to be compiled."""
    # Without a limit the assembler may spill a few registers to fit more programs on a multiprocessor.
    return {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": 255}


def wide_reads(x: Tensor) -> int:
    """How many entries can be read at once, 16 bytes, wherever a row of ``x`` [L, T, D] starts; 1 if it is no more."""
    unit = 16 // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:2], x.shape[:2], strict=True) if size > 1]
    wide = x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in strides)
    return unit if wide else 1


def slots_per_layer(layers: int, tiles: int, processors: int, most_tiles: int) -> int:
    """Programs among which a layer's tiles are dealt: whole waves of programs over the GPU, as few as ``most_tiles``
    tiles for a program allow."""
    waves = -(-layers * tiles // (processors * max(1, most_tiles))) or 1
    return max(1, min(tiles, waves * processors // layers))


def shares_of_cluster(programs: int, tokens: int, wanted: int) -> int:
    """Programs among which the tokens of each cluster, ``tokens`` on average, are divided, so that there are about as
    many as ``wanted`` in all; ``programs`` is how many there are if none is divided."""
    return max(1, min(-(-wanted // max(1, programs)), tokens // 64))


def split_centroids(
    x: Tensor, centroids: Tensor, piece: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the kernels score with: terms ``[L, K * terms, padded D]`` in the dtype of ``x``, constants and factors
    ``[L, K]``, offset ``[L, padded D]``, and the centroids ``[L, K, D]`` themselves.

    With ``c`` a centroid measured from the offset, its score is ``|c|^2 - 2 (x - offset) . c``. Half-precision tokens
    are multiplied as they are, so the offset's share goes into the constant. ``c`` is then what its two terms say:
    scores are distances to that point, and their error in a cluster's inertia is of second order.
    """
    (layers, k, width), half = centroids.shape, x.dtype != torch.float32
    padded = -(-width // piece) * piece
    count = 2 if half else 1
    centroids = centroids.contiguous()
    offset = common_offset(x, centroids).contiguous()
    terms = x.new_empty(layers, k * count, padded)
    constant, factor = centroids.new_empty(2, layers, k).unbind()
    padded_offset = centroids.new_empty(layers, padded)

    def describe() -> Described:
        block = power_of_two(padded)
        named = {"WIDTH": width, "PIECE": piece, "TERMS": count, "BLOCK": block}
        return Described(_kernel("prepare_kernel"), (layers * k,), (k,), named | {"num_warps": 4})

    launch(("prepare_kernel", piece), (centroids, offset, terms, constant, factor, padded_offset), describe)
    return terms, constant, factor, padded_offset, centroids


def _launch(
    kernel: str,
    programs: int,
    config: Config,
    tensors: tuple[Tensor, ...],
    *numbers: int,
    **more: bool,
) -> None:
    x = tensors[0]

    def describe() -> Described:
        unit = wide_reads(x)
        layer_stride = x.stride(0) if len(x) > 1 else 0
        token_stride = x.stride(1) if x.shape[1] > 1 else 0
        return Described(
            _kernel(kernel),
            (programs,),
            (layer_stride // unit, token_stride // unit, x.stride(2), *numbers),
            constants(kernel, config, x) | options(config) | more,
        )

    launch((kernel, programs, config, numbers, *more.values()), tensors, describe)


def _kernel(name: str) -> Any:
    # Imported here, so that a machine without Triton can import this module.
    from . import kmeans_triton_kernels

    return getattr(kmeans_triton_kernels, name)


def _a_kernel() -> Any:
    return _kernel("step_kernel")
