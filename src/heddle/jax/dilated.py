"""LongNet's dilated attention as flax.nnx modules: arXiv 2307.02486, with MAGNETO's projections, arXiv 2210.06423.

Arguments and parameters are named as :mod:`heddle.torch.dilated`'s; matrices are ``(inputs, outputs)`` here and
transposed there, which :meth:`MultiheadDilatedAttention.load_state_dict` sees to.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from heddle.attention.arrays import Array
from heddle.attention.attend import attend, score_scale
from heddle.attention.dilated import check_sequence, dilated_forward
from heddle.attention.dilated_patterns import check_patterns
from heddle.attention.mask import Mask

from .layers import LayerNorm, Linear


class DilatedAttention(nnx.Module):
    """Dilated attention on heads: :func:`heddle.attention.dilated.dilated_attention` as a module.

    Args:
        segment_lengths: w of each pattern, in tokens.
        dilation_rates: r of each pattern.
        softmax_scale: of the scores; None: ``head_dim ** -0.5``.
        attention_dropout: the probability that a key is dropped from a query's sum, in each pattern, unless
            ``deterministic``, which ``eval()`` and ``train()`` of a module set.
        op: an implementation of :func:`heddle.attend` by name; None: the first that serves.

    Raises:
        ValueError: lists that differ in length, are empty or hold anything but positive integers; a probability that
            isn't one.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        op: str | None = None,
    ):
        self.patterns = check_patterns(segment_lengths, dilation_rates)
        if not 0 <= attention_dropout < 1:
            raise ValueError(f"attention_dropout must be at least 0 and less than 1, got {attention_dropout}")
        self.softmax_scale, self.attention_dropout, self.op = softmax_scale, attention_dropout, op
        self.deterministic = False

    def __call__(
        self,
        query: Float[Array, "batch seq heads head_dim"],
        key: Float[Array, "batch seq kv_heads head_dim"],
        value: Float[Array, "batch seq kv_heads value_dim"],
        is_causal: bool = False,
        *,
        segment_ids: Int[Array, "batch seq"] | None = None,
        key_padding_mask: Bool[Array, "batch seq"] | None = None,
        dropout_rng: Any = None,
    ) -> Float[Array, "batch seq heads value_dim"]:
        """See :func:`heddle.attention.dilated.dilated_attention` for what the arguments mean and what is refused.

        ``dropout_rng``: a key, which dropout needs.
        """
        check_sequence(query, key, value, segment_ids, key_padding_mask)
        scale, drops = score_scale(query, self.softmax_scale), self.attention_dropout > 0 and not self.deterministic
        if drops and dropout_rng is None:
            raise ValueError(
                f"dropout_rng must be a key where attention_dropout is {self.attention_dropout}, got None "
                "(eval() turns dropout off)"
            )
        sets = itertools.count()

        def one(query: Array, key: Array, value: Array, mask: Mask) -> tuple[Array, Array]:
            out, lse = attend(query, key, value, mask, scale=scale, implementation=self.op, return_lse=True)
            if drops:
                rng = jax.random.fold_in(dropout_rng, next(sets))
                out = _with_dropout(query, key, value, mask, scale, self.attention_dropout, rng)
            return out, lse

        patterns = self.patterns
        return dilated_forward(query, key, value, patterns, is_causal, segment_ids, key_padding_mask, attend=one)[0]


def _with_dropout(query: Array, key: Array, value: Array, mask: Mask, scale: float, rate: float, rng: Array) -> Array:
    """Attention with dropout on its weights, of segments small enough for that to hold them."""
    seen: Any = mask.dense(key.shape[1])[:, None]
    seen = seen | ~seen.any(-1, keepdims=True)  # queries that see nothing: their weight in the merge is 0
    query = query * (scale * query.shape[3] ** 0.5)  # which flax takes back
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    return nnx.dot_product_attention(
        query, key, value, mask=seen, broadcast_dropout=False, dropout_rng=rng, dropout_rate=rate
    )


