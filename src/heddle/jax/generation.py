"""Text from a model: prompts read once, then one token at a time under one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from heddle.attention import PADDING_SEGMENT_ID
from heddle.attention.arrays import Array
from heddle.data.tokenizers import Tokenizer

from .answer import Answer, Piece, TokenLogprobs, stop_strings
from .cache import Cache
from .model import LanguageModel
from .sampling import Greedy, Logprobs, Sampler, history, logprobs, needs_history, remember

#: Prompts are read in pieces of these lengths, so that three compilations serve every prompt.
PREFILL = (32, 128, 512)
#: Steps of one call of the compiled loop, at most; with stop strings, which the host looks for, fewer.
STEPS, STEPS_WITH_STOP = 32, 8
LEAST_ROOM = 256  #: tokens that a cache has room for, at least: lengths are powers of two, as each compiles anew
PADDING = -1  #: stands for no token where tokens are read

#: Text or ids; or for each replica one of them.
Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]


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
) -> list[Completion]:
    """Continue each prompt, all in one batch; each as it would be continued alone.

    Args:
        model: whose weights' dtype the cache takes.
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

    Raises:
        ValueError: no prompts, an empty one, or one that fills the model's context; arguments out of range.
    """
    run = Generation(model, tokenizer, prompts, max_tokens, sampler, seed, stop, stop_ids, logprobs=logprobs)
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
) -> Iterator[Piece]:
    """Continue one prompt, token by token; the texts add up to :func:`generate`'s, in whole characters.

    ``past`` remembers a conversation: of a prompt that begins as the last one and its answer, only the rest is read.
    """
    # Not a generator itself, so that wrong arguments are told at the call.
    return _pieces(Generation(model, tokenizer, [prompt], max_tokens, sampler, seed, stop, stop_ids, past, logprobs))


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
    """

    def __init__(self, max_len: int = LEAST_ROOM):
        self.max_len = max_len
        self.tokens: list[int] = []
        self.cache: Cache | None = None

    def resume(self, model: LanguageModel, prompt: list[int], room: int) -> tuple[Cache, int]:
        """A cache with ``room`` tokens of room, and how many of the prompt's tokens it holds already."""
        cache, self.cache = self.cache, None  # until it comes back, since a step gives its buffers away
        self.max_len = _room(max(room, self.max_len), model)
        if cache is None:
            return model.empty_cache(1, self.max_len), 0
        held = self.tokens[: int(cache.lengths[0])]
        shared = next((i for i, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b), None)
        # The last token is read again in any case: its hidden state isn't kept.
        shared = min(len(held), len(prompt) - 1) if shared is None else shared
        cache = cache.truncate(np.array([shared], np.int32))
        if cache is None:  # what the rest of the prompt sees is lost: read it all again
            return model.empty_cache(1, self.max_len), 0
        return (cache.grow(self.max_len) if cache.max_len < self.max_len else cache), shared


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """What the compiled loop carries."""

    cache: Cache
    token: Int[Array, " batch"]  # the last one chosen, which the cache doesn't hold yet
    count: Int[Array, " batch"]  # how many were chosen
    limit: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    keys: Array
    history: Int[Array, "batch vocab"] | None


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
    ):
        config = model.config
        self.prompts = _encode(model, tokenizer, prompts)
        self.stop = stop_strings(stop)
        check_max_tokens(max_tokens)
        check_logprobs(logprobs, config.vocab_size)
        seeds = _seeds(seed, len(self.prompts))
        ends = (*tokenizer.stop_ids, *config.eos_ids) if stop_ids is None else tuple(stop_ids)
        self.sampler = Greedy() if sampler is None else sampler
        self.past = past
        self._logprobs = logprobs
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
            cache, held = model.empty_cache(len(self.prompts), _room(room, model)), 0

        said = None
        if needs_history(self.sampler):
            prompts_alone = [prompt[prompt != PADDING] for prompt in self.prompts]
            said = jnp.asarray(history(prompts_alone, [()] * len(prompts_alone), config.vocab_size))
        last, cache = self._read(model, cache, held)
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        token, count = (jnp.zeros(len(self.prompts), jnp.int32) for _ in range(2))  # a buffer each, to be donated
        state = _State(cache, token, count, jnp.asarray(limits, jnp.int32), jnp.zeros_like(token, bool), keys, said)
        first = _begin(self._structure, self._leaves, last, state, self.sampler, self._stop_ids, logprobs)
        self._take(first, steps=1)

    @property
    def finished(self) -> bool:
        return all(answer.finish_reason for answer in self.answers)

    def advance(self, steps: int = STEPS) -> None:
        """Up to ``steps`` tokens for each sequence that isn't finished."""
        steps = min(steps, STEPS)
        arguments = self._leaves, self._state, self.sampler, self._stop_ids, steps, self._logprobs
        self._take(_decode(self._structure, *arguments), steps)

    def _read(self, model: LanguageModel, cache: Cache, held: int) -> tuple[Array, Cache]:
        """Fill the cache with the prompts past the ``held`` first tokens; each one's last hidden state."""
        lengths = [prompt.shape[-1] - held for prompt in self.prompts]
        apart = any(prompt.ndim == 2 for prompt in self.prompts)
        rows = (len(lengths), model.config.parscale_n) if apart else (len(lengths),)
        rest = np.full((*rows, max(lengths)), PADDING, np.int32)
        for row, prompt, length in zip(rest, self.prompts, lengths, strict=True):
            row[..., :length] = prompt[..., held:]
        last = jnp.zeros((len(lengths), model.config.hidden_size), model.dtype)
        whole = model.config.rotary.rule in ("dynamic", "longrope")  # these rotate by the length of what is read
        begin = 0
        for size in [_power_of_two(max(lengths))] if whole else _pieces_of(max(lengths)):
            tokens = np.full((*rows, size), PADDING, np.int32)
            piece = rest[..., begin : begin + size]
            tokens[..., : piece.shape[-1]] = piece
            last, cache = _prefill(self._structure, self._leaves, cache, last, tokens)
            begin += size
        return last, cache

    def _take(self, result: tuple[_State, Array, Logprobs | None], steps: int) -> None:
        self._state, tokens, told = result
        if self.past is not None:
            self.past.cache = self._state.cache
        self.fresh = []
        told = None if told is None else Logprobs(*map(np.asarray, told))
        for row, (answer, chosen) in enumerate(zip(self.answers, np.asarray(tokens)[:, :steps].tolist(), strict=True)):
            self.fresh.append([])
            for step, token in enumerate(chosen):
                if token >= 0 and not answer.finish_reason:
                    self.fresh[-1].append(answer.add(token, told and token_logprobs(told, (row, step))))
        if self.past is not None:
            self.past.tokens = self.prompts[0].tolist() + self.answers[0].tokens
        if self.stop:  # of which the device knows nothing
            done = jnp.asarray([bool(answer.finish_reason) for answer in self.answers])
            self._state = replace(self._state, done=done)


