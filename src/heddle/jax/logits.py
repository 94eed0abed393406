"""What training wants to know of the logits without ever holding all of them: losses, log-probabilities, entropies.

Everything is computed in float32 (float64 for float64), a stretch of ``seq`` at a time, each recomputed in the backward
pass: the float32 logits that exist at one time take ``max_bytes`` of a device at most (or those of one token a row),
whatever length and vocabulary. A stretch in which no row has a target is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from heddle.attention.arrays import Array
from heddle.data.packing import NO_TARGET

from .parallel import ONE_DEVICE, Layout

MAX_BYTES = 2**26

Head = Callable[[Array], Array]  #: makes ``(batch, n, hidden)`` into logits ``(batch, n, vocab)``


class LogProbabilities(NamedTuple):
    """What :func:`log_probabilities` returns."""

    targets: Float[Array, "batch seq"]  #: log p(target), nats; 0 where there is no target
    entropy: Float[Array, "batch seq"] | None  #: of the next token's distribution, nats; 0 where there is no target


def log_probabilities(
    head: Head,
    hidden: Float[Array, "batch seq hidden"],
    targets: Int[Array, "batch seq"],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    layout: Layout = ONE_DEVICE,
    max_bytes: int = MAX_BYTES,
) -> LogProbabilities:
    """``log softmax(head(hidden) / temperature)[target]`` of every token, differentiable; and the entropy, if asked.

    Args:
        head: makes logits of hidden states.
        hidden: the final hidden states.
        targets: ids below vocab, or ``NO_TARGET``.
        temperature: that the logits are divided by.
        entropy: whether to compute it.
        layout: where the activations lie.
        max_bytes: of float32 logits at one time, on each device.

    Raises:
        ValueError: a temperature that isn't positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    def measure(logits, targets):
        logits = logits / temperature
        total = jax.nn.logsumexp(logits, axis=-1)
        measured = [_at(logits, targets) - total]
        if entropy:
            measured.append(total - (jax.nn.softmax(logits, axis=-1) * logits).sum(axis=-1))
        return [jnp.where(targets == NO_TARGET, 0.0, each) for each in measured]

    measured = _by_stretches(head, measure, hidden, targets, layout, max_bytes)
    return LogProbabilities(measured[0], measured[1] if entropy else None)


def cross_entropy(
    head: Head,
    hidden: Float[Array, "batch seq hidden"],
    targets: Int[Array, "batch seq"],
    *,
    smoothing: float = 0.0,
    layout: Layout = ONE_DEVICE,
    max_bytes: int = MAX_BYTES,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The sum of ``-log softmax(head(hidden))[target]`` over the places that have a target, and their number.

    Args:
        head: makes logits of hidden states.
        hidden: the final hidden states.
        targets: ids below vocab, or ``NO_TARGET``.
        smoothing: ε of label smoothing (arXiv 1512.00567, section 7): the target's loss weighs ``1 - ε``, the mean loss
            of all tokens of the vocabulary ``ε``.
        layout: where the activations lie.
        max_bytes: of float32 logits at one time, on each device.
    """

    def measure(logits, targets):
        total = jax.nn.logsumexp(logits, axis=-1)
        loss = total - _at(logits, targets)
        if smoothing:
            loss = (1 - smoothing) * loss + smoothing * (total - logits.mean(axis=-1))
        return jnp.where(targets == NO_TARGET, 0.0, loss)

    losses = _by_stretches(head, measure, hidden, targets, layout, max_bytes)
    return losses.sum(), (targets != NO_TARGET).sum(dtype=jnp.int32)


def _at(logits, targets):
    return jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]


def _by_stretches(head: Head, measure: Callable, hidden, targets, layout: Layout, max_bytes: int):
    """``measure(float32 logits, targets)`` of every token, each of its results ``(batch, seq)``.

    Of rows that several devices share, a stretch is one of each device's tokens.
    """
    (batch, seq, _), sharers = hidden.shape, layout.context
    vocab, own = jax.eval_shape(head, hidden[:, :1]).shape[-1], seq // sharers
    stretch = min(own, max(1, max_bytes * layout.devices // (4 * batch * vocab * sharers)))
    parts = -(-own // stretch)

    def part(hidden, targets):
        logits = layout(head(layout(hidden, "batch", "seq")), "batch", "seq", "vocab")
        return measure(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), targets)

    if parts == 1:
        return part(hidden, targets)
    nothing = jax.eval_shape(part, hidden[:, : sharers * stretch], targets[:, : sharers * stretch])

    def part_with_targets(hidden, targets):
        """Prompts and padding of all rows together, as GRPO has them, need no logits."""

        def empty(hidden, targets):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing)

        return jax.lax.cond((targets != NO_TARGET).any(), part, empty, hidden, targets)

    def cut(x, fill):
        x = x.reshape(batch, sharers, own, *x.shape[2:])
        widths = [(0, 0), (0, 0), (0, parts * stretch - own)] + [(0, 0)] * (x.ndim - 3)
        x = jnp.pad(x, widths, constant_values=fill).reshape(batch, sharers, parts, stretch, *x.shape[3:])
        return jnp.moveaxis(x, 2, 0).reshape(parts, batch, sharers * stretch, *x.shape[4:])

    def joined(x):
        x = jnp.moveaxis(x.reshape(parts, batch, sharers, stretch), 0, 2)
        return x.reshape(batch, sharers, -1)[:, :, :own].reshape(batch, seq)

    inputs = cut(hidden, 0), cut(targets, NO_TARGET)
    _, measured = jax.lax.scan(lambda _, x: (None, jax.checkpoint(part_with_targets)(*x)), None, inputs)
    return jax.tree.map(joined, measured)
