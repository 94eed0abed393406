"""The patterns of LongNet's dilated attention: segments of so many tokens, of which every r-th is kept.

arXiv 2307.02486, eq. 5 to 9: what a pattern keeps of a document, of which head, for how many keys to see or to cache.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Bool, Int

from .arrays import Array, arange


class Pattern(NamedTuple):
    """Segments of ``length`` tokens, of which every ``rate``-th is kept."""

    length: int
    rate: int


def check_patterns(segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> tuple[Pattern, ...]:
    """The patterns of two lists, checked.

    Raises:
        ValueError: lists that are empty, differ in length, or hold anything but positive integers.
    """
    lists: dict[str, list[int]] = {}
    for name, values in (("segment_lengths", segment_lengths), ("dilation_rates", dilation_rates)):
        try:
            lists[name] = [operator.index(value) for value in values]
        except TypeError:
            raise ValueError(f"{name} must be a list of positive integers, got {values!r}") from None
        if not lists[name] or min(lists[name]) < 1:
            raise ValueError(f"{name} must hold positive integers, at least one, got {values!r}")
    lengths, rates = lists.values()
    if len(lengths) != len(rates):
        raise ValueError(
            f"segment_lengths and dilation_rates must be of one length, got {len(lengths)} and {len(rates)}"
        )
    return tuple(map(Pattern, lengths, rates))


def patterns_of_option(option: Any) -> tuple[Pattern, ...] | None:
    """What ``attention`` says in a model's ``config.json``.

    Args:
        option: ``{"kind": "dilated", "segment_lengths": [...], "dilation_rates": [...]}``; ``{"kind": "dense"}`` or
            None for plain attention.

    Returns:
        the patterns, or None for plain attention.

    Raises:
        ValueError: another kind, other fields; as of :func:`check_patterns`.
    """
    fields = {"dense": {"kind"}, "dilated": {"kind", "segment_lengths", "dilation_rates"}}
    kind = "dense" if option is None else option.get("kind") if isinstance(option, Mapping) else None
    if kind not in fields or set(option or ("kind",)) != fields[kind]:
        raise ValueError(
            'attention must be {"kind": "dense"} or {"kind": "dilated", "segment_lengths": [...], '
            f'"dilation_rates": [...]}}, got {option!r}'
        )
    if option is None or kind == "dense":
        return None
    return check_patterns(option["segment_lengths"], option["dilation_rates"])


def causal_pairs(length: int, patterns: Sequence[Pattern], heads: int) -> int:
    """The pairs of a query and a key it sees, of all heads and patterns, in one document: what dilation has to do."""
    pairs = 0
    for w, r in patterns:
        for offset in (head % r for head in range(heads)):
            for segments, tokens in ((length // w, w), (1, length % w)):
                kept = max(0, -(-(tokens - offset) // r))
                pairs += segments * kept * (kept + 1) // 2
    return pairs


def decode_slot(
    position: Int[Array, " batch"], pattern: Pattern, heads: int
) -> tuple[Bool[Array, "batch heads"], Int[Array, " batch"]]:
    """Which heads of a pattern keep the token at ``position`` of its document, and its slot in their cache.

    Where it is kept its key goes to that slot, and it sees the slots up to it, its own included; where it isn't, it
    sees nothing of this pattern and leaves nothing. A segment's first token starts again at slot 0, so that ``ceil(w /
    r)`` slots a pattern and head serve any length.
    """
    within = position % pattern.length
    kept = (within % pattern.rate)[:, None] == (arange(heads, position) % pattern.rate)[None]
    return kept, within // pattern.rate


def cache_length(segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> int:
    """The keys a head has to keep for decoding, at most: the sum of ``ceil(w / r)``."""
    return sum(-(-pattern.length // pattern.rate) for pattern in check_patterns(segment_lengths, dilation_rates))
