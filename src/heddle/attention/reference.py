"""The oracle: attention as the formula says it, dense, in float32 (float64 for float64)."""

from __future__ import annotations

from jaxtyping import Float

from .arrays import Array, accumulator_dtype, matmul, namespace
from .mask import Mask


def reference(
    query: Float[Array, "batch q_len heads dim"],
    key: Float[Array, "batch kv_len kv_heads dim"],
    value: Float[Array, "batch kv_len kv_heads value_dim"],
    mask: Mask,
    scale: float,
) -> tuple[Float[Array, "batch q_len heads value_dim"], Float[Array, "batch q_len heads"]]:
    """softmax(scale * Q K^T over the visible keys) V, and the log of the softmax's denominator.

    "Attention Is All You Need", arXiv 1706.03762, eq. 1. O(q_len * kv_len) memory.
    """
    xp = namespace(query)
    q_bkgqd, k_bk1sd, v_bk1sd = _grouped(query, key, value)
    visible = mask.dense(key.shape[1])[:, None, None]
    scores = scale * matmul(q_bkgqd, xp.matrix_transpose(k_bk1sd))
    # Invisible scores get a finite stand-in and weight 0, so that no NaN enters the gradient.
    scores = xp.where(visible, scores, xp.zeros_like(scores) - 1e30)
    highest = xp.max(scores, axis=-1, keepdims=True)
    weights = xp.where(visible, xp.exp(scores - highest), xp.zeros_like(scores))
    total = xp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    total = xp.where(empty, xp.ones_like(total), total)
    out = _ungrouped(matmul(weights / total, v_bk1sd))
    lse = _ungrouped(xp.where(empty, xp.zeros_like(total) - float("inf"), highest + xp.log(total)))[..., 0]
    return xp.astype(out, query.dtype), lse


def reference_backward(
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
    """dq, dk, dv: P = exp(S - lse), dS = P (dO V^T - rowsum(dO O) + dlse); out and lse may be over more keys."""
    xp, kv_heads = namespace(query), key.shape[2]
    q, k, v = _grouped(query, key, value)
    d_o, o, statistics = _grouped_rows(d_out, kv_heads), _grouped_rows(out, kv_heads), xp.stack([lse, d_lse], axis=-1)
    statistics = _grouped_rows(statistics, kv_heads)
    lse_, d_lse_ = statistics[..., :1], statistics[..., 1:]
    visible = mask.dense(key.shape[1])[:, None, None] & (lse_ > -float("inf"))
    scores = scale * matmul(q, xp.matrix_transpose(k)) - lse_
    p = xp.where(visible, xp.exp(xp.where(visible, scores, xp.zeros_like(scores))), xp.zeros_like(scores))
    d_p = matmul(d_o, xp.matrix_transpose(v))
    d_s = scale * p * (d_p - xp.sum(d_o * o, axis=-1, keepdims=True) + d_lse_)
    d_query = _ungrouped(matmul(d_s, k))
    d_key = xp.sum(matmul(xp.matrix_transpose(d_s), q), axis=2)
    d_value = xp.sum(matmul(xp.matrix_transpose(p), d_o), axis=2)
    return (
        xp.astype(d_query, query.dtype),
        xp.astype(xp.permute_dims(d_key, (0, 2, 1, 3)), key.dtype),
        xp.astype(xp.permute_dims(d_value, (0, 2, 1, 3)), value.dtype),
    )


# b: batch, k: kv head, g: query heads of one kv head, q: query, s: key, d: head dim


def _grouped_rows(x_bqhd: Array, kv_heads: int) -> Array:
    """``(b, k, g, q, d)`` in the accumulator's dtype."""
    xp, (batch, q_len, heads, dim) = namespace(x_bqhd), x_bqhd.shape
    x = xp.reshape(xp.astype(x_bqhd, accumulator_dtype(x_bqhd)), (batch, q_len, kv_heads, heads // kv_heads, dim))
    return xp.permute_dims(x, (0, 2, 3, 1, 4))


def _grouped(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    xp, kv_heads = namespace(query), key.shape[2]
    q_bkgqd, k_bk1sd, v_bk1sd = (
        _grouped_rows(query, kv_heads),
        *(xp.permute_dims(xp.astype(x, accumulator_dtype(x)), (0, 2, 1, 3))[:, :, None] for x in (key, value)),
    )
    return q_bkgqd, k_bk1sd, v_bk1sd


def _ungrouped(x_bkgqd: Array) -> Array:
    """``(b, q, k g, d)``."""
    xp, (batch, kv_heads, group, q_len, dim) = namespace(x_bkgqd), x_bkgqd.shape
    return xp.reshape(xp.permute_dims(x_bkgqd, (0, 3, 1, 2, 4)), (batch, q_len, kv_heads * group, dim))
