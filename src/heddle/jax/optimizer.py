"""The optimiser and its learning rate, out of the options of a run."""

from __future__ import annotations

from typing import Any

import jax
import optax
import optax.contrib

from heddle.options import TrainingOptions

from .parallel import dotted

MUON_RMS = 0.2  #: the root mean square of muon's updates, as adamw's usually is (arXiv 2502.16982, section 2.2)
_EMBEDDINGS = {"embedding", "head"}


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
    """Clipping and the optimiser at a learning rate of 1; weight matrices decay, norms and biases don't.

    ``muon`` (arXiv 2502.16982) orthogonalises the momentum of the layers' matrices, scaled so that adamw's learning
    rates suit it; embeddings, the head and all that isn't a matrix take adamw. ``adafactor`` (arXiv 1804.04235) keeps
    factored second moments and no first ones, and scales a parameter's update by the parameter's size.
    """

    def decays(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    adamw = optax.adamw(
        1.0, options.beta1, options.beta2, options.epsilon, weight_decay=options.weight_decay, mask=decays
    )
    inners = {
        "adamw": lambda: adamw,
        "lion": lambda: optax.lion(1.0, options.beta1, options.beta2, weight_decay=options.weight_decay, mask=decays),
        "muon": lambda: optax.partition({"muon": _muon(options), "adamw": adamw}, _muon_or_adamw),
        "adafactor": lambda: optax.adafactor(1.0, weight_decay_rate=options.weight_decay, weight_decay_mask=decays),
    }
    clip = optax.identity() if options.clip is None else optax.clip_by_global_norm(options.clip)
    return optax.chain(clip, inners[options.optimizer]())


def _muon(options: TrainingOptions) -> optax.GradientTransformation:
    return optax.contrib.muon(1.0, eps=options.epsilon, weight_decay=options.weight_decay, consistent_rms=MUON_RMS)


def _muon_or_adamw(params: Any) -> Any:
    """Which of the two each parameter takes."""

    def one(path, parameter):
        matrix = parameter.ndim == 2 and not _EMBEDDINGS & set(dotted(path).split("."))
        return "muon" if matrix else "adamw"

    return jax.tree_util.tree_map_with_path(one, params)
