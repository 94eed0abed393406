"""Text from a model: prompts read once, then one token at a time under one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from heddle.attention import PADDING_SEGMENT_ID
from heddle.attention.arrays import Array
from heddle.data.tokenizers import Tokenizer

from .cache import KVCache
from .model import Transformer
from .sampling import Greedy, Sampler, needs_seen

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
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int


class Piece(NamedTuple):
    """What one token added: text that is certain now, perhaps none; at the end the reason for it."""

    text: str
    token: int
    finish_reason: str | None


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: str | Sequence[Prompt],
    *,
    max_tokens: int = 128,
    sampler: Sampler | None = None,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
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

    Raises:
        ValueError: no prompts, an empty one, or one that fills the model's context; arguments out of range.
    """
    run = Generation(model, tokenizer, prompts, max_tokens, sampler, seed, stop, stop_ids)
    while not run.finished:
        run.advance(STEPS_WITH_STOP if run.stop else STEPS)
    return [
        Completion(answer.text, tuple(answer.tokens), answer.finish_reason or "length", prompt.shape[-1])
        for answer, prompt in zip(run.answers, run.prompts, strict=True)
    ]


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = 128,
    sampler: Sampler | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    past: Past | None = None,
) -> Iterator[Piece]:
    """Continue one prompt, token by token; the texts add up to :func:`generate`'s, in whole characters.

    ``past`` remembers a conversation: of a prompt that begins as the last one and its answer, only the rest is read.
    """
    # Not a generator itself, so that wrong arguments are told at the call.
    return _pieces(Generation(model, tokenizer, [prompt], max_tokens, sampler, seed, stop, stop_ids, past))


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
        self.cache: KVCache | None = None

    def resume(self, model: Transformer, prompt: list[int], room: int) -> tuple[KVCache, int]:
        """A cache with ``room`` tokens of room, and how many of the prompt's tokens it holds already."""
        cache, self.cache = self.cache, None  # until it comes back, since a step gives its buffers away
        self.max_len = _room(max(room, self.max_len), model)
        if cache is None:
            return KVCache.empty(model.config, 1, self.max_len, model.dtype), 0
        held = self.tokens[: int(cache.lengths[0])]
        shared = next((i for i, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b), None)
        # The last token is read again in any case: its hidden state isn't kept.
        shared = min(len(held), len(prompt) - 1) if shared is None else shared
        if cache.max_len < self.max_len:
            cache = _grow(cache, self.max_len)
        return replace(cache, lengths=jnp.full(1, shared, jnp.int32)), shared


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """What the compiled loop carries."""

    cache: KVCache
    token: Int[Array, " batch"]  # the last one chosen, which the cache doesn't hold yet
    count: Int[Array, " batch"]  # how many were chosen
    limit: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    keys: Array
    seen: Bool[Array, "batch vocab"] | None


@dataclass
class _Answer:
    """One sequence's text so far."""

    decoder: Any
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    held: str = ""  # text that may be the beginning of a stop string
    finish_reason: str | None = None

    def add(self, token: int) -> Piece:
        self.tokens.append(token)
        if token in self.stop_ids:
            self.held += self.decoder.rest()
            self.finish_reason = "stop"
        else:
            self.held += self.decoder.add(token)
            if len(self.tokens) == self.limit:
                self.held += self.decoder.rest()
                self.finish_reason = "length"
        ends = [at for at in (self.held.find(string) for string in self.stop) if at >= 0]
        if ends:
            self.held, self.finish_reason = self.held[: min(ends)], "stop"
        keep = 0 if self.finish_reason else max((_overlap(self.held, string) for string in self.stop), default=0)
        piece = self.held[: len(self.held) - keep]
        self.held = self.held[len(piece) :]
        self.text += piece
        return Piece(piece, token, self.finish_reason)


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of ``text`` may begin ``string``."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if string.startswith(text[-n:])), 0)


