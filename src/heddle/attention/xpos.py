"""LongNet's position embeddings: RoPE, or XPOS, whose scores also fade with the distance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from .arrays import Array, asarray_like, namespace
from .rope import Rope

GAMMA = 0.4  #: XPOS's γ, arXiv 2212.10554, section 3
KINDS = ("rope", "xpos")
FURTHEST = 64  #: scale_bases a segment may have, so that ζ^±32, at most 3e17, and its products stay within float32

Tables = tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]


def check_position(kind: str, segment_lengths: Sequence[int], scale_base: float) -> None:
    """Raise ValueError for an unknown kind, or segments too long for XPOS's scale."""
    if kind not in KINDS:
        raise ValueError(f"position must be one of {', '.join(KINDS)}, got {kind!r}")
    if not scale_base > 0:
        raise ValueError(f"xpos_scale_base must be positive, got {scale_base}")
    if kind == "xpos" and math.lcm(*segment_lengths) > FURTHEST * scale_base:
        raise ValueError(
            f"xpos_scale_base must be at least a {FURTHEST}th of the segment_lengths' least common multiple "
            f"{math.lcm(*segment_lengths)}, got {scale_base}: beyond that XPOS's scale leaves float32"
        )


def position_tables(
    kind: str,
    positions: Int[Array, "batch seq"],
    head_dim: int,
    segment_lengths: Sequence[int],
    *,
    theta: float = 10000.0,
    scale_base: float = 512.0,
) -> tuple[Tables, Tables]:
    """What :func:`heddle.attention.rope.rotate` turns queries by, and what it turns keys by: cos and sin, float32.

    RoPE, or XPOS (arXiv 2212.10554, algorithm 1): there a query at ``n`` is also multiplied by ``ζ^(n / scale_base)``
    and a key by ``ζ^(-n / scale_base)``, with ``ζ_i = (2i / head_dim + γ) / (1 + γ)``, so that a score goes by
    ``ζ^((n - m) / scale_base)``. For causal attention.

    A token and those it sees lie between the same two multiples of the segment lengths' least common multiple, so
    positions count from there on. That changes no score, is more exact far into a sequence, and keeps XPOS's scale
    within float32 at any length.

    Args:
        kind: ``"rope"`` or ``"xpos"``.
        positions: of the tokens in their documents.
        head_dim: the head's size, even.
        segment_lengths: w of each pattern.
        theta: base of RoPE's geometric series.
        scale_base: tokens a power of ζ.

    Raises:
        ValueError: as of :func:`check_position`; head_dim odd.
    """
    check_position(kind, segment_lengths, scale_base)
    xp, period = namespace(positions), math.lcm(*segment_lengths)
    if period < 2**31:
        positions = positions % period
    cos, sin = Rope(head_dim, theta).tables(positions)
    if kind == "rope":
        return (cos, sin), (cos, sin)
    zeta = (np.arange(0, head_dim, 2) / head_dim + GAMMA) / (1 + GAMMA)
    power = (xp.astype(positions, xp.float32) - period / 2) / scale_base
    scale = xp.exp(power[..., None] * asarray_like(np.log(zeta).astype(np.float32), positions))
    return (cos * scale, sin * scale), (cos / scale, sin / scale)
