"""How JAX computes ``attend``: ``xla`` is blockwise attention in plain XLA operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from heddle.attention.attend import IMPLEMENTATIONS, REFERENCE, Implementation
from heddle.attention.mask import Mask

#: Tiles at most this large, and scores of one step; measured on CPUs, where a tile's scores should stay in the cache
#: and XLA splits a product over threads only if it is large enough.
QUERY_ROWS = 512  #: queries of a tile times the query heads that share a key head
KEYS = 256
STEP = 2**21


@partial(jax.jit, static_argnames="scale")
def xla(query: Any, key: Any, value: Any, mask: Mask, scale: float) -> tuple[Any, Any]:
    """Blockwise attention in plain XLA, for CPU, GPU and TPU: time by the tiles the mask sees, memory O(n).

    FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2): for each tile of queries, a loop over the tiles of keys that
    its queries see, whose bounds are read from the mask at run time. The forward keeps a running maximum and denominator
    (online softmax, arXiv 1805.02867) and saves the output and the lse; the backward computes the probabilities again,
    ``P = exp(S - lse)``, and sums ``dS = P * (dP - rowsum(dO * O) + dlse)`` into dQ, dK and dV.

    Products take the inputs' dtype and add up in float32 (float64 for float64). The query heads that share a key head
    are more rows of one product. Second derivatives and forward mode are left to the reference.
    """
    return _attend(*_vary_alike(query, key, value, mask), scale)


@partial(jax.jit, static_argnames="scale")
def xla_backward(query, key, value, mask, scale, out, lse, d_out, d_lse):
    """The gradients of :func:`xla`; ``out`` and ``lse`` may be over more keys than these."""
    query, key, value, mask, *rest = _vary_alike(query, key, value, mask, out, lse, d_out, d_lse)
    return _fold_vmap(partial(_backward, scale=scale))(mask, query, key, value, *rest)


def _vary_alike(*arrays):
    """Under shard_map a loop's carry must vary over the same mesh axes at its end as at its beginning, so everything
    is made to vary over the axes that anything varies over. Nothing of it is left in the compiled program."""
    zero = sum(jnp.zeros_like(x, shape=(), dtype=jnp.int32) for x in jax.tree.leaves(arrays))
    return jax.tree.map(lambda x: jnp.where(True, x, zero.astype(x.dtype)), arrays)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, mask, scale):
    return _fold_vmap(partial(_forward, scale=scale))(mask, query, key, value)


def _attend_forward(query, key, value, mask, scale):
    out, lse = _attend(query, key, value, mask, scale)
    return (out, lse), (query, key, value, mask, out, lse)


def _attend_backward(scale, saved, cotangents):
    query, key, value, mask, *rest = saved
    return (*_fold_vmap(partial(_backward, scale=scale))(mask, query, key, value, *rest, *cotangents), None)


_attend.defvjp(_attend_forward, _attend_backward)


def _fold_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(mask, *arrays)`` with a rule for vmap: the mapped axis joins the batch.

    JAX's own rule would run each loop to the longest of all bounds and select what to keep of the carry at each turn.
    """
    folded = custom_vmap(function)

    @folded.def_vmap
    def rule(size, mapped, mask, *arrays):
        def expand(x, is_mapped):
            return x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))

        arrays = [expand(*pair) for pair in zip(arrays, mapped[1:], strict=True)]
        batch = arrays[0].shape[1]
        bounds, bounds_mapped = (mask.start, mask.stop), (mapped[0].start, mapped[0].stop)
        if any(bounds_mapped) or mask.start.shape[0] > 1:
            bounds = [expand(*pair) for pair in zip(bounds, bounds_mapped, strict=True)]
            bounds = [jnp.broadcast_to(x, (size, batch, x.shape[2])).reshape(-1, x.shape[2]) for x in bounds]
            mask = Mask(*bounds, mask.prefix)
        results = folded(mask, *(x.reshape(-1, *x.shape[2:]) for x in arrays))
        return tuple(x.reshape(size, batch, *x.shape[1:]) for x in results), (True,) * len(results)

    return folded


