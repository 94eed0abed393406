"""What a transformer is made of, whichever: a linear map, a normalisation."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from heddle.attention.arrays import Array


@jax.custom_vjp
def product(x: Float[Array, "*batch inputs"], weight: Float[Array, "inputs outputs"]) -> Float[Array, "*batch outputs"]:
    """``x @ weight``.

    Autodiff asks for the weight's gradient transposed, for which XLA on a CPU first copies the output's gradient,
    transposed too: a tenth of a layer's time.
    """
    return x @ weight


def _product_forward(x, weight):
    return x @ weight, (x, weight)


def _product_backward(saved, gradient):
    x, weight = saved
    rows = tuple(range(x.ndim - 1))
    return gradient @ weight.T, jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))


product.defvjp(_product_forward, _product_backward)


class LowRank(nnx.Module):
    """A low-rank adapter, ``scale x @ a @ b`` (LoRA, arXiv 2106.09685, eq. 3, whose A and B are transposed here).

    It adds nothing at first: ``a`` is uniform in ``±1 / sqrt(inputs)``, ``b`` is zero.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, *, rngs: nnx.Rngs, dtype):
        bound = inputs**-0.5
        self.a = nnx.LoRAParam(jax.random.uniform(rngs.params(), (inputs, rank), dtype, -bound, bound))
        self.b = nnx.LoRAParam(jnp.zeros((rank, outputs), dtype))
        self.scale = scale

    def __call__(self, x):
        return self.scale * product(product(x, self.a.astype(x.dtype)), self.b.astype(x.dtype))


class Linear(nnx.Module):
    """``x @ weight + bias``, weight ``(inputs, outputs)``: on a CPU the transposed product is far slower.

    ``adapter`` is None, or what is trained beside the weight (:mod:`heddle.jax.lora`).
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, std: float, rngs: nnx.Rngs, dtype):
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None
        self.adapter: LowRank | None = nnx.data(None)

    def __call__(self, x):
        out = product(x, self.weight.astype(x.dtype))
        if self.bias is not None:
            out = out + self.bias.astype(x.dtype)
        return out if self.adapter is None else out + self.adapter(x)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*batch size"], weight: Float[Array, " size"], eps: float) -> Float[Array, "*batch size"]:
    """``x / sqrt(mean(x^2) + eps) * weight`` (arXiv 1910.07467, eq. 4) over the last axis, in float32 at least.

    Its gradient is written out: of autodiff's, XLA on a CPU makes twice as many passes over arrays of ``x``'s size.
    """
    return _normal(x, eps)[0] * weight.astype(x.dtype)


def _normal(x, eps):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * factor).astype(x.dtype), factor


def _rms_norm_forward(x, weight, eps):
    normal, factor = _normal(x, eps)
    return normal * weight.astype(x.dtype), (x, weight, factor)


def _rms_norm_backward(eps, saved, gradient):
    x, weight, factor = saved
    normal, wide = x.astype(factor.dtype) * factor, gradient.astype(factor.dtype)
    by_normal = wide * weight.astype(factor.dtype)
    by_x = factor * (by_normal - normal * jnp.mean(by_normal * normal, axis=-1, keepdims=True))
    by_weight = (wide * normal).sum(axis=tuple(range(x.ndim - 1)))
    return by_x.astype(x.dtype), by_weight.astype(weight.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class RMSNorm(nnx.Module):
    """See :func:`rms_norm`."""

    def __init__(self, size: int, eps: float, *, dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x) -> Any:
        return rms_norm(x, self.weight[...], self.eps)


class LayerNorm(nnx.Module):
    """``nnx.LayerNorm`` whose parameters are named as torch's (arXiv 1607.06450)."""

    def __init__(self, size: int, eps: float, *, dtype: Any):
        self.weight, self.bias = nnx.Param(jnp.ones(size, dtype)), nnx.Param(jnp.zeros(size, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        standard = jax.nn.standardize(x.astype(wide), epsilon=self.eps)
        return (standard * self.weight.astype(wide) + self.bias.astype(wide)).astype(x.dtype)
