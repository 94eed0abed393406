"""LongNet's dilated attention: attention within segments over every r-th token, merged over several (segment, r).

"LongNet: Scaling Transformers to 1,000,000,000 Tokens", arXiv 2307.02486, eq. 5 to 12. A pattern ``(w, r)`` cuts a
sequence into segments of ``w`` tokens and keeps every ``r``-th of each, head ``j`` from token ``j mod r`` on; the kept
tokens of a segment attend to each other, and a token's outputs merge over the patterns that kept it. That is one
softmax over all keys it saw, where a key seen in two patterns counts twice. Time and memory are linear in the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, overload

from jaxtyping import Bool, Float, Int

from .arrays import Array, accumulator_dtype, is_concrete, namespace
from .attend import attend as attend_one_set
from .attend import check, score_scale
from .dilated_grids import grids, is_writable, token_places
from .dilated_patterns import Pattern, check_patterns
from .mask import PADDING_SEGMENT_ID, Mask, _check_segments
from .merge import merge, over_no_keys

#: Elements of queries computed together, at most, unless one head has more: bounds what is held beside in- and output.
AT_ONCE = 1 << 22
#: The same of what one attend takes where results are written in place: memory so small is used again.
PIECE = 1 << 20


@overload
def dilated_attention(
    query: Array, key: Array, value: Array, segment_lengths: Sequence[int], dilation_rates: Sequence[int], *,
    is_causal: bool = False, segment_ids: Array | None = None, key_padding_mask: Array | None = None,
    scale: float | None = None, return_lse: Literal[False] = False, implementation: str | None = None,
) -> Array: ...  # fmt: skip
@overload
def dilated_attention(
    query: Array, key: Array, value: Array, segment_lengths: Sequence[int], dilation_rates: Sequence[int], *,
    is_causal: bool = False, segment_ids: Array | None = None, key_padding_mask: Array | None = None,
    scale: float | None = None, return_lse: Literal[True], implementation: str | None = None,
) -> tuple[Array, Array]: ...  # fmt: skip
def dilated_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    segment_ids: Int[Array, "batch seq"] | None = None,
    key_padding_mask: Bool[Array, "batch seq"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
):
    """Dilated attention of a sequence on itself, differentiable through outputs and merge weights alike.

    Any length goes with any pattern: the last segment is shorter, a segment longer than the sequence is the sequence.

    Args:
        query: ``(batch, seq, heads, dim)``: float64, float32, bfloat16 or float16.
        key, value: ``(batch, seq, kv_heads, dim)``, heads a multiple of kv_heads. Offsets go by query's heads.
        segment_lengths: w of each pattern, in tokens.
        dilation_rates: r of each pattern.
        is_causal: whether a token sees only those at or before it.
        segment_ids: packed documents, non-negative, each contiguous; -1 is padding. Segments start anew with each
            document, so that its output is what it would be alone.
        key_padding_mask: True for padding, as in ``torch.nn.MultiheadAttention``. The other tokens' output is what it
            would be were the padding not there; padding itself gets 0.
        scale: of the scores; None: ``dim ** -0.5``.
        return_lse: also return the log of each query's softmax denominator.
        implementation: as of :func:`heddle.attend`.

    Returns:
        ``(batch, seq, heads, value_dim)`` in query's dtype; with ``return_lse`` also ``(batch, seq, heads)``, float32
        (float64 for float64). Tokens that no pattern keeps give 0 and -inf.

    Raises:
        ValueError: arguments that disagree; a document in two places (where values can be read).
        NotImplementedError: the named implementation doesn't serve this case.
    """
    patterns = check_patterns(segment_lengths, dilation_rates)
    check_sequence(query, key, value, segment_ids, key_padding_mask)
    scale = score_scale(query, scale)

    def attend(query: Array, key: Array, value: Array, mask: Mask) -> tuple[Array, Array]:
        return attend_one_set(query, key, value, mask, scale=scale, implementation=implementation, return_lse=True)

    out, lse = dilated_forward(query, key, value, patterns, is_causal, segment_ids, key_padding_mask, attend=attend)
    return (out, lse) if return_lse else out


def check_sequence(
    query: Array, key: Array, value: Array, segment_ids: Array | None, key_padding_mask: Array | None
) -> None:
    """:func:`dilated_attention`'s checks of its arrays."""
    check(query, key, value, None)
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"query and key must have one length, got {query.shape[1]} and {key.shape[1]}")
    for name, array, kind in (
        ("segment_ids", segment_ids, "integral"), ("key_padding_mask", key_padding_mask, "bool"),
    ):  # fmt: skip
        if array is None:
            continue
        if array.shape != query.shape[:2] or not namespace(array).isdtype(array.dtype, kind):
            raise ValueError(
                f"{name} must be {'integers' if kind == 'integral' else 'booleans'} of shape "
                f"{tuple(query.shape[:2])}, got {array.dtype} of shape {tuple(array.shape)}"
            )
    if segment_ids is not None and is_concrete(segment_ids):
        _check_segments(segment_ids, segment_ids, None, PADDING_SEGMENT_ID)


# ---------------------------------------------------------------- forward and backward


