"""The transformer: Llama, Mistral, Qwen2, Qwen3 and ParScale's Qwen2, as their ``config.json`` says.

In names, b: batch, t: tokens, d: hidden size, q, k: query and key/value heads, h: head size, f: feed-forward size,
v: vocabulary. ParScale's replicas are rows of the batch, replica-major (:mod:`heddle.attention.replicas`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int

from heddle.attention import PADDING_SEGMENT_ID, Mask, attend
from heddle.attention.arrays import Array, is_concrete, to_numpy
from heddle.attention.balance import snake
from heddle.attention.dilated import dilated_attention
from heddle.attention.replicas import replicate, stack_replicas
from heddle.attention.rope import rotate

from .cache import Cache, KVCache
from .dilated_cache import DilatedKVCache
from .layers import Linear, RMSNorm
from .model_config import ModelConfig
from .parallel import Layout
from .parscale import Aggregate, CrossAttention, Replicas

ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


class Step(NamedTuple):
    """What every layer of one forward shares."""

    rotary: tuple[Array, Array]  #: cos and sin of the tokens' positions
    cached: Any  #: with a cache, what it says of these tokens
    added: Array | None  #: how many tokens the cache will hold more of each sequence
    segment_ids: Array | None  #: of dilated attention without a cache, each row's documents
    layout: Layout  #: where activations lie
    order: Array | None  #: which tokens stand where in a row that several devices share, ``(rows | 1, seq)``


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype):
        d, h = config.hidden_size, config.dim
        options = {"std": config.initializer_range, "rngs": rngs, "dtype": dtype}
        self.q = Linear(d, config.num_attention_heads * h, bias=config.qkv_bias, **options)
        self.k = Linear(d, config.kv_heads * h, bias=config.qkv_bias, **options)
        self.v = Linear(d, config.kv_heads * h, bias=config.qkv_bias, **options)
        self.o = Linear(config.num_attention_heads * h, d, bias=config.output_bias, **options)
        self.q_norm = RMSNorm(h, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(h, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.replicas = Replicas(config, layer, rngs=rngs, dtype=dtype) if config.parscale_n > 1 else None
        self.head_dim, self.dilation = h, config.attention

    def heads(self, x_btd, step: Step):
        """Queries, keys and values, turned by their positions."""
        q_btqh, k_btkh, v_btkh = (
            part.reshape(*part.shape[:2], -1, self.head_dim) for part in (self.q(x_btd), self.k(x_btd), self.v(x_btd))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_btqh, k_btkh = self.q_norm(q_btqh), self.k_norm(k_btkh)
        q_btqh, k_btkh = rotate(q_btqh, *step.rotary), rotate(k_btkh, *step.rotary)
        k_btkh, v_btkh = (step.layout(x, "batch", "seq", "kv_heads") for x in (k_btkh, v_btkh))
        return step.layout(q_btqh, "batch", "seq", "heads"), k_btkh, v_btkh

    def __call__(self, x_btd, mask: Mask, step: Step, cache: Cache | None, layer: int):
        q_btqh, k_btkh, v_btkh = self.heads(x_btd, step)
        own = across_btd = None
        if cache is not None:
            own, cache = cache.attend(layer, q_btqh, k_btkh, v_btkh, step.cached)
        elif self.dilation is not None:
            q_btqh, k_btkh, v_btkh = map(step.layout.by_heads, (q_btqh, k_btkh, v_btkh))
            own = dilated_attention(
                q_btqh, k_btkh, v_btkh, self.dilation.segment_lengths, self.dilation.dilation_rates,
                is_causal=True, segment_ids=step.segment_ids, return_lse=True,
            )  # fmt: skip
        elif step.order is not None:
            own = step.layout.attend(q_btqh, k_btkh, v_btkh, mask, step.order)
        if self.replicas is not None:
            attend_own = None if own is None else lambda *_: own
            out_btqh, across_btd = self.replicas(q_btqh, k_btkh, v_btkh, mask, attend_own)
        else:
            out_btqh = attend(q_btqh, k_btkh, v_btkh, mask) if own is None else own[0]
        out_btd = self.o(out_btqh.reshape(*x_btd.shape[:2], -1))
        return out_btd if across_btd is None else out_btd + across_btd, cache


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
        @jax.checkpoint  # of a layer's activations these would be the largest
        def gated(gate_btf, up_btf):
            return ACTIVATIONS[self.activation](gate_btf) * up_btf

        return self.down(gated(self.gate(x_btd), self.up(x_btd)))


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype):
        sublayer = config.cross_attn_mode(layer) == "sublayer"
        self.cross_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype) if sublayer else None
        self.cross = CrossAttention(config, rngs=rngs, dtype=dtype) if sublayer else None
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, layer, rngs=rngs, dtype=dtype)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.ffn = FeedForward(config, rngs=rngs, dtype=dtype)

    def look_across(self, x_btd, mask: Mask):
        """What other replicas show before self-attention, where they do."""
        if self.cross is None or self.cross_norm is None:
            return x_btd
        return x_btd + self.cross(self.cross_norm(x_btd), mask.start < mask.stop)

    def __call__(self, x_btd, mask: Mask, step: Step, cache: Cache | None, layer: int):
        x_btd = self.look_across(x_btd, mask)
        attended_btd, cache = self.attention(self.attention_norm(x_btd), mask, step, cache, layer)
        x_btd = step.layout(x_btd + attended_btd, "batch", "seq")
        return step.layout(x_btd + self.ffn(self.ffn_norm(x_btd)), "batch", "seq"), cache


def rematerialized(layer: nnx.Module, remat: bool | str) -> Callable:
    """A layer without a cache whose backward pass computes again what ``remat`` says, as of :class:`Transformer`."""
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    run = jax.checkpoint(lambda layer, *args: layer(*args, None, 0)[0], policy=policy)  # type: ignore[operator]
    return partial(run, layer)


class LanguageModel(nnx.Module):
    """What generation, training and checkpoints know of a model: its hidden states, its head, its kind of cache."""

    config: Any
    dtype: Any
    embedding: nnx.Param | None
    head: Linear
    mesh: Mesh | None = None  #: the devices it is spread over; see :func:`heddle.jax.parallel.place`

    @abstractmethod
    def hidden(
        self,
        tokens: Int[Array, "batch seq"] | Int[Array, "batch replicas seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | Int[Array, "batch replicas seq"] | None = None,
        cache: Cache | None = None,
        noise: Float[Array, "batch seq hidden"] | None = None,
    ) -> Any:
        """The final hidden states ``(batch, seq, hidden)``, of which ``head`` makes logits; with a cache, both."""

    @abstractmethod
    def empty_cache(self, batch: int, max_len: int, dtype: Any = None) -> Cache:
        """An empty cache of the kind that this model decodes with.

        Args:
            batch: how many sequences.
            max_len: tokens of each, at most.
            dtype: what keys and values are kept in; None: the model's. See :meth:`KVCache.empty`.
        """

    def layout(self, cached: bool = False) -> Layout:
        """Where the activations of a forward lie."""
        return Layout(self.mesh, whole_rows=cached)

    def _embed(self, tokens):
        if self.embedding is not None:
            return self.embedding[tokens].astype(self.dtype)
        return jnp.moveaxis(self.head.weight[:, tokens], 0, -1).astype(self.dtype)

    def _check(self, tokens, positions, segment_ids, cache) -> None:
        replicas = self.config.parscale_n
        wanted = "(batch, seq)" if replicas == 1 else f"(batch, seq) or (batch, {replicas}, seq)"
        fits = tokens.ndim == 2 or (tokens.ndim == 3 and tokens.shape[1] == replicas > 1)
        if not fits or not jnp.issubdtype(tokens.dtype, jnp.integer) or 0 in tokens.shape:
            raise ValueError(f"tokens must be integers of shape {wanted}, got {tokens.dtype} of {tokens.shape}")
        if is_concrete(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"tokens must be in [0, {self.config.vocab_size}), got {bad}")
        shared = tokens.shape[0], tokens.shape[-1]
        for name, array, shapes in (
            ("positions", positions, (shared,)), ("segment_ids", segment_ids, (tokens.shape, shared)),
        ):  # fmt: skip
            if array is not None and array.shape not in shapes:
                raise ValueError(f"{name} must have tokens' shape {shapes[0]}, got {array.shape}")
        self.layout(cache is not None).check(tokens.shape[0], tokens.shape[-1])
        if cache is None:
            return
        layers = self.config.num_hidden_layers
        if cache.batch != tokens.shape[0] or cache.layers != layers:
            raise ValueError(
                f"cache must be of {layers} layers and batch size {tokens.shape[0]}, "
                f"got {cache.layers} and {cache.batch}"
            )
        if cache.replicas != replicas:
            raise ValueError(f"cache must be of {replicas} replicas, got {cache.replicas}")
        if segment_ids is not None and is_concrete(segment_ids):
            self._check_padding(to_numpy(segment_ids) == PADDING_SEGMENT_ID, cache)

    def _check_padding(self, padding, cache: Cache) -> None:
        """A cache's rows hold one stretch of tokens, which ends where the sequence ends."""
        whole = padding.all(axis=1) if padding.ndim == 3 else padding
        if (whole[:, :-1] & ~whole[:, 1:]).any():
            raise ValueError("segment_ids must be -1 only at the end of each row where there is a cache")
        if padding.ndim == 2:
            return
        ends = ~padding[:, :, :-1] & padding[:, :, 1:] & ~whole[:, None, 1:]
        if ends.any() or (padding[:, :, 0] & ~whole[:, :1] & cache.begun()).any():
            raise ValueError(
                "segment_ids of a replica must be -1 only before its first token or at the end of its sequence where "
                "there is a cache"
            )


