"""Context parallelism: one sequence's queries, keys and values spread over the devices of a mesh axis."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from heddle.attention.attend import Implementation, attend, check, choose, score_scale
from heddle.attention.balance import permute as permute_tokens
from heddle.attention.balance import unpermute as unpermute_tokens
from heddle.attention.mask import Mask
from heddle.attention.merge import merge
from heddle.attention.ring import prefix_apart, ring_backward, ring_forward

from .batching import vary_alike

__all__ = ["context_attend", "permute_tokens", "shard", "to_natural_order", "unpermute_tokens", "unshard"]

#: Of a PartitionSpec: the mesh axis or axes that one axis of an array is spread over.
Axes = str | tuple[str, ...] | None

_PAD = "; pad the sequence with padding tokens"


@overload
def context_attend(
    query: Array, key: Array, value: Array, mask: Mask | None, axis: str,
    method: Literal["all_gather", "ring"] = "all_gather", *,
    mesh: Mesh | AbstractMesh | None = None, batch_axis: Axes = None, head_axis: Axes = None,
    kv_order: Array | None = None, scale: float | None = None, implementation: str | None = None,
    return_lse: Literal[False] = False,
) -> Array: ...  # fmt: skip
@overload
def context_attend(
    query: Array, key: Array, value: Array, mask: Mask | None, axis: str,
    method: Literal["all_gather", "ring"] = "all_gather", *,
    mesh: Mesh | AbstractMesh | None = None, batch_axis: Axes = None, head_axis: Axes = None,
    kv_order: Array | None = None, scale: float | None = None, implementation: str | None = None,
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...  # fmt: skip
def context_attend(
    query: Float[Array, "batch q_len heads dim"],
    key: Float[Array, "batch kv_len kv_heads dim"],
    value: Float[Array, "batch kv_len kv_heads value_dim"],
    mask: Mask | None,
    axis: str,
    method: str = "all_gather",
    *,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axis: Axes = None,
    head_axis: Axes = None,
    kv_order: Int[Array, "order_rows all_kv"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
):
    """:func:`heddle.attend` with the sequence spread over the devices of a mesh axis.

    On whole arrays, with or without jit, it says what :func:`heddle.attend` says, and each device computes its queries'
    part. Within a :func:`jax.shard_map` over ``axis`` it takes the device's own parts; there ``q_len`` and ``kv_len``
    are theirs. Differentiable; a key's gradient comes back to the device that holds it, summed in float32 (float64
    for float64) over the devices whose queries saw it.

    Args:
        query: the queries, in any order (see :mod:`heddle.attention.balance`); device ``r`` of ``axis`` holds the
            ``r``-th equal part.
        key, value: the keys, in natural order, in equal parts likewise.
        mask: of the queries given, in their order, over all devices' keys; None: all see all.
        axis: the mesh axis that the sequence is spread over.
        method: ``"all_gather"`` collects all keys and values first; ``"ring"`` passes them on from device to device
            while it computes and never holds more than two parts (arXiv 2310.01889).
        mesh: the mesh; None: that of :func:`jax.set_mesh`, else the one query lies on.
        batch_axis, head_axis: further mesh axes, or tuples of them, that the batch and the heads are spread over. None:
            of explicit axes, what query's type says; else none, and devices along other axes of the mesh all compute
            the same. A single key head is given to all devices of ``head_axis``.
        kv_order: the order that key and value are in, of all of them, ``(batch | 1, kv_len)``, whole on every device;
            the mask's keys stay those of the natural order. With ``all_gather`` alone. None: the natural order.
        scale, implementation, return_lse: as of :func:`heddle.attend`.

    Returns:
        as :func:`heddle.attend`, spread as query is.

    Raises:
        ValueError: arguments that disagree; an axis that the mesh hasn't; lengths, a batch or heads that the devices
            can't share equally; within a shard_map, one that leaves other axes of the mesh to the compiler.
        NotImplementedError: the named implementation doesn't serve this case.
    """
    if method not in ("all_gather", "ring"):
        raise ValueError(f"method must be 'all_gather' or 'ring', got {method!r}")
    if kv_order is not None and method == "ring":
        raise ValueError("method must be 'all_gather' where kv_order is given, got 'ring'")
    if _within_shard_map(axis):
        for name, given in {"mesh": mesh, "batch_axis": batch_axis, "head_axis": head_axis}.items():
            if given is not None:
                raise ValueError(f"{name} must be None within a shard_map over {axis!r}, got {given!r}")
        if mask is None:
            mask = Mask.full(query.shape[1], lax.axis_size(axis) * key.shape[1], like=query)
        mask = check(query, key, value, mask)
        out, lse = _attend(query, key, value, mask, kv_order, axis, method, score_scale(query, scale), implementation)
        return (out, lse) if return_lse else out

    mask = check(query, key, value, mask)
    over = _mesh_of(axis, mesh, query)
    batch_axis, head_axis = (
        jax.typeof(query).sharding.spec[i] if given is None else given for i, given in ((0, batch_axis), (2, head_axis))
    )
    for name, array in {"query": query, "key": key}.items():
        _check_share(f"{name}'s batch", array.shape[0], batch_axis, over)
        _check_share(f"{name}'s length", array.shape[1], axis, over, _PAD)
        if name == "query" or key.shape[2] > 1:
            _check_share(f"{name}'s heads", array.shape[2], head_axis, over)
    out, lse = _spread_attend(
        query, key, value, mask, kv_order, mesh=over, spec=PartitionSpec(batch_axis, axis, head_axis), axis=axis,
        method=method, scale=score_scale(query, scale), implementation=implementation,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def shard(
    x: Any,
    axis: str,
    order: Int[np.ndarray, " seq"] | None = None,
    *,
    mesh: Mesh | None = None,
    batch_axis: Axes = None,
) -> Any:
    """Arrays ``(batch, seq, ...)``, a :class:`heddle.Mask`, or a tuple of them, spread over ``axis`` along axis 1.

    Whole arrays stay whole, now in ``order`` and each device with its part of them; within a :func:`jax.shard_map` over
    ``axis`` it is this device's part. ``order`` (from :mod:`heddle.attention.balance`) says which positions each device
    holds: give it for queries, their positions, labels and mask, not for keys and values, which stay in natural order.

    Args:
        order: the positions in the order of the devices; None: as they are.
        mesh: the mesh; None: that of :func:`jax.set_mesh`.
        batch_axis: mesh axes that the batch is spread over; None: none.

    Raises:
        ValueError: a length that the devices can't share equally; an order of another length.
    """
    if isinstance(x, tuple):
        return tuple(shard(part, axis, order, mesh=mesh, batch_axis=batch_axis) for part in x)
    length = x.q_len if isinstance(x, Mask) else x.shape[1]
    if order is not None and len(order) != length:
        raise ValueError(f"order must have the {length} positions along axis 1, got {len(order)}")
    rows = np.arange(length) if order is None else np.asarray(order)

    if _within_shard_map(axis):
        around = jax.sharding.get_abstract_mesh()
        _check_share("the length along axis 1", length, axis, around, _PAD)
        mine = jnp.asarray(rows.reshape(around.shape[axis], -1))[lax.axis_index(axis)]
        return x.on(mine).take(mine) if isinstance(x, Mask) else jnp.take(x, mine, axis=1)

    over = _mesh_of(axis, mesh)
    _check_share("the length along axis 1", length, axis, over, _PAD)
    if order is not None:
        x = x.take(rows) if isinstance(x, Mask) else permute_tokens(x, rows)
    # Each is for one type of axis: under jit, with automatic axes, device_put moves nothing.
    place = jax.device_put if _is_explicit(over, axis) else lax.with_sharding_constraint

    batch = x.start.shape[0] if isinstance(x, Mask) else x.shape[0]
    batch_axis = None if isinstance(x, Mask) and batch == 1 else batch_axis
    _check_share("the batch", batch, batch_axis, over)
    spec = PartitionSpec(batch_axis, axis)
    sharding = spec if mesh is None else NamedSharding(mesh, spec)
    return jax.tree.map(lambda array: place(array, sharding), x)


def unshard(x: Any, axis: str, order: Int[np.ndarray, " seq"] | None = None) -> Any:
    """Undo :func:`shard`, of arrays or tuples of them: the whole, in natural order.

    Within a :func:`jax.shard_map` every device gets the whole, and the gradients of all devices' wholes add up.
    """
    if isinstance(x, tuple):
        return tuple(unshard(part, axis, order) for part in x)
    if _within_shard_map(axis):
        x = _gather(x, axis)
    elif (explicit := jax.typeof(x).sharding).spec[1] is not None:
        batch, _, *rest = explicit.spec
        x = jax.sharding.reshard(x, NamedSharding(explicit.mesh, PartitionSpec(batch, None, *rest)))
    return x if order is None else unpermute_tokens(x, order)


def to_natural_order(
    x: Float[Array, "batch seq hidden"],
    order: Int[Array, "order_rows seq"],
    axis: str,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axis: Axes = None,
) -> Float[Array, "batch seq hidden"]:
    """:func:`unshard`'s order, but still spread: rows that were in ``order`` (each in its own, which may be traced).

    Args:
        order: ``(batch | 1, seq)``, the positions in the order they are in.
        axis, mesh, batch_axis: as of :func:`shard`.
    """
    rows = PartitionSpec(batch_axis)
    order_spec = PartitionSpec() if order.shape[0] == 1 else rows
    spread = PartitionSpec(batch_axis, axis)

    def local(x, order):
        mine = jnp.argsort(order, axis=1).reshape(order.shape[0], -1, x.shape[1])[:, lax.axis_index(axis)]
        return _take(_gather(x, axis), mine)

    return jax.shard_map(local, mesh=_mesh_of(axis, mesh, x), in_specs=(spread, order_spec), out_specs=spread)(x, order)


# ---------------------------------------------------------------- meshes


def _within_shard_map(axis: str) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return False
    _check_axis(axis, mesh)
    left = [n for n, size in mesh.shape.items() if n not in mesh.manual_axes and (size > 1 or n == axis)]
    if left:
        raise ValueError(f"the shard_map around must be over all axes of the mesh, it leaves out {left}")
    return True


def _mesh_of(axis: str, mesh: Mesh | AbstractMesh | None, array: Any = None) -> Any:
    """The mesh given, or around, or that ``array`` lies on, if it has ``axis``."""
    context = jax.sharding.get_abstract_mesh()
    found: Any = mesh or (context if array is None or not context.empty else jax.typeof(array).sharding.mesh)
    if found.empty:
        raise ValueError(f"mesh must be given: no jax.set_mesh, shard_map or array around has axis {axis!r}; got None")
    _check_axis(axis, found)
    return found


def _check_axis(axis: str, mesh: Mesh | AbstractMesh) -> None:
    if axis not in mesh.shape:
        raise ValueError(f"axis must be one of the mesh's {', '.join(map(repr, mesh.shape))}, got {axis!r}")


def _is_explicit(mesh: Mesh | AbstractMesh, axis: str) -> bool:
    return mesh.axis_types[mesh.axis_names.index(axis)] == AxisType.Explicit


def _check_share(what: str, size: int, axes: Axes, mesh: Mesh | AbstractMesh, remedy: str = "") -> None:
    names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    for name in names:
        if name not in mesh.shape:
            raise ValueError(f"{what} can't be spread over {name!r}: the mesh has {', '.join(map(repr, mesh.shape))}")
    devices = math.prod(mesh.shape[name] for name in names)
    if size % devices:
        raise ValueError(f"{what} must be a multiple of the {devices} devices of {axes!r}, got {size}{remedy}")


@partial(jax.jit, static_argnames=("mesh", "spec", "axis", "method", "scale", "implementation"))
def _spread_attend(query, key, value, mask, kv_order, *, mesh, spec, axis, method, scale, implementation):
    """:func:`_attend` over a mesh, of whole arrays; ``spec`` is the query's."""
    batch, _, heads = spec
    kv_spec = PartitionSpec(batch, axis, None if key.shape[2] == 1 else heads)
    mask_spec = PartitionSpec(None if mask.start.shape[0] == 1 else batch, axis)
    order_spec = PartitionSpec(None if kv_order is None or kv_order.shape[0] == 1 else batch)
    if _is_explicit(mesh, axis):  # where nothing is moved unless one says so, and a mask may come from anywhere
        mask = jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, mask_spec)), mask)
    local = partial(_attend, axis=axis, method=method, scale=scale, implementation=implementation)
    in_specs = spec, kv_spec, kv_spec, mask_spec, order_spec
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(spec, spec))(query, key, value, mask, kv_order)


