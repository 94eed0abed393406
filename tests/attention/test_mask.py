import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle import PADDING_SEGMENT_ID, Mask

FRAMEWORKS = {"numpy": np.asarray, "torch": torch.as_tensor, "jax": jnp.asarray}


def brute(mask: Mask, kv_len: int) -> np.ndarray:
    """The definition, pair by pair."""
    rows, q_len = mask.start.shape
    start, stop = np.asarray(mask.start), np.asarray(mask.stop)
    return np.array(
        [
            [[j < stop[r, i] and (start[r, i] <= j or j < mask.prefix) for j in range(kv_len)] for i in range(q_len)]
            for r in range(rows)
        ]
    )


@st.composite
def masks(draw, sort=False):
    q_len, kv_len, rows = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(1, 2))
    bounds = st.lists(st.integers(-2, kv_len + 3), min_size=rows * q_len, max_size=rows * q_len)
    start, stop = (np.array(draw(bounds), np.int32).reshape(rows, q_len) for _ in range(2))
    if sort:
        start, stop = np.sort(start, axis=1), np.sort(stop, axis=1)
    return Mask(start, stop, draw(st.integers(0, 5))), kv_len


@st.composite
def packings(draw):
    """Segment ids of documents in any order of ids, contiguous, with padding anywhere between them."""
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5, unique=True))
    pieces = []
    for segment in ids:
        pieces += [PADDING_SEGMENT_ID] * draw(st.integers(0, 2)) + [segment] * draw(st.integers(1, 7))
    pieces += [PADDING_SEGMENT_ID] * draw(st.integers(0, 3))
    return np.array(pieces, np.int32)[None]


def dense_documents(segments: np.ndarray, causal: bool) -> np.ndarray:
    row = segments[0]
    seen = (row[:, None] == row[None, :]) & (row[:, None] != PADDING_SEGMENT_ID)
    return seen & np.tri(len(row), dtype=bool) if causal else seen


@given(masks())
def test_dense_counts_and_visible_are_the_definition(drawn):
    mask, kv_len = drawn
    expected = brute(mask, kv_len)
    np.testing.assert_array_equal(mask.dense(kv_len), expected)
    np.testing.assert_array_equal(mask.counts(kv_len), expected.sum(-1))
    assert mask.visible(kv_len) == expected.sum()


@given(masks(), st.integers(1, 9), st.integers(1, 9))
def test_tiles_miss_nothing_and_full_tiles_are_full(drawn, block_q, block_k):
    check_tiles(*drawn, block_q, block_k)


@given(masks(sort=True), st.integers(1, 9), st.integers(1, 9))
def test_tiles_of_ascending_intervals(drawn, block_q, block_k):
    check_tiles(*drawn, block_q, block_k)


@given(packings(), st.booleans(), st.integers(1, 9), st.integers(1, 9))
def test_tiles_of_documents_visit_columns_exactly_as_rows(segments, causal, block_q, block_k):
    mask = Mask.documents(segments, causal=causal)
    by_row, by_column = check_tiles(mask, segments.shape[1], block_q, block_k)
    # A row of tiles that is padding throughout, between two documents, lies in columns' intervals all the same.
    visits = by_row.any(axis=2)
    np.testing.assert_array_equal(by_row[visits], by_column[visits])


