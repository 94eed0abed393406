"""Language modelling: the loss of every token that has a next one, without ever holding all the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from heddle.attention.arrays import Array
from heddle.data.packing import NO_TARGET, Batch

from .parallel import ONE_DEVICE, Layout


def lm(model: Any, batch: Batch, rng: Array) -> tuple[Array, Array, dict[str, Array]]:
    """The next-token objective of packed rows, for :class:`heddle.jax.train.Trainer`.

    Documents see themselves alone, so the loss is that of every document run by itself, one forward each.

    Returns:
        The sum of the losses (float32, nats), the number of targets (int32), and no further metrics.
    """
    hidden = model.hidden(batch.tokens, batch.positions, batch.segment_ids)
    total, count = cross_entropy(model.head, hidden, batch.targets, layout=Layout(getattr(model, "mesh", None)))
    return total, count, {}


def cross_entropy(
    head: Callable[[Array], Array],
    hidden: Float[Array, "batch seq hidden"],
    targets: Int[Array, "batch seq"],
    *,
    max_bytes: int = 2**26,
    layout: Layout = ONE_DEVICE,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The sum of ``-log softmax(head(hidden))[target]`` over the places that have a target, and their number.

    Computed in float32, a stretch of ``seq`` at a time, each recomputed in the backward pass: the float32 logits that
    exist at one time take ``max_bytes`` at most (or those of one token a row), whatever the length and vocabulary.

    Args:
        head: makes ``(batch, n, hidden)`` into logits ``(batch, n, vocab)``.
        hidden: the final hidden states.
        targets: ids below vocab, or ``NO_TARGET``.
        max_bytes: of float32 logits at one time, on one device.
        layout: where ``hidden`` lies; each device that has a share of a row's tokens goes through its own.
    """
    batch, seq, _ = hidden.shape
    vocab = jax.eval_shape(head, hidden[:, :1]).shape[-1]
    share = seq // layout.context
    stretch = min(share, max(1, max_bytes * layout.devices // (4 * batch * layout.context * vocab)))
    parts = -(-share // stretch)
    count = (targets != NO_TARGET).sum(dtype=jnp.int32)
    if parts == 1:
        return _cross_entropy(head, hidden, targets), count

    def cut(x, fill):  # (parts, batch, context, stretch, ...)
        x = x.reshape(batch, layout.context, share, *x.shape[2:])
        room = ((0, 0), (0, 0), (0, parts * stretch - share), *[(0, 0)] * (x.ndim - 3))
        x = jnp.pad(x, room, constant_values=fill).reshape(batch, layout.context, parts, stretch, *x.shape[3:])
        return jnp.moveaxis(x, 2, 0)

    part = jax.checkpoint(lambda hidden, targets: _cross_entropy(head, hidden, targets))

    def add(total, inputs):
        return total + part(*inputs), None

    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), (cut(hidden, 0), cut(targets, NO_TARGET)))
    return total, count


def _cross_entropy(head, hidden, targets):
    logits = head(hidden).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets == NO_TARGET, 0.0, jax.nn.logsumexp(logits, axis=-1) - picked).sum()
