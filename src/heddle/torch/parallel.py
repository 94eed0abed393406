"""Context parallelism: one sequence's queries, keys and values spread over processes."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from heddle.attention.attend import Implementation, attend, check, choose, score_scale
from heddle.attention.balance import permute as permute_tokens
from heddle.attention.balance import unpermute as unpermute_tokens
from heddle.attention.mask import Mask
from heddle.attention.merge import merge
from heddle.attention.ring import prefix_apart, ring_backward, ring_forward

__all__ = ["context_attend", "permute_tokens", "shard", "unpermute_tokens", "unshard"]

# torch 2.13 gave it another name, and warns of the old one.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor


@overload
def context_attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, group: DeviceMesh | ProcessGroup,
    method: Literal["all_gather", "ring"] = "all_gather", *,
    scale: float | None = None, implementation: str | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def context_attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, group: DeviceMesh | ProcessGroup,
    method: Literal["all_gather", "ring"] = "all_gather", *,
    scale: float | None = None, implementation: str | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def context_attend(
    query: Float[Tensor, "batch q_len heads dim"],
    key: Float[Tensor, "batch kv_len kv_heads dim"],
    value: Float[Tensor, "batch kv_len kv_heads value_dim"],
    mask: Mask | None,
    group: DeviceMesh | ProcessGroup,
    method: str = "all_gather",
    *,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
):
    """:func:`heddle.attend` of this process's queries over the keys of all processes of ``group``.

    Every process calls it with its own part. Differentiable; a key's gradient comes back to the process that holds it,
    summed in float32 over the processes whose queries saw it.

    Args:
        query: this process's queries, any of the sequence's in any order (see :mod:`heddle.attention.balance`).
        key, value: this process's part of the keys, in natural order: process ``r`` holds ``[r * kv_len, ...)``.
        mask: of this process's queries over all ``ranks * kv_len`` keys; None: all see all.
        group: the processes among whom the sequence is spread: a one-dimensional DeviceMesh or a ProcessGroup.
        method: ``"all_gather"`` collects all keys and values first; ``"ring"`` passes them on from process to process
            while it computes and never holds more than two parts (arXiv 2310.01889).
        scale, implementation, return_lse: as of :func:`heddle.attend`.

    Returns:
        as :func:`heddle.attend`, for this process's queries.

    Raises:
        ValueError: arguments that disagree, or processes with different numbers of keys.
        NotImplementedError: the named implementation doesn't serve this case.
    """
    group = _process_group(group)
    if method not in ("all_gather", "ring"):
        raise ValueError(f"method must be 'all_gather' or 'ring', got {method!r}")
    if mask is None:
        mask = Mask.full(query.shape[1], dist.get_world_size(group) * key.shape[1], like=query)
    mask = check(query, key, value, mask)
    _check_even(mask, key, group)
    if method == "all_gather":
        key, value = _gather(key, group), _gather(value, group)
        out, lse = attend(query, key, value, mask, scale=scale, implementation=implementation, return_lse=True)
    else:
        out, lse = _ring_attend(query, key, value, mask, group, score_scale(query, scale), implementation)  # type: ignore
    return (out, lse) if return_lse else out


def shard(x: Any, group: DeviceMesh | ProcessGroup, order: Int[np.ndarray, " seq"] | None = None) -> Any:
    """This process's part along axis 1 of arrays ``(batch, seq, ...)``, of a :class:`heddle.Mask`, or of a tuple.

    ``order`` (from :mod:`heddle.attention.balance`) says which positions each process holds: give it for queries, their
    positions, labels and mask, not for keys and values, which stay in natural order.

    Raises:
        ValueError: a length that the processes can't share equally.
    """
    group = _process_group(group)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if isinstance(x, tuple):
        return tuple(shard(part, group, order) for part in x)
    length = x.q_len if isinstance(x, Mask) else x.shape[1]
    if length % ranks:
        raise ValueError(f"the length along axis 1 must be a multiple of the {ranks} processes, got {length}: pad it")
    rows = np.arange(length) if order is None else np.asarray(order)
    if len(rows) != length:
        raise ValueError(f"order must have the {length} positions along axis 1, got {len(rows)}")
    rows = rows.reshape(ranks, -1)[rank]
    if isinstance(x, Mask):
        return x.take(rows)
    return x.index_select(1, torch.as_tensor(rows, device=x.device))


def unshard(x: Any, group: DeviceMesh | ProcessGroup, order: Int[np.ndarray, " seq"] | None = None) -> Any:
    """Undo :func:`shard`: the whole, on every process. Differentiable: gradients of all processes' wholes add up."""
    if isinstance(x, tuple):
        return tuple(unshard(part, group, order) for part in x)
    whole = _gather(x, _process_group(group))
    return whole if order is None else unpermute_tokens(whole, order)


