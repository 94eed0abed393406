"""What a transformer is made of, whichever: a linear map, a normalisation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from heddle.attention.arrays import Array


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
        return self.scale * (x @ self.a.astype(x.dtype) @ self.b.astype(x.dtype))


class Linear(nnx.Module):
    """``x @ weight + bias``, weight ``(inputs, outputs)``: on a CPU the transposed product is far slower.

    ``adapter`` is None, or what is trained beside the weight (:mod:`heddle.jax.lora`).
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, std: float, rngs: nnx.Rngs, dtype):
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None
        self.adapter: LowRank | None = nnx.data(None)

    def __call__(self, x):
        out = x @ self.weight.astype(x.dtype)
        if self.bias is not None:
            out = out + self.bias.astype(x.dtype)
        return out if self.adapter is None else out + self.adapter(x)


class RMSNorm(nnx.Module):
    """Root mean square normalisation (arXiv 1910.07467, eq. 4) of the last axis, computed in float32 at least."""

    def __init__(self, size: int, eps: float, *, dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return self.weight.astype(x.dtype) * wide.astype(x.dtype)


class LayerNorm(nnx.Module):
    """``nnx.LayerNorm`` whose parameters are named as torch's (arXiv 1607.06450)."""

    def __init__(self, size: int, eps: float, *, dtype: Any):
        self.weight, self.bias = nnx.Param(jnp.ones(size, dtype)), nnx.Param(jnp.zeros(size, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        standard = jax.nn.standardize(x.astype(wide), epsilon=self.eps)
        return (standard * self.weight.astype(wide) + self.bias.astype(wide)).astype(x.dtype)
