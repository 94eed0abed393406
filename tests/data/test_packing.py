"""Packing: every token once and in order, the right targets, exact resume."""

import json
import threading
import time
from collections import defaultdict
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heddle import Mask
from heddle.data.packing import NO_TARGET, Batch, Document, Packer, ahead, best_fit, pack, prepared

documents_of = st.lists(st.integers(0, 40), max_size=25).map(
    # Every token of every document is another number, so that a row tells where each of its tokens came from.
    lambda lengths: [1000 * i + np.arange(n) for i, n in enumerate(lengths)]
)


def source(documents, orders=None):
    """Documents as a stream that can start anywhere; ``orders`` gives the order of an epoch."""

    def read(epoch, cursor):
        order = range(len(documents)) if orders is None else orders(epoch)
        for at, i in list(enumerate(order, 1))[cursor or 0 :]:
            yield documents[i], at

    return read


def join(batches):
    return Batch(*(np.concatenate(field) for field in zip(*batches, strict=True)))


def check_rows(batch, documents, times=1):
    """All of ``documents`` lie in ``batch``, ``times`` times, with the right positions and targets."""
    seen = defaultdict(list)
    for row in range(len(batch.tokens)):
        tokens, segments, positions, targets = (field[row] for field in batch)
        used = segments >= 0
        assert not used[used.sum() :].any(), "padding stands at the end"
        assert (np.diff(segments[used]) >= 0).all(), "segments are contiguous"
        assert (tokens[~used] == 0).all()
        assert (positions[~used] == 0).all()
        assert (targets[~used] == NO_TARGET).all()
        for segment in np.unique(segments[used]):
            piece = segments == segment
            document, start = divmod(int(tokens[piece][0]), 1000)
            n = int(piece.sum())
            assert (tokens[piece] == 1000 * document + start + np.arange(n)).all(), "one document, in order"
            assert (positions[piece] == start + np.arange(n)).all()
            following = tokens[piece] + 1
            if start + n == len(documents[document]):
                following[-1] = NO_TARGET
            assert (targets[piece] == following).all(), "a target is the document's next token, across a cut too"
            seen[document] += list(range(start, start + n))
    for i, document in enumerate(documents):
        assert sorted(seen[i]) == sorted(list(range(len(document))) * times)


@given(documents_of, st.integers(1, 17))
def test_every_token_lies_in_one_row_with_its_position_and_target(documents, row_len):
    batch = pack(documents, row_len)
    check_rows(batch, documents)
    total = sum(map(len, documents))
    assert batch.used() == pytest.approx(total / batch.tokens.size) if total else batch.tokens.shape == (0, row_len)
    # n - 1 targets a document, however it was cut.
    assert (batch.targets != NO_TARGET).sum() == sum(max(len(d) - 1, 0) for d in documents)


@given(documents_of, st.integers(1, 17), st.integers(1, 5), st.integers(1, 300), st.integers(1, 3), st.integers(0, 9))
def test_a_stream_holds_every_token_once_an_epoch(documents, row_len, rows, window, epochs, seed):
    def packer(seed):
        return Packer(source(documents), row_len, rows, seed=seed, window=window, epochs=epochs)

    if not sum(map(len, documents)):
        with pytest.raises(ValueError, match="documents must hold at least one token"):
            next(packer(seed))
        return
    batches = list(packer(seed))
    assert all(field.shape == (rows, row_len) for batch in batches for field in batch)
    check_rows(join(batches), documents, times=epochs)
    again = list(packer(seed))
    assert all(np.array_equal(a, b) for x, y in zip(batches, again, strict=True) for a, b in zip(x, y, strict=True))


