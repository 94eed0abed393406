"""Text from a model: prompts read once, then one token at a time under one compiled loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from heddle.attention.arrays import Array
from heddle.data.tokenizers import Tokenizer

from .answer import Answer, Piece, TokenLogprobs, stop_strings
from .cache import Cache
from .cache import cache_dtype as check_cache_dtype
from .decoding import STEPS, State, begin, decode, prefill
from .model import LanguageModel
from .prompts import PADDING, Prompt, check_logprobs, check_max_tokens, check_seeds, encode_prompts
from .sampling import Greedy, Logprobs, Sampler, history, needs_history
from .speculation import PromptLookup

#: Prompts are read in pieces of these lengths, so that three compilations serve every prompt.
PREFILL = (32, 128, 512)
STEPS_WITH_STOP = 8  #: of one call of the compiled loop, where there are stop strings, which the host looks for
LEAST_ROOM = 256  #: tokens that a cache has room for, at least: lengths are powers of two, as each compiles anew


@dataclass(frozen=True)
class Completion:
    """How a prompt went on.

    ``tokens`` are all that were sampled, with the stop id that ended them if one did; ``text`` ends before a stop id
    or stop string. ``finish_reason``: ``"stop"``, or ``"length"`` at ``max_tokens`` or the end of the context.
    ``logprobs``, where they were asked for, holds those of each token.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: str | Sequence[Prompt],
    *,
    max_tokens: int = 128,
    sampler: Sampler | None = None,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    logprobs: int | None = None,
    logprobs_temperature: float = 1.0,
    speculate: PromptLookup | None = None,
    cache_dtype: Any = None,
) -> list[Completion]:
    """Continue each prompt, all in one batch; each as it would be continued alone.

    Args:
        model: any.
        tokenizer: of the model.
        prompts: texts, or lists of token ids. Of a ParScale model also lists of as many texts (or lists of ids) as it
            has replicas, one for each: they are aligned at their ends and continued as one.
        max_tokens: how many tokens to sample, at most; the model's context is a bound too.
        sampler: how a token is chosen; None: the likeliest. See :func:`heddle.jax.sampling.sampler`.
        seed: for random samplers, one for all prompts or one for each. A prompt and its seed give the same text in
            whatever batch.
        stop: strings that end a text, which are left out of it.
        stop_ids: token ids that end a text; None: the tokenizer's and the model's.
        logprobs: tell each token's log-probability, and those of so many likeliest ones.
        logprobs_temperature: that logits are divided by before; the sampler's own tells what it samples from, but for
            what it leaves out (top-k, top-p, min-p).
        speculate: guess tokens ahead, as :class:`heddle.jax.PromptLookup` says; the text stays the same.
        cache_dtype: what keys and values are kept in: float32, bfloat16, float16 or int8, as of
            :meth:`heddle.jax.KVCache.empty`; None: the model's.

    Raises:
        ValueError: no prompts, an empty one, or one that fills the model's context; arguments out of range; speculation
            with a model whose cache can't take guesses back (sliding windows, dilated attention), or whose rotation
            goes by the length of what is read (longrope).
    """
    run = Generation(
        model, tokenizer, prompts, max_tokens, sampler, seed, stop, stop_ids, None, logprobs, speculate,
        logprobs_temperature, cache_dtype,
    )  # fmt: skip
    told: list[list[Any]] = [[] for _ in run.prompts]
    while True:
        for row, pieces in zip(told, run.fresh, strict=True):
            row += (piece.logprobs for piece in pieces)
        if run.finished:
            break
        run.advance(STEPS_WITH_STOP if run.stop else STEPS)
    return [
        Completion(
            answer.text,
            tuple(answer.tokens),
            answer.finish_reason or "length",
            prompt.shape[-1],
            None if logprobs is None else tuple(row),
        )
        for answer, prompt, row in zip(run.answers, run.prompts, told, strict=True)
    ]


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = 128,
    sampler: Sampler | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    past: Past | None = None,
    logprobs: int | None = None,
    logprobs_temperature: float = 1.0,
    speculate: PromptLookup | None = None,
    cache_dtype: Any = None,
) -> Iterator[Piece]:
    """Continue one prompt, token by token; the texts add up to :func:`generate`'s, in whole characters.

    ``past`` remembers a conversation: of a prompt that begins as the last one and its answer, only the rest is read.
    """
    # Not a generator itself, so that wrong arguments are told at the call.
    run = Generation(
        model, tokenizer, [prompt], max_tokens, sampler, seed, stop, stop_ids, past, logprobs, speculate,
        logprobs_temperature, cache_dtype,
    )  # fmt: skip
    return _pieces(run)


