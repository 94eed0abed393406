"""Dilated attention of a sequence that is spread over the devices of a mesh axis: arXiv 2307.02486, section 3."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Bool, Float, Int

from heddle.attention.arrays import pick
from heddle.attention.attend import attend, score_scale
from heddle.attention.dilated import check_sequence, dilated_forward
from heddle.attention.dilated_grids import Places, Tokens, grids, token_places
from heddle.attention.dilated_patterns import Pattern, check_patterns
from heddle.attention.mask import Mask
from heddle.attention.merge import merge, over_no_keys

from .context_parallel import _PAD, Axes, _check_share, _gather, _mesh_of, _within_shard_map

Attend = Callable[[Array, Array, Array, Mask], tuple[Array, Array]]


@overload
def distributed_dilated_attention(
    query: Array, key: Array, value: Array, segment_lengths: Sequence[int], dilation_rates: Sequence[int], axis: str, *,
    is_causal: bool = False, segment_ids: Array | None = None, key_padding_mask: Array | None = None,
    mesh: Mesh | AbstractMesh | None = None, batch_axis: Axes = None,
    scale: float | None = None, implementation: str | None = None, return_lse: Literal[False] = False,
) -> Array: ...  # fmt: skip
@overload
def distributed_dilated_attention(
    query: Array, key: Array, value: Array, segment_lengths: Sequence[int], dilation_rates: Sequence[int], axis: str, *,
    is_causal: bool = False, segment_ids: Array | None = None, key_padding_mask: Array | None = None,
    mesh: Mesh | AbstractMesh | None = None, batch_axis: Axes = None,
    scale: float | None = None, implementation: str | None = None, return_lse: Literal[True],
) -> tuple[Array, Array]: ...  # fmt: skip
def distributed_dilated_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    axis: str,
    *,
    is_causal: bool = False,
    segment_ids: Int[Array, "batch seq"] | None = None,
    key_padding_mask: Bool[Array, "batch seq"] | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axis: Axes = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
):
    """:func:`heddle.attention.dilated.dilated_attention` with the sequence spread over the devices of a mesh axis.

    Patterns whose segments lie within a device's part need nothing from elsewhere. Of the others each device sends the
    keys and values it keeps to the devices that share segments with it alone, so that what is sent doesn't grow with
    the length if ``w / r`` doesn't. (Where devices don't fall into equal groups of such, to all of the axis.) A key's
    gradient comes back summed in float32. With documents or padding segments begin anywhere, and what a device keeps
    isn't known before the program runs: every pattern's keys and values are then sent to all of the axis, room for a
    device's whole part.

    On whole arrays, with or without jit; within a :func:`jax.shard_map` over ``axis`` it takes the device's own part.

    Args:
        query, key, value: device ``i`` of ``axis`` holds the ``i``-th equal part of the sequence.
        segment_lengths, dilation_rates, is_causal, segment_ids, key_padding_mask, scale, implementation, return_lse: as
            of :func:`~heddle.attention.dilated.dilated_attention`; a document may reach over any number of devices.
        axis, mesh, batch_axis: as of :func:`heddle.jax.context_attend`.

    Returns:
        as :func:`~heddle.attention.dilated.dilated_attention`, spread as query is.

    Raises:
        ValueError: arguments that disagree; an axis that the mesh hasn't; a length or a batch that the devices can't
            share equally; within a shard_map, one that leaves other axes of the mesh to the compiler.
        NotImplementedError: the named implementation doesn't serve this case.
    """
    patterns = check_patterns(segment_lengths, dilation_rates)
    check_sequence(query, key, value, segment_ids, key_padding_mask)
    run = partial(
        _attend, patterns=patterns, axis=axis, is_causal=is_causal, scale=score_scale(query, scale),
        implementation=implementation,
    )  # fmt: skip
    if _within_shard_map(axis):
        for name, given in {"mesh": mesh, "batch_axis": batch_axis}.items():
            if given is not None:
                raise ValueError(f"{name} must be None within a shard_map over {axis!r}, got {given!r}")
        out, lse = run(query, key, value, segment_ids, key_padding_mask)
    else:
        over = _mesh_of(axis, mesh, query)
        _check_share("query's batch", query.shape[0], batch_axis, over)
        _check_share("query's length", query.shape[1], axis, over, _PAD)
        spec = PartitionSpec(batch_axis, axis)
        spread = jax.shard_map(run, mesh=over, in_specs=spec, out_specs=spec)
        out, lse = jax.jit(spread)(query, key, value, segment_ids, key_padding_mask)
    return (out, lse) if return_lse else out


def _attend(
    query: Array, key: Array, value: Array, segment_ids: Array | None, key_padding_mask: Array | None, *,
    patterns: Sequence[Pattern], axis: str, is_causal: bool, scale: float, implementation: str | None,
) -> tuple[Array, Array]:  # fmt: skip
    """``(out, lse)`` of this device's queries."""

    def one(query: Array, key: Array, value: Array, mask: Mask) -> tuple[Array, Array]:
        return attend(query, key, value, mask, scale=scale, implementation=implementation, return_lse=True)

    if segment_ids is not None or key_padding_mask is not None:
        whole = [
            None if x is None else lax.all_gather(x, axis, axis=1, tiled=True) for x in (segment_ids, key_padding_mask)
        ]
        places: Any = token_places(query, *whole)
        parts = [_of_documents(query, key, value, pattern, axis, is_causal, places, one) for pattern in patterns]
        out, lse = merge(parts)
        return out.astype(query.dtype), lse
    length = query.shape[1]
    local, parts = [pattern for pattern in patterns if length % pattern.length == 0], []
    if local:
        out, lse = dilated_forward(query, key, value, local, is_causal, None, None, attend=one)
        parts.append((out.astype(lse.dtype), lse))
    for pattern in patterns:
        if pattern not in local:
            parts.append(_across(query, key, value, pattern, axis, is_causal, one))
    out, lse = merge(parts)
    return out.astype(query.dtype), lse


