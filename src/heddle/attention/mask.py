"""Which keys each query sees: one interval of visible keys per query."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from .arrays import (
    Array,
    arange,
    asarray_like,
    clip,
    framework,
    is_concrete,
    namespace,
    pick,
    running_max,
    running_sum,
    to_numpy,
)
from .tiles import Tiles, tiles

T = TypeVar("T")

PADDING_SEGMENT_ID = -1  #: the segment id of tokens that are padding


@dataclass(frozen=True, eq=False)
class Mask:
    """Query ``i`` sees key ``j`` iff ``j < stop[i]`` and (``start[i] <= j`` or ``j < prefix``).

    So ``stop`` bounds everything a query sees (causality cuts the prefix too), masks of one prefix are closed under
    ``&``, and ``stop == 0`` is a padding query: its output is 0, its lse -inf, its gradient 0. Keys that don't exist
    (``j`` at or past the number of keys) are not seen.

    Args:
        start: integers ``(batch | 1, q_len)``, each query's first visible key after the prefix.
        stop: integers ``(batch | 1, q_len)``, one past each query's last visible key.
        prefix: how many leading keys are visible up to ``stop``, wherever ``start`` is (learned prefixes, sinks).

    Raises:
        ValueError: arrays that aren't two-dimensional integers of one shape, or a negative prefix.

    >>> print(Mask.causal(4, 4).show())
    █···
    ██··
    ███·
    ████
    >>> segments = np.array([[7, 7, 3, 3, -1]])
    >>> print(Mask.documents(segments).show(kv_len=5))
    █····
    ██···
    ··█··
    ··██·
    ·····
    >>> print(Mask.window(5, 2, prefix=1).show())
    █····
    ██···
    ███··
    █·██·
    █··██
    """

    start: Int[Array, "rows q_len"]
    stop: Int[Array, "rows q_len"]
    prefix: int = 0

    def __post_init__(self):
        for name in ("start", "stop"):
            array = getattr(self, name)
            xp = namespace(array)
            if array.ndim != 2 or not xp.isdtype(array.dtype, "integral"):
                raise ValueError(
                    f"{name} must be integers of shape (batch | 1, q_len), got {array.dtype} of shape {array.shape}"
                )
        if self.start.shape != self.stop.shape:
            raise ValueError(f"start and stop must have one shape, got {self.start.shape} and {self.stop.shape}")
        _check_count("prefix", self.prefix, minimum=0)
        register_pytree()

    # ------------------------------------------------------------------ constructors

    @classmethod
    def full(cls, q_len: int, kv_len: int, *, like: Array | None = None) -> Mask:
        """Every query sees all ``kv_len`` keys. ``like``: an array whose framework and device the mask takes."""
        _check_count("q_len", q_len)
        _check_count("kv_len", kv_len)
        zero = arange(q_len, like)[None, :] * 0
        return cls(zero, zero + kv_len)

    @classmethod
    def causal(
        cls, q_len: int, kv_len: int | None = None, offset: int | Int[Array, " batch"] = 0, *, like: Array | None = None
    ) -> Mask:
        """Query ``i`` sees the keys ``j <= i + offset``; ``offset`` may differ by sequence, shape ``(batch,)``.

        ``kv_len`` (default: no bound) is the number of keys there are.
        """
        _check_count("q_len", q_len)
        stop = _positions(q_len, offset, like) + 1
        stop = clip(stop, 0, kv_len)
        return cls(stop * 0, stop)

    @classmethod
    def window(
        cls,
        q_len: int,
        size: int,
        kv_len: int | None = None,
        offset: int | Int[Array, " batch"] = 0,
        *,
        causal: bool = True,
        prefix: int = 0,
        like: Array | None = None,
    ) -> Mask:
        """Sliding window: the query at position ``p = i + offset`` sees keys ``p - size < j <= p``.

        With ``causal=False`` also the ``size - 1`` keys after it. ``prefix`` leading keys stay visible to all that come
        after them (attention sinks, arXiv 2309.17453).
        """
        _check_count("size", size)
        _check_count("prefix", prefix, minimum=0)
        _check_count("q_len", q_len)
        position = _positions(q_len, offset, like)
        start = clip(position - size + 1, 0, None)
        stop = clip(position + (1 if causal else size), 0, kv_len)
        return cls(start, stop, prefix)

    @classmethod
    def documents(
        cls,
        q_segments: Int[Array, "batch q_len"],
        kv_segments: Int[Array, "batch kv_len"] | None = None,
        q_positions: Int[Array, "batch q_len"] | None = None,
        kv_positions: Int[Array, "batch kv_len"] | None = None,
        causal: bool = True,
        padding: int = PADDING_SEGMENT_ID,
    ) -> Mask:
        """Packed documents: a query sees the keys of its own segment, at or before its position if ``causal``.

        Segment ids are any non-negative integers, in any order, as long as one document's keys are contiguous and in
        order of position; ``padding`` marks padding. Queries may stand in any order. Positions only compare tokens of
        one document, so they may restart at each document or not; by default they are the indices.

        Raises:
            ValueError: shapes that disagree; a segment whose keys aren't contiguous, which an interval can't say
                (checked whenever values can be read, so not under jit).
        """
        queries, keys, q_places, k_places = _check_documents(q_segments, kv_segments, q_positions, kv_positions, causal)
        if is_concrete(keys) and is_concrete(queries):
            _check_segments(queries, keys, k_places if causal else None, padding)

        xp, kv_len = namespace(keys), keys.shape[1]
        # Sort keys and queries together by (segment, position), at equal places keys before queries. Then the keys a
        # query sees are those before it in its run of equal segments.
        ids = xp.concat([keys, queries], axis=1)
        order = None
        if causal:
            order = xp.argsort(xp.concat([k_places, q_places], axis=1), axis=1, stable=True)
            ids = pick(ids, order)
        by_id = xp.argsort(ids, axis=1, stable=True)
        ids = pick(ids, by_id)
        order = by_id if order is None else pick(order, by_id)

        is_key = xp.astype(order < kv_len, xp.int32)
        seen = xp.astype(running_sum(is_key), xp.int32)
        begins = xp.concat([xp.ones_like(ids[:, :1]) == 1, ids[:, 1:] != ids[:, :-1]], axis=1)
        run = running_max(xp.where(begins, arange(ids.shape[1], ids)[None, :], 0))
        before_run = pick(seen - is_key, run)

        place = xp.argsort(order, axis=1, stable=True)
        q_place = place[:, kv_len:]
        first = pick(before_run, q_place)
        count = pick(seen, q_place) - first
        sorted_keys = pick(order, xp.argsort(1 - is_key, axis=1, stable=True)[:, :kv_len])
        start = pick(sorted_keys, clip(first, 0, kv_len - 1))
        count = xp.where(queries == padding, 0 * count, count)
        start = xp.astype(xp.where(count > 0, start, 0 * start), xp.int32)
        return cls(start, start + xp.astype(count, xp.int32))

    @classmethod
    def lengths(
        cls,
        kv_lengths: Int[Array, " batch"],
        q_len: int,
        causal: bool = True,
        *,
        offset: Int[Array, " batch"] | None = None,
    ) -> Mask:
        """Padded or cached sequences: sequence ``b`` has ``kv_lengths[b]`` keys, at the front.

        Its queries stand at positions ``offset[b] + i``; by default they are the last ``q_len`` of the sequence
        (decoding from a cache), or all of it if it is no longer than ``q_len`` (right-padded rows). Queries past the
        sequence's end are padding.
        """
        if kv_lengths.ndim != 1:
            raise ValueError(f"kv_lengths must have shape (batch,), got {tuple(kv_lengths.shape)}")
        _check_count("q_len", q_len)
        xp = namespace(kv_lengths)
        lengths = kv_lengths[:, None]
        first = clip(lengths - q_len, 0, None) if offset is None else offset[:, None]
        position = arange(q_len, kv_lengths)[None, :] + first
        stop = xp.where(position < lengths, position + 1 if causal else lengths + 0 * position, 0 * position)
        return cls(stop * 0, stop)

    # ------------------------------------------------------------------ operations

    @property
    def q_len(self) -> int:
        return self.start.shape[1]

    def __and__(self, other: Mask) -> Mask:
        """The pairs visible in both masks. Rows of one broadcast against a batch.

        Raises:
            ValueError: different numbers of queries; different prefixes, unless the mask of the smaller prefix has
                no gap after it (a gap would leave more than one interval).
        """
        if self.q_len != other.q_len:
            raise ValueError(f"masks to intersect must have one q_len, got {self.q_len} and {other.q_len}")
        if framework(self.start) == "numpy":
            self = self.on(other.start)
        other = other.on(self.start)
        xp = namespace(self.start)
        if self.prefix != other.prefix:
            smaller = min(self, other, key=lambda mask: mask.prefix)
            if not is_concrete(smaller.start) or bool(xp.any(smaller.start > smaller.prefix)):
                raise ValueError(
                    f"masks to intersect must have one prefix, got {self.prefix} and {other.prefix}: "
                    "together they leave more than one interval"
                )
        return Mask(
            xp.maximum(self.start, other.start), xp.minimum(self.stop, other.stop), max(self.prefix, other.prefix)
        )

    def on(self, array: Array) -> Mask:
        """This mask in the framework and on the device of ``array``: itself, if it is there already."""
        target = framework(array)
        device = array.device if target == "torch" else None
        if framework(self.start) == target and (device is None or self.start.device == device):
            return self
        return self.keep(
            ("on", target, device),
            lambda: Mask(asarray_like(self.start, array), asarray_like(self.stop, array), self.prefix),
            lambda mask: mask.start,
        )

    def take(self, rows: Int[Array, " n"]) -> Mask:
        """The mask of the queries ``rows``, in that order; keys stay as they are (context parallelism)."""
        xp, rows = namespace(self.start), asarray_like(rows, self.start)
        return Mask(xp.take(self.start, rows, axis=1), xp.take(self.stop, rows, axis=1), self.prefix)

    def dense(self, kv_len: int) -> Bool[Array, "rows q_len kv_len"]:
        """All pairs, for the oracle and for small pictures: O(q_len * kv_len)."""
        key = arange(kv_len, self.start)
        return (key < self.stop[..., None]) & ((self.start[..., None] <= key) | (key < self.prefix))

    def counts(self, kv_len: int | None = None) -> Int[Array, "rows q_len"]:
        """How many keys each query sees."""
        stop = clip(self.stop, 0, kv_len)
        return clip(stop, None, self.prefix) + clip(stop - clip(self.start, self.prefix, None), 0, None)

    def visible(self, kv_len: int | None = None) -> int:
        """How many pairs are visible, exactly, summed over the mask's rows (one row serves the whole batch)."""
        return int(np.sum(to_numpy(self.counts(kv_len)), dtype=np.int64))

    def tiles(self, block_q: int, block_k: int, kv_len: int) -> Tiles:
        """What a kernel with tiles of ``block_q`` queries by ``block_k`` keys visits. O(q_len) memory.

        A row of tiles visits the hull of its queries' intervals. For a column the interval is exact where the masks'
        intervals ascend with the queries (every constructor's do) and otherwise covers at least what is visible.
        """
        for name, value in (("block_q", block_q), ("block_k", block_k), ("kv_len", kv_len)):
            _check_count(name, value)
        return self.keep(
            ("tiles", block_q, block_k, kv_len),
            lambda: tiles(self.start, self.stop, self.prefix, block_q, block_k, kv_len),
            lambda found: found.rows.lo,
        )

    def keep(self, name: Hashable, compute: Callable[[], T], array: Callable[[T], Array]) -> T:
        """``compute()``, once: what follows from a mask is kept with it, so that all layers share the work.

        Not what a trace gives (jit, compile), which ends with it, nor JAX arrays, which may be traced at any time;
        ``array`` picks one of the result's, to tell. Whoever writes to ``start`` or ``stop`` makes a new mask.
        """
        torch = sys.modules.get("torch")
        if torch is not None and torch.compiler.is_compiling():
            return compute()
        name = (name, torch is not None and torch.is_inference_mode_enabled())  # whose tensors serve no gradient
        kept = self.__dict__.get("_kept", {})
        if name not in kept:
            result = compute()
            if framework(array(result)) == "jax" or not is_concrete(array(result)):
                return result
            object.__setattr__(self, "_kept", kept | {name: result})
            return result
        return kept[name]

    def coverage(self, block_q: int, block_k: int, kv_len: int) -> Float[np.ndarray, "rows q_tiles k_tiles"]:
        """The share of visible pairs in each tile (0 empty, 1 full), for pictures. O(q_len * kv_len / block_k)."""
        start, stop = (to_numpy(a).astype(np.int64)[..., None] for a in (self.start, self.stop))
        low = np.arange(0, kv_len, block_k)
        high = np.minimum(low + block_k, kv_len)

        def overlap(first, last):
            return np.clip(np.minimum(high, last) - np.maximum(low, first), 0, None)

        seen = overlap(0, np.minimum(stop, self.prefix)) + overlap(np.maximum(start, self.prefix), stop)
        edges = np.arange(0, self.q_len, block_q)
        queries = np.minimum(edges + block_q, self.q_len) - edges
        return np.add.reduceat(seen, edges, axis=1) / (queries[:, None] * (high - low))

    def show(self, kv_len: int | None = None, *, row: int = 0, cells: int = 64) -> str:
        """One row of the mask as text: ``█`` visible, ``·`` not, ``▒`` a cell that is partly visible."""
        if kv_len is None:
            kv_len = max(int(to_numpy(self.stop).max()), self.prefix, 1)
        block_q, block_k = -(-self.q_len // cells), -(-kv_len // cells)
        share = self.coverage(block_q, block_k, kv_len)[row]
        return "\n".join("".join("█" if s == 1 else "▒" if s else "·" for s in line) for line in share)

    def __repr__(self) -> str:
        rows, q_len = self.start.shape
        prefix = f", prefix={self.prefix}" if self.prefix else ""
        seen = f", {self.visible():,} visible pairs" if is_concrete(self.start) else ""
        return f"Mask({rows} x {q_len} queries{prefix}{seen})"


def _check_count(name: str, value: int, minimum: int = 1) -> None:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _positions(q_len: int, offset: Array, like: Array | None) -> Array:
    """The queries' positions ``offset + i``, shape ``(batch | 1, q_len)``."""
    if getattr(offset, "ndim", 0):
        return arange(q_len, offset if like is None else like)[None, :] + offset[:, None]
    return arange(q_len, like)[None, :] + offset


def _check_documents(
    q_segments: Array, kv_segments: Array, q_positions: Array, kv_positions: Array, causal: bool
) -> tuple[Array, Array, Array, Array]:
    """The four arrays of :meth:`Mask.documents` with their defaults filled in, shapes checked."""
    if kv_segments is None:
        if kv_positions is not None:
            raise ValueError("kv_positions must come with kv_segments, which was None")
        kv_segments, kv_positions = q_segments, q_positions
    if (q_positions is None) != (kv_positions is None):
        raise ValueError("q_positions and kv_positions must be given both or neither")
    for name, ids, positions in (("q", q_segments, q_positions), ("kv", kv_segments, kv_positions)):
        if ids.ndim != 2:
            raise ValueError(f"{name}_segments must have shape (batch, {name}_len), got {tuple(ids.shape)}")
        if positions is not None and positions.shape != ids.shape:
            raise ValueError(
                f"{name}_positions must have {name}_segments' shape {tuple(ids.shape)}, got {tuple(positions.shape)}"
            )
    if q_segments.shape[0] != kv_segments.shape[0]:
        raise ValueError(
            f"q_segments and kv_segments must have one batch size, got {q_segments.shape[0]} and {kv_segments.shape[0]}"
        )
    if causal and q_positions is None:
        if q_segments.shape != kv_segments.shape:
            raise ValueError(
                "q_positions and kv_positions must be given for a causal mask of "
                f"{q_segments.shape[1]} queries and {kv_segments.shape[1]} keys: an index tells no position there"
            )
        index = arange(q_segments.shape[1], q_segments)[None, :] + 0 * q_segments
        q_positions = kv_positions = index
    return q_segments, kv_segments, q_positions, kv_positions


def _check_segments(q_segments: Array, kv_segments: Array, kv_positions: Array | None, padding: int) -> None:
    for name, ids in (("q_segments", to_numpy(q_segments)), ("kv_segments", to_numpy(kv_segments))):
        bad = ids[(ids < 0) & (ids != padding)]
        if bad.size:
            raise ValueError(f"{name} must be non-negative, or {padding} for padding, got {bad[0]}")
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape) if kv_positions is None else to_numpy(kv_positions)
    order = np.lexsort((positions, ids), axis=-1)
    ids = np.take_along_axis(ids, order, axis=1)
    broken = (ids[:, 1:] == ids[:, :-1]) & (order[:, 1:] != order[:, :-1] + 1) & (ids[:, 1:] != padding)
    if broken.any():
        row, place = np.argwhere(broken)[0]
        raise ValueError(
            "kv_segments must hold each document's keys contiguously and in order of position: "
            f"in row {row}, segment id {ids[row, place]} goes from key {order[row, place]} "
            f"to key {order[row, place + 1]}"
        )


_registered = False


def register_pytree() -> None:
    """Make Mask a JAX pytree once JAX is there: start and stop are leaves, the prefix is static."""
    global _registered
    if _registered or "jax" not in sys.modules or not hasattr(sys.modules["jax"], "tree_util"):
        return
    _registered = True

    def unflatten(prefix, children):
        mask = object.__new__(Mask)  # leaves may be anything here, so no checks
        for name, value in zip(("start", "stop", "prefix"), (*children, prefix), strict=True):
            object.__setattr__(mask, name, value)
        return mask

    sys.modules["jax"].tree_util.register_pytree_with_keys(
        Mask,
        lambda mask: ((("start", mask.start), ("stop", mask.stop)), mask.prefix),
        unflatten,
        lambda mask: ((mask.start, mask.stop), mask.prefix),
    )
