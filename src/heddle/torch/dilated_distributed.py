"""Dilated attention of a sequence that is spread over processes: arXiv 2307.02486, section 3."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from heddle.attention.dilated import Pattern, dilated_forward
from heddle.attention.mask import Mask
from heddle.attention.merge import merge

from .dilated import DilatedAttention, MultiheadDilatedAttention
from .parallel import _gather, _process_group


class DistributedDilatedAttention(DilatedAttention):
    """Dilated attention of a sequence that is spread over processes, each holding an equal, consecutive part.

    arXiv 2307.02486, section 3.1: patterns whose segments lie within a part need nothing from elsewhere. Of the others
    each process sends the keys and values it keeps, to the processes that share a segment with it alone; gradients come
    back summed. So what is sent doesn't grow with the length if ``w / r`` doesn't.

    Args:
        group: the processes, a ProcessGroup or a one-dimensional DeviceMesh; None: all.
        segment_lengths, dilation_rates, softmax_scale, attention_dropout, op: as of :class:`DilatedAttention`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        op: str | None = None,
        group: ProcessGroup | DeviceMesh | None = None,
    ):
        super().__init__(segment_lengths, dilation_rates, softmax_scale, attention_dropout, op)
        if group is None and not dist.is_initialized():
            raise ValueError("group must be given, or torch.distributed be initialized before")
        self.group: Any = dist.group.WORLD if group is None else _process_group(group)
        self._groups: dict[range, Any] = {range(dist.get_world_size(self.group)): self.group}

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool,
        segment_ids: Tensor | None, key_padding_mask: Tensor | None, scale: float,
    ) -> Tensor:  # fmt: skip
        if segment_ids is not None or key_padding_mask is not None:
            raise NotImplementedError("documents and padding are not spread over processes: give whole sequences")

        def one(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
            return self._one_set(query, key, value, mask, scale)

        length, ranks = query.shape[1], dist.get_world_size(self.group)
        blocks = {pattern: min(math.lcm(pattern.length, length) // length, ranks) for pattern in self.patterns}
        local = [pattern for pattern in self.patterns if blocks[pattern] == 1]
        parts = []
        if local:
            out, lse = dilated_forward(query, key, value, local, is_causal, None, None, attend=one)
            parts.append((out.to(lse.dtype), lse))
        for pattern in self.patterns:
            if blocks[pattern] > 1:
                parts.append(self._across(query, key, value, pattern, blocks[pattern], is_causal, one))
        return merge(parts)[0].to(query.dtype)

    def _across(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, block: int, is_causal: bool,
        attend: Callable[[Tensor, Tensor, Tensor, Mask], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One pattern whose segments reach over ``block`` processes: ``(out, lse)`` of the local queries."""
        (batch, length, heads, _), group = query.shape, query.shape[2] // key.shape[2]
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        first = rank // block * block
        members = range(first, min(first + block, ranks))
        plan = _plan(pattern, length, heads, rank, members, is_causal)
        device = query.device

        def by_head(x: Tensor, index: np.ndarray, share: int) -> Tensor:  # (batch, heads, kept, dim)
            rows = torch.as_tensor(index, device=device)
            return torch.stack([x[:, rows[head], head // share] for head in range(heads)], dim=1)

        pairs = torch.cat([by_head(key, plan.sent, group), by_head(value, plan.sent, group)], dim=-1)
        pairs = _gather(pairs.transpose(1, 2), self._subgroup(members))
        # Heads stand in the batch: each sees keys of its own.
        pairs = by_head(pairs, plan.keys, 1).flatten(0, 1)[:, :, None]
        keys, values = pairs.split([key.shape[3], value.shape[3]], dim=-1)
        mask = Mask(np.tile(plan.start, (batch, 1)), np.tile(plan.stop, (batch, 1)))
        part = attend(by_head(query, plan.sent, 1).flatten(0, 1)[:, :, None], keys, values, mask.on(query))
        wide = part[1].dtype
        out = torch.zeros(batch, length, heads, value.shape[3], dtype=wide, device=device)
        lse = torch.full((batch, length, heads), -torch.inf, dtype=wide, device=device)
        outs, lses = ([*x.unflatten(0, (batch, heads)).squeeze(3).unbind(1)] for x in part)
        for head, count in enumerate(plan.counts):
            rows = torch.as_tensor(plan.sent[head, :count], device=device)
            outs[head] = out[:, :, head].index_copy(1, rows, outs[head][:, :count].to(wide))
            lses[head] = lse[:, :, head].index_copy(1, rows, lses[head][:, :count])
        return torch.stack(outs, dim=2), torch.stack(lses, dim=2)

    def _subgroup(self, members: range) -> ProcessGroup:
        """The processes of one block; made when first needed, by its members alone."""
        if members not in self._groups:
            ranks = [dist.get_global_rank(self.group, member) for member in members]
            self._groups[members] = dist.new_group(ranks, use_local_synchronization=True)
        return self._groups[members]


class _Plan(NamedTuple):
    """What one process sends and asks of one pattern, by head."""

    sent: Int[np.ndarray, "heads kept"]  #: places of its part it keeps; as many as any member keeps, some repeated
    counts: list[int]  #: how many of them count
    keys: Int[np.ndarray, "heads keys"]  #: places among all that was gathered, in order of position
    start: Int[np.ndarray, "heads kept"]
    stop: Int[np.ndarray, "heads kept"]


@functools.lru_cache(maxsize=64)
def _plan(pattern: Pattern, length: int, heads: int, rank: int, members: range, is_causal: bool) -> _Plan:
    (w, r), offsets = pattern, np.arange(heads) % pattern.rate
    position = np.arange(members.start * length, members.stop * length)
    is_kept = position % w % r == offsets[:, None]
    counts = is_kept.reshape(heads, len(members), length).sum(-1)
    most, mine = max(1, counts.max()), members.index(rank)
    sent, keys, start, stop = (np.zeros((heads, n), np.int64) for n in (most, max(1, counts.sum(1).max()), most, most))
    for head in range(heads):
        kept = position[is_kept[head]]
        own = position[mine * length : (mine + 1) * length][is_kept[head, mine * length : (mine + 1) * length]]
        sent[head, : len(own)] = own - rank * length
        places = [member * most + np.arange(count) for member, count in enumerate(counts[head])]
        keys[head, : len(kept)] = np.concatenate(places)
        start[head, : len(own)] = np.searchsorted(kept, own // w * w)
        end = own + 1 if is_causal else (own // w + 1) * w
        stop[head, : len(own)] = np.searchsorted(kept, end)
    return _Plan(sent, counts[:, mine].tolist(), keys, start.astype(np.int32), stop.astype(np.int32))


class DistributedMultiheadDilatedAttention(MultiheadDilatedAttention):
    """:class:`MultiheadDilatedAttention` over :class:`DistributedDilatedAttention`, whose ``group`` it takes too."""

    attention_type = DistributedDilatedAttention
