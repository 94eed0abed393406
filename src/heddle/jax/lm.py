"""Language modelling: the loss of every token that has a next one."""

from __future__ import annotations

from typing import Any

from heddle.attention.arrays import Array
from heddle.data.packing import Batch

from .logits import cross_entropy
from .parallel import Layout


def lm(model: Any, batch: Batch, rng: Array) -> tuple[Array, Array, dict[str, Array]]:
    """The next-token objective of packed rows, for :class:`heddle.jax.train.Trainer`.

    Documents see themselves alone, so the loss is that of every document run by itself, one forward each.

    Returns:
        The sum of the losses (float32, nats), the number of targets (int32), and no further metrics.
    """
    hidden = model.hidden(batch.tokens, batch.positions, batch.segment_ids)
    total, count = cross_entropy(model.head, hidden, batch.targets, layout=Layout(getattr(model, "mesh", None)))
    return total, count, {}
