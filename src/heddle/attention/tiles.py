"""Which tiles of queries by keys a blockwise kernel visits, from the intervals of a mask."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Int

from .arrays import Array, arange, clip, count_at_most, namespace, running_max


class Intervals(NamedTuple):
    """For each row of tiles, the interval of tiles to visit and, inside it, the one that needs no elementwise test.

    Four ``int32`` arrays of shape ``(mask rows, tiles)`` with ``lo <= full_lo <= full_hi <= hi``: visit
    ``[lo, full_lo)`` with the test, ``[full_lo, full_hi)`` without, ``[full_hi, hi)`` with it.
    """

    lo: Array
    full_lo: Array
    full_hi: Array
    hi: Array


class Tiles(NamedTuple):
    """What a blockwise kernel visits; see :meth:`heddle.Mask.tiles`.

    ``rows`` holds, for each tile of queries, the key tiles to visit; ``columns``, for each tile of keys, the query
    tiles. Every tile of queries also visits the key tiles ``[0, prefix)``, always with the elementwise test.
    """

    block_q: int
    block_k: int
    prefix: int
    rows: Intervals
    columns: Intervals


def tiles(
    start: Int[Array, "rows q_len"],
    stop: Int[Array, "rows q_len"],
    prefix: int,
    block_q: int,
    block_k: int,
    kv_len: int,
) -> Tiles:
    """See :meth:`heddle.Mask.tiles`: minima and maxima over reshaped integers."""
    xp, q_len = namespace(start), start.shape[1]
    n_q, n_k = -(-q_len // block_q), -(-kv_len // block_k)
    prefix = -(-min(prefix, kv_len) // block_k)  # from here on, tiles
    start = clip(start, prefix * block_k, None)
    stop = clip(stop, 0, kv_len)
    empty = start >= stop

    def reduce(array: Array, fill: int, function) -> Array:
        short = n_q * block_q - q_len
        padding = xp.broadcast_to(xp.zeros_like(array[:, :1]) + fill, (array.shape[0], short))
        return function(xp.reshape(xp.concat([array, padding], axis=1), (array.shape[0], n_q, block_q)), axis=-1)

    far = n_k * block_k
    lo = reduce(xp.where(empty, 0 * start + far, start), far, xp.min) // block_k
    hi = -(-reduce(xp.where(empty, 0 * stop, stop), 0, xp.max) // block_k)
    none = lo >= hi
    lo, hi = xp.where(none, 0 * lo + prefix, lo), xp.where(none, 0 * hi + prefix, hi)
    full_lo = -(-reduce(xp.where(empty, 0 * start + far, start), 0, xp.max) // block_k)
    full_hi = reduce(xp.where(empty, 0 * stop, stop), far, xp.min) // block_k
    no_full = full_lo >= full_hi
    rows = Intervals(lo, xp.where(no_full, hi, full_lo), xp.where(no_full, hi, full_hi), hi)

    def first_above(upper: Array) -> Array:  # the first row whose bound, or an earlier one's, is above c
        return count_at_most(running_max(upper), column)

    def past_last_below(lower: Array) -> Array:  # one past the last row whose bound is at most c
        return count_at_most(xp.flip(-running_max(xp.flip(-lower, axis=1)), axis=1), column)

    column = arange(n_k, start)[None, :] + 0 * lo[:, :1]
    first = first_above(xp.where(none, 0 * hi, hi))
    past = past_last_below(xp.where(none, 0 * lo + n_k, lo))
    first = xp.minimum(first, past)
    upper = xp.where(no_full, 0 * full_hi, full_hi)
    lower = xp.where(no_full, 0 * full_lo + n_k, full_lo)
    full_first, full_past = first_above(upper), past_last_below(lower)
    # Between the two every row of tiles must be full at c: count those that are.
    closed = xp.where(no_full, 0 * full_hi + n_k, full_hi)
    full = count_at_most(xp.sort(lower, axis=1), column) - count_at_most(xp.sort(closed, axis=1), column)
    in_prefix = column < prefix
    no_full = (full_past - full_first != full) | (full == 0) | in_prefix
    first = xp.where(in_prefix, 0 * first, first)
    past = xp.where(in_prefix, 0 * past + n_q, past)
    columns = Intervals(first, xp.where(no_full, past, full_first), xp.where(no_full, past, full_past), past)

    def int32(intervals: Intervals) -> Intervals:
        return Intervals(*(xp.astype(bound, xp.int32) for bound in intervals))

    return Tiles(block_q, block_k, prefix, int32(rows), int32(columns))


def schedule(intervals: Intervals) -> Int[Array, "5 rows tiles"]:
    """What a kernel reads: the order in which to begin the tiles, longest first, then the four bounds of each.

    Documents differ in length; begun last, a long row of tiles would keep the device waiting (LPT scheduling).
    """
    xp = namespace(intervals.lo)
    order = xp.astype(xp.argsort(intervals.lo - intervals.hi, axis=1, stable=True), xp.int32)
    return xp.stack([order, *intervals])
