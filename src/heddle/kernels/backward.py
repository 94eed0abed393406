# pyright: basic, reportArgumentType=false, reportAssignmentType=false
"""Backward attention in two kernels without atomics: dK and dV by key tile, dQ by query tile. Bit-reproducible."""

import triton
import triton.language as tl

from .forward import load_rows, store_rows, tile_at, tile_bounds, visible


@triton.jit
def delta(
    out, d_out, d_lse,  # inputs
    result,  # output
    rows, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """rowsum(dO * O) - dlse, float32 ``(rows,)``: what the softmax's backward subtracts. Grid (tiles of rows,)."""
    begin = tl.program_id(0) * BLOCK_Q
    row = begin + tl.arange(0, BLOCK_Q)
    o = load_rows(out, begin, rows, VALUE_DIM, BLOCK_Q, VALUE_DIM, BLOCK_VALUE_DIM, True).to(tl.float32)
    d_o = load_rows(d_out, begin, rows, VALUE_DIM, BLOCK_Q, VALUE_DIM, BLOCK_VALUE_DIM, True).to(tl.float32)
    total = tl.sum(o * d_o, 1) - tl.load(d_lse + row, mask=row < rows, other=0.0)
    tl.store(result + row, total, mask=row < rows)


@triton.jit
def _visit_queries(
    d_k, d_v, k, v, keys, q, d_out, lse, row_delta, start, stop, q_len, kv_len, q_stride, scale,
    lo, full_lo, full_hi, count,
    MASKED: tl.constexpr, PREFIX: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``count`` query tiles of one head into (dK, dV); scores are held transposed, ``(keys, queries)``."""
    log2e: tl.constexpr = 1.4426950408889634
    for index in range(0, count):
        tile = tile_at(index, lo, full_lo, full_hi, 0, MASKED)
        rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        in_range = rows < q_len
        q_tile = load_rows(q, tile * BLOCK_Q, q_len, q_stride, BLOCK_Q, DIM, BLOCK_DIM, True)
        d_out_tile = load_rows(
            d_out, tile * BLOCK_Q, q_len, HEADS * VALUE_DIM, BLOCK_Q, VALUE_DIM, BLOCK_VALUE_DIM, True
        )
        row_lse = tl.load(lse + rows * HEADS, mask=in_range, other=float("-inf"))
        # Rows that see nothing have lse -inf: +inf makes their weights 0.
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * log2e)
        weights = tl.exp2(tl.dot(k, tl.trans(q_tile), input_precision=PRECISION) * scale - row_lse[None, :])
        if MASKED:
            row_start = tl.load(start + rows, mask=in_range, other=0)
            row_stop = tl.minimum(tl.load(stop + rows, mask=in_range, other=0), kv_len)
            weights = tl.where(tl.trans(visible(row_start, row_stop, keys, PREFIX)), weights, 0.0)
        d_v = tl.dot(weights.to(d_out_tile.dtype), d_out_tile, d_v, input_precision=PRECISION)
        d_weights = tl.dot(v, tl.trans(d_out_tile), input_precision=PRECISION)
        d_scores = weights * (d_weights - tl.load(row_delta + rows * HEADS, mask=in_range, other=0.0)[None, :])
        d_k = tl.dot(d_scores.to(q_tile.dtype), q_tile, d_k, input_precision=PRECISION)
    return d_k, d_v


@triton.jit
def backward_kv(
    q, k, v, start, stop, schedule, d_out, lse, row_delta,  # inputs
    d_k, d_v,  # outputs
    q_len, kv_len, mask_rows, k_tiles, q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
    scale: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PREFIX: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, summed over the query heads of its KV head. Grid (key tiles, kv heads, batch).

    ``schedule`` is that of the mask's columns of tiles.
    """
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    mask_row = tl.where(mask_rows > 1, batch, 0)
    schedule += mask_row * k_tiles
    tile = tl.load(schedule + tl.program_id(0))
    keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k_tile = load_rows(
        k + batch * k_batch + kv_head * k_head, tile * BLOCK_K, kv_len, k_stride, BLOCK_K, DIM, BLOCK_DIM, True
    )
    v_tile = load_rows(
        v + batch * v_batch + kv_head * v_head,
        tile * BLOCK_K,
        kv_len,
        v_stride,
        BLOCK_K,
        VALUE_DIM,
        BLOCK_VALUE_DIM,
        True,
    )
    start += mask_row * q_len
    stop += mask_row * q_len
    lo, full_lo, full_hi, hi = tile_bounds(schedule, tile, mask_rows * k_tiles)

    d_k_tile = tl.zeros([BLOCK_K, BLOCK_DIM], tl.float32)
    d_v_tile = tl.zeros([BLOCK_K, BLOCK_VALUE_DIM], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_of_head = q + batch * q_batch + head * q_head
        row = batch * q_len * HEADS + head
        d_k_tile, d_v_tile = _visit_queries(
            d_k_tile, d_v_tile, k_tile, v_tile, keys, q_of_head, d_out + row * VALUE_DIM, lse + row, row_delta + row,
            start, stop, q_len, kv_len, q_stride, scale, lo, full_lo, full_hi, full_lo - lo + hi - full_hi,
            True, PREFIX, HEADS, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, BLOCK_Q, PRECISION,
        )  # fmt: skip
        d_k_tile, d_v_tile = _visit_queries(
            d_k_tile, d_v_tile, k_tile, v_tile, keys, q_of_head, d_out + row * VALUE_DIM, lse + row, row_delta + row,
            start, stop, q_len, kv_len, q_stride, scale, lo, full_lo, full_hi, full_hi - full_lo,
            False, PREFIX, HEADS, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, BLOCK_Q, PRECISION,
        )  # fmt: skip

    ln2: tl.constexpr = 0.6931471805599453
    kv_heads: tl.constexpr = HEADS // GROUP
    place = (batch * kv_len + keys) * kv_heads + kv_head
    store_rows(d_k, d_k_tile * (scale * ln2), place, keys < kv_len, DIM, BLOCK_DIM)
    store_rows(d_v, d_v_tile, place, keys < kv_len, VALUE_DIM, BLOCK_VALUE_DIM)


@triton.jit
def _visit_keys(
    d_q, q, d_out, row_lse, row_delta, start, stop, k, v, kv_len, k_stride, v_stride, scale,
    lo, full_lo, full_hi, count,
    MASKED: tl.constexpr, PREFIX: tl.constexpr, PREFIX_TILES: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``count`` key tiles into dQ."""
    for index in range(0, count):
        begin = tile_at(index, lo, full_lo, full_hi, PREFIX_TILES, MASKED) * BLOCK_K
        k_tile = load_rows(k, begin, kv_len, k_stride, BLOCK_K, DIM, BLOCK_DIM, MASKED)
        v_tile = load_rows(v, begin, kv_len, v_stride, BLOCK_K, VALUE_DIM, BLOCK_VALUE_DIM, MASKED)
        weights = tl.exp2(tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale - row_lse[:, None])
        if MASKED:
            keys = begin + tl.arange(0, BLOCK_K)
            weights = tl.where(visible(start, stop, keys, PREFIX), weights, 0.0)
        d_weights = tl.dot(d_out, tl.trans(v_tile), input_precision=PRECISION)
        d_scores = weights * (d_weights - row_delta[:, None])
        d_q = tl.dot(d_scores.to(k_tile.dtype), k_tile, d_q, input_precision=PRECISION)
    return d_q


@triton.jit
def backward_q(
    q, k, v, start, stop, schedule, d_out, lse, row_delta,  # inputs
    d_q,  # output
    q_len, kv_len, mask_rows, q_tiles, q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
    scale: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr,
    PREFIX: tl.constexpr, PREFIX_TILES: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries. Grid and schedule as the forward's."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    mask_row = tl.where(mask_rows > 1, batch, 0)
    schedule += mask_row * q_tiles
    tile = tl.load(schedule + tl.program_id(0))
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_range = rows < q_len
    row_start = tl.load(start + mask_row * q_len + rows, mask=in_range, other=0)
    row_stop = tl.minimum(tl.load(stop + mask_row * q_len + rows, mask=in_range, other=0), kv_len)
    place = (batch * q_len + rows) * HEADS + head

    log2e: tl.constexpr = 1.4426950408889634
    q_tile = load_rows(
        q + batch * q_batch + head * q_head, tile * BLOCK_Q, q_len, q_stride, BLOCK_Q, DIM, BLOCK_DIM, True
    )
    d_out_of_head = d_out + (batch * q_len * HEADS + head) * VALUE_DIM
    d_out_tile = load_rows(
        d_out_of_head, tile * BLOCK_Q, q_len, HEADS * VALUE_DIM, BLOCK_Q, VALUE_DIM, BLOCK_VALUE_DIM, True
    )
    row_lse = tl.load(lse + place, mask=in_range, other=float("-inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * log2e)
    deltas = tl.load(row_delta + place, mask=in_range, other=0.0)
    k += batch * k_batch + (head // GROUP).to(tl.int64) * k_head
    v += batch * v_batch + (head // GROUP).to(tl.int64) * v_head

    lo, full_lo, full_hi, hi = tile_bounds(schedule, tile, mask_rows * q_tiles)
    partial = PREFIX_TILES + (full_lo - lo) + (hi - full_hi)
    d_q_tile = tl.zeros([BLOCK_Q, BLOCK_DIM], tl.float32)
    d_q_tile = _visit_keys(
        d_q_tile, q_tile, d_out_tile, row_lse, deltas, row_start, row_stop, k, v, kv_len, k_stride, v_stride, scale,
        lo, full_lo, full_hi, partial,
        True, PREFIX, PREFIX_TILES, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, BLOCK_K, PRECISION,
    )  # fmt: skip
    d_q_tile = _visit_keys(
        d_q_tile, q_tile, d_out_tile, row_lse, deltas, row_start, row_stop, k, v, kv_len, k_stride, v_stride, scale,
        lo, full_lo, full_hi, full_hi - full_lo,
        False, PREFIX, PREFIX_TILES, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, BLOCK_K, PRECISION,
    )  # fmt: skip

    ln2: tl.constexpr = 0.6931471805599453
    store_rows(d_q, d_q_tile * (scale * ln2), place, in_range, DIM, BLOCK_DIM)
