"""LongNet's language model as flax.nnx: arXiv 2307.02486, with MAGNETO's layers (arXiv 2210.06423).

The twin of :mod:`heddle.torch.longnet`: one folder, the same logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from heddle.attention import PADDING_SEGMENT_ID
from heddle.attention.arrays import Array
from heddle.attention.dilated import dilated_attention
from heddle.attention.dilated_grids import document_positions
from heddle.attention.dilated_patterns import check_patterns
from heddle.attention.rope import Rope, rotate
from heddle.attention.xpos import Tables, check_position, position_tables
from heddle.data.locate import read_json

from .cache import Cache
from .dilated import MultiheadDilatedAttention
from .dilated_cache import DilatedKVCache
from .layers import LayerNorm, Linear
from .model import ACTIVATIONS, LanguageModel, rematerialized
from .parallel import Layout

MODEL_TYPE = "longnet"
#: Fields of a ``config.json`` that change nothing here, whatever they say.
_HARMLESS = {
    "_name_or_path", "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "head_dim", "id2label",
    "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states", "problem_type",
    "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class LongNetConfig:
    """A decoder-only LongNet; the fields, and the paper's sizes as defaults, are ``heddle.torch.longnet``'s.

    ``dropout`` is kept for torch, which trains with it; here there is none. ``max_position_embeddings`` bounds what
    generation asks for.

    Raises:
        ValueError: a value out of range.
    """

    vocab_size: int = 100_277
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    segment_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: tuple[int, ...] = (1, 2, 4, 6, 12)
    position: str = "xpos"
    rope_theta: float = 10000.0
    xpos_scale_base: float = 512.0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size must be a multiple of twice num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}; got {self.hidden_act!r}")
        patterns = check_patterns(self.segment_lengths, self.dilation_rates)
        object.__setattr__(self, "segment_lengths", tuple(pattern.length for pattern in patterns))
        object.__setattr__(self, "dilation_rates", tuple(pattern.rate for pattern in patterns))
        check_position(self.position, self.segment_lengths, self.xpos_scale_base)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def parscale_n(self) -> int:
        """LongNet has no replicas."""
        return 1

    @property
    def rotary(self) -> Rope:
        """The rotation that XPOS has too."""
        return Rope(self.head_dim, self.rope_theta)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else eos

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LongNetConfig:
        """From the contents of a ``config.json``.

        Raises:
            ValueError: another model type, a field that isn't known; as of the class.
        """
        if config.get("model_type") != MODEL_TYPE:
            raise ValueError(f"model_type must be {MODEL_TYPE!r}, got {config.get('model_type')!r}")
        own = {field.name for field in fields(cls)}
        given = {name: value for name, value in config.items() if value is not None}
        if unknown := sorted(set(given) - own - _HARMLESS):
            raise ValueError(f"fields that aren't supported for model_type {MODEL_TYPE!r}: {', '.join(unknown)}")
        values: dict[str, Any] = {
            name: tuple(given[name]) if isinstance(given[name], list) else given[name] for name in own & set(given)
        }
        return cls(**values)

    @classmethod
    def from_json_file(cls, path: str | Path) -> LongNetConfig:
        """From a ``config.json``, or from the folder that holds one.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or not a LongNet; the message begins with the path.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        config = read_json(file)
        try:
            return cls.from_dict(config)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The contents of a ``config.json``."""
        return json.loads(json.dumps(asdict(self) | {"model_type": MODEL_TYPE, "architectures": ["LongNetLM"]}))


class _Sequences(NamedTuple):
    """What every layer of one forward shares."""

    tables: tuple[Tables, Tables]  #: of queries and of keys
    segment_ids: Array | None
    cached: Any  #: with a cache, what it says of these tokens
    layout: Layout  #: where activations lie


class FeedForward(nnx.Module):
    """MAGNETO's: a norm before each of the two projections."""

    def __init__(self, config: LongNetConfig, gain: float, *, rngs: nnx.Rngs, dtype):
        d, f, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        options: dict[str, Any] = {"bias": True, "std": gain * math.sqrt(2 / (d + f)), "rngs": rngs, "dtype": dtype}
        self.norm1, self.norm2 = LayerNorm(d, eps, dtype=dtype), LayerNorm(f, eps, dtype=dtype)
        self.linear1, self.linear2 = Linear(d, f, **options), Linear(f, d, **options)
        self.activation = config.hidden_act

    def __call__(self, x_btd):
        return self.linear2(self.norm2(ACTIVATIONS[self.activation](self.linear1(self.norm1(x_btd)))))


