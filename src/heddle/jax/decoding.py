"""The compiled programs of generation: reading prompts, and loops that choose token after token."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from heddle.attention import PADDING_SEGMENT_ID
from heddle.attention.arrays import Array

from .cache import Cache
from .model import LanguageModel
from .prompts import PADDING
from .sampling import Logprobs, Number, Sampler, logprobs, remember
from .speculation import PromptLookup

STEPS = 32  #: tokens of a sequence that one call decodes, at most


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What the compiled loop carries."""

    cache: Cache
    token: Int[Array, " batch"]  # the last one chosen, which the cache doesn't hold yet
    count: Int[Array, " batch"]  # how many were chosen
    limit: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    keys: Array
    history: Int[Array, "batch vocab"] | None
    text: Int[Array, "batch room"] | None = None  # all tokens, ``token`` the last, to find drafts in


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(structure: Any, leaves: list, cache: Cache, last_bd: Array, tokens: Array):
    """Read tokens ``(batch, seq)``, or ``(batch, replicas, seq)``, into the cache, some sequences at a time."""
    model: LanguageModel = jax.tree.unflatten(structure, leaves)

    def read(cache: Cache, last_bd: Array, tokens: Array) -> tuple[Array, Cache]:
        real = tokens != PADDING
        segment_ids = jnp.where(real, 0, PADDING_SEGMENT_ID)
        hidden_btd, cache = model.hidden(jnp.maximum(tokens, 0), segment_ids=segment_ids, cache=cache)
        counts = (real if real.ndim == 2 else real.any(axis=1)).sum(axis=1)
        final_bd = hidden_btd[jnp.arange(tokens.shape[0]), jnp.maximum(counts - 1, 0)]
        return jnp.where((counts > 0)[:, None], final_bd, last_bd), cache

    batch, most = tokens.shape[0], max(1, _at_once() // (model.config.parscale_n * tokens.shape[-1]))
    some = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)
    if some == batch or model.mesh is not None:  # devices share the sequences
        return read(cache, last_bd, tokens)

    def step(i: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
        (last_bd, cache), begin = carry, i * some
        last, part = read(
            cache.sequences(begin, some), *(jax.lax.dynamic_slice_in_dim(x, begin, some) for x in (last_bd, tokens))
        )
        return jax.lax.dynamic_update_slice_in_dim(last_bd, last, begin, 0), cache.with_sequences(part, begin)

    return jax.lax.fori_loop(0, batch // some, step, (last_bd, cache))


def _at_once() -> int:
    """Tokens of all rows that are read at once, at most: on a CPU so few that activations stay in its caches, with
    weights still read seldom enough; elsewhere so many that activations take little beside the weights."""
    return 512 if jax.default_backend() == "cpu" else 16384


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=3)
def begin(
    structure: Any,
    leaves: list,
    last_bd: Array,
    state: State,
    sampler: Sampler,
    stop_ids: Array,
    n: int | None,
    temperature: Number = 1.0,
):
    """The first token of each answer, and with ``n`` its log-probability at ``temperature``."""
    model: LanguageModel = jax.tree.unflatten(structure, leaves)
    state, told = _choose(model.head(last_bd), state, sampler, stop_ids, n, temperature)
    if state.text is not None:
        rows = jnp.arange(state.token.shape[0])
        state = replace(state, text=state.text.at[rows, state.cache.lengths].set(state.token))
    layout = model.layout()  # whole on every device, so that each process can read them
    return state, layout(state.token[:, None]), jax.tree.map(lambda a: layout(a[:, None]), told)


@functools.partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=2)
def decode(
    structure: Any,
    leaves: list,
    state: State,
    sampler: Sampler,
    stop_ids: Array,
    steps: Array,
    n: int | None,
    lookup: PromptLookup | None,
    temperature: Number = 1.0,
):
    """At least ``steps`` more tokens of each sequence that isn't done before; with ``lookup`` a draft's more.

    Returns:
        the state, the tokens ``(batch, STEPS + draft)``, -1 behind a sequence's last, and with ``n`` their
        log-probabilities at ``temperature``.
    """
    model: LanguageModel = jax.tree.unflatten(structure, leaves)
    batch, draft = state.token.shape[0], 0 if lookup is None else lookup.num_tokens
    rows = jnp.arange(batch)

    def more(carry):
        state, filled, _, _ = carry
        return jnp.any(~state.done & (filled < steps))

    def read(carry, guess, offered):
        """One forward over the last token and a guess of the next ones; then each token chosen, while they agree."""
        state, filled, tokens, told = carry
        live, width = ~state.done & (filled < steps), guess.shape[1] + 1
        real = live[:, None] & (jnp.arange(width) <= offered[:, None])
        hidden_btd, cache = model.hidden(
            jnp.concatenate([state.token[:, None], guess], axis=1),
            segment_ids=jnp.where(real, 0, PADDING_SEGMENT_ID), cache=state.cache,
        )  # fmt: skip
        logits_btv, done, chosen = model.head(hidden_btd), state.done, jnp.zeros(batch, jnp.int32)
        for i in range(width):
            # Rows that are done, or disagreed before, choose nothing.
            state, fresh = _choose(logits_btv[:, i], replace(state, done=~live), sampler, stop_ids, n, temperature)
            at = rows, jnp.where(live, filled, tokens.shape[1])
            tokens = tokens.at[at].set(state.token, mode="drop")
            told = jax.tree.map(lambda all_, new, at=at: all_.at[at].set(new, mode="drop"), told, fresh)
            filled, chosen = filled + live, chosen + live
            if state.text is not None:
                place = rows, jnp.where(live, cache.lengths - offered - 1 + chosen, state.text.shape[1])
                state = replace(state, text=state.text.at[place].set(state.token, mode="drop"))
            done, live = done | (live & state.done), live & ~state.done
            if i < guess.shape[1]:
                live &= (i < offered) & (state.token == guess[:, i])
        cache = cache.advance(jnp.where(real.any(axis=1), chosen - 1 - offered, 0))  # less what was guessed wrong
        return replace(state, done=done, cache=cache), filled, tokens, told

    def body(carry):
        state, filled, _, _ = carry
        nothing = jnp.zeros((batch, 0), jnp.int32), jnp.zeros(batch, jnp.int32)
        if lookup is None or state.text is None:
            return read(carry, *nothing)
        guess, offered = lookup.propose(state.text, state.cache.lengths + 1)
        offered = jnp.clip(offered, 0, state.limit - state.count - 1)
        offered = jnp.where(state.done | (filled >= steps), 0, offered)
        return jax.lax.cond(
            jnp.any(offered > 0), lambda carry: read(carry, guess, offered), lambda carry: read(carry, *nothing), carry
        )

    tokens, told = jnp.full((batch, STEPS + draft), -1, jnp.int32), None
    if n is not None:
        shape = tokens.shape
        told = Logprobs(jnp.zeros(shape), jnp.zeros((*shape, n)), jnp.zeros((*shape, n), jnp.int32))
    state, _, tokens, told = jax.lax.while_loop(more, body, (state, jnp.zeros(batch, jnp.int32), tokens, told))
    return state, *jax.tree.map(model.layout(), (tokens, told))


def _choose(
    logits: Float[Array, "batch vocab"],
    state: State,
    sampler: Sampler,
    stop_ids: Array,
    n: int | None,
    temperature: Number,
) -> tuple[State, Logprobs | None]:
    """The next token of the sequences that aren't done; ``done`` is then whether it was the last."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
    token = sampler(logits, keys, state.history)
    told = None if n is None else logprobs(logits, token, n, temperature)
    token = jnp.where(state.done, state.token, token)
    count = jnp.where(state.done, state.count, state.count + 1)
    said = state.history
    if said is not None:
        said = jnp.where(state.done[:, None], said, remember(said, token))
    done = state.done | (count >= state.limit) | jnp.any(token[:, None] == stop_ids, axis=1)
    return replace(state, token=token, count=count, done=done, history=said), told
