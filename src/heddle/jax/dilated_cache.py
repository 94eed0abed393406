"""The cache of dilated attention: rings whose size doesn't grow with the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from heddle.attention.arrays import Array, to_numpy
from heddle.attention.dilated_cache import DilatedCache, dilated_cached, empty_cache
from heddle.attention.dilated_patterns import Pattern, check_patterns

from .cache import DTYPES, Cache, check_sizes

_STATIC: dict[str, Any] = {"metadata": {"static": True}}


class _Step(NamedTuple):
    held: Int[Array, " rows"]  #: tokens of each row before
    new: Int[Array, " rows"]  #: and now
    order: tuple[Array, Array] | None  #: with more than one replica, what puts a row's tokens first, and back


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DilatedKVCache(Cache):
    """Of every layer, for each pattern a ring of keys and values: :mod:`heddle.attention.dilated_cache`'s.

    A pattern keeps ``ceil(w / r)`` keys a head, or fewer where ``max_len`` is less than ``w``; heads that share a key
    head and an offset share a ring.

    Args:
        lengths, starts, max_len, layers: as of :class:`~heddle.jax.cache.Cache`.
        keys: of each layer and pattern ``(rows, rings, slots, head_dim)``, rotated.
        values: as keys.
        patterns: w and r of each.
    """

    keys: tuple[tuple[Float[Array, "rows _ _ dim"], ...], ...]
    values: tuple[tuple[Float[Array, "rows _ _ dim"], ...], ...]
    patterns: tuple[Pattern, ...] = field(**_STATIC)

    @classmethod
    def empty(
        cls,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        batch: int,
        max_len: int,
        dtype: Any = jnp.float32,
        replicas: int = 1,
    ) -> DilatedKVCache:
        """Room for ``batch`` sequences of up to ``max_len`` tokens, of a model of these sizes.

        Raises:
            ValueError: a size below 1, patterns as of :func:`heddle.attention.dilated.dilated_attention`, a dtype that
                isn't float32, bfloat16 or float16.
        """
        check_sizes(batch, max_len)
        patterns, dtype, rows = check_patterns(segment_lengths, dilation_rates), jnp.dtype(dtype), replicas * batch
        if dtype.name not in DTYPES:
            raise ValueError(f"dtype of a cache for dilated attention must be one of {', '.join(DTYPES)}, got {dtype}")
        query, key = (jax.ShapeDtypeStruct((rows, 1, n, head_dim), dtype) for n in (heads, kv_heads))
        shapes = jax.eval_shape(lambda q, k: empty_cache(q, k, k, *_lists(patterns, max_len)).keys, query, key)
        # One buffer each: they are donated, and a buffer can be donated once.
        keys, values = (
            tuple(tuple(jnp.zeros(ring.shape, dtype) for ring in shapes) for _ in range(layers)) for _ in range(2)
        )
        return cls(
            keys=keys, values=values, patterns=patterns, max_len=max_len, layers=layers,
            lengths=jnp.zeros(batch, jnp.int32), starts=jnp.zeros(rows, jnp.int32) if replicas > 1 else None,
        )  # fmt: skip

    def step(self, real: Bool[Array, "batch seq"]) -> _Step:
        """See :meth:`~heddle.jax.cache.Cache.step`."""
        place = self.places(real)
        here = (place >= 0) & (place < self.max_len)
        order = None
        if self.starts is not None and real.shape[1] > 1:  # where replicas begin later, padding comes first
            first = jnp.argsort(~here, axis=1, stable=True)
            order = first, jnp.argsort(first, axis=1)
        return _Step(self.held, here.sum(axis=1, dtype=jnp.int32), order)

    def attend(
        self,
        layer: int,
        query: Float[Array, "rows seq heads dim"],
        key: Float[Array, "rows seq kv_heads dim"],
        value: Float[Array, "rows seq kv_heads dim"],
        step: _Step,
    ) -> tuple[tuple[Float[Array, "rows seq heads dim"], Float[Array, "rows seq heads"]], DilatedKVCache]:
        """See :meth:`~heddle.jax.cache.Cache.attend`."""
        held, now = DilatedCache(self.keys[layer], self.values[layer], step.held), (query, key, value)
        if step.order is not None:
            now = [_rows(x, step.order[0]) for x in now]
        # As it will be seen later, so that it doesn't matter how a prompt is cut.
        query, key, value = (now[0], *(x.astype(held.keys[0].dtype).astype(x.dtype) for x in now[1:]))
        found, after = dilated_cached(query, key, value, held, *_lists(self.patterns, self.max_len), lengths=step.new)
        if step.order is not None:
            found = tuple(_rows(x, step.order[1]) for x in found)
        keys, values = (
            (*old[:layer], new, *old[layer + 1 :])
            for old, new in ((self.keys, after.keys), (self.values, after.values))
        )
        return found, replace(self, keys=keys, values=values)

    def grow(self, max_len: int) -> DilatedKVCache:
        """See :meth:`~heddle.jax.cache.Cache.grow`."""
        if max_len < self.max_len:
            raise ValueError(f"max_len must be at least the cache's {self.max_len}, got {max_len}")
        return _grown(self, max_len)

    def truncate(self, lengths: Int[np.ndarray, " batch"]) -> DilatedKVCache | None:
        """See :meth:`~heddle.jax.cache.Cache.truncate`. Of each pattern only the last segment is there."""
        held, fewer = to_numpy(self.held), np.tile(to_numpy(self.lengths) - lengths, self.replicas)
        kept = np.maximum(held - fewer, 0)
        if any(((kept % w > 0) & (kept // w != held // w)).any() for w, _ in self.patterns):
            return None
        return replace(self, lengths=jnp.asarray(lengths, jnp.int32))


def _lists(patterns: Sequence[Pattern], max_len: int) -> tuple[list[int], list[int]]:
    """Segments longer than any sequence are cut, but so that a full cache hasn't come to their end: it may grow."""
    return [min(pattern.length, max_len + 1) for pattern in patterns], [pattern.rate for pattern in patterns]


def _rows(x: Array, order: Int[Array, "rows seq"]) -> Array:
    return x[jnp.arange(order.shape[0])[:, None], order]


@partial(jax.jit, static_argnums=1)
def _grown(cache: DilatedKVCache, max_len: int) -> DilatedKVCache:
    # A segment that was cut short at the cache's end hasn't come to that end yet.
    def padded(layers):
        return tuple(
            tuple(
                jnp.pad(x, [(0, 0), (0, 0), (0, -(-min(w, max_len + 1) // r) - x.shape[2]), (0, 0)])
                for x, (w, r) in zip(rings, cache.patterns, strict=True)
            )
            for rings in layers
        )

    return replace(cache, max_len=max_len, keys=padded(cache.keys), values=padded(cache.values))
