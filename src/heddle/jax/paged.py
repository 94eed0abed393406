"""The paged cache: one pool of blocks for all sequences of a batch (arXiv 2309.06180), and the steps over it.

Which blocks are whose stands on the host (:mod:`heddle.jax.blocks`). A step is told where its tokens go and gathers
only the blocks that its sequences hold; the pool is donated, so that a step writes into it and never copies it. What a
step's shape depends on is rounded up to powers of two, for few compilations.

Prompts are read flat: the parts of several, one after another, are one row, whose keys are their blocks one after
another; each token sees one interval of them. Tokens of the answers are a row each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from heddle.attention import PADDING_SEGMENT_ID, attend
from heddle.attention.arrays import Array
from heddle.attention.mask import Mask
from heddle.attention.replicas import replicate

from .cache import Cache, cache_dtype, dequantised, quantised
from .model import Transformer
from .model_config import ModelConfig
from .sampling import Logprobs, Mixed, logprobs

LEAST_READ = 32  #: tokens that a step reads, at least
LEAST_SEEN = 256  #: tokens whose keys a step gathers for each row, at least
MOST_LOGPROBS = 20  #: that a step tells; more would be compiled for nearly nobody


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PagedCache(Cache):
    """A pool of keys and values, and where the tokens of one step stand in it.

    With more than one replica each has a pool of its own, one after another.

    Args:
        lengths, starts, max_len, layers: as of :class:`Cache`; zeros where ``places`` say where tokens stand.
        keys: of each layer ``(replicas * blocks, kv_heads, dim, size)``, rotated: a block's keys are columns, as
            :mod:`heddle.jax.xla` reads those of few queries fastest.
        values: of each layer ``(replicas * blocks, kv_heads, size, dim)``.
        key_scales, value_scales: where those are int8, ``(replicas * blocks, kv_heads, size)`` of each layer, as of
            :class:`~heddle.jax.cache.KVCache`.
        table: integers ``(batch, n)``: the blocks whose keys each row's queries see, in order.
        slots: integers ``(batch, seq)``: where in a pool each token is written, slot ``s`` in block ``s // size``.
        base: integers ``(batch, seq)``: where the token's sequence begins among the keys that the row gathers.
        place: integers ``(batch, seq)``: the token's place in its sequence; -1: padding, which is written nowhere.
        windows: of each layer; None: it sees all.
    """

    rows_axis = None  # of the pool: any sequence may hold any slot

    keys: tuple[Num[Array, "_ kv_heads dim size"], ...]
    values: tuple[Num[Array, "_ kv_heads size dim"], ...]
    key_scales: tuple[Float[Array, "_ kv_heads size"], ...] | None
    value_scales: tuple[Float[Array, "_ kv_heads size"], ...] | None
    table: Int[Array, "batch n"]
    slots: Int[Array, "batch seq"]
    base: Int[Array, "batch seq"]
    place: Int[Array, "batch seq"]
    windows: tuple[int | None, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, config: ModelConfig, pool: Pool, at: Where) -> PagedCache:
        """For one step of the model over ``pool``."""
        batch = at.table.shape[0]
        return cls(
            **pool._asdict(), **at._asdict(), windows=config.windows, layers=config.num_hidden_layers,
            max_len=at.table.shape[1] * pool.size, lengths=jnp.zeros(batch, jnp.int32),
            starts=jnp.zeros(config.parscale_n * batch, jnp.int32) if config.parscale_n > 1 else None,
        )  # fmt: skip

    @property
    def pool(self) -> Pool:
        return Pool(self.keys, self.values, self.key_scales, self.value_scales)

    def step(self, real: Bool[Array, "batch seq"]) -> _Step:
        """See :meth:`Cache.step`."""
        replicas, size = self.replicas, self.pool.size
        blocks = self.keys[0].shape[0] // replicas
        stop = jnp.where(real, self.base + self.place + 1, 0)
        masks = {}
        for window in set(self.windows):
            start = self.base if window is None else jnp.maximum(self.base, stop - window)
            masks[window] = Mask(*(_repeated(x, replicas) for x in (jnp.minimum(start, stop), stop)))
        each = jnp.where(real, self.slots + _offsets(replicas, blocks * size), replicas * blocks * size)
        table = self.table + _offsets(replicas, blocks)
        return _Step(each.reshape(-1, real.shape[1]), table.reshape(-1, self.table.shape[1]), masks)

    def attend(
        self,
        layer: int,
        query: Float[Array, "rows seq heads dim"],
        key: Float[Array, "rows seq kv_heads dim"],
        value: Float[Array, "rows seq kv_heads dim"],
        step: _Step,
    ) -> tuple[tuple[Float[Array, "rows seq heads dim"], Float[Array, "rows seq heads"]], PagedCache]:
        """See :meth:`Cache.attend`."""

        def put(pools, new, where):
            if pools is None:
                return None
            return (*pools[:layer], pools[layer].at[where].set(new, mode="drop"), *pools[layer + 1 :])

        def seen(pools, scales, size_axis):  # (rows, tokens, kv_heads, dim)
            found = jnp.moveaxis(gathered(pools[layer]), size_axis, 3)
            scale = None if scales is None else _joined(gathered(scales[layer]))
            return dequantised(_joined(found), scale, query.dtype).swapaxes(1, 2)

        def gathered(pool):  # (rows, kv_heads, blocks, ...): heads by themselves, over which the pool may be spread
            return jax.vmap(lambda of_head: of_head.at[step.table].get(mode="clip"), 1, 1)(pool)

        (key, key_scale), (value, value_scale) = (quantised(x, self.keys[layer].dtype) for x in (key, value))
        block, column = step.slots // self.pool.size, step.slots % self.pool.size
        by_slot, by_column = (block, slice(None), column), (block, slice(None), slice(None), column)
        cache = replace(
            self, keys=put(self.keys, key, by_column), values=put(self.values, value, by_slot),
            key_scales=put(self.key_scales, key_scale, by_slot),
            value_scales=put(self.value_scales, value_scale, by_slot),
        )  # fmt: skip
        keys, values = seen(cache.keys, cache.key_scales, 4), seen(cache.values, cache.value_scales, 3)
        return attend(query, keys, values, step.masks[self.windows[layer]], return_lse=True), cache

    def grow(self, max_len: int) -> PagedCache:
        """Not of this cache: its tables are made anew for every step."""
        raise NotImplementedError("a paged cache has the room that its table gives it")

    def truncate(self, lengths: Int[np.ndarray, " batch"]) -> PagedCache | None:
        """See :attr:`grow`."""
        raise NotImplementedError("a paged cache holds what its table gives it")


def _joined(x: Array) -> Array:
    """``(rows, kv_heads, blocks, size, ...)``, the blocks one after another."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