# ---------------------------------------------------------------------- compiled


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(structure: Any, leaves: list, cache: Cache, last_bd: Array, tokens: Array):
    """Read tokens ``(batch, seq)``, or ``(batch, replicas, seq)``, into the cache."""
    model: LanguageModel = jax.tree.unflatten(structure, leaves)
    real = tokens != PADDING
    segment_ids = jnp.where(real, 0, PADDING_SEGMENT_ID)
    hidden_btd, cache = model.hidden(jnp.maximum(tokens, 0), segment_ids=segment_ids, cache=cache)
    counts = (real if real.ndim == 2 else real.any(axis=1)).sum(axis=1)
    final_bd = hidden_btd[jnp.arange(tokens.shape[0]), jnp.maximum(counts - 1, 0)]
    return jnp.where((counts > 0)[:, None], final_bd, last_bd), cache


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=3)
def _begin(
    structure: Any,
    leaves: list,
    last_bd: Array,
    state: _State,
    sampler: Sampler,
    stop_ids: Array,
    n: int | None,
):
    """The first token of each answer."""
    state, told = _choose(jax.tree.unflatten(structure, leaves), last_bd, state, sampler, stop_ids, n)
    return state, state.token[:, None], jax.tree.map(lambda a: a[:, None], told)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
def _decode(
    structure: Any,
    leaves: list,
    state: _State,
    sampler: Sampler,
    stop_ids: Array,
    steps: Array,
    n: int | None,
):
    """Up to ``steps`` more tokens: the tokens ``(batch, STEPS)``, -1 where a sequence was done already, and with ``n``
    their log-probabilities."""
    model: LanguageModel = jax.tree.unflatten(structure, leaves)

    def more(carry):
        step, state, _, _ = carry
        return (step < steps) & ~jnp.all(state.done)

    def body(carry):
        step, state, tokens, told = carry
        done = state.done
        segment_ids = jnp.where(done, PADDING_SEGMENT_ID, 0)[:, None]
        hidden_b1d, cache = model.hidden(state.token[:, None], segment_ids=segment_ids, cache=state.cache)
        state, fresh = _choose(model, hidden_b1d[:, 0], replace(state, cache=cache), sampler, stop_ids, n)
        tokens = tokens.at[:, step].set(jnp.where(done, -1, state.token))
        return step + 1, state, tokens, jax.tree.map(lambda all_, new: all_.at[:, step].set(new), told, fresh)

    batch = state.token.shape[0]
    tokens = jnp.full((batch, STEPS), -1, jnp.int32)
    told = None
    if n is not None:
        told = Logprobs(
            jnp.zeros((batch, STEPS)), jnp.zeros((batch, STEPS, n)), jnp.zeros((batch, STEPS, n), jnp.int32)
        )
    _, state, tokens, told = jax.lax.while_loop(more, body, (jnp.int32(0), state, tokens, told))
    return state, tokens, told


