"""The oracle: attention as the formula says it, dense, in float32 (float64 for float64)."""

from __future__ import annotations

from jaxtyping import Float

from .arrays import Array, framework, namespace
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
    out_dtype, dtype = query.dtype, xp.float64 if query.dtype == xp.float64 else xp.float32
    batch, q_len, heads, dim = query.shape
    kv_heads = key.shape[2]
    # b: batch, k: kv head, g: query heads of one kv head, q: query, s: key, d: head dim
    q_bkgqd = xp.permute_dims(
        xp.reshape(xp.astype(query, dtype), (batch, q_len, kv_heads, heads // kv_heads, dim)), (0, 2, 3, 1, 4)
    )
    k_bk1sd = xp.permute_dims(xp.astype(key, dtype), (0, 2, 1, 3))[:, :, None]
    v_bk1sd = xp.permute_dims(xp.astype(value, dtype), (0, 2, 1, 3))[:, :, None]
    visible = mask.dense(key.shape[1])[:, None, None]

    matmul = xp.matmul
    if framework(query) == "jax":  # the default precision of some accelerators is less than float32
        matmul = lambda a, b: xp.matmul(a, b, precision="highest")  # noqa: E731
    scores = scale * matmul(q_bkgqd, xp.matrix_transpose(k_bk1sd))
    # Invisible scores get a finite stand-in and weight 0, so that no NaN enters the gradient.
    scores = xp.where(visible, scores, xp.zeros_like(scores) - 1e30)
    highest = xp.max(scores, axis=-1, keepdims=True)
    weights = xp.where(visible, xp.exp(scores - highest), xp.zeros_like(scores))
    total = xp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    total = xp.where(empty, xp.ones_like(total), total)
    out = matmul(weights / total, v_bk1sd)
    lse = xp.where(empty, xp.zeros_like(total) - float("inf"), highest + xp.log(total))[..., 0]

    out = xp.reshape(xp.permute_dims(out, (0, 3, 1, 2, 4)), (batch, q_len, heads, value.shape[-1]))
    lse = xp.reshape(xp.permute_dims(lse, (0, 3, 1, 2)), (batch, q_len, heads))
    return xp.astype(out, out_dtype), lse
