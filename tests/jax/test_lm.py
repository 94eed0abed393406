"""The loss of packed rows is the loss of the documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from heddle.data.packing import NO_TARGET, Batch, pack
from heddle.jax.lm import lm
from heddle.jax.model import Transformer
from heddle.jax.model_config import ModelConfig

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return Transformer(config, rngs=nnx.Rngs(0))


def documents(*lengths):
    random = np.random.default_rng(0)
    return [random.integers(0, 50, n) for n in lengths]


def loss_and_gradient(model, batch):
    graph, params = nnx.split(model)

    def loss(params):
        total, count, _ = lm(nnx.merge(graph, params), batch, KEY)
        return total, count

    (total, count), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(total), int(count), gradient


def assert_trees_close(a, b, tolerance):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(a))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)


def test_a_packed_batch_has_the_loss_and_gradient_of_its_documents_one_by_one(model):
    lengths = (12, 4, 12, 12, 4, 4, 4)
    packed = pack(documents(*lengths), 16)
    assert len(packed.tokens) < len(lengths)
    total, count, gradient = loss_and_gradient(model, packed)

    totals, counts, gradients = zip(
        *(loss_and_gradient(model, pack([document], len(document))) for document in documents(*lengths)), strict=True
    )
    assert count == sum(counts) == sum(n - 1 for n in lengths)
    # Token-weighted: the mean over all tokens is not the mean of the documents' means.
    assert total / count == pytest.approx(sum(totals) / sum(counts), rel=1e-5)
    assert_trees_close(gradient, jax.tree.map(lambda *parts: sum(parts), *gradients), 1e-5)


def test_a_cut_document_keeps_every_target_and_loses_context_alone(model):
    (document,) = documents(40)
    total, count, _ = loss_and_gradient(model, pack([document], 16))
    assert count == 39
    expected = 0.0
    for start in (0, 16, 32):  # each piece sees itself alone, at its own positions
        piece = document[None, start : start + 16]
        targets = np.full_like(piece, NO_TARGET)
        following = document[start + 1 : start + 17]
        targets[0, : len(following)] = following
        positions = start + np.arange(piece.shape[1])[None]
        log = jax.nn.log_softmax(model(piece, positions=positions))
        expected -= sum(float(log[0, i, t]) for i, t in enumerate(targets[0]) if t != NO_TARGET)
    assert total == pytest.approx(expected, rel=1e-5)


def test_padding_costs_nothing(model):
    packed = pack(documents(5), 16)
    empty = [np.full_like(field, fill) for field, fill in zip(packed, (0, -1, 0, NO_TARGET), strict=True)]
    more = Batch(*map(np.concatenate, zip(packed, empty, strict=True)))
    (total, count, _), (expected, expected_count, _) = (lm(model, batch, KEY) for batch in (more, packed))
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    assert int(count) == int(expected_count) == 4
