import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import segments
from heddle import Mask
from heddle.attention import balance


def test_zigzag():
    np.testing.assert_array_equal(balance.zigzag(8, 2), [0, 1, 6, 7, 2, 3, 4, 5])


@given(st.integers(1, 8), st.integers(1, 6))
def test_zigzag_gives_each_rank_the_same_of_one_causal_document(ranks, size):
    seq_len = 2 * ranks * size
    shares = balance.areas(Mask.causal(seq_len, seq_len), balance.zigzag(seq_len, ranks), ranks)
    np.testing.assert_allclose(shares, 1.0)


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_by_area_deals_every_query_once_in_ascending_equal_parts(ranks, share, chunk, seed):
    rng = np.random.default_rng(seed)
    n = ranks * share
    cuts = np.sort(rng.integers(0, n + 1, rng.integers(0, 6)))
    ids = segments(*np.diff([0, *cuts, n]))
    order = balance.by_area(Mask.documents(ids), ranks, chunk)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    assert (np.diff(order.reshape(ranks, share), axis=1) > 0).all()


@pytest.mark.parametrize("chunk", [128, 512])
@pytest.mark.parametrize("seed", range(4))
def test_eight_ranks_on_packed_documents_are_within_two_percent(seed, chunk):
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, 32768), 11, replace=False))
    mask = Mask.documents(segments(*np.diff([0, *cuts, 32768])))
    assert balance.areas(mask, balance.by_area(mask, 8, chunk), 8).max() <= 1.02
    assert balance.areas(mask, balance.zigzag(32768, 8), 8).max() > 1.3


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor, jnp.asarray])
def test_snake_is_zigzag_of_one_causal_document(convert):
    mask = Mask.causal(32, 32, like=convert(np.zeros(1)))
    np.testing.assert_array_equal(balance.snake(mask, 4)[0], balance.zigzag(32, 4))


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_snake_deals_each_row_by_itself_within_a_chunk_of_equal(ranks, share, chunk, seed):
    rng = np.random.default_rng(seed)
    n = ranks * share
    cuts = [np.sort(rng.integers(0, n + 1, rng.integers(0, 6))) for _ in range(2)]
    mask = Mask.documents(np.concatenate([segments(*np.diff([0, *row, n])) for row in cuts]))
    order, counts = balance.snake(mask, ranks, chunk), mask.counts()
    np.testing.assert_array_equal(jax.jit(balance.snake, static_argnums=(1, 2))(mask, ranks, chunk), order)
    for row, area in zip(order, counts, strict=True):
        np.testing.assert_array_equal(np.sort(row), np.arange(n))
        assert (np.diff(row.reshape(ranks, share), axis=1) > 0).all()
        loads = area[row].reshape(ranks, share).sum(axis=1)
        assert loads.max() - loads.min() <= chunk * area.max()


def test_areas_are_the_visible_pairs_of_each_rank():
    mask, order = Mask.documents(segments(5, 3, 8)), balance.by_area(Mask.documents(segments(5, 3, 8)), 4, 2)
    pairs = [mask.take(part).visible() for part in order.reshape(4, 4)]
    np.testing.assert_allclose(balance.areas(mask, order, 4), np.array(pairs) / np.mean(pairs))
    np.testing.assert_array_equal(balance.areas(Mask.documents(segments(padding=8)), balance.zigzag(8, 2), 2), 1.0)


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor, jnp.asarray])
def test_unpermute_undoes_permute(convert):
    x, y = convert(np.arange(48.0).reshape(2, 8, 3)), convert(np.arange(16).reshape(2, 8))
    order = balance.zigzag(8, 2)
    px, py = balance.permute((x, y), order)
    np.testing.assert_array_equal(py[0], order)
    for got, want in zip(balance.unpermute((px, py), order), (x, y)):
        assert type(got) is type(want)
        np.testing.assert_array_equal(got, want)


@pytest.mark.usefixtures("unhooked")
def test_errors():
    with pytest.raises(ValueError, match="seq_len must be a positive multiple of 8 for 4 ranks, got 12; pad"):
        balance.zigzag(12, 4)
    with pytest.raises(ValueError, match="multiple of 3 for 3 ranks, got 8"):
        balance.by_area(Mask.causal(8), 3)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        balance.by_area(Mask.causal(8), 2, 0)
    with pytest.raises(ValueError, match="order must have x's 8 positions along axis 1, got 4"):
        balance.permute(np.zeros((1, 8)), np.arange(4))
