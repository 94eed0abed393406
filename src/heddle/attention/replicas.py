"""ParScale: P replicas of one model run side by side on one input, look at each other, and are summed.

"Parallel Scaling Law for Language Models", arXiv 2505.10475, with attention between the replicas. Rows are
replica-major, ``(replicas batch)``: row ``p * batch + b`` is replica ``p`` of sequence ``b``. Own keys, learned prefix
and other replicas are parts of one softmax, attended to apart and merged: no keys are expanded over the replicas.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Bool, Float, Int, Shaped

from .arrays import Array, accumulator_dtype, arange, matmul, namespace
from .attend import attend, score_scale
from .mask import Mask
from .merge import merge
from .rope import rotate

# ---------------------------------------------------------------- rows


def replicate(x: Shaped[Array, "batch ..."], replicas: int) -> Shaped[Array, "rows ..."]:
    """``b ... -> (p b) ...``: every replica gets the same (arXiv 2505.10475, section 2)."""
    xp = namespace(x)
    return xp.reshape(xp.broadcast_to(x[None], (replicas, *x.shape)), (replicas * x.shape[0], *x.shape[1:]))


def stack_replicas(x: Shaped[Array, "batch replicas ..."]) -> Shaped[Array, "rows ..."]:
    """``b p ... -> (p b) ...``: every replica gets its own."""
    xp, (batch, replicas, *rest) = namespace(x), x.shape
    return xp.reshape(xp.permute_dims(x, (1, 0, *range(2, x.ndim))), (replicas * batch, *rest))


def replica_rows(rows: Int[Array, " n"], batch: int, replicas: int) -> Int[Array, " replicas_times_n"]:
    """The rows that all replicas of the sequences ``rows`` (out of ``batch``) stand in, to pick or reorder a cache."""
    xp = namespace(rows)
    return xp.reshape(arange(replicas, rows)[:, None] * batch + rows[None], (-1,))


# ---------------------------------------------------------------- attention


def replica_attention(
    query: Float[Array, "rows q_len heads dim"],
    key: Float[Array, "rows kv_len kv_heads dim"],
    value: Float[Array, "rows kv_len kv_heads dim"],
    mask: Mask | None = None,
    *,
    replicas: int,
    prefix: tuple[Float[Array, "replicas kv_heads n dim"], Float[Array, "replicas kv_heads n dim"]] | None = None,
    prefix_scope: str = "own",
    current: tuple[Float[Array, "rows q_len kv_heads dim"], Float[Array, "rows q_len kv_heads dim"]] | None = None,
    bias: Float[Array, " heads"] | None = None,
    replica_theta: float | None = None,
    attend_own: Callable[[Array, Array, Array], tuple[Array, Array]] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "rows q_len heads dim"], Float[Array, "rows q_len heads dim"] | None]:
    """One softmax over own keys, learned prefix and, with ``current``, the other replicas' keys at the same position.

    Args:
        query: of all replicas, rows replica-major, position embedding applied.
        key, value: of all replicas, a cache's too.
        mask: which keys of its own replica each query sees; None: all. Tokens that see nothing are padding, to the
            other replicas as well.
        replicas: how many.
        prefix: learned keys and values without position, seen by every query.
        prefix_scope: ``"own"``: a replica sees its own prefix; ``"all"``: all replicas' prefixes.
        current: keys and values of the very tokens that ask: of these a replica sees the other ones at its position.
        bias: added to the scores over other replicas, one number a head.
        replica_theta: turn the queries and keys between replicas by the replica's index, with RoPE of this base.
        attend_own: what attends from query, key and value to own keys in place of :func:`heddle.attend` (dilated
            attention, say), with their lse; ``mask`` then tells padding alone.
        scale, implementation: as of :func:`heddle.attend`.

    Returns:
        ``(out, cross)``: attention over everything seen, and, with ``current``, over the other replicas alone.

    Raises:
        ValueError: rows that aren't a multiple of ``replicas``, a prefix not of them, an unknown scope.
        NotImplementedError: the named implementation doesn't serve this case.
    """
    if not isinstance(replicas, int) or replicas < 1 or query.shape[0] % replicas:
        raise ValueError(f"replicas must be a positive divisor of query's {query.shape[0]} rows, got {replicas}")
    if prefix_scope not in ("own", "all"):
        raise ValueError(f"prefix_scope must be 'own' or 'all', got {prefix_scope!r}")
    if prefix is None and current is None and attend_own is None:
        return attend(query, key, value, mask, scale=scale, implementation=implementation), None
    mask = Mask.full(query.shape[1], key.shape[1], like=query) if mask is None else mask.on(query)
    visible, parts = mask.counts() > 0, []
    if prefix is not None:
        if prefix[0].shape != prefix[1].shape or prefix[0].shape[:2] != (replicas, key.shape[2]):
            raise ValueError(
                f"prefix must be keys and values of shape ({replicas}, {key.shape[2]}, n, {key.shape[3]}), "
                f"got {tuple(prefix[0].shape)} and {tuple(prefix[1].shape)}"
            )
        many = query.shape[1] * query.shape[2] >= key.shape[1] * key.shape[2]
        if prefix_scope == "own" and many and attend_own is None:
            key, value = (_behind(p, x) for p, x in zip(prefix, (key, value), strict=True))
            mask = _mask_behind(mask, prefix[0].shape[2])
        else:
            parts.append(_attend_prefix(query, *prefix, prefix_scope == "own", scale, implementation))
    if attend_own is None:
        own = attend(query, key, value, mask, scale=scale, implementation=implementation, return_lse=True)
    else:
        own = attend_own(query, key, value)
    parts.insert(0, own)
    cross = None
    if current is not None:
        cross, lse = attend_replicas(
            query, *current, visible, replicas=replicas, itself=False, replica_theta=replica_theta, scale=scale
        )
        parts.append((cross, lse if bias is None else lse + namespace(lse).astype(bias, lse.dtype)))
    return merge(parts)[0], cross


def attend_replicas(
    query: Float[Array, "rows seq heads dim"],
    key: Float[Array, "rows seq kv_heads dim"],
    value: Float[Array, "rows seq kv_heads dim"],
    visible: Bool[Array, "visible_rows seq"] | None = None,
    *,
    replicas: int,
    itself: bool = True,
    replica_theta: float | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "rows seq heads dim"], Float[Array, "rows seq heads"]]:
    """Attention among the replicas' tokens at the same position: positions are the batch, replicas the sequence.

    Dense, as replicas are few: O(replicas^2) scores a position and head. Accumulated in float32 (float64 for float64).

    Args:
        query, key, value: rows replica-major.
        visible: which tokens may be seen (others are padding), one row or as many as query has; None: all.
        replicas: how many.
        itself: whether a replica sees itself.
        replica_theta, scale: as of :func:`replica_attention`.

    Returns:
        ``(out, lse)``, as :func:`heddle.attend`: 0 and -inf where nothing is seen.
    """
    xp, (rows, seq, heads, dim) = namespace(query), query.shape
    batch, kv_heads = rows // replicas, key.shape[2]
    group, accumulator = heads // kv_heads, accumulator_dtype(query)
    if replica_theta is not None:
        query, key = (_rotate_by_replica(x, replicas, replica_theta) for x in (query, key))

    # p: replica, b: batch, s: position, k: kv head, g: query heads of one kv head, d: head dim
    def by_position(x: Array) -> Array:  # (b, s, k, g p, d)
        x = xp.reshape(xp.astype(x, accumulator), (replicas, batch, seq, kv_heads, -1, dim))
        return xp.reshape(xp.permute_dims(x, (1, 2, 3, 4, 0, 5)), (batch, seq, kv_heads, -1, dim))

    def by_row(x: Array) -> Array:
        x = xp.reshape(x, (batch, seq, kv_heads, group, replicas, -1))
        return xp.reshape(xp.permute_dims(x, (4, 0, 1, 2, 3, 5)), (rows, seq, heads, -1))

    scores = score_scale(query, scale) * matmul(by_position(query), xp.matrix_transpose(by_position(key)))
    scores = xp.reshape(scores, (batch, seq, kv_heads, group, replicas, replicas))
    index = arange(replicas, query)
    seen = (index[:, None] != index[None]) | itself
    if visible is not None:
        visible = xp.reshape(xp.broadcast_to(visible, (rows, seq)), (replicas, batch, seq))
        seen = seen & xp.permute_dims(visible, (1, 2, 0))[:, :, None, None, None]
    # Unseen scores get a finite stand-in and weight 0, so that no NaN enters the gradient.
    scores = xp.where(seen, scores, xp.zeros_like(scores) - 1e30)
    highest = xp.max(scores, axis=-1, keepdims=True)
    weights = xp.where(seen, xp.exp(scores - highest), xp.zeros_like(scores))
    total = xp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    total = xp.where(empty, xp.ones_like(total), total)
    weights = xp.reshape(weights / total, (batch, seq, kv_heads, group * replicas, replicas))
    out = xp.astype(by_row(matmul(weights, by_position(value))), query.dtype)
    return out, by_row(xp.where(empty, xp.zeros_like(total) - float("inf"), highest + xp.log(total)))[..., 0]


def _behind(prefix: Array, x: Array) -> Array:
    """Keys (or values) behind each replica's prefix. Where they are few beside the queries that costs less than a part
    of its own."""
    xp, (replicas, kv_heads, n, dim) = namespace(x), prefix.shape
    prefix = xp.permute_dims(prefix, (0, 2, 1, 3))[:, None]
    prefix = xp.broadcast_to(prefix, (replicas, x.shape[0] // replicas, n, kv_heads, dim))
    return xp.concat([xp.reshape(prefix, (x.shape[0], n, kv_heads, dim)), x], axis=1)


def _mask_behind(mask: Mask, n: int) -> Mask:
    def behind() -> Mask:
        stop = namespace(mask.stop).where(mask.stop > 0, mask.stop + n, mask.stop)
        return Mask(mask.start + n, stop, mask.prefix + n)

    return mask.keep(("behind a prefix", n), behind, lambda behind: behind.start)


def _attend_prefix(
    query: Array, key: Array, value: Array, own: bool, scale: float | None, implementation: str | None
) -> tuple[Array, Array]:
    """Every query over its replica's prefix, or over all: queries that see the same keys are one sequence.

    So all replicas' prefixes aren't expanded over replicas, nor is a cache copied behind a prefix for each new token.
    """
    xp, (rows, q_len, heads, dim) = namespace(query), query.shape
    replicas, kv_heads, n, _ = key.shape
    batch = replicas if own else 1
    key, value = (
        xp.reshape(xp.permute_dims(x, (0, 2, 1, 3)), (batch, replicas * n // batch, kv_heads, dim))
        for x in (key, value)
    )
    query = xp.reshape(query, (batch, rows * q_len // batch, heads, dim))
    out, lse = attend(query, key, value, scale=scale, implementation=implementation, return_lse=True)
    return xp.reshape(out, (rows, q_len, heads, dim)), xp.reshape(lse, (rows, q_len, heads))


def _rotate_by_replica(x: Array, replicas: int, theta: float) -> Array:
    """RoPE (arXiv 2104.09864, eq. 34) whose position is the replica's index."""
    xp, (rows, seq, _, dim) = namespace(x), x.shape
    accumulator = accumulator_dtype(x)
    inverse = xp.exp(xp.astype(arange(dim // 2, x), accumulator) * (-2 * math.log(theta) / dim))
    angles = xp.astype(arange(replicas, x), accumulator)[:, None] * inverse
    angles = xp.broadcast_to(angles[:, None, None], (replicas, rows // replicas, seq, dim // 2))
    angles = xp.reshape(angles, (rows, seq, dim // 2))
    return rotate(x, xp.cos(angles), xp.sin(angles))


def hidden_key(
    query: Float[Array, "rows seq heads dim"],
    kv_heads: int,
    *,
    scale: float | None = None,
    score: float = -10.0,
    ridge: float = 0.01,
) -> Float[Array, "kv_heads dim"]:
    """The key that all these queries score about ``score``, so that they hardly see it. Float32 (float64 for float64).

    Prefix keys around it, in place of 0, leave a pretrained model nearly as it was: keys that score about 0 take most
    of the attention of many a head. A ridge regression of ``score`` on the queries of each key head, whose own size is
    the measure of ``ridge``; queries have the common direction that this needs, as they look at attention sinks.
    """
    xp, (rows, seq, _, dim) = namespace(query), query.shape
    x = score_scale(query, scale) * xp.reshape(
        xp.astype(query, accumulator_dtype(query)), (rows * seq, kv_heads, -1, dim)
    )
    x = xp.reshape(xp.permute_dims(x, (1, 0, 2, 3)), (kv_heads, -1, dim))
    square = matmul(xp.matrix_transpose(x), x) / x.shape[1]
    identity = xp.astype(arange(dim, query)[:, None] == arange(dim, query)[None], x.dtype)
    size = xp.mean(xp.sum(square * identity, axis=-1), axis=-1)
    square = square + ridge * size[:, None, None] * identity
    return xp.linalg.solve(square, score * xp.mean(x, axis=1)[..., None])[..., 0]


# ---------------------------------------------------------------- the sum


def aggregate(
    hidden: Float[Array, "rows seq hidden"],
    layer: Callable[[Float[Array, "batch seq features"]], Float[Array, "batch seq replicas"]],
    *,
    replicas: int,
    smoothing: float = 0.0,
) -> Float[Array, "batch seq hidden"]:
    """The replicas' sum with learned weights ``w = (1 - ε) softmax(layer(features)) + ε / P``.

    arXiv 2505.10475, section 3.1. Softmax and sum in float32 (float64 for float64).

    Args:
        hidden: rows replica-major, after the final norm.
        layer: from all replicas' features, feature ``h * replicas + p``, to one logit a replica.
        replicas: P.
        smoothing: ε, so that no replica's weight goes to 0.
    """
    xp, (rows, seq, size) = namespace(hidden), hidden.shape
    stacked = xp.reshape(hidden, (replicas, rows // replicas, seq, size))
    features = xp.reshape(xp.permute_dims(stacked, (1, 2, 3, 0)), (rows // replicas, seq, size * replicas))
    accumulator = accumulator_dtype(hidden)
    logits = xp.astype(layer(features), accumulator)
    weights = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    weights = weights / xp.sum(weights, axis=-1, keepdims=True) * (1 - smoothing) + smoothing / replicas
    terms = [weights[..., p, None] * xp.astype(stacked[p], accumulator) for p in range(replicas)]
    return xp.astype(sum(terms[1:], start=terms[0]), hidden.dtype)