class Pool(NamedTuple):
    """Keys and values of all blocks, as :class:`PagedCache` has them."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    key_scales: tuple[Array, ...] | None = None
    value_scales: tuple[Array, ...] | None = None

    @classmethod
    def empty(cls, config: ModelConfig, blocks: int, size: int, dtype: Any) -> Pool:
        heads, layers = (config.parscale_n * blocks, config.kv_heads), range(config.num_hidden_layers)
        # One buffer each: they are donated, and a buffer can be donated once.
        made = [
            tuple(jnp.zeros((*heads, *shape), dtype) for _ in layers)
            for shape in ((config.dim, size), (size, config.dim))
        ]
        if dtype == jnp.int8:
            made += [tuple(jnp.zeros((*heads, size), jnp.float32) for _ in layers) for _ in range(2)]
        return cls(*made)

    @property
    def size(self) -> int:
        """Tokens in a block."""
        return self.values[0].shape[2]


class Where(NamedTuple):
    """Where a step's tokens stand, as :class:`PagedCache` has it."""

    table: Array
    slots: Array
    base: Array
    place: Array


class _Step(NamedTuple):
    """Of all rows, where tokens go and what they see."""

    slots: Int[Array, "rows seq"]
    table: Int[Array, "rows n"]
    masks: dict[int | None, Mask]


def _offsets(replicas: int, stride: int) -> Array:
    """What replicas add to an index ``(batch, ...)``: replica-major, before all axes."""
    return (jnp.arange(replicas, dtype=jnp.int32) * stride)[:, None, None]


def _repeated(x: Array, replicas: int) -> Array:
    return x if replicas == 1 else replicate(x, replicas)


