"""How the next token is chosen: transforms of the logits that compose, then the highest or a random one.

A transform is a frozen dataclass called with ``(logits, history)``. All are pytrees whose numbers are leaves: another
temperature compiles nothing anew, and an array of shape ``(batch,)`` in a number's place gives each sequence its own.

What was said before is one array of integers ``(batch, vocab)``: how often a token stands in the answer so far, or -1
if it stands in the prompt alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from heddle.attention.arrays import Array

Number = Any  #: a number, or an array (batch,) with one for each sequence
#: Nothing is colder: what the largest logits are divided by without passing float32's range, and takes part in no sum.
COLDEST = 1e-25
TINY = float(np.finfo(np.float32).tiny)


@runtime_checkable
class Transform(Protocol):
    def __call__(
        self, logits: Float[Array, "batch vocab"], history: Int[Array, "batch vocab"] | None
    ) -> Float[Array, "batch vocab"]: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Temperature:
    """Logits divided by ``value``: below 1 the likely become likelier."""

    value: Number

    def __post_init__(self):
        _check("temperature", self.value, "a positive number", lambda value: value > 0)

    def __call__(self, logits, history=None):
        return logits / jnp.maximum(_column(self.value), COLDEST)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopK:
    """Only the ``count`` highest logits, and those equal to the last of them."""

    count: Number

    def __post_init__(self):
        valid = lambda count: 1 <= count < 2**31 and count == int(count)  # noqa: E731
        _check("top_k", self.count, "an integer of at least 1, below 2**31", valid)

    def __call__(self, logits, history=None):
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

    def __call__(self, logits, history=None):
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        # Of a mass that float32 can't tell from 0 the likeliest token is left, as of any other.
        order, enough = _ordered(logits), jnp.maximum(jnp.asarray(self.mass, weights.dtype), TINY) * _total(weights)
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

    def __call__(self, logits, history=None):
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.asarray(_column(self.share), logits.dtype))
        return jnp.where(logits >= least, logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RepetitionPenalty:
    """Tokens of the prompt or the answer so far made less likely: logits above 0 divided by ``value``, others
    multiplied (CTRL, arXiv 1909.05858, section 4.1)."""

    value: Number

    def __post_init__(self):
        _check("repetition_penalty", self.value, "a positive number, at least 1e-6", lambda value: value >= 1e-6)

    def __call__(self, logits, history=None):
        if history is None:
            return logits
        penalty = _column(self.value)
        return jnp.where(history != 0, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PresencePenalty:
    """``value`` off the logit of every token of the answer so far; the prompt doesn't count."""

    value: Number

    def __post_init__(self):
        _check("presence_penalty", self.value, "a number", lambda value: True)

    def __call__(self, logits, history=None):
        return logits if history is None else logits - _column(self.value) * (history > 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FrequencyPenalty:
    """``value`` off the logit of a token for each time it stands in the answer so far; the prompt doesn't count."""

    value: Number

    def __post_init__(self):
        _check("frequency_penalty", self.value, "a number", lambda value: True)

    def __call__(self, logits, history=None):
        return logits if history is None else logits - _column(self.value) * jnp.maximum(history, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Greedy:
    """The highest of the logits after ``transforms``; of equal ones the first."""

    transforms: tuple[Transform, ...] = ()

    def __call__(self, logits, keys, history=None):
        return jnp.argmax(_apply(self.transforms, logits, history), axis=-1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Random:
    """A random token, each with its probability after ``transforms``, applied in order."""

    transforms: tuple[Transform, ...] = ()

    def __call__(
        self,
        logits: Float[Array, "batch vocab"],
        keys: PRNGKeyArray | Array,
        history: Int[Array, "batch vocab"] | None = None,
    ) -> Int[Array, " batch"]:
        """One token for each row of ``logits``, by its own one of ``keys`` ``(batch,)``."""
        logits = _apply(self.transforms, logits, history)
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
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
) -> Sampler:
    """The usual chain: penalties (repetition, presence, frequency), temperature, top-k, top-p, min-p; greedy at
    temperature 0.

    Raises:
        ValueError: a number out of its range, or not a number.
    """
    _check("temperature", temperature, "a number of at least 0", lambda value: value >= 0)
    penalties = (
        (RepetitionPenalty, repetition_penalty), (PresencePenalty, presence_penalty),
        (FrequencyPenalty, frequency_penalty),
    )  # fmt: skip
    chain: list[Transform] = [kind(value) for kind, value in penalties if value is not None]
    choices: list[Transform] = [Temperature(temperature)] if temperature else []
    choices += [kind(value) for kind, value in ((TopK, top_k), (TopP, top_p), (MinP, min_p)) if value is not None]
    return Random((*chain, *choices)) if temperature else Greedy(tuple(chain))


#: The usual chain in its order, each with the number that changes nothing (for TopK one that float32 holds exactly).
USUAL: dict[Callable[[Any], Transform], float] = {
    RepetitionPenalty: 1.0, PresencePenalty: 0.0, FrequencyPenalty: 0.0,
    Temperature: 1.0, TopK: 2**24, TopP: 1.0, MinP: 0.0,
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mixed:
    """A batch whose rows have samplers of their own, in one compiled step: each chooses as its own sampler would.

    Work that no row asks for is left out as the step runs.

    Args:
        random: which rows choose at random.
        numbers: of each transform of :data:`USUAL` a number for each row.
    """

    random: Array
    numbers: tuple[Array, ...]

    @classmethod
    def of(cls, samplers: Sequence[Sampler]) -> Mixed:
        """
        Raises:
            ValueError: transforms other than the usual ones, or in another order.
        """
        numbers = {kind: np.full(len(samplers), neutral, np.float64) for kind, neutral in USUAL.items()}
        order = list(USUAL)
        for row, chosen in enumerate(samplers):
            kinds = [type(transform) for transform in chosen.transforms]
            if not set(kinds) <= set(USUAL) or kinds != sorted(set(kinds), key=order.index):
                raise ValueError(f"sampler must be a usual chain, as heddle.jax.sampler makes it, got {chosen}")
            for transform in chosen.transforms:
                (numbers[type(transform)][row],) = vars(transform).values()
        numbers[TopK] = np.minimum(numbers[TopK], USUAL[TopK])  # which is all, and more float32 would round up
        random = np.array([isinstance(chosen, Random) for chosen in samplers])
        return cls(random, tuple(column.astype(np.float32) for column in numbers.values()))

    def __call__(
        self,
        logits: Float[Array, "batch vocab"],
        keys: PRNGKeyArray | Array,
        history: Int[Array, "batch vocab"] | None = None,
    ) -> Int[Array, " batch"]:
        """As :meth:`Random.__call__`."""
        logits = logits.astype(jnp.float32)
        chain = [
            (kind(number), jnp.any(jnp.asarray(number) != neutral))
            for (kind, neutral), number in zip(USUAL.items(), self.numbers, strict=True)
        ]

        def apply(transform, wanted, logits):
            return jax.lax.cond(wanted, lambda logits: transform(logits, history), lambda logits: logits, logits)

        for penalty in chain[:3] if history is not None else ():
            logits = apply(*penalty, logits)
        best = Greedy()(logits, keys)

        def draw(logits):
            for choice in chain[3:]:
                logits = apply(*choice, logits)
            return jnp.where(self.random, Random()(logits, keys), best)

        return jax.lax.cond(jnp.any(self.random), draw, lambda logits: best, logits)


def needs_history(chosen: Sampler) -> bool:
    penalties = (RepetitionPenalty, PresencePenalty, FrequencyPenalty)
    return any(isinstance(transform, penalties) for transform in chosen.transforms)


def history(prompts: Sequence[Any], answers: Sequence[Any], vocab_size: int) -> np.ndarray:
    """What transforms are told of prompts and the answers so far, each a list of ids: integers ``(batch, vocab)``."""
    rows = np.zeros((len(prompts), vocab_size), np.int32)
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        row[np.asarray(prompt, np.int64)] = -1
        said, counts = np.unique(np.asarray(answer, np.int64), return_counts=True)
        row[said] = counts
    return rows


def remember(history: Int[Array, "batch vocab"], tokens: Int[Array, " batch"]) -> Int[Array, "batch vocab"]:
    """The history with one more token in each answer."""
    rows = jnp.arange(tokens.shape[0])
    return history.at[rows, tokens].set(jnp.maximum(history[rows, tokens], 0) + 1)


class Logprobs(NamedTuple):
    """The model's own log-probabilities, before any transform; if asked for, at a temperature."""

    chosen: Float[Array, "*batch"]  #: of the token that was chosen
    top: Float[Array, "*batch n"]  #: of the likeliest tokens, the highest first
    ids: Int[Array, "*batch n"]  #: which they are


def logprobs(
    logits: Float[Array, "batch vocab"], tokens: Int[Array, " batch"], n: int, temperature: Number = 1.0
) -> Logprobs:
    """``log softmax(logits / temperature)`` of the chosen ``tokens`` and of the ``n`` likeliest."""
    logits = logits.astype(jnp.float32) / _column(temperature)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top, ids = jax.lax.top_k(logits, n)
    return Logprobs(jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0] - total[:, 0], top - total, ids)


def _apply(transforms: tuple[Transform, ...], logits: Array, history: Array | None) -> Array:
    logits = logits.astype(jnp.float32)
    for transform in transforms:
        logits = transform(logits, history)
    return logits


def _check(name: str, value: Number, expected: str, valid: Callable[[Any], bool]) -> None:
    # Under a transformation JAX puts tracers and placeholders into the leaves; only a user's numbers are checked.
    if not isinstance(value, (int, float, np.generic)):
        return
    if isinstance(value, (bool, np.bool_)) or not math.isfinite(value) or not valid(value):
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