class Generation:
    """A batch of prompts under way: read when it is made, then a number of tokens further with each call.

    Arguments as :func:`generate`'s. ``answers`` holds all there is, ``fresh`` each sequence's pieces of the last call.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        prompts: str | Sequence[Prompt],
        max_tokens: int = 128,
        sampler: Sampler | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        past: Past | None = None,
    ):
        config = model.config
        self.prompts = _encode(model, tokenizer, prompts)
        self.stop = _stop_strings(stop)
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"max_tokens must be an integer of at least 1, got {max_tokens!r}")
        seeds = _seeds(seed, len(self.prompts))
        ends = (*tokenizer.stop_ids, *config.eos_ids) if stop_ids is None else tuple(stop_ids)
        self.sampler = Greedy() if sampler is None else sampler
        self.past = past
        self._leaves, self._structure = jax.tree.flatten(model)
        self._stop_ids = jnp.asarray(np.pad(np.asarray(ends, np.int32), (0, -len(ends) % 8 or 8), constant_values=-1))

        if past is not None and self.prompts[0].ndim == 2:
            raise ValueError("prompt must be one for all replicas where there is a past, got one for each")
        lengths = [prompt.shape[-1] for prompt in self.prompts]
        limits = [min(max_tokens, config.max_position_embeddings - length) for length in lengths]
        self.answers = [_Answer(tokenizer.decoder(), self.stop, frozenset(ends), limit) for limit in limits]
        self.fresh: list[list[Piece]] = []
        room = max(length + limit for length, limit in zip(lengths, limits, strict=True))
        if past is not None:
            cache, held = past.resume(model, self.prompts[0].tolist(), room)
        else:
            cache, held = KVCache.empty(config, len(self.prompts), _room(room, model), model.dtype), 0

        seen = None
        if needs_seen(self.sampler):
            rows = np.zeros((len(self.prompts), config.vocab_size), bool)
            for row, prompt in zip(rows, self.prompts, strict=True):
                row[prompt[prompt != PADDING]] = True
            seen = jnp.asarray(rows)
        last, cache = self._read(model, cache, held)
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        token, count = (jnp.zeros(len(self.prompts), jnp.int32) for _ in range(2))  # a buffer each, to be donated
        state = _State(cache, token, count, jnp.asarray(limits, jnp.int32), jnp.zeros_like(token, bool), keys, seen)
        self._take(_begin(self._structure, self._leaves, last, state, self.sampler, self._stop_ids), steps=1)

    @property
    def finished(self) -> bool:
        return all(answer.finish_reason for answer in self.answers)

    def advance(self, steps: int = STEPS) -> None:
        """Up to ``steps`` tokens for each sequence that isn't finished."""
        steps = min(steps, STEPS)
        self._take(_decode(self._structure, self._leaves, self._state, self.sampler, self._stop_ids, steps), steps)

    def _read(self, model: Transformer, cache: KVCache, held: int) -> tuple[Array, KVCache]:
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

    def _take(self, result: tuple[_State, Array], steps: int) -> None:
        self._state, tokens = result
        if self.past is not None:
            self.past.cache = self._state.cache
        self.fresh = []
        for answer, row in zip(self.answers, np.asarray(tokens)[:, :steps].tolist(), strict=True):
            self.fresh.append([])
            for token in row:
                if token >= 0 and not answer.finish_reason:
                    self.fresh[-1].append(answer.add(token))
        if self.past is not None:
            self.past.tokens = self.prompts[0].tolist() + self.answers[0].tokens
        if self.stop:  # of which the device knows nothing
            done = jnp.asarray([bool(answer.finish_reason) for answer in self.answers])
            self._state = replace(self._state, done=done)