def _pieces(run: Generation) -> Iterator[Piece]:
    while True:
        yield from run.fresh[0]
        if run.finished:
            return
        run.advance(1)


class Past:
    """What the cache of a conversation holds.

    Args:
        max_len: room in tokens to begin with; it doubles as needed.
        cache_dtype: as of :func:`generate`.
    """

    def __init__(self, max_len: int = LEAST_ROOM, cache_dtype: Any = None):
        self.max_len, self.cache_dtype = max_len, cache_dtype
        self.tokens: list[int] = []
        self.cache: Cache | None = None
        self._stretched = False

    def resume(self, model: LanguageModel, prompt: list[int], room: int) -> tuple[Cache, int]:
        """A cache with ``room`` tokens of room, and how many of the prompt's tokens it holds already."""
        cache, self.cache = self.cache, None  # until it comes back, since a step gives its buffers away
        self.max_len = _room(max(room, self.max_len), model)
        # Of a prompt on the other side of the pretrained length longrope turns all keys by the other factors.
        rotary, before = model.config.rotary, self._stretched
        self._stretched = rotary.by_length and len(prompt) > (rotary.original_max_position or 0)
        if cache is None or self._stretched != before:
            return model.empty_cache(1, self.max_len, self.cache_dtype), 0
        held = self.tokens[: int(cache.lengths[0])]
        shared = next((i for i, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b), None)
        # The last token is read again in any case: its hidden state isn't kept.
        shared = min(len(held), len(prompt) - 1) if shared is None else shared
        cache = cache.truncate(np.array([shared], np.int32))
        if cache is None:  # what the rest of the prompt sees is lost: read it all again
            return model.empty_cache(1, self.max_len, self.cache_dtype), 0
        return (cache.grow(self.max_len) if cache.max_len < self.max_len else cache), shared


