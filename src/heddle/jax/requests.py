"""What an engine is asked, and what it tells of each request while it answers."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from heddle.data.tokenizers import Tokenizer

from . import scheduler
from .answer import Answer, TokenLogprobs, stop_strings
from .generation import Completion
from .model import Transformer
from .paged import MOST_LOGPROBS
from .prompts import check_logprobs, check_max_tokens, encode_prompt
from .sampling import Greedy, Mixed, Sampler, history, needs_history

#: Why an answer ended, beside "stop" and "length".
CANCELLED, TIMEOUT, ERROR = "cancelled", "timeout", "error"


@dataclass(frozen=True)
class Request:
    """What to answer, and how.

    Args:
        prompt: text, or token ids.
        max_tokens: of each answer, at most; the context is a bound too.
        sampler: a usual one, as :func:`heddle.jax.sampler` makes it; None: the likeliest token.
        seed: of the first answer; the others take the numbers after it.
        n: how many answers; their prompt is read once.
        stop: strings that end an answer, which are left out of it.
        stop_ids: token ids that end an answer; None: the tokenizer's and the model's.
        logprobs: tell each token's log-probability, and those of so many likeliest ones, up to ``MOST_LOGPROBS``.
        logprobs_temperature: that logits are divided by before; the sampler's own tells what it samples from, but for
            what it leaves out (top-k, top-p, min-p).
        timeout: seconds after which it ends, wherever it is.
    """

    prompt: str | Sequence[int]
    max_tokens: int = 128
    sampler: Sampler | None = None
    seed: int = 0
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] | None = None
    logprobs: int | None = None
    logprobs_temperature: float = 1.0
    timeout: float | None = None


class Event(NamedTuple):
    """What came of one of a request's answers: a piece, or at the end perhaps its reason alone (token -1)."""

    index: int  #: of the answer
    text: str
    token: int
    finish_reason: str | None
    logprobs: TokenLogprobs | None = None


class Handle:
    """A request under way. Iterating over it, from any thread or with ``async for``, gives its events, once.

    The events of each answer end with one that has a ``finish_reason``: ``"stop"``, ``"length"``, ``"cancelled"``,
    ``"timeout"`` or, if the engine failed, ``"error"``.
    """

    def __init__(
        self,
        request: Request,
        prompt_tokens: int,
        stop_ids: frozenset[int],
        cancel: Callable[[Handle], object],
    ):
        self.request, self.prompt_tokens, self.stop_ids = request, prompt_tokens, stop_ids
        self.reused_tokens = 0  #: of the prompt, that the cache held already; known with the first event
        self.arrival = time.monotonic()
        self.unfinished = set(range(request.n))  #: answers
        self.sequences: dict[int, scheduler.Sequence] = {}  #: of the answers that have begun
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._listener: Callable[[Event], object] | None = None
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """End it soon: its blocks are given back, and whoever iterates over it is told."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Event]:
        left = self.request.n
        while left:
            event = self._events.get()
            left -= event.finish_reason is not None
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, arrived, left = asyncio.get_running_loop(), asyncio.Queue(), self.request.n
        with self._lock:
            while not self._events.empty():
                arrived.put_nowait(self._events.get())
            self._listener = lambda event: loop.call_soon_threadsafe(arrived.put_nowait, event)
        while left:
            event = await arrived.get()
            left -= event.finish_reason is not None
            yield event

    def result(self) -> list[Completion]:
        """Wait for all answers."""
        texts, tokens, told = ([[] for _ in range(self.request.n)] for _ in range(3))
        reasons: list[str] = [""] * self.request.n
        for event in self:
            texts[event.index].append(event.text)
            tokens[event.index] += [event.token] if event.token >= 0 else []
            told[event.index] += [event.logprobs] if event.logprobs else []
            reasons[event.index] = event.finish_reason or ""
        wanted = self.request.logprobs is not None
        return [
            Completion("".join(text), tuple(ids), reason, self.prompt_tokens, tuple(each) if wanted else None)
            for text, ids, reason, each in zip(texts, tokens, reasons, told, strict=True)
        ]

    def tell(self, event: Event) -> None:
        """Give an event to whoever iterates over it; from the engine's thread."""
        with self._lock:
            if self._listener is None:
                self._events.put(event)
                return
        try:
            self._listener(event)
        except RuntimeError:  # its event loop is closed: nobody listens any more
            self.cancel()


def accept(
    request: Request,
    model: Transformer,
    tokenizer: Tokenizer,
    room: int,
    max_batch: int,
    cancel: Callable[[Handle], object],
) -> Handle:
    """A request, checked, with the sequence of its first answer, from which those of the others fork.

    Args:
        request: what is asked.
        model: that answers.
        tokenizer: of the model.
        room: tokens of one sequence, at most.
        max_batch: answers of one request, at most.
        cancel: what to do when somebody cancels it.

    Raises:
        ValueError: what the request asks for can't be.
    """
    prompt = encode_prompt(model, tokenizer, "prompt", request.prompt).tolist()
    if len(prompt) >= room:
        raise ValueError(f"prompt must be shorter than the cache's room of {room} tokens, got {len(prompt)}")
    check_max_tokens(request.max_tokens)
    if not 0 <= request.seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2**32), got {request.seed!r}")
    if not 1 <= request.n <= max_batch:
        raise ValueError(f"n must be in [1, {max_batch}], the largest batch, got {request.n}")
    check_logprobs(request.logprobs, MOST_LOGPROBS, request.logprobs_temperature)
    if request.timeout is not None and not request.timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, got {request.timeout}")
    sampler = request.sampler or Greedy()
    Mixed.of([sampler])
    stop = stop_strings(request.stop)
    own = (*tokenizer.stop_ids, *model.config.eos_ids)
    ends = frozenset(own if request.stop_ids is None else request.stop_ids)
    limit = min(request.max_tokens, room - len(prompt))
    handle = Handle(request, len(prompt), ends, cancel)

    def sequence(index: int) -> scheduler.Sequence:
        handle.sequences[index] = scheduler.Sequence(
            tokens=list(prompt),
            answer=Answer(tokenizer.decoder(), stop, ends, limit),
            sampler=sampler,
            seed=(request.seed + index) % 2**32,
            owner=handle,
            index=index,
            forks=0 if index else request.n - 1,
            logprobs=request.logprobs,
            logprobs_temperature=request.logprobs_temperature,
            history=history([prompt], [()], model.config.vocab_size)[0] if needs_history(sampler) else None,
            fork=sequence,
        )
        return handle.sequences[index]

    sequence(0)
    return handle