def _forward(mask, query, key, value, *, scale):
    walk = _Walk(query, key, mask)
    dtype, q_len = walk.dtype, query.shape[1]
    query, key, value = walk.pad(query), walk.lay_out(key), walk.lay_out(value)

    def visit_queries(b, i, results):
        q = walk.queries(query, b, i)

        def visit_keys(j, state):
            highest, total, out = state
            k, v = walk.keys(key, b, j), walk.keys(value, b, j)
            scores = walk.hide(scale * walk.dot(q, k, 3, 3), b, i, j)
            raised = jnp.maximum(highest, jnp.max(scores, axis=-1))
            finite = jnp.where(raised == -jnp.inf, 0, raised)  # rows that have seen nothing yet
            p, keep = jnp.exp(scores - finite[..., None]), jnp.exp(highest - finite)
            out = out * keep[..., None] + walk.dot(p.astype(v.dtype), v, 3, 2)
            return raised, total * keep + jnp.sum(p, axis=-1), out

        zeros = walk.zeros(q.shape[:3], dtype)
        highest, total, out = walk.loop_keys(
            b, i, visit_keys, (zeros - jnp.inf, zeros, walk.zeros((*q.shape[:3], value.shape[-1]), dtype))
        )
        out = out / jnp.where(total == 0, 1, total)[..., None]
        return walk.put(results[0], out, b, i), walk.put(results[1], highest + jnp.log(total), b, i)

    shape = query.shape[:3]
    results = walk.zeros((*shape, value.shape[-1]), query.dtype), walk.zeros(shape, dtype)
    out, lse = walk.loop_queries(visit_queries, results)
    return out[:, :q_len], lse[:, :q_len]


def _backward(mask, query, key, value, out, lse, d_out, d_lse, *, scale):
    walk = _Walk(query, key, mask)
    dtype, q_len = walk.dtype, query.shape[1]
    delta = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1) - d_lse
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # so that P is 0 in rows that see nothing
    dk = walk.zeros((key.shape[0], key.shape[2], key.shape[1], key.shape[3]), dtype)
    dv = walk.zeros((*dk.shape[:3], value.shape[3]), dtype)
    query, d_out, delta, lse = (walk.pad(x) for x in (query, d_out, delta, lse))
    key, value = walk.lay_out(key), walk.lay_out(value)

    def visit_queries(b, i, gradients):
        dq, dk, dv = gradients
        q, do, d, l = (walk.queries(x, b, i) for x in (query, d_out, delta, lse))

        def visit_keys(j, state):
            # Scores stand transposed here, keys by queries: four of the five products then have the operands' layout
            # that XLA is fast at on a CPU, and the fifth has its smaller operand transposed.
            dq, dk, dv = state
            k, v = walk.keys(key, b, j), walk.keys(value, b, j)
            scores = walk.hide(scale * walk.dot(k, q, 3, 3), b, i, j, keys_first=True)
            p = jnp.exp(scores - l[:, :, None])
            ds = (p * (walk.dot(v, do, 3, 3) - d[:, :, None])).astype(q.dtype)
            dv = walk.add_keys(dv, walk.dot(p.astype(do.dtype), do, 3, 2), b, j)
            dk = walk.add_keys(dk, walk.dot(ds, q, 3, 2), b, j)
            return dq + walk.dot(k, ds, 2, 2), dk, dv

        zeros = walk.zeros((*q.shape[:2], q.shape[3], q.shape[2]), dtype)
        dq_tile, dk, dv = walk.loop_keys(b, i, visit_keys, (zeros, dk, dv))
        return walk.put(dq, scale * jnp.swapaxes(dq_tile, 2, 3), b, i), dk, dv

    dq, dk, dv = walk.loop_queries(visit_queries, (walk.zeros(query.shape, query.dtype), dk, dv))
    return dq[:, :q_len], jnp.swapaxes(scale * dk, 1, 2).astype(key.dtype), jnp.swapaxes(dv, 1, 2).astype(value.dtype)


