"""Which rank holds which queries under context parallelism, so that each has the same work.

An order is ``seq_len`` query indices, rank after rank in equal parts. Keys stay in natural order, so a mask follows by
:meth:`Mask.take` and nothing else changes.
"""

from __future__ import annotations

import heapq

import numpy as np
from jaxtyping import Float, Int

from .arrays import Array, arange, asarray_like, namespace, to_numpy
from .mask import Mask


def contiguous(seq_len: int, ranks: int) -> Int[np.ndarray, " seq_len"]:
    """Rank ``i`` holds the ``i``-th part: no balance, for comparison."""
    _check(seq_len, ranks, ranks)
    return np.arange(seq_len, dtype=np.int32)


def zigzag(seq_len: int, ranks: int) -> Int[np.ndarray, " seq_len"]:
    """``2 * ranks`` chunks; rank ``i`` holds chunks ``i`` and ``2 * ranks - 1 - i``. Balanced for one causal document.

    Raises:
        ValueError: seq_len that isn't a multiple of ``2 * ranks``.
    """
    _check(seq_len, ranks, 2 * ranks)
    chunks = np.arange(seq_len, dtype=np.int32).reshape(2 * ranks, -1)
    return np.stack([chunks[:ranks], chunks[ranks:][::-1]], axis=1).reshape(-1)


def by_area(mask: Mask, ranks: int, chunk: int = 128) -> Int[np.ndarray, " seq_len"]:
    """Chunks dealt so that the ranks' visible areas are as equal as can be, whatever the documents.

    Every rank gets the same number of chunks, in ascending order. Largest first to the least loaded rank with room,
    then pairs are swapped between the most loaded rank and another while that lowers the most loaded one.

    Args:
        mask: all queries' mask (readable now, so not a tracer); its rows' areas are added up.
        ranks: how many ranks.
        chunk: queries that stay together, at most; the largest divisor of ``q_len / ranks`` not above it is taken.

    Raises:
        ValueError: a number of queries that isn't a multiple of ranks.
    """
    _check(mask.q_len, ranks, ranks)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    share = mask.q_len // ranks
    size = next(c for c in range(min(chunk, share), 0, -1) if share % c == 0)
    area = to_numpy(mask.counts()).astype(np.int64).sum(axis=0).reshape(-1, size).sum(axis=1)
    per_rank = share // size

    held: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for index in np.argsort(-area, kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        held[rank].append(index)
        if len(held[rank]) < per_rank:
            heapq.heappush(loads, (load + int(area[index]), rank))
    _swap(held, area)
    indices = np.concatenate([np.sort(chunks) for chunks in held])
    return (indices[:, None] * size + np.arange(size)).reshape(-1).astype(np.int32)


def _swap(held: list[list[int]], area: np.ndarray) -> None:
    load = np.array([area[chunks].sum() for chunks in held])
    for _ in range(64 * len(held)):
        most = int(load.argmax())
        for other in np.argsort(load).tolist():
            gap = load[most] - load[other]
            if gap <= 1:
                return
            # Moving d = area[a] - area[b] from one to the other lowers the larger of both if 0 < d < gap.
            moved = area[held[most]][:, None] - area[held[other]][None, :]
            gain = np.where((moved > 0) & (moved < gap), np.minimum(moved, gap - moved), 0)
            a, b = np.unravel_index(int(gain.argmax()), gain.shape)
            if gain[a, b] > 0:
                held[most][a], held[other][b] = held[other][b], held[most][a]
                load[most] -= moved[a, b]
                load[other] += moved[a, b]
                break
        else:
            return


def snake(mask: Mask, ranks: int, chunk: int = 128) -> Int[Array, "rows seq_len"]:
    """As :func:`by_area`, but each row has its own order, and the mask may be a tracer.

    Chunks by falling area are dealt to the ranks forth and back, so that loads differ by no more than the largest
    chunk's area. :func:`zigzag`, for one causal document in ``2 * ranks`` chunks.

    Args:
        mask: all queries' mask.
        ranks: how many ranks.
        chunk: as of :func:`by_area`; but at least two chunks a rank, where its part can be halved.

    Raises:
        ValueError: a number of queries that isn't a multiple of ranks.
    """
    _check(mask.q_len, ranks, ranks)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    share, xp = mask.q_len // ranks, namespace(mask.start)
    most = min(chunk, share // 2 if share % 2 == 0 else share)
    size = next(c for c in range(most, 0, -1) if share % c == 0)
    area = xp.sum(xp.reshape(mask.counts(), (mask.start.shape[0], -1, size)), axis=2)
    dealt = xp.reshape(xp.argsort(-area, axis=1, stable=True), (area.shape[0], share // size, ranks))
    turns = [xp.flip(dealt[:, i], axis=1) if i % 2 else dealt[:, i] for i in range(share // size)]
    held = xp.sort(xp.stack(turns, axis=2), axis=2)  # (rows, ranks, chunks)
    places = xp.reshape(held, (area.shape[0], -1, 1)) * size + arange(size, mask.start)
    return xp.astype(xp.reshape(places, (area.shape[0], -1)), xp.int32)


def areas(mask: Mask, order: Int[np.ndarray, " seq_len"], ranks: int) -> Float[np.ndarray, " ranks"]:
    """Each rank's visible pairs under ``order``, as a multiple of the mean: the largest is max/mean, 1.0 at best."""
    _check(mask.q_len, ranks, ranks)
    counts = to_numpy(mask.counts()).astype(np.int64).sum(axis=0)
    area = counts[np.asarray(order)].reshape(ranks, -1).sum(axis=1)
    return area / max(area.mean(), 1e-30) if area.any() else np.ones(ranks)


def permute(x: Array, order: Int[Array, " seq_len"]) -> Array:
    """``x`` with axis 1 in ``order``; :func:`unpermute` undoes it. A tuple gives a tuple."""
    if isinstance(x, tuple):
        return tuple(permute(part, order) for part in x)
    return namespace(x).take(x, _index(order, x), axis=1)


def unpermute(x: Array, order: Int[Array, " seq_len"]) -> Array:
    """Undo :func:`permute`."""
    return permute(x, np.argsort(to_numpy(order), kind="stable"))


def _index(order: Array, x: Array) -> Array:
    if order.shape[0] != x.shape[1]:
        raise ValueError(f"order must have x's {x.shape[1]} positions along axis 1, got {order.shape[0]}")
    return asarray_like(to_numpy(order), x)


def _check(seq_len: int, ranks: int, multiple: int) -> None:
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if seq_len < 1 or seq_len % multiple:
        raise ValueError(
            f"seq_len must be a positive multiple of {multiple} for {ranks} ranks, got {seq_len}; "
            "pad the sequence with padding tokens"
        )
