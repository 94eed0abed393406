"""The optimiser and its learning rate, out of the options of a run."""

from __future__ import annotations

from typing import Any

import jax
import optax

from heddle.config import TrainingOptions


def make_schedule(options: TrainingOptions) -> optax.Schedule:
    """The learning rate of each step, counted from 0: a linear warm-up, then what ``options.schedule`` says.

    ``cosine`` falls to ``final_share`` of the rate along half a cosine (arXiv 1608.03983, eq. 5, without restarts);
    ``wsd`` stays, and falls linearly to it over the last ``decay_share`` of all steps (arXiv 2404.06395, section 4).
    """
    peak, warm, rest = options.learning_rate, options.warmup_steps, max(0, options.max_steps - options.warmup_steps)
    final = options.final_share * peak
    pieces, boundaries = [], []
    if warm:
        pieces, boundaries = [optax.linear_schedule(peak / warm, peak, max(1, warm - 1))], [warm]
    if options.schedule == "cosine" and rest:
        pieces.append(optax.cosine_decay_schedule(peak, rest, options.final_share))
    else:
        pieces.append(optax.constant_schedule(peak))
    decay = min(rest, round(options.decay_share * options.max_steps))
    if options.schedule == "wsd" and decay:
        pieces.append(optax.linear_schedule(peak, final, decay))
        boundaries = [*boundaries, options.max_steps - decay]
    return optax.join_schedules(pieces, boundaries)


def make_optimizer(options: TrainingOptions) -> optax.GradientTransformation:
    """Clipping and the optimiser at a learning rate of 1; weight matrices decay, norms and biases don't."""

    def decays(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    decay: dict[str, Any] = {"weight_decay": options.weight_decay, "mask": decays}
    if options.optimizer == "lion":
        inner = optax.lion(1.0, options.beta1, options.beta2, **decay)
    else:
        inner = optax.adamw(1.0, options.beta1, options.beta2, options.epsilon, **decay)
    clip = optax.identity() if options.clip is None else optax.clip_by_global_norm(options.clip)
    return optax.chain(clip, inner)