class Layer(nnx.Module):
    """Pre-LN, with MAGNETO's inner norms."""

    def __init__(self, config: LongNetConfig, *, rngs: nnx.Rngs, dtype):
        gain = math.sqrt(math.log(2 * config.num_hidden_layers))  # of a decoder-only model, figure 2
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)
        self.self_attn = MultiheadDilatedAttention(
            config.hidden_size, config.num_attention_heads, config.dilation_rates, config.segment_lengths,
            layer_norm_eps=config.layer_norm_eps, gamma_init=gain, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.feed_forward = FeedForward(config, gain, rngs=rngs, dtype=dtype)

    def __call__(self, x_btd, sequences: _Sequences, cache: Cache | None, layer: int):
        normal_btd = self.norm(x_btd)
        query, key, value = self.self_attn.heads(normal_btd, normal_btd, normal_btd)
        query, key = (rotate(x, *tables) for x, tables in zip((query, key), sequences.tables, strict=True))
        if cache is not None:
            (out, _), cache = cache.attend(layer, query, key, value, sequences.cached)
        else:
            lists = zip(*self.self_attn.attention.patterns, strict=True)
            query, key, value = map(sequences.layout.by_heads, (query, key, value))
            out = dilated_attention(query, key, value, *lists, is_causal=True, segment_ids=sequences.segment_ids)
        x_btd = sequences.layout(x_btd + self.self_attn.output(out), "batch", "seq")
        return sequences.layout(x_btd + self.feed_forward(x_btd), "batch", "seq"), cache


class LongNetLM(LanguageModel):
    """A decoder-only language model with dilated attention, as in the paper's section 4.

    Args:
        config: what it is made of.
        rngs: where the initial weights come from, MAGNETO's for a decoder-only model: Xavier's normal distribution,
            with the gain ``sqrt(ln 2M)`` for ``M`` layers on all but queries and keys.
        dtype: of the computation, and of the logits.
        param_dtype: of the weights; None: ``dtype``.
        remat: as of :class:`~heddle.jax.Transformer`.
    """

    def __init__(
        self, config: LongNetConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=None, remat: bool | str = False
    ):
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        weights = jnp.dtype(param_dtype or dtype)
        options: dict[str, Any] = {"rngs": rngs, "dtype": weights}
        size, std = (config.vocab_size, config.hidden_size), config.hidden_size**-0.5
        # With tied embeddings the head's columns are the embeddings, as in Transformer.
        tied = config.tie_word_embeddings
        self.embedding = None if tied else nnx.Param(std * jax.random.normal(rngs.params(), size, weights))
        self.layers = nnx.List([Layer(config, **options) for _ in range(config.num_hidden_layers)])
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=weights)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False, std=std, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dtype: Any = "auto", **options: Any) -> LongNetLM:
        """The model in a folder, or of that name on the hub, that either wing has saved.

        Args:
            name: folder or hub name.
            dtype: of weights and computation, as of :meth:`heddle.jax.Transformer.from_pretrained`.
            options: ``param_dtype`` and ``remat``, as for the class; ``mesh``, as of
                :meth:`heddle.jax.Transformer.from_pretrained`.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: what is there is broken, or no LongNet.
        """
        from .checkpoint import load

        return load(name, cls, dtype=dtype, **options)

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write a folder that both wings load, all of it or nothing; see :func:`heddle.jax.checkpoint.save`."""
        from .checkpoint import save

        save(self, folder, tokenizer, max_shard_bytes=max_shard_bytes)

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        cache: Cache | None = None,
    ):
        """Logits of the next token after each token, ``(batch, seq, vocab)``; with a cache ``(logits, cache)``.

        Args:
            tokens: ids below ``config.vocab_size``.
            positions: of no effect: a token's position is its place in its document.
            segment_ids: without a cache, which document each token belongs to, -1 for padding. With a cache, -1 at the
                end of each row marks padding, which isn't remembered.
            cache: the tokens before these; they see it, and it is returned with them added.

        Raises:
            ValueError: arguments that disagree; under jit only what shapes tell. A token past the end of the cache.
        """
        hidden_btd, layout = self.hidden(tokens, positions, segment_ids, cache), self.layout(cache is not None)
        if cache is None:
            return layout(self.head(hidden_btd), "batch", "seq", "vocab")
        hidden_btd, cache = hidden_btd
        return layout(self.head(hidden_btd), "batch", "seq", "vocab"), cache

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        cache: Cache | None = None,
        noise: Float[Array, "batch seq hidden"] | None = None,
    ) -> Any:
        """As the call, but the final hidden states ``(batch, seq, hidden)``: ``model.head`` makes logits of them.

        ``noise`` is added to the embeddings.
        """
        self._check(tokens, positions, segment_ids, cache)
        config, cached, added = self.config, None, None
        if cache is not None:
            real = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != PADDING_SEGMENT_ID
            added = real.sum(axis=1, dtype=jnp.int32)
            cache.check(added)
            cached, segment_ids = cache.step(real), None
            place = cache.positions(tokens.shape[1])
        elif segment_ids is not None:
            place = document_positions(segment_ids)
        else:
            place = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        tables = position_tables(
            config.position, place, config.head_dim, config.segment_lengths,
            theta=config.rope_theta, scale_base=config.xpos_scale_base,
        )  # fmt: skip
        layout = self.layout(cache is not None)
        sequences = _Sequences(tables, segment_ids, cached, layout)
        x_btd = self._embed(tokens) * jnp.asarray(config.hidden_size**0.5, self.dtype)
        x_btd = layout(x_btd if noise is None else x_btd + noise.astype(self.dtype), "batch", "seq")
        for index, layer in enumerate(self.layers):
            if self.remat and cache is None:
                x_btd = rematerialized(layer, self.remat)(x_btd, sequences)
            else:
                x_btd, cache = layer(x_btd, sequences, cache, index)
        x_btd = self.norm(x_btd)
        return x_btd if cache is None else (x_btd, layout.keep(cache.advance(added)))

    def empty_cache(self, batch: int, max_len: int, dtype: Any = None) -> Cache:
        """See :meth:`~heddle.jax.model.LanguageModel.empty_cache`; one of bounded size, however long ``max_len`` is."""
        config = self.config
        make = partial(
            DilatedKVCache.empty, config.segment_lengths, config.dilation_rates, layers=config.num_hidden_layers,
            heads=config.num_attention_heads, kv_heads=config.num_attention_heads, head_dim=config.head_dim,
            batch=batch, max_len=max_len, dtype=self.dtype if dtype is None else dtype,
        )  # fmt: skip
        return self.layout(cached=True).empty(make, batch)
