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

from heddle.attention.dilated import dilated_forward
from heddle.attention.dilated_grids import document_positions
from heddle.attention.dilated_patterns import Pattern
from heddle.attention.mask import PADDING_SEGMENT_ID, Mask
from heddle.attention.merge import merge

from .dilated import DilatedAttention, MultiheadDilatedAttention
from .parallel import _all_gather, _gather, _process_group


class DistributedDilatedAttention(DilatedAttention):
    """Dilated attention of a sequence that is spread over processes, each holding an equal, consecutive part.

    arXiv 2307.02486, section 3.1: segments that lie within a part need nothing from elsewhere. Of the others each
    process sends the keys and values it keeps, to the processes that share segments alone; gradients come back summed.
    So what is sent doesn't grow with the length if ``w / r`` doesn't.

    Documents and padding are told by each process's part of ``segment_ids`` and ``key_padding_mask``; a document may
    reach over any number of parts. Segments then begin anywhere, and the kept keys of those that reach over a boundary,
    whatever their length, are sent to all processes.

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

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool,
        segment_ids: Tensor | None, key_padding_mask: Tensor | None, scale: float,
    ) -> Tensor:  # fmt: skip
        def one(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
            return self._one_set(query, key, value, mask, scale)

        ids = self._documents(query, segment_ids, key_padding_mask)
        rank, ranks, (length, heads) = dist.get_rank(self.group), dist.get_world_size(self.group), query.shape[1:3]
        local, parts = [], []
        for pattern in self.patterns:
            # Without documents segments and parts begin together again after so many parts.
            block = ranks if ids is not None else min(math.lcm(pattern.length, length) // length, ranks)
            if ids is None and block == 1:
                local.append(pattern)
            else:
                first = rank // block * block
                members = range(first, min(first + block, ranks))
                plan = _plan(pattern, length, heads, rank, members, is_causal, ids)
                parts.append(self._by_plan(query, key, value, plan, _subgroup(self.group, members), one))
        if local:
            out, lse = dilated_forward(query, key, value, local, is_causal, None, None, attend=one)
            parts.append((out.to(lse.dtype), lse))
        return merge(parts)[0].to(query.dtype)

    def _documents(
        self, query: Tensor, segment_ids: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[bytes, int] | None:
        """The whole sequences' documents, -1 for padding, and how many rows they are: a few bytes a token from each."""
        if segment_ids is None and key_padding_mask is None:
            return None
        ids = torch.zeros(query.shape[:2]) if segment_ids is None else segment_ids
        ids = ids.to(device=query.device, dtype=torch.int64)
        if key_padding_mask is not None:
            ids = ids.masked_fill(key_padding_mask.to(query.device), PADDING_SEGMENT_ID)
        return _all_gather(ids.contiguous(), 1, self.group).cpu().numpy().tobytes(), query.shape[0]

    def _by_plan(
        self, query: Tensor, key: Tensor, value: Tensor, plan: _Plan, members: ProcessGroup,
        attend: Callable[[Tensor, Tensor, Tensor, Mask], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``(out, lse)`` of the local queries in one pattern."""
        (batch, length, heads, _), group, device = query.shape, query.shape[2] // key.shape[2], query.device
        rows = torch.arange(batch, device=device)[:, None]

        def by_head(index: np.ndarray) -> list[Tensor]:  # (batch, n) each
            whole = torch.as_tensor(index, device=device).expand(batch, -1, -1)
            return [whole[:, head % whole.shape[1]] for head in range(heads)]

        def take(x: Tensor, index: np.ndarray, share: int) -> Tensor:  # (batch, heads, n, dim)
            return torch.stack([x[rows, at, i // share] for i, at in enumerate(by_head(index))], dim=1)

        def pairs(index: np.ndarray) -> Tensor:  # (batch, n, heads, dim + value_dim)
            return torch.cat([take(key, index, group), take(value, index, group)], dim=-1).transpose(1, 2)

        kept = np.minimum(plan.kept, length - 1)
        found = torch.cat([_gather(pairs(plan.sent), members), pairs(kept)], dim=1)
        # Heads stand in the batch: each sees keys of its own.
        found = take(found, plan.keys, 1).flatten(0, 1)[:, :, None]
        keys, values = found.split([key.shape[3], value.shape[3]], dim=-1)
        start, stop = (torch.stack(by_head(x), dim=1).flatten(0, 1) for x in (plan.start, plan.stop))
        mask = Mask(start, stop)
        part = attend(take(query, kept, 1).flatten(0, 1)[:, :, None], keys, values, mask)
        outs, lses = (x.unflatten(0, (batch, heads)).squeeze(3) for x in part)
        columns: list[list[Tensor]] = [[], []]
        for head, at in enumerate(by_head(plan.kept)):
            for column, x, empty in zip(columns, (outs, lses[..., None]), (0.0, -torch.inf), strict=True):
                x = x[:, head].to(lses.dtype)
                blank = x.new_full((batch, length + 1, x.shape[-1]), empty)  # one place more, for what doesn't count
                column.append(blank.scatter(1, at[..., None].expand(x.shape), x)[:, :length])
        return torch.stack(columns[0], dim=2), torch.stack(columns[1], dim=2)[..., 0]


@functools.cache  # by all layers
def _subgroup(group: ProcessGroup, members: range) -> ProcessGroup:
    """The processes of a block; made when first needed, by its members alone. torch names such a group by how many its
    members have: every process makes as many, so that its members agree."""
    if len(members) == dist.get_world_size(group):
        return group
    ranks = [dist.get_global_rank(group, member) for member in members]
    made: Any = dist.new_group(ranks, use_local_synchronization=True)
    return made


class _Plan(NamedTuple):
    """What one process sends and asks of one pattern, by row (one if all are alike) and offset."""

    sent: Int[np.ndarray, "rows offsets sent"]  #: places of its part that others need, some repeated: all send as many
    kept: Int[np.ndarray, "rows offsets kept"]  #: places of its part that the pattern keeps; the length: none
    keys: Int[np.ndarray, "rows offsets keys"]  #: places among what the members sent and what is kept here, by position
    start: Int[np.ndarray, "rows offsets kept"]
    stop: Int[np.ndarray, "rows offsets kept"]


@functools.lru_cache(maxsize=64)
def _plan(
    pattern: Pattern, length: int, heads: int, rank: int, members: range, is_causal: bool, ids: tuple[bytes, int] | None
) -> _Plan:
    """``members``: processes beyond which no segment of this one's reaches; all, if there are documents."""
    rank, ranks = rank - members.start, len(members)  # numbered within
    if ids is None:
        position, real = np.arange(ranks * length)[None], np.ones((1, ranks * length), bool)
    else:
        documents = np.frombuffer(ids[0], np.int64).reshape(ids[1], -1)
        position, real = document_positions(documents), documents != PADDING_SEGMENT_ID
    holder = np.arange(ranks * length) // length
    offsets, rows = range(min(pattern.rate, heads)), range(len(real))
    segment = np.cumsum(real & (position % pattern.length == 0), axis=1) - 1  # of tokens; padding has none
    spans = [_spans(*row, holder) for row in zip(segment, real, strict=True)]

    def places(row: int, offset: int, of: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that process ``of`` keeps, and those of them that others see too."""
        part = np.arange(of * length, (of + 1) * length)
        kept = part[real[row, part] & (position[row, part] % pattern.length % pattern.rate == offset)]
        first, last = (x[segment[row, kept]] for x in spans[row])
        return kept, kept[first < last]

    both = {(row, o, of): places(row, o, of) for row in rows for o in offsets for of in range(ranks)}
    most = max(1, *(len(shared) for _, shared in both.values()))
    found: list[list[list[np.ndarray]]] = [[] for _ in range(5)]  # sent, kept, keys, start, stop
    for row in rows:
        for part in found:
            part.append([])
        for o in offsets:
            mine, shared = both[row, o, rank]
            seen, at = [], []
            for of in range(ranks):
                kept, others = both[row, o, of]
                if of == rank:
                    seen.append(kept)
                    at.append(ranks * most + np.arange(len(kept)))
                    continue
                first, last = (x[segment[row, others]] for x in spans[row])
                here = (first <= rank) & (rank <= last)
                seen.append(others[here])
                at.append(of * most + np.flatnonzero(here))
            seen = np.concatenate(seen)
            theirs, own = segment[row, seen], segment[row, mine]
            start = np.searchsorted(theirs, own)
            stop = np.searchsorted(seen, mine) + 1 if is_causal else np.searchsorted(theirs, own, "right")
            lists = shared - rank * length, mine - rank * length, np.concatenate(at), start, stop
            for part, x in zip(found, lists, strict=True):
                part[-1].append(x)
    widths = [most, *(max(1, *(len(x) for row in part for x in row)) for part in found[1:])]
    fill = 0, length, 0, 0, 0
    sent, kept, keys, start, stop = (
        np.array([[np.pad(x, (0, n - len(x)), constant_values=f) for x in row] for row in part])
        for part, n, f in zip(found, widths, fill, strict=True)
    )
    return _Plan(sent, kept, keys, start.astype(np.int32), stop.astype(np.int32))


def _spans(segment: np.ndarray, real: np.ndarray, holder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last process that hold a token of each segment of a row."""
    numbers, holder = segment[real], holder[real]  # numbers ascend from 0, none left out
    first = np.searchsorted(numbers, np.arange(numbers[-1] + 1 if len(numbers) else 0))
    return holder[first], holder[np.append(first, len(numbers))[1:] - 1]


class DistributedMultiheadDilatedAttention(MultiheadDilatedAttention):
    """:class:`MultiheadDilatedAttention` over :class:`DistributedDilatedAttention`, whose ``group`` it takes too."""

    attention_type = DistributedDilatedAttention
