# pyright: basic, reportArgumentType=false, reportAssignmentType=false
"""Attention of a few queries over many keys: the keys are split among programs, and the parts merged."""

import triton
import triton.language as tl

from .forward import load_rows, store_rows, visible


@triton.jit
def decode(
    q, k, v, start, stop,  # inputs
    part_out, part_lse,  # outputs
    q_len, kv_len, mask_rows, split, q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
    scale: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PREFIX: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the keys for the query rows of one KV head: a row is (query, head of the group).

    Grid (splits, kv heads * row tiles, batch). Split ``s`` covers keys ``[s * split, (s + 1) * split)``; only tiles
    that some row sees are read. part_out ``(splits, batch, q_len, heads, value_dim)``, part_lse without value_dim.
    """
    kv_heads: tl.constexpr = HEADS // GROUP
    part = tl.program_id(0)
    kv_head = tl.program_id(1) % kv_heads
    batch = tl.program_id(2).to(tl.int64)
    mask_row = tl.where(mask_rows > 1, batch, 0)
    rows = (tl.program_id(1) // kv_heads) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    query, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    in_range = rows < q_len * GROUP
    row_start = tl.load(start + mask_row * q_len + query, mask=in_range, other=2147483647)
    row_stop = tl.minimum(tl.load(stop + mask_row * q_len + query, mask=in_range, other=0), kv_len)

    dims = tl.arange(0, BLOCK_DIM)
    q_pointers = q + batch * q_batch + (query * q_stride + head * q_head)[:, None] + dims[None, :]
    q_tile = tl.load(q_pointers, mask=in_range[:, None] & (dims[None, :] < DIM), other=0.0)
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head

    first, last = tl.min(row_start, 0), tl.max(row_stop, 0)
    if PREFIX > 0:
        first = 0
    first = tl.maximum(part * split, first // BLOCK_K * BLOCK_K)
    last = tl.minimum((part + 1) * split, last)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_VALUE_DIM], tl.float32)
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for index in range(0, tl.cdiv(last - first, BLOCK_K)):
        begin = first + index * BLOCK_K
        keys = begin + tl.arange(0, BLOCK_K)
        k_tile = load_rows(k, begin, last, k_stride, BLOCK_K, DIM, BLOCK_DIM, True)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        seen = visible(row_start, row_stop, keys, PREFIX) & (keys < last)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        reference = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - reference[:, None])
        fade = tl.exp2(highest - reference)
        total = total * fade + tl.sum(weights, 1)
        v_tile = load_rows(v, begin, last, v_stride, BLOCK_K, VALUE_DIM, BLOCK_VALUE_DIM, True)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision=PRECISION)
        highest = new

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    ln2: tl.constexpr = 0.6931471805599453
    lse = tl.where(empty, float("-inf"), highest * ln2 + tl.log(tl.where(empty, 1.0, total)))
    batches = tl.num_programs(2)
    place = ((part * batches + batch) * q_len + query) * HEADS + head
    tl.store(part_lse + place, lse, mask=in_range)
    store_rows(part_out, acc, place, in_range, VALUE_DIM, BLOCK_VALUE_DIM)


@triton.jit
def combine(
    part_out, part_lse,  # inputs
    out, lse,  # outputs
    rows, splits, BLOCK_SPLITS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """The splits' merge for one row (a query and head): grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    parts, dims = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_VALUE_DIM)
    lses = tl.load(part_lse + parts * rows + row, mask=parts < splits, other=float("-inf"))
    highest = tl.max(lses, 0)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(lses - reference)
    total = tl.sum(weights, 0)
    safe = tl.where(total == 0.0, 1.0, total)
    outs = tl.load(
        part_out + (parts[:, None] * rows + row) * VALUE_DIM + dims[None, :],
        mask=(parts[:, None] < splits) & (dims[None, :] < VALUE_DIM),
        other=0.0,
    )
    merged = tl.sum(outs * (weights / safe)[:, None], 0)
    tl.store(lse + row, tl.where(total == 0.0, float("-inf"), reference + tl.log(safe)))
    tl.store(out + row * VALUE_DIM + dims, merged.to(out.dtype.element_ty), mask=dims < VALUE_DIM)
