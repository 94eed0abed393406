"""``attend``: checks its arguments and hands them to an implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

from jaxtyping import Float

from .arrays import Array, framework, namespace
from .mask import Mask
from .reference import reference, reference_backward


class Implementation(NamedTuple):
    """One way to compute attention.

    ``unsupported(query, key, value, mask)`` returns None if it serves the case, else one clause saying why not;
    ``run(query, key, value, mask, scale)`` returns ``(out, lse)``, differentiable;
    ``backward(query, key, value, mask, scale, out, lse, d_out, d_lse)`` returns ``(dq, dk, dv)``, where out and lse may
    be over more keys than these (ring attention). Arguments are checked, the mask is in their framework.
    """

    unsupported: Callable[[Array, Array, Array, Mask], str | None]
    run: Callable[[Array, Array, Array, Mask, float], tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


REFERENCE = Implementation(lambda query, key, value, mask: None, reference, reference_backward)
#: By framework, in order of preference. A wing fills in its own when it is imported.
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {"numpy": {"reference": REFERENCE}}


def _table(array: Array) -> dict[str, Implementation]:
    # The one place where the core looks up: arrays may come before their wing is imported.
    name = framework(array)
    if name == "torch":
        import heddle.torch.attention
    elif name == "jax":
        import heddle.jax.attention  # noqa: F401
    return IMPLEMENTATIONS[name]


@overload
def attend(
    query: Array, key: Array, value: Array, mask: Mask | None = None, *,
    scale: float | None = None, implementation: str | None = None, return_lse: Literal[False] = False,
) -> Array: ...  # fmt: skip
@overload
def attend(
    query: Array, key: Array, value: Array, mask: Mask | None = None, *,
    scale: float | None = None, implementation: str | None = None, return_lse: Literal[True],
) -> tuple[Array, Array]: ...  # fmt: skip
def attend(
    query: Float[Array, "batch q_len heads dim"],
    key: Float[Array, "batch kv_len kv_heads dim"],
    value: Float[Array, "batch kv_len kv_heads value_dim"],
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
):
    """Attention of each query over the keys its mask lets it see.

    ``softmax(scale * query key^T) value`` (arXiv 1706.03762, eq. 1), differentiable in query, key and value through the
    output and through the lse. Accumulated in float32 (float64 for float64).

    Args:
        query: ``(batch, q_len, heads, dim)``: float64, float32, bfloat16 or float16.
        key: ``(batch, kv_len, kv_heads, dim)``, heads a multiple of kv_heads (grouped-query attention).
        value: ``(batch, kv_len, kv_heads, value_dim)``.
        mask: which keys each query sees; None: all.
        scale: of the scores; None: ``dim ** -0.5``.
        implementation: a name out of :func:`implementations`; None: the first that serves the case.
        return_lse: also return the log of each query's softmax denominator, as :func:`merge` needs it.

    Returns:
        ``(batch, q_len, heads, value_dim)`` in query's dtype; with ``return_lse`` also ``(batch, q_len, heads)``,
        natural log, float32 (float64 for float64). Queries that see nothing give 0 and -inf.

    Raises:
        ValueError: arguments that disagree.
        NotImplementedError: the named implementation doesn't serve this case (the message says why).
    """
    mask = check(query, key, value, mask)
    chosen = choose(query, key, value, mask, implementation)
    out, lse = chosen.run(query, key, value, mask, score_scale(query, scale))
    return (out, lse) if return_lse else out


def choose(query: Array, key: Array, value: Array, mask: Mask, implementation: str | None = None) -> Implementation:
    """The named implementation, or the first that serves these (checked) arguments; see :func:`attend`."""
    table = _table(query)
    if implementation is None:
        return next(i for i in table.values() if i.unsupported(query, key, value, mask) is None)
    if implementation not in table:
        raise ValueError(
            f"implementation must be one of {', '.join(table)} for {framework(query)} arrays, got {implementation!r}"
        )
    why = table[implementation].unsupported(query, key, value, mask)
    if why is not None:
        raise NotImplementedError(f"implementation {implementation!r} doesn't serve this case: {why}")
    return table[implementation]


def implementations(query: Array, key: Array, value: Array, mask: Mask | None = None) -> dict[str, str | None]:
    """Which implementations would serve these arguments, in order of preference: name to None, or to why not."""
    mask = check(query, key, value, mask)
    return {name: i.unsupported(query, key, value, mask) for name, i in _table(query).items()}


def score_scale(query: Array, scale: float | None) -> float:
    """The factor of the scores: ``scale``, checked, or its default."""
    if scale is None:
        return query.shape[-1] ** -0.5  # not checked: torch.compile may trace the size as a symbol
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    return float(scale)


def check(query: Array, key: Array, value: Array, mask: Mask | None) -> Mask:
    """:func:`attend`'s checks of its arguments; the mask, in query's framework and on its device."""
    arrays = {"query": query, "key": key, "value": value}
    kind = framework(query)
    xp = namespace(query)
    for name, array in arrays.items():
        if framework(array) != kind:
            raise ValueError(f"{name} must be a {kind} array as query is, got {type(array).__name__}")
        if array.ndim != 4:
            raise ValueError(f"{name} must have shape (batch, seq, heads, head_dim), got {tuple(array.shape)}")
        if not xp.isdtype(array.dtype, "real floating"):
            raise ValueError(f"{name} must be floating point, got {array.dtype}")
        if array.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {array.dtype}")
        if 0 in array.shape:
            raise ValueError(f"{name} must have no empty axis, got shape {tuple(array.shape)}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key and value must agree in batch, seq and heads, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"query and key must have one batch size, got {query.shape[0]} and {key.shape[0]}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have one head_dim, got {query.shape[3]} and {key.shape[3]}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"query's heads must be a multiple of key's, got {query.shape[2]} and {key.shape[2]}")
    if mask is None:
        return Mask.full(query.shape[1], key.shape[1], like=query)
    if not isinstance(mask, Mask):
        raise ValueError(f"mask must be a heddle.Mask or None, got {type(mask).__name__}")
    if mask.q_len != query.shape[1]:
        raise ValueError(f"mask must have query's q_len {query.shape[1]}, got {mask.q_len}")
    if mask.start.shape[0] not in (1, query.shape[0]):
        raise ValueError(f"mask must have 1 row or query's batch size {query.shape[0]}, got {mask.start.shape[0]}")
    return mask.on(query)
