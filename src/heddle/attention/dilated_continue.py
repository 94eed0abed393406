"""Dilated attention of tokens whose document has begun before: prompts that go on, and decoding from a plain cache.

Positions say all of it: a token at position ``t`` of its document sees, in a pattern ``(w, r)`` of which its head keeps
it (arXiv 2307.02486, eq. 5 to 9), the kept ones of ``t // w``'s segment up to it. So the keys that some new tokens need
are gathered from wherever they lie, those of few segments, and a query's are one interval of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

from jaxtyping import Float, Int

from .arrays import Array, arange, asarray_like, clip, is_concrete, namespace, pick
from .attend import attend, check, score_scale
from .dilated_grids import Tokens, take
from .dilated_patterns import Pattern, check_patterns
from .merge import merge, over_no_keys


@overload
def dilated_continue(
    query: Array, key: Array, value: Array, segment_lengths: Sequence[int], dilation_rates: Sequence[int], *,
    positions: Array, begin: Array, scale: float | None = None, return_lse: Literal[False] = False,
    implementation: str | None = None,
) -> Array: ...  # fmt: skip
@overload
def dilated_continue(
    query: Array, key: Array, value: Array, segment_lengths: Sequence[int], dilation_rates: Sequence[int], *,
    positions: Array, begin: Array, scale: float | None = None, return_lse: Literal[True],
    implementation: str | None = None,
) -> tuple[Array, Array]: ...  # fmt: skip
def dilated_continue(
    query: Float[Array, "batch q_len heads dim"],
    key: Float[Array, "batch kv_len kv_heads dim"],
    value: Float[Array, "batch kv_len kv_heads value_dim"],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    positions: Int[Array, "batch q_len"],
    begin: Int[Array, " batch"],
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
):
    """Causal dilated attention of new tokens over all keys of their documents, which a plain cache holds.

    Args:
        query, segment_lengths, dilation_rates, scale, return_lse, implementation: as of
            :func:`~heddle.attention.dilated.dilated_attention`.
        key, value: of all tokens, the new ones too.
        positions: of the new tokens in their documents, each one more than that before it; -1 for padding.
        begin: where among the keys each row's document begins.

    Returns:
        as of :func:`~heddle.attention.dilated.dilated_attention`; 0 and -inf for padding.

    Raises:
        ValueError: arguments that disagree.
        NotImplementedError: the named implementation doesn't serve this case.
    """
    patterns = check_patterns(segment_lengths, dilation_rates)
    check(query, key, value, None)
    for name, array, shape in (("positions", positions, query.shape[:2]), ("begin", begin, query.shape[:1])):
        if array.shape != shape or not namespace(array).isdtype(array.dtype, "integral"):
            raise ValueError(
                f"{name} must be integers of shape {tuple(shape)}, got {array.dtype} of shape {tuple(array.shape)}"
            )
    positions, first = asarray_like(positions, query), asarray_like(begin, query)[:, None, None]

    def source(number: int) -> tuple[Array, Array, Callable[[Array], Array], Array]:
        return key, value, lambda at: first + at, arange(query.shape[2], query) // (query.shape[2] // key.shape[2])

    out, lse = continued(query, patterns, positions, source, score_scale(query, scale), implementation)
    return (out, lse) if return_lse else out


def continued(
    query: Float[Array, "batch q_len heads dim"],
    patterns: Sequence[Pattern],
    positions: Int[Array, "batch q_len"],
    source: Callable[[int], tuple[Array, Array, Callable[[Array], Array], Array]],
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch q_len heads value_dim"], Float[Array, "batch q_len heads"]]:
    """``(out, lse)`` of :func:`dilated_continue`, wherever keys lie.

    ``source(number)`` gives, for a pattern, keys and values ``(batch, places, columns, dim)``, the place among them of
    a key at a position of its row's document, and which column each of query's heads sees. Places of keys that nobody
    sees may be anywhere.
    """
    xp, heads, merged = namespace(query), query.shape[2], None
    for number, pattern in enumerate(patterns):
        key, value, place, column = source(number)
        asked, at = _continuing(pattern, heads, positions)
        at = clip(place(at), 0, key.shape[1] - 1)
        out, lse = attend(
            asked.rows(query, 1), take(key, at, column), take(value, at, column), asked.mask(query),
            scale=scale, implementation=implementation, return_lse=True,
        )  # fmt: skip
        blank = over_no_keys(query, value.shape[3])
        part = asked.put(blank[0], out), asked.put(blank[1], lse)
        merged = part if merged is None else merge([merged, part])
    assert merged is not None
    return xp.astype(merged[0], query.dtype, copy=False), merged[1]


def _continuing(pattern: Pattern, heads: int, positions: Array) -> tuple[Tokens, Int[Array, "batch offsets keys"]]:
    """The new tokens that a pattern keeps, and the positions of the keys they see: those of the segments they are in,
    ``ceil(w / r)`` a segment; some that don't exist, or come later."""
    xp, (_, new), (length, rate) = namespace(positions), positions.shape, pattern
    offsets, slots = rate if heads % rate == 0 else heads, -(-length // rate)
    offset = arange(offsets, positions) % rate
    real, segment, within = positions >= 0, positions // length, positions % length
    first = xp.min(xp.where(real, segment, 2**31 - 1), axis=1, keepdims=True)
    first = xp.where(first < 2**31 - 1, first, 0)[:, None]
    segments = (new + length - 2) // length + 1

    here = arange(segments, positions)[:, None], arange(slots, positions)
    at = xp.reshape(here[0] * length + here[1] * rate, (1, 1, -1)) + offset[:, None] + first * length

    kept = real[:, None] & ((within % rate)[:, None] == offset[:, None])
    total = xp.sum(xp.astype(kept, xp.int32), axis=-1, keepdims=True)
    # Where values can't be read, shapes must do for any: a segment keeps at most one token more than its share.
    count = max(1, int(xp.max(total))) if is_concrete(total) else min(new, new // rate + segments)
    index = xp.argsort(xp.astype(~kept, xp.int32), axis=-1, stable=True)[..., :count]
    start = xp.broadcast_to(((segment[:, None] - first) * slots), kept.shape)
    stop = start + (within // rate)[:, None] + 1
    start, stop = (pick(xp.where(kept, x, 0), index) for x in (start, stop))
    return Tokens(index, xp.astype(start, xp.int32), xp.astype(stop, xp.int32), heads), at