def dilated_forward(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    patterns: Sequence[Pattern],
    is_causal: bool,
    segment_ids: Int[Array, "batch seq"] | None,
    key_padding_mask: Bool[Array, "batch seq"] | None,
    *,
    attend: Callable[[Array, Array, Array, Mask], tuple[Array, Array]],
) -> tuple[Float[Array, "batch seq heads value_dim"], Float[Array, "batch seq heads"]]:
    """``(out, lse)`` of checked arguments by ``attend(query, key, value, mask) -> (out, lse)``.

    A few heads at a time, pattern by pattern, so that little is held beside in- and output.
    """
    xp, seq, wide = namespace(query), query.shape[1], accumulator_dtype(query)
    places, outs, lses = token_places(query, segment_ids, key_padding_mask), [], []
    # Where it may be, each run of heads is written to its place at once.
    in_place = all(is_writable(x) for x in (query, key, value)) and wide == query.dtype
    whole = over_no_keys(query, value.shape[3]) if in_place else None
    for heads, kv_heads, group in _heads_at_once(query, key):
        q, k, v = query[:, :, heads], key[:, :, kv_heads], value[:, :, kv_heads]
        begun = over_no_keys(q, v.shape[3]) if whole is None else (whole[0][:, :, heads], whole[1][:, :, heads])
        out, lse = begun
        for number, pattern in enumerate(patterns):
            found = grids(seq, pattern, range(heads.start, heads.stop), is_causal, places)
            if whole is not None:
                found = [piece for one in found for piece in one.pieces(q, PIECE)]
            for grid in found:
                part = attend(grid.rows(q, 1), grid.rows(k, group), grid.rows(v, group), grid.mask(q))
                part = xp.astype(part[0], wide, copy=False), part[1]
                if number:
                    part = merge([(grid.rows(out, 1), grid.rows(lse, 1)), part])
                out, lse = grid.put(out, part[0]), grid.put(lse, part[1])
        if out is not begun[0] or lse is not begun[1]:  # attend's results can't be written with
            whole = None
        outs.append(xp.astype(out, query.dtype, copy=False))
        lses.append(lse)
    if whole is not None:
        return whole
    return (outs[0], lses[0]) if len(outs) == 1 else (xp.concat(outs, axis=2), xp.concat(lses, axis=2))


def dilated_backward(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    patterns: Sequence[Pattern],
    is_causal: bool,
    segment_ids: Int[Array, "batch seq"] | None,
    key_padding_mask: Bool[Array, "batch seq"] | None,
    out: Float[Array, "batch seq heads value_dim"],
    lse: Float[Array, "batch seq heads"],
    d_out: Float[Array, "batch seq heads value_dim"],
    d_lse: Float[Array, "batch seq heads"] | None,
    *,
    backward: Callable[..., tuple[Array, Array, Array]],
) -> tuple[Array, Array, Array]:
    """dq, dk, dv from the merged out and lse alone: no pattern's own output has to be kept or computed again.

    ``backward(query, key, value, mask, out, lse, d_out, d_lse) -> (dq, dk, dv)`` takes out and lse over more keys than
    it is given: ``exp(score - lse)`` is then a key's weight in the softmax over all patterns. Of arrays that can be
    written to: NumPy's, and torch's without gradients.
    """
    xp, seq, wide = namespace(query), query.shape[1], accumulator_dtype(query)
    places = token_places(query, segment_ids, key_padding_mask)
    grads = [xp.zeros_like(x, dtype=wide) for x in (query, key, value)]
    for heads, kv_heads, group in _heads_at_once(query, key):
        q, k, v, o, l, d_o, d_l = (  # noqa: E741
            None if x is None else x[:, :, kv_heads if x is key or x is value else heads]
            for x in (query, key, value, out, lse, d_out, d_lse)
        )
        parts_of = [x[:, :, some] for x, some in zip(grads, (heads, kv_heads, kv_heads), strict=True)]  # views
        for pattern in patterns:
            for grid in grids(seq, pattern, range(heads.start, heads.stop), is_causal, places):
                d_lse_rows = None if d_l is None else grid.rows(d_l, 1)
                parts = backward(
                    grid.rows(q, 1), grid.rows(k, group), grid.rows(v, group), grid.mask(q),
                    *(grid.rows(x, 1) for x in (o, l, d_o)), d_lse_rows,
                )  # fmt: skip
                for whole, rows, per in zip(parts_of, parts, (1, group, group), strict=True):
                    grid.add(whole, rows, per)
    d_query, d_key, d_value = (xp.astype(d, query.dtype, copy=False) for d in grads)
    return d_query, d_key, d_value


def _heads_at_once(query: Array, key: Array) -> Iterator[tuple[slice, slice, int]]:
    """The heads in runs of at most AT_ONCE elements, whole groups that share a key head or equal parts of one; with
    each run its key heads, and how many of the run share one."""
    batch, seq, heads, dim = query.shape
    group, most = heads // key.shape[2], max(1, AT_ONCE // (batch * seq * dim))
    sizes = [n for n in range(1, heads + 1) if heads % n == 0 and (n % group == 0 or group % n == 0) and n <= most]
    for first in range(0, heads, sizes[-1]):
        last = first + sizes[-1]
        yield slice(first, last), slice(first // group, (last - 1) // group + 1), min(group, sizes[-1])
