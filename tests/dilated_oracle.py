"""Dilated attention (arXiv 2307.02486) as one dense softmax over a multiset of keys, with exact gradients. Float64.

A key that n patterns show to a query stands n times in its softmax, which is LongNet's eq. 10 and 11 written out.
"""

from __future__ import annotations

import numpy as np


def multiplicity(tokens, heads, segment_lengths, dilation_rates, is_causal):
    """``(heads, len(tokens), len(tokens))``: how many patterns show a key to a query. ``tokens``: (document, position)
    each; documents below 0 are padding."""
    count = np.zeros((heads, len(tokens), len(tokens)))
    for w, r in zip(segment_lengths, dilation_rates):
        for h in range(heads):
            for i, (document, p) in enumerate(tokens):
                for j, (other, q) in enumerate(tokens):
                    same = document == other >= 0 and p // w == q // w and (j <= i or not is_causal)
                    count[h, i, j] += same and (p % w) % r == h % r and (q % w) % r == h % r
    return count


def places(segment_ids, key_padding_mask):
    """``(document, position)`` of each token of a row; positions count the document's tokens that aren't padding."""
    seen, found = {}, []
    for document, padded in zip(segment_ids, key_padding_mask):
        document = -1 if padded else int(document)
        found.append((document, seen.get(document, 0)))
        seen[document] = seen.get(document, 0) + 1
    return found


def dilated(
    query, key, value, segment_lengths, dilation_rates, is_causal=False, segment_ids=None, key_padding_mask=None,
    scale=None, d_out=None, d_lse=None,
):  # fmt: skip
    """``(out, lse)``; with ``d_out`` and ``d_lse`` also dq, dk, dv. ``(batch, seq, heads, dim)`` as everywhere."""
    batch, seq, heads, dim = query.shape
    group, scale = heads // key.shape[2], dim**-0.5 if scale is None else scale
    ids = np.zeros((batch, seq), int) if segment_ids is None else segment_ids
    padding = np.zeros((batch, seq), bool) if key_padding_mask is None else key_padding_mask
    q = query.astype(float).transpose(0, 2, 1, 3)
    k, v = (x.astype(float).repeat(group, 2).transpose(0, 2, 1, 3) for x in (key, value))
    count = np.stack(
        [multiplicity(places(*row), heads, segment_lengths, dilation_rates, is_causal) for row in zip(ids, padding)]
    )
    scores = scale * q @ k.swapaxes(-1, -2)
    highest = np.max(scores, -1, keepdims=True, where=count > 0, initial=-1e30)
    p = count * np.exp(np.where(count > 0, scores - highest, 0.0))
    total = p.sum(-1, keepdims=True)
    p = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
    out = (p @ v).transpose(0, 2, 1, 3)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + np.where(total > 0, highest, 0.0))[..., 0].transpose(0, 2, 1)
    if d_out is None:
        return out, lse
    d_o, d_l = d_out.transpose(0, 2, 1, 3), d_lse.transpose(0, 2, 1)[..., None]
    d_s = p * (d_o @ v.swapaxes(-1, -2) - (d_o * (p @ v)).sum(-1, keepdims=True) + d_l)
    d_q, d_k, d_v = scale * d_s @ k, scale * d_s.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ d_o
    d_k, d_v = (x.reshape(batch, -1, group, seq, dim).sum(2) for x in (d_k, d_v))
    return out, lse, *(x.transpose(0, 2, 1, 3) for x in (d_q, d_k, d_v))
