"""The tokens that a pattern of dilated attention keeps: where they lie, and which of them see each other.

A pattern's segments are documents: the kept tokens of a head, in order, with one interval of visible keys each. Equal
segments of one document stand in the batch (:class:`Segments`, views where the framework has them); packed documents
and padding make them lie anywhere (:class:`Tokens`, by index).

Arrays that may be written to are: NumPy's, and torch's where no gradients are recorded. Of others, all heads are read
and written by one operation each: to compile one a head takes XLA long, and its gradient is a pass over all heads.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from jaxtyping import Bool, Int

from .arrays import (
    Array,
    arange,
    asarray_like,
    framework,
    integers,
    is_concrete,
    namespace,
    pick,
    running_max,
    running_sum,
)
from .dilated_patterns import Pattern
from .mask import PADDING_SEGMENT_ID, Mask


def grids(
    seq: int, pattern: Pattern, heads: range, is_causal: bool, places: Places | None = None
) -> list[Segments] | list[Tokens]:
    """What a pattern keeps of some heads, in as few parts as one attend each can serve.

    Args:
        heads: their numbers, which say their offsets; arrays hold these heads alone.
        places: as :func:`token_places` gives them.
    """
    if places is not None:
        return [_tokens(pattern, heads, is_causal, places)]
    found = []
    full = min(pattern.length, seq)
    whole, rest = divmod(seq, full)
    for first, segments, length in ((0, whole, full), (seq - rest, 1, rest)):
        offsets = [head % pattern.rate for head in heads]
        kept = [-(-(length - offset) // pattern.rate) for offset in offsets]
        for count in sorted(set(kept) - {0}, reverse=True):
            alike = tuple(i for i in range(len(heads)) if kept[i] == count)
            of_alike = tuple(offsets[i] for i in alike)
            found.append(Segments(first, segments, length, pattern.rate, count, alike, of_alike, is_causal))
    return found


def is_writable(x: Array) -> bool:
    """Whether an array, and what is computed from it, may be written to."""
    if framework(x) == "torch":
        return not (sys.modules["torch"].is_grad_enabled() and x.requires_grad)
    return framework(x) == "numpy"


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
    offsets: tuple[int, ...]
    is_causal: bool

    def pieces(self, like: Array, most: int) -> list[Segments]:
        """As many segments at once as ``most`` elements of queries are, one at least: memory that small is used again,
        and not taken from the system and given back each time."""
        each = max(1, most // (like.shape[0] * self.kept * len(self.heads) * like.shape[3]))
        return [
            self._replace(first=self.first + begin * self.length, segments=min(each, self.segments - begin))
            for begin in range(0, self.segments, each)
        ]

    def mask(self, like: Array) -> Mask:
        return (Mask.causal if self.is_causal else Mask.full)(self.kept, self.kept, like=like)

    def rows(self, x: Array, group: int) -> Array:
        """The kept rows of ``x``, each of whose heads serves ``group`` of query's."""
        xp = namespace(x)
        if self.rate == 1:  # no offsets: a view, in which key heads stay shared
            rows = self._cut(x)
        elif is_writable(x):
            # A head's rows lie together, as kernels like them.
            rows = xp.stack([self._place(x, *source) for source in self._sources(group)], axis=2)
            rows = xp.reshape(rows, (-1, *rows.shape[2:]))
            return xp.permute_dims(rows, (0, 2, 1, *range(3, rows.ndim)))
        else:
            heads = [head for head, _ in self._sources(group)]
            runs = self._runs(x if heads == [*range(x.shape[2])] else xp.take(x, integers(heads, x), axis=2))
            here = self._here(self.offsets, runs)
            rows = xp.sum(xp.where(here, runs, 0), axis=3, dtype=x.dtype)[:, :, : self.kept]  # one of each run
        return xp.reshape(rows, (-1, self.kept, *rows.shape[3:]))

    def put(self, x: Array, rows: Array) -> Array:
        """``x``, written to if it may be, with rows where :meth:`rows` takes them from."""
        xp, rows = namespace(rows), self._by_segment(rows, x)
        if is_writable(x) and is_writable(rows):
            for i, (head, offset) in enumerate(self._sources(1)):
                self._place(x, head, offset)[...] = rows[:, :, :, i]
            return x
        before, offsets, heads = self._runs(x), self.offsets, x.shape[2]
        rows = _longer(rows, before.shape[2])
        if len(self.heads) < heads:  # the others keep what they have: no token of a run has their offset
            index = {head: i for i, head in enumerate(self.heads)}
            rows = xp.take(rows, integers([index.get(head, 0) for head in range(heads)], rows), axis=3)
            offsets = tuple(self.offsets[index[head]] if head in index else self.rate for head in range(heads))
        after = xp.where(self._here(offsets, before), rows[:, :, :, None], before)
        after = xp.reshape(after, (*after.shape[:2], -1, *after.shape[4:]))[:, :, : self.length]
        after = xp.reshape(after, (-1, self.segments * self.length, *after.shape[3:]))
        end = self.first + after.shape[1]
        return after if after.shape == x.shape else xp.concat([x[:, : self.first], after, x[:, end:]], axis=1)

    def add(self, x: Array, rows: Array, group: int) -> None:
        """Add rows to what ``x``, which may be written to, has where :meth:`rows` takes them from."""
        rows = self._by_segment(rows, x)
        for i, (head, offset) in enumerate(self._sources(group)):
            place = self._place(x, head, offset)
            place += rows[:, :, :, i]

    def _by_segment(self, rows: Array, x: Array) -> Array:
        xp = namespace(rows)
        return xp.astype(xp.reshape(rows, (-1, self.segments, *rows.shape[1:])), x.dtype, copy=False)

    def _place(self, x: Array, head: int, offset: int) -> Array:
        """What a head keeps, ``(batch, segments, kept, ...)``: a view."""
        return self._cut(x[:, :, head])[:, :, offset :: self.rate]

    def _sources(self, group: int) -> list[tuple[int, int]]:
        """The heads that rows come from, and each one's offset."""
        if self.rate == 1:
            return [(head, 0) for head in range(len(self.heads) // group)]
        return [(head // group, offset) for head, offset in zip(self.heads, self.offsets, strict=True)]

    def _cut(self, x: Array) -> Array:
        """``(batch, segments, length, ...)``."""
        x = x[:, self.first : self.first + self.segments * self.length]
        return namespace(x).reshape(x, (x.shape[0], self.segments, self.length, *x.shape[2:]))

    def _runs(self, x: Array) -> Array:
        """``(batch, segments, runs, rate, heads, ...)``: of each run of neighbours a head keeps at most one."""
        x, runs = self._cut(x), -(-self.length // self.rate)
        x = _longer(x, runs * self.rate)
        return namespace(x).reshape(x, (*x.shape[:2], runs, self.rate, *x.shape[3:]))

    def _here(self, offsets: tuple[int, ...], runs: Array) -> Array:
        """Which of a run's neighbours each head keeps, as ``runs`` has its axes from the rate on."""
        here = arange(self.rate, runs)[:, None] == integers(offsets, runs)
        return namespace(here).reshape(here, (*here.shape, *(1 for _ in runs.shape[5:])))


class Tokens(NamedTuple):
    """The tokens that a pattern keeps, wherever its segments lie: with packed documents and padding.

    Rows are ``(batch * offsets, count, heads / offsets, ...)``: heads at one offset keep the same, the others stand in
    the batch. Rows beyond what a head keeps hold other tokens, which see nothing and that nobody sees.
    """

    index: Int[Array, "batch offsets count"]
    start: Int[Array, "batch offsets count"]
    stop: Int[Array, "batch offsets count"]
    heads: int

    def pieces(self, like: Array, most: int) -> list[Tokens]:
        """They lie anywhere, and stay together."""
        return [self]

    def mask(self, like: Array) -> Mask:
        xp = namespace(self.start)
        return Mask(*(xp.reshape(x, (-1, x.shape[2])) for x in (self.start, self.stop)))

    def rows(self, x: Array, group: int) -> Array:
        """As :meth:`Segments.rows`."""
        return take(x, self.index, arange(self.heads, self.index) // group)

    def put(self, x: Array, rows: Array) -> Array:
        """As :meth:`Segments.put`."""
        rows, place = self._by_head(rows, x), self._place(1)
        if framework(x) == "jax":
            return x.at[place].set(rows)
        x[place] = rows
        return x

    def add(self, x: Array, rows: Array, group: int) -> None:
        """As :meth:`Segments.add`."""
        rows, (row, index, column) = self._by_head(rows, x), self._place(group)
        for i in range(group):  # of the heads that share a key head one at a time: a place is written to once
            place = row, index[:, i::group], column[i::group]
            x[place] = x[place] + rows[:, i::group]

    def _by_head(self, rows: Array, x: Array) -> Array:
        """``(batch, heads, count, ...)``."""
        xp, (batch, offsets, count) = namespace(rows), self.index.shape
        rows = xp.reshape(rows, (batch, offsets, count, -1, *rows.shape[3:]))
        rows = xp.permute_dims(rows, (0, 3, 1, 2, *range(4, rows.ndim)))
        return xp.astype(xp.reshape(rows, (batch, self.heads, count, *rows.shape[4:])), x.dtype, copy=False)

    def _place(self, group: int) -> tuple[Array, Array, Array]:
        return _by_column(self.index, arange(self.heads, self.index) // group)


def take(x: Array, index: Int[Array, "batch offsets n"], column: Int[Array, " heads"]) -> Array:
    """Of ``x (batch, places, columns, ...)`` the places that heads at each offset keep, each head of its column:
    ``(batch * offsets, n, heads / offsets, ...)``, as :class:`Tokens` has rows."""
    xp, (batch, offsets, n), heads, rest = namespace(x), index.shape, column.shape[0], x.shape[3:]
    rows = xp.reshape(x[_by_column(index, column)], (batch, heads // offsets, offsets, n, *rest))
    rows = xp.permute_dims(rows, (0, 2, 3, 1, *range(4, rows.ndim)))
    return xp.reshape(rows, (batch * offsets, n, heads // offsets, *rest))


def _by_column(index: Array, column: Array) -> tuple[Array, Array, Array]:
    """The place of ``(batch, heads, n, ...)`` in an array ``(batch, places, columns, ...)``."""
    offset = arange(column.shape[0], index) % index.shape[1]
    return arange(index.shape[0], index)[:, None, None], index[:, offset], column[:, None]


def _longer(x: Array, length: int) -> Array:
    """``x`` with zeros behind it on axis 2, so that it has that length."""
    if x.shape[2] == length:
        return x
    xp, more = namespace(x), (*x.shape[:2], length - x.shape[2], *x.shape[3:])
    return xp.concat([x, xp.broadcast_to(xp.zeros_like(x[:, :, :1]), more)], axis=2)


class Places(NamedTuple):
    """Where the tokens of rows with packed documents or padding stand."""

    position: Int[Array, "batch seq"]  #: in the token's document, counting no padding
    real: Bool[Array, "batch seq"]  #: whether it is no padding
    documents: int  #: how many there can be at most


def document_positions(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Each token's position in its document; of padding, id -1, any."""
    places = token_places(segment_ids, segment_ids, None)
    assert places is not None
    return places.position


def token_places(like: Array, segment_ids: Array | None, key_padding_mask: Array | None) -> Places | None:
    """What segment ids and padding say; None if there is but one document and no padding."""
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
    position = counted - running_max(xp.where(real & changed, counted, 0))
    return Places(position, real, 1 if segment_ids is None else seq)


def _tokens(pattern: Pattern, heads: range, is_causal: bool, places: Places) -> Tokens:
    position, real, documents = places
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
    return Tokens(index, xp.astype(start, xp.int32), xp.astype(stop, xp.int32), len(heads))
