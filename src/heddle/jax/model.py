"""The transformer: Llama, Mistral, Qwen2 and Qwen3, as their ``config.json`` says.

In names, b: batch, t: tokens, d: hidden size, q, k: query and key/value heads, h: head size, f: feed-forward size,
v: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Int

from heddle.attention import PADDING_SEGMENT_ID, Mask, attend
from heddle.attention.arrays import Array, is_concrete, to_numpy
from heddle.attention.rope import rotate

from .cache import KVCache
from .model_config import ModelConfig

ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


class Linear(nnx.Module):
    """``x @ weight + bias``, weight ``(inputs, outputs)``: on a CPU the transposed product is far slower."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, std: float, rngs: nnx.Rngs, dtype):
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x):
        x = x @ self.weight.astype(x.dtype)
        return x if self.bias is None else x + self.bias.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root mean square normalisation (arXiv 1910.07467, eq. 4) of the last axis, computed in float32."""

    def __init__(self, size: int, eps: float, *, dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return self.weight.astype(x.dtype) * x32.astype(x.dtype)


class Step(NamedTuple):
    """What every layer of one forward shares."""

    rotary: tuple[Array, Array]  #: cos and sin of the tokens' positions
    masks: dict[int | None, Mask]  #: by window
    slots: Array | None  #: where tokens go in the cache


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        d, h = config.hidden_size, config.dim
        options = {"std": config.initializer_range, "rngs": rngs, "dtype": dtype}
        self.q = Linear(d, config.num_attention_heads * h, bias=config.qkv_bias, **options)
        self.k = Linear(d, config.kv_heads * h, bias=config.qkv_bias, **options)
        self.v = Linear(d, config.kv_heads * h, bias=config.qkv_bias, **options)
        self.o = Linear(config.num_attention_heads * h, d, bias=config.attention_bias, **options)
        self.q_norm = RMSNorm(h, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(h, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.head_dim = h

    def __call__(self, x_btd, mask: Mask, step: Step, cache: KVCache | None, layer: int):
        q_btqh, k_btkh, v_btkh = (
            part.reshape(*part.shape[:2], -1, self.head_dim) for part in (self.q(x_btd), self.k(x_btd), self.v(x_btd))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_btqh, k_btkh = self.q_norm(q_btqh), self.k_norm(k_btkh)
        q_btqh, k_btkh = rotate(q_btqh, *step.rotary), rotate(k_btkh, *step.rotary)
        if cache is not None:
            cache = cache.write(layer, k_btkh, v_btkh, step.slots)
            k_btkh, v_btkh = (a[layer].swapaxes(1, 2).astype(q_btqh.dtype) for a in (cache.keys, cache.values))
        out_btqh = attend(q_btqh, k_btkh, v_btkh, mask)
        return self.o(out_btqh.reshape(*x_btd.shape[:2], -1)), cache


class FeedForward(nnx.Module):
    """Gated feed-forward network (SwiGLU where the activation is silu; arXiv 2002.05202, eq. 5)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        d, f = config.hidden_size, config.intermediate_size
        options = {"bias": config.mlp_bias, "std": config.initializer_range, "rngs": rngs, "dtype": dtype}
        self.gate = Linear(d, f, **options)
        self.up = Linear(d, f, **options)
        self.down = Linear(f, d, **options)
        self.activation = config.hidden_act

    def __call__(self, x_btd):
        return self.down(ACTIVATIONS[self.activation](self.gate(x_btd)) * self.up(x_btd))


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.ffn = FeedForward(config, rngs=rngs, dtype=dtype)

    def __call__(self, x_btd, mask: Mask, step: Step, cache: KVCache | None, layer: int):
        attended_btd, cache = self.attention(self.attention_norm(x_btd), mask, step, cache, layer)
        x_btd = x_btd + attended_btd
        return x_btd + self.ffn(self.ffn_norm(x_btd)), cache


