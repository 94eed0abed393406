"""``flex``: torch's FlexAttention, told which blocks to visit by the mask's tiles."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from heddle.attention.mask import Mask
from heddle.attention.tiles import Intervals

BLOCK = 128  #: queries and keys of FlexAttention's blocks, its default


def unsupported(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> str | None:
    if query.device.type != "cuda":
        return f"FlexAttention gives an lse and gradients on cuda alone, the arrays are on {query.device.type}"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention takes float32, bfloat16 and float16, not {query.dtype}"
    if min(query.shape[3], value.shape[3]) < 16:
        return f"FlexAttention takes head dimensions from 16 on, got {min(query.shape[3], value.shape[3])}"
    return None


def block_mask(mask: Mask, kv_len: int) -> BlockMask:
    """The mask as FlexAttention takes it, from its tiles: upstream's builder would look at every pair."""
    tiles = mask.tiles(BLOCK, BLOCK, kv_len)
    lo, full_lo, full_hi, hi = tiles.rows
    blocks = torch.arange(-(-kv_len // BLOCK), dtype=torch.int32, device=lo.device)
    partial, full = _partial(tiles.rows, tiles.prefix, blocks), full_lo[..., None] + blocks
    start, stop, prefix = mask.start, mask.stop, torch.tensor(mask.prefix, device=lo.device)
    batched = start.shape[0] > 1

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = b if batched else 0
        return (k < stop[row, q]) & ((start[row, q] <= k) | (k < prefix))

    return BlockMask.from_kv_blocks(
        (tiles.prefix + full_lo - lo + hi - full_hi)[:, None].to(torch.int32),
        partial[:, None].clamp(max=len(blocks) - 1),
        (full_hi - full_lo)[:, None],
        full[:, None].clamp(max=len(blocks) - 1),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(mask.q_len, kv_len),
    )


def _partial(rows: Intervals, prefix: int, blocks: Tensor) -> Tensor:
    """For each row of tiles those that need the elementwise test: the prefix's, then either side of the full ones."""
    index, before = blocks - prefix, (rows.full_lo - rows.lo)[..., None]
    beside = torch.where(index < before, rows.lo[..., None] + index, rows.full_hi[..., None] + index - before)
    return torch.where(index < 0, blocks, beside)


@functools.cache
def _compiled():
    return torch.compile(flex_attention)


def flex(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Attention by FlexAttention, compiled once. O(q_len * kv_len / BLOCK ** 2) memory for the lists of blocks."""
    kv_len = key.shape[1]
    blocks = mask.keep(("flex", kv_len), lambda: block_mask(mask, kv_len), lambda found: found.kv_num_blocks)
    function = flex_attention if torch.compiler.is_compiling() else _compiled()
    out, aux = function(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out.transpose(1, 2), aux.lse.transpose(1, 2)


def flex_backward(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float,
    out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv; out and lse may be over more keys than these.

    FlexAttention's own backward knows its own out and lse alone, so these keys' are computed again and take the
    gradients that the merge of all keys hands down: weight * d_out, and weight * (d_out (part - out) + d_lse).
    """
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        part, part_lse = flex(q, k, v, mask, scale)
    seen = part_lse > -torch.inf
    weight = torch.where(seen, torch.exp(part_lse - torch.where(seen, lse, 0.0)), 0.0).detach()
    inner = (d_out * (part.detach() - out)).sum(-1, dtype=torch.float32)
    d_part = (weight[..., None] * d_out).to(part.dtype)
    d_part_lse = weight * (inner if d_lse is None else inner + torch.where(seen, d_lse, 0.0))
    d_q, d_k, d_v = torch.autograd.grad((part, part_lse), (q, k, v), (d_part, d_part_lse))
    return d_q, d_k, d_v
