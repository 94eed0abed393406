"""Ring attention: key shards travel from rank to rank; each rank attends to every shard and merges.

"Ring Attention with Blockwise Transformers", arXiv 2310.01889. Written once: a wing says how a shard is sent on, and
hands over its attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .arrays import Array, clip, namespace
from .mask import Mask
from .merge import merge

#: ``attend(query, key, value, mask) -> (out, lse)``
Attend = Callable[[Array, Array, Array, Mask], tuple[Array, Array]]
#: ``backward(query, key, value, mask, out, lse, d_out, d_lse) -> (dq, dk, dv)``, from out and lse over all keys
Backward = Callable[..., tuple[Array, Array, Array]]
#: Starts sending arrays to the next rank; what it returns gives, when called, those of the rank before.
Send = Callable[[tuple[Array, ...]], Callable[[], tuple[Array, ...]]]


def shard_mask(mask: Mask, shard: Any, size: int) -> Mask:
    """The mask over the keys of one shard, ``[shard * size, (shard + 1) * size)``. ``shard`` may be traced.

    The prefix must be 0: which shards it reaches into would have to be known.
    """

    def local() -> Mask:
        first = shard * size
        return Mask(clip(mask.start - first, 0, size), clip(mask.stop - first, 0, size))

    return mask.keep(("shard", shard, size), local, lambda part: part.start) if isinstance(shard, int) else local()


def prefix_apart(mask: Mask) -> tuple[Mask, Mask]:
    """What ``mask`` sees behind its prefix, which a ring can do, and the prefix, a part of its own to merge."""

    def split() -> tuple[Mask, Mask]:
        behind = Mask(clip(mask.start, mask.prefix, None), mask.stop)
        return behind, Mask(mask.start * 0, clip(mask.stop, None, mask.prefix))

    return mask.keep(("prefix apart",), split, lambda masks: masks[0].start)


def ring_forward(
    query: Array, key: Array, value: Array, mask: Mask, *, rank: Any, ranks: int, attend: Attend, send: Send
) -> tuple[Array, Array]:
    """This rank's queries over the keys of all ranks.

    Args:
        query: ``(batch, q_len, heads, dim)``, this rank's.
        key, value: ``(batch, kv_len / ranks, kv_heads, dim)``, this rank's shard; shards stand in order of rank.
        mask: of this rank's queries over all keys, without prefix.
        rank, ranks: which of how many.

    Returns:
        out and lse over all keys.
    """
    size, total = key.shape[1], None
    for step in range(ranks):
        arrive = send((key, value)) if step < ranks - 1 else None
        part = attend(query, key, value, shard_mask(mask, (rank - step) % ranks, size))
        total = part if total is None else merge([total, part])
        if arrive is not None:
            key, value = arrive()
    assert total is not None
    return total


def ring_backward(
    query: Array, key: Array, value: Array, mask: Mask, out: Array, lse: Array, d_out: Array, d_lse: Array,
    *, rank: Any, ranks: int, backward: Backward, send: Send,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The gradients of :func:`ring_forward`: the shards go round once more, with their gradients in float32.

    ``out`` and ``lse`` are over all keys, so each shard's part of the softmax is exact on its own.
    """
    xp, size = namespace(query), key.shape[1]
    wide = xp.float64 if query.dtype == xp.float64 else xp.float32
    dtypes, d_query, d_shard = (query.dtype, key.dtype, value.dtype), None, None
    for step in range(ranks):
        arrive = send((key, value)) if step < ranks - 1 else None
        local = shard_mask(mask, (rank - step) % ranks, size)
        d_q, d_k, d_v = (xp.astype(d, wide) for d in backward(query, key, value, local, out, lse, d_out, d_lse))
        d_query = d_q if d_query is None else d_query + d_q
        # A shard's gradient travels with it: it comes to rank r from the rank before, where the shard was.
        d_shard = (d_k, d_v) if d_shard is None else tuple(a + b for a, b in zip(d_shard(), (d_k, d_v), strict=True))
        d_shard = send(d_shard)
        if arrive is not None:
            key, value = arrive()
    assert d_shard is not None
    d_key, d_value = d_shard()  # the last step sent each shard's gradient home
    return tuple(xp.astype(d, t) for d, t in zip((d_query, d_key, d_value), dtypes, strict=True))  # type: ignore