class Generation:
    """A batch of prompts under way: read when it is made, then a number of tokens further with each call.

    Arguments as :func:`generate`'s. ``answers`` holds all there is, ``fresh`` each sequence's pieces of the last call.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompts: str | Sequence[Prompt],
        max_tokens: int = 128,
        sampler: Sampler | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        past: Past | None = None,
        logprobs: int | None = None,
        speculate: PromptLookup | None = None,
        logprobs_temperature: float = 1.0,
        cache_dtype: Any = None,
    ):
        config = model.config
        if cache_dtype is not None:
            check_cache_dtype("cache_dtype", cache_dtype)
            if past is not None:
                raise ValueError(f"cache_dtype must be None where there is a past, which has one; got {cache_dtype}")
        self.prompts = encode_prompts(model, tokenizer, prompts)
        self.stop = stop_strings(stop)
        check_max_tokens(max_tokens)
        check_logprobs(logprobs, config.vocab_size, logprobs_temperature)
        seeds = check_seeds(seed, len(self.prompts))
        ends = (*tokenizer.stop_ids, *config.eos_ids) if stop_ids is None else tuple(stop_ids)
        self.sampler = Greedy() if sampler is None else sampler
        self.past = past
        self._logprobs, self._temperature, self._speculate = logprobs, np.float32(logprobs_temperature), speculate
        self._leaves, self._structure = jax.tree.flatten(model)
        self._stop_ids = jnp.asarray(np.pad(np.asarray(ends, np.int32), (0, -len(ends) % 8 or 8), constant_values=-1))

        if past is not None and self.prompts[0].ndim == 2:
            raise ValueError("prompt must be one for all replicas where there is a past, got one for each")
        lengths = [prompt.shape[-1] for prompt in self.prompts]
        limits = [min(max_tokens, config.max_position_embeddings - length) for length in lengths]
        self.answers = [Answer(tokenizer.decoder(), self.stop, frozenset(ends), limit) for limit in limits]
        self.fresh: list[list[Piece]] = []
        room = max(length + limit for length, limit in zip(lengths, limits, strict=True))
        if past is not None:
            cache, held = past.resume(model, self.prompts[0].tolist(), room)
        else:
            cache, held = model.empty_cache(len(self.prompts), _room(room, model), cache_dtype), 0
        text = None if speculate is None else jnp.asarray(self._text(model, cache))
        said = None
        if needs_history(self.sampler):
            prompts_alone = [prompt[prompt != PADDING] for prompt in self.prompts]
            said = jnp.asarray(history(prompts_alone, [()] * len(prompts_alone), config.vocab_size))
        last, cache = self._read(model, cache, held)
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        token, count = (jnp.zeros(len(self.prompts), jnp.int32) for _ in range(2))  # a buffer each, to be donated
        done = jnp.zeros_like(token, bool)
        state = State(cache, token, count, jnp.asarray(limits, jnp.int32), done, keys, said, text)
        arguments = self._leaves, last, state, self.sampler, self._stop_ids, logprobs, self._temperature
        self._take(begin(self._structure, *arguments))

    @property
    def finished(self) -> bool:
        return all(answer.finish_reason for answer in self.answers)

    def advance(self, steps: int = STEPS) -> None:
        """Up to ``steps`` tokens for each sequence that isn't finished; with speculation some more."""
        steps = min(steps, STEPS)
        arguments = self._leaves, self._state, self.sampler, self._stop_ids, steps, self._logprobs, self._speculate
        self._take(decode(self._structure, *arguments, self._temperature))

    def _text(self, model: LanguageModel, cache: Cache) -> np.ndarray:
        """The prompts ``(batch, room)``, which drafts are looked up in; of prompts for each replica the first's."""
        if not cache.keeps_all:
            raise ValueError("speculate must be None where the cache loses keys (sliding windows, dilated attention)")
        if model.config.rotary.by_length:
            raise ValueError("speculate must be None where RoPE goes by the text's length (longrope)")
        text = np.full((len(self.prompts), cache.max_len + 1), PADDING, np.int32)
        for row, prompt in zip(text, self.prompts, strict=True):
            row[: prompt.shape[-1]] = prompt if prompt.ndim == 1 else prompt[0]
        return text

    def _read(self, model: LanguageModel, cache: Cache, held: int) -> tuple[Array, Cache]:
        """Fill the cache with the prompts past the ``held`` first tokens; each one's last hidden state."""
        lengths = [prompt.shape[-1] - held for prompt in self.prompts]
        apart = any(prompt.ndim == 2 for prompt in self.prompts)
        rows = (len(lengths), model.config.parscale_n) if apart else (len(lengths),)
        rest = np.full((*rows, max(lengths)), PADDING, np.int32)
        for row, prompt, length in zip(rest, self.prompts, lengths, strict=True):
            row[..., :length] = prompt[..., held:]
        last = jnp.zeros((len(lengths), model.config.hidden_size), model.dtype)
        whole = model.config.rotary.by_length
        begin = 0
        for size in [_power_of_two(max(lengths))] if whole else _pieces_of(max(lengths)):
            tokens = np.full((*rows, size), PADDING, np.int32)
            piece = rest[..., begin : begin + size]
            tokens[..., : piece.shape[-1]] = piece
            last, cache = prefill(self._structure, self._leaves, cache, last, tokens)
            begin += size
        return last, cache

    def _take(self, result: tuple[State, Array, Logprobs | None]) -> None:
        self._state, tokens, told = result
        if self.past is not None:
            self.past.cache = self._state.cache
        self.fresh = []
        told = None if told is None else Logprobs(*map(np.asarray, told))
        for row, (answer, chosen) in enumerate(zip(self.answers, np.asarray(tokens).tolist(), strict=True)):
            self.fresh.append([])
            for step, token in enumerate(chosen):
                if token >= 0 and not answer.finish_reason:
                    self.fresh[-1].append(answer.add(token, told and token_logprobs(told, (row, step))))
        if self.past is not None:
            self.past.tokens = self.prompts[0].tolist() + self.answers[0].tokens
        if self.stop:  # of which the device knows nothing
            done = jnp.asarray([bool(answer.finish_reason) for answer in self.answers])
            self._state = replace(self._state, done=done)


def token_logprobs(told: Logprobs, at: Any) -> TokenLogprobs:
    """Those of one token of a step's arrays, of which NumPy's suit."""
    return TokenLogprobs(float(told.chosen[at]), tuple(zip(told.ids[at].tolist(), told.top[at].tolist(), strict=True)))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _room(tokens: int, model: LanguageModel) -> int:
    """The length of a cache for so many tokens."""
    return min(_power_of_two(max(tokens, LEAST_ROOM)), model.config.max_position_embeddings)


def _pieces_of(length: int) -> list[int]:
    """Lengths out of PREFILL that cover ``length``: one that it fills by more than half, else the largest it fills."""
    pieces = []
    while length > 0:
        fitting = next((size for size in PREFILL if length <= size < 2 * length), None)
        size = fitting or max((size for size in PREFILL if size <= length), default=PREFILL[0])
        pieces.append(size)
        length -= size
    return pieces
