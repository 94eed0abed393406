"""Decoding with dilated attention: a cache whose size doesn't grow with the sequence.

By arXiv 2307.02486, eq. 5 to 9, token ``t`` takes part in a pattern ``(w, r)`` at head ``j`` iff ``(t mod w) mod r ==
j mod r``, and sees what does so in its own segment, at or before it. What lies in earlier segments nobody sees again:
so a ring of ``ceil(w / r)`` keys, begun anew with each segment, serves any length.

Heads that share a key head and an offset share a ring, so that with grouped queries there are fewer rings than heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from jaxtyping import Float, Int

from .arrays import (
    Array,
    accumulator_dtype,
    arange,
    asarray_like,
    clip,
    framework,
    is_concrete,
    namespace,
    to_numpy,
)
from .attend import attend, check, score_scale
from .dilated import dilated_attention
from .dilated_continue import continued
from .dilated_patterns import Pattern, check_patterns, decode_slot
from .mask import Mask
from .merge import merge


class DilatedCache(NamedTuple):
    """One layer's keys and values that later tokens may see, and how many tokens each sequence has had.

    Of fixed shapes, so that every step is one program under ``jax.jit`` and ``torch.compile``. A head's slots are at
    most :func:`~heddle.attention.dilated.cache_length` over all patterns.
    """

    keys: tuple[Float[Array, "batch rings slots dim"], ...]  #: by pattern
    values: tuple[Float[Array, "batch rings slots value_dim"], ...]
    lengths: Int[Array, " batch"]


def empty_cache(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
) -> DilatedCache:
    """A cache before the first token, for arrays like these: of any length, their values don't matter.

    Raises:
        ValueError: arguments that disagree, as of :func:`~heddle.attention.dilated.dilated_attention`.
    """
    patterns = check_patterns(segment_lengths, dilation_rates)
    check(query, key, value, None)
    xp, batch = namespace(key), key.shape[0]
    device = {"device": key.device} if framework(key) == "torch" else {}

    def zeros(x: Array) -> tuple[Array, ...]:
        rings = (_rings(pattern, query.shape[2], key.shape[2]) for pattern in patterns)
        return tuple(xp.zeros((batch, r.count, r.slots, x.shape[3]), dtype=x.dtype, **device) for r in rings)

    return DilatedCache(zeros(key), zeros(value), arange(batch, key) * 0)


def dilated_prefill(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    lengths: Int[Array, " batch"] | None = None,
    cache: DilatedCache | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch seq heads value_dim"], DilatedCache]:
    """Causal dilated attention of prompts, whole or by parts, and the cache to go on from.

    Args:
        query, key, value, segment_lengths, dilation_rates, scale, implementation: as of
            :func:`~heddle.attention.dilated.dilated_attention`.
        lengths: how many of its row's tokens each prompt has; what follows is padding, whose output is 0. None: all.
        cache: what came before, for prompts that go on. It is left as it is. None: nothing.

    Returns:
        ``(batch, seq, heads, value_dim)`` in query's dtype, and a cache that holds ``lengths`` tokens more of each
        sequence.

    Raises:
        ValueError: arguments that disagree; lengths below 0 or beyond seq (where values can be read).
        NotImplementedError: the named implementation doesn't serve this case.
    """
    lists = segment_lengths, dilation_rates
    (out, _), cache = _prefill(query, key, value, lists, lengths, cache, scale, implementation)
    return out, cache


def dilated_cached(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    cache: DilatedCache,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    lengths: Int[Array, " batch"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[tuple[Float[Array, "batch seq heads value_dim"], Float[Array, "batch seq heads"]], DilatedCache]:
    """:func:`dilated_decode` of one token a sequence, or :func:`dilated_prefill` of several, with the lse as well.

    Arguments as of these; of padding out is 0 and lse -inf.
    """
    lists = segment_lengths, dilation_rates
    if query.shape[1] > 1:
        return _prefill(query, key, value, lists, lengths, cache, scale, implementation)
    (out, lse), after = _decode(query, key, value, cache, lists, scale, implementation)
    if lengths is not None:  # padding was written where the next token will be: nobody sees it before
        xp, new = namespace(out), _check_lengths(lengths, query)
        out = xp.where((new > 0)[:, None, None, None], out, 0.0)
        lse = xp.where((new > 0)[:, None, None], lse, -float("inf"))
        after = after._replace(lengths=cache.lengths + xp.astype(new, xp.int32))
    return (out, lse), after


def _prefill(
    query: Array, key: Array, value: Array, lists: tuple[Sequence[int], Sequence[int]], lengths: Array | None,
    cache: DilatedCache | None, scale: float | None, implementation: str | None,
) -> tuple[tuple[Array, Array], DilatedCache]:  # fmt: skip
    xp, (batch, seq, heads, _), kv_heads = namespace(query), query.shape, key.shape[2]
    patterns = check_patterns(*lists)
    new: Array = arange(batch, query) * 0 + seq
    if lengths is not None:
        new = xp.astype(_check_lengths(lengths, query), xp.int32)
    real = arange(seq, query) < new[:, None]
    if cache is None:
        out, lse = dilated_attention(
            query, key, value, *lists, is_causal=True, scale=scale, implementation=implementation, return_lse=True
        )
        cache = empty_cache(query, key, value, *lists)
        if lengths is not None:
            out = xp.where(real[:, :, None, None], out, 0.0)
            lse = xp.where(real[:, :, None], lse, -float("inf"))
    else:
        check(query, key, value, None)
        if query.shape[1] != key.shape[1]:
            raise ValueError(f"query and key must have one length, got {seq} and {key.shape[1]}")
        _check_cache(query, key, value, cache, patterns)
        positions = xp.where(real, cache.lengths[:, None] + arange(seq, query), -1)
        source = partial(_rings_and_new, cache, patterns, heads, key, value)
        out, lse = continued(query, patterns, positions, source, score_scale(query, scale), implementation)
    held = cache.lengths + new
    keys, values = [], []
    for pattern, *old in zip(patterns, cache.keys, cache.values, strict=True):
        rings = _rings(pattern, heads, kv_heads)
        ring, slot = arange(rings.count, query)[:, None], arange(rings.slots, query)
        within = slot * pattern.rate + ring % pattern.rate
        position = (held // pattern.length * pattern.length)[:, None, None] + within
        here = ((within < pattern.length) & (position < held[:, None, None]))[..., None]
        place = position - cache.lengths[:, None, None]
        is_new = (place >= 0)[..., None]
        at = arange(batch, query)[:, None, None], clip(place, 0, seq - 1), ring // rings.per_key_head
        for kept, x, before in zip((keys, values), (key, value), old, strict=True):
            kept.append(xp.where(here, xp.where(is_new, xp.astype(x[at], before.dtype, copy=False), before), 0.0))
    return (out, lse), DilatedCache(tuple(keys), tuple(values), held)


def _rings_and_new(
    cache: DilatedCache, patterns: Sequence[Pattern], heads: int, key: Array, value: Array, number: int
) -> tuple[Array, Array, Callable[[Array], Array], Array]:
    """A pattern's rings and the new keys behind them: a source of keys for
    :func:`~heddle.attention.dilated_continue.continued`."""
    pattern = patterns[number]
    rings, group, before = _rings(pattern, heads, key.shape[2]), heads // key.shape[2], cache.lengths[:, None, None]
    head, of_ring = arange(heads, key), arange(rings.count, key) // rings.per_key_head

    def behind(held: Array, x: Array) -> Array:  # (batch, slots + new, rings, dim)
        xp = namespace(x)
        held = xp.astype(xp.permute_dims(held, (0, 2, 1, 3)), x.dtype, copy=False)
        return xp.concat([held, x[:, :, of_ring]], axis=1)

    def place(at: Array) -> Array:
        slot = at % pattern.length // pattern.rate
        return namespace(at).where(at < before, slot, rings.slots + at - before)

    ring = head // group * rings.per_key_head + head % group % rings.per_key_head
    return behind(cache.keys[number], key), behind(cache.values[number], value), place, ring


def dilated_decode(
    query: Float[Array, "batch 1 heads dim"],
    key: Float[Array, "batch 1 kv_heads dim"],
    value: Float[Array, "batch 1 kv_heads value_dim"],
    cache: DilatedCache,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch 1 heads value_dim"], DilatedCache]:
    """Causal dilated attention of each sequence's next token, and the cache with it.

    Time goes by ``sum(w / r ** 2)`` a head, as of the whole sequence: of a pattern's rings one in ``r`` is read.

    Args:
        query, key, value: of that token.
        cache: what the tokens before left. It is used up: NumPy arrays and torch tensors are written to, JAX's may be
            donated. For inference, under ``torch.no_grad``.
        segment_lengths, dilation_rates, scale, implementation: as those that the cache was made with.

    Returns:
        ``(batch, 1, heads, value_dim)`` in query's dtype, and the cache of one more token a sequence. A head of which
        no pattern keeps the token gives 0.

    Raises:
        ValueError: arguments that disagree.
        NotImplementedError: the named implementation doesn't serve this case.
    """
    (out, _), cache = _decode(query, key, value, cache, (segment_lengths, dilation_rates), scale, implementation)
    return out, cache


def _decode(
    query: Array, key: Array, value: Array, cache: DilatedCache, lists: tuple[Sequence[int], Sequence[int]],
    scale: float | None, implementation: str | None,
) -> tuple[tuple[Array, Array], DilatedCache]:  # fmt: skip
    patterns = check_patterns(*lists)
    check(query, key, value, None)
    scale = score_scale(query, scale)
    if query.shape[1] != 1 or key.shape[1] != 1:
        raise ValueError(f"query and key must hold one token, got {query.shape[1]} and {key.shape[1]}")
    _check_cache(query, key, value, cache, patterns)
    xp, (batch, _, heads, _), kv_heads = namespace(query), query.shape, key.shape[2]
    wide, rows = accumulator_dtype(query), arange(batch, query)[:, None]
    keys, values, parts = [], [], []
    for pattern, *old in zip(patterns, cache.keys, cache.values, strict=True):
        rings = _rings(pattern, heads, kv_heads)
        kept, slot = decode_slot(cache.lengths, pattern, rings.count)
        # The rings that keep the token, as many for any: if one lies beyond the last, it is the last, unchanged.
        ring = (cache.lengths % pattern.length % pattern.rate)[:, None]
        ring = ring + pattern.rate * arange(-(-rings.count // pattern.rate), query)
        real, ring = ring < rings.count, clip(ring, None, rings.count - 1)
        seen = []
        for held, x, new in zip((keys, values), (key, value), old, strict=True):
            of_ring = xp.astype(x[:, 0][rows, ring // rings.per_key_head], new.dtype, copy=False)
            of_ring = xp.where(real[..., None], of_ring, new[rows, ring, slot[:, None]])
            if framework(new) == "jax":
                new = new.at[rows, ring, slot[:, None]].set(of_ring)
            else:
                new[rows, ring, slot[:, None]] = of_ring
            held.append(new)
            some = new if pattern.rate == 1 else new[rows, ring]
            seen.append(xp.astype(xp.reshape(some, (-1, rings.slots, 1, some.shape[3])), x.dtype, copy=False))
        asked = rings.by_ring(query)[rows, ring]
        stop = xp.reshape(xp.where(real, slot[:, None] + 1, 0), (-1, 1))
        part = attend(
            xp.reshape(asked, (-1, 1, *asked.shape[2:])), seen[0], seen[1], Mask(0 * stop, stop),
            scale=scale, implementation=implementation, return_lse=True,
        )  # fmt: skip
        spread = arange(rings.count, query) // pattern.rate
        out, lse = (xp.reshape(x, (batch, -1, *x.shape[2:]))[:, spread] for x in part)
        out = xp.where(kept[..., None, None], xp.astype(out, wide), 0.0)
        lse = xp.where(kept[..., None], lse, -float("inf"))
        parts.append((rings.by_head(out), rings.by_head(lse)))
    out, lse = merge(parts)
    return (xp.astype(out, query.dtype), lse), DilatedCache(tuple(keys), tuple(values), cache.lengths + 1)


class _Rings(NamedTuple):
    """A pattern's rings: ``per_key_head`` to each key head, ring ``i`` at offset ``i mod r``."""

    count: int
    slots: int
    per_key_head: int

    def by_ring(self, x: Array) -> Array:
        """``(batch, 1, heads, ...)`` as ``(batch, rings, heads of a ring, ...)``."""
        xp, (batch, _, heads, *rest) = namespace(x), x.shape
        key_heads = self.count // self.per_key_head
        x = xp.reshape(x, (batch, key_heads, heads // self.count, self.per_key_head, *rest))
        x = xp.permute_dims(x, (0, 1, 3, 2, *range(4, x.ndim)))
        return xp.reshape(x, (batch, self.count, -1, *rest))

    def by_head(self, x: Array) -> Array:
        """And back."""
        xp, (batch, _, share, *rest) = namespace(x), x.shape
        key_heads = self.count // self.per_key_head
        x = xp.reshape(x, (batch, key_heads, self.per_key_head, share, *rest))
        x = xp.permute_dims(x, (0, 1, 3, 2, *range(4, x.ndim)))
        return xp.reshape(x, (batch, 1, self.count * share, *rest))


def _rings(pattern: Pattern, heads: int, kv_heads: int) -> _Rings:
    group, (length, rate) = heads // kv_heads, pattern
    per_key_head = rate if group % rate == 0 else group  # heads at one offset share a ring if they all can
    return _Rings(kv_heads * per_key_head, -(-length // rate), per_key_head)


def _check_lengths(lengths: Array, query: Array) -> Array:
    xp, (batch, seq) = namespace(lengths), query.shape[:2]
    if lengths.shape != (batch,) or not xp.isdtype(lengths.dtype, "integral"):
        raise ValueError(
            f"lengths must be integers of shape ({batch},), got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    if is_concrete(lengths):
        wrong = [int(n) for n in to_numpy(lengths) if not 0 <= n <= seq]
        if wrong:
            raise ValueError(f"lengths must be between 0 and query's {seq} tokens, got {wrong[0]}")
    return asarray_like(lengths, query)


def _check_cache(query: Array, key: Array, value: Array, cache: DilatedCache, patterns: Sequence[Pattern]) -> None:
    for name, arrays, x in (("keys", cache.keys, key), ("values", cache.values, value)):
        rings = [_rings(pattern, query.shape[2], key.shape[2]) for pattern in patterns]
        want = [(x.shape[0], r.count, r.slots, x.shape[3]) for r in rings]
        got = [tuple(array.shape) for array in arrays]
        floating = namespace(x).isdtype
        if got != want or any(framework(a) != framework(x) or not floating(a.dtype, "real floating") for a in arrays):
            raise ValueError(
                f"cache must hold {name} of shapes {want}, floating point ({framework(x)}), "
                f"got {got} of {', '.join(sorted({f'{a.dtype} ({framework(a)})' for a in arrays}))}"
            )