class Device:
    """The pool and the model, and the steps over them.

    Args:
        model: to compute with.
        blocks: in the pool.
        size: tokens in a block.
        dtype: of the pool, as of :meth:`KVCache.empty`; None: the model's.
    """

    def __init__(self, model: Transformer, blocks: int, size: int, dtype: Any = None):
        self._leaves, self._structure = jax.tree.flatten(model)
        self._config, self._blocks, self._size = model.config, blocks, size
        kept = model.dtype if dtype is None else cache_dtype("cache_dtype", dtype)
        self._pool = model.layout().zeros(lambda: Pool.empty(model.config, blocks, size, kept))

    @property
    def nbytes(self) -> int:
        """Of the pool."""
        return sum(array.nbytes for array in jax.tree.leaves(self._pool))

    def read(self, parts: Sequence[tuple[Sequence[int], int, int, Sequence[int]]]) -> None:
        """Compute keys and values of ``tokens[begin:end]`` for each ``(tokens, begin, end, blocks)``."""
        wanted = [-(-end // self._size) for _, _, end, _ in parts]
        length = _bucket(sum(end - begin for _, begin, end, _ in parts), LEAST_READ)
        ids, at = self._nowhere(1, length, sum(wanted))
        token = block = 0
        for (tokens, begin, end, blocks), count in zip(parts, wanted, strict=True):
            row, place = np.s_[0, token : token + end - begin], np.arange(begin, end)
            ids[row], at.base[row], at.place[row] = tokens[begin:end], block * self._size, place
            at.slots[row] = np.asarray(blocks)[place // self._size] * self._size + place % self._size
            at.table[0, block : block + count] = blocks[:count]
            token, block = token + end - begin, block + count
        self._pool = _read(self._structure, self._leaves, self._pool, ids, at)

    def decode(
        self,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        copies: Sequence[tuple[int, int]],
        samplers: Mixed,
        seeds: Sequence[int],
        counts: Sequence[int],
        histories: Sequence[np.ndarray | None],
        with_logprobs: bool,
        temperatures: Sequence[float] | None = None,
    ) -> tuple[np.ndarray, Logprobs | None]:
        """The next token of each ``(tokens, blocks)``, of whose tokens the last isn't in the pool yet.

        Args:
            rows: the sequences.
            copies: blocks to copy before, each onto which.
            samplers: how each row's token is chosen.
            seeds: of each row.
            counts: how many tokens each row's answer has, which numbers its random choices.
            histories: what penalties look at, of the rows that have any.
            with_logprobs: tell log-probabilities too.
            temperatures: that each row's logits are divided by for that; None: by 1.
        """
        if copies:
            pairs = np.full((_bucket(len(copies), 1), 2), self._blocks, np.int32)
            pairs[: len(copies)] = copies
            self._pool = _copy(self._config.parscale_n, self._pool, pairs)
        count = _bucket(len(rows), 1)
        ids, at = self._nowhere(count, 1, max(-(-len(tokens) // self._size) for tokens, _ in rows))
        for row, (tokens, blocks) in enumerate(rows):
            place = len(tokens) - 1
            ids[row], at.place[row], at.table[row, : len(blocks)] = tokens[-1], place, blocks
            at.slots[row] = blocks[place // self._size] * self._size + place % self._size
        said = None
        if any(history is not None for history in histories):
            said = np.zeros((count, self._config.vocab_size), np.int32)
            for row, history in enumerate(histories):
                said[row] = 0 if history is None else history
        more = 0, count - len(rows)
        self._pool, chosen, told = _decode(
            self._structure, self._leaves, self._pool, ids, at,
            jax.tree.map(lambda column: np.pad(column, more, mode="edge"), samplers),
            np.pad(np.asarray(seeds, np.uint32), more), np.pad(np.asarray(counts, np.uint32), more), said,
            np.bool_(with_logprobs),
            np.pad(np.asarray(temperatures or [1.0] * len(rows), np.float32), more, mode="edge"),
        )  # fmt: skip
        return np.asarray(chosen)[: len(rows)], Logprobs(*map(np.asarray, told)) if with_logprobs else None

    def _nowhere(self, rows: int, seq: int, blocks: int) -> tuple[np.ndarray, Where]:
        """Room for the tokens of a step whose rows gather up to so many blocks; all of it padding."""
        table = np.zeros((rows, _bucket(blocks, LEAST_SEEN // self._size)), np.int32)
        ids, slots, base = (np.zeros((rows, seq), np.int32) for _ in range(3))
        return ids, Where(table, slots, base, np.full((rows, seq), -1, np.int32))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(structure: Any, leaves: list, pool: Pool, ids: Array, at: Where) -> Pool:
    model: Transformer = jax.tree.unflatten(structure, leaves)
    return _hidden(model, pool, ids, at)[1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    structure: Any, leaves: list, pool: Pool, ids: Array, at: Where, samplers: Mixed, seeds: Array,
    counts: Array, history: Array | None, with_logprobs: Array, temperatures: Array,
) -> tuple[Pool, Array, Logprobs]:  # fmt: skip
    model: Transformer = jax.tree.unflatten(structure, leaves)
    hidden_b1d, pool = _hidden(model, pool, ids, at)
    logits = model.head(hidden_b1d[:, 0])
    keys = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(seeds, counts)
    chosen = samplers(logits, keys, history)

    def tell():
        return logprobs(logits, chosen, min(MOST_LOGPROBS, logits.shape[1]), temperatures)

    nothing = jax.tree.map(lambda told: jnp.zeros(told.shape, told.dtype), jax.eval_shape(tell))
    return pool, chosen, jax.lax.cond(with_logprobs, tell, lambda: nothing)


def _hidden(model: Transformer, pool: Pool, ids: Array, at: Where) -> tuple[Array, Pool]:
    segment_ids = jnp.where(at.place < 0, PADDING_SEGMENT_ID, 0)
    cache = PagedCache.of(model.config, pool, at)
    hidden_btd, cache = model.hidden(ids, jnp.maximum(at.place, 0), segment_ids, cache)
    return hidden_btd, cache.pool


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _copy(replicas: int, pool: Pool, pairs: Int[Array, "n 2"]) -> Pool:
    """The pool with blocks ``pairs[:, 0]`` written over ``pairs[:, 1]``; past a pool's end: nowhere."""
    count = pool.keys[0].shape[0] // replicas
    places = pairs + _offsets(replicas, count)
    old, new = jnp.where(pairs < count, places, replicas * count).reshape(-1, 2).T
    return jax.tree.map(lambda x: x.at[new].set(x.at[old].get(mode="clip"), mode="drop"), pool)


def _bucket(count: int, least: int) -> int:
    """The power of two that is at least both."""
    return 1 << (max(count, least) - 1).bit_length()
