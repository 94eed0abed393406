"""How the next token is chosen: transforms of the logits that compose, then the highest or a random one.

A transform is a frozen dataclass called with ``(logits, seen)``. All are pytrees whose numbers are leaves: another
temperature compiles nothing anew, and an array of shape ``(batch,)`` in a number's place gives each sequence its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from heddle.attention.arrays import Array

Number = Any  #: a number, or an array (batch,) with one for each sequence


@runtime_checkable
class Transform(Protocol):
    def __call__(
        self, logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"] | None
    ) -> Float[Array, "batch vocab"]: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Temperature:
    """Logits divided by ``value``: below 1 the likely become likelier."""

    value: Number

    def __post_init__(self):
        _check("temperature", self.value, "a positive number", lambda value: value > 0)

    def __call__(self, logits, seen=None):
        return logits / _column(self.value)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopK:
    """Only the ``count`` highest logits, and those equal to the last of them."""

    count: Number

    def __post_init__(self):
        _check("top_k", self.count, "an integer of at least 1", lambda count: count >= 1 and count == int(count))

    def __call__(self, logits, seen=None):
        order = _ordered(logits)
        count = jnp.minimum(jnp.asarray(self.count, jnp.int32), logits.shape[-1])
        least = _largest(lambda least: jnp.sum(order >= least[:, None], axis=-1) >= count)
        return jnp.where(order >= least[:, None], logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopP:
    """Only the likeliest tokens that together have probability ``mass`` (nucleus sampling, arXiv 1904.09751)."""

    mass: Number

    def __post_init__(self):
        _check("top_p", self.mass, "a number in (0, 1]", lambda mass: 0 < mass <= 1)

    def __call__(self, logits, seen=None):
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        order, enough = _ordered(logits), jnp.asarray(self.mass, weights.dtype) * _total(weights)
        kept = (
            order >= _largest(lambda least: _total(jnp.where(order >= least[:, None], weights, 0)) >= enough)[:, None]
        )
        return jnp.where(kept | (_column(self.mass) >= 1), logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MinP:
    """Only tokens at least ``share`` times as likely as the likeliest (arXiv 2407.01082)."""

    share: Number

    def __post_init__(self):
        _check("min_p", self.share, "a number in [0, 1]", lambda share: 0 <= share <= 1)

    def __call__(self, logits, seen=None):
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.asarray(_column(self.share), logits.dtype))
        return jnp.where(logits >= least, logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RepetitionPenalty:
    """Tokens of the prompt or the answer so far made less likely: logits above 0 divided by ``value``, others
    multiplied (CTRL, arXiv 1909.05858, section 4.1)."""

    value: Number

    def __post_init__(self):
        _check("repetition_penalty", self.value, "a positive number", lambda value: value > 0)

    def __call__(self, logits, seen=None):
        if seen is None:
            return logits
        penalty = _column(self.value)
        return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Greedy:
    """The highest of the logits after ``transforms``; of equal ones the first."""

    transforms: tuple[Transform, ...] = ()

    def __call__(self, logits, keys, seen=None):
        return jnp.argmax(_apply(self.transforms, logits, seen), axis=-1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Random:
    """A random token, each with its probability after ``transforms``, applied in order."""

    transforms: tuple[Transform, ...] = ()

    def __call__(
        self,
        logits: Float[Array, "batch vocab"],
        keys: PRNGKeyArray | Array,
        seen: Bool[Array, "batch vocab"] | None = None,
    ) -> Int[Array, " batch"]:
        """One token for each row of ``logits``, by its own one of ``keys`` ``(batch,)``."""
        logits = _apply(self.transforms, logits, seen)
        # The highest of logits with Gumbel noise is a sample (arXiv 1411.0030); a hair's difference between the logits
        # of two batches then changes the choice only where two tokens are all but level.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


Sampler = Greedy | Random


def sampler(
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> Sampler:
    """The usual chain: repetition penalty, temperature, top-k, top-p, min-p; greedy at temperature 0.

    Raises:
        ValueError: a number out of its range, or not a number.
    """
    _check("temperature", temperature, "a number of at least 0", lambda value: value >= 0)
    chain: list[Transform] = []
    if repetition_penalty is not None:
        chain.append(RepetitionPenalty(repetition_penalty))
    choices: list[Transform] = [Temperature(temperature)] if temperature else []
    choices += [kind(value) for kind, value in ((TopK, top_k), (TopP, top_p), (MinP, min_p)) if value is not None]
    return Random((*chain, *choices)) if temperature else Greedy(tuple(chain))


def needs_seen(chosen: Sampler) -> bool:
    return any(isinstance(transform, RepetitionPenalty) for transform in chosen.transforms)


def _apply(transforms: tuple[Transform, ...], logits: Array, seen: Array | None) -> Array:
    logits = logits.astype(jnp.float32)
    for transform in transforms:
        logits = transform(logits, seen)
    return logits


def _check(name: str, value: Number, expected: str, valid: Callable[[Any], bool]) -> None:
    # Under a transformation JAX puts tracers and placeholders into the leaves; only a user's numbers are checked.
    if not isinstance(value, (int, float)):
        return
    if isinstance(value, bool) or not math.isfinite(value) or not valid(value):
        raise ValueError(f"{name} must be {expected}, got {value}")


def _column(value: Number) -> Number:
    return value[:, None] if getattr(value, "ndim", 0) else value


def _ordered(logits: Array) -> Array:
    """float32 as uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(enough: Callable[[Array], Array]) -> Array:
    """The largest uint32 for which ``enough`` holds, row by row, bit by bit: exact, and far cheaper than a sort."""
    rows = enough(jnp.zeros(1, jnp.uint32)).shape

    def decide(i, found):
        candidate = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(candidate), candidate, found)

    return jax.lax.fori_loop(0, 32, decide, jnp.zeros(rows, jnp.uint32))


def _total(weights: Array) -> Array:
    """The sum of each row, in two steps: XLA's CPU back end vectorises the first."""
    lanes = 64
    padded = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % lanes)))
    return padded.reshape(weights.shape[0], -1, lanes).sum(axis=1).sum(axis=1)
