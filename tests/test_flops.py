"""The arithmetic of a training step, against pairs counted one by one."""

import itertools

import numpy as np
import pytest

from heddle.attention.dilated_patterns import Pattern
from heddle.flops import TrainingFlops, data_sheet, extra_pairs, of_weight, reached

SEGMENTS = np.array([[0] * 5 + [1] * 9 + [-1] * 2, [0] * 16])


def seen(window=None):
    """The pairs of all documents, by looking at each."""
    pairs = 0
    for row in SEGMENTS:
        for i, j in itertools.product(range(row.size), repeat=2):
            pairs += row[i] == row[j] != -1 and j <= i and (window is None or i - j < window)
    return pairs


def test_weights_and_visible_pairs():
    flops = TrainingFlops(weights=1000, head=70, heads=3, head_dim=8, windows=[None, 4, None])
    attention = 12 * 8 * 3 * (2 * seen() + seen(4))
    assert flops(SEGMENTS, 27) == 1000 * 30 + 70 * 27 + attention
    assert flops(SEGMENTS.reshape(2, 1, 16), 27) == flops(SEGMENTS, 27)
    assert flops(np.full((1, 16), -1), 0) == 0
    assert (of_weight(True), of_weight(False)) == (6, 4)


def test_replicas_repeat_the_layers_and_see_more():
    config = {"layers": 3, "replicas": 4, "prefix": 5}
    none = extra_pairs(**config, prefix_scope="own", cross_attn_mode=lambda layer: None)
    assert none == 3 * 5
    assert extra_pairs(**config, prefix_scope="all", cross_attn_mode=lambda layer: None) == 3 * 20
    modes = ["joint", None, "sublayer"]
    extra = extra_pairs(**config, prefix_scope="own", cross_attn_mode=modes.__getitem__)
    assert extra == none + 3 + 4  # without itself, and with it
    assert extra_pairs(3, 1, 5, "own", modes.__getitem__) == 0
    flops = TrainingFlops(weights=0, head=0, heads=2, head_dim=8, windows=[None] * 3, replicas=4, extra=extra)
    assert flops(SEGMENTS, 27) == 12 * 8 * 4 * 2 * (3 * seen() + 30 * extra)


def test_dilation_sees_less():
    dense = TrainingFlops(weights=0, head=0, heads=2, head_dim=8, windows=[None])
    whole = TrainingFlops(0, 0, 2, 8, [None], (Pattern(16, 1),))
    assert whole(SEGMENTS, 27) == dense(SEGMENTS, 27)
    halves = TrainingFlops(0, 0, 2, 8, [None, None], (Pattern(16, 2),))
    each = [[(n + 1) // 2, n // 2] for n in (5, 9, 16)]  # tokens that the first and the second head keep
    assert halves(SEGMENTS, 27) == 2 * 12 * 8 * sum(n * (n + 1) // 2 for n in itertools.chain(*each))


def test_peaks():
    assert data_sheet("NVIDIA H100 80GB HBM3") == 989e12
    assert data_sheet("NVIDIA GB200") == 2.5e15
    assert data_sheet("NVIDIA GeForce RTX 4090") is None
    done = []
    assert 0 < reached(lambda: done.append(sum(range(10000))), 10, repeats=3) < 2000 / 1e-6
    assert len(done) == 4


@pytest.mark.parametrize("trained", [True, False])
def test_a_model_by_hand(trained):
    """A layer of d x d weights: 2 products of T x d x d forward, one or two more backward."""
    d, T = 8, 16
    flops = TrainingFlops(weights=d * d * of_weight(trained), head=0, heads=1, head_dim=d, windows=[])
    assert flops(np.zeros((1, T), int), T - 1) == 2 * T * d * d * (3 if trained else 2)