class MultiheadDilatedAttention(nnx.Module):
    """Projections, dilated attention, MAGNETO's norm and the output projection (arXiv 2210.06423, figure 2).

    Queries, keys and values have one length. Parameters start as MAGNETO's: Xavier's normal distribution, with the gain
    on values and output; biases 0.

    Args:
        embed_dim, num_heads: as of ``torch.nn.MultiheadAttention``.
        dilation_rates, segment_lengths: of the patterns, in this order.
        dropout: of the attention's weights.
        bias: of the projections.
        layer_norm: whether there is a norm before the output projection.
        layer_norm_eps: of that norm.
        gamma_init: the gain of the value and output projections.
        dtype: of the parameters; None: float32.
        rngs: what they are drawn from.

    Raises:
        ValueError: heads that don't divide embed_dim; lists as of :class:`DilatedAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dilation_rates: Sequence[int],
        segment_lengths: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        dtype: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        dtype = jnp.float32 if dtype is None else dtype

        def projection(gain: float) -> Linear:
            return Linear(embed_dim, embed_dim, bias=bias, std=gain * embed_dim**-0.5, rngs=rngs, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj = projection(1.0), projection(1.0), projection(gamma_init)
        self.attention = DilatedAttention(segment_lengths, dilation_rates, attention_dropout=dropout)
        self.norm = LayerNorm(embed_dim, layer_norm_eps, dtype=dtype) if layer_norm else None
        self.out_proj = projection(gamma_init)

    def __call__(
        self,
        query: Float[Array, "*batch seq embed_dim"],
        key: Float[Array, "*batch seq embed_dim"],
        value: Float[Array, "*batch seq embed_dim"],
        key_padding_mask: Array | None = None,
        need_weights: bool = False,
        attn_mask: Array | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        dropout_rng: Array | None = None,
    ) -> tuple[Float[Array, "*batch seq embed_dim"], None]:
        """``(output, None)``.

        Args:
            query, key, value: ``(batch, seq, embed_dim)``, or ``(seq, embed_dim)``.
            key_padding_mask: ``(batch, seq)``: True, or -inf, for padding, whose output is the norm's of 0, projected.
            need_weights: must be False: there is no matrix of weights.
            attn_mask: must be None, unless ``is_causal`` says that it is the causal one.
            average_attn_weights: of no effect, as there are no weights.
            is_causal: whether a token sees only those at or before it.
            segment_ids: packed documents, as of :func:`heddle.attention.dilated.dilated_attention`.
            dropout_rng: a key, which dropout needs.

        Raises:
            ValueError: arguments that disagree, or ask for what there is not.
        """
        if need_weights:
            raise ValueError("need_weights must be False, got True: dilated attention has no matrix of weights")
        if attn_mask is not None and not is_causal:
            raise ValueError(
                "attn_mask must be None, or the causal one with is_causal=True: the patterns say who sees whom"
            )
        if key_padding_mask is not None and jnp.issubdtype(key_padding_mask.dtype, jnp.floating):
            key_padding_mask = key_padding_mask == -jnp.inf
        arrays = query, key, value, key_padding_mask, segment_ids
        if query.ndim == 2:
            query, key, value, key_padding_mask, segment_ids = (None if x is None else x[None] for x in arrays)
        out = self.attention(
            *self.heads(query, key, value),
            is_causal=is_causal,
            segment_ids=segment_ids,
            key_padding_mask=key_padding_mask,
            dropout_rng=dropout_rng,
        )
        out = self.output(out)
        return (out[0] if arrays[0].ndim == 2 else out), None

    def heads(self, query: Array, key: Array, value: Array) -> tuple[Array, ...]:
        """The three projected, ``(batch, seq, heads, head_dim)``."""
        return tuple(
            proj(x).reshape(*x.shape[:2], self.num_heads, self.head_dim)
            for proj, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )

    def output(self, out: Float[Array, "batch seq heads head_dim"]) -> Float[Array, "batch seq embed_dim"]:
        """What attention found, normalized and projected."""
        out = out.reshape(*out.shape[:2], self.embed_dim)
        return self.out_proj(out if self.norm is None else self.norm(out))

    def state_dict(self) -> dict[str, np.ndarray]:
        """The parameters by the names and in the layout of ``heddle.torch.dilated.MultiheadDilatedAttention``."""
        leaves: Any = nnx.to_flat_state(nnx.state(self, nnx.Param))
        return {".".join(map(str, path)): np.array(leaf[...].T, order="C") for path, leaf in leaves}

    def load_state_dict(self, tensors: Mapping[str, Array]) -> None:
        """Take parameters over, as :meth:`state_dict` or safetensors of the torch module give them.

        Raises:
            ValueError: names or shapes that aren't this module's.
        """
        want = {name: tensor.shape for name, tensor in self.state_dict().items()}
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if got != want:
            differ = sorted(name for name in want | got if want.get(name) != got.get(name))
            listed = "; ".join(f"{name} {got.get(name, 'missing')} for {want.get(name, 'none')}" for name in differ)
            raise ValueError(f"tensors must have this module's names and shapes, got {listed}")
        leaves: Any = nnx.to_flat_state(nnx.state(self, nnx.Param))  # the module's own variables, not copies
        for path, leaf in leaves:
            leaf[...] = jnp.asarray(np.asarray(tensors[".".join(map(str, path))]).T, leaf.dtype)