# ---------------------------------------------------------------------- compiled


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(structure: Any, leaves: list, cache: KVCache, last_bd: Array, tokens: Array):
    """Read tokens ``(batch, seq)``, or ``(batch, replicas, seq)``, into the cache."""
    model: Transformer = jax.tree.unflatten(structure, leaves)
    real = tokens != PADDING
    segment_ids = jnp.where(real, 0, PADDING_SEGMENT_ID)
    hidden_btd, cache = model.hidden(jnp.maximum(tokens, 0), segment_ids=segment_ids, cache=cache)
    counts = (real if real.ndim == 2 else real.any(axis=1)).sum(axis=1)
    final_bd = hidden_btd[jnp.arange(tokens.shape[0]), jnp.maximum(counts - 1, 0)]
    return jnp.where((counts > 0)[:, None], final_bd, last_bd), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _begin(structure: Any, leaves: list, last_bd: Array, state: _State, sampler: Sampler, stop_ids: Array):
    """The first token of each answer."""
    state = _choose(jax.tree.unflatten(structure, leaves), last_bd, state, sampler, stop_ids)
    return state, state.token[:, None]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(structure: Any, leaves: list, state: _State, sampler: Sampler, stop_ids: Array, steps: Array):
    """Up to ``steps`` more tokens, and the tokens ``(batch, STEPS)``; -1 where a sequence was done already."""
    model: Transformer = jax.tree.unflatten(structure, leaves)

    def more(carry):
        step, state, _ = carry
        return (step < steps) & ~jnp.all(state.done)

    def body(carry):
        step, state, tokens = carry
        done = state.done
        segment_ids = jnp.where(done, PADDING_SEGMENT_ID, 0)[:, None]
        hidden_b1d, cache = model.hidden(state.token[:, None], segment_ids=segment_ids, cache=state.cache)
        state = _choose(model, hidden_b1d[:, 0], replace(state, cache=cache), sampler, stop_ids)
        return step + 1, state, tokens.at[:, step].set(jnp.where(done, -1, state.token))

    tokens = jnp.full((state.token.shape[0], STEPS), -1, jnp.int32)
    _, state, tokens = jax.lax.while_loop(more, body, (jnp.int32(0), state, tokens))
    return state, tokens


def _choose(
    model: Transformer, hidden_bd: Float[Array, "batch hidden"], state: _State, sampler: Sampler, stop_ids: Array
) -> _State:
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
    token = sampler(model.head(hidden_bd), keys, state.seen)
    token = jnp.where(state.done, state.token, token)
    count = jnp.where(state.done, state.count, state.count + 1)
    seen = None if state.seen is None else state.seen.at[jnp.arange(token.shape[0]), token].set(True)
    done = state.done | (count >= state.limit) | jnp.any(token[:, None] == stop_ids, axis=1)
    return replace(state, token=token, count=count, done=done, seen=seen)


@functools.partial(jax.jit, static_argnums=1)
def _grow(cache: KVCache, max_len: int) -> KVCache:
    more = [(0, 0), (0, 0), (0, max_len - cache.max_len), (0, 0)]
    keys, values = (tuple(jnp.pad(a, more) for a in arrays) for arrays in (cache.keys, cache.values))
    return replace(cache, keys=keys, values=values)


# ---------------------------------------------------------------------- arguments and sizes


def _encode(model: Transformer, tokenizer: Tokenizer, prompts: Any) -> list[np.ndarray]:
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
            encoded.append(_encode_one(model, tokenizer, name, prompt))
            continue
        if replicas == 1 or len(prompt) != replicas:
            raise ValueError(f"{name} must be text, ids or one of them for each replica ({replicas}), got {prompt!r}")
        each = [_encode_one(model, tokenizer, f"{name}[{r}]", prompt[r]) for r in range(replicas)]
        longest = max(map(len, each))
        encoded.append(np.stack([np.pad(ids, (longest - len(ids), 0), constant_values=PADDING) for ids in each]))
    return encoded


def _encode_one(model: Transformer, tokenizer: Tokenizer, name: str, prompt: Any) -> np.ndarray:
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    context, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    if not ids:
        raise ValueError(f"{name} must hold at least one token, got {prompt!r}")
    if len(ids) >= context:
        raise ValueError(f"{name} must be shorter than the model's context of {context} tokens, got {len(ids)}")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(f"{name} must hold ids in [0, {vocab_size}), got {ids}")
    return np.asarray(ids, np.int32)


def _stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop must hold strings that aren't empty, got {stop!r}")
    return strings


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = [seed] * count if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed must be one integer or one for each of {count} prompts, got {len(seeds)}")
    if not all(isinstance(s, int) and 0 <= s < 2**32 for s in seeds):
        raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
    return seeds


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _room(tokens: int, model: Transformer) -> int:
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