def check_tiles(mask: Mask, kv_len: int, block_q: int, block_k: int):
    """Rows and columns of tiles visit every visible pair, and call full only what is; returns both visit matrices."""
    tiles, dense = mask.tiles(block_q, block_k, kv_len), brute(mask, kv_len)
    n_q, n_k = -(-mask.q_len // block_q), -(-kv_len // block_k)
    q_tile, k_tile = np.arange(n_q), np.arange(n_k)
    for intervals in (tiles.rows, tiles.columns):
        assert (intervals.lo <= intervals.full_lo).all()
        assert (intervals.full_lo <= intervals.full_hi).all()
        assert (intervals.full_hi <= intervals.hi).all()

    def between(lo, x, hi):
        return (lo[..., None] <= x) & (x < hi[..., None])

    rows, columns = tiles.rows, tiles.columns
    visited = between(rows.lo, k_tile, rows.hi) | (k_tile < tiles.prefix)
    full = between(rows.full_lo, k_tile, rows.full_hi)
    visited_by_column = between(columns.lo, q_tile, columns.hi).swapaxes(1, 2)
    full_by_column = between(columns.full_lo, q_tile, columns.full_hi).swapaxes(1, 2)
    for i in range(n_q):
        for c in range(n_k):
            block = dense[:, i * block_q : (i + 1) * block_q, c * block_k : (c + 1) * block_k]
            any_seen, all_seen = block.any((1, 2)), block.all((1, 2)) & (block.shape[2] == block_k)
            assert (visited[:, i, c] >= any_seen).all()
            assert (visited_by_column[:, i, c] >= any_seen).all()
            assert (full[:, i, c] <= all_seen).all()
            assert (full_by_column[:, i, c] <= all_seen).all()
    return visited, visited_by_column


def test_full_tiles_are_found():
    tiles = Mask.causal(8, 8).tiles(2, 2, 8)
    np.testing.assert_array_equal(tiles.rows.full_hi - tiles.rows.full_lo, [[0, 1, 2, 3]])
    np.testing.assert_array_equal(tiles.columns.full_hi - tiles.columns.full_lo, [[3, 2, 1, 0]])


@given(packings(), st.booleans())
def test_documents(segments, causal):
    mask = Mask.documents(segments, causal=causal)
    np.testing.assert_array_equal(mask.dense(segments.shape[1])[0], dense_documents(segments, causal))


@given(packings(), st.booleans(), st.randoms(use_true_random=False), st.integers(1, 4))
def test_documents_of_permuted_queries(segments, causal, random, step):
    """Some queries in any order, against all keys, whatever the positions' offset and step."""
    n = segments.shape[1]
    rows = random.sample(range(n), random.randint(1, n))
    positions = (100 + step * np.arange(n))[None]
    mask = Mask.documents(segments[:, rows], segments, positions[:, rows], positions, causal=causal)
    np.testing.assert_array_equal(mask.dense(n)[0], dense_documents(segments, causal)[rows])
    np.testing.assert_array_equal(Mask.documents(segments, causal=causal).take(np.array(rows)).dense(n), mask.dense(n))


def test_documents_with_positions_that_restart():
    segments = np.array([[4, 4, 4, 9, 9, -1]])
    positions = np.array([[0, 1, 2, 0, 1, 0]])
    mask = Mask.documents(segments, segments, positions, positions)
    np.testing.assert_array_equal(mask.dense(6)[0], dense_documents(segments, causal=True))


def test_documents_batch_rows_are_independent():
    a, b = np.array([[0, 0, 1, 1]]), np.array([[5, 3, 3, -1]])
    both = Mask.documents(np.concatenate([a, b])).dense(4)
    np.testing.assert_array_equal(both[0], dense_documents(a, causal=True))
    np.testing.assert_array_equal(both[1], dense_documents(b, causal=True))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@given(segments=packings(), causal=st.booleans())
@settings(max_examples=15)
def test_documents_and_tiles_are_the_same_in_every_framework(framework, segments, causal):
    padding = np.full((1, 50 - segments.shape[1]), PADDING_SEGMENT_ID, np.int32)  # one shape: JAX compiles once
    segments = np.concatenate([segments, padding], axis=1)
    expected = Mask.documents(segments, causal=causal)
    mask = Mask.documents(FRAMEWORKS[framework](segments), causal=causal)
    assert type(mask.start) is type(FRAMEWORKS[framework](segments))
    np.testing.assert_array_equal(mask.start, expected.start)
    np.testing.assert_array_equal(mask.stop, expected.stop)
    kv_len = segments.shape[1]
    assert mask.visible(kv_len) == expected.visible(kv_len)
    for got, want in zip(jax.tree.leaves(mask.tiles(3, 4, kv_len)), jax.tree.leaves(expected.tiles(3, 4, kv_len))):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([[0, 1, 0]], "segment id 0 goes from key 0 to key 2"),
        ([[0, -1, 0]], "contiguously"),
        ([[0, 0], [7, -2]], "non-negative"),
    ],
)
def test_documents_refuses_what_an_interval_cannot_say(segments, message):
    with pytest.raises(ValueError, match=message):
        Mask.documents(np.array(segments))


def test_documents_refuses_keys_out_of_order():
    segments, positions = np.array([[0, 0, 0]]), np.array([[0, 2, 1]])
    with pytest.raises(ValueError, match="in order of position"):
        Mask.documents(segments, segments, positions, positions)


@pytest.mark.usefixtures("unhooked")
def test_documents_refuses_arguments_that_disagree():
    ids = np.zeros((2, 4), np.int32)
    with pytest.raises(ValueError, match="kv_segments"):
        Mask.documents(ids, None, None, ids)
    with pytest.raises(ValueError, match="both or neither"):
        Mask.documents(ids, ids, ids)
    with pytest.raises(ValueError, match="q_positions must have"):
        Mask.documents(ids, ids, ids[:, :3], ids)
    with pytest.raises(ValueError, match="one batch size"):
        Mask.documents(ids, ids[:1])
    with pytest.raises(ValueError, match="4 queries and 3 keys"):
        Mask.documents(ids, ids[:, :3])


