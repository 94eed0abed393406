"""Attention over a union of disjoint sets of keys, from attention over each."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float

from .arrays import Array, accumulator_dtype, namespace


def merge(
    parts: Sequence[tuple[Float[Array, "batch q_len heads dim"], Float[Array, "batch q_len heads"]]],
) -> tuple[Float[Array, "batch q_len heads dim"], Float[Array, "batch q_len heads"]]:
    """Attention over the union of the parts' keys: softmax denominators add, outputs are averaged by them.

    A key that stands in two parts counts twice (a multiset union, as LongNet's eq. 10-11 has it). Computed in the lse's
    dtype, stable for any magnitude; rows empty in every part stay 0 and -inf, with gradient 0.

    Args:
        parts: what :func:`attend` returned with ``return_lse=True`` for each set of keys.

    Returns:
        ``(out, lse)``: out in the first part's dtype, lse as the parts'.

    Raises:
        ValueError: no parts, or parts of different shapes.
    """
    if not parts:
        raise ValueError("parts must hold at least one (out, lse), got none")
    for index, (out, lse) in enumerate(parts):
        if out.shape != parts[0][0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"parts[{index}] must hold out of shape {tuple(parts[0][0].shape)} and lse of its first three axes, "
                f"got {tuple(out.shape)} and {tuple(lse.shape)}"
            )
    if len(parts) == 1:
        return parts[0]
    xp = namespace(parts[0][1])
    highest = parts[0][1]
    for _, lse in parts[1:]:
        highest = xp.maximum(highest, lse)
    highest = xp.where(xp.isfinite(highest), highest, xp.zeros_like(highest))
    weights = [xp.exp(lse - highest) for _, lse in parts]
    total = sum(weights[1:], start=weights[0])
    empty = total == 0
    total = xp.where(empty, xp.ones_like(total), total)  # where twice: no NaN gradient from log(0)
    out = xp.astype(parts[0][0], total.dtype) * (weights[0] / total)[..., None]
    for (part, _), weight in zip(parts[1:], weights[1:], strict=True):
        out = out + xp.astype(part, total.dtype) * (weight / total)[..., None]
    lse = xp.where(empty, xp.full_like(total, -float("inf")), xp.log(total) + highest)
    return xp.astype(out, parts[0][0].dtype), lse


def over_no_keys(
    query: Float[Array, "batch q_len heads dim"], value_dim: int
) -> tuple[Float[Array, "batch q_len heads value_dim"], Float[Array, "batch q_len heads"]]:
    """``(out, lse)`` of queries that see nothing, 0 and -inf: what :func:`merge` leaves others as they are with.

    New arrays, in the dtype of sums.
    """
    xp, dtype = namespace(query), accumulator_dtype(query)
    out = xp.repeat(xp.zeros_like(query[..., :1], dtype=dtype), value_dim, axis=-1)
    return out, xp.full_like(query[..., 0], -float("inf"), dtype=dtype)
