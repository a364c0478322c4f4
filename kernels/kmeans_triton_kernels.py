"""The Triton kernels of the k-means ops. Letters as in the ops' contract: x [L, T, D], K clusters, any strides of x.

Strides of layers and tokens come divided by ``UNIT``, so that the compiler sees where 16 bytes can be read at once.

A *piece* is a slice of the features, a *tile* a group of tokens. Scores are distances less what all clusters share:
``|c|^2 - 2 (x - offset) . c`` with ``c`` measured from ``offset``. For half-precision tokens ``c`` comes as two terms
of that precision, ``terms[k] = (high, low)``, whose products with the raw tokens are exact before they are added.
"""

# mypy: disable-error-code="assignment"
# (Triton's compiler unrolls tuples that grow in a loop; they have no type of their own.)

from __future__ import annotations

import triton
import triton.language as tl

from .triton_dot import dot


@triton.jit
def prepare_kernel(
    centroids,  # [L, K, D]
    offset,  # [L, D]
    terms,  # [L, K * TERMS, padded D], the dtype of the tokens, written
    constants,  # [L, K], written
    factors,  # [L, K], written
    padded_offset,  # [L, padded D], written
    K,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least padded D
):
    """Program ``layer * K + cluster`` writes what tokens are scored with (see ``split_centroids``), in float64."""
    PADDED: tl.constexpr = (WIDTH + PIECE - 1) // PIECE * PIECE
    program = tl.program_id(0).to(tl.int64)
    layer = program // K
    feature = tl.arange(0, BLOCK)
    inside = feature < WIDTH
    padded = feature < PADDED
    origin = tl.load(offset + layer * WIDTH + feature, mask=inside, other=0.0)
    if program % K == 0:
        tl.store(padded_offset + layer * PADDED + feature, origin, mask=padded)
    centroid = tl.load(centroids + program * WIDTH + feature, mask=inside, other=0.0)
    away = centroid.to(tl.float64) - origin.to(tl.float64)
    to = terms + program * (TERMS * PADDED) + feature
    if TERMS == 1:
        point = away.to(tl.float32)
        tl.store(to, point, mask=padded)
        wide = point.to(tl.float64)
        constant = tl.sum(wide * wide, 0)
        factor = tl.full([], -2.0, tl.float64)
    else:
        # A power of two brings the centroid into float16's range: the highest entry becomes 0.5 or more, but not 1.
        highest = tl.max(tl.abs(away), 0)
        exponent = ((highest.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022
        exponent = tl.where(highest > 0, tl.minimum(tl.maximum(exponent, -1000), 1000), 0)
        scale = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
        back = ((1023 + exponent) << 52).to(tl.float64, bitcast=True)
        scaled = away * scale
        high = scaled.to(tl.float32).to(terms.dtype.element_ty)
        low = (scaled - high.to(tl.float32).to(tl.float64)).to(tl.float32).to(terms.dtype.element_ty)
        tl.store(to, high, mask=padded)
        tl.store(to + PADDED, low, mask=padded)
        point = (high.to(tl.float32).to(tl.float64) + low.to(tl.float32).to(tl.float64)) * back
        constant = tl.sum(point * (point + 2.0 * origin.to(tl.float64)), 0)
        factor = -2.0 * back
    tl.store(constants + program, constant.to(tl.float32))
    tl.store(factors + program, factor.to(tl.float32))


@triton.jit
def _read(rows, feature, stride_feature, inside, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """The piece ``feature`` [PIECE] of the tokens that start at ``rows`` [TILE, 1]; zero outside."""
    mask = inside[:, None] if WIDTH % PIECE == 0 else inside[:, None] & (feature < WIDTH)[None, :]
    return tl.load(rows + feature.to(tl.int64)[None, :] * stride_feature, mask=mask, other=0.0)


@triton.jit
def _nearest(
    rows,
    stride_feature,
    inside,
    terms,
    constants,
    factors,
    offset,
    K,
    first,
    WIDTH: tl.constexpr,
    CLUSTERS: tl.constexpr,
    TERMS: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Among the clusters ``first`` .. ``first + CLUSTERS``: lowest score [TILE], its index [TILE], and |x - offset|^2.

    ``rows`` [TILE, 1] pointers and ``inside`` [TILE] are the tokens; ``terms`` [K * TERMS, padded D], ``constants``,
    ``factors`` [K] and ``offset`` [padded D] are this layer's.
    """
    PADDED: tl.constexpr = (WIDTH + PIECE - 1) // PIECE * PIECE
    ROWS: tl.constexpr = CLUSTERS * TERMS
    term = tl.arange(0, ROWS)
    term_rows = terms + (first * TERMS + term).to(tl.int64)[None, :] * PADDED
    term_exists = (term < (K - first) * TERMS)[None, :]
    products = tl.zeros([TILE, ROWS], tl.float32)
    sq_norm = tl.zeros([TILE], tl.float32)
    for start in tl.range(0, WIDTH, PIECE, num_stages=STAGES):
        feature = start + tl.arange(0, PIECE)
        tokens = _read(rows, feature, stride_feature, inside, WIDTH, PIECE)
        centers = tl.load(term_rows + feature[:, None], mask=term_exists, other=0.0)
        shifted = tokens.to(tl.float32) - tl.load(offset + feature)[None, :]
        sq_norm += tl.sum(shifted * shifted, 1)
        # Half-precision tokens stay as they are, or the shift would round them.
        left = shifted if TERMS == 1 else tokens
        products = dot(left, centers, products, PRECISION, INTERPRETED)
    # The terms of a cluster are neighbours, so that this sum stays inside a thread.
    product = tl.sum(tl.reshape(products, [TILE, CLUSTERS, TERMS]), 2)
    cluster = first + tl.arange(0, CLUSTERS)
    constant = tl.load(constants + cluster, mask=cluster < K, other=float("inf"))
    factor = tl.load(factors + cluster, mask=cluster < K, other=0.0)
    score = constant[None, :] + factor[None, :] * product
    # What is not a number is nearest to nothing: index 0 then, never a cluster that is only padding.
    score = tl.where(score < float("inf"), score, float("inf"))
    best, index = tl.min(score, 1, return_indices=True)
    return best, first + index, sq_norm


@triton.jit
def _sq_distance(
    rows,
    stride_feature,
    inside,
    centroids,
    label,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """|x - centroids[label]|^2 [TILE], formed directly; zero outside."""
    sq_distance = tl.zeros([TILE], tl.float32)
    own = centroids + label.to(tl.int64)[:, None] * WIDTH
    for start in tl.range(0, WIDTH, PIECE, num_stages=1):
        feature = start + tl.arange(0, PIECE)
        tokens = _read(rows, feature, stride_feature, inside, WIDTH, PIECE)
        difference = tokens.to(tl.float32) - _read(own, feature, 1, inside, WIDTH, PIECE)
        sq_distance += tl.sum(difference * difference, 1)
    return sq_distance


@triton.jit
def step_kernel(
    x,  # [L, T, D]
    terms,  # [L, K * TERMS, padded D], the dtype of x
    constants,  # [L, K]
    factors,  # [L, K]
    offset,  # [L, padded D]
    centroids,  # [L, K, D]
    partial_sums,  # [L, slots, K, D], written
    partial_counts,  # int32 [L, slots, K], written
    partial_inertia,  # float64 [L, slots], written
    layer_units,
    token_units,
    stride_feature,
    T,
    K,
    slots,
    WIDTH: tl.constexpr,
    CLUSTERS: tl.constexpr,
    TERMS: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    SUM_PIECE: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program ``layer * slots + slot`` takes the tiles ``slot``, ``slot + slots``, ... of its layer; K <= CLUSTERS."""
    program = tl.program_id(0).to(tl.int64)
    layer = program // slots
    slot = program % slots
    PADDED: tl.constexpr = (WIDTH + PIECE - 1) // PIECE * PIECE
    SUM_PIECES: tl.constexpr = (WIDTH + SUM_PIECE - 1) // SUM_PIECE
    x += layer * layer_units * UNIT
    terms += layer * K * (TERMS * PADDED)
    constants += layer * K
    factors += layer * K
    offset += layer * PADDED
    centroids += layer * K * WIDTH
    clusters = tl.arange(0, CLUSTERS)

    sums = ()
    for _ in tl.static_range(SUM_PIECES):
        sums = sums + (tl.zeros([SUM_PIECE, CLUSTERS], tl.float32),)
    counts = tl.zeros([CLUSTERS], tl.int32)
    inertia = tl.zeros([1], tl.float64)
    for tile in tl.range(slot, tl.cdiv(T, TILE), slots, num_stages=1):
        token = tile * TILE + tl.arange(0, TILE).to(tl.int64)
        inside = token < T
        rows = x + token[:, None] * token_units * UNIT
        score, label, sq_norm = _nearest(
            rows,
            stride_feature,
            inside,
            terms,
            constants,
            factors,
            offset,
            K,
            0,
            WIDTH,
            CLUSTERS,
            TERMS,
            TILE,
            PIECE,
            STAGES,
            PRECISION,
            INTERPRETED,
        )
        spread = tl.sum(tl.where(inside, sq_norm, 0.0))
        tile_inertia = spread + tl.sum(tl.where(inside, score, 0.0))
        if 32 * tile_inertia < spread:  # the two cancel: what is left would mostly be their rounding
            tile_inertia = tl.sum(
                _sq_distance(rows, stride_feature, inside, centroids, label, WIDTH, TILE, PIECE)
            )
        inertia += tile_inertia.to(tl.float64)

        chosen = (clusters[None, :] == label[:, None]) & inside[:, None]
        counts += tl.sum(chosen.to(tl.int32), 0)
        one_hot = tl.where(chosen, 1.0, 0.0).to(x.dtype.element_ty)
        added = ()
        for piece in tl.static_range(SUM_PIECES):
            feature = piece * SUM_PIECE + tl.arange(0, SUM_PIECE)
            tokens = _read(rows, feature, stride_feature, inside, WIDTH, SUM_PIECE)
            added = added + (dot(tl.trans(tokens), one_hot, sums[piece], PRECISION, INTERPRETED),)
        sums = added

    exists = clusters < K
    for piece in tl.static_range(SUM_PIECES):
        feature = piece * SUM_PIECE + tl.arange(0, SUM_PIECE)
        own = partial_sums + (program * K + clusters)[None, :] * WIDTH + feature[:, None]
        tl.store(own, sums[piece], mask=exists[None, :] & (feature < WIDTH)[:, None])
    tl.store(partial_counts + program * K + clusters, counts, mask=exists)
    tl.store(partial_inertia + program + tl.arange(0, 1), inertia)


@triton.jit
def assign_kernel(
    x,  # [L, T, D]
    terms,  # [L, K * TERMS, padded D], the dtype of x
    constants,  # [L, K]
    factors,  # [L, K]
    offset,  # [L, padded D]
    centroids,  # [L, K, D]
    labels,  # int64 [L, T], written
    distances,  # of every token, [L, T], or float64, of all tokens of a tile, [L, tiles]; written
    layer_units,
    token_units,
    stride_feature,
    T,
    K,
    tiles,  # of one layer
    WIDTH: tl.constexpr,
    CLUSTERS: tl.constexpr,
    PER_TOKEN: tl.constexpr,  # which of the two
    TERMS: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program ``layer * tiles + tile`` labels one tile, ``CLUSTERS`` clusters at a time."""
    program = tl.program_id(0).to(tl.int64)
    layer = program // tiles
    PADDED: tl.constexpr = (WIDTH + PIECE - 1) // PIECE * PIECE
    x += layer * layer_units * UNIT
    terms += layer * K * (TERMS * PADDED)
    constants += layer * K
    factors += layer * K
    offset += layer * PADDED
    centroids += layer * K * WIDTH
    token = program % tiles * TILE + tl.arange(0, TILE)
    inside = token < T
    rows = x + token[:, None] * token_units * UNIT

    best = tl.full([TILE], float("inf"), tl.float32)
    label = tl.zeros([TILE], tl.int32)
    sq_norm = tl.zeros([TILE], tl.float32)
    for first in tl.range(0, K, CLUSTERS, num_stages=1):
        score, index, sq_norm = _nearest(
            rows,
            stride_feature,
            inside,
            terms,
            constants,
            factors,
            offset,
            K,
            first,
            WIDTH,
            CLUSTERS,
            TERMS,
            TILE,
            PIECE,
            STAGES,
            PRECISION,
            INTERPRETED,
        )
        nearer = score < best  # strictly: ties stay with the lower index
        label = tl.where(nearer, index, label)
        best = tl.where(nearer, score, best)
    tl.store(labels + layer * T + token, label.to(tl.int64), mask=inside)
    if PER_TOKEN:
        sq_distance = _sq_distance(rows, stride_feature, inside, centroids, label, WIDTH, TILE, PIECE)
        tl.store(distances + layer * T + token, sq_distance, mask=inside)
    else:
        spread = tl.sum(tl.where(inside, sq_norm, 0.0))
        inertia = spread + tl.sum(tl.where(inside, best, 0.0))
        if 32 * inertia < spread:  # the two cancel: what is left would mostly be their rounding
            inertia = tl.sum(_sq_distance(rows, stride_feature, inside, centroids, label, WIDTH, TILE, PIECE))
        tl.store(distances + program, inertia.to(tl.float64))


@triton.jit
def accumulate_kernel(
    x,  # [L, T, D]
    order,  # int64 [L, T], tokens sorted by their label
    starts,  # int64 [L, K + 1], where in the order the tokens of a cluster start
    partial_sums,  # [L, slots, K, D], written
    layer_units,
    token_units,
    stride_feature,
    T,
    K,
    slots,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SUM_PIECE: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program ``((layer * slots + slot) * K + cluster) * pieces + piece`` sums one piece of one share of a cluster.

    Every row of ``ROWS`` adds up on its own, and remembers what rounding took from its sum.
    """
    PIECES: tl.constexpr = (WIDTH + SUM_PIECE - 1) // SUM_PIECE
    program = tl.program_id(0).to(tl.int64)
    feature = (program % PIECES).to(tl.int32) * SUM_PIECE + tl.arange(0, SUM_PIECE)
    program = program // PIECES
    cluster = program % K
    slot = program // K % slots
    layer = program // K // slots
    x += layer * layer_units * UNIT
    order += layer * T
    starts += layer * (K + 1) + cluster
    first = tl.load(starts)
    last = tl.load(starts + 1)
    share = tl.cdiv(last - first, slots)
    first += slot * share
    last = tl.minimum(first + share, last)

    sums = tl.zeros([ROWS, SUM_PIECE], tl.float32)
    lost = tl.zeros([ROWS, SUM_PIECE], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        number = start + tl.arange(0, ROWS)
        inside = number < last
        token = tl.load(order + number, mask=inside, other=0)
        rows = x + token[:, None] * token_units * UNIT
        added = _read(rows, feature, stride_feature, inside, WIDTH, SUM_PIECE).to(tl.float32) - lost
        more = sums + added
        lost = (more - sums) - added
        sums = more
    total = tl.sum(sums, 0)
    tl.store(partial_sums + program * WIDTH + feature, total, mask=feature < WIDTH)