def test_segment_ids_may_exceed_the_length():
    segments = np.array([[2**31 - 1, 2**31 - 1, 0, -1]])
    np.testing.assert_array_equal(Mask.documents(segments).dense(4)[0], dense_documents(segments, causal=True))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(-5, 9))
def test_causal(q_len, kv_len, offset):
    np.testing.assert_array_equal(
        Mask.causal(q_len, kv_len, offset).dense(kv_len)[0], np.tri(q_len, kv_len, offset, dtype=bool)
    )


def test_causal_with_an_offset_for_each_sequence():
    dense = Mask.causal(2, 5, np.array([0, 3], np.int32)).dense(5)
    np.testing.assert_array_equal(dense[0], np.tri(2, 5, 0, dtype=bool))
    np.testing.assert_array_equal(dense[1], np.tri(2, 5, 3, dtype=bool))


@given(st.integers(1, 12), st.integers(1, 6), st.integers(-3, 6), st.booleans(), st.integers(0, 4))
def test_window(q_len, size, offset, causal, prefix):
    kv_len = q_len + 3
    position, key = np.arange(q_len)[:, None] + offset, np.arange(kv_len)
    near = (key > position - size) & (key < position + size)
    sink = (key < prefix) & (key < position + size)
    seen = (near | sink) & (key <= position if causal else True)
    mask = Mask.window(q_len, size, kv_len, offset, causal=causal, prefix=prefix)
    np.testing.assert_array_equal(mask.dense(kv_len)[0], seen)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 9), st.booleans())
def test_lengths(lengths, q_len, causal):
    dense = Mask.lengths(np.array(lengths, np.int32), q_len, causal).dense(9)
    for b, n in enumerate(lengths):
        first = max(n - q_len, 0)
        for i in range(q_len):
            position = first + i
            seen = 0 if position >= n else position + 1 if causal else n
            np.testing.assert_array_equal(dense[b, i], np.arange(9) < seen)


def test_lengths_with_an_offset():
    mask = Mask.lengths(np.array([7, 3], np.int32), 2, offset=np.array([4, 0], np.int32))
    np.testing.assert_array_equal(mask.stop, [[5, 6], [1, 2]])


@given(masks(), st.data())
def test_and_intersects(drawn, data):
    a, kv_len = drawn
    bounds = st.lists(st.integers(-1, kv_len + 1), min_size=a.q_len, max_size=a.q_len)
    b = Mask(np.array([data.draw(bounds)]), np.array([data.draw(bounds)]), a.prefix)
    np.testing.assert_array_equal((a & b).dense(kv_len), brute(a, kv_len) & brute(b, kv_len))


def test_and_of_different_prefixes():
    window, padded = Mask.window(6, 2, prefix=3), Mask.lengths(np.array([4], np.int32), 6)
    np.testing.assert_array_equal((window & padded).dense(6), window.dense(6) & padded.dense(6))
    np.testing.assert_array_equal((padded & window).dense(6), window.dense(6) & padded.dense(6))
    with pytest.raises(ValueError, match="one prefix, got 3 and 0"):
        window & Mask.window(6, 4)
    with pytest.raises(ValueError, match="one q_len, got 6 and 5"):
        window & Mask.causal(5)


@given(masks(), st.integers(1, 7), st.integers(1, 7))
def test_coverage(drawn, block_q, block_k):
    mask, kv_len = drawn
    dense, coverage = brute(mask, kv_len), mask.coverage(block_q, block_k, kv_len)
    for i in range(coverage.shape[1]):
        for c in range(coverage.shape[2]):
            block = dense[:, i * block_q : (i + 1) * block_q, c * block_k : (c + 1) * block_k]
            np.testing.assert_allclose(coverage[:, i, c], block.mean((1, 2)))


