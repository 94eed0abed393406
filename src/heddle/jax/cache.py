"""What a model remembers of the tokens before: what every cache can do, and the cache of plain attention."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from heddle.attention.arrays import Array, is_concrete, to_numpy
from heddle.attention.attend import attend
from heddle.attention.mask import Mask
from heddle.attention.replicas import replicate, stack_replicas

from .model_config import ModelConfig

DTYPES = ("float32", "bfloat16", "float16")
BLOCK = 64  #: slots of a block of keys
NOWHERE = 2**30  #: a slot that no cache has: what is written there isn't
_STATIC: dict[str, Any] = {"metadata": {"static": True}}


@dataclass(frozen=True, kw_only=True)
class Cache(ABC):
    """What a model asks of a cache, whichever way it keeps keys and values. A pytree whose arrays keep their shapes.

    A forward calls :meth:`step` once, then :meth:`attend` in each layer, then :meth:`advance` once, so that every layer
    writes at the same place. Whoever makes another kind writes ``step`` and ``attend``, and registers a dataclass of
    arrays. Each method returns the cache that comes after; its buffers may be donated.

    Rows are sequences or, with more than one replica, all sequences' replicas, replica-major. A row counts its own
    tokens from its own start.

    Args:
        lengths: tokens of each sequence, ``(batch,)``.
        starts: with more than one replica, ``(rows,)``: how many of them came before the row's first, so that replicas
            whose prompts are shorter than another's begin later.
        max_len: tokens of a sequence that there is room for.
        layers: of the model.
    """

    rows_axis: ClassVar[str | None] = "batch"  #: what rows are in :data:`heddle.jax.parallel.AXES`

    lengths: Int[Array, " batch"]
    starts: Int[Array, " rows"] | None = None
    max_len: int = field(**_STATIC)
    layers: int = field(**_STATIC)

    @abstractmethod
    def step(self, real: Bool[Array, "batch seq"]) -> Any:
        """What all layers of a forward over these tokens share: where they go, what they see. ``real``: no padding."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        query: Float[Array, "rows seq heads dim"],
        key: Float[Array, "rows seq kv_heads dim"],
        value: Float[Array, "rows seq kv_heads dim"],
        step: Any,
    ) -> tuple[tuple[Float[Array, "rows seq heads dim"], Float[Array, "rows seq heads"]], Cache]:
        """``(out, lse)`` of these tokens over those before and themselves, and the cache with them in this layer."""

    @abstractmethod
    def grow(self, max_len: int) -> Cache:
        """The cache with room for more tokens."""

    @abstractmethod
    def truncate(self, lengths: Int[np.ndarray, " batch"]) -> Cache | None:
        """The cache with the first so many tokens of each sequence; None if it has lost what those after them see."""

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def replicas(self) -> int:
        return 1 if self.starts is None else self.starts.shape[0] // self.batch

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; also of a cache of shapes alone, as ``jax.eval_shape`` makes it."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def keeps_all(self) -> bool:
        """Whether every token that was ever written is still there, so that the last ones can be taken back."""
        return False

    def positions(self, seq: int) -> Int[Array, "batch seq"]:
        """Where the next ``seq`` tokens of each sequence stand."""
        return self.lengths[:, None] + jnp.arange(seq, dtype=jnp.int32)

    @property
    def held(self) -> Int[Array, " rows"]:
        """How many tokens each row holds."""
        if self.starts is None:
            return self.lengths
        return jnp.maximum(replicate(self.lengths, self.replicas) - self.starts, 0)

    def places(self, real: Bool[Array, "batch seq"]) -> Int[Array, "rows seq"]:
        """Each next token's place among its row's own; -1 for padding and before the row's start."""
        place = self.positions(real.shape[1])
        if self.starts is not None:
            place = jnp.maximum(replicate(place, self.replicas) - self.starts[:, None], -1)
            real = replicate(real, self.replicas)
        return jnp.where(real, place, -1)

    def check(self, tokens: Int[Array, " batch"] | int) -> None:
        """Refuse to write so many more tokens of each sequence than there is room for.

        Raises:
            ValueError: naming the first sequence that would pass ``max_len``. Under jit, where lengths can't be read,
                it says nothing; there, what is past the end isn't written.
        """
        if not is_concrete(self.lengths) or not (isinstance(tokens, int) or is_concrete(tokens)):
            return
        after = to_numpy(self.lengths) + (tokens if isinstance(tokens, int) else to_numpy(tokens))
        if (after > self.max_len).any():
            row = int((after > self.max_len).argmax())
            raise ValueError(
                f"cache must have room for {int(after[row])} tokens of sequence {row}, got max_len {self.max_len}"
            )

    def advance(self, tokens: Int[Array, " batch"]) -> Cache:
        """The cache with each sequence longer by ``tokens``; or, of one that :attr:`keeps_all`, shorter."""
        return replace(self, lengths=self.lengths + tokens)

    def sequences(self, begin: Int[Array, ""] | int, count: int) -> Cache:
        """The cache of ``count`` sequences from ``begin`` on."""

        def cut(x: Array) -> Array:
            x = x.reshape(-1, self.batch, *x.shape[1:])
            return jax.lax.dynamic_slice_in_dim(x, begin, count, axis=1).reshape(-1, *x.shape[2:])

        return jax.tree.map(cut, self)

    def with_sequences(self, part: Cache, begin: Int[Array, ""] | int) -> Cache:
        """The cache with those sequences from ``begin`` on replaced."""

        def put(x: Array, part: Array) -> Array:
            whole, part = (y.reshape(-1, batch, *y.shape[1:]) for y, batch in ((x, self.batch), (part, count)))
            return jax.lax.dynamic_update_slice_in_dim(whole, part, begin, axis=1).reshape(x.shape)

        count = part.batch
        return jax.tree.map(put, self, part)

    def begin(self, later: Int[Array, "batch replicas"]) -> Cache:
        """The cache whose replicas begin so many tokens later than now, if they haven't begun."""
        if self.starts is None:
            raise ValueError("later must be of a cache with more than one replica, got one with one")
        lengths = replicate(self.lengths, self.replicas)
        starts = jnp.where(self.starts == lengths, lengths + stack_replicas(later), self.starts)
        return replace(self, starts=starts)

    def begun(self) -> np.ndarray:
        """Whether each replica of each sequence ``(batch, replicas)`` holds a token; under jit, False."""
        if self.starts is None or not is_concrete(self.starts) or not is_concrete(self.lengths):
            return np.zeros((self.batch, self.replicas), bool)
        return to_numpy(self.lengths)[:, None] > to_numpy(self.starts).reshape(self.replicas, self.batch).T


