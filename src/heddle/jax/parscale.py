"""ParScale's parts of the transformer: prefixes, attention between replicas, their sum; which parameters are new.

Rows are replica-major, ``(replicas batch)``; the mathematics is :mod:`heddle.attention.replicas`'. New parts start so
that a model with pretrained weights computes nearly what it did (arXiv 2505.10475 leaves this open).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float

from heddle.attention import Mask
from heddle.attention.arrays import Array
from heddle.attention.replicas import aggregate, attend_replicas, hidden_key, replica_attention

from .layers import Linear
from .model_config import ModelConfig

if TYPE_CHECKING:
    from .model import Transformer

CROSS_ATTN_BIAS = -4.0  #: at the start other replicas' keys weigh exp(-4) of one's own
PREFIX_V_RANGE = 0.1  #: of initializer_range
HIDING_TOKENS = 128  #: that show where queries point


class Replicas(nnx.Module):
    """What a layer's self-attention has beyond itself: a learned prefix and, in joint mode, the other replicas."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype):
        self.config = config
        std, size = config.initializer_range, config.num_attention_heads * config.dim
        shape = (config.parscale_n, config.kv_heads, config.parscale_n_tokens, config.dim)
        joint = config.cross_attn_mode(layer) == "joint"

        def prefix(std: float) -> nnx.Param | None:
            return nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype)) if config.parscale_n_tokens else None

        self.prefix_k = prefix(std)
        self.prefix_v = prefix(PREFIX_V_RANGE * std)
        self.cross_proj = (
            Linear(size, config.hidden_size, bias=False, std=0.0, rngs=rngs, dtype=dtype) if joint else None
        )
        self.cross_bias = nnx.Param(jnp.full(config.num_attention_heads, CROSS_ATTN_BIAS, dtype)) if joint else None

    def __call__(
        self,
        query: Float[Array, "rows seq heads dim"],
        key: Float[Array, "rows seq kv_heads dim"],
        value: Float[Array, "rows seq kv_heads dim"],
        mask: Mask,
        attend_own: Callable[[Array, Array, Array], tuple[Array, Array]] | None = None,
    ) -> tuple[Float[Array, "rows seq heads dim"], Float[Array, "rows seq hidden"] | None]:
        """Attention over own keys, prefix and other replicas; and what the others add after the output projection.

        ``attend_own`` as of :func:`heddle.attention.replicas.replica_attention`.
        """
        config, prefix = self.config, None
        if self.prefix_k is not None and self.prefix_v is not None:
            prefix = self.prefix_k.astype(query.dtype), self.prefix_v.astype(query.dtype)
        out, cross = replica_attention(
            query, key, value, mask, replicas=config.parscale_n,
            prefix=prefix, prefix_scope=config.parscale_prefix_scope,
            current=None if self.cross_proj is None else (key, value),
            bias=None if self.cross_bias is None else self.cross_bias[...],
            replica_theta=_replica_theta(config), attend_own=attend_own,
        )  # fmt: skip
        if cross is None or self.cross_proj is None:
            return out, None
        return out, self.cross_proj(cross.reshape(*cross.shape[:2], -1))


class CrossAttention(nnx.Module):
    """Attention over all replicas at the same position, for the sublayer mode."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        self.config = config
        d, h = config.hidden_size, config.dim
        options: dict[str, Any] = {"bias": False, "std": config.initializer_range, "rngs": rngs, "dtype": dtype}
        self.q = Linear(d, config.num_attention_heads * h, **options)
        self.k = Linear(d, config.kv_heads * h, **options)
        self.v = Linear(d, config.kv_heads * h, **options)
        self.o = Linear(config.num_attention_heads * h, d, bias=False, std=0.0, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "rows seq hidden"], visible: Bool[Array, "visible_rows seq"]
    ) -> Float[Array, "rows seq hidden"]:
        query, key, value = (
            part.reshape(*part.shape[:2], -1, self.config.dim) for part in (self.q(x), self.k(x), self.v(x))
        )
        out, _ = attend_replicas(
            query, key, value, visible, replicas=self.config.parscale_n, replica_theta=_replica_theta(self.config)
        )
        return self.o(out.reshape(*x.shape[:2], -1))


def _replica_theta(config: ModelConfig) -> float | None:
    """The base of the rotation by the replica's index, the model's own; None: not enabled."""
    return config.rotary.theta if config.enable_replica_rope else None


class Aggregate(nnx.Module):
    """The replicas' sum, with weights that an MLP finds in all of them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        self.replicas, self.smoothing = config.parscale_n, config.parscale_attn_smooth
        d = config.hidden_size
        options: dict[str, Any] = {"bias": True, "std": config.initializer_range, "rngs": rngs, "dtype": dtype}
        self.down = Linear(self.replicas * d, d, **options)
        self.up = Linear(d, self.replicas, **options)

    def __call__(self, hidden: Float[Array, "rows seq hidden"]) -> Float[Array, "batch seq hidden"]:
        layer = lambda features: self.up(jax.nn.silu(self.down(features)))  # noqa: E731
        return aggregate(hidden, layer, replicas=self.replicas, smoothing=self.smoothing)


# ---------------------------------------------------------------- new parameters

_NEW = {"replicas", "cross", "cross_norm", "aggregate"}


def is_new(path: tuple, value: Any = None) -> bool:
    """Whether the parameter at this path of a :class:`Transformer` is ParScale's, not its base model's.

    A filter as ``nnx.split``, ``nnx.state`` and ``nnx.DiffState`` take it; and for ``jax.tree_util.tree_map_with_path``
    over a model or its state, to train the new parameters alone.
    """
    return any(getattr(key, "name", getattr(key, "key", key)) in _NEW for key in path)


def hide_prefixes(model: Transformer, rngs: nnx.Rngs) -> None:
    """Move every layer's prefix keys by the key that its queries see least, found by one run over random tokens.

    For a model whose prefixes are new: keys near 0 would take much of the attention of a pretrained one.
    """
    config = model.config
    length = min(HIDING_TOKENS, config.max_position_embeddings)
    tokens = jax.random.randint(rngs.params(), (1, length), 0, config.vocab_size)
    x_btd, masks, step, _ = model.prepare(tokens)
    for layer, window in zip(model.layers, config.windows, strict=True):
        if layer.attention.replicas is not None and layer.attention.replicas.prefix_k is not None:
            prefix_k = layer.attention.replicas.prefix_k
            center = _hidden_key(layer, x_btd, masks[window], step, config.kv_heads)
            prefix_k[...] = prefix_k[...] + center[None, :, None].astype(prefix_k.dtype)
        x_btd = _through(layer, x_btd, masks[window], step)


@jax.jit
def _through(layer, x_btd, mask, step):
    return layer(x_btd, mask, step, None, 0)[0]


@partial(jax.jit, static_argnums=4)
def _hidden_key(layer, x_btd, mask, step, kv_heads: int) -> Array:
    query, _, _ = layer.attention.heads(layer.attention_norm(layer.look_across(x_btd, mask)), step)
    return hidden_key(query, kv_heads)
