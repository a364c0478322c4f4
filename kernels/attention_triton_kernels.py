"""The Triton kernels of prompt_attention. Letters as in the op's contract: q [B, H, Nq, d], k [B, H, N, d], prompts
[S, H, P, d].

An image's keys are its prompts and then its own, numbered 0 to ``P + N - 1``: a block of keys reads each row where it
lies, so that a block may begin among the prompts and end among the image's own, and only the last is not full.

Features (d, ``WIDTH``) are multiplied in pieces of ``PIECE`` and one last piece of ``REST``, powers of two: 80 are 64
and 16, where rounding up to 128 would multiply 48 zeros and hold them in registers. Rows are contiguous; the strides of
images (or sets), heads and rows come divided by ``UNIT``, so that the compiler sees where 16 bytes can be read at once.
"""

# mypy: disable-error-code="assignment"
# (Triton's compiler unrolls tuples that grow in a loop; they have no type of their own.)

from __future__ import annotations

import triton
import triton.language as tl

from .triton_dot import dot

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# One compiled kernel serves all sizes, also those that happen to be 1 or multiples of 16.
_ROWS_OF = ("q", "k", "v", "prompt_k", "prompt_v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
_STRIDES = [f"{name}_{step}" for name in _ROWS_OF for step in ("chunk", "set", "image", "head", "row")]
NUMBERS = [*_STRIDES, "B", "S", "H", "Nq", "N", "P", "chunks"]


@triton.jit
def _feature(piece: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, REST: tl.constexpr):
    """The features of a piece."""
    SIZE: tl.constexpr = PIECE if (piece + 1) * PIECE <= WIDTH else REST
    return piece * PIECE + tl.arange(0, SIZE)


@triton.jit
def _mask(exists, feature, piece: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, REST: tl.constexpr):
    """Where rows that exist have the features of a piece."""
    FULL: tl.constexpr = (piece + 1) * PIECE <= WIDTH or piece * PIECE + REST == WIDTH
    return exists[:, None] if FULL else exists[:, None] & (feature < WIDTH)[None, :]


@triton.jit
def _load(rows, exists, WIDTH: tl.constexpr, PIECE: tl.constexpr, REST: tl.constexpr):
    """The pieces of the rows that start at ``rows`` [R, 1]; zero where ``exists`` [R] is false."""
    pieces = ()
    for piece in tl.static_range((WIDTH + PIECE - 1) // PIECE):
        feature = _feature(piece, WIDTH, PIECE, REST)
        mask = _mask(exists, feature, piece, WIDTH, PIECE, REST)
        pieces = pieces + (tl.load(rows + feature[None, :], mask=mask, other=0.0),)
    return pieces


@triton.jit
def _store(rows, exists, pieces, factor, WIDTH: tl.constexpr, PIECE: tl.constexpr, REST: tl.constexpr):
    """Write ``factor`` (a number, or [R, 1]) times the pieces to the rows that exist."""
    for piece in tl.static_range((WIDTH + PIECE - 1) // PIECE):
        feature = _feature(piece, WIDTH, PIECE, REST)
        mask = _mask(exists, feature, piece, WIDTH, PIECE, REST)
        tl.store(rows + feature[None, :], (pieces[piece] * factor).to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, REST: tl.constexpr):
    """Pieces of zeros [ROWS, d] in float32."""
    pieces = ()
    for piece in tl.static_range((WIDTH + PIECE - 1) // PIECE):
        feature = _feature(piece, WIDTH, PIECE, REST)
        pieces = pieces + (tl.zeros([ROWS, feature.shape[0]], tl.float32),)
    return pieces


@triton.jit
def _products(a, b, COUNT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """``a @ b.T`` of rows in pieces: [R, C] in float32."""
    products = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32)
    for piece in tl.static_range(COUNT):
        products = dot(a[piece], tl.trans(b[piece]), products, PRECISION, INTERPRETED)
    return products


@triton.jit
def _accumulate(sums, weights, rows, COUNT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """``sums + weights @ rows``, the weights [R, C] rounded to the type of the rows in pieces [C, d]."""
    added = ()
    for piece in tl.static_range(COUNT):
        rounded = weights.to(rows[piece].dtype)
        added = added + (dot(rounded, rows[piece], sums[piece], PRECISION, INTERPRETED),)
    return added


@triton.jit
def _key_rows(own, prompt, key, P, own_row, prompt_row, UNIT: tl.constexpr):
    """Where the rows of the keys ``key`` [R] start [R, 1]."""
    key = key.to(tl.int64)[:, None]
    rows = tl.where(key < P, prompt + key * prompt_row * UNIT, own + (key - P) * own_row * UNIT)
    # The compiler does not see it through the choice.
    return tl.multiple_of(rows, [16, 16]) if UNIT > 1 else rows


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    q,  # [B, H, Nq, d]
    k,  # [B, H, N, d]
    v,  # [B, H, N, d]
    prompt_k,  # [S, H, P, d]
    prompt_v,  # [S, H, P, d]
    prompt_index,  # int64 [B], or None
    prompt_lengths,  # int64 [S], or None
    out,  # [B, H, Nq, d], written
    lse,  # float32 [B, H, Nq], written
    q_image,
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    v_image,
    v_head,
    v_row,
    prompt_k_set,
    prompt_k_head,
    prompt_k_row,
    prompt_v_set,
    prompt_v_head,
    prompt_v_row,
    out_image,
    out_head,
    out_row,
    scale,
    H,
    Nq,
    N,
    P,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    REST: tl.constexpr,
    UNIT: tl.constexpr,
    SIGN: tl.constexpr,  # of the scale: 1, -1 or 0
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program ``(image * H + head) * blocks + block`` takes one block of queries: neighbours read the same keys.

    ``scale`` is without its sign, and not 0. Without an index, sets are numbered as images; the strides of a set that
    all images share are 0.
    """
    COUNT: tl.constexpr = (WIDTH + PIECE - 1) // PIECE
    blocks = tl.cdiv(Nq, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    query = (program % blocks).to(tl.int32) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = program // blocks % H
    image = program // blocks // H
    prompts = image
    if prompt_index is not None:
        prompts = tl.load(prompt_index + image)
    length = P
    if prompt_lengths is not None:
        length = tl.load(prompt_lengths + prompts).to(tl.int32)
    q += (image * q_image + head * q_head) * UNIT
    k += (image * k_image + head * k_head) * UNIT
    v += (image * v_image + head * v_head) * UNIT
    prompt_k += (prompts * prompt_k_set + head * prompt_k_head) * UNIT
    prompt_v += (prompts * prompt_v_set + head * prompt_v_head) * UNIT
    out += (image * out_image + head * out_head) * UNIT

    queries = _load(q + query.to(tl.int64)[:, None] * q_row * UNIT, query < Nq, WIDTH, PIECE, REST)
    if SIGN != 1:
        # The highest product is to be the highest score.
        signed = ()
        for piece in tl.static_range(COUNT):
            signed = signed + ((queries[piece] * SIGN).to(queries[piece].dtype),)
        queries = signed
    to_exponent = scale * LOG2_E
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sums = _zeros(BLOCK_Q, WIDTH, PIECE, REST)
    for start in tl.range(0, P + N, BLOCK_K, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_K)
        exists = key < P + N
        if prompt_lengths is not None:
            exists = exists & ((key < length) | (key >= P))
        k_rows = _key_rows(k, prompt_k, key, P, k_row, prompt_k_row, UNIT)
        v_rows = _key_rows(v, prompt_v, key, P, v_row, prompt_v_row, UNIT)
        keys = _load(k_rows, exists, WIDTH, PIECE, REST)
        values = _load(v_rows, exists, WIDTH, PIECE, REST)
        scores = _products(queries, keys, COUNT, PRECISION, INTERPRETED)
        scores = tl.where(exists[None, :], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        # As long as there is no key at all, all differences are to be -inf, not NaN.
        shift = tl.where(new == float("-inf"), 0.0, new * to_exponent)
        weights = tl.exp2(scores * to_exponent - shift[:, None])
        decay = tl.exp2(highest * to_exponent - shift)
        total = total * decay + tl.sum(weights, 1)
        decayed = ()
        for piece in tl.static_range(COUNT):
            decayed = decayed + (sums[piece] * decay[:, None],)
        sums = _accumulate(decayed, weights, values, COUNT, PRECISION, INTERPRETED)
        highest = new

    nothing = total == 0  # no key at all
    factor = 1.0 / tl.where(nothing, 1.0, total)
    out_rows = out + query.to(tl.int64)[:, None] * out_row * UNIT
    _store(out_rows, query < Nq, sums, factor[:, None], WIDTH, PIECE, REST)
    logarithm = tl.where(nothing, float("-inf"), highest * scale + tl.log2(total) * LN_2)
    tl.store(lse + (image * H + head) * Nq + query, logarithm, mask=query < Nq)


@triton.jit(do_not_specialize=NUMBERS)
def delta_kernel(
    out,  # [B, H, Nq, d]
    grad_out,  # [B, H, Nq, d]
    delta,  # float32 [B, H, Nq], written
    out_image,
    out_head,
    out_row,
    grad_out_image,
    grad_out_head,
    grad_out_row,
    H,
    Nq,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    REST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """What the gradients of a query's weights have in common, ``sum(out * grad_out)``; programs as in the forward."""
    blocks = tl.cdiv(Nq, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    query = (program % blocks).to(tl.int32) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = program // blocks % H
    image = program // blocks // H
    row = query.to(tl.int64)[:, None]
    out += (image * out_image + head * out_head) * UNIT
    grad_out += (image * grad_out_image + head * grad_out_head) * UNIT
    attended = _load(out + row * out_row * UNIT, query < Nq, WIDTH, PIECE, REST)
    upstream = _load(grad_out + row * grad_out_row * UNIT, query < Nq, WIDTH, PIECE, REST)
    sums = tl.zeros([BLOCK_Q], tl.float32)
    for piece in tl.static_range((WIDTH + PIECE - 1) // PIECE):
        sums += tl.sum(attended[piece].to(tl.float32) * upstream[piece].to(tl.float32), 1)
    tl.store(delta + (image * H + head) * Nq + query, sums, mask=query < Nq)


@triton.jit(do_not_specialize=NUMBERS)
def queries_kernel(
    q,  # [B, H, Nq, d]
    k,  # [B, H, N, d]
    v,  # [B, H, N, d]
    prompt_k,  # [S, H, P, d]
    prompt_v,  # [S, H, P, d]
    prompt_index,  # int64 [B], or None
    prompt_lengths,  # int64 [S], or None
    grad_out,  # [B, H, Nq, d]
    lse,  # float32 [B, H, Nq]
    delta,  # float32 [B, H, Nq]
    grad_q,  # [B, H, Nq, d], written
    q_image,
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    v_image,
    v_head,
    v_row,
    prompt_k_set,
    prompt_k_head,
    prompt_k_row,
    prompt_v_set,
    prompt_v_head,
    prompt_v_row,
    grad_out_image,
    grad_out_head,
    grad_out_row,
    grad_q_image,
    grad_q_head,
    grad_q_row,
    scale,
    H,
    Nq,
    N,
    P,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    REST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The gradient of one block of queries; programs, sets and blocks of keys as in the forward."""
    COUNT: tl.constexpr = (WIDTH + PIECE - 1) // PIECE
    blocks = tl.cdiv(Nq, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    query = (program % blocks).to(tl.int32) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = program // blocks % H
    image = program // blocks // H
    prompts = image
    if prompt_index is not None:
        prompts = tl.load(prompt_index + image)
    length = P
    if prompt_lengths is not None:
        length = tl.load(prompt_lengths + prompts).to(tl.int32)
    q += (image * q_image + head * q_head) * UNIT
    k += (image * k_image + head * k_head) * UNIT
    v += (image * v_image + head * v_head) * UNIT
    prompt_k += (prompts * prompt_k_set + head * prompt_k_head) * UNIT
    prompt_v += (prompts * prompt_v_set + head * prompt_v_head) * UNIT
    grad_out += (image * grad_out_image + head * grad_out_head) * UNIT
    grad_q += (image * grad_q_image + head * grad_q_head) * UNIT

    row = query.to(tl.int64)[:, None]
    queries = _load(q + row * q_row * UNIT, query < Nq, WIDTH, PIECE, REST)
    upstream = _load(grad_out + row * grad_out_row * UNIT, query < Nq, WIDTH, PIECE, REST)
    to_exponent = scale * LOG2_E
    shift = tl.load(lse + (image * H + head) * Nq + query, mask=query < Nq, other=0.0) * LOG2_E
    common = tl.load(delta + (image * H + head) * Nq + query, mask=query < Nq, other=0.0)
    sums = _zeros(BLOCK_Q, WIDTH, PIECE, REST)
    for start in tl.range(0, P + N, BLOCK_K, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_K)
        exists = key < P + N
        if prompt_lengths is not None:
            exists = exists & ((key < length) | (key >= P))
        k_rows = _key_rows(k, prompt_k, key, P, k_row, prompt_k_row, UNIT)
        v_rows = _key_rows(v, prompt_v, key, P, v_row, prompt_v_row, UNIT)
        keys = _load(k_rows, exists, WIDTH, PIECE, REST)
        values = _load(v_rows, exists, WIDTH, PIECE, REST)
        scores = _products(queries, keys, COUNT, PRECISION, INTERPRETED)
        # Where there is no key the power may be infinite.
        weights = tl.where(exists[None, :], tl.exp2(scores * to_exponent - shift[:, None]), 0.0)
        grad_weights = _products(upstream, values, COUNT, PRECISION, INTERPRETED)
        grad_scores = weights * (grad_weights - common[:, None])
        sums = _accumulate(sums, grad_scores, keys, COUNT, PRECISION, INTERPRETED)
    _store(grad_q + row * grad_q_row * UNIT, query < Nq, sums, scale, WIDTH, PIECE, REST)


@triton.jit(do_not_specialize=NUMBERS)
def keys_kernel(
    q,  # [B, H, Nq, d]
    k,  # [S, H, N, d]
    v,  # [S, H, N, d]
    order,  # int64 [B], images sorted by their set, or None
    starts,  # int64 [S + 1], where in the order the images of a set start, or None
    lengths,  # int64 [S], how many of the N keys of a set there are, or None
    grad_out,  # [B, H, Nq, d]
    lse,  # float32 [B, H, Nq]
    delta,  # float32 [B, H, Nq], or None without grad_k
    grad_k,  # [chunks, S, H, N, d], written, or None
    grad_v,  # [chunks, S, H, N, d], written, or None
    q_image,
    q_head,
    q_row,
    k_set,
    k_head,
    k_row,
    v_set,
    v_head,
    v_row,
    grad_out_image,
    grad_out_head,
    grad_out_row,
    grad_k_chunk,
    grad_k_set,
    grad_k_head,
    grad_k_row,
    grad_v_chunk,
    grad_v_set,
    grad_v_head,
    grad_v_row,
    scale,
    B,
    S,
    H,
    Nq,
    N,
    chunks,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    REST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The gradients of one block of keys and values, of an image's own or of the prompts of a set.

    Program ``((chunk * S + set) * H + head) * blocks + block`` keeps its keys and their sums and walks through the
    queries of the images ``chunk``, ``chunk + chunks``, ... of those that have the set: all of them (``SHARED``), those
    that the order names, or the one image with the number of the set.
    """
    COUNT: tl.constexpr = (WIDTH + PIECE - 1) // PIECE
    blocks = tl.cdiv(N, BLOCK_K)
    program = tl.program_id(0).to(tl.int64)
    key = (program % blocks).to(tl.int32) * BLOCK_K + tl.arange(0, BLOCK_K)
    head = program // blocks % H
    keys_set = program // blocks // H % S
    chunk = program // blocks // H // S
    length = N
    if lengths is not None:
        length = tl.load(lengths + keys_set).to(tl.int32)
    first = keys_set + chunk
    last = keys_set + 1
    if starts is not None:
        first = tl.load(starts + keys_set) + chunk
        last = tl.load(starts + keys_set + 1)
    elif SHARED:
        first = chunk
        last = B.to(tl.int64)
    q += head * q_head * UNIT
    k += (keys_set * k_set + head * k_head) * UNIT
    v += (keys_set * v_set + head * v_head) * UNIT
    grad_out += head * grad_out_head * UNIT

    exists = key < length
    key_row = key.to(tl.int64)[:, None]
    keys = _load(k + key_row * k_row * UNIT, exists, WIDTH, PIECE, REST)
    if grad_k is not None:
        values = _load(v + key_row * v_row * UNIT, exists, WIDTH, PIECE, REST)
        sums_k = _zeros(BLOCK_K, WIDTH, PIECE, REST)
    if grad_v is not None:
        sums_v = _zeros(BLOCK_K, WIDTH, PIECE, REST)
    to_exponent = scale * LOG2_E
    query_blocks = tl.cdiv(Nq, BLOCK_Q)
    # One loop, so that the next image is on its way from memory while this one is worked at.
    steps = tl.maximum(tl.cdiv(last - first, chunks), 0).to(tl.int32) * query_blocks
    for step in tl.range(0, steps, num_stages=STAGES):
        image = first + (step // query_blocks).to(tl.int64) * chunks
        if order is not None:
            image = tl.load(order + image)
        query = step % query_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
        row = query.to(tl.int64)[:, None]
        numbers = (image * H + head) * Nq + query
        queries = _load(q + image * q_image * UNIT + row * q_row * UNIT, query < Nq, WIDTH, PIECE, REST)
        upstream = _load(
            grad_out + image * grad_out_image * UNIT + row * grad_out_row * UNIT,
            query < Nq,
            WIDTH,
            PIECE,
            REST,
        )
        # Where there is no query, its products are 0 and so is what it adds to the sums.
        shift = tl.load(lse + numbers, mask=query < Nq, other=0.0) * LOG2_E
        scores = _products(keys, queries, COUNT, PRECISION, INTERPRETED)
        weights = tl.exp2(scores * to_exponent - shift[None, :])
        if grad_v is not None:
            sums_v = _accumulate(sums_v, weights, upstream, COUNT, PRECISION, INTERPRETED)
        if grad_k is not None:
            common = tl.load(delta + numbers, mask=query < Nq, other=0.0)
            grad_weights = _products(values, upstream, COUNT, PRECISION, INTERPRETED)
            grad_scores = weights * (grad_weights - common[None, :])
            sums_k = _accumulate(sums_k, grad_scores, queries, COUNT, PRECISION, INTERPRETED)

    # A key that there is not has had a weight of its own; nothing of that leaves.
    if grad_k is not None:
        grad_k += (chunk * grad_k_chunk + keys_set * grad_k_set + head * grad_k_head) * UNIT
        _store_sums(grad_k + key_row * grad_k_row * UNIT, key, length, N, sums_k, scale, WIDTH, PIECE, REST)
    if grad_v is not None:
        grad_v += (chunk * grad_v_chunk + keys_set * grad_v_set + head * grad_v_head) * UNIT
        _store_sums(grad_v + key_row * grad_v_row * UNIT, key, length, N, sums_v, 1.0, WIDTH, PIECE, REST)


@triton.jit
def _store_sums(
    rows,
    key,
    length,
    N,
    sums,
    factor,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    REST: tl.constexpr,
):
    """Write ``factor * sums`` to the rows of the keys below ``length``, and zeros to those up to ``N``."""
    kept = ()
    for piece in tl.static_range((WIDTH + PIECE - 1) // PIECE):
        kept = kept + (tl.where((key < length)[:, None], sums[piece], 0.0),)
    _store(rows, key < N, kept, factor, WIDTH, PIECE, REST)