def check_sizes(batch: int, max_len: int) -> None:
    for name, value in (("batch", batch), ("max_len", max_len)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


class _Step(NamedTuple):
    """Of the layers of one window: where tokens go, and what they see there."""

    slots: Int[Array, "rows seq"]  #: one past the last writes nothing
    mask: Mask  #: over the slots; with ``order``, over the slots in that order and then the new tokens
    order: Int[Array, "rows slots"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache(Cache):
    """Keys and values of every layer, one after another. Learned prefixes stay in their layers.

    A layer that sees ``window`` keys only keeps a ring of so many. A tuple over layers rather than one array: XLA's CPU
    back end would copy a layer out of the array for each product.

    Args:
        lengths, starts, max_len, layers: as of :class:`Cache`.
        keys: of each layer ``(rows, kv_heads, blocks, head_dim, BLOCK)``, rotated: slot ``s`` is column ``s % BLOCK``
            of block ``s // BLOCK``, as :mod:`heddle.jax.xla` reads the keys of few queries fastest.
        values: of each layer ``(rows, kv_heads, slots, head_dim)``; slots are ``max_len``, or the window's, in whole
            blocks.
        key_scales, value_scales: where those are int8, ``(rows, kv_heads, slots)`` of each layer: what they are times,
            for each token and head its largest magnitude / 127.
        windows: of each layer; None: it sees all.
    """

    keys: tuple[Num[Array, "rows kv_heads _ dim _"], ...]
    values: tuple[Num[Array, "rows kv_heads _ dim"], ...]
    key_scales: tuple[Float[Array, "rows kv_heads _"], ...] | None = None
    value_scales: tuple[Float[Array, "rows kv_heads _"], ...] | None = None
    windows: tuple[int | None, ...] = field(**_STATIC)

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, max_len: int, dtype: Any = jnp.float32) -> KVCache:
        """Room for ``batch`` sequences of up to ``max_len`` tokens.

        Args:
            dtype: what keys and values are kept in: float32, bfloat16, float16 or int8, a quarter of float32's memory
                (and 4 bytes a token and head), from which keys and values come back within 0.4% of the head's largest.

        Raises:
            ValueError: a size below 1, another dtype.
        """
        check_sizes(batch, max_len)
        if config.attention is not None:
            raise ValueError("config must be of plain attention, got a dilated one: model.empty_cache makes its cache")
        dtype = cache_dtype("dtype", dtype)
        rows, windows = config.parscale_n * batch, config.windows
        blocks = [_blocks(_slots(window, max_len)) for window in windows]
        heads = rows, config.kv_heads
        # One buffer each: they are donated, and a buffer can be donated once.
        keys = tuple(jnp.zeros((*heads, n, config.dim, BLOCK), dtype) for n in blocks)
        values = tuple(jnp.zeros((*heads, n * BLOCK, config.dim), dtype) for n in blocks)
        scales: list[Any] = [None, None]
        if dtype == jnp.int8:
            scales = [tuple(jnp.zeros((*heads, n * BLOCK), jnp.float32) for n in blocks) for _ in range(2)]
        return cls(
            keys=keys, values=values, key_scales=scales[0], value_scales=scales[1], windows=windows, max_len=max_len,
            layers=len(windows), lengths=jnp.zeros(batch, jnp.int32),
            starts=jnp.zeros(rows, jnp.int32) if rows > batch else None,
        )  # fmt: skip

    @property
    def keeps_all(self) -> bool:
        """See :attr:`Cache.keeps_all`."""
        return all(_slots(window, self.max_len) == self.max_len for window in self.windows)

    def step(self, real: Bool[Array, "batch seq"]) -> tuple[_Step, ...]:
        """See :meth:`Cache.step`."""
        place = self.places(real)
        steps = {window: self._step(window, place) for window in set(self.windows)}
        return tuple(steps[window] for window in self.windows)

    def _step(self, window: int | None, place: Int[Array, "rows seq"]) -> _Step:
        slots, seq, real = _slots(window, self.max_len), place.shape[1], place >= 0
        if slots == self.max_len:
            start = 0 * place if window is None else jnp.maximum(place + 1 - window, 0)
            return _Step(
                jnp.where(real & (place < slots), place, NOWHERE), Mask(start, jnp.minimum(place + 1, slots)), None
            )
        if seq == 1:  # of a ring that holds the new token all that is written is seen, in whatever order
            stop = jnp.minimum(place + 1, slots)
            return _Step(jnp.where(real, place % slots, NOWHERE), Mask(0 * stop, stop), None)
        held, index = self.held[:, None], jnp.arange(seq, dtype=jnp.int32)
        after = jnp.maximum(held, jnp.max(place, axis=1, keepdims=True) + 1)
        last = real & (place >= after - slots)
        first = jnp.argmax(real, axis=1)[:, None].astype(jnp.int32)  # above 0 of rows that begin here alone
        start = jnp.maximum(jnp.maximum(index + 1, slots - held + first), 0)
        mask = Mask(jnp.where(real, start, 0), jnp.where(real, slots + index + 1, 0))
        order = (held + jnp.arange(slots, dtype=jnp.int32)) % slots  # from the oldest on
        return _Step(jnp.where(last, place % slots, NOWHERE), mask, order)

    def attend(
        self,
        layer: int,
        query: Float[Array, "rows seq heads dim"],
        key: Float[Array, "rows seq kv_heads dim"],
        value: Float[Array, "rows seq kv_heads dim"],
        step: tuple[_Step, ...],
    ) -> tuple[tuple[Float[Array, "rows seq heads dim"], Float[Array, "rows seq heads"]], KVCache]:
        """See :meth:`Cache.attend`."""
        slots, mask, order = step[layer]
        key, value = (quantised(x, self.keys[layer].dtype) for x in (key, value))
        cache = self._written(layer, key, value, slots)
        if order is None:
            keys, values = cache._read(layer)
        else:  # the new tokens may push out of the ring what the first of them see
            place = jnp.arange(order.shape[0])[:, None], slice(None), order  # (rows, slots, kv_heads, ...)
            old = [tuple(None if x is None else x[place] for x in pair) for pair in self._of(layer)]
            keys, values = (
                tuple(None if x is None else jnp.concatenate([x, y], axis=1) for x, y in zip(*both, strict=True))
                for both in zip(old, (key, value), strict=True)
            )
        keys, values = (dequantised(*pair, query.dtype) for pair in (keys, values))
        return attend(query, keys, values, mask, return_lse=True), cache

    def _of(self, layer: int):
        """The layer's keys and values ``(rows, kv_heads, slots, head_dim)``, each with its scales or None."""
        scales = (None, None) if self.key_scales is None else (self.key_scales[layer], self.value_scales[layer])  # type: ignore[index]
        keys = self.keys[layer].swapaxes(3, 4)
        return (keys.reshape(*keys.shape[:2], -1, keys.shape[4]), scales[0]), (self.values[layer], scales[1])

    def _read(self, layer: int):
        return [tuple(None if x is None else x.swapaxes(1, 2) for x in pair) for pair in self._of(layer)]

    def _written(self, layer: int, key: tuple, value: tuple, slots: Int[Array, "rows seq"]) -> KVCache:
        rows = jnp.arange(slots.shape[0])[:, None]
        by_slot = rows, slice(None), slots
        by_block = rows, slice(None), slots // BLOCK, slice(None), slots % BLOCK

        def put(buffers, new, where):
            if buffers is None:
                return None
            return (*buffers[:layer], buffers[layer].at[where].set(new, mode="drop"), *buffers[layer + 1 :])

        (keys, key_scales), (values, value_scales) = key, value
        return replace(
            self, keys=put(self.keys, keys, by_block), values=put(self.values, values, by_slot),
            key_scales=put(self.key_scales, key_scales, by_slot),
            value_scales=put(self.value_scales, value_scales, by_slot),
        )  # fmt: skip

    def grow(self, max_len: int) -> KVCache:
        """See :meth:`Cache.grow`."""
        if max_len < self.max_len:
            raise ValueError(f"max_len must be at least the cache's {self.max_len}, got {max_len}")
        return _grown(self, max_len)

    def truncate(self, lengths: Int[np.ndarray, " batch"]) -> KVCache | None:
        """See :meth:`Cache.truncate`. A ring that is full has lost all but what the next token sees."""
        held = to_numpy(self.held)
        fewer = np.tile(to_numpy(self.lengths) - lengths, self.replicas)
        rings = {_slots(window, self.max_len) for window in self.windows} - {self.max_len}
        if any(((held > slots) & (fewer > 1)).any() for slots in rings):
            return None
        return replace(self, lengths=jnp.asarray(lengths, jnp.int32))


def cache_dtype(name: str, dtype: Any) -> jnp.dtype:
    """What a cache may keep keys and values in.

    Raises:
        ValueError: another dtype, called ``name``.
    """
    for allowed in (*DTYPES, "int8"):
        if dtype == allowed or dtype == jnp.dtype(allowed):
            return jnp.dtype(allowed)
    raise ValueError(f"{name} must be one of {', '.join(DTYPES)} or int8, got {getattr(dtype, '__name__', dtype)}")


def _slots(window: int | None, max_len: int) -> int:
    return max_len if window is None else min(window, max_len)


def _blocks(slots: int) -> int:
    return -(-slots // BLOCK)


def quantised(x: Float[Array, "*shape dim"], dtype: Any) -> tuple[Array, Array | None]:
    """As it is kept: of int8, with the scales, for each vector its largest magnitude / 127."""
    if dtype != jnp.int8:
        return x.astype(dtype), None
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    return jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8), scale


def dequantised(x: Num[Array, "*shape dim"], scale: Float[Array, "*shape"] | None, dtype: Any) -> Array:
    return x.astype(dtype) if scale is None else (x.astype(jnp.float32) * scale[..., None]).astype(dtype)


@partial(jax.jit, static_argnums=1)
def _grown(cache: KVCache, max_len: int) -> KVCache:
    # A ring that is as long as the cache was has not gone round yet.
    more = [_blocks(_slots(window, max_len)) - _blocks(_slots(window, cache.max_len)) for window in cache.windows]

    def padded(buffers, slots):
        if buffers is None:
            return None
        return tuple(
            jnp.pad(x, [(0, 0), (0, 0), (0, slots * n), *[(0, 0)] * (x.ndim - 3)])
            for x, n in zip(buffers, more, strict=True)
        )

    names = {"keys": 1, "values": BLOCK, "key_scales": BLOCK, "value_scales": BLOCK}
    return replace(cache, max_len=max_len, **{name: padded(getattr(cache, name), n) for name, n in names.items()})
