"""How much arithmetic a training step is, and how much a device could do: model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from heddle.attention.dilated_patterns import Pattern, causal_pairs
from heddle.attention.mask import PADDING_SEGMENT_ID

#: Dense bfloat16 FLOP/s of NVIDIA's data sheets, by a part of the device's name; the first that fits.
PEAKS = {"GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class TrainingFlops:
    """The floating-point operations of a forward and backward pass of a causal language model.

    Matrix products alone, as PaLM counts them (arXiv 2204.02311, appendix B), with no work on pairs that no query sees:
    see :func:`of_weight` for those with weights, and for attention twice that of a trained weight, 12, for each visible
    pair of query and key and element of a head. What is recomputed isn't counted.

    Args:
        weights: of a token's products with weights, the head's apart; those of layers once a replica.
        head: of the product that makes a token's logits, which tokens without a target don't need.
        heads: query heads of a layer.
        head_dim: elements of a head.
        windows: of each layer, how many keys a query sees, its own among them; None: all.
        patterns: of dilated attention, in all layers; None: plain attention.
        replicas: how often the layers run (ParScale).
        extra: pairs of a query and a key beyond its own document's, of a replica, summed over the layers: with learned
            prefixes and with the other replicas.
    """

    weights: int
    head: int
    heads: int
    head_dim: int
    windows: Sequence[int | None]
    patterns: tuple[Pattern, ...] | None = None
    replicas: int = 1
    extra: int = 0

    def __call__(self, segment_ids: Int[np.ndarray, "*batch row_len"], targets: int) -> float:
        """Those of packed documents, told apart by their ids (-1: padding), with so many targets."""
        tokens = pairs = 0
        for row in segment_ids.reshape(-1, segment_ids.shape[-1]):
            lengths = np.unique(row[row != PADDING_SEGMENT_ID], return_counts=True)[1]
            tokens += int(lengths.sum())
            pairs += sum(self._pairs(int(length)) for length in lengths)
        pairs += self.heads * tokens * self.extra
        return float(self.weights * tokens + self.head * targets + 12 * self.head_dim * self.replicas * pairs)

    def _pairs(self, length: int) -> int:
        """The visible pairs of a document, of all heads and layers of a replica."""
        if self.patterns is not None:
            return len(self.windows) * causal_pairs(length, self.patterns, self.heads)
        beyond = [max(0, length - (window or length)) for window in self.windows]
        return self.heads * sum(length * (length + 1) - n * (n + 1) for n in beyond) // 2


def of_weight(trained: bool) -> int:
    """The operations of a weight and token: 2 forward, 2 for the activations' gradient, 2 for its own if trained."""
    return 6 if trained else 4


def extra_pairs(
    layers: int, replicas: int, prefix: int, prefix_scope: str, cross_attn_mode: Callable[[int], str | None]
) -> int:
    """:class:`TrainingFlops`' ``extra`` of a ParScale model, by the fields of its configuration."""
    if replicas == 1:
        return 0
    across = {None: 0, "joint": replicas - 1, "sublayer": replicas}  # itself among them or not
    prefix *= replicas if prefix_scope == "all" else 1
    return layers * prefix + sum(across[cross_attn_mode(layer)] for layer in range(layers))


def data_sheet(device: str) -> float | None:
    """The bfloat16 FLOP/s of a GPU that is known by its name, or None."""
    return next((peak for part, peak in PEAKS.items() if part in device), None)


def reached(multiply: Callable[[], object], size: int, repeats: int = 20) -> float:
    """The FLOP/s of the fastest of some products of two square matrices.

    Args:
        multiply: computes one, and returns when it is there.
        size: of the matrices' sides.
        repeats: how many, after one that isn't timed.
    """
    multiply()
    best = float("inf")
    for _ in range(repeats):
        since = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - since)
    return 2 * size**3 / best
