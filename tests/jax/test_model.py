"""The transformer: its logits are transformers', whatever the batch, the packing or the cache."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import CASES, SIZES, hugging_face, logits, tokens

from heddle.jax import KVCache, ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=SIZES["vocab_size"], hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3,
)  # fmt: skip
run = jax.jit(lambda model, *arguments, **options: model(*arguments, **options))


@cache
def tiny(**changes) -> Transformer:
    return Transformer(ModelConfig(**{**CONFIG.__dict__, "rope": None, **changes}), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a case, as transformers saves it."""

    @cache
    def folder(name):
        path = tmp_path_factory.mktemp("model")
        hugging_face(name).save_pretrained(path)
        return path

    return folder


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, saved):
    model = Transformer.from_pretrained(saved(name))
    ids = tokens(2, 40)
    expected = logits(hugging_face(name), ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(run(model, jnp.asarray(ids)), expected, rtol=0, atol=1e-4)


def test_packed_documents_are_each_document_alone():
    model = tiny()
    ids = tokens(1, 24)
    segments = np.repeat([4, 0, 9, -1], [9, 4, 9, 2])[None].astype(np.int32)
    packed = np.asarray(run(model, jnp.asarray(ids), segment_ids=jnp.asarray(segments)))
    assert np.isfinite(packed).all()
    for begin, end in ((0, 9), (9, 13), (13, 22)):
        alone = run(model, jnp.asarray(ids[:, begin:end]))
        np.testing.assert_allclose(packed[:, begin:end], alone, rtol=0, atol=2e-5)


def test_a_window_also_holds_within_packed_documents():
    model = tiny(model_type="mistral", sliding_window=4)
    ids = tokens(1, 20)
    packed = run(model, jnp.asarray(ids), segment_ids=jnp.asarray(np.repeat([0, 1], [8, 12])[None]))
    np.testing.assert_allclose(packed[:, 8:], run(model, jnp.asarray(ids[:, 8:])), rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_cached_decoding_of_a_ragged_batch_is_the_full_forward(window):
    model = tiny(model_type="mistral", sliding_window=window)
    lengths, more = np.array([9, 4, 12]), 6
    ids = tokens(3, 12 + more)
    full = np.asarray(run(model, jnp.asarray(ids)))

    padding = np.where(np.arange(12) < lengths[:, None], 0, -1).astype(np.int32)
    cache = KVCache.empty(model.config, 3, 20)
    out, cache = run(model, jnp.asarray(ids[:, :12]), segment_ids=jnp.asarray(padding), cache=cache)
    np.testing.assert_array_equal(cache.lengths, lengths)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(out[row, :n], full[row, :n], rtol=0, atol=2e-5)
    for step in range(more):
        now = np.take_along_axis(ids, (lengths + step)[:, None], axis=1)
        out, cache = run(model, jnp.asarray(now), cache=cache)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(out[row, 0], full[row, n + step], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(cache.lengths, lengths + more)


def test_a_prompt_in_pieces_is_the_prompt_at_once():
    model, ids = tiny(), tokens(2, 15)
    whole = run(model, jnp.asarray(ids))
    cache = KVCache.empty(model.config, 2, 15)
    pieces = []
    for begin, end in ((0, 4), (4, 5), (5, 15)):
        out, cache = run(model, jnp.asarray(ids[:, begin:end]), cache=cache)
        pieces.append(out)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=0, atol=2e-5)


def test_only_distances_between_positions_matter():
    model, ids = tiny(), jnp.asarray(tokens(1, 10))
    shifted = run(model, ids, jnp.arange(10)[None] + 30)
    np.testing.assert_allclose(shifted, run(model, ids), rtol=0, atol=1e-4)
    spread = run(model, ids, jnp.arange(10)[None] * 3)
    assert np.abs(spread - run(model, ids)).max() > 0.1


def test_hidden_and_head_are_the_call():
    model, ids = tiny(), jnp.asarray(tokens(2, 6))
    hidden = jax.jit(lambda model, ids: model.hidden(ids))(model, ids)
    assert hidden.shape == (2, 6, 32)
    np.testing.assert_allclose(model.head(hidden), run(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_with_layers_recomputed_are_the_same(tied):
    ids = jnp.asarray(tokens(2, 12))

    def loss(model):
        chosen = jax.nn.log_softmax(model(ids[:, :-1]))
        return -jnp.take_along_axis(chosen, ids[:, 1:, None], axis=-1).mean()

    model = tiny(tie_word_embeddings=tied)
    again = nnx.clone(model)
    again.remat = True
    expected, found = jax.jit(jax.grad(loss))(model), jax.jit(jax.grad(loss))(again)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_weights_in_float32_compute_in_bfloat16():
    model = Transformer(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.float32)
    out = run(model, jnp.asarray(tokens(1, 8)))
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    exact = np.asarray(run(tiny(), jnp.asarray(tokens(1, 8))))
    assert np.abs(np.asarray(out, np.float32) - exact).max() < 0.05 * np.abs(exact).max()


def test_initial_weights_come_from_the_key():
    first, second, other = (Transformer(CONFIG, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))
    assert not np.array_equal(first.head.weight[...], other.head.weight[...])
    assert abs(float(first.head.weight[...].std()) - 0.3) < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": np.zeros((2, 3), np.float32)}, "tokens must be integers of shape"),
        ({"tokens": np.zeros(3, np.int32)}, "tokens must be integers of shape"),
        ({"tokens": np.array([[5, 199]])}, r"tokens must be in \[0, 199\), got 199"),
        ({"tokens": np.array([[-1, 5]])}, r"tokens must be in \[0, 199\), got -1"),
        ({"tokens": tokens(2, 3), "positions": np.zeros((2, 4), int)}, r"positions must have tokens' shape \(2, 3\)"),
        ({"tokens": tokens(2, 3), "segment_ids": np.zeros((1, 3), np.int32)}, "segment_ids must have tokens' shape"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, message):
    # The door itself: in tests jaxtyping stands before it and would refuse the shapes first.
    given = {"positions": None, "segment_ids": None, "cache": None, **arguments}
    with pytest.raises(ValueError, match=message):
        tiny()._check(**{name: array if array is None else jnp.asarray(array) for name, array in given.items()})


def test_a_segment_id_that_comes_back_is_refused():
    with pytest.raises(ValueError, match="in row 0, segment id 0 goes from key 0 to key 2"):
        tiny()(jnp.asarray(tokens(1, 3)), segment_ids=jnp.array([[0, 1, 0]]))


def test_a_cache_that_does_not_fit_is_refused():
    model = tiny()
    cache = KVCache.empty(model.config, 2, 8)
    with pytest.raises(ValueError, match="cache must be of 2 layers and batch size 1, got 2 and 2"):
        model(jnp.asarray(tokens(1, 3)), cache=cache)
    with pytest.raises(ValueError, match="cache must have room for 9 tokens of sequence 0, got max_len 8"):
        model(jnp.asarray(tokens(2, 9)), cache=cache)
    with pytest.raises(ValueError, match="-1 only at the end of each row"):
        model(jnp.asarray(tokens(2, 3)), segment_ids=jnp.array([[-1, 0, 0]] * 2), cache=cache)
