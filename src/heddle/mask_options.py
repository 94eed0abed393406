"""The mask that ``heddle mask``'s options describe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from heddle.attention import Mask, balance
from heddle.attention.mask import PADDING_SEGMENT_ID
from heddle.mask_picture import Drawn, Ranks

KINDS = ("causal", "full", "window", "documents", "lengths", "prefix-lm")
BALANCES = ("area", "zigzag", "none")


def from_options(
    kind: str | None = None,
    *,
    seq: int | None = None,
    documents: int | None = None,
    lengths: Sequence[int] | None = None,
    window: int | None = None,
    prefix: int | None = None,
    padding: int = 0,
    context_parallel: int = 1,
    balanced: str = "area",
    chunk: int | None = None,
    seed: int = 0,
) -> Drawn:
    """The mask that ``heddle mask``'s options describe; every option is explained there.

    Raises:
        ValueError: an option that doesn't go with the kind, or a value that it can't have.
    """
    if kind is None:
        implied = (("documents", documents), ("documents", lengths), ("window", window), ("prefix-lm", prefix))
        kind = next((name for name, value in implied if value is not None), "causal")
    if kind not in KINDS:
        raise ValueError(f"--kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if balanced not in BALANCES:
        raise ValueError(f"--balance must be one of {', '.join(BALANCES)}, got {balanced!r}")
    goes_with = {
        "--documents": (documents, ("documents",)),
        "--lengths": (lengths, ("documents", "lengths")),
        "--window": (window, ("window", "documents")),
        "--prefix": (prefix, ("prefix-lm", "window")),
        "--padding": (padding or None, ("causal", "full", "window", "documents", "prefix-lm")),
    }
    for option, (value, kinds) in goes_with.items():
        if value is not None and kind not in kinds:
            raise ValueError(f"{option} goes with --kind {' or '.join(kinds)}, not with {kind}")
    for option, value, least in (
        ("--seq", seq, 1),
        ("--documents", documents, 1),
        ("--window", window, 1),
        ("--prefix", prefix, 0),
        ("--padding", padding, 0),
        ("--context-parallel", context_parallel, 1),
        ("--chunk", chunk, 1),
        ("--seed", seed, 0),
        ("--lengths", min(lengths) if lengths else None, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")
    if kind == "lengths" and not lengths:
        raise ValueError("--kind lengths needs --lengths, as in --lengths 100,300,50")
    if kind == "window" and window is None:
        raise ValueError("--kind window needs --window, the number of keys a query sees")
    if kind == "prefix-lm" and prefix is None:
        raise ValueError("--kind prefix-lm needs --prefix, the number of tokens that see each other")
    if documents and lengths:
        raise ValueError("--documents and --lengths both say how long the documents are: give one")

    if kind == "lengths" and lengths:
        seq = seq or max(lengths)
        if max(lengths) > seq:
            raise ValueError(f"--lengths must be at most --seq {seq}, got {max(lengths)}")
    elif lengths:
        seq = seq or sum(lengths) + padding
        if sum(lengths) + padding > seq:
            raise ValueError(
                f"--lengths must sum to at most {seq - padding} (--seq less --padding), got {sum(lengths)}"
            )
    seq = seq or 1024
    used = seq - padding
    if used < 1:
        raise ValueError(f"--padding must leave a token of --seq {seq}, got {padding}")
    if prefix is not None and prefix > used:
        raise ValueError(f"--prefix must be at most the {used} tokens there are, got {prefix}")

    segments = None
    if kind == "documents":
        if not lengths:
            documents = documents or 8
            if documents > used:
                raise ValueError(f"--documents must be at most the {used} tokens there are, got {documents}")
            cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, used), documents - 1, replace=False))
            lengths = np.diff([0, *cuts, used]).tolist()
        segments = np.full((1, seq), PADDING_SEGMENT_ID, dtype=np.int32)
        segments[0, : sum(lengths)] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        mask = Mask.documents(segments)
        name = f"{len(lengths)} document{'s' if len(lengths) > 1 else ''}"
        if window:
            mask, name = mask & Mask.window(seq, window), f"{name}, window of {window:,}"
    elif kind == "lengths" and lengths:
        mask = Mask.lengths(np.asarray(lengths, dtype=np.int32), seq)
        name = f"{len(lengths)} sequence{'s' if len(lengths) > 1 else ''} padded to {seq:,} tokens"
    elif kind == "window" and window:
        mask, name = Mask.window(seq, window, prefix=prefix or 0), f"window of {window:,}"
        name += f", {prefix} sinks" if prefix else ""
    elif kind == "prefix-lm" and prefix is not None:
        causal = Mask.causal(seq)
        mask, name = Mask(causal.start, np.maximum(causal.stop, prefix)), f"prefix-LM, prefix of {prefix:,}"
    else:
        mask, name = (Mask.full(seq, seq), "full") if kind == "full" else (Mask.causal(seq), "causal")
    if padding:
        mask = mask & Mask.lengths(np.asarray([used], dtype=np.int32), seq, causal=False)

    if kind != "lengths":
        name += f", {seq:,} tokens" + (f" with {padding:,} of padding" if padding else "")

    ranks = None
    if context_parallel > 1:
        ranks = Ranks(rank_order(mask, context_parallel, balanced, chunk), context_parallel, balanced)
    return Drawn(mask, seq, name, segments, ranks)


def rank_order(mask: Mask, ranks: int, balanced: str, chunk: int | None = None) -> Int[np.ndarray, " q_len"]:
    """Who holds which queries (see :mod:`heddle.attention.balance`) by the name of the balance."""
    if balanced == "area":
        # Enough chunks to deal even where a rank's share is small.
        return balance.by_area(mask, ranks, chunk or max(1, min(128, mask.q_len // ranks // 8)))
    return (balance.zigzag if balanced == "zigzag" else balance.contiguous)(mask.q_len, ranks)


def parse_lengths(text: str | None) -> list[int] | None:
    """``"100,300,50"`` as numbers."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--lengths must be whole numbers as in 100,300,50, got {text!r}") from None
