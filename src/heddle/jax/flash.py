"""``flash_attention`` and its mask in the two styles of kvax: mesh and specs as arguments, or from a context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from heddle.attention.arrays import Array, is_concrete
from heddle.attention.attend import attend, check, score_scale
from heddle.attention.balance import permute, unpermute, zigzag
from heddle.attention.mask import Mask

from . import triton
from .context_parallel import context_attend

T = TypeVar("T")
AxisName = str | None
Spec = Sequence[Any] | PartitionSpec  #: of (batch, sequence, heads, head_dim): each a mesh axis or None
Sharding = tuple[Mesh | AbstractMesh, tuple[AxisName, ...], tuple[AxisName, ...]]  #: mesh, query's spec and keys'

_context: ContextVar[tuple[tuple[AxisName, ...], tuple[AxisName, ...]] | None] = ContextVar("specs", default=None)


@dataclass(frozen=True)
class FlashAttentionParamsConfig:
    """The tile of a Triton kernel, in place of the plan's own (:data:`heddle.kernels.plan.TILES`) for the device.

    Raises:
        ValueError: block sizes that aren't powers of two from 16 on, warps that aren't a power of two up to 16, or
            stages below 1.
    """

    query_block_size: int = 64
    kv_block_size: int = 64
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self):
        for name in ("query_block_size", "kv_block_size"):
            if (size := getattr(self, name)) < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two from 16 on, got {size}")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps must be a power of two up to 16, got {self.num_warps}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages must be at least 1, got {self.num_stages}")


@contextlib.contextmanager
def attention_specs(query_specs: Spec, kv_specs: Spec) -> Iterator[None]:
    """The context style: what is called within takes these specs, and the mesh of :func:`jax.set_mesh`.

    Args:
        query_specs: mesh axes (or None) of query's ``(batch, sequence, heads, head_dim)``. A sequence axis means
            context parallelism.
        kv_specs: of key and value likewise. Their sequence is None, or query's axis; both mean the same, as every
            device gathers the keys.

    Raises:
        ValueError: specs that aren't four, or that disagree.
    """
    token = _context.set(_checked_specs(query_specs, kv_specs))
    try:
        yield
    finally:
        _context.reset(token)


def create_attention_mask(
    query_positions: Int[Array, "batch q_len"],
    query_segment_ids: Int[Array, "batch q_len"],
    kv_positions: Int[Array, "batch kv_len"],
    kv_segment_ids: Int[Array, "batch kv_len"],
    fwd_params: FlashAttentionParamsConfig | None = None,
    bwd_params: FlashAttentionParamsConfig | None = None,
    calc_bwd_mask: bool = False,
    skip_pad_tokens: bool = True,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    query_spec: Spec | None = None,
    kv_spec: Spec | None = None,
) -> Mask:
    """The mask of causal packed documents: :meth:`heddle.Mask.documents`. Once for all layers.

    A :class:`heddle.Mask` serves any blocks, forward and backward, and padding is never computed; so ``fwd_params``,
    ``bwd_params``, ``calc_bwd_mask`` and ``skip_pad_tokens`` are accepted for the calls' sake and change nothing.

    Args:
        query_positions, query_segment_ids: the queries' positions and documents, in any order;
            :data:`heddle.PADDING_SEGMENT_ID` is padding, every other id any non-negative integer.
        kv_positions, kv_segment_ids: the keys' likewise, each document contiguous and in order of position.
        mesh, query_spec, kv_spec: as of :func:`flash_attention`, and only checked here.

    Raises:
        ValueError: shapes that disagree, a mesh or specs that are missing; ids that no interval can say.
    """
    _sharding(mesh, query_spec, kv_spec)
    return Mask.documents(query_segment_ids, kv_segment_ids, query_positions, kv_positions)


def flash_attention(
    query: Float[Array, "batch q_len heads dim"],
    key: Float[Array, "batch kv_len kv_heads dim"],
    value: Float[Array, "batch kv_len kv_heads value_dim"],
    query_positions: Int[Array, "batch q_len"] | None,
    query_segment_ids: Int[Array, "batch q_len"],
    kv_positions: Int[Array, "batch kv_len"] | None,
    kv_segment_ids: Int[Array, "batch kv_len"],
    mask: Mask | None = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    query_spec: Spec | None = None,
    kv_spec: Spec | None = None,
    scale: float | Float[Array, ""] = 1.0,
    fwd_params: FlashAttentionParamsConfig | None = None,
    bwd_params: FlashAttentionParamsConfig | None = None,
    assume_sequential_positions: bool = False,
    memory_optimized_gqa_backward: bool = False,
    permute_tokens_for_load_balance: bool = True,
    implementation: str | None = None,
) -> Float[Array, "batch q_len heads value_dim"]:
    """:func:`heddle.attend` for causal packed documents, on one device or over a mesh, as kvax calls it.

    Args:
        query, key, value: as of :func:`heddle.attend`.
        query_positions, query_segment_ids, kv_positions, kv_segment_ids: as of :func:`create_attention_mask`; read only
            where ``mask`` is None.
        mask: from :func:`create_attention_mask`, or any :class:`heddle.Mask` of these queries in their order over the
            keys in natural order. None: made here.
        mesh: the clean style. None: that of :func:`jax.set_mesh` if there are specs, else everything is one device's.
        query_spec, kv_spec: as of :func:`attention_specs`, in whose place they stand.
        scale: of the scores. 1.0, not ``dim ** -0.5`` as :func:`heddle.attend` has it.
        fwd_params, bwd_params: tiles of the ``triton`` kernels in place of the plan's; no other implementation has any.
            Of the backward's, dK/dV takes the tile as it is and dQ with queries and keys changed over.
        assume_sequential_positions: the positions are the tokens' indices, whatever ``query_positions`` and
            ``kv_positions`` say (they may be None): as ``is_causal`` of :func:`jax.nn.dot_product_attention`.
        memory_optimized_gqa_backward: dK and dV of grouped-query attention without a copy for each query head. The
            kernels always work so; both values do the same.
        permute_tokens_for_load_balance: under context parallelism query, key and value come in the order of
            :func:`permute_tokens_context_parallelism`, as from a model whose tokens were permuted; key and value are
            put back into natural order here, which ``kv_positions`` and ``kv_segment_ids`` have all the while.
        implementation: as of :func:`heddle.attend`.

    Returns:
        in query's dtype and order.

    Raises:
        ValueError: arguments that disagree; specs without a mesh, or a mesh without specs.
        NotImplementedError: the named implementation doesn't serve this case.
    """
    sharding = _sharding(mesh, query_spec, kv_spec)
    axis = None if sharding is None else sharding[1][1]
    if sharding is not None and sharding[1][2] != sharding[2][2] and key.shape[2] > 1:
        raise ValueError(
            "the query and kv specs must have one axis of heads, so that each query head meets its key head; "
            f"got {sharding[1][2]!r} and {sharding[2][2]!r}"
        )
    order = None
    if sharding is not None and axis is not None and permute_tokens_for_load_balance:
        ranks = sharding[0].shape[axis]
        order = zigzag(query.shape[1], ranks)
        key, value = unpermute((key, value), zigzag(key.shape[1], ranks))
    if mask is None:
        if assume_sequential_positions:
            query_positions, kv_positions = (
                jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2]) for x in (query, key)
            )
            query_positions = query_positions if order is None else permute(query_positions, order)
        if query_positions is None or kv_positions is None:
            raise ValueError("query_positions and kv_positions must be given unless assume_sequential_positions")
        mask = Mask.documents(query_segment_ids, kv_segment_ids, query_positions, kv_positions)
    mask = check(query, key, value, mask)
    if isinstance(scale, jax.Array) and is_concrete(scale):
        scale = float(scale)
    return _flash_attention(
        query, key, value, mask, sharding=sharding, scale=score_scale(query, scale),  # type: ignore[arg-type]
        tiles=_tiles(fwd_params, bwd_params), implementation=implementation,
    )  # fmt: skip


def permute_tokens_context_parallelism(inputs: T, mesh: Mesh | AbstractMesh | None = None) -> T:
    """An array or a tuple of arrays ``(batch, seq, ...)`` in zigzag order over the devices of the context axis.

    The axis is the sequence's in :func:`attention_specs`. See :func:`heddle.attention.balance.zigzag`, and
    :func:`heddle.attention.balance.by_area`, which balances packed documents too.

    Raises:
        ValueError: no :func:`attention_specs`, or without a sequence axis; no mesh; a length that isn't a multiple of
            twice the devices.
    """
    return permute(inputs, _zigzag(inputs, mesh))


def unpermute_tokens_context_parallelism(inputs: T, mesh: Mesh | AbstractMesh | None = None) -> T:
    """Undo :func:`permute_tokens_context_parallelism`."""
    return unpermute(inputs, _zigzag(inputs, mesh))


def _zigzag(inputs: Any, mesh: Mesh | AbstractMesh | None) -> Any:
    sharding = _sharding(mesh, None, None)
    if sharding is None or sharding[1][1] is None:
        raise ValueError("tokens are permuted over the sequence axis of attention_specs, and there is none here")
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    return zigzag(first.shape[1], sharding[0].shape[sharding[1][1]])


# ---------------------------------------------------------------- meshes and specs


def _checked_specs(query_spec: Spec, kv_spec: Spec) -> tuple[tuple[AxisName, ...], tuple[AxisName, ...]]:
    query_spec, kv_spec = tuple(query_spec), tuple(kv_spec)
    for name, spec in {"query": query_spec, "kv": kv_spec}.items():
        if len(spec) != 4:
            raise ValueError(f"the {name} specs must be four (batch, sequence, heads, head_dim), got {spec}")
        if spec[3] is not None:
            raise ValueError(f"the {name} specs must leave head_dim whole (None), got {spec}")
    if query_spec[0] != kv_spec[0]:
        raise ValueError(f"the query and kv specs must have one batch axis, got {query_spec[0]!r} and {kv_spec[0]!r}")
    if kv_spec[1] not in (None, query_spec[1]):
        raise ValueError(f"the kv specs' sequence must be None or the queries' axis, got {kv_spec} and {query_spec}")
    if isinstance(query_spec[1], tuple):
        raise ValueError(f"the query specs' sequence must be one mesh axis or None, got {query_spec[1]!r}")
    return query_spec, kv_spec


def _sharding(mesh: Mesh | AbstractMesh | None, query_spec: Spec | None, kv_spec: Spec | None) -> Sharding | None:
    """Mesh and specs from the arguments or the context; None where there are no specs: one device."""
    if (query_spec is None) != (kv_spec is None):
        raise ValueError(f"query_spec and kv_spec must be given both or neither, got {query_spec} and {kv_spec}")
    specs = _context.get() if query_spec is None or kv_spec is None else _checked_specs(query_spec, kv_spec)
    if specs is None:
        if mesh is not None:
            raise ValueError("query_spec and kv_spec must be given with a mesh, or attention_specs be around; got None")
        return None
    found = mesh if mesh is not None else jax.sharding.get_abstract_mesh()
    if found.empty:
        raise ValueError("mesh must be given where there are specs, or jax.set_mesh be around; got None")
    for name in (name for spec in specs for axes in spec for name in (axes if isinstance(axes, tuple) else (axes,))):
        if name is not None and name not in found.shape:
            raise ValueError(f"the specs must name axes of the mesh, {', '.join(found.shape)}; got {name!r}")
    return found, *specs


# ---------------------------------------------------------------- computation

Tiles = tuple[tuple[str, tuple[int, int, int, int]], ...]


def _tiles(forward: FlashAttentionParamsConfig | None, backward: FlashAttentionParamsConfig | None) -> Tiles:
    """By kernel, the tiles to take in place of the plan's."""
    tiles = []
    if forward is not None:
        rest = forward.num_warps, forward.num_stages
        tiles.append(("forward", (forward.query_block_size, forward.kv_block_size, *rest)))
    if backward is not None:
        rest = backward.num_warps, backward.num_stages
        tiles.append(("backward_kv", (backward.query_block_size, backward.kv_block_size, *rest)))
        tiles.append(("backward_q", (backward.kv_block_size, backward.query_block_size, *rest)))
    return tuple(tiles)


