"""Supervised fine-tuning: the loss of the tokens to be answered, with noisy embeddings and smoothed labels if asked."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from heddle.attention.arrays import Array
from heddle.attention.mask import PADDING_SEGMENT_ID
from heddle.data.packing import Batch

from .logits import cross_entropy
from .parallel import Layout
from .train import Objective


def sft(*, neftune_alpha: float = 0.0, label_smoothing: float = 0.0) -> Objective:
    """The objective of examples packed with :mod:`heddle.data.examples`, for :class:`heddle.jax.train.Trainer`.

    The sum of the losses of all targets, so that a token weighs the same whatever example it is of. Examples see
    themselves alone. Without noise and smoothing this is :func:`heddle.jax.lm.lm`, which is also what to evaluate by.

    Args:
        neftune_alpha: α of the noise on the embeddings; 0: none. See :func:`neftune_noise`.
        label_smoothing: ε; 0: none. See :func:`heddle.jax.logits.cross_entropy`.

    Raises:
        ValueError: a negative α, an ε that isn't at least 0 and below 1.
    """
    if not neftune_alpha >= 0:
        raise ValueError(f"neftune_alpha must not be negative, got {neftune_alpha}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")

    def objective(model: Any, batch: Batch, rng: Array) -> tuple[Array, Array, dict[str, Array]]:
        noise = {}
        if neftune_alpha:
            noise["noise"] = neftune_noise(rng, batch, model.config.hidden_size, neftune_alpha)
        hidden = model.hidden(batch.tokens, batch.positions, batch.segment_ids, **noise)
        total, count = cross_entropy(
            model.head, hidden, batch.targets, smoothing=label_smoothing, layout=Layout(getattr(model, "mesh", None))
        )
        return total, count, {}

    return objective


def neftune_noise(rng: Array, batch: Batch, width: int, alpha: float) -> Float[Array, "rows row_len width"]:
    """Noise for the embeddings, uniform in ``±α / sqrt(L d)`` (NEFTune, arXiv 2310.05914, algorithm 1).

    L is the length of the token's own example, so that packing doesn't change the noise's size; d is ``width``. ``rng``
    holds a key for each row.
    """
    row_len = batch.tokens.shape[1]
    padding = batch.segment_ids == PADDING_SEGMENT_ID
    ids = jnp.where(padding, row_len, batch.segment_ids)
    lengths = jax.vmap(lambda row: jnp.bincount(row, length=row_len + 1)[row])(ids)
    scale = jnp.where(padding, 0.0, alpha / jnp.sqrt(lengths * width))
    noise = jax.vmap(lambda key: jax.random.uniform(key, (row_len, width), minval=-1.0, maxval=1.0))(rng)
    return scale[..., None] * noise