class Transformer(nnx.Module):
    """A decoder-only language model.

    Layers are a list and unrolled, not scanned: a scan would copy each layer's weights out of their stack, at one
    token a step as much as all the rest of the work.

    Args:
        config: what it is made of.
        rngs: where the initial weights come from: normal, of deviation ``config.initializer_range``.
        dtype: of the computation, and of the logits.
        param_dtype: of the weights; None: ``dtype``.
        remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=None, remat: bool = False
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        weights = jnp.dtype(param_dtype or dtype)
        options: dict[str, Any] = {"rngs": rngs, "dtype": weights}
        size, std = (config.vocab_size, config.hidden_size), config.initializer_range
        # With tied embeddings the head's columns are the embeddings: reading columns costs little, and the head's
        # product, a fifth of the work of a small model's decoding step, keeps the fast layout.
        tied = config.tie_word_embeddings
        self.embedding = None if tied else nnx.Param(std * jax.random.normal(rngs.params(), size, weights))
        self.layers = nnx.List([Block(config, **options) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=weights)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False, std=std, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path | None = None, *, dtype: Any = "auto", **options: Any) -> Transformer:
        """The model in a Hugging Face folder, in a GGUF file, or of that name on the hub; None: the embedded SmolLM2.

        Args:
            name: folder, ``.gguf`` file or hub name.
            dtype: of weights and computation. ``"auto"``: float32 on a CPU (XLA's products of one bfloat16 row are
                twenty times slower there), elsewhere as the checkpoint says.
            options: ``param_dtype`` and ``remat``, as for the class.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: what is there is broken, not supported, or not the model its configuration says.
        """
        from .checkpoint import load

        return load(name, dtype=dtype, **options)

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write a Hugging Face folder, all of it or nothing; see :func:`heddle.jax.checkpoint.save`."""
        from .checkpoint import save

        save(self, folder, tokenizer, max_shard_bytes=max_shard_bytes)

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        cache: KVCache | None = None,
    ):
        """Logits of the next token after each token, ``(batch, seq, vocab)``; with a cache ``(logits, cache)``.

        Args:
            tokens: ids below ``config.vocab_size``.
            positions: for the rotary embedding; by default each document's own, from 0, or those after the cache's.
            segment_ids: without a cache, which document each token belongs to, as :meth:`heddle.Mask.documents` has
                it. With a cache, -1 at the end of each row marks padding, which isn't remembered.
            cache: the tokens before these; they see it, and it is returned with them added.

        Raises:
            ValueError: arguments that disagree; under jit only what shapes tell. A token past the end of the cache.
        """
        hidden_btd = self.hidden(tokens, positions, segment_ids, cache)
        if cache is None:
            return self.head(hidden_btd)
        hidden_btd, cache = hidden_btd
        return self.head(hidden_btd), cache

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """As the call, but the final hidden states ``(batch, seq, hidden)``: ``model.head`` makes logits of them."""
        self._check(tokens, positions, segment_ids, cache)
        seq = tokens.shape[1]
        slots = added = None
        if cache is not None:
            valid = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != PADDING_SEGMENT_ID
            added = valid.sum(axis=1, dtype=jnp.int32)
            cache.check(added)
            mask, slots, default = cache.mask(added, seq), cache.slots(valid), cache.positions(seq)
            default = jnp.where(valid, default, 0)
        elif segment_ids is None:
            mask = Mask.causal(seq, seq, like=tokens)
            default = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32), tokens.shape)
        else:
            mask = Mask.documents(segment_ids)
            default = jnp.where(segment_ids == PADDING_SEGMENT_ID, 0, jnp.arange(seq, dtype=jnp.int32) - mask.start)

        offset = 0 if cache is None else cache.lengths
        masks: dict[int | None, Mask] = {
            size: mask if size is None else mask & Mask.window(seq, size, offset=offset, like=tokens)
            for size in set(self.config.windows)
        }
        step = Step(self.config.rotary.tables(default if positions is None else positions), masks, slots)
        x_btd = self._embed(tokens)
        for index, (layer, window) in enumerate(zip(self.layers, self.config.windows, strict=True)):
            if self.remat and cache is None:
                x_btd = jax.checkpoint(lambda layer, *args: layer(*args, None, 0)[0])(layer, x_btd, masks[window], step)
            else:
                x_btd, cache = layer(x_btd, masks[window], step, cache, index)
        x_btd = self.norm(x_btd)
        return x_btd if cache is None or added is None else (x_btd, cache.advance(added))

    def _embed(self, tokens):
        if self.embedding is not None:
            return self.embedding[tokens].astype(self.dtype)
        return jnp.moveaxis(self.head.weight[:, tokens], 0, -1).astype(self.dtype)

    def _check(self, tokens, positions, segment_ids, cache) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or 0 in tokens.shape:
            raise ValueError(f"tokens must be integers of shape (batch, seq), got {tokens.dtype} of {tokens.shape}")
        if is_concrete(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"tokens must be in [0, {self.config.vocab_size}), got {bad}")
        for name, array in (("positions", positions), ("segment_ids", segment_ids)):
            if array is not None and array.shape != tokens.shape:
                raise ValueError(f"{name} must have tokens' shape {tokens.shape}, got {array.shape}")
        if cache is None:
            return
        if cache.batch != tokens.shape[0] or len(cache.keys) != len(self.layers):
            raise ValueError(
                f"cache must be of {len(self.layers)} layers and batch size {tokens.shape[0]}, "
                f"got {len(cache.keys)} and {cache.batch}"
            )
        if segment_ids is not None and is_concrete(segment_ids):
            padding = to_numpy(segment_ids) == PADDING_SEGMENT_ID
            if (padding[:, :-1] & ~padding[:, 1:]).any():
                raise ValueError("segment_ids must be -1 only at the end of each row where there is a cache")