def _across(
    query: Array, key: Array, value: Array, pattern: Pattern, axis: str, is_causal: bool, attend: Attend
) -> tuple[Array, Array]:
    """``(out, lse)`` in a pattern whose segments reach over boundaries between devices."""
    (batch, length, heads, _), group, ranks = query.shape, query.shape[2] // key.shape[2], lax.axis_size(axis)
    plan = _plan(pattern, length, heads, ranks, lax.axis_index(axis), is_causal)
    head = jnp.arange(heads)[:, None]

    def by_head(x: Array, index: Array, share: int) -> Array:  # (batch, heads, n, dim)
        return x[:, index, head // share]

    sent = jnp.minimum(plan.kept, length - 1)
    pairs = jnp.concatenate([by_head(x, sent, group) for x in (key, value)], axis=-1)
    groups = tuple(tuple(range(i, i + plan.block)) for i in range(0, ranks, plan.block))
    gathered: Any = _gather(jnp.swapaxes(pairs, 1, 2), axis, groups)
    # Heads stand in the batch: each sees keys of its own.
    pairs = by_head(gathered, plan.keys, 1).reshape(batch * heads, -1, 1, gathered.shape[-1])
    keys, values = pairs[..., : key.shape[3]], pairs[..., key.shape[3] :]
    mask = Mask(jnp.tile(plan.start, (batch, 1)), jnp.tile(plan.stop, (batch, 1)))
    out, lse = attend(by_head(query, sent, 1).reshape(batch * heads, -1, 1, query.shape[3]), keys, values, mask)
    out, lse = (x.reshape(batch, heads, -1, *x.shape[3:]).astype(lse.dtype) for x in (out, lse))

    def put(x: Array, empty: float) -> Array:  # what doesn't count has no place
        blank = jnp.full_like(x, empty, shape=(batch, length, heads, *x.shape[3:]))
        return blank.at[:, plan.kept, head].set(x, mode="drop")

    return put(out, 0.0), put(lse, -jnp.inf)


def _of_documents(
    query: Array, key: Array, value: Array, pattern: Pattern, axis: str, is_causal: bool, places: Places, attend: Attend
) -> tuple[Array, Array]:
    """``(out, lse)`` in a pattern whose segments begin with documents, ``places`` being the whole sequence's."""
    (_, length, heads, _), group = query.shape, query.shape[2] // key.shape[2]
    ranks, rank = lax.axis_size(axis), lax.axis_index(axis)
    (tokens,) = grids(ranks * length, pattern, range(heads), is_causal, places)  # the whole sequence's, by number
    assert isinstance(tokens, Tokens)
    holder = jnp.where(tokens.start < tokens.stop, tokens.index // length, ranks)  # ascends
    search = jax.vmap(jax.vmap(lambda x: jnp.searchsorted(x, jnp.arange(ranks + 1)).astype(jnp.int32)))
    first = search(holder)  # (batch, offsets, ranks + 1): the number of the first token that a device keeps
    mine = lax.dynamic_slice_in_dim(first, rank, 2, axis=2)
    number = mine[..., :1] + jnp.arange(length, dtype=jnp.int32)
    here, number = number < mine[..., 1:], jnp.minimum(number, holder.shape[2] - 1)
    index, start, stop = (pick(x, number) for x in tokens[:3])
    sent = Tokens(jnp.where(here, index - rank * length, 0), jnp.where(here, start, 0), jnp.where(here, stop, 0), heads)
    gathered: Any = _gather(jnp.concatenate([sent.rows(x, group) for x in (key, value)], axis=3), axis)
    of = jnp.minimum(holder, ranks - 1)
    place = of * length + jnp.arange(holder.shape[2], dtype=jnp.int32) - pick(first, of)
    place = jnp.clip(place, 0, ranks * length - 1).reshape(gathered.shape[0], -1)
    pairs = gathered[jnp.arange(gathered.shape[0])[:, None], place]
    keys, values = pairs[..., : key.shape[3]], pairs[..., key.shape[3] :]
    out, lse = attend(sent.rows(query, 1), keys, values, sent.mask(query))
    kept = jnp.where(here, sent.index, length)  # what doesn't count has no place
    kept, blank = sent._replace(index=kept), over_no_keys(query, value.shape[3])
    return kept.put(blank[0], out), kept.put(blank[1], lse)


class _Plan(NamedTuple):
    """What a device sends and asks of one pattern, by head."""

    block: int  #: so many consecutive devices share segments
    kept: Int[Array, "heads kept"]  #: places of its part that the pattern keeps; ``length``: none
    keys: Int[Array, "heads keys"]  #: places among what the block's devices sent, in order of position
    start: Int[Array, "heads kept"]
    stop: Int[Array, "heads kept"]


def _plan(pattern: Pattern, length: int, heads: int, ranks: int, rank: Int[Array, ""], is_causal: bool) -> _Plan:
    """By counting: a head with offset ``s`` keeps, of each segment, ``ceil((w - s) / r)`` tokens, the ``n``-th at
    ``s + n r``. Tokens that a head keeps are numbered through all segments."""
    (w, r), total = pattern, ranks * length
    block = min(math.lcm(w, length) // length, ranks)
    block = ranks if ranks % block else block  # devices that gather together fall into equal groups
    offset = (jnp.arange(heads, dtype=jnp.int32) % r)[:, None]
    per = jnp.maximum(-(-(w - offset) // r), 0)  # of a whole segment

    def before(position: Any) -> Array:  # (heads, 1) of them stand before a position
        within = position % w
        return position // w * per + jnp.clip(-(-(within - offset) // r), 0, per)

    def position(number: Array) -> Array:
        segment, nth = number // jnp.maximum(per, 1), number % jnp.maximum(per, 1)
        return segment * w + offset + nth * r

    # No device keeps more than of a stretch that begins with a kept token in each segment it touches.
    most = min(length, -(-length // r) + -(-length // w))
    first = rank // block * block
    base, end = before(first * length), before(jnp.minimum((first + block) * length, total))
    mine = before(rank * length) + jnp.arange(most, dtype=jnp.int32)
    here = mine < before((rank + 1) * length)
    kept = jnp.where(here, position(mine) - rank * length, length)

    count = min(block * most, -(-block * length // w) * -(-w // r))
    number = jnp.minimum(base + jnp.arange(count, dtype=jnp.int32), jnp.maximum(end - 1, 0))
    owner = jnp.clip(position(number) // length, first, first + block - 1)
    keys = (owner - first) * most + jnp.clip(number - before(owner * length), 0, most - 1)

    segment = mine // jnp.maximum(per, 1)
    stop = mine + 1 if is_causal else jnp.minimum((segment + 1) * per, end)
    start, stop = (jnp.where(here, x - base, 0).astype(jnp.int32) for x in (segment * per, stop))
    return _Plan(block, kept, keys, start, stop)