def _process_group(group: DeviceMesh | ProcessGroup) -> ProcessGroup:
    if not isinstance(group, DeviceMesh):
        return group
    if group.ndim != 1:
        raise ValueError(f"group must be a mesh of one dimension, as mesh['context'] is; got {group.mesh_dim_names}")
    return group.get_group()


def _check_even(mask: Mask, key: Tensor, group: ProcessGroup) -> None:
    """All processes hold equally many keys. Compared once a mask: layers share it. Not under torch.compile."""
    if torch.compiler.is_compiling():
        return
    mine = torch.tensor([key.shape[1]], device=key.device)
    lengths = mask.keep(
        ("keys of the processes", group.group_name, key.shape[1]),
        lambda: _all_gather(mine, 0, group).cpu(),
        lambda lengths: lengths,
    )
    if len(set(lengths.tolist())) > 1:
        raise ValueError(f"key must have one length on all processes, got {lengths.tolist()}: pad the sequence")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- all-gather


class _AllGather(torch.autograd.Function):
    """All parts along axis 1; backward, the sum of all processes' gradients of this one's part."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x.contiguous(), 1, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (d_whole,) = grads
        wide = d_whole.to(_wide(d_whole.dtype)).contiguous()
        return collectives.reduce_scatter_tensor(wide, "sum", 1, ctx.group).to(d_whole.dtype), None


def _gather(x: Tensor, group: ProcessGroup) -> Tensor:
    return _AllGather.apply(x, group)  # type: ignore[return-value]


# ---------------------------------------------------------------- ring


@torch.compiler.disable
def _ring_attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, group: ProcessGroup, scale: float, implementation: str | None
) -> tuple[Tensor, Tensor]:
    chosen = choose(query, key, value, mask, implementation)
    if not mask.prefix:
        return _Ring.apply(query, key, value, mask, group, scale, chosen)  # type: ignore[return-value]
    # The keys of the prefix are few: all processes get them, as one more part; the ring has what lies behind them.
    first = min(mask.prefix, key.shape[1])
    keys, values = (_gather(x[:, :first], group)[:, : mask.prefix] for x in (key, value))
    behind, prefix = prefix_apart(mask)
    ring = _Ring.apply(query, key, value, behind, group, scale, chosen)
    part = attend(query, keys, values, prefix, scale=scale, implementation=implementation, return_lse=True)
    return merge([ring, part])  # type: ignore[list-item]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, mask: Mask, group: ProcessGroup, scale: float,
        implementation: Implementation,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        def run(query, key, value, mask):
            out, lse = implementation.run(query, key, value, mask, scale)
            return out.to(_wide(out.dtype)), lse  # rounded once, after the last part

        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        out, lse = ring_forward(query, key, value, mask, rank=rank, ranks=ranks, attend=run, send=_sender(group))
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.mask, ctx.group, ctx.scale, ctx.implementation = mask, group, scale, implementation
        return out, lse

    @staticmethod
    def backward(ctx, *grads: Tensor):
        query, key, value, out, lse = ctx.saved_tensors
        d_out, d_lse = grads

        def run(query, key, value, mask, *arrays):
            return ctx.implementation.backward(query, key, value, mask, ctx.scale, *arrays)

        rank, ranks = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        d_inputs = ring_backward(
            query, key, value, ctx.mask, out, lse, d_out, d_lse,
            rank=rank, ranks=ranks, backward=run, send=_sender(ctx.group),
        )  # fmt: skip
        return *d_inputs, None, None, None, None


def _sender(group: ProcessGroup):
    """See :data:`heddle.attention.ring.Send`: what is on its way goes beside what is computed meanwhile."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))

    def send(arrays: tuple[Tensor, ...]):
        if ranks == 1:
            return lambda: arrays
        arrays = tuple(x.contiguous() for x in arrays)
        received = tuple(torch.empty_like(x) for x in arrays)
        sends = [dist.P2POp(dist.isend, x, after, group) for x in arrays]
        works = dist.batch_isend_irecv([*sends, *(dist.P2POp(dist.irecv, x, before, group) for x in received)])

        def arrive() -> tuple[Tensor, ...]:
            for work in works:
                work.wait()
            del arrays_on_their_way[:]
            return received

        arrays_on_their_way = list(arrays)  # held until they have left
        return arrive

    return send