# ---------------------------------------------------------------- on each device


def _attend(
    query: Array, key: Array, value: Array, mask: Mask, kv_order: Array | None, axis: str, method: str, scale: float,
    implementation: str | None,
) -> tuple[Array, Array]:  # fmt: skip
    """This device's queries over the keys of all devices of ``axis``."""
    if method == "all_gather":
        key, value = _gather(key, axis), _gather(value, axis)
        if kv_order is not None:
            key, value = _in_order(key, kv_order), _in_order(value, kv_order)
        return attend(query, key, value, mask, scale=scale, implementation=implementation, return_lse=True)
    chosen = choose(query, key, value, mask, implementation)
    # As custom_vjp wants it, also where the caller's arrays are the same on all devices of some axis.
    query, key, value, mask, _ = vary_alike(query, key, value, mask, lax.axis_index(axis))
    if not mask.prefix:
        return _ring(query, key, value, mask, axis, scale, chosen)  # type: ignore[return-value]
    # The keys of the prefix are few: all devices get them, as one more part; the ring has what lies behind them.
    first = min(mask.prefix, key.shape[1])
    keys, values = (_gather(x[:, :first], axis)[:, : mask.prefix] for x in (key, value))  # type: ignore[index]
    behind, prefix = prefix_apart(mask)
    ring: Any = _ring(query, key, value, behind, axis, scale, chosen)
    part = attend(query, keys, values, prefix, scale=scale, implementation=implementation, return_lse=True)
    return merge([ring, part])


