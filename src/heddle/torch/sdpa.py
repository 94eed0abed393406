"""``sdpa``: torch's own fused kernels, called on the parts of the mask that hold visible pairs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from heddle.attention.mask import Mask
from heddle.attention.merge import merge

# ---------------------------------------------------------------- which calls a mask comes to

BLOCK = 256  #: queries of one masked call, at most: its mask is BLOCK x keys, so memory stays linear
SMALL = 64 * 64  #: pairs that cost no more than the call around them
WASTE = 1.5  #: pairs computed for each visible one, at most, in a masked call that isn't small
STRETCH = 64  #: queries of one pattern that are not put in a block with others
#: Queries of a causal square worth a call of its own. On CPU the kernel computes 512 keys at a time, visible or not, so
#: that blocks are faster for short documents (1.2 times at 512).
CAUSAL_FROM = {"cpu": 768, "cuda": 64}
NEVER = 2**31


class Part(NamedTuple):
    """Keys that a run of queries sees: all, all but an upper triangle at the end, or some (a mask says which)."""

    keys: slice
    kind: Literal["full", "causal", "masked"]


class Run(NamedTuple):
    """Consecutive queries and the disjoint parts holding all they see; no part: queries that see nothing."""

    queries: slice
    parts: tuple[Part, ...]


def split_prefix(
    start: Int[np.ndarray, "*rows"], stop: Int[np.ndarray, "*rows"], prefix: int, kv_len: int
) -> tuple[Int[np.ndarray, "*rows"], Int[np.ndarray, "*rows"], Bool[np.ndarray, "*rows"]]:
    """A mask's visible keys as ``[start, stop)`` and, where the third array holds, ``[0, prefix)`` apart from it.

    Most rows with a prefix see one interval that begins in it. Empty intervals come out as ``[0, 0)``.
    """
    start, stop = (array.clip(0, kv_len).astype(np.int32) for array in (start, stop))
    apart = (prefix > 0) & (prefix < start) & (start < stop)
    if prefix:
        stop = np.where(apart | (start <= prefix), stop, np.minimum(stop, prefix))
        start = np.where(apart, start, 0)
    empty = start >= stop
    return np.where(empty, 0, start), np.where(empty, 0, stop), apart


def runs(
    start: Int[np.ndarray, " q_len"],
    stop: Int[np.ndarray, " q_len"],
    apart: Bool[np.ndarray, " q_len"],
    prefix: int,
    causal_from: int,
) -> list[Run]:
    """Cuts the queries into runs whose computed pairs are at most about WASTE times the visible ones.

    Stretches with a constant ``[start, stop)`` need no mask, nor do long ones whose ``stop`` rises by one a query: a
    rectangle and a causal square. Shorter ones go in blocks, and all else in blocks against the hull of what they see.
    """
    q_len = len(start)
    found: list[Run] = []

    def add(first: int, past: int, *parts: Part) -> None:
        in_prefix = (Part(slice(0, prefix), "full"),) if apart[first] else ()
        found.append(Run(slice(first, past), parts + in_prefix))

    def add_blocks(first: int, past: int) -> None:
        while first < past:
            block = slice(first, min(first + BLOCK, past))
            seen = stop[block] - start[block]
            low = np.minimum.accumulate(np.where(seen > 0, start[block], np.iinfo(np.int32).max))
            high = np.maximum.accumulate(stop[block])
            area = np.arange(1, len(seen) + 1) * np.maximum(high - low, 0)
            seen = np.cumsum(seen)
            fits = (area <= np.maximum(SMALL, WASTE * seen)) & (apart[block] == apart[first])
            fits[0] = True  # a query alone wastes nothing
            n = len(fits) if fits.all() else int(fits.argmin())
            if not seen[n - 1]:
                add(first, first + n)
            else:
                kind = "full" if seen[n - 1] == area[n - 1] else "masked"
                add(first, first + n, Part(slice(int(low[n - 1]), int(high[n - 1])), kind))
            first += n

    # A step from one query to the next: 0 sees the same, 1 sees one key more, 2 anything else.
    rise = np.diff(stop)
    step = np.where((np.diff(start) == 0) & (rise >= 0) & (rise <= 1), rise, 2)
    step[(stop[1:] > 0) != (stop[:-1] > 0)] = 2
    step[apart[1:] != apart[:-1]] = 2
    edges = np.concatenate([[0], np.flatnonzero(np.diff(step)) + 1, [len(step)]]) if len(step) else np.zeros(1, int)
    kinds = step[edges[:-1]] if len(step) else step
    empty = (stop[edges[:-1]] == 0) & (kinds == 0)
    shortest = np.where(empty, 2, np.array([STRETCH, STRETCH, q_len + 1])[kinds])
    at = 0
    for stretch in np.flatnonzero(np.diff(edges) + 1 >= shortest):
        first, past = max(int(edges[stretch]), at), int(edges[stretch + 1]) + 1
        add_blocks(at, first)
        low, high = int(start[first]), int(stop[first])
        if not high:
            add(first, past)
        elif kinds[stretch] == 0:
            add(first, past, Part(slice(low, high), "full"))
        elif past - first < causal_from:
            blocks = -(-(past - first) // BLOCK)
            bounds = [first + (past - first) * i // blocks for i in range(blocks + 1)]
            for begin, end in itertools.pairwise(bounds):
                add(begin, end, Part(slice(low, int(stop[end - 1])), "causal"))
        else:
            square = Part(slice(high - 1, high - 1 + past - first), "causal")
            add(first, past, *([Part(slice(low, high - 1), "full")] if high - 1 > low else []), square)
        at = past
    add_blocks(at, q_len)
    return found


class Row(NamedTuple):
    """One row of a mask: its runs, and the ``[start, stop)`` of its queries."""

    runs: list[Run]
    start: Int[np.ndarray, " q_len"]
    stop: Int[np.ndarray, " q_len"]


@functools.lru_cache(maxsize=8)
def _rows(mask: bytes, dtype: str, shape: tuple[int, ...], prefix: int, kv_len: int, causal_from: int) -> list[Row]:
    """The rows of a mask, one if all are equal. Cached, as every layer hands over the same mask."""
    prefix = min(prefix, kv_len)
    start, stop = np.frombuffer(mask, dtype).reshape(shape)
    arrays = split_prefix(start, stop, prefix, kv_len)
    if all((array == array[:1]).all() for array in arrays):
        arrays = [array[:1] for array in arrays]
    return [
        Row(runs(start, stop, apart, prefix, causal_from), start, stop)
        for start, stop, apart in zip(*arrays, strict=True)
    ]


def work(
    query: Tensor, key: Tensor, start: Tensor, stop: Tensor, prefix: int, scale: float
) -> Iterator[tuple[slice, Row]]:
    """Sequences of the batch computed together, and the mask's row for them. Reads the mask on the host."""
    mask = np.stack([start.cpu().numpy(), stop.cpu().numpy()])
    if query.shape[1] == 1:  # see _fold
        mask = mask.repeat(query.shape[2] // key.shape[2], axis=2)
    causal_from = CAUSAL_FROM[query.device.type] if scale > 0 else NEVER
    rows = _rows(mask.tobytes(), mask.dtype.str, mask.shape, prefix, key.shape[1], causal_from)
    if len(rows) == 1 and not _is_grouped(query, key):
        yield slice(None), rows[0]
    else:
        for b in range(query.shape[0]):
            yield slice(b, b + 1), rows[b % len(rows)]


# ---------------------------------------------------------------- torch's kernels, on (batch, heads, seq, dim)


def _bias(part: Part, run: Run, row: Row, like: Tensor) -> Tensor | None:
    """0 where a query of the run sees a key of the part, else -inf; None if it sees them all."""
    if part.kind == "full":
        return None
    queries, keys = (s.stop - s.start for s in (run.queries, part.keys))
    # The CUDA kernel wants rows aligned to 16 elements.
    bias = like.new_full((queries, -(-keys // 16) * 16), -torch.inf)[:, :keys]
    if part.kind == "causal":
        return bias.triu_(keys - queries + 1)
    start, stop = (torch.from_numpy(a[run.queries])[:, None].to(like.device) for a in (row.start, row.stop))
    key = torch.arange(part.keys.start, part.keys.stop, dtype=torch.int32, device=like.device)
    return bias.masked_fill_((start <= key) & (key < stop), 0.0)


def _masking(part: Part, run: Run, row: Row, like: Tensor, scale: float) -> tuple[Tensor | None, bool]:
    """The kernels' mask and their ``is_causal``, which takes squares. On CPU that scales after masking: not below 0."""
    square = part.keys.stop - part.keys.start == run.queries.stop - run.queries.start
    is_causal = part.kind == "causal" and square and scale > 0
    return None if is_causal else _bias(part, run, row, like), is_causal


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of ``q`` over ``k`` and ``v``: out ``(batch, heads, seq, dim)`` and lse ``(batch, heads, seq)``."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
    out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, causal, scale=scale
    )
    return out, lse[..., : q.shape[2]]  # the kernel pads lse to a multiple of 32


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    bias: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of one part, from out and lse over *all* parts: P = exp(S - lse) is then the softmax over all keys."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
    # The kernel takes out's rows to be contiguous and lse's length to be a multiple of 32.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    lse = F.pad(lse, (0, -lse.shape[2] % 32)).contiguous()
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, of which there is none
    grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        d_out, q, k, v, bias, out, lse, seed, seed, 0.0, [True, True, True, False], causal, scale=scale
    )
    return grads[:3]


def _widen(x: Tensor, width: int) -> Tensor:
    """``x`` as the kernels want it: heads of ``width`` (more are zeros), adjacent elements, on CPU at least float32.

    The CPU kernel sums gradients in the inputs' dtype, and is no faster in bfloat16 and far slower in float16.
    """
    if x.device.type == "cpu" and x.dtype != torch.float64:
        x = x.float()
    x = F.pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _width(device: torch.device, *sizes: int) -> int:
    """The head size the kernels compute with; on CUDA a multiple of 8."""
    return max(sizes) if device.type == "cpu" else -(-max(sizes) // 8) * 8


def _is_grouped(query: Tensor, key: Tensor) -> bool:
    return query.shape[2] != key.shape[2] and query.shape[1] > 1


def _fold(x: Tensor, kv_heads: int, grouped: bool) -> Tensor:
    """``(batch, seq, heads, dim)`` as the kernels' ``(batch, heads, seq, dim)``, a view.

    With grouped heads the batch is 1 and the result ``(kv_heads, heads / kv_heads, seq, dim)``, so that keys and
    values, ``(kv_heads, 1, seq, dim)``, can be expanded and not repeated. But the heads of one query's group see the
    same keys, so they are as many queries, and each key is read once: ``(batch, kv_heads, heads / kv_heads, dim)``.
    """
    if grouped:
        return x[0].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    return x.transpose(1, 2) if x.shape[2] == kv_heads else x[:, 0].unflatten(1, (kv_heads, -1))


# ---------------------------------------------------------------- the operator


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Schemas are spelled out: inference from annotations fails where a decorator (the tests' shape checks) wraps them.
@torch.library.custom_op(
    "heddle::sdpa",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor start, Tensor stop, int prefix, float scale)"
    " -> (Tensor, Tensor)",
)
def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor, stop: Tensor, prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    kv_heads, v_dim, grouped = key.shape[2], value.shape[3], _is_grouped(query, key)
    q, k, v = (_widen(x, _width(x.device, query.shape[3], v_dim)) for x in (query, key, value))
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_accumulator(q.dtype))
    for batch, row in work(query, key, start, stop, prefix, scale):
        q_, k_, v_, out_, lse_ = (_fold(x[batch], kv_heads, grouped) for x in (q, k, v, out, lse[..., None]))
        k_, v_ = (x.expand(-1, q_.shape[1], -1, -1) for x in (k_, v_))
        for run in row.runs:
            q_run, out_run, lse_run = (x[:, :, run.queries] for x in (q_, out_, lse_))
            results = []
            for part in run.parts:
                k_part, v_part = k_[:, :, part.keys], v_[:, :, part.keys]
                masking = _masking(part, run, row, q, scale)
                results.append(_forward(q_run, k_part, v_part, *masking, scale))
            if results:
                out_run[:], lse_run[..., 0] = merge(results)
            if not results or run.parts[0].kind == "masked":
                empty = torch.from_numpy(row.stop[run.queries] == 0)[:, None].to(q.device)
                out_run.masked_fill_(empty, 0.0)
                lse_run.masked_fill_(empty, -torch.inf)
    return out[..., :v_dim].to(query.dtype).contiguous(), lse


@_sdpa.register_fake
def _(query, key, value, start, stop, prefix, scale):
    lse = query.new_empty(query.shape[:3], dtype=_accumulator(query.dtype))
    return query.new_empty(*query.shape[:3], value.shape[3]), lse


@torch.library.custom_op(
    "heddle::sdpa_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor? d_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    " Tensor start, Tensor stop, int prefix, float scale) -> (Tensor, Tensor, Tensor)",
)
def _sdpa_backward(
    d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    start: Tensor, stop: Tensor, prefix: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kv_heads, v_dim, grouped = key.shape[2], value.shape[3], _is_grouped(query, key)
    width = _width(query.device, query.shape[3], v_dim if d_lse is None else v_dim + 1)
    q, k, v, o, d_o = (_widen(x, width) for x in (query, key, value, out, d_out))
    seen = lse > -torch.inf
    lse = torch.where(seen, lse, 0.0)
    if d_lse is not None:
        # The kernels compute dS = P * (dO V^T - rowsum(dO * O)), and dlse belongs inside the bracket. One more column
        # of dO and O, where V's is zero, brings it there.
        d_o[..., v_dim], o[..., v_dim] = 1.0, torch.where(seen, -d_lse, 0.0)
    d_q = q.new_empty(q.shape)
    d_k, d_v = (x.new_zeros(x.shape, dtype=_accumulator(x.dtype)) for x in (k, v))
    for batch, row in work(query, key, start, stop, prefix, scale):
        of_queries = [_fold(x[batch], kv_heads, grouped) for x in (d_q, d_o, q, o, lse[..., None])]
        of_keys = [_fold(x[batch], kv_heads, grouped) for x in (k, v, d_k, d_v)]
        for run in row.runs:
            d_q_run, d_o_run, q_run, o_run, lse_run = (x[:, :, run.queries] for x in of_queries)
            if not run.parts:
                d_q_run.zero_()
            for index, part in enumerate(run.parts):
                k_part, v_part, *d_kv_part = (x[:, :, part.keys] for x in of_keys)
                k_part, v_part = (x.expand(-1, q_run.shape[1], -1, -1) for x in (k_part, v_part))
                masking = _masking(part, run, row, q, scale)
                d, *d_kv = _backward(d_o_run, q_run, k_part, v_part, o_run, lse_run[..., 0], *masking, scale)
                d_q_run.add_(d) if index else d_q_run.copy_(d)
                for total, d in zip(d_kv_part, d_kv, strict=True):
                    total += d.sum(1, keepdim=True) if grouped else d
    grads = zip((d_q, d_k, d_v), (query, key, value), strict=True)
    d_q, d_k, d_v = (d[..., : x.shape[3]].to(x.dtype).contiguous() for d, x in grads)
    return d_q, d_k, d_v


@_sdpa_backward.register_fake
def _(d_out, d_lse, query, key, value, out, lse, start, stop, prefix, scale):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _save(ctx, inputs, output):
    *tensors, ctx.prefix, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # so that a gradient through lse costs nothing where there is none


def _differentiate(ctx, d_out, d_lse):
    query, key, value, start, stop, out, lse = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    grads = _sdpa_backward(d_out, d_lse, query, key, value, out, lse, start, stop, ctx.prefix, ctx.scale)
    return *grads, None, None, None, None


_sdpa.register_autograd(_differentiate, setup_context=_save)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Attention by torch's fused kernels, each called on a part of the mask. O(q_len + kv_len) memory.

    Reads the mask's integers on the host (on CUDA: waits for them). On CPU half precision is computed in float32.
    """
    return _sdpa(query, key, value, mask.start, mask.stop, mask.prefix, scale)


def sdpa_backward(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float,
    out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv; out and lse may be over more keys than these. Without ``d_lse`` it costs less."""
    return _sdpa_backward(d_out, d_lse, query, key, value, out, lse, mask.start, mask.stop, mask.prefix, scale)


def unsupported(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> str | None:
    device = query.device.type
    if device not in CAUSAL_FROM:
        return f"it runs on {' and '.join(CAUSAL_FROM)}, the arrays are on {device}"
    if query.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"torch's kernels take float64, float32, bfloat16 and float16, not {query.dtype}"
    if device == "cuda" and query.dtype == torch.float64:
        return "torch's CUDA kernels don't take float64"
    return None
