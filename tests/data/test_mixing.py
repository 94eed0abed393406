"""Several corpora as one stream: shares of tokens, each source in its own order, exact resume."""

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heddle.config import load_config
from heddle.data.mixing import mixed
from heddle.data.packing import Document, Packer
from heddle.run import training_data

weights_of = st.lists(st.floats(0.01, 100), min_size=1, max_size=4)
sizes = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)


def source(number, lengths):
    """Documents whose tokens tell source, epoch, document and place; another order in each epoch."""

    def read(epoch, cursor):
        order = np.random.default_rng([number, epoch]).permutation(len(lengths))
        for at in range(cursor or 0, len(lengths)):
            base = 10**6 * number + 10**4 * (epoch % 100) + 100 * order[at]
            yield base + np.arange(lengths[order[at]]), at + 1

    return read


@given(weights_of, st.data())
def test_every_source_has_its_share_and_its_order(weights, data):
    lengths = [data.draw(sizes) for _ in weights]
    sources = [source(i, n) for i, n in enumerate(lengths)]
    given_tokens = np.zeros(len(weights))
    shares = np.array(weights) / sum(weights)
    alone = [iter([]) for _ in weights]
    epochs = [-1] * len(weights)
    for document, _ in islice(mixed(sources, weights)(0, None), 300):
        if not len(document):
            continue
        which = int(document[0]) // 10**6
        while (expected := next(alone[which], None)) is None or not len(expected[0]):
            if expected is None:
                epochs[which] += 1
                alone[which] = iter(sources[which](epochs[which], None))
        np.testing.assert_array_equal(document, expected[0])
        given_tokens[which] += len(document)
        # No source is ahead by more than a document of what its share would be were all as far as the one behind most.
        behind = (given_tokens / shares).min()
        assert (given_tokens - 30 <= behind * shares + 1e-6).all()
    assert given_tokens.sum() > 0


@given(weights_of, st.integers(0, 60), st.data())
def test_a_mixed_stream_goes_on_from_any_cursor(weights, stop, data):
    lengths = [data.draw(sizes) for _ in weights]
    stream = mixed([source(i, n) for i, n in enumerate(lengths)], weights)
    items = list(islice(stream(0, None), stop + 40))
    cursor = json.loads(json.dumps(items[stop - 1][1])) if stop else None
    for (a, after), (b, expected) in zip(islice(stream(0, cursor), 40), items[stop:], strict=True):
        np.testing.assert_array_equal(a, b)
        assert json.dumps(after) == json.dumps(expected)


