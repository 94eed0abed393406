"""Group relative policy optimisation (GRPO, arXiv 2402.03300): the loss of completions that were rewarded.

For completion i of N, its token t and the policy π, with all log-probabilities of logits divided by the sampling
temperature, over the full vocabulary::

    r_it = exp(log π(o_it) - log π_old(o_it))                         ratio, of a token or a sequence
    l_it = -min(min(r_it, δ) A_i, clip(r_it, 1 - ε_low, 1 + ε_high) A_i) c_it + β r_it KL_it
    loss = sum_it w_it l_it                                           w by the normalisation

The formula of each term stands with its function. Axes: rows are completions, each behind its prompt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from heddle.attention.arrays import Array
from heddle.data.packing import NO_TARGET
from heddle.options import GRPO_LOSSES, RATIO_LEVELS, SCALE_REWARDS, GRPOOptions

from .logits import log_probabilities
from .parallel import Layout
from .train import Objective

STD_EPSILON = 1e-4  #: keeps the advantages of a group finite whose rewards are all but equal


class RolloutBatch(NamedTuple):
    """Completions behind their prompts, a row each, with what the loss needs to know of them.

    A row's targets are its completion's tokens, the one that ends it included; prompts, padding and whatever is masked
    have ``NO_TARGET``. What isn't needed is None.
    """

    tokens: Int[Array, "*steps rows row_len"]
    segment_ids: Int[Array, "*steps rows row_len"]
    positions: Int[Array, "*steps rows row_len"]
    targets: Int[Array, "*steps rows row_len"]
    advantages: Float[Array, "*steps rows row_len"]  #: of the row's completion, at each place
    weights: Float[Array, "*steps rows row_len"]  #: :func:`token_weights` times all targets' number
    old: Float[Array, "*steps rows row_len"] | None = None  #: log π_old; None: this is the rollout's first update
    reference: Float[Array, "*steps rows row_len"] | None = None  #: log π_ref
    sampled: Float[Array, "*steps rows row_len"] | None = None  #: what the engine that sampled says of log π_old


# ---------------------------------------------------------------------- of the whole batch, on the host


def group_advantages(
    rewards: Float[np.ndarray, "groups completions"], scale: str = "group"
) -> tuple[Float[np.ndarray, "groups completions"], Bool[np.ndarray, " groups"]]:
    """How much better than its group each completion is, and which groups have no spread to learn from.

    ``A = (r - mean) / (std + 1e-4)`` (arXiv 2402.03300, section 4.1.2) over the group's rewards that aren't NaN, with
    the unbiased standard deviation. A NaN reward doesn't apply: its advantage is 0.

    Args:
        rewards: of each group's completions.
        scale: ``grpo.scale_rewards``: ``"group"`` divides by the group's std; ``"batch"`` by that of all rewards
            (arXiv 2508.08221); ``"none"`` doesn't divide (Dr. GRPO, arXiv 2503.20783).

    Returns:
        Float64 advantages; for each group whether its spread is zero (or it has fewer than two rewards), which makes
        all its advantages zero.

    Raises:
        ValueError: another ``scale``.
    """
    _check("scale", scale, SCALE_REWARDS)
    rewards = np.asarray(rewards, np.float64)
    valid = ~np.isnan(rewards)
    values, counts = np.where(valid, rewards, 0.0), valid.sum(axis=1, keepdims=True)
    mean = values.sum(axis=1, keepdims=True) / np.maximum(counts, 1)
    centred = np.where(valid, rewards - mean, 0.0)
    std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(counts - 1, 1))
    flat = np.isclose(std[:, 0], 0)
    advantages = np.where(flat[:, None], 0.0, centred)
    if scale == "group":
        advantages = advantages / (std + STD_EPSILON)
    elif scale == "batch" and valid.sum() > 1:
        advantages = advantages / (rewards[valid].std(ddof=1) + STD_EPSILON)
    return advantages, flat


def token_weights(
    mask: Bool[np.ndarray, "rows row_len"], loss_type: str, max_completion: int
) -> Float[np.ndarray, "rows row_len"]:
    """What each token's loss counts, so that the loss is ``sum_it w_it l_it`` over the whole batch of an update.

    By ``grpo.loss_type``, with ``n_i`` the completion's tokens in the mask and N all completions, masked ones too.
    Those that no reward applies to keep their place in N and the sum of ``n_i``: their advantage is 0, but their
    divergence from the reference counts.

    - ``"grpo"``: ``1 / (n_i N)``, the mean over completions of their tokens' means (arXiv 2402.03300, eq. 3);
    - ``"dapo"``: ``1 / sum n_i``, the mean over all tokens (DAPO, arXiv 2503.14476, section 3.3);
    - ``"bnpo"``: the same. In TRL it differs from ``"dapo"`` in that each part of a batch is divided by its own tokens;
      here every count is of the whole batch, over all its parts and devices;
    - ``"dr_grpo"``: ``1 / (N max_completion)``, whatever the lengths (Dr. GRPO, arXiv 2503.20783).

    Where nothing is in the mask the weights are 0, not NaN.
    """
    _check("loss_type", loss_type, GRPO_LOSSES)
    rows, lengths = len(mask), mask.sum(axis=1, keepdims=True)
    each: Any = {
        "grpo": 1 / (np.maximum(lengths, 1) * rows),
        "bnpo": 1 / max(lengths.sum(), 1),
        "dapo": 1 / max(lengths.sum(), 1),
        "dr_grpo": 1 / (rows * max_completion),
    }[loss_type]
    return np.where(mask, each, 0.0)


# ---------------------------------------------------------------------- of each token, on the device


def log_ratios(
    new: Float[Array, "rows row_len"],
    old: Float[Array, "rows row_len"] | None,
    mask: Bool[Array, "rows row_len"],
    level: str = "token",
) -> Float[Array, "rows _"]:
    """``log π - log π_old``, by ``grpo.ratio_level``.

    ``"token"``: of each token (arXiv 2402.03300, eq. 3). ``"sequence"``: the mean over the completion's tokens, one for
    all of them (GSPO, arXiv 2507.18071), ``(rows, 1)``.

    Args:
        new: log π.
        old: log π_old; None: π is π_old. The ratio is then 1, and its gradient still that of log π.
        mask: which tokens count.
        level: see above.
    """
    _check("level", level, RATIO_LEVELS)
    ratios = jnp.where(mask, new - (jax.lax.stop_gradient(new) if old is None else old), 0.0)
    if level == "token":
        return ratios
    return ratios.sum(axis=1, keepdims=True) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


def clipped_surrogate(
    ratio: Float[Array, "rows _"],
    advantages: Float[Array, "rows row_len"],
    low: float = 0.2,
    high: float = 0.2,
    delta: float | None = None,
) -> Float[Array, "rows row_len"]:
    """``-min(min(r, δ) A, clip(r, 1 - ε_low, 1 + ε_high) A)``.

    Args:
        ratio: r, of tokens or of sequences.
        advantages: A.
        low: ``grpo.clip_low`` (PPO, arXiv 1707.06347, eq. 7).
        high: ``grpo.clip_high``; .28 is DAPO's clip-higher (arXiv 2503.14476, section 3.1).
        delta: ``grpo.delta``, above ``1 + high``: bounds what a bad token's ratio can cost (INTELLECT-2, arXiv
            2505.07291); None: nothing does.
    """
    capped = ratio if delta is None else jnp.minimum(ratio, delta)
    return -jnp.minimum(capped * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)


def kl_to_reference(
    new: Float[Array, "rows row_len"],
    reference: Float[Array, "rows row_len"],
    ratio: Float[Array, "rows _"] | None = None,
) -> Float[Array, "rows row_len"]:
    """``KL(π || π_ref)``, estimated without bias and never negative (k3): ``exp(d) - d - 1`` with
    ``d = log π_ref - log π`` (arXiv 2402.03300, eq. 4), weighted by ``grpo.beta``.

    Tokens are samples of π_old, so it takes the ratio for the mean of this, and of its gradient, to be of π
    (``grpo.unbiased_kl``; DeepSeek-V3.2, arXiv 2512.02556, section 3.1). Also where the ratio is 1: the mean gradient
    of k3 alone, ``sum (1 - π_ref / π) ∇π``, is that of the other divergence, ``KL(π_ref || π)``.

    Args:
        new: log π.
        reference: log π_ref.
        ratio: r, with its gradient; None: 1, as the GRPO paper has it.
    """
    difference = reference - new
    estimate = jnp.exp(difference) - difference - 1
    return estimate if ratio is None else ratio * estimate


def importance_correction(
    old: Float[Array, "rows row_len"], sampled: Float[Array, "rows row_len"], cap: float
) -> Float[Array, "rows row_len"]:
    """``min(π_old / π_sampled, C)``, without gradient: truncated importance sampling for an engine that computes a
    little otherwise than the trainer (IMPALA's ρ, arXiv 1802.01561, of each token), with C ``grpo.importance_cap``."""
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(old - sampled), cap))