@jax.custom_vjp
def _in_order(x: Array, order: Array) -> Array:
    """``x (batch, seq, ...)``, given in ``order (batch | 1, seq)``, in natural order. Backward a gather too."""
    return _take(x, jnp.argsort(order, axis=1))


_in_order.defvjp(lambda x, order: (_in_order(x, order), order), lambda order, d_x: (_take(d_x, order), None))


def _take(x: Array, index: Array) -> Array:
    if index.shape[0] == 1:
        return jnp.take(x, index[0], axis=1)
    return jax.vmap(lambda row, places: jnp.take(row, places, axis=0))(x, index)


def _wide(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


#: Equal groups of a mesh axis's devices, by their indices; None: one group.
Groups = tuple[tuple[int, ...], ...] | None


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, axis: str, groups: Groups = None) -> Array:
    """All parts of this device's group along axis 1; backward, the sum of its devices' gradients of this one's part."""
    return lax.all_gather(x, axis, axis=1, tiled=True, axis_index_groups=groups)


def _gather_forward(x, axis, groups=None):
    return _gather(x, axis, groups), None


def _gather_backward(axis, groups, _, d_whole):
    d_part = lax.psum_scatter(
        d_whole.astype(_wide(d_whole.dtype)), axis, scatter_dimension=1, tiled=True, axis_index_groups=groups
    )
    return (d_part.astype(d_whole.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _ring(
    query: Array, key: Array, value: Array, mask: Mask, axis: str, scale: float, implementation: Implementation
) -> tuple[Array, Array]:
    def run(query, key, value, mask):
        out, lse = implementation.run(query, key, value, mask, scale)
        return out.astype(_wide(out.dtype)), lse  # rounded once, after the last part

    rank, ranks = lax.axis_index(axis), lax.axis_size(axis)
    out, lse = ring_forward(query, key, value, mask, rank=rank, ranks=ranks, attend=run, send=_sender(axis))
    return out.astype(query.dtype), lse


def _ring_saved(query, key, value, mask, axis, scale, implementation):
    out, lse = _ring(query, key, value, mask, axis, scale, implementation)  # type: ignore[misc]
    return (out, lse), (query, key, value, mask, out, lse)


def _ring_backward(axis, scale, implementation, saved, cotangents):
    def run(query, key, value, mask, *arrays):
        return implementation.backward(query, key, value, mask, scale, *arrays)

    rank, ranks = lax.axis_index(axis), lax.axis_size(axis)
    d_inputs = ring_backward(*saved, *cotangents, rank=rank, ranks=ranks, backward=run, send=_sender(axis))
    return *d_inputs, None


_ring.defvjp(_ring_saved, _ring_backward)


def _sender(axis: str):
    """See :data:`heddle.attention.ring.Send`. Nothing waits for what was sent until it is used, so that XLA computes
    meanwhile."""
    ranks = lax.axis_size(axis)
    to_next = [(rank, (rank + 1) % ranks) for rank in range(ranks)]

    def send(arrays: tuple[Array, ...]):
        received = lax.ppermute(arrays, axis, to_next) if ranks > 1 else arrays
        return lambda: received

    return send
