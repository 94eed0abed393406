"""Guesses of the next tokens from the text itself, which one forward over all of them then checks.

Prompt lookup is speculative decoding (arXiv 2211.17192) whose draft comes from no model: where the last few tokens have
stood before, what followed them there is tried. Summaries, answers about a document and code repeat their prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Int

from heddle.attention.arrays import Array


@dataclass(frozen=True)
class PromptLookup:
    """Drafts of up to ``num_tokens`` tokens: what followed the last place where the longest end of the text stands.

    Exact: a token is always the one that the sampler chooses from the model's logits, with the random numbers it has
    without a draft; a draft's tokens stand as long as they are those. So texts are the same, but for what another
    order of rounding does between tokens that are all but level.

    Args:
        num_tokens: of a draft, at most. One forward reads a token more; each costs little as long as a step is bound by
            reading the weights.
        max_ngram, min_ngram: how many tokens at the end must have stood before: the more, the better, from so many on.

    Raises:
        ValueError: a number out of range.
    """

    num_tokens: int = 7
    max_ngram: int = 4
    min_ngram: int = 2

    def __post_init__(self):
        if not 1 <= self.num_tokens <= 64:
            raise ValueError(f"num_tokens must be in [1, 64], got {self.num_tokens}")
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(f"min_ngram must be in [1, max_ngram {self.max_ngram}], got {self.min_ngram}")

    def propose(
        self, text: Int[Array, "batch room"], length: Int[Array, " batch"]
    ) -> tuple[Int[Array, "batch num_tokens"], Int[Array, " batch"]]:
        """Drafts after the first ``length`` tokens of ``text``, and how many tokens of each are meant."""
        (_, room), index = text.shape, jnp.arange(text.shape[1], dtype=jnp.int32)
        # How many tokens before each place are those at the end, counted from the last on.
        alike, common = jnp.ones(text.shape, bool), jnp.zeros(text.shape, jnp.int32)
        for back in range(1, self.max_ngram + 1):
            last = jnp.take_along_axis(text, jnp.maximum(length - back, 0)[:, None], axis=1)
            before = jnp.pad(text, ((0, 0), (back, 0)), constant_values=-1)[:, :room]
            alike &= (before == last) & (index >= back) & (length >= back)[:, None]
            common += alike
        score = jnp.where((index < length[:, None]) & (common >= self.min_ngram), common * room + index, -1)
        place, found = jnp.argmax(score, axis=1), jnp.max(score, axis=1) >= 0
        at = place[:, None] + jnp.arange(self.num_tokens, dtype=jnp.int32)
        draft = jnp.take_along_axis(text, jnp.minimum(at, room - 1), axis=1)
        return draft, jnp.where(found, jnp.minimum(length - place, self.num_tokens), 0).astype(jnp.int32)
