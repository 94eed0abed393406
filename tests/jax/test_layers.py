"""Gradients that are written out are autodiff's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heddle.jax.layers import product, rms_norm


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_product(shape, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = jax.random.normal(keys[0], shape, dtype), jax.random.normal(keys[1], (8, 3), dtype)
    cotangent = jax.random.normal(keys[2], (*shape[:-1], 3), dtype)

    def gradients(multiply):
        out, back = jax.vjp(multiply, x, weight)
        return out, *back(cotangent)

    ours, expected = gradients(product), gradients(jnp.matmul)
    for a, b in zip(ours, expected):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), rtol=1e-2 if dtype == "bfloat16" else 1e-6)


def test_a_product_is_mapped_and_differentiated_twice():
    x, weight = jax.random.normal(jax.random.key(0), (4, 5, 8)), jax.random.normal(jax.random.key(1), (4, 8, 3))

    def curvature(multiply):
        loss = lambda x, weight: (multiply(x, weight) ** 2).sum()  # noqa: E731
        slope = lambda x, weight: (jax.grad(loss, 1)(x, weight) ** 2).sum()  # noqa: E731
        return jax.vmap(jax.grad(slope))(x, weight)

    np.testing.assert_allclose(curvature(product), curvature(jnp.matmul), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_root_mean_squares(dtype, weights):
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = 3 * jax.random.normal(keys[0], (2, 5, 8), dtype), 1 + jax.random.normal(keys[1], (8,), weights)
    x, cotangent = x.at[0, 0].set(0), jax.random.normal(keys[2], (2, 5, 8), dtype)

    def formula(x, weight):
        x, weight = x.astype("float32"), weight.astype("float32")
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * weight

    def gradients(norm):
        out, back = jax.vjp(norm, x, weight)
        return out, *back(cotangent.astype(out.dtype))

    for a, b, like in zip(gradients(lambda x, w: rms_norm(x, w, 1e-2)), gradients(formula), (x, x, weight)):
        assert (a.dtype, a.shape) == (like.dtype, like.shape)
        tolerance = 1e-5 if dtype == weights == "float32" else 3e-2
        np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), rtol=tolerance, atol=tolerance)
