"""Continuous batching: requests come and go at any time, and every step serves all that are there.

An engine is a thread that owns the model's paged cache. Each of its steps reads a chunk of the prompts that are new and
gives every other sequence a token, in one compiled call each; requests are put in from other threads, and their answers
come out piece by piece.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from heddle.data.tokenizers import Tokenizer

from . import scheduler
from .answer import TokenLogprobs
from .blocks import Blocks
from .generation import Completion
from .model import LanguageModel, Transformer
from .paged import LEAST_READ, Device
from .requests import CANCELLED, ERROR, TIMEOUT, Event, Handle, Request, accept
from .sampling import Greedy, Mixed
from .scheduler import Scheduler

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The engine takes no more requests."""


@dataclass
class Counters:
    """What an engine has done since it was made."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    finished: Counter = field(default_factory=Counter)


class Engine:
    """A model that answers many requests at once.

    Args:
        model: any :class:`Transformer` whose layers keep every key. A rotary rule that depends on a text's length
            (longrope) is refused: parts of it are read before its length is known.
        tokenizer: of the model.
        max_batch: sequences that get a token in one step, at most.
        blocks: of the cache; None: enough for ``max_batch`` sequences of 1,024 tokens, or of the context if it is less.
        block_size: tokens in a block: 16, 32, 64 or 128.
        prefill_chunk: tokens of prompts read between two steps, at most. More: long prompts begin sooner; fewer: the
            other sequences' tokens come more evenly.
        max_queue: requests that wait, at most.
        cache_dtype: what keys and values are kept in: float32, bfloat16, float16 or int8, as of
            :meth:`heddle.jax.KVCache.empty`; None: the model's.

    Raises:
        ValueError: an argument out of range, or a model that can't be served.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 32,
        blocks: int | None = None,
        block_size: int = 64,
        prefill_chunk: int = 512,
        max_queue: int = 256,
        cache_dtype: Any = None,
    ):
        served = _checked(model, tokenizer)
        for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk), ("max_queue", max_queue)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if block_size not in (16, 32, 64, 128):
            raise ValueError(f"block_size must be 16, 32, 64 or 128, got {block_size}")
        context = model.config.max_position_embeddings
        count = max_batch * -(-min(context, 1024) // block_size) if blocks is None else blocks
        self.model, self.tokenizer, self.max_queue = served, tokenizer, max_queue
        self.room = min(context, count * block_size)  #: tokens of one sequence, at most
        self.counters = Counters()
        self._sizes, self._cache_dtype = (count, block_size, max_batch, prefill_chunk), cache_dtype
        self._preemptions = 0
        self._reset()
        self._condition = threading.Condition()
        self._inbox: deque[Handle] = deque()
        self._handles: set[Handle] = set()  # that aren't finished
        self._cancelled: deque[Handle] = deque()
        self._thread: threading.Thread | None = None
        self._closing = False

    def _reset(self) -> None:
        blocks, block_size, max_batch, prefill_chunk = self._sizes
        if hasattr(self, "_device"):
            self._preemptions = self.preemptions
            del self._device  # before there is another: a pool may take most of the memory
        self.scheduler = Scheduler(Blocks(blocks, block_size), max_batch, prefill_chunk)
        self._device = Device(self.model, blocks, block_size, self._cache_dtype)

    # ------------------------------------------------------------------ requests

    def submit(self, request: Request) -> Handle:
        """Queue a request; from any thread. It is answered while the engine is started or stepped.

        Raises:
            ValueError: what the request asks for can't be.
            QueueFull: as many requests wait as may.
            Closed: the engine takes no more.
        """
        handle = self._handle(request)
        with self._condition:
            if self._closing:
                raise Closed("the engine is shutting down")
            if self.waiting >= self.max_queue:
                self.counters.refused += 1
                raise QueueFull(f"{self.max_queue} requests wait already")
            self._put(handle)
        return handle

    def run(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Answer all requests, however many: of each its ``n`` answers."""
        handles = [self._handle(request) for request in requests]
        with self._condition:
            if self._closing:
                raise Closed("the engine is shutting down")
            for handle in handles:
                self._put(handle)
            alone = self._thread is None
        while alone and self.step():
            pass
        return [handle.result() for handle in handles]

    def update(self, model: Transformer) -> None:
        """Go on with other weights of the same model; what the cache knows of the old ones is forgotten.

        Raises:
            ValueError: requests are under way, or the model is another.
        """
        if self._handles or model.config != self.model.config:
            raise ValueError("model must be of the same configuration, and no request under way")
        self.model = model
        self._reset()

    def warm_up(self) -> None:
        """Compile the steps for short texts, of every number of sequences, before the first request.

        Raises:
            ValueError: there were requests already.
        """
        if self.counters.requests:
            raise ValueError("warm_up must come before the first request")
        blocks, size, max_batch, chunk = self._sizes
        rows = 1
        while rows < 2 * max_batch:
            greedy, sequences = Mixed.of([Greedy()] * rows), [([0], [0])] * rows
            for said in (None, np.zeros(self.model.config.vocab_size, np.int32)):  # what penalties look at
                self._device.decode(sequences, [], greedy, [0] * rows, [0] * rows, [said] * rows, False)
            rows *= 2
        length = LEAST_READ
        while length < 2 * chunk:
            read = min(length, chunk, blocks * size)
            self._device.read([([0] * read, 0, read, range(blocks))])
            length *= 2

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._inbox) + len(self.scheduler.waiting)

    @property
    def running(self) -> int:
        """How many sequences run."""
        return len(self.scheduler.running)

    @property
    def preemptions(self) -> int:
        """How many sequences gave their blocks back and were read again."""
        return self._preemptions + self.scheduler.preemptions

    @property
    def closing(self) -> bool:
        """Whether it takes no more requests."""
        return self._closing

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    # ------------------------------------------------------------------ the thread

    def start(self) -> Engine:
        """Answer requests in a thread from now on, until :meth:`close`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="heddle engine", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """Take no more requests; those there are go on."""
        with self._condition:
            self._closing = True
            self._condition.notify()

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, finish those there are, and end the thread.

        After ``timeout`` seconds those that are left are cancelled.
        """
        self.stop()
        if self._thread is None:
            while self.step():
                pass
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            for handle in list(self._handles):
                handle.cancel()
            self._thread.join()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self._condition:
                while not (self._handles or self._closing):
                    self._condition.wait()
                if not self._handles:
                    return
            try:
                self.step()
            except Exception:  # the requests of this step are lost, the engine isn't
                log.exception("a step failed")
                if not self._fail():
                    return

    def step(self) -> bool:
        """Read a chunk of the prompts there are and give every sequence that is read a token; whether more is left."""
        self._receive()
        self.scheduler.admit()
        parts = self.scheduler.parts()
        if parts:
            self._device.read([(p.sequence.tokens, p.begin, p.end, p.sequence.held.blocks) for p in parts])
            for part in parts:
                self.scheduler.was_read(part)
        self.scheduler.join()
        rows, copies = self.scheduler.rows()
        if rows:
            self._decode(rows, copies)
        self.counters.steps += bool(parts or rows)
        return bool(self._handles)

    def _decode(self, rows: list[scheduler.Sequence], copies: list[tuple[int, int]]) -> None:
        chosen, told = self._device.decode(
            [(row.tokens, row.held.blocks) for row in rows],
            copies,
            Mixed.of([row.sampler for row in rows]),
            [row.seed for row in rows],
            [len(row.answer.tokens) for row in rows],
            [row.history for row in rows],
            any(row.logprobs is not None for row in rows),
            [row.logprobs_temperature for row in rows],
        )
        for at, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            self.scheduler.was_written(row)
            row.tokens.append(token)
            if row.history is not None:
                row.history[token] = max(row.history[token], 0) + 1
            logprobs = None
            if told is not None and row.logprobs is not None:
                n = row.logprobs
                top = zip(told.ids[at, :n].tolist(), told.top[at, :n].tolist(), strict=True)
                logprobs = TokenLogprobs(float(told.chosen[at]), tuple(top))
            if not row.answer.tokens and not row.index:
                row.owner.reused_tokens = row.reused
                self.counters.prompt_tokens += row.owner.prompt_tokens
                self.counters.reused_tokens += row.reused
            self.counters.tokens += 1
            piece = row.answer.add(token, logprobs)
            if piece.finish_reason:
                self.scheduler.remove(row)
            self._tell(row.owner, Event(row.index, *piece))

    def _receive(self) -> None:
        """Take in what came, and let go of what nobody wants any more."""
        with self._condition:
            while self._inbox:
                self.scheduler.add(self._inbox.popleft().sequences[0])
            cancelled = set(self._cancelled)
            self._cancelled.clear()
        now = time.monotonic()
        for handle in list(self._handles):
            timeout = handle.request.timeout
            if handle in cancelled:
                self._end(handle, CANCELLED)
            elif timeout is not None and now - handle.arrival > timeout:
                self._end(handle, TIMEOUT)

    def _end(self, handle: Handle, reason: str) -> None:
        """End those answers of a request that haven't ended by themselves."""
        for index in sorted(handle.unfinished):
            if index in handle.sequences:
                self.scheduler.remove(handle.sequences[index])
            self._tell(handle, Event(index, "", -1, reason))

    def _fail(self) -> bool:
        """End all requests, and begin anew: an error in a step may have cost the cache. Whether that went well; if not,
        nothing more is taken."""
        self._end_all()
        try:
            self._reset()
        except Exception:
            log.exception("there is no new cache: the engine ends")
            self.stop()
            self._end_all()  # what came meanwhile
            return False
        return True

    def _end_all(self) -> None:
        """By an error, and without the scheduler, which one may have left in any state."""
        with self._condition:
            self._inbox.clear()
            handles = list(self._handles)
        for handle in handles:
            for index in sorted(handle.unfinished):
                self._tell(handle, Event(index, "", -1, ERROR))

    def _tell(self, handle: Handle, event: Event) -> None:
        if event.finish_reason:
            self.counters.finished[event.finish_reason] += 1
            handle.unfinished.discard(event.index)
            if not handle.unfinished:
                with self._condition:
                    self._handles.discard(handle)
        handle.tell(event)

    def _handle(self, request: Request) -> Handle:
        return accept(request, self.model, self.tokenizer, self.room, self.scheduler.max_batch, self._cancel)

    def _put(self, handle: Handle) -> None:
        self._inbox.append(handle)
        self._handles.add(handle)
        self.counters.requests += 1
        self._condition.notify()

    def _cancel(self, handle: Handle) -> None:
        with self._condition:
            if handle in self._handles:
                self._cancelled.append(handle)
                self._condition.notify()


def unsupported(model: LanguageModel) -> str | None:
    """What a model must be to be served, and isn't; None: it can be."""
    if not isinstance(model, Transformer) or model.config.attention is not None:
        return "model must keep every key to be served, got one of dilated attention: see heddle generate"
    if model.mesh is not None and model.mesh.size > model.mesh.shape["tensor"]:
        return f"model must be spread over tensor alone to be served, got a mesh of {dict(model.mesh.shape)}"
    rotary = model.config.rotary
    if rotary.by_length:
        return f"model must have a rope rule that doesn't depend on the text's length, got {rotary.rule!r}"
    return None


def _checked(model: Any, tokenizer: Tokenizer) -> Transformer:
    if (reason := unsupported(model)) is not None:
        raise ValueError(reason)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer must have at most the model's vocab_size {model.config.vocab_size}, got {tokenizer.vocab_size}"
        )
    return model
