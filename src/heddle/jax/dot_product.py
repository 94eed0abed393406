"""``attend`` in the signatures of others: of ``jax.nn.dot_product_attention`` and of flax.nnx's attention functions."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from heddle.attention.arrays import is_concrete
from heddle.attention.attend import attend
from heddle.attention.mask import Mask


def dot_product_attention(
    query: Float[Array, "*batch q_len heads dim"],
    key: Float[Array, "*batch kv_len kv_heads dim"],
    value: Float[Array, "*batch kv_len kv_heads value_dim"],
    bias: ArrayLike | None = None,
    mask: Mask | Bool[ArrayLike, ...] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[ArrayLike, " batch"] | None = None,
    key_value_seq_lengths: Int[ArrayLike, " batch"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """:func:`heddle.attend` with the signature of :func:`jax.nn.dot_product_attention`.

    What differs: a query that sees nothing gives 0 (there, the mean of all values); value's head dimension is free.

    Args:
        query, key, value: ``(batch, seq, heads, head_dim)``, or without batch.
        bias: refused.
        mask: a :class:`heddle.Mask`; or booleans of four axes (three without batch) that broadcast to ``(batch, heads,
            q_len, kv_len)``, the same for all heads, whose values can be read now and let each query see one interval
            of the keys.
        scale: of the scores; None: ``dim ** -0.5``.
        is_causal: query ``i`` sees the keys up to ``i``.
        query_seq_lengths, key_value_seq_lengths: how many queries and keys of each sequence are none of padding.
        local_window_size: how many keys before and after its own place a query sees; one number for both.
        implementation: as of :func:`heddle.attend`.
        return_residual: also return the lse ``(batch, q_len, heads)``, float32.

    Returns:
        ``(batch, q_len, heads, value_dim)`` in query's dtype, without batch as query is; with ``return_residual`` also
        the lse.

    Raises:
        ValueError: arguments that disagree, a boolean mask that isn't one interval a query or is traced.
        NotImplementedError: a bias, or an implementation that doesn't serve the case.
    """
    if bias is not None:
        raise NotImplementedError("bias is not supported: what scores are is fixed here; say what is seen with a mask")
    if query.ndim not in (3, 4):
        raise ValueError(f"query must have shape (batch, seq, heads, head_dim) or none of batch, got {query.shape}")
    alone = query.ndim == 3
    if alone:
        query, key, value = query[None], key[None], value[None]
    parts = []
    if isinstance(mask, Mask):
        parts.append(mask)
    elif mask is not None:
        parts.append(_intervals(jnp.asarray(mask) if is_traced(mask) else np.asarray(mask), query, key))
    said = (is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size)
    if any(x is not None and x is not False for x in said):
        parts.append(_said(query.shape[1], key.shape[1], *said))
    whole = None
    for part in parts:
        part = part.on(query)
        whole = part if whole is None else whole & part
    out, lse = attend(query, key, value, whole, scale=scale, implementation=implementation, return_lse=True)
    if alone:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def nnx_attention(
    query: Float[Array, "*batch q_len heads dim"],
    key: Float[Array, "*batch kv_len kv_heads dim"],
    value: Float[Array, "*batch kv_len kv_heads value_dim"],
    bias: ArrayLike | None = None,
    mask: Any = None,
    *,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    module: Any = None,
    is_causal: bool = False,
    implementation: str | None = None,
    **unused: Any,
) -> Float[Array, "*batch q_len heads value_dim"]:
    """``flax.nnx.MultiHeadAttention(..., attention_fn=nnx_attention)``: its calls, by :func:`heddle.attend`.

    ``mask`` and ``is_causal`` are as of :func:`dot_product_attention`; numbers other than 0 in a mask count as true.
    ``dtype`` is what the arrays are brought to; the arguments that only dropout reads, and ``precision``, are not used.

    Raises:
        NotImplementedError: a bias, dropout while training, or attention weights that are to be sown.
        ValueError: as of :func:`dot_product_attention`.
    """
    if dropout_rate > 0 and not deterministic:
        raise NotImplementedError(f"attention dropout is not supported, got dropout_rate {dropout_rate}")
    if module is not None:
        raise NotImplementedError("attention weights can't be sown: they are never all there at once")
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    batch = query.shape[:-3]
    query, key, value = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    if mask is not None and not isinstance(mask, Mask):
        mask = mask if is_traced(mask) else np.asarray(mask) != 0
        if len(batch) != 1:
            full = np.broadcast_to(mask, (*batch, *mask.shape[-3:]))
            mask = full.reshape(-1, *full.shape[-3:])
    out = dot_product_attention(query, key, value, bias, mask, is_causal=is_causal, implementation=implementation)
    return out.reshape(*batch, *out.shape[1:])


def is_traced(array: Any) -> bool:
    return isinstance(array, Array) and not is_concrete(array)


def _said(
    q_len: int,
    kv_len: int,
    is_causal: bool,
    query_lengths: ArrayLike | None,
    kv_lengths: ArrayLike | None,
    window: int | tuple[int, int] | None,
) -> Mask:
    query = jnp.arange(q_len, dtype=jnp.int32)[None]
    start, stop = 0 * query, 0 * query + kv_len
    if window is not None:
        before, after = (window, window) if isinstance(window, int) else window
        if min(before, after) < 0:
            raise ValueError(f"local_window_size must not be negative, got {window}")
        start, stop = jnp.maximum(query - before, 0), jnp.minimum(stop, query + after + 1)
    if is_causal:
        stop = jnp.minimum(stop, query + 1)
    if kv_lengths is not None:
        stop = jnp.minimum(stop, jnp.asarray(kv_lengths, jnp.int32)[:, None])
    if query_lengths is not None:
        stop = jnp.where(query < jnp.asarray(query_lengths, jnp.int32)[:, None], stop, 0)
    return Mask(jnp.broadcast_to(start, stop.shape), stop)


def _intervals(dense: Any, query: Array, key: Array) -> Mask:
    """The mask that a dense one is, if each of its queries sees one interval."""
    if is_traced(dense):
        raise ValueError(
            "mask must be a heddle.Mask, or booleans whose values can be read now, to see that each query sees one "
            "interval of the keys; got a traced array: build the Mask instead"
        )
    if dense.dtype != bool:
        raise ValueError(f"mask must be a heddle.Mask or booleans, got {dense.dtype}")
    dense = dense[None] if dense.ndim == 3 else dense
    wanted = query.shape[0], query.shape[2], query.shape[1], key.shape[1]
    if dense.ndim != 4 or any(have not in (1, want) for have, want in zip(dense.shape, wanted, strict=True)):
        raise ValueError(f"mask must broadcast to (batch, heads, q_len, kv_len) {wanted}, got {dense.shape}")
    if (dense != dense[:, :1]).any():
        raise ValueError("mask must be the same for all heads, it differs")
    seen = np.broadcast_to(dense[:, 0], (dense.shape[0], *wanted[2:]))
    start, count = seen.argmax(-1), seen.sum(-1)
    stop = np.where(count > 0, seen.shape[-1] - seen[..., ::-1].argmax(-1), 0)
    if (stop - start != count)[count > 0].any():
        row, place = np.argwhere((stop - start != count) & (count > 0))[0]
        raise ValueError(
            f"mask must let each query see one interval of the keys: query {place} of row {row} sees keys with gaps"
        )
    return Mask(start.astype(np.int32), stop.astype(np.int32))