def test_show_condenses_long_masks():
    picture = Mask.causal(1000, 1000).show(cells=10).split("\n")
    assert [len(line) for line in picture] == [10] * 10
    assert picture[0] == "▒·········"
    assert picture[9] == "█████████▒"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(3, np.int32), np.zeros(3, np.int32)), r"start must be integers of shape"),
        ((np.zeros((1, 3)), np.zeros((1, 3))), "float64"),
        ((np.zeros((1, 3), np.int32), np.zeros((1, 4), np.int32)), "one shape"),
        ((np.zeros((1, 3), np.int32), np.zeros((1, 3), np.int32), -1), "prefix must be at least 0, got -1"),
        ((np.zeros((1, 3), np.int32), np.zeros((1, 3), np.int32), 1.5), "prefix must be an integer, got 1.5"),
        (([[0]], [[1]]), "expected a NumPy array"),
    ],
)
@pytest.mark.usefixtures("unhooked")
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mask(*arguments)


def test_counts_are_checked():
    with pytest.raises(ValueError, match="q_len must be at least 1, got 0"):
        Mask.full(0, 3)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Mask.window(4, 0)
    with pytest.raises(ValueError, match="block_q must be at least 1, got 0"):
        Mask.causal(4).tiles(0, 1, 4)


def test_pytree_in_jax():
    mask = Mask.window(5, 2, prefix=1, like=jnp.zeros(1))
    leaves, structure = jax.tree.flatten(mask)
    assert len(leaves) == 2
    assert jax.tree.unflatten(structure, leaves).prefix == 1

    @jax.jit
    def through(mask):
        assert mask.prefix == 1
        return mask & mask

    np.testing.assert_array_equal(through(mask).dense(5), mask.dense(5))
    assert "5 queries" in repr(mask)
    assert "visible" not in jax.jit(lambda m: jnp.array(len(repr(m))) * 0)(mask).__repr__()


def test_a_mask_made_before_jax_is_imported_is_a_pytree():
    code = """
import heddle
mask = heddle.Mask.causal(3)
import heddle.jax, jax
assert jax.jit(lambda m: m.stop)(mask).shape == (1, 3)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_documents_under_jit_equal_eager():
    segments = jnp.array([[3, 3, 1, 1, 1, -1]])
    under_jit = jax.jit(lambda s: Mask.documents(s).tiles(2, 2, 6))(segments)
    eager = Mask.documents(segments).tiles(2, 2, 6)
    for got, want in zip(jax.tree.leaves(under_jit), jax.tree.leaves(eager)):
        np.testing.assert_array_equal(got, want)


def test_traces_under_torch_compile():
    """In a fresh process: the tests' type-checking hook is not traceable."""
    code = """
import torch, heddle
def f(segments, q):
    mask = heddle.Mask.documents(segments) & heddle.Mask.window(6, 3)
    tiles = mask.tiles(2, 2, 6)
    out, lse = heddle.attend(q, q, q, mask, implementation="reference", return_lse=True)
    other = heddle.attend(q, q, q, outside, implementation="reference")
    return out, lse, other, tiles.rows.lo, tiles.columns.full_hi, heddle.merge([(out, lse), (out, lse)])[1]
outside = heddle.Mask.causal(6)
segments, q = torch.tensor([[7, 7, 7, 2, 2, -1]]), torch.randn(1, 6, 2, 4)
for got, want in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(segments, q), f(segments, q)):
    torch.testing.assert_close(got, want)
causal = torch.compile(
    lambda q: heddle.attend(q, q, q, heddle.Mask.causal(q.shape[1])), fullgraph=True, dynamic=True, backend="aot_eager"
)
for seq in (6, 9):
    q = torch.randn(1, seq, 2, 4)
    torch.testing.assert_close(causal(q), heddle.attend(q, q, q, heddle.Mask.causal(seq)))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_what_follows_from_a_mask_is_computed_once():
    """So that all layers share it; but not inside of a trace, which ends with its arrays."""
    mask, q = Mask.causal(6), torch.zeros(1)
    assert mask.on(mask.start) is mask
    assert mask.on(q) is mask.on(q)
    assert mask.on(q).on(q) is mask.on(q)
    assert mask.tiles(2, 2, 6) is mask.tiles(2, 2, 6)
    assert mask.tiles(2, 2, 6) is not mask.tiles(2, 4, 6)
    with torch.inference_mode():
        mask.on(q).tiles(2, 2, 6)
    assert not mask.on(q).tiles(2, 2, 6).rows.lo.is_inference()
    jitted = jax.jit(lambda x: x + mask.on(x).tiles(2, 2, 6).rows.lo.sum())
    assert int(jitted(jnp.zeros((), jnp.int32))) == int(jitted(jnp.ones((), jnp.int32))) - 1
    with torch._subclasses.FakeTensorMode() as mode:
        assert isinstance(mask.on(mode.from_tensor(torch.zeros(1, device="cpu"))).start, torch.Tensor)
    assert type(mask.on(q).start) is torch.Tensor
