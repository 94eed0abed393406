"""LongNet's dilated attention: attention within segments over every r-th token, merged over several (segment, r).

"LongNet: Scaling Transformers to 1,000,000,000 Tokens", arXiv 2307.02486, eq. 5 to 12. A pattern ``(w, r)`` cuts a
sequence into segments of ``w`` tokens and keeps every ``r``-th of each, head ``j`` from token ``j mod r`` on; the kept
tokens of a segment attend to each other, and a token's outputs merge over the patterns that kept it. That is one
softmax over all keys it saw, where a key seen in two patterns counts twice. Time and memory are linear in the length.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, overload

from jaxtyping import Bool, Float, Int

from .arrays import (
    Array,
    accumulator_dtype,
    arange,
    asarray_like,
    framework,
    is_concrete,
    namespace,
    pick,
    running_max,
    running_sum,
)
from .attend import attend as attend_one_set
from .attend import check, score_scale
from .mask import PADDING_SEGMENT_ID, Mask, _check_segments
from .merge import merge

#: Elements of queries computed together, at most, unless one head has more: bounds what is held beside in- and output.
AT_ONCE = 1 << 22


class Pattern(NamedTuple):
    """Segments of ``length`` tokens, of which every ``rate``-th is kept."""

    length: int
    rate: int


def check_patterns(segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> tuple[Pattern, ...]:
    """The patterns of two lists, checked.

    Raises:
        ValueError: lists that are empty, differ in length, or hold anything but positive integers.
    """
    lists: dict[str, list[int]] = {}
    for name, values in (("segment_lengths", segment_lengths), ("dilation_rates", dilation_rates)):
        try:
            lists[name] = [operator.index(value) for value in values]
        except TypeError:
            raise ValueError(f"{name} must be a list of positive integers, got {values!r}") from None
        if not lists[name] or min(lists[name]) < 1:
            raise ValueError(f"{name} must hold positive integers, at least one, got {values!r}")
    lengths, rates = lists.values()
    if len(lengths) != len(rates):
        raise ValueError(
            f"segment_lengths and dilation_rates must be of one length, got {len(lengths)} and {len(rates)}"
        )
    return tuple(map(Pattern, lengths, rates))


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
    xp, (_, seq, heads, _), wide = namespace(query), query.shape, accumulator_dtype(query)
    group, places = heads // key.shape[2], _places(query, segment_ids, key_padding_mask)
    inputs = (query, key, value)
    out, lse = _blank(value, heads, 0.0, inputs), _blank(value[..., 0], heads, -float("inf"), inputs)
    for some in _heads_at_once(query, group):
        for number, pattern in enumerate(patterns):
            for grid in grids(seq, pattern, some, is_causal, places):
                part = attend(grid.rows(query, 1), grid.rows(key, group), grid.rows(value, group), grid.mask(query))
                part = xp.astype(part[0], wide, copy=False), part[1]
                if number:
                    part = merge([(grid.rows(out, 1), grid.rows(lse, 1)), part])
                grid.put(out, part[0], 1)
                grid.put(lse, part[1], 1)
    return xp.astype(_whole(out), query.dtype, copy=False), _whole(lse)


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
    it is given: ``exp(score - lse)`` is then a key's weight in the softmax over all patterns.
    """
    xp, (_, seq, heads, _) = namespace(query), query.shape
    group, places = heads // key.shape[2], _places(query, segment_ids, key_padding_mask)
    grads = [_blank(x, x.shape[2], 0.0, (query, d_out)) for x in (query, key, value)]
    for some in _heads_at_once(query, group):
        for pattern in patterns:
            for grid in grids(seq, pattern, some, is_causal, places):
                d_lse_rows = None if d_lse is None else grid.rows(d_lse, 1)
                parts = backward(
                    grid.rows(query, 1), grid.rows(key, group), grid.rows(value, group), grid.mask(query),
                    *(grid.rows(x, 1) for x in (out, lse, d_out)), d_lse_rows,
                )  # fmt: skip
                for whole, rows, per in zip(grads, parts, (1, group, group), strict=True):
                    grid.put(whole, rows, per, add=True)
    d_query, d_key, d_value = (xp.astype(_whole(d), query.dtype, copy=False) for d in grads)
    return d_query, d_key, d_value


