"""Faults known from kvax, each a thing that works here (the core's part; a wing's are among its own tests)."""

from __future__ import annotations

import numpy as np
import pytest

from attention_cases import Case, oracle, segments
from heddle import Mask, attend
from heddle.attention import balance
from heddle.attention.reference import reference_backward


def test_ids_above_the_sequence_length_are_ids_like_any():
    """There they break the padding."""
    large = Mask.documents(segments(20, 30, padding=14, ids=(2**31 - 1, 1000)))
    small = Mask.documents(segments(20, 30, padding=14))
    np.testing.assert_array_equal(large.dense(64), small.dense(64))
    assert not large.dense(64)[0, 50:].any()
    assert not large.dense(64)[0, :, 50:].any()


def test_a_backward_mask_needs_no_parameters():
    """There ``calc_bwd_mask=True`` without parameters crashes; here one mask has rows and columns of tiles."""
    tiles = Mask.documents(segments(30, 34)).tiles(16, 16, 64)
    np.testing.assert_array_equal(tiles.rows.hi, [[1, 2, 3, 4]])
    np.testing.assert_array_equal(tiles.columns.lo, [[0, 1, 2, 3]])
    np.testing.assert_array_equal(tiles.columns.hi, [[2, 4, 4, 4]])


@pytest.mark.parametrize("length", [1, 127, 129, 200])
def test_a_tail_of_rows_counts_in_backward(length):
    """There a tail of ``T % 128`` rows is skipped."""
    case = Case("tail", length, length, lambda: Mask.causal(length))
    arrays = {name: a.astype(np.float64) for name, a in case.arrays().items()}
    tail = -(length % 128)
    arrays["d_out"][:, :tail], arrays["d_lse"][:, :tail] = 0, 0
    dk = gradients(case, arrays)[1]
    assert np.abs(dk[:, tail:]).max() > 1e-2
    np.testing.assert_allclose(dk, oracle(case, arrays)["dk"], atol=1e-10)
    tiles = case.mask().tiles(128, 128, length)
    assert tiles.rows.hi[0, -1] == tiles.columns.hi[0, -1] == -(-length // 128)


@pytest.mark.parametrize(("q_len", "kv_len"), [(20, 50), (50, 20)])
def test_queries_and_keys_of_different_number_have_gradients(q_len, kv_len):
    """There backward needs ``T == S``."""
    case = Case("cross", q_len, kv_len, lambda: Mask.causal(q_len, kv_len, max(0, kv_len - q_len)))
    arrays = {name: a.astype(np.float64) for name, a in case.arrays().items()}
    for got, name in zip(gradients(case, arrays), ("dq", "dk", "dv")):
        np.testing.assert_allclose(got, oracle(case, arrays)[name], atol=1e-10)


def test_backward_of_several_documents_is_each_documents():
    """There it is never compared with an independent reference."""
    lengths = (13, 1, 22, 4)
    case = Case("packed", 40, 40, lambda: Mask.documents(segments(*lengths)), heads=4, kv_heads=2)
    arrays = {name: a.astype(np.float64) for name, a in case.arrays().items()}
    packed, first = gradients(case, arrays), 0
    for length in lengths:
        alone = Case("alone", length, length, lambda length=length: Mask.causal(length), heads=4, kv_heads=2)
        part = {name: a[:, first : first + length] for name, a in arrays.items()}
        for whole, want in zip(packed, gradients(alone, part)):
            np.testing.assert_allclose(whole[:, first : first + length], want, atol=1e-12)
        first += length


def test_unpermute_brings_every_position_back():
    """There the clean style's does nothing."""
    x, order = np.arange(96)[None], balance.zigzag(96, 4)
    permuted = balance.permute((x, x[..., None]), order)
    assert (permuted[0] != x).any()
    for got, want in zip(balance.unpermute(permuted, order), (x, x[..., None])):
        np.testing.assert_array_equal(got, want)


def test_visible_counts_pairs_and_not_visited_blocks():
    """There FLOP/s are of visited blocks."""
    mask = Mask.documents(segments(30, 34))
    assert mask.visible() == mask.dense(64).sum() == 30 * 31 // 2 + 34 * 35 // 2
    tiles = mask.tiles(64, 64, 64)
    assert (tiles.rows.hi - tiles.rows.lo).sum() * 64 * 64 > 3 * mask.visible()


def gradients(case: Case, a: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    scale, inputs = case.dim**-0.5, (a["query"], a["key"], a["value"])
    out, lse = attend(*inputs, case.mask(), return_lse=True)
    return reference_backward(*inputs, case.mask(), scale, out, lse, a["d_out"], a["d_lse"])
