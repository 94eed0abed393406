"""What training wants to know of the logits without ever holding all of them: losses, log-probabilities, entropies.

Everything is computed in float32 (float64 for float64), a stretch of ``seq`` at a time: the float32 logits that exist
at one time take ``max_bytes`` of a device at most (or those of one token a row), whatever length and vocabulary. A
stretch in which no row has a target is passed over. Where something is measured of each token, logits are computed
again in the backward pass; for a sum of losses they are computed once, its gradient with them, in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
            # Not the total less the mean logit, whose gradients are larger than what is left of them.
            log_p = logits - total[..., None]
            measured.append(-(jnp.exp(log_p) * log_p).sum(axis=-1))
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

    total = _sum_by_stretches(head, measure, hidden, targets, layout, max_bytes)
    return total, (targets != NO_TARGET).sum(dtype=jnp.int32)


def _at(logits, targets):
    return jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]


class _Stretches:
    """How rows are cut: of those that several devices share, a stretch is one of each device's tokens."""

    def __init__(self, head: Head, hidden, layout: Layout, max_bytes: int):
        (self.batch, self.seq, _), self.sharers = hidden.shape, layout.context
        vocab, self.own = jax.eval_shape(head, hidden[:, :1]).shape[-1], self.seq // self.sharers
        most = max_bytes * layout.devices // (4 * self.batch * vocab * self.sharers)
        self.length = min(self.own, max(1, most))
        self.count = -(-self.own // self.length)

    def cut(self, x, fill):
        """``(count, batch, ...)``, filled up at the end."""
        x = x.reshape(self.batch, self.sharers, self.own, *x.shape[2:])
        widths = [(0, 0), (0, 0), (0, self.count * self.length - self.own)] + [(0, 0)] * (x.ndim - 3)
        x = jnp.pad(x, widths, constant_values=fill)
        x = x.reshape(self.batch, self.sharers, self.count, self.length, *x.shape[3:])
        return jnp.moveaxis(x, 2, 0).reshape(self.count, self.batch, -1, *x.shape[4:])

    def join(self, x):
        """``(batch, seq)`` again."""
        x = jnp.moveaxis(x.reshape(self.count, self.batch, self.sharers, self.length), 0, 2)
        return x.reshape(self.batch, self.sharers, -1)[:, :, : self.own].reshape(self.batch, self.seq)


def _measurer(measure: Callable, layout: Layout) -> Callable:
    """``measure(float32 logits, targets)`` of a stretch, from ``(head, hidden, targets)``."""

    def part(head, hidden, targets):
        logits = layout(head(layout(hidden, "batch", "seq")), "batch", "seq", "vocab")
        return measure(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), targets)

    return part


def _by_stretches(head: Head, measure: Callable, hidden, targets, layout: Layout, max_bytes: int):
    """``measure(float32 logits, targets)`` of every token, each of its results ``(batch, seq)``."""
    stretches, part = _Stretches(head, hidden, layout, max_bytes), partial(_measurer(measure, layout), head)
    if stretches.count == 1:
        return part(hidden, targets)
    inputs = stretches.cut(hidden, 0), stretches.cut(targets, NO_TARGET)

    @jax.checkpoint
    def part_with_targets(hidden, targets):
        """Prompts and padding of all rows together, as GRPO has them, need no logits."""

        def empty(hidden, targets):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, hidden, targets))

        return jax.lax.cond((targets != NO_TARGET).any(), part, empty, hidden, targets)

    _, measured = jax.lax.scan(lambda _, x: (None, part_with_targets(*x)), None, inputs)
    return jax.tree.map(stretches.join, measured)


def _sum_by_stretches(head: Head, measure: Callable, hidden, targets, layout: Layout, max_bytes: int):
    """The sum of ``measure(float32 logits, targets)`` over all tokens.

    Its gradient is the sum's cotangent, one number, times what is known when the logits are there: so each stretch
    finds its own in the forward pass, if there is to be one, and no logits are computed twice.
    """
    stretches, measured = _Stretches(head, hidden, layout, max_bytes), _measurer(measure, layout)
    if stretches.count == 1:
        return measured(head, hidden, targets).sum()
    inputs = stretches.cut(hidden, 0), stretches.cut(targets, NO_TARGET)
    head, weights = jax.closure_convert(head, inputs[0][0])  # what the gradient is by, besides the hidden states

    def part(weights, hidden, targets):
        return measured(lambda x: head(x, *weights), hidden, targets).sum()

    def scan(step, carry, inputs):
        """``step(carry, hidden, targets)`` over the stretches with targets: a carry, and results that else are 0."""

        def one(carry, x):
            def empty(carry, *x):
                shapes = jax.eval_shape(step, carry, *x)[1]
                return carry, jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)

            return jax.lax.cond((x[1] != NO_TARGET).any(), step, empty, carry, *x)

        return jax.lax.scan(one, carry, inputs)

    @jax.custom_vjp
    def total(weights, hidden, targets):
        return scan(lambda carry, *x: (carry, part(weights, *x)), None, (hidden, targets))[1].sum()

    def forward(weights, hidden, targets):
        trained = [weight.perturbed for weight in weights]
        weights, hidden, targets = jax.tree.map(lambda x: x.value, (weights, hidden, targets), is_leaf=_is_primal)

        def step(sums, hidden, targets):
            def loss(learned, hidden):
                learned = iter(learned)
                each = [next(learned) if train else weight for weight, train in zip(weights, trained, strict=True)]
                return part(each, hidden, targets)

            value, (by_weights, by_hidden) = jax.value_and_grad(loss, argnums=(0, 1))(learned, hidden)
            return jax.tree.map(jnp.add, sums, by_weights), (value, by_hidden)

        learned = [weight for weight, train in zip(weights, trained, strict=True) if train]
        sums, (losses, by_hidden) = scan(step, jax.tree.map(jnp.zeros_like, learned), (hidden, targets))
        sums = iter(sums)
        return losses.sum(), ([next(sums) if train else None for train in trained], by_hidden)

    def backward(gradients, cotangent):
        return *jax.tree.map(lambda x: (cotangent * x).astype(x.dtype), gradients), None

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(weights, *inputs)


def _is_primal(x) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
