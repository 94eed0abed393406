"""Losses, log-probabilities and entropies by stretches are those of the whole of the logits, which never exists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from heddle.data.packing import NO_TARGET, Batch
from heddle.jax.lm import lm
from heddle.jax.logits import MAX_BYTES, cross_entropy, log_probabilities
from heddle.jax.model import Transformer
from heddle.jax.model_config import ModelConfig
from heddle.jax.parallel import Layout, make_mesh

WEIGHT, HIDDEN = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(8, 50), (2, 7, 8)]))
TARGETS = jnp.array([[1, 2, NO_TARGET, 4, 49, 0, 3], [NO_TARGET] * 6 + [8]])
BYTES = [1, 4 * 2 * 50 * 3, 2**26]  # a token a row at a time, three, all


def by_torch(reduce):
    """A function of the logits in float64, and its gradients by weight and hidden states."""
    weight, hidden = (torch.from_numpy(np.array(x, np.float64)).requires_grad_() for x in (WEIGHT, HIDDEN))
    value = reduce(hidden @ weight)
    gradients = torch.autograd.grad(value.sum(), (weight, hidden))
    return value.detach().numpy(), [g.numpy() for g in gradients]


def check(ours, theirs):
    value, gradients = by_torch(theirs)

    def total(weight, hidden):
        out = ours(weight, hidden)
        return out.sum(), out

    (_, out), found = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(WEIGHT, HIDDEN)
    np.testing.assert_allclose(out, value, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, gradients):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())


@pytest.mark.parametrize("max_bytes", BYTES)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_is_torchs(max_bytes, smoothing):
    labels = torch.from_numpy(np.array(TARGETS)).long()

    def theirs(logits):
        options = {"ignore_index": NO_TARGET, "label_smoothing": smoothing, "reduction": "sum"}
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)

    def ours(weight, hidden):
        return cross_entropy(lambda x: x @ weight, hidden, TARGETS, smoothing=smoothing, max_bytes=max_bytes)[0]

    check(ours, theirs)
    assert int(cross_entropy(lambda x: x @ WEIGHT, HIDDEN, TARGETS, max_bytes=max_bytes)[1]) == 7


@pytest.mark.parametrize("max_bytes", BYTES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_and_entropies_are_torchs(max_bytes, temperature):
    labels, options = torch.from_numpy(np.array(TARGETS)).long(), {"temperature": temperature, "max_bytes": max_bytes}

    def distribution(logits):
        return torch.distributions.Categorical(logits=logits / temperature), labels != NO_TARGET

    def log_prob(logits):
        of, there = distribution(logits)
        return torch.where(there, of.log_prob(labels.clamp(min=0)), 0.0)

    def entropy(logits):
        of, there = distribution(logits)
        return torch.where(there, of.entropy(), 0.0)

    check(lambda w, h: log_probabilities(lambda x: x @ w, h, TARGETS, **options).targets, log_prob)
    check(lambda w, h: log_probabilities(lambda x: x @ w, h, TARGETS, entropy=True, **options).entropy, entropy)
    assert log_probabilities(lambda x: x @ WEIGHT, HIDDEN, TARGETS).entropy is None


def test_stretches_without_a_target_are_passed_over():
    """Only where some row has a target is a head computed, forward and backward; the results are the same."""
    targets, computed = jnp.full((2, 12), NO_TARGET).at[:, 4].set(3).at[1, 5].set(4), []
    hidden = jax.random.normal(jax.random.key(2), (2, 12, 8))

    def loss(weight, hidden, max_bytes):
        def head(x):
            jax.debug.callback(lambda: computed.append(1))
            return x @ weight

        return cross_entropy(head, hidden, targets, max_bytes=max_bytes)[0]

    def gradients(max_bytes):
        computed.clear()
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)(WEIGHT, hidden, max_bytes)
        jax.effects_barrier()
        return found, len(computed)

    (whole, _), (parts, times) = gradients(2**26), gradients(BYTES[1])  # three tokens a row at a time: one of four
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, whole)
    assert times == 1  # the gradient is found where the logits are


def test_a_temperature_must_be_positive():
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        log_probabilities(lambda x: x @ WEIGHT, HIDDEN, TARGETS, temperature=0.0)


def test_cross_entropy_is_stable_at_large_logits_and_float32_from_bfloat16():
    hidden = jnp.array([[[1e4, -1e4], [-1e4, 1e4]]], jnp.bfloat16)
    total, count = cross_entropy(lambda x: x, hidden, jnp.array([[0, 0]]))
    assert total.dtype == jnp.float32
    assert (float(total), int(count)) == (pytest.approx(2e4, rel=1e-2), 2)


def test_rows_that_devices_share_are_cut_in_each_ones_part():
    mesh = make_mesh(data=2, context=2, tensor=2)
    hidden, targets = jnp.concatenate([HIDDEN, HIDDEN[:, ::-1]], 1)[:, :14], jnp.concatenate([TARGETS, TARGETS], 1)

    @jax.jit
    def ours(hidden, targets):
        return log_probabilities(lambda x: x @ WEIGHT, hidden, targets, layout=Layout(mesh), max_bytes=400).targets

    expected = log_probabilities(lambda x: x @ WEIGHT, hidden, targets).targets
    np.testing.assert_allclose(ours(hidden, targets), expected, atol=1e-5)


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_whole_of_the_logits_never_exists(replicas):
    """Of a step's memory, of a model and of replicas of it: compiled, never run."""
    config = ModelConfig(
        vocab_size=32_768, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    if replicas > 1:
        config = config.with_parscale(parscale_n=replicas, parscale_n_tokens=2)
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    batch = Batch(*(jax.ShapeDtypeStruct((2, 1024), jnp.int32) for _ in range(4)))

    def loss(params, batch):
        return lm(nnx.merge(graph, params), batch, jax.random.key(0))[0]

    memory = jax.jit(jax.grad(loss)).lower(params, batch).compile().memory_analysis()
    all_logits = 2 * 1024 * 32_768 * 4
    assert memory.temp_size_in_bytes < 0.9 * all_logits


def test_a_large_vocabulary_takes_a_quarter_of_the_memory_and_less():
    """Loss and gradients over 4,096 tokens and 49,152 entries; compiled, never run."""
    shape, dtype = jax.ShapeDtypeStruct, jnp.float32
    arguments = shape((576, 49_152), dtype), shape((1, 4096, 576), dtype), shape((1, 4096), jnp.int32)

    def peak(max_bytes: int) -> int:
        def loss(weight, hidden, targets):
            return cross_entropy(lambda x: x @ weight, hidden, targets, max_bytes=max_bytes)[0]

        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    whole = 4096 * 49_152 * 4
    assert peak(2 * whole) >= 2 * whole
    assert 4 * peak(MAX_BYTES) < peak(2 * whole)
