"""The signatures of jax.nn and flax.nnx, beside their own functions: values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from heddle import Mask
from heddle.jax import dot_product_attention, nnx_attention


def arrays(q_len=33, kv_len=33, heads=4, kv_heads=2, dim=16, batch=2):
    shapes = [(batch, q_len, heads, dim), (batch, kv_len, kv_heads, dim), (batch, kv_len, kv_heads, dim)]
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def assert_same(ours, theirs, tolerance=3e-6):
    for have, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert have.dtype == want.dtype
        np.testing.assert_allclose(have, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


def both(function, query, key, value, **options):
    def total(query, key, value):
        out = function(query, key, value, **options)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(query, key, value)


LENGTHS = {
    "query_seq_lengths": jnp.array([20, 33], jnp.int32),
    "key_value_seq_lengths": jnp.array([31, 12], jnp.int32),
}
BAND = np.abs(np.arange(33)[:, None] - np.arange(33)) < 5
OPTIONS = {
    "nothing": {},
    "scale": {"scale": 0.7},
    "causal": {"is_causal": True},
    "key lengths": {"key_value_seq_lengths": LENGTHS["key_value_seq_lengths"]},
    "both lengths": LENGTHS,
    "causal with lengths": {"is_causal": True, **LENGTHS},
    "window": {"local_window_size": 6},
    "window before and after": {"local_window_size": (7, 2)},
    "causal window": {"local_window_size": (5, 5), "is_causal": True},
    "dense": {"mask": BAND[None, None]},
    "dense and causal": {"mask": BAND[None, None], "is_causal": True},
    "dense by sequence": {"mask": np.stack([BAND, np.tril(BAND)])[:, None]},
    "dense for all queries": {"mask": (np.arange(33) < 17)[None, None, None]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_as_jax_nn(options):
    given = arrays()
    assert_same(both(dot_product_attention, *given, **options), both(jax.nn.dot_product_attention, *given, **options))


def test_more_keys_than_queries():
    given = arrays(q_len=17)
    for options in ({}, {"is_causal": True}, {"local_window_size": (4, 3)}):
        assert_same(
            both(dot_product_attention, *given, **options), both(jax.nn.dot_product_attention, *given, **options)
        )


def test_without_batch_and_with_the_lse():
    query, key, value = (x[0] for x in arrays())
    options = {"is_causal": True, "return_residual": True}
    ours = dot_product_attention(query, key, value, **options)
    assert_same(ours, jax.nn.dot_product_attention(query, key, value, **options))
    assert ours[1].shape == (33, 4)


def test_half_precision():
    given = [x.astype(jnp.bfloat16) for x in arrays()]
    out = dot_product_attention(*given, is_causal=True)
    want = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in given), is_causal=True)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=2e-2)


def test_a_heddle_mask_is_combined_with_what_is_said():
    given, segments = arrays(), np.repeat([[4, 1]], [20, 13], axis=1)
    ours = both(dot_product_attention, *given, mask=Mask.documents(segments, causal=False), is_causal=True)
    dense = (segments[0, :, None] == segments[0]) & np.tri(33, dtype=bool)
    assert_same(ours, both(jax.nn.dot_product_attention, *given, mask=dense[None, None]))


def test_a_query_that_sees_nothing_gives_nothing():
    query, key, value = arrays()
    out = dot_product_attention(query, key, value, mask=np.zeros((1, 1, 33, 33), bool))
    np.testing.assert_array_equal(out, 0)


@pytest.mark.usefixtures("unhooked")
def test_refusals():
    query, key, value = arrays()
    with pytest.raises(NotImplementedError, match="bias is not supported"):
        dot_product_attention(query, key, value, jnp.zeros((1, 1, 33, 33)))
    gaps = np.ones((1, 1, 33, 33), bool)
    gaps[0, 0, 7, 3:5] = False
    with pytest.raises(ValueError, match="query 7 of row 0 sees keys with gaps"):
        dot_product_attention(query, key, value, mask=gaps)
    with pytest.raises(ValueError, match="the same for all heads"):
        dot_product_attention(query, key, value, mask=np.tri(4, 33, dtype=bool)[None, :, None])
    with pytest.raises(ValueError, match=r"must broadcast to .* got \(1, 1, 33, 32\)"):
        dot_product_attention(query, key, value, mask=gaps[..., 1:])
    with pytest.raises(ValueError, match="booleans, got float"):
        dot_product_attention(query, key, value, mask=np.zeros((1, 1, 33, 33)))
    with pytest.raises(ValueError, match="traced array: build the Mask instead"):
        jax.jit(lambda mask: dot_product_attention(query, key, value, mask=mask))(jnp.asarray(gaps))
    with pytest.raises(ValueError, match="local_window_size must not be negative"):
        dot_product_attention(query, key, value, local_window_size=(-1, 2))
    with pytest.raises(ValueError, match="implementation must be one of"):
        dot_product_attention(query, key, value, implementation="nothing")
    with pytest.raises(ValueError, match="query must have shape"):
        dot_product_attention(query[0, 0], key, value)


# ---------------------------------------------------------------- flax.nnx


def layer(attention_fn=None, **options):
    given = {} if attention_fn is None else {"attention_fn": attention_fn}
    return nnx.MultiHeadAttention(
        num_heads=4, in_features=32, qkv_features=32, decode=False, rngs=nnx.Rngs(0), **given, **options
    )


def run_layer(module, x, **options):
    def total(module, x):
        out = module(x, **options)
        return jnp.sum(jnp.sin(out)), out

    return nnx.value_and_grad(total, argnums=(0, 1), has_aux=True)(module, x)


CAUSAL = nnx.make_causal_mask(jnp.ones((3, 20)))
PADDED = nnx.make_attention_mask(jnp.ones((3, 20)), jnp.arange(20)[None] < jnp.array([[20], [7], [1]]))


@pytest.mark.parametrize("options", [{}, {"mask": CAUSAL}, {"mask": PADDED}, {"is_causal": True}], ids=str)
def test_as_nnx(options):
    x = jax.random.normal(jax.random.key(1), (3, 20, 32))
    assert_same(run_layer(layer(nnx_attention), x, **options), run_layer(layer(), x, **options), 1e-5)


def test_nnx_under_jit_and_in_half_precision():
    x = jax.random.normal(jax.random.key(1), (3, 20, 32))
    ours, theirs = (
        nnx.jit(lambda module, x: module(x, is_causal=True))(layer(function, dtype=jnp.bfloat16), x)
        for function in (nnx_attention, None)
    )
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=2e-2)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_nnx_any_axes_of_batch(batch):
    x = jax.random.normal(jax.random.key(1), (*batch, 20, 32))
    mask = nnx.make_causal_mask(jnp.ones((*batch, 20)))
    module = layer(nnx_attention)
    want = jnp.stack([layer()(one[None], mask=CAUSAL[:1])[0] for one in x.reshape(-1, 20, 32)]).reshape(x.shape)
    np.testing.assert_allclose(module(x, mask=mask), want, atol=1e-5)


def test_nnx_with_a_heddle_mask_under_jit():
    x, segments = jax.random.normal(jax.random.key(1), (3, 20, 32)), jnp.repeat(jnp.array([[0, 1]]), 10, axis=1)

    @nnx.jit
    def run(module, x, segments):
        return module(x, mask=Mask.documents(segments))

    out = run(layer(nnx_attention), x, segments)
    alone = layer()(x[:, 10:], mask=nnx.make_causal_mask(jnp.ones((3, 10))))
    np.testing.assert_allclose(out[:, 10:], alone, atol=1e-5)


def test_nnx_refusals():
    x = jnp.ones((1, 5, 32))
    with pytest.raises(NotImplementedError, match="dropout"):
        layer(nnx_attention, dropout_rate=0.1)(x, deterministic=False)
    assert layer(nnx_attention, dropout_rate=0.1)(x, deterministic=True).shape == x.shape
    with pytest.raises(NotImplementedError, match="sown"):
        layer(nnx_attention)(x, sow_weights=True)
