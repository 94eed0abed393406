# pyright: basic, reportArgumentType=false, reportAssignmentType=false
"""Forward attention: one program for each tile of queries and head, online softmax over the visible tiles of keys."""

import triton
import triton.language as tl


@triton.jit
def visible(start, stop, keys, PREFIX: tl.constexpr):
    """Which of a tile's pairs the mask lets through, ``(queries, keys)``."""
    seen = (keys[None, :] < stop[:, None]) & (start[:, None] <= keys[None, :])
    if PREFIX > 0:
        seen |= (keys[None, :] < stop[:, None]) & (keys[None, :] < PREFIX)
    return seen


@triton.jit
def load_rows(
    pointer, first, length, stride,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECK_ROWS: tl.constexpr,
):  # fmt: skip
    """The tile ``(ROWS, BLOCK_DIM)`` that begins at row ``first``, zero where there are no elements.

    The 64-bit part of the address is one scalar; within the tile 32 bits do, which saves registers.
    """
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    pointers = pointer + first.to(tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    if CHECK_ROWS and DIM != BLOCK_DIM:
        return tl.load(pointers, mask=(rows[:, None] < length - first) & (dims[None, :] < DIM), other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers, mask=rows[:, None] < length - first, other=0.0)
    elif DIM != BLOCK_DIM:
        return tl.load(pointers, mask=dims[None, :] < DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(pointer, tile, places, in_range, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """A tile ``(rows, BLOCK_DIM)`` to the contiguous rows ``places`` of DIM elements, in the pointer's dtype."""
    dims = tl.arange(0, BLOCK_DIM)
    pointers = pointer + places[:, None] * DIM + dims[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=in_range[:, None] & (dims[None, :] < DIM))


@triton.jit
def tile_bounds(schedule, tile, size):
    """A row's lo, full_lo, full_hi and hi, which stand behind the order in the schedule, ``size`` apart."""
    place = schedule + tile + size
    lo, full_lo = tl.load(place), tl.load(place + size)
    return lo, full_lo, tl.load(place + 2 * size), tl.load(place + 3 * size)


@triton.jit
def tile_at(index, lo, full_lo, full_hi, PREFIX_TILES: tl.constexpr, MASKED: tl.constexpr):
    """The ``index``-th tile to visit: of the full ones, or of those that need the elementwise test.

    The latter stand on either side of the full ones, after the prefix's: one loop for all keeps registers low.
    """
    if not MASKED:
        return full_lo + index
    index -= PREFIX_TILES
    tile = tl.where(index < full_lo - lo, lo + index, full_hi + index - (full_lo - lo))
    return tl.where(index < 0, index + PREFIX_TILES, tile) if PREFIX_TILES > 0 else tile


@triton.jit
def _visit(
    out, highest, total, q, k, v, start, stop, kv_len, k_stride, v_stride, scale, lo, full_lo, full_hi, count,
    MASKED: tl.constexpr, PREFIX: tl.constexpr, PREFIX_TILES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``count`` key tiles into the running (out, highest score, total weight): the partial ones, or the full."""
    for index in range(0, count):
        begin = tile_at(index, lo, full_lo, full_hi, PREFIX_TILES, MASKED) * BLOCK_K
        k_tile = load_rows(k, begin, kv_len, k_stride, BLOCK_K, DIM, BLOCK_DIM, MASKED)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale
        if MASKED:
            keys = begin + tl.arange(0, BLOCK_K)
            scores = tl.where(visible(start, stop, keys, PREFIX), scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet has no highest score: any finite reference will do.
        reference = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
        weights = tl.exp2(scores - reference[:, None])
        fade = tl.exp2(highest - reference)
        total = total * fade + tl.sum(weights, 1)
        v_tile = load_rows(v, begin, kv_len, v_stride, BLOCK_K, VALUE_DIM, BLOCK_VALUE_DIM, MASKED)
        out = out * fade[:, None]
        out = tl.dot(weights.to(v_tile.dtype), v_tile, out, input_precision=PRECISION)
        highest = new
    return out, highest, total


@triton.jit
def forward(
    q, k, v, start, stop, schedule,  # inputs
    out, lse,  # outputs
    q_len, kv_len, mask_rows, q_tiles, q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
    scale: tl.constexpr,  # times log2(e)
    HEADS: tl.constexpr, GROUP: tl.constexpr,
    PREFIX: tl.constexpr, PREFIX_TILES: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """FlashAttention-2 (arXiv 2307.08691, algorithm 1) over a mask's intervals.

    Grid (query tiles, heads, batch). q, k, v by strides, out and lse contiguous. ``schedule``
    :func:`heddle.attention.tiles.schedule` of the rows of tiles.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    mask_row = tl.where(mask_rows > 1, batch, 0)
    schedule += mask_row * q_tiles
    tile = tl.load(schedule + tl.program_id(0))
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_range = rows < q_len
    first = tl.load(start + mask_row * q_len + rows, mask=in_range, other=0)
    # A query past the end sees nothing; keys past the end are seen by none.
    last = tl.minimum(tl.load(stop + mask_row * q_len + rows, mask=in_range, other=0), kv_len)

    q_tile = load_rows(
        q + batch * q_batch + head * q_head, tile * BLOCK_Q, q_len, q_stride, BLOCK_Q, DIM, BLOCK_DIM, True
    )
    k += batch * k_batch + (head // GROUP).to(tl.int64) * k_head
    v += batch * v_batch + (head // GROUP).to(tl.int64) * v_head
    acc = tl.zeros([BLOCK_Q, BLOCK_VALUE_DIM], tl.float32)
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)

    lo, full_lo, full_hi, hi = tile_bounds(schedule, tile, mask_rows * q_tiles)
    partial = PREFIX_TILES + (full_lo - lo) + (hi - full_hi)
    acc, highest, total = _visit(
        acc, highest, total, q_tile, k, v, first, last, kv_len, k_stride, v_stride, scale,
        lo, full_lo, full_hi, partial,
        True, PREFIX, PREFIX_TILES, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc, highest, total = _visit(
        acc, highest, total, q_tile, k, v, first, last, kv_len, k_stride, v_stride, scale,
        lo, full_lo, full_hi, full_hi - full_lo,
        False, PREFIX, PREFIX_TILES, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, BLOCK_K, PRECISION,
    )  # fmt: skip

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    ln2: tl.constexpr = 0.6931471805599453
    lse_rows = tl.where(empty, float("-inf"), highest * ln2 + tl.log(tl.where(empty, 1.0, total)))
    place = (batch * q_len + rows) * HEADS + head
    tl.store(lse + place, lse_rows, mask=in_range)
    store_rows(out, acc, place, in_range, VALUE_DIM, BLOCK_VALUE_DIM)
