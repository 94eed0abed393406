"""Attention over arrays that are mapped (vmap), sharded over devices (jit), or varying over them (shard_map)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from heddle.attention.mask import Mask


def vary_alike(*arrays: Any) -> Any:
    """The arrays, each varying over all mesh axes that any varies over: under shard_map, what a loop carries must vary
    alike before and after a turn. The compiled program has no trace of it."""
    zero = jnp.zeros((), jnp.int32)
    for x in jax.tree.leaves(arrays):
        zero += jnp.zeros_like(x, shape=(), dtype=jnp.int32)
    return jax.tree.map(lambda x: jnp.where(True, x, zero.astype(x.dtype)), arrays)


def batched(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(mask, query, key, value, *arrays)`` with rules for vmap and for arrays sharded over devices.

    Under vmap the mapped axis joins the batch. JAX's own rule would turn every loop as often as the longest and select,
    each turn, what to keep of its carry.
    """
    folded = custom_vmap(_split_over_devices(function))

    @folded.def_vmap
    def rule(size, mapped, mask, *arrays):
        def expand(x, is_mapped):
            return x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))

        arrays = [expand(*pair) for pair in zip(arrays, mapped[1:], strict=True)]
        batch = arrays[0].shape[1]
        if mapped[0].start or mapped[0].stop or mask.start.shape[0] > 1:
            start, stop = (
                jnp.broadcast_to(x, (size, batch, x.shape[2])).reshape(-1, x.shape[2])
                for x in (expand(mask.start, mapped[0].start), expand(mask.stop, mapped[0].stop))
            )
            mask = Mask(start, stop, mask.prefix)
        results = folded(mask, *(x.reshape(-1, *x.shape[2:]) for x in arrays))
        return tuple(x.reshape(size, batch, *x.shape[1:]) for x in results), (True,) * len(results)

    return folded


def _split_over_devices(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under jit, each device computes the part of the batch and of the heads that it has of the query.

    XLA's own rule would gather the batch everywhere, since a loop over sequences slices it.
    """

    def split(mask, query, key, *arrays):
        one_row, kv_heads = mask.start.shape[0] == 1, key.shape[2]

        def partition(mesh, arguments, results):
            def parts(axes) -> int:
                return math.prod(mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis)

            batch, _, heads, _ = arguments[1].sharding.spec
            batch = None if query.shape[0] % parts(batch) else batch
            heads = None if kv_heads % parts(heads) else heads
            specs = {2: PartitionSpec(None if one_row else batch), 3: PartitionSpec(batch, None, heads)}
            specs[4] = specs[3]
            shardings = jax.tree.map(lambda x: NamedSharding(mesh, specs[len(x.shape)]), (results, arguments))
            return mesh, function, *shardings

        out, lse, q, k, v = "b t h e", "b t h", "b t h d", "b s k d", "b s k e"
        rows = "m t" if one_row else "b t"
        given = [rows, rows, q, k, v, *([out, lse, out, lse] if len(arrays) > 1 else [])]
        made = [q, k, v] if len(arrays) > 1 else [out, lse]
        parted = custom_partitioning(lambda *arguments: function(*arguments))
        parted.def_partition(partition, sharding_rule=f"{', '.join(given)} -> {', '.join(made)}")
        return parted(mask, query, key, *arrays)

    return split
