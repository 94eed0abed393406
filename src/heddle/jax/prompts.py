"""What generation is asked, checked: prompts as ids, and the numbers that go with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from heddle.data.tokenizers import Tokenizer

from .model import LanguageModel

PADDING = -1  #: stands for no token where tokens are read

#: Text or ids; or for each replica one of them.
Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]


def encode_prompts(model: LanguageModel, tokenizer: Tokenizer, prompts: Any) -> list[np.ndarray]:
    """Ids ``(length,)``, or ``(replicas, length)`` with :data:`PADDING` before the shorter ones."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer must have at most the model's vocab_size {model.config.vocab_size}, got {tokenizer.vocab_size}"
        )
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    replicas, encoded = model.config.parscale_n, []
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        if isinstance(prompt, str) or not len(prompt) or not isinstance(prompt[0], (str, Sequence, np.ndarray)):
            encoded.append(encode_prompt(model, tokenizer, name, prompt))
            continue
        if replicas == 1 or len(prompt) != replicas:
            raise ValueError(
                f"{name} must be text, ids or one of them for each replica ({replicas}), got {len(prompt)} of them"
            )
        each = [encode_prompt(model, tokenizer, f"{name}[{r}]", prompt[r]) for r in range(replicas)]
        longest = max(map(len, each))
        encoded.append(np.stack([np.pad(ids, (longest - len(ids), 0), constant_values=PADDING) for ids in each]))
    return encoded


def encode_prompt(model: LanguageModel, tokenizer: Tokenizer, name: str, prompt: Any) -> np.ndarray:
    """One prompt's ids.

    Raises:
        ValueError: it is empty, fills the model's context, or holds what isn't an id. It is called ``name``.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    context, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    if not ids:
        raise ValueError(f"{name} must hold at least one token, got {prompt!r}")
    if len(ids) >= context:
        raise ValueError(f"{name} must be shorter than the model's context of {context} tokens, got {len(ids)}")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise ValueError(f"{name} must hold ids in [0, {vocab_size}), got {wrong}")
    return np.asarray(ids, np.int32)


def check_max_tokens(max_tokens: Any) -> None:
    """
    Raises:
        ValueError: not a number of tokens.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens must be an integer of at least 1, got {max_tokens!r}")


def check_logprobs(n: int | None, most: int, temperature: float = 1.0) -> None:
    """
    Raises:
        ValueError: not a number of tokens up to ``most``; a temperature that isn't positive.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"logprobs_temperature must be a positive number, got {temperature}")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= most):
        raise ValueError(f"logprobs must be None or an integer in [0, {most}], got {n!r}")


def check_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = [seed] * count if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed must be one integer or one for each of {count} prompts, got {len(seeds)}")
    if not all(isinstance(s, int) and 0 <= s < 2**32 for s in seeds):
        raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
    return seeds