def _override(tiles: Tiles) -> contextlib.AbstractContextManager:
    if not tiles or not triton.INSTALLED:
        return contextlib.nullcontext()
    from heddle.kernels import plan

    return plan.override(**{kernel: plan.Tile(*tile) for kernel, tile in tiles})


# Jitted with the tiles in the key: they are read while JAX traces.
@partial(jax.jit, static_argnames=("sharding", "scale", "tiles", "implementation"))
def _flash_attention(
    query: Array, key: Array, value: Array, mask: Mask, *,
    sharding: Sharding | None, scale: float, tiles: Tiles, implementation: str | None,
) -> Array:  # fmt: skip
    with _override(tiles):
        if sharding is None:
            return attend(query, key, value, mask, scale=scale, implementation=implementation)
        mesh, (batch, axis, heads, _), (_, _, kv_heads, _) = sharding
        specs = {
            "query": PartitionSpec(batch, axis, heads),
            "kv": PartitionSpec(batch, axis, kv_heads),
            "mask": PartitionSpec(None if mask.start.shape[0] == 1 else batch, axis),
        }

        def local(query, key, value, mask):
            if axis is None:
                return attend(query, key, value, mask, scale=scale, implementation=implementation)
            return context_attend(query, key, value, mask, axis, scale=scale, implementation=implementation)

        in_specs = specs["query"], specs["kv"], specs["kv"], specs["mask"]
        arrays = (query, key, value, mask)
        if AxisType.Explicit in mesh.axis_types:  # where nothing is moved unless one says so
            arrays = tuple(
                jax.tree.map(lambda x, spec=spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)), array)
                for array, spec in zip(arrays, in_specs, strict=True)
            )
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=specs["query"])(*arrays)