@given(documents_of, st.integers(1, 17), st.integers(1, 4), st.integers(1, 300), st.data())
def test_a_restored_stream_goes_on_with_the_same_batches(documents, row_len, rows, window, data):
    if not sum(map(len, documents)):
        return

    def orders(epoch):
        return np.random.default_rng(epoch).permutation(len(documents)).tolist()

    def packer():
        return Packer(source(documents, orders), row_len, rows, seed=3, window=window)

    whole = packer()
    stop = data.draw(st.integers(0, 30))
    for _ in range(stop):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    resumed = packer()
    resumed.restore(state)
    for _ in range(10):
        assert resumed.state() == whole.state()
        for a, b in zip(next(whole), next(resumed), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_state_is_independent_of_the_number_of_rows_in_a_batch():
    documents = [1000 * i + np.arange(7 * i % 31 + 1) for i in range(40)]
    by_two = Packer(source(documents), 16, 2, window=100)
    for _ in range(9):
        next(by_two)
    by_six = Packer(source(documents), 16, 6, window=100)
    by_six.restore(by_two.state())
    for a, b in zip(join([next(by_two) for _ in range(3)]), next(by_six), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "change",
    [
        lambda documents: documents[:-1],  # the last window ends sooner
        lambda documents: [*documents[:17], documents[17] + 1, *documents[18:]],
        lambda documents: [*documents[:3], np.arange(5), *documents[3:]],  # a file more, whose name comes earlier
        lambda documents: [*documents[:18], np.concatenate(documents[18:20]), *documents[20:]],
    ],
)
def test_a_state_goes_on_with_the_documents_it_was_saved_with_or_not_at_all(change):
    documents = [1000 * i + np.arange(10) for i in range(20)]
    whole = Packer(source(documents), 16, 2, window=100, epochs=1)
    while whole.state()["window"] == 0 or whole.state()["row"] == 0:
        next(whole)
    resumed = Packer(source(change(documents)), 16, 2, window=100, epochs=1)
    resumed.restore(whole.state())
    for _ in range(2):  # nor at a second try
        with pytest.raises(ValueError, match="those of its window 1 have changed"):
            next(resumed)


def test_the_seed_decides_the_order_of_rows():
    documents = [1000 * i + np.arange(20) for i in range(50)]
    first, second = (next(Packer(source(documents), 20, 50, seed=seed, epochs=1)) for seed in (0, 1))
    assert not np.array_equal(first.tokens, second.tokens)
    assert np.array_equal(np.sort(first.tokens, axis=0), np.sort(second.tokens, axis=0))


@given(st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_wastes_less_than_half(lengths):
    rows = best_fit(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    fill = [sum(lengths[i] for i in row) for row in rows]
    assert all(f <= 50 for f in fill)
    # Any two rows together hold more than one row's worth, or best fit would have made one of them.
    assert len(fill) < 2 or sum(sorted(fill)[:2]) > 50


def test_best_fit_takes_the_fullest_row_that_has_room():
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_packed_rows_are_what_the_document_mask_takes():
    batch = pack([np.arange(5), np.arange(3)], 10)
    assert Mask.documents(batch.segment_ids).visible() == 5 * 6 // 2 + 3 * 4 // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"row_len": 0}, "row_len must be at least 1, got 0"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Packer(source([np.arange(3)]), **{"row_len": 4, "rows": 1, **arguments})


def test_documents_must_be_token_ids():
    with pytest.raises(ValueError, match=r"a document must be a sequence of token ids, got float64 of shape \(2,\)"):
        pack([np.array([0.5, 1.0])], 4)
    with pytest.raises(ValueError, match="lengths must lie between 1 and capacity 4, got 5"):
        best_fit([5], 4)


def test_what_is_not_learned_is_no_target():
    learned = [False, False, True, False, True, True, True]
    batch = pack([Document(np.arange(7) + 10, learned), [5]], 4)  # cut after four tokens
    assert batch.tokens.tolist() == [[10, 11, 12, 13], [14, 15, 16, 5]]
    assert batch.targets.tolist() == [[NO_TARGET, 12, NO_TARGET, 14], [15, 16, NO_TARGET, NO_TARGET]]
    with pytest.raises(ValueError, match=r"learned must be a bool for each of the 2 tokens, got bool of shape \(1,\)"):
        pack([Document([1, 2], [True])], 4)


def test_an_error_in_the_documents_is_not_taken_for_their_end():
    broken = True

    def documents(epoch, cursor):
        yield np.arange(3), 1
        if broken:
            raise OSError("the disk is gone")
        yield np.arange(5, 8), 2

    packer = Packer(documents, 3, 2, window=3, epochs=1)  # the error comes after the batch's first row was taken
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(packer)
    broken = False
    assert next(packer).tokens.tolist() == [[0, 1, 2], [5, 6, 7]]


def test_ahead_hands_out_the_same_items_and_passes_errors_on():
    assert list(ahead(lambda: iter(range(50)), depth=3)) == list(range(50))

    def broken():
        yield 1
        raise OSError("line 7 is broken")

    items = ahead(broken, depth=2)
    assert next(items) == 1
    with pytest.raises(OSError, match="line 7 is broken"):
        next(items)


def test_a_window_is_packed_while_the_one_before_is_handed_out():
    read = []

    def documents(epoch, cursor):
        for i in range(cursor or 0, 1000):
            read.append(i)
            yield np.arange(8), i + 1

    packer = Packer(documents, 8, 2, window=80, epochs=1)  # five batches a window
    with closing(prepared(packer)) as batches:
        next(batches)
        end = time.monotonic() + 60
        while len(read) < 20 and time.monotonic() < end:  # nobody asks for the second batch
            time.sleep(0.01)
    assert 20 <= len(read) <= 40  # the next window's, but not all there is


def test_prepared_batches_tell_where_the_packer_stands_and_which_is_the_last():
    def packer():
        return Packer(lambda epoch, cursor: ((np.arange(5), i + 1) for i in range(cursor or 0, 7)), 8, 2, epochs=1)

    plain, seen = packer(), list(prepared(packer()))
    for batch, after, _ in seen:
        np.testing.assert_equal(batch, next(plain))
        assert after == plain.state()
    assert [last for *_, last in seen] == [False, False, False, True]
    [(_, _, last)] = prepared(Packer(lambda *_: [(np.arange(5), 1)], 8, 2, epochs=1))
    assert last


def test_closing_ahead_stops_its_thread():
    before = threading.active_count()
    items = ahead(lambda: iter(range(10**9)), depth=2)
    assert next(items) == 0
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before
