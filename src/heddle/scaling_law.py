"""What the loss of P replicas should be, by the law of ParScale, and how large a model would reach it.

``L = (A / (N (k ln P + 1)))^α + E``, arXiv 2505.10475, section 4: P replicas do as well as ``k ln P + 1`` times the
parameters N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

#: By corpus, the constants of the law (table 1); A and α cancel where losses are equal.
LAWS = {
    "stack": {"E": 0.6912, "A": 1.131e7, "k": 0.3935, "alpha": 0.1894},
    "pile": {"E": 1.2888, "A": 1.974e8, "k": 0.3345, "alpha": 0.1963},
}


class Fit(NamedTuple):
    """The law's k for measured losses, and the loss it gives one replica; each with its standard error."""

    k: float
    k_error: float
    one: float
    one_error: float


def loss(parameters: int | float, replicas: int, law: str) -> float:
    """What the law says of a model of so many parameters in its layers, run as so many replicas."""
    c = LAWS[law]
    return (c["A"] / (parameters * (c["k"] * math.log(replicas) + 1))) ** c["alpha"] + c["E"]


def growth(replicas: int, law: str) -> float:
    """How many times the parameters reach the loss of so many replicas."""
    return LAWS[law]["k"] * math.log(replicas) + 1


def relative(replicas: int, k: float, one: float, alpha: float, floor: float) -> float:
    """The loss of P replicas of a model that has the loss ``one`` with one of them, and never gets below ``floor``."""
    return floor + (one - floor) * (k * math.log(replicas) + 1) ** -alpha


def fit(replicas: Sequence[int], losses: Sequence[float], *, alpha: float, floor: float = 0.0) -> Fit:
    """Least squares of :func:`relative` over single runs' losses, α and E being given: so few P can't tell them too.

    Args:
        replicas: P of each run, at least two different ones.
        losses: of each run, the same unit as ``floor``.
        alpha: α of the law.
        floor: E of the law, in the losses' unit.

    Raises:
        ValueError: fewer than two different P, or fewer than three runs: nothing is left to estimate errors from.
    """
    if len(replicas) != len(losses) or len(set(replicas)) < 2 or len(losses) < 3:
        raise ValueError(f"replicas must be two different numbers at least, of three runs at least, got {replicas}")
    from scipy.optimize import curve_fit

    def curve(_, k, one):
        return [relative(count, float(k), float(one), alpha, floor) for count in replicas]

    mean = sum(losses) / len(losses)
    (k, one), covariance = curve_fit(curve, replicas, losses, p0=(0.1, mean), bounds=((-0.4, floor), (10, math.inf)))
    return Fit(float(k), math.sqrt(covariance[0][0]), float(one), math.sqrt(covariance[1][1]))