def _heads_at_once(query: Array, group: int) -> Iterator[range]:
    """The heads in runs of at most AT_ONCE elements: whole groups that share a key head, or equal parts of one."""
    batch, seq, heads, dim = query.shape
    most = max(1, AT_ONCE // (batch * seq * dim))
    sizes = [n for n in range(1, heads + 1) if heads % n == 0 and (n % group == 0 or group % n == 0) and n <= most]
    return (range(first, first + sizes[-1]) for first in range(0, heads, sizes[-1]))


class Columns(list[Array]):
    """By head, ``(batch, seq, ...)`` each: an array ``(batch, seq, heads, ...)`` whose heads can be replaced."""


def _blank(like: Array, heads: int, fill: float, inputs: tuple[Array, ...]) -> Array | Columns:
    """What results are gathered in, of ``like``'s shape with ``heads``: an array, if it may be written to.

    JAX's may not, and torch's not while gradients are recorded: each write would cost a pass over all heads' gradient.
    """
    xp, (batch, seq, _, *rest) = namespace(like), like.shape
    torch = framework(like) == "torch"
    recorded = torch and sys.modules["torch"].is_grad_enabled() and any(x.requires_grad for x in inputs)
    if framework(like) == "jax" or recorded:
        return Columns([xp.full_like(like[:, :, 0], fill, dtype=accumulator_dtype(like)) for _ in range(heads)])
    device = {"device": like.device} if torch else {}
    return xp.full((batch, seq, heads, *rest), fill, dtype=accumulator_dtype(like), **device)


def _whole(x: Array | Columns) -> Array:
    """``(batch, seq, heads, ...)``."""
    return namespace(x[0]).stack(list(x), axis=2) if isinstance(x, Columns) else x


def _column(x: Array | Columns, head: int) -> Array:
    return x[head] if isinstance(x, Columns) else x[:, :, head]


# ---------------------------------------------------------------- the tokens that a pattern keeps


def grids(
    seq: int, pattern: Pattern, heads: range, is_causal: bool, places: tuple[Array, Array, int] | None = None
) -> list[Segments] | list[Tokens]:
    """What a pattern keeps of some heads, in as few parts as one attend each can serve."""
    if places is not None:
        return [_tokens(pattern, heads, is_causal, *places)]
    found = []
    full = min(pattern.length, seq)
    whole, rest = divmod(seq, full)
    for first, segments, length in ((0, whole, full), (seq - rest, 1, rest)):
        kept = {head: -(-(length - head % pattern.rate) // pattern.rate) for head in heads}
        for count in sorted(set(kept.values()) - {0}, reverse=True):
            alike = tuple(head for head in heads if kept[head] == count)
            found.append(Segments(first, segments, length, pattern.rate, count, alike, is_causal))
    return found


class Segments(NamedTuple):
    """The tokens that equal segments keep of heads that keep equally many, ``kept`` of each segment.

    Rows are ``(batch * segments, kept, heads, ...)``: the segments stand in the batch, and one row of mask serves all.
    """

    first: int
    segments: int
    length: int
    rate: int
    kept: int
    heads: tuple[int, ...]
    is_causal: bool

    def mask(self, like: Array) -> Mask:
        return (Mask.causal if self.is_causal else Mask.full)(self.kept, self.kept, like=like)

    def rows(self, x: Array | Columns, group: int) -> Array:
        """The kept rows of ``x``, each of whose heads serves ``group`` of query's."""
        sources = self._sources(group)
        if self.rate == 1 and not isinstance(x, Columns):  # no offsets: a view, in which key heads stay shared
            whole = self._cut(x[:, :, sources[0][0] : sources[-1][0] + 1])
            return namespace(whole).reshape(whole, (-1, self.kept, *whole.shape[3:]))
        xp = namespace(_column(x, sources[0][0]))
        found = [self._cut(_column(x, head))[:, :, offset :: self.rate] for head, offset in sources]
        rows = xp.stack(found, axis=2)  # a head's rows lie together, as kernels like them
        rows = xp.reshape(rows, (-1, *rows.shape[2:]))
        return xp.permute_dims(rows, (0, 2, 1, *range(3, rows.ndim)))

    def put(self, x: Array | Columns, rows: Array, group: int, add: bool = False) -> None:
        """Write rows to where :meth:`rows` takes them from, or add them to what is there."""
        xp = namespace(rows)
        rows = xp.reshape(rows, (-1, self.segments, *rows.shape[1:]))
        for i, (head, offset) in enumerate(self._sources(group)):
            column = _column(x, head)
            of_head = xp.astype(rows[:, :, :, i], column.dtype, copy=False)
            if framework(column) == "jax":
                x[head] = self._with_rows(column, of_head, offset, add)
                continue
            place = self._cut(column)[:, :, offset :: self.rate]  # a view
            if add:
                place += of_head
            else:
                place[...] = of_head

    def _sources(self, group: int) -> list[tuple[int, int]]:
        """The heads that rows come from, and each one's offset."""
        if self.rate == 1:
            return [(head, 0) for head in range(self.heads[0] // group, self.heads[-1] // group + 1)]
        return [(head // group, head % self.rate) for head in self.heads]

    def _cut(self, x: Array) -> Array:
        """``(batch, segments, length, ...)``."""
        x = x[:, self.first : self.first + self.segments * self.length]
        return namespace(x).reshape(x, (x.shape[0], self.segments, self.length, *x.shape[2:]))

    def _with_rows(self, column: Array, rows: Array, offset: int, add: bool) -> Array:
        """``put`` for arrays that can't be written to: of each ``rate`` neighbours one is replaced."""
        xp, rest = namespace(column), column.shape[2:]
        runs = -(-self.length // self.rate)

        def padded(x: Array, length: int) -> Array:
            more = length - x.shape[2]
            return xp.concat([x, xp.zeros((*x.shape[:2], more, *rest), dtype=x.dtype)], axis=2) if more else x

        before = xp.reshape(padded(self._cut(column), runs * self.rate), (-1, self.segments, runs, self.rate, *rest))
        rows = padded(rows, runs)[:, :, :, None]
        here = xp.reshape(arange(self.rate, column) == offset, (self.rate, *(1 for _ in rest)))
        after = xp.where(here, before + rows if add else rows, before)
        after = xp.reshape(after, (-1, self.segments, runs * self.rate, *rest))[:, :, : self.length]
        after = xp.reshape(after, (-1, self.segments * self.length, *rest))
        return xp.concat([column[:, : self.first], after, column[:, self.first + after.shape[1] :]], axis=1)


class Tokens(NamedTuple):
    """The tokens that a pattern keeps, wherever its segments lie: with packed documents and padding.

    Rows are ``(batch * offsets, count, heads / offsets, ...)``: heads at one offset keep the same, the others stand in
    the batch. Rows beyond what a head keeps hold other tokens, which see nothing and that nobody sees.
    """

    index: Int[Array, "batch offsets count"]
    start: Int[Array, "batch offsets count"]
    stop: Int[Array, "batch offsets count"]
    heads: range

    def mask(self, like: Array) -> Mask:
        xp = namespace(self.start)
        return Mask(*(xp.reshape(x, (-1, x.shape[2])) for x in (self.start, self.stop)))

    def rows(self, x: Array | Columns, group: int) -> Array:
        """As :meth:`Segments.rows`."""
        found = [_column(x, head // group)[self._place(i)] for i, head in enumerate(self.heads)]
        xp, offsets = namespace(found[0]), self.index.shape[1]
        rows = xp.stack([xp.stack(found[i::offsets], axis=2) for i in range(offsets)], axis=1)
        return xp.reshape(rows, (-1, *rows.shape[2:]))

    def put(self, x: Array | Columns, rows: Array, group: int, add: bool = False) -> None:
        """As :meth:`Segments.put`."""
        xp, offsets = namespace(rows), self.index.shape[1]
        rows = xp.reshape(rows, (-1, offsets, *rows.shape[1:]))
        for i, head in enumerate(self.heads):
            column, place = _column(x, head // group), self._place(i)
            of_head = xp.astype(rows[:, i % offsets, :, i // offsets], column.dtype, copy=False)
            if framework(column) == "jax":
                x[head // group] = column.at[place].add(of_head) if add else column.at[place].set(of_head)
            else:
                column[place] = column[place] + of_head if add else of_head

    def _place(self, i: int) -> tuple[Array, Array]:
        """Of the ``i``-th head, its rows in a column."""
        index = self.index[:, i % self.index.shape[1]]
        return arange(index.shape[0], index)[:, None], index


def document_positions(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Each token's position in its document; of padding, id -1, any."""
    places = _places(segment_ids, segment_ids, None)
    assert places is not None
    return places[0]


def _places(like: Array, segment_ids: Array | None, key_padding_mask: Array | None) -> tuple[Array, Array, int] | None:
    """Each token's position in its document, counting no padding; whether it isn't padding; how many documents there
    can be at most. None if there is but one document and no padding."""
    if segment_ids is None and key_padding_mask is None:
        return None
    if segment_ids is None:
        real = ~asarray_like(key_padding_mask, like)
        ids = namespace(real).astype(real, namespace(real).int32) * 0
    else:
        ids = asarray_like(segment_ids, like)
        real = ids != PADDING_SEGMENT_ID
        if key_padding_mask is not None:
            real = real & ~asarray_like(key_padding_mask, like)
    xp, (_, seq) = namespace(ids), ids.shape
    counted = xp.astype(running_sum(xp.astype(real, xp.int32)), xp.int32) - xp.astype(real, xp.int32)
    # A document begins at a token whose id isn't that of the last one that is no padding.
    last = running_max(xp.where(real, arange(seq, ids)[None] + 1, 0))
    last = xp.concat([xp.zeros_like(last[:, :1]), last[:, :-1]], axis=1)
    changed = (last == 0) | (pick(ids, xp.where(last > 0, last - 1, 0)) != ids)
    return counted - running_max(xp.where(real & changed, counted, 0)), real, 1 if segment_ids is None else seq


def _tokens(pattern: Pattern, heads: range, is_causal: bool, position: Array, real: Array, documents: int) -> Tokens:
    xp, seq, (length, rate) = namespace(position), position.shape[1], pattern
    offsets = rate if len(heads) % rate == 0 else len(heads)
    offset = (arange(offsets, position) + heads.start) % rate
    within = (position % length)[:, None]
    kept = real[:, None] & (within % rate == offset[:, None])
    total = xp.astype(xp.sum(xp.astype(kept, xp.int32), axis=-1, keepdims=True), xp.int32)
    # Where values can't be read, shapes must do for any: a segment keeps at most one token more than its share.
    most = min(seq, -(-seq // rate) + documents + seq // length)
    count = max(1, int(xp.max(total))) if is_concrete(total) else most
    index = xp.argsort(xp.astype(~kept, xp.int32), axis=-1, stable=True)[..., :count]
    nth = pick(xp.broadcast_to(within // rate, kept.shape), index)  # of the tokens its segment keeps
    at = arange(count, position)
    here = at < total
    start = xp.where(here, at - nth, 0)
    if is_causal:
        stop = at + 1
    else:  # where the next segment begins
        begins = xp.where(here & (nth == 0), at, total)
        after = xp.concat([begins[..., 1:], total], axis=-1)
        stop = -xp.flip(running_max(xp.flip(-after, axis=-1)), axis=-1)
    stop = xp.where(here, stop, 0)
    return Tokens(index, xp.astype(start, xp.int32), xp.astype(stop, xp.int32), heads)


def causal_pairs(length: int, patterns: Sequence[Pattern], heads: int) -> int:
    """The pairs of a query and a key it sees, of all heads and patterns, in one document: what dilation has to do."""
    pairs = 0
    for w, r in patterns:
        for offset in (head % r for head in range(heads)):
            for segments, tokens in ((length // w, w), (1, length % w)):
                kept = max(0, -(-(tokens - offset) // r))
                pairs += segments * kept * (kept + 1) // 2
    return pairs


# ---------------------------------------------------------------- decoding


def decode_slot(
    position: Int[Array, " batch"], pattern: Pattern, heads: int
) -> tuple[Bool[Array, "batch heads"], Int[Array, " batch"]]:
    """Which heads of a pattern keep the token at ``position`` of its document, and its slot in their cache.

    Where it is kept its key goes to that slot, and it sees the slots up to it, its own included; where it isn't, it
    sees nothing of this pattern and leaves nothing. A segment's first token starts again at slot 0, so that ``ceil(w /
    r)`` slots a pattern and head serve any length.
    """
    within = position % pattern.length
    kept = (within % pattern.rate)[:, None] == (arange(heads, position) % pattern.rate)[None]
    return kept, within // pattern.rate


def cache_length(segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> int:
    """The keys a head has to keep for decoding, at most: the sum of ``ceil(w / r)``."""
    return sum(-(-pattern.length // pattern.rate) for pattern in check_patterns(segment_lengths, dilation_rates))