class Transformer(LanguageModel):
    """A decoder-only language model.

    Layers are a list and unrolled, not scanned: a scan would copy each layer's weights out of their stack, at one
    token a step as much as all the rest of the work.

    Args:
        config: what it is made of.
        rngs: where the initial weights come from: normal, of deviation ``config.initializer_range``.
        dtype: of the computation, and of the logits.
        param_dtype: of the weights; None: ``dtype``.
        remat: ``True`` or ``"layer"``: recompute each layer in the backward pass instead of keeping its activations;
            ``"dots"``: all but its products with weights.
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=None, remat: bool | str = False
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
        self.layers = nnx.List([Block(config, layer, **options) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=weights)
        self.aggregate = Aggregate(config, **options) if config.parscale_n > 1 else None
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False, std=std, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path | None = None, *, dtype: Any = "auto", **options: Any) -> Transformer:
        """The model in a Hugging Face folder, in a GGUF file, or of that name on the hub; None: the embedded SmolLM2.

        Args:
            name: folder, ``.gguf`` file or hub name.
            dtype: of weights and computation. ``"auto"``: float32 on a CPU (XLA's products of one bfloat16 row are
                twenty times slower there), elsewhere as the checkpoint says.
            options: ``param_dtype`` and ``remat``, as for the class. ``mesh`` (:func:`heddle.jax.parallel.make_mesh`)
                spreads it over devices, each of which reads its own part of the files alone. And ``parscale_n`` and
                ParScale's other fields of :class:`ModelConfig`, to start a ParScale model from this one, with ``rngs``:
                where the parameters that are new come from. They start so that the model nearly keeps what it
                computed, and which they are is logged.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: what is there is broken, not supported, or not the model its configuration says; new
                parameters without ``rngs``.
        """
        from .checkpoint import load

        return load(name, cls, dtype=dtype, **options)

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write a Hugging Face folder, all of it or nothing; see :func:`heddle.jax.checkpoint.save`."""
        from .checkpoint import save

        save(self, folder, tokenizer, max_shard_bytes=max_shard_bytes)

    def __call__(
        self,
        tokens: Int[Array, "batch seq"] | Int[Array, "batch replicas seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | Int[Array, "batch replicas seq"] | None = None,
        cache: Cache | None = None,
    ):
        """Logits of the next token after each token, ``(batch, seq, vocab)``; with a cache ``(logits, cache)``.

        Args:
            tokens: ids below ``config.vocab_size``; ``(batch, replicas, seq)`` gives each replica its own.
            positions: for the rotary embedding; by default each document's own, from 0, or those after the cache's.
            segment_ids: without a cache, which document each token belongs to, as :meth:`heddle.Mask.documents` has
                it. With a cache, -1 at the end of each row marks padding, which isn't remembered. A third axis, where
                tokens have it, gives each replica its own: positions are then by default the indices, the same for
                all replicas, and with a cache -1 may stand before the first token of a replica. Logits mean nothing
                where a replica is padding.
            cache: the tokens before these; they see it, and it is returned with them added.

        Raises:
            ValueError: arguments that disagree; under jit only what shapes tell. A token past the end of the cache.
        """
        hidden_btd = self.hidden(tokens, positions, segment_ids, cache)
        layout = self.layout(cache is not None)
        if cache is None:
            return layout(self.head(hidden_btd), "batch", "seq", "vocab")
        hidden_btd, cache = hidden_btd
        return layout(self.head(hidden_btd), "batch", "seq", "vocab"), cache

    def hidden(
        self,
        tokens: Int[Array, "batch seq"] | Int[Array, "batch replicas seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | Int[Array, "batch replicas seq"] | None = None,
        cache: Cache | None = None,
        noise: Float[Array, "batch seq hidden"] | None = None,
    ) -> Any:
        """As the call, but the final hidden states ``(batch, seq, hidden)``: ``model.head`` makes logits of them.

        ``noise`` is added to the embeddings, that of all replicas.
        """
        x_btd, masks, step, cache = self.prepare(tokens, positions, segment_ids, cache, noise)
        for index, (layer, window) in enumerate(zip(self.layers, self.config.windows, strict=True)):
            if self.remat and cache is None:
                x_btd = rematerialized(layer, self.remat)(x_btd, masks[window], step)
            else:
                x_btd, cache = layer(x_btd, masks[window], step, cache, index)
        x_btd = self.norm(x_btd)
        if self.aggregate is not None:
            x_btd = self.aggregate(x_btd)
        if step.order is not None:
            x_btd = step.layout.to_natural_order(x_btd, step.order[: tokens.shape[0]])
        x_btd = step.layout(x_btd, "batch", "seq")
        return x_btd if cache is None else (x_btd, step.layout.keep(cache.advance(step.added)))

    def prepare(
        self,
        tokens: Int[Array, "batch seq"] | Int[Array, "batch replicas seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | Int[Array, "batch replicas seq"] | None = None,
        cache: Cache | None = None,
        noise: Float[Array, "batch seq hidden"] | None = None,
    ) -> tuple[Array, dict[int | None, Mask], Step, Cache | None]:
        """What the layers take: the embeddings of all rows, the mask of each window, the rest, the cache.

        Arguments as of the call, checked here.
        """
        self._check(tokens, positions, segment_ids, cache)
        layout = self.layout(cache is not None)
        seq, added, cached = tokens.shape[-1], None, None
        index = jnp.arange(seq, dtype=jnp.int32)
        apart = segment_ids is not None and segment_ids.ndim == 3
        if cache is not None:
            real = jnp.ones((cache.batch, seq), bool) if segment_ids is None else segment_ids != PADDING_SEGMENT_ID
            if apart:
                each, real = real, real.any(axis=1)
                cache = cache.begin((real[:, None] & ~each).sum(axis=2, dtype=jnp.int32))
            added = real.sum(axis=1, dtype=jnp.int32)
            cache.check(added)
            stop = (cache.places(real) >= 0).astype(jnp.int32)
            mask, cached = Mask(0 * stop, stop), cache.step(real)  # a cache says itself what is seen
            default = jnp.where(real, cache.positions(seq), 0)
        elif segment_ids is None:
            mask = Mask.causal(seq, seq, like=tokens)
            default = jnp.broadcast_to(index, (tokens.shape[0], seq))
        elif apart:
            mask = Mask.documents(stack_replicas(segment_ids))
            default = jnp.broadcast_to(index, (tokens.shape[0], seq))
        else:
            mask = Mask.documents(segment_ids)
            default = jnp.where(segment_ids == PADDING_SEGMENT_ID, 0, index - mask.start)
            mask = Mask(self._rows(mask.start), self._rows(mask.stop))

        masks: dict[int | None, Mask] = {
            size: mask if size is None or cache is not None else mask & Mask.window(seq, size, like=tokens)
            for size in set(self.config.windows)
        }
        places: Any = default if positions is None else positions
        order: Any = None
        if layout.context > 1 and self.config.attention is None:
            # Each device gets an equal share of what the row's queries see. All replicas are dealt as the first is.
            first = Mask(mask.start[: tokens.shape[0]], mask.stop[: tokens.shape[0]])
            order = jnp.asarray(snake(first, layout.context))
            tokens = jnp.take_along_axis(tokens, order if tokens.ndim == 2 else order[:, None], axis=-1)
            places = jnp.take_along_axis(places, order, axis=1)
            noise = None if noise is None else jnp.take_along_axis(noise, order[:, :, None], axis=1)
            order = order if mask.start.shape[0] == 1 else self._rows(order)
            dealt = partial(jnp.take_along_axis, indices=order, axis=1)
            masks = {size: Mask(dealt(mask.start), dealt(mask.stop)) for size, mask in masks.items()}
        cos, sin = self.config.rotary.tables(places)
        x_btd = self._embed(tokens)
        if noise is not None:
            x_btd = x_btd + (noise if tokens.ndim == 2 else noise[:, None]).astype(self.dtype)
        x_btd = self._rows(x_btd) if tokens.ndim == 2 else stack_replicas(x_btd)
        x_btd = layout(x_btd, "batch", "seq")
        documents = None
        if segment_ids is not None and cache is None and self.config.attention is not None:
            documents = stack_replicas(segment_ids) if apart else self._rows(segment_ids)
        rotary = self._rows(cos), self._rows(sin)
        return x_btd, masks, Step(rotary, cached, added, documents, layout, order), cache

    def empty_cache(self, batch: int, max_len: int, dtype: Any = None) -> Cache:
        """See :meth:`LanguageModel.empty_cache`; of dilated attention, a cache of bounded size."""
        config, dtype = self.config, self.dtype if dtype is None else dtype
        if config.attention is None:
            make = partial(KVCache.empty, config, batch, max_len, dtype)
        else:
            make = partial(
                DilatedKVCache.empty, config.attention.segment_lengths, config.attention.dilation_rates,
                layers=config.num_hidden_layers, heads=config.num_attention_heads, kv_heads=config.kv_heads,
                head_dim=config.dim, batch=batch, max_len=max_len, dtype=dtype, replicas=config.parscale_n,
            )  # fmt: skip
        return self.layout(cached=True).empty(make, batch)

    def _rows(self, x):
        """What all replicas share, a row for each."""
        return x if self.config.parscale_n == 1 else replicate(x, self.config.parscale_n)
