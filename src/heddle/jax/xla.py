"""Blockwise attention in plain XLA operations: on CPU, GPU and TPU, time by what the mask sees, memory O(n)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from heddle.attention.arrays import Array
from heddle.attention.mask import Mask

from .batching import batched, vary_alike

# Measured on a CPU: smaller tiles fit the mask better, but XLA gives a smaller product to one thread only.
QUERY_ROWS = 512  #: rows of a tile of queries: queries times the query heads that share a key head
KEYS = 256  #: keys of a tile
STEP = 2**21  #: scores of one step, at most, if it takes more than one sequence
FEW = 2**18  #: scores so few (decoding) that to cut tiles out of the keys would cost more than what is not seen
ROWS = 16  #: rows of a tile of queries so few (decoding) that their product with keys takes as long as reading those
WHOLE = 1024  #: keys that so few queries take at once, those that they don't see too
BLOCK = 64  #: keys that such a product is fastest over, if they lie transposed in memory, as in a KVCache


def unsupported(query: Array, key: Array, value: Array, mask: Mask) -> str | None:
    """Nothing is."""
    return None


@partial(jax.jit, static_argnames="scale")
def xla(
    query: Float[Array, "batch q_len heads dim"],
    key: Float[Array, "batch kv_len kv_heads dim"],
    value: Float[Array, "batch kv_len kv_heads value_dim"],
    mask: Mask,
    scale: float,
) -> tuple[Float[Array, "batch q_len heads value_dim"], Float[Array, "batch q_len heads"]]:
    """``attend`` by tiles: a loop over tiles of queries, in it one over the tiles of keys that the mask lets them see.

    FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) over the online softmax (arXiv 1805.02867). The inner loop's
    bounds are read from the mask at run time. The forward keeps the maximum, the denominator and the output so far, and
    saves output and lse; the backward computes ``P = exp(S - lse)`` again, and with ``dS = P * (dP - rowsum(dO * O) +
    dlse)`` sums dQ, dK and dV, all in one pass.

    Products take the inputs' dtype and accumulate in float32 (float64 for float64). The query heads that share a key
    head are more rows of one product. Forward-mode and second derivatives are left to the reference.
    """
    return _attend(*vary_alike(query, key, value, mask), scale)


@partial(jax.jit, static_argnames="scale")
def xla_backward(
    query: Float[Array, "batch q_len heads dim"],
    key: Float[Array, "batch kv_len kv_heads dim"],
    value: Float[Array, "batch kv_len kv_heads value_dim"],
    mask: Mask,
    scale: float,
    out: Float[Array, "batch q_len heads value_dim"],
    lse: Float[Array, "batch q_len heads"],
    d_out: Float[Array, "batch q_len heads value_dim"],
    d_lse: Float[Array, "batch q_len heads"],
) -> tuple[
    Float[Array, "batch q_len heads dim"],
    Float[Array, "batch kv_len kv_heads dim"],
    Float[Array, "batch kv_len kv_heads value_dim"],
]:
    """dq, dk, dv of :func:`xla`; ``out`` and ``lse`` may be over more keys than these."""
    query, key, value, mask, *rest = vary_alike(query, key, value, mask, out, lse, d_out, d_lse)
    return batched(partial(_backward, scale=scale))(mask, query, key, value, *rest)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, mask, scale):
    return batched(partial(_forward, scale=scale))(mask, query, key, value)


def _attend_forward(query, key, value, mask, scale):
    out, lse = _attend(query, key, value, mask, scale)  # type: ignore[misc]
    return (out, lse), (mask, query, key, value, out, lse)


def _attend_backward(scale, saved, cotangents):
    return (*batched(partial(_backward, scale=scale))(*saved, *cotangents), None)


_attend.defvjp(_attend_forward, _attend_backward)


# ---------------------------------------------------------------- the two passes


def _forward(mask, query, key, value, *, scale):
    walk = _Walk(mask, query, key)
    dtype, q_len = walk.dtype, query.shape[1]
    query, key, value = walk.pad(query), walk.lay_out_keys(key), walk.lay_out(value)

    def visit_queries(b, i, results):
        q = walk.queries(query, b, i)

        def visit_keys(j, state):
            highest, total, out = state
            v = walk.keys(value, b, j)
            s = walk.hide(scale * walk.scores(q, key, b, j), b, i, j)
            raised = jnp.maximum(highest, jnp.max(s, axis=-1))
            finite = jnp.where(raised == -jnp.inf, 0, raised)  # of rows that have seen nothing yet
            p, keep = jnp.exp(s - finite[..., None]), jnp.exp(highest - finite)
            out = keep[..., None] * out + walk.dot(p.astype(v.dtype), v, 3, 2)
            return raised, keep * total + jnp.sum(p, axis=-1), out

        zero = walk.zeros(q.shape[:3], dtype)
        state = zero - jnp.inf, zero, walk.zeros((*q.shape[:3], value.shape[-1]), dtype)
        highest, total, out = walk.loop_keys(visit_keys, b, i, state)
        out = out / jnp.where(total == 0, 1, total)[..., None]
        return walk.put(results[0], out, b, i), walk.put(results[1], highest + jnp.log(total), b, i)

    shape = query.shape[:3]
    results = walk.zeros((*shape, value.shape[-1]), query.dtype), walk.zeros(shape, dtype)
    out, lse = walk.loop_queries(visit_queries, results)
    return out[:, :q_len], lse[:, :q_len]


def _backward(mask, query, key, value, out, lse, d_out, d_lse, *, scale):
    walk = _Walk(mask, query, key)
    dtype, q_len = walk.dtype, query.shape[1]
    dk, dv = (walk.zeros((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), dtype) for x in (key, value))
    # dS = P * (dP - delta), as the derivative of lse by S is P too.
    delta = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1) - d_lse
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # so that P is 0 in rows that see nothing
    query, d_out, delta, lse = (walk.pad(x) for x in (query, d_out, delta, lse))
    key, value = walk.lay_out(key), walk.lay_out(value)

    def visit_queries(b, i, gradients):
        dq, dk, dv = gradients
        q, d_o, d, log_total = (walk.queries(x, b, i) for x in (query, d_out, delta, lse))

        def visit_keys(j, state):
            # Scores are transposed here, keys by queries. Four of the five products then have their operands in the
            # layouts that XLA on a CPU is fast at, and the fifth (dq) has its smaller operand transposed.
            dq, dk, dv = state
            k, v = walk.keys(key, b, j), walk.keys(value, b, j)
            s = walk.hide(scale * walk.dot(k, q, 3, 3), b, i, j, keys_first=True)
            p = jnp.exp(s - log_total[:, :, None])
            ds = (p * (walk.dot(v, d_o, 3, 3) - d[:, :, None])).astype(q.dtype)
            dk = walk.add_keys(dk, walk.dot(ds, q, 3, 2), b, j)
            dv = walk.add_keys(dv, walk.dot(p.astype(d_o.dtype), d_o, 3, 2), b, j)
            return dq + walk.dot(k, ds, 2, 2), dk, dv

        dq_tile = walk.zeros((*q.shape[:2], q.shape[3], q.shape[2]), dtype)
        dq_tile, dk, dv = walk.loop_keys(visit_keys, b, i, (dq_tile, dk, dv))
        return walk.put(dq, scale * jnp.swapaxes(dq_tile, 2, 3), b, i), dk, dv

    dq, dk, dv = walk.loop_queries(visit_queries, (walk.zeros(query.shape, query.dtype), dk, dv))
    dk, dv = jnp.swapaxes(scale * dk, 1, 2).astype(key.dtype), jnp.swapaxes(dv, 1, 2).astype(value.dtype)
    return dq[:, :q_len], dk, dv


# ---------------------------------------------------------------- tiles


class _Walk:
    """A walk over the tiles that the mask sees, in steps of one sequence or of all of them at once.

    Queries are ``(batch, q_len, heads, ...)``; a tile of them is ``(sequences, kv_heads, group * block_q, ...)``, the
    heads that share a key head below one another. Tiles of keys are ``(sequences, kv_heads, block_k, dim)``.
    """

    def __init__(self, mask: Mask, query, key):
        self.batch, q_len, heads, _ = query.shape
        self.kv_len, self.kv_heads = key.shape[1:3]
        self.group = heads // self.kv_heads
        self.dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
        self.like = query

        self.block_q = _block(q_len, max(QUERY_ROWS // self.group, 64))
        rows = self.group * self.block_q
        few_scores = query.size // query.shape[3] * self.kv_len <= FEW and self.kv_len <= 2 * KEYS
        few = few_scores or (rows <= ROWS and q_len <= self.block_q and self.kv_len <= WHOLE)
        self.block_k = self.kv_len if few else _block(self.kv_len, KEYS)
        self.n_q, self.n_k = _ceil(q_len, self.block_q), _ceil(self.kv_len, self.block_k)
        self.padding = self.n_q * self.block_q - q_len
        self.overlap = self.n_k * self.block_k - self.kv_len
        # With one tile of queries each key is read once. Then the heads are moved to the front at once, which costs
        # nothing if keys are a view of a cache that has them there. Else they are moved tile by tile.
        self.heads_first = self.n_q == 1
        self.by_block = self.heads_first and rows <= ROWS and self.block_k % BLOCK == 0 and self.kv_len % BLOCK == 0
        # All sequences in one step where it would be small and they visit much the same tiles.
        small = self.batch * heads * self.block_q * self.block_k <= STEP
        together = small and (self.n_q == 1 or mask.start.shape[0] == 1)
        self.sequences = self.batch if together else 1

        self.mask = Mask(self.pad(mask.start), self.pad(mask.stop), mask.prefix)
        tiles = self.mask.tiles(self.block_q, self.block_k, self.kv_len)
        lo, hi = tiles.rows.lo, tiles.rows.hi
        if together:
            lo = jnp.min(jnp.where(lo < hi, lo, self.n_k), axis=0, keepdims=True)
            hi = jnp.max(hi, axis=0, keepdims=True)
        self.prefix, self.lo, self.hi = tiles.prefix, lo, jnp.maximum(lo, hi)

    def loop_queries(self, visit: Callable[..., Any], carry: Any) -> Any:
        """``carry = visit(b, i, carry)`` for every tile ``i`` of the queries of the step's sequences, from ``b`` on."""
        if (steps := self.batch // self.sequences * self.n_q) == 1:
            return visit(0, 0, carry)
        return lax.fori_loop(0, steps, lambda step, carry: visit(step // self.n_q, step % self.n_q, carry), carry)

    def loop_keys(self, visit: Callable[..., Any], b, i, carry: Any) -> Any:
        """``carry = visit(j, carry)`` for every tile ``j`` of keys that tile ``i`` of the queries may see."""
        row = b if self.lo.shape[0] > 1 else 0
        lo, hi = self.lo[row, i], self.hi[row, i]
        if self.n_k == 1:  # the condition also keeps XLA from fusing a cache's update with this, and copying the cache
            return lax.cond((lo < hi) | (self.prefix > 0), partial(visit, 0), lambda carry: carry, carry)
        if not self.prefix:
            return lax.fori_loop(lo, hi, visit, carry)
        gap = lo - self.prefix
        return lax.fori_loop(0, hi - gap, lambda j, carry: visit(jnp.where(j < self.prefix, j, j + gap), carry), carry)

    def pad(self, x):
        """Queries up to whole tiles. Of zeros: where a mask's ``stop`` is 0, nothing is seen."""
        return jnp.pad(x, ((0, 0), (0, self.padding), *[(0, 0)] * (x.ndim - 2))) if self.padding else x

    def queries(self, x, b, i):
        """Tile ``i`` of the queries."""
        x = _cut(x, (b, self.sequences), (i * self.block_q, self.block_q))
        x = jnp.moveaxis(x.reshape(*x.shape[:2], self.kv_heads, self.group, *x.shape[3:]), 1, 3)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    def put(self, x, tile, b, i):
        """``x`` with tile ``i`` of its queries replaced."""
        tile = tile.reshape(*tile.shape[:2], self.group, self.block_q, *tile.shape[3:])
        tile = jnp.moveaxis(tile, 3, 1).reshape(tile.shape[0], self.block_q, *x.shape[2:])
        return _paste(x, tile.astype(x.dtype), b, i * self.block_q)

    def lay_out(self, x):
        """Keys or values as :meth:`keys` takes them."""
        return jnp.swapaxes(x, 1, 2) if self.heads_first else x

    def lay_out_keys(self, x):
        """Keys as :meth:`scores` takes them: of few queries in transposed blocks, what a KVCache's are already."""
        x = self.lay_out(x)
        return x.reshape(*x.shape[:2], -1, BLOCK, x.shape[3]).swapaxes(3, 4) if self.by_block else x

    def keys(self, x, b, j):
        """Tile ``j`` of keys or values."""
        sequences, keys = (b, self.sequences), (self._first_key(j), self.block_k)
        if self.heads_first:
            return _cut(x, sequences, (0, self.kv_heads), keys)
        return jnp.swapaxes(_cut(x, sequences, keys), 1, 2)

    def add_keys(self, x, tile, b, j):
        """``x (batch, kv_heads, kv_len, dim)`` with ``tile`` added to its tile ``j``."""
        at = self._first_key(j)
        return _paste(x, tile + _cut(x, (b, self.sequences), (0, self.kv_heads), (at, self.block_k)), b, 0, at)

    def scores(self, q, key, b, j):
        """``q k^T``, unscaled, over tile ``j`` of keys."""
        if not self.by_block:
            return self.dot(q, self.keys(key, b, j), 3, 3)
        blocks = self._first_key(j) // BLOCK, self.block_k // BLOCK
        k = _cut(key, (b, self.sequences), (0, self.kv_heads), blocks)
        q = jnp.broadcast_to(q[:, :, None], (*q.shape[:2], blocks[1], *q.shape[2:]))
        return jnp.moveaxis(self.dot(q, k, 4, 3), 2, 3).reshape(*q.shape[:2], q.shape[3], self.block_k)

    def _first_key(self, j):
        # The last tile ends with the keys, so it begins within the one before; hide() lets it have only its own.
        return jnp.minimum(j * self.block_k, self.kv_len - self.block_k) if self.overlap else j * self.block_k

    def hide(self, scores, b, i, j, keys_first: bool = False):
        """Scores ``(sequences, kv_heads, queries, keys)``, or transposed if ``keys_first``, -inf where not seen."""
        rows = (b, self.sequences) if self.mask.start.shape[0] > 1 else (0, 1)
        start, stop = (_cut(x, rows, (i * self.block_q, self.block_q)) for x in (self.mask.start, self.mask.stop))
        key = self._first_key(j) + jnp.arange(self.block_k, dtype=jnp.int32)
        # (rows, queries, keys) or (rows, keys, queries), and with axes for the heads
        if keys_first:
            start, stop, key = start[:, None], stop[:, None], key[:, None]
            heads, shape = (1, 3), (self.block_k, self.group, self.block_q)
        else:
            start, stop = start[:, :, None], stop[:, :, None]
            heads, shape = (1, 2), (self.group, self.block_q, self.block_k)
        seen = start <= key
        if self.mask.prefix:
            seen |= key < self.mask.prefix
        seen &= key < stop
        if self.overlap:
            seen &= key >= j * self.block_k
        by_head = scores.reshape(*scores.shape[:2], *shape)
        return jnp.where(jnp.expand_dims(seen, heads), by_head, -jnp.inf).reshape(scores.shape)

    def zeros(self, shape, dtype):
        return jnp.zeros_like(self.like, shape=shape, dtype=dtype)  # and varying over the same mesh axes

    def dot(self, a, b, axis_a: int, axis_b: int):
        """Products of tiles, summed over an axis of each. In full precision, unless the user has set another."""
        set_by_user = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        precision = None if set_by_user else lax.Precision.HIGHEST
        batch = tuple(range(a.ndim - 2))
        axes = (((axis_a,), (axis_b,)), (batch, batch))
        return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=self.dtype)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _block(length: int, at_most: int) -> int:
    """The size of as few blocks as can be, so that they are nearly equal."""
    return min(length, 16 * _ceil(_ceil(length, _ceil(length, at_most)), 16))


def _cut(x, *ranges: tuple[Any, int]):
    """A slice of the leading axes of ``x``, each from where for how many."""
    starts, sizes = zip(*ranges, strict=True)
    return lax.dynamic_slice(x, _corner(x, starts), (*sizes, *x.shape[len(sizes) :]))


def _paste(x, tile, *starts):
    return lax.dynamic_update_slice(x, tile, _corner(x, starts))


def _corner(x, starts):
    return [jnp.asarray(start, jnp.int32) for start in (*starts, *[0] * (x.ndim - len(starts)))]