@given(weights_of, st.data())
def test_once_ends_where_a_source_does_and_repeats_nothing(weights, data):
    lengths = [data.draw(sizes) for _ in weights]
    stream = mixed([source(i, n) for i, n in enumerate(lengths)], weights, once=True)
    documents = [document for document, _ in stream(0, None)]
    tokens = np.concatenate(documents)
    assert len(np.unique(tokens)) == len(tokens)
    assert (tokens % 10**6 < 10**4).all(), "the first epoch"
    assert any((tokens // 10**6 == i).sum() == sum(n) for i, n in enumerate(lengths)), "one is read whole"


def test_examples_count_with_all_their_tokens():
    long = [Document(np.arange(30), np.arange(30) > 28)]
    stream = mixed([lambda *_: [(long[0], 1)], lambda *_: [(np.arange(10), 1)]], [1, 1])
    lengths = [len(d.tokens) if isinstance(d, Document) else len(d) for d, _ in islice(stream(0, None), 8)]
    assert (lengths.count(30), lengths.count(10)) == (2, 6)


@pytest.mark.parametrize("empty", [[], [np.arange(0)]])
@pytest.mark.parametrize("once", [False, True])
def test_a_source_without_tokens_is_an_error_and_no_endless_loop(empty, once):
    stream = mixed([source(0, [3]), lambda *_: [(document, 1) for document in empty]], [1, 1], once=once)
    with pytest.raises(ValueError, match="at least one token each, got none of source 1"):
        list(islice(stream(0, None), 10))


@pytest.mark.parametrize("weights", [[], [1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_impossible_weights(weights):
    with pytest.raises(ValueError, match="weights must be a positive number for each of 2 corpora, got"):
        mixed([source(0, [1]), source(1, [1])], weights)


# ---------------------------------------------------------------------- a run's data


@pytest.fixture
def corpora(tmp_path):
    """Texts of one letter each, so that a token tells its corpus."""
    for letter, count in (("a", 40), ("b", 25), ("c", 3)):
        (tmp_path / letter).mkdir()
        for i in range(count):
            (tmp_path / letter / f"{i}.txt").write_text(letter * (20 + 7 * i % 31))
    return [str(tmp_path / letter) for letter in "abc"]


def options(corpora, *more):
    return [
        f"data.corpora={json.dumps(corpora)}", "data.seq_len=64", "data.window=512", "training.batch_size=2",
        "training.eval_batches=4", "data.held_out=0.4", *more,
    ]  # fmt: skip


def count(batches, letter):
    return sum(int((batch.tokens == ord(letter)).sum()) for batch in batches)


def test_a_run_trains_and_is_evaluated_on_a_mixture(corpora):
    data = training_data(load_config(None, options(corpora[:2], "data.weights=[3,1]")))
    batches = list(islice(data.packer, 80))
    assert count(batches, "a") / count(batches, "b") == pytest.approx(3, rel=0.1)
    assert count(data.evaluation, "a") > count(data.evaluation, "b") > 0
    equal = list(islice(training_data(load_config(None, options(corpora[:2]))).packer, 80))
    assert count(equal, "a") / count(equal, "b") == pytest.approx(1, rel=0.1)

    packer = training_data(load_config(None, options(corpora[:2], "data.weights=[3,1]"))).packer
    assert isinstance(packer, Packer)
    for _ in range(33):
        next(packer)
    resumed = training_data(load_config(None, options(corpora[:2], "data.weights=[3,1]"))).packer
    resumed.restore(json.loads(json.dumps(packer.state())))
    for batch in batches[33:50]:
        np.testing.assert_equal(next(resumed), batch)


def test_examples_of_files_and_of_a_task_are_mixed(tmp_path):
    pytest.importorskip("reasoning_gym")
    path = tmp_path / "some.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}?", "completion": "{"#" * (i % 7 + 1)}"}}\n' for i in range(50)))
    corpora = [str(path), "reasoning-gym:chain_sum"]
    sft = ["training.objective=sft", "sft.loss_on=all", "data.weights=[2,1]", "data.seq_len=512", "data.window=4096"]
    sft += [f"data.corpora={json.dumps(corpora)}", "data.held_out=0.3"]
    ours = total = 0
    for batch in islice(training_data(load_config(None, sft)).packer, 10):
        for tokens, segments in zip(batch.tokens, batch.segment_ids):
            for segment in np.unique(segments[segments >= 0]):
                example = bytes(token for token in tokens[segments == segment].tolist() if token < 256)
                total += len(example)
                ours += len(example) * (b"#" in example and b"answer" not in example)
    assert ours / total == pytest.approx(2 / 3, abs=0.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["data.weights=[1]"], "data.weights must be a positive number for each of 2 corpora, got [1.0]"),
        (["data.weights=[1,0]"], "data.weights must be a positive number for each of 2 corpora, got [1.0, 0.0]"),
        (["data.corpora=[]"], "data.corpora must name at least one corpus, got none"),
        (["data.corpora=null", "data.weights=[1]"], "data.weights=[1.0] has no effect without data.corpora"),
        (["data.corpus=some.jsonl"], "data.corpus=some.jsonl and data.corpora=.* exclude each other: give one"),
        (["data.weights=[a,b]"], "data.weights must be a list of numbers or null, got ['a', 'b']"),
        (["training.objective=grpo"], "data.corpora=.* is for training.objective=lm and sft; grpo has one task"),
    ],
)
def test_what_cannot_be_mixed_is_told(corpora, wrong, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        load_config(None, options(corpora[:2], *wrong))


def test_which_corpus_is_empty_is_told(corpora):
    with pytest.raises(ValueError, match=rf"data\.held_out=0\.0001 of data\.corpus={corpora[0]} is no text at all"):
        training_data(load_config(None, options(corpora[::2], "data.held_out=0.0001")))