def grpo(options: GRPOOptions) -> Objective:
    """The objective of :class:`RolloutBatch`, for :class:`heddle.jax.grpo_trainer.GRPOTrainer`.

    Metrics, each a mean over tokens: ``entropy``; ``clip_low`` and ``clip_high``, how many were clipped from below and
    above, with ``ratio_level="sequence"`` as parts of sequences that were (TRL's count sequences); with a reference
    ``kl``; with a correction ``correction``, its mean.
    """

    def objective(model: Any, batch: RolloutBatch, rng: Array) -> tuple[Array, Array, dict[str, Array]]:
        new, entropy = completion_log_probabilities(model, batch, options.temperature)
        mask = batch.targets != NO_TARGET
        ratio = jnp.exp(log_ratios(new, batch.old, mask, options.ratio_level))
        losses = clipped_surrogate(ratio, batch.advantages, options.clip_low, options.clip_high, options.delta)
        too_low = (ratio < 1 - options.clip_low) & (batch.advantages < 0)
        too_high = (ratio > 1 + options.clip_high) & (batch.advantages > 0)
        measured = {"entropy": entropy, "clip_low": too_low, "clip_high": too_high}
        if batch.sampled is not None and options.importance_cap is not None:
            old = new if batch.old is None else batch.old
            measured["correction"] = importance_correction(old, batch.sampled, options.importance_cap)
            losses = losses * measured["correction"]
        if batch.reference is not None:
            measured["kl"] = kl_to_reference(new, batch.reference, ratio if options.unbiased_kl else None)
            losses = losses + options.beta * measured["kl"]
        total = jnp.where(mask, batch.weights * losses, 0.0).sum()
        sums = {name: jnp.where(mask, value, 0.0).sum() for name, value in measured.items()}
        return total, mask.sum(dtype=jnp.int32), sums

    return objective


def completion_log_probabilities(model: Any, batch: RolloutBatch, temperature: float) -> tuple[Array, Array]:
    """``log π`` of each target and the entropy at its place, 0 where there is none; both ``(rows, row_len)``."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.segment_ids)
    layout = Layout(getattr(model, "mesh", None))
    measured = log_probabilities(
        model.head, hidden, batch.targets, temperature=temperature, entropy=True, layout=layout
    )
    return measured.targets, measured.entropy  # type: ignore[return-value]  # it was asked for


def _check(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