def _choose(
    model: LanguageModel,
    hidden_bd: Float[Array, "batch hidden"],
    state: _State,
    sampler: Sampler,
    stop_ids: Array,
    n: int | None,
) -> tuple[_State, Logprobs | None]:
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
    logits = model.head(hidden_bd)
    token = sampler(logits, keys, state.history)
    told = None if n is None else logprobs(logits, token, n)
    token = jnp.where(state.done, state.token, token)
    count = jnp.where(state.done, state.count, state.count + 1)
    said = None if state.history is None else remember(state.history, token)
    done = state.done | (count >= state.limit) | jnp.any(token[:, None] == stop_ids, axis=1)
    return replace(state, token=token, count=count, done=done, history=said), told


# ---------------------------------------------------------------------- arguments and sizes


def _encode(model: LanguageModel, tokenizer: Tokenizer, prompts: Any) -> list[np.ndarray]:
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
            raise ValueError(f"{name} must be text, ids or one of them for each replica ({replicas}), got {prompt!r}")
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
        raise ValueError(f"{name} must hold ids in [0, {vocab_size}), got {ids}")
    return np.asarray(ids, np.int32)


def check_max_tokens(max_tokens: Any) -> None:
    """
    Raises:
        ValueError: not a number of tokens.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens must be an integer of at least 1, got {max_tokens!r}")


def check_logprobs(n: int | None, most: int) -> None:
    """
    Raises:
        ValueError: not a number of tokens up to ``most``.
    """
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= most):
        raise ValueError(f"logprobs must be None or an integer in [0, {most}], got {n!r}")


def token_logprobs(told: Logprobs, at: Any) -> TokenLogprobs:
    """Those of one token of a step's arrays, of which NumPy's suit."""
    return TokenLogprobs(float(told.chosen[at]), tuple(zip(told.ids[at].tolist(), told.top[at].tolist(), strict=True)))


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = [seed] * count if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed must be one integer or one for each of {count} prompts, got {len(seeds)}")
    if not all(isinstance(s, int) and 0 <= s < 2**32 for s in seeds):
        raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
    return seeds


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _room(tokens: int, model: LanguageModel) -> int:
    """The length of a cache for so many tokens."""
    return min(_power_of_two(max(tokens, LEAST_ROOM)), model.config.max_position_embeddings)


def _pieces_of(length: int) -> list[int]:
    """Lengths out of PREFILL that cover ``length``: one that it fills to half or more, else the largest it fills."""
    pieces = []
    while length > 0:
        fitting = next((size for size in PREFILL if length <= size <= 2 * length), None)
        size = fitting or max((size for size in PREFILL if size <= length), default=PREFILL[0])
        pieces.append(size)
        length -= size
    return pieces
