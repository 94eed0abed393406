"""Rotary position embedding, and every rule in use for stretching it past the pretrained length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from .arrays import Array, asarray_like, namespace


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (RoFormer, arXiv 2104.09864, eq. 34), half-split: dimension ``i`` turns with ``i + d/2``.

    Args:
        head_dim: the head's size; the first ``head_dim * partial_rotary_factor`` dimensions are rotated.
        theta: base of the geometric series of wavelengths.
        rule: ``default``; ``linear`` (arXiv 2306.15595), ``dynamic`` (NTK-aware, by the current length), ``llama3``
            (Llama 3.1's), ``yarn`` (arXiv 2309.00071), ``longrope`` (arXiv 2402.13753).
        max_position: the length the model is configured for (``dynamic``; the default of the next).
        original_max_position: the length it was pretrained for.
        factor: how far to stretch; ``yarn`` and ``longrope`` default to ``max_position / original_max_position``.
        attention_factor: multiplies cos and sin; None: as the rule's paper says.

    The other fields are the rules' own, named as in a Hugging Face ``config.json``. Hashable, so static under jax.jit.

    Raises:
        ValueError: unknown rule, a parameter that the rule needs and lacks, or one out of range.
    """

    head_dim: int
    theta: float = 10000.0
    rule: str = "default"
    partial_rotary_factor: float = 1.0
    max_position: int | None = None
    original_max_position: int | None = None
    factor: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.rule not in list(_RULES):  # a list tells unhashable things too
            raise ValueError(f"rope rule must be one of {', '.join(_RULES)}, got {self.rule!r}")
        for name in _POSITIVE:
            if (value := getattr(self, name)) is not None:
                _check_number(name, value, positive=True)
        for name in ("low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim"):
            if (value := getattr(self, name)) is not None:
                _check_number(name, value)
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"head_dim * partial_rotary_factor must be even and in [2, head_dim], got "
                f"{self.head_dim} * {self.partial_rotary_factor}"
            )
        if self.rule == "dynamic" and self.rotary_dim < 4:
            raise ValueError(
                f"head_dim must give at least 4 rotated dimensions for rope rule 'dynamic', got {self.head_dim}"
            )
        for name in _NEEDS[self.rule]:
            if getattr(self, name) is None:
                raise ValueError(f"rope rule {self.rule!r} needs {name}, which is missing")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and not low < high:
            raise ValueError(f"low_freq_factor must be below high_freq_factor, got {low} and {high}")
        if not isinstance(self.truncate, bool):
            raise ValueError(f"truncate must be true or false, got {self.truncate!r}")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is None:
                continue
            if not isinstance(factors, tuple) or len(factors) != self.rotary_dim // 2:
                got = len(factors) if isinstance(factors, tuple) else repr(factors)
                raise ValueError(f"{name} must have rotary_dim / 2 = {self.rotary_dim // 2} numbers, got {got}")
            for factor in factors:
                _check_number(name, factor, positive=True)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int) -> Rope:
        """From a Hugging Face ``config.json``: ``rope_parameters``, or the older ``rope_theta`` with ``rope_scaling``,
        which goes before where both are there, as in transformers.

        Raises:
            ValueError: an unknown rule or field, one that is no number, or parameters that differ by layer type.
        """
        where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        given: Any = config.get(where) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{where} must be an object, got {given!r}")
        given = dict(given)
        if any(isinstance(value, Mapping) for value in given.values()):
            raise ValueError(f"{where} must be one set for all layers, got a set for each of {', '.join(given)}")
        old_type = given.pop("type", None)
        rule = given.pop("rope_type", old_type) or "default"
        max_position = config.get("max_position_embeddings")

        def number(name: str, *otherwise: Any) -> Any:
            found = next((value for value in otherwise if value is not None), None)
            if found is not None:
                _check_number(name, found, positive=True)
            return found

        theta = number("rope_theta", given.pop("rope_theta", None), config.get("rope_theta"), 10000.0)
        name = "partial_rotary_factor"
        partial = number(name, given.pop(name, None), config.get(name), 1.0)
        # A value outside the rope parameters has priority, as in Phi-3's configurations.
        name = "original_max_position_embeddings"
        original = number(name, config.get(name), given.pop(name, None), max_position)
        known = {field.name for field in fields(cls)} - {
            "head_dim",
            "theta",
            "rule",
            "max_position",
            "original_max_position",
        }
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(f"rope parameters must be among {', '.join(sorted(known))}; got {', '.join(unknown)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
        return cls(
            head_dim,
            float(theta),
            rule,
            float(partial),
            max_position=max_position,
            original_max_position=original,
            **values,
        )

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def by_length(self) -> bool:
        """Whether a position's angles depend on how long the text is that is read with it, up to ``max_position``:
        ``dynamic`` stretches past that alone."""
        return self.rule == "longrope"

    def tables(
        self, positions: Int[Array, "batch seq"]
    ) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
        """cos and sin of every position's angles, float32, ``half = rotary_dim / 2``.

        ``dynamic`` and ``longrope`` depend on the sequence's length, taken as the row's largest position + 1: a row of
        a ragged batch gets what it would get alone.
        """
        xp = namespace(positions)
        positions = xp.astype(positions, xp.float32)
        length = xp.max(positions, axis=1, keepdims=True)[..., None] + 1.0
        inverse, factor = _RULES[self.rule](self, length)
        angles = positions[..., None] * inverse
        return xp.cos(angles) * factor, xp.sin(angles) * factor


def _check_number(name: str, value: Any, positive: bool = False) -> None:
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (positive and not value > 0):
        raise ValueError(f"{name} must be a {'positive ' if positive else ''}number, got {value!r}")


def rotate(
    x: Float[Array, "batch seq heads dim"], cos: Float[Array, "batch seq half"], sin: Float[Array, "batch seq half"]
) -> Float[Array, "batch seq heads dim"]:
    """Turn the first ``2 * half`` dimensions of every head by its position's angles; the rest pass. In x's dtype."""
    xp, half = namespace(x), cos.shape[-1]
    cos, sin = xp.astype(cos[..., None, :], x.dtype), xp.astype(sin[..., None, :], x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return xp.concat([*turned, rest] if rest.shape[-1] else turned, axis=-1)


# The rules: (rope, length) -> (inverse frequencies, factor on cos and sin). What a rule needs, Rope has checked.


def _plain(rope: Rope) -> np.ndarray:
    return rope.theta ** (-np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim)


def _float32(inverse: np.ndarray, like: Array) -> Array:
    return asarray_like(inverse.astype(np.float32), like)


def _default(rope: Any, length: Array):
    return _float32(_plain(rope), length), 1.0


def _linear(rope: Any, length: Array):
    return _float32(_plain(rope) / rope.factor, length), 1.0


def _dynamic(rope: Any, length: Array):
    # theta' = theta * (factor * length / max - (factor - 1)) ^ (d / (d - 2)), once the length is past the maximum
    xp, d = namespace(length), rope.rotary_dim
    stretch = xp.maximum(length, xp.zeros_like(length) + rope.max_position) * (rope.factor / rope.max_position)
    growth = xp.log(stretch - (rope.factor - 1.0)) * (d / (d - 2))
    growth = xp.where(length > rope.max_position, growth, xp.zeros_like(growth))  # exactly, not but for rounding
    powers = _float32(np.arange(0, d, 2) / d, length)
    return _float32(_plain(rope), length) * xp.exp(-growth * powers), 1.0


def _llama3(rope: Any, length: Array):
    plain = _plain(rope)
    turns = rope.original_max_position * plain / (2 * math.pi)  # full turns within the pretrained length
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return _float32(plain * (keep + (1 - keep) / rope.factor), length), 1.0


def _yarn(rope: Any, length: Array):
    original, d = rope.original_max_position, rope.rotary_dim
    factor = rope.factor if rope.factor is not None else (rope.max_position or original) / original

    def dimension(turns: float) -> float:  # which dimension makes this many turns within the pretrained length
        return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = np.clip((np.arange(d // 2) - low) / max(high - low, 1e-3), 0, 1)
    plain = _plain(rope)

    def temperature(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = rope.attention_factor
    if attention is None:
        if rope.mscale and rope.mscale_all_dim:
            attention = temperature(rope.mscale) / temperature(rope.mscale_all_dim)
        else:
            attention = temperature()
    return _float32(plain * (1 - ramp) + plain / factor * ramp, length), attention


def _longrope(rope: Any, length: Array):
    xp, original = namespace(length), rope.original_max_position
    plain = _plain(rope)
    short, long = (_float32(plain / np.asarray(f), length) for f in (rope.short_factor, rope.long_factor))
    factor = rope.factor if rope.factor is not None else (rope.max_position or original) / original
    attention = rope.attention_factor
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return xp.where(length > original, long, short), attention


_RULES: dict[str, Callable[[Rope, Array], tuple[Array, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
_POSITIVE = (
    "theta", "partial_rotary_factor", "max_position", "original_max_position", "factor", "attention_factor",
    "beta_fast", "beta_slow",
)  # fmt: skip
_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "max_position"),
    "llama3": ("factor", "original_max_position", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position",),
    "longrope": ("original_max_position", "short_factor", "long_factor"),
}