def _even(length: int, at_most: int) -> int:
    """A block size: as few blocks as can be, of nearly equal size."""
    blocks = _ceil(length, at_most)
    return min(length, 16 * _ceil(_ceil(length, blocks), 16))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class _Walk:
    """A pass over the tiles that a mask sees. A step takes a tile of queries from one sequence or from all.

    Tiles are ``(batch, kv_heads, rows, dim)``; the rows of queries are ``group * block_q``, as the heads that share a key
    head stand below one another.
    """

    def __init__(self, query, key, mask: Mask):
        self.batch, q_len, heads, _ = query.shape
        self.kv_len, self.kv_heads = key.shape[1:3]
        self.group = heads // self.kv_heads
        self.dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
        self.like = query

        self.block_q = _even(q_len, max(QUERY_ROWS // self.group, 64))
        self.block_k = _even(self.kv_len, KEYS)
        self.n_q, self.n_k = _ceil(q_len, self.block_q), _ceil(self.kv_len, self.block_k)
        self.padding = self.n_q * self.block_q - q_len
        # Sequences go together where a step would be small and they visit much the same tiles.
        together = self.batch * heads * self.block_q * self.block_k <= STEP and (
            self.n_q == 1 or mask.start.shape[0] == 1
        )
        self.sequences = self.batch if together else 1
        # With one tile of queries each key is read once, so moving the heads costs a view of a cache nothing, and tiles
        # are then sliced as they lie in it. Else tiles are cut first, as the whole would cost a copy.
        self.heads_first = self.n_q == 1

        self.mask = Mask(self.pad(mask.start), self.pad(mask.stop), mask.prefix)
        tiles = self.mask.tiles(self.block_q, self.block_k, self.kv_len)
        lo, hi = tiles.rows.lo, tiles.rows.hi
        if together:
            lo = jnp.min(jnp.where(lo < hi, lo, self.n_k), axis=0, keepdims=True)
            hi = jnp.max(hi, axis=0, keepdims=True)
        self.prefix, self.lo, self.hi = tiles.prefix, jnp.minimum(lo, hi), hi

    # ---------------------------------------------------------------- loops

    def loop_queries(self, visit: Callable[..., Any], carry: Any) -> Any:
        """``carry = visit(b, i, carry)`` for each group of sequences from ``b`` and its tile ``i`` of queries."""
        steps = self.batch // self.sequences * self.n_q
        if steps == 1:
            return visit(0, 0, carry)
        return lax.fori_loop(0, steps, lambda s, c: visit(s // self.n_q, s % self.n_q, c), carry)

    def loop_keys(self, b, i, visit: Callable[..., Any], carry: Any) -> Any:
        """``carry = visit(j, carry)`` for each tile ``j`` of keys that queries ``i`` see."""
        if self.n_k == 1:
            return visit(0, carry)
        row = b if self.lo.shape[0] > 1 else 0
        lo, hi = self.lo[row, i], self.hi[row, i]
        if not self.prefix:
            return lax.fori_loop(lo, hi, visit, carry)
        skipped = lo - self.prefix
        return lax.fori_loop(
            0, hi - skipped, lambda s, c: visit(jnp.where(s < self.prefix, s, s + skipped), c), carry
        )

    # ---------------------------------------------------------------- tiles

    def pad(self, x):
        """Queries (of ``(batch, q_len, ...)``) up to whole tiles. Zeros: a mask's ``stop`` of 0 sees nothing."""
        return jnp.pad(x, [(0, 0), (0, self.padding)] + [(0, 0)] * (x.ndim - 2)) if self.padding else x

    def queries(self, x, b, i):
        """Tile ``i`` of ``x (batch, q_len, heads, ...)``: ``(sequences, kv_heads, group * block_q, ...)``."""
        x = _slice(x, {0: (b, self.sequences), 1: (i * self.block_q, self.block_q)})
        x = jnp.moveaxis(x.reshape(*x.shape[:2], self.kv_heads, self.group, *x.shape[3:]), 1, 3)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    def put(self, x, tile, b, i):
        """``x`` with its tile ``i`` replaced; the inverse of :meth:`queries`."""
        tile = tile.reshape(*tile.shape[:2], self.group, self.block_q, *tile.shape[3:])
        tile = jnp.moveaxis(tile, 3, 1).reshape(tile.shape[0], self.block_q, *x.shape[2:])
        return _put(x, tile.astype(x.dtype), {0: b, 1: i * self.block_q})

    def lay_out(self, x):
        return jnp.swapaxes(x, 1, 2) if self.heads_first else x

    def keys(self, x, b, j):
        """Tile ``j`` of keys or values laid out: ``(sequences, kv_heads, block_k, dim)``."""
        axis = 2 if self.heads_first else 1
        x = _slice(x, {0: (b, self.sequences), axis: (self.first_key(j), self.block_k)})
        return x if self.heads_first else jnp.swapaxes(x, 1, 2)

    def add_keys(self, x, tile, b, j):
        """``x (batch, kv_heads, kv_len, dim)`` with ``tile`` added to its tile ``j``."""
        first = self.first_key(j)
        old = _slice(x, {0: (b, self.sequences), 2: (first, self.block_k)})
        return _put(x, old + tile, {0: b, 2: first})

    def first_key(self, j):
        """The last tile ends with the keys, so it may begin within the one before; :meth:`hide` knows."""
        return j * self.block_k if self.kv_len % self.block_k == 0 else jnp.minimum(
            j * self.block_k, self.kv_len - self.block_k
        )

    def hide(self, scores, b, i, j, keys_first: bool = False):
        """``scores (sequences, kv_heads, rows, block_k)``, or with its last two axes swapped, -inf where not seen."""
        rows = self.mask.start.shape[0]
        at = {0: (b, self.sequences) if rows > 1 else (0, 1), 1: (i * self.block_q, self.block_q)}
        key = self.first_key(j) + jnp.arange(self.block_k, dtype=jnp.int32)
        key = key[:, None] if keys_first else key
        start, stop = (jnp.expand_dims(_slice(x, at), 1 if keys_first else 2) for x in (self.mask.start, self.mask.stop))
        seen = start <= key
        if self.prefix:
            seen |= key < self.mask.prefix
        seen &= key < stop
        if self.kv_len % self.block_k:
            seen &= key >= j * self.block_k
        if keys_first:
            by_head = (*scores.shape[:3], self.group, self.block_q)
            seen = seen[:, None, :, None]
        else:
            by_head = (*scores.shape[:2], self.group, self.block_q, self.block_k)
            seen = seen[:, None, None]
        return jnp.where(seen, scores.reshape(by_head), -jnp.inf).reshape(scores.shape)

    def zeros(self, shape, dtype):
        return jnp.zeros_like(self.like, shape=shape, dtype=dtype)  # like: varying over the same mesh axes

    def dot(self, a, b, axis_a: int, axis_b: int):
        precision = None if jax.config.jax_default_matmul_precision else lax.Precision.HIGHEST
        dimensions = (((axis_a,), (axis_b,)), ((0, 1), (0, 1)))
        return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=self.dtype)


def _slice(x, at: dict[int, tuple[Any, int]]):
    """``x`` from where each axis begins, of the size given; other axes whole."""
    for axis, (first, size) in at.items():
        if size != x.shape[axis]:
            pass
    starts = [at[a][0] if a in at else 0 for a in range(x.ndim)]
    sizes = [at[a][1] if a in at else n for a, n in enumerate(x.shape)]
    return lax.dynamic_slice(x, starts, sizes)


def _put(x, tile, at: dict[int, Any]):
    return lax.dynamic_update_slice(x, tile, [at.get(a, 0) for a in range(x.ndim)])


IMPLEMENTATIONS["jax"] = {
    "xla": Implementation(lambda query, key, value, mask: None, xla, xla_backward),
    "reference": REFERENCE,
}
