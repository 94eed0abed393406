"""Which sequences an engine reads and continues next: continuous batching (Orca, OSDI 2022), on the host.

Sequences join and leave the batch at every step. Prompts are read in chunks between the steps of the others. When
blocks run out, the youngest sequence gives its own back and is read again later (recomputation, arXiv 2309.06180,
section 4.5).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .answer import Answer
from .blocks import Blocks, OutOfBlocks, Table
from .sampling import Sampler


@dataclass(eq=False)
class Sequence:
    """One answer under way.

    Args:
        tokens: the prompt and what was answered to it so far.
        answer: its text.
        sampler: how its tokens are chosen.
        seed: of its random choices.
        owner: whom the scheduler's user tells of it.
        index: which of its owner's answers it is.
        forks: how many more answers begin where the prompt ends. They join when it is read.
        logprobs: how many likeliest tokens' log-probabilities to tell; None: none, nor the chosen ones'.
        logprobs_temperature: that logits are divided by before.
        history: what the penalties of its sampler look at ``(vocab,)``, if there are any.
        fork: makes the next of its forks.
    """

    tokens: list[int]
    answer: Answer
    sampler: Sampler
    seed: int
    owner: Any = None
    index: int = 0
    forks: int = 0
    logprobs: int | None = None
    logprobs_temperature: float = 1.0
    history: np.ndarray | None = None
    fork: Callable[[int], Sequence] | None = None
    table: Table | None = field(default=None, repr=False)
    reused: int = 0  #: tokens of the prompt that were in the cache already

    @property
    def held(self) -> Table:
        """Its blocks, while it runs."""
        if self.table is None:
            raise ValueError("the sequence must be running, got one that waits")
        return self.table

    @property
    def unread(self) -> int:
        """How many tokens stand before the last one and aren't in the cache."""
        return len(self.tokens) - 1 - self.held.length


@dataclass(frozen=True)
class Part:
    """Tokens of one sequence to read: ``sequence.tokens[begin:end]``."""

    sequence: Sequence
    begin: int
    end: int


class Scheduler:
    """The sequences that wait and those that run.

    Args:
        blocks: of the cache.
        max_batch: how many run at once.
        chunk: how many tokens of prompts are read between two steps.
    """

    def __init__(self, blocks: Blocks, max_batch: int, chunk: int):
        self.blocks, self.max_batch, self.chunk = blocks, max_batch, chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the oldest first
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or nobody wants it any more."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._drop(sequence)

    def admit(self) -> None:
        """Let those who wait run, in order, as long as there is room for all they have to read."""
        while self.waiting:
            sequence = self.waiting[0]
            if sum(1 + other.forks for other in (*self.running, sequence)) > self.max_batch:
                return
            table = Table(self.blocks, sequence.tokens)
            # Every sequence that runs will soon want one more.
            wanted = table.missing(len(sequence.tokens)) + sequence.forks + len(self.running)
            if wanted > self.blocks.available and self.running:
                table.drop()
                return
            table.reserve(len(sequence.tokens))
            sequence.table, sequence.reused = table, table.length
            self.running.append(self.waiting.popleft())

    def parts(self) -> list[Part]:
        """What to read before the next step, of as many prompts as the chunk has room for."""
        parts, room = [], self.chunk
        for sequence in self.running:
            count = min(sequence.unread, room)
            if count > 0:
                parts.append(Part(sequence, sequence.held.length, sequence.held.length + count))
                room -= count
        return parts

    def was_read(self, part: Part) -> None:
        """The part lies in the cache. After the last one of a prompt its forks join."""
        sequence = part.sequence
        sequence.held.computed(sequence.tokens, part.end)

    def join(self) -> None:
        """The forks of the prompts that are read, each beside its sequence."""
        for sequence in list(self.running):
            if not sequence.forks or sequence.unread or sequence.fork is None:
                continue
            at = self.running.index(sequence) + 1
            for number in range(1, sequence.forks + 1):
                other = sequence.fork(number)
                other.table = sequence.held.fork()
                self.running.insert(at, other)
                at += 1
            sequence.forks = 0

    def rows(self) -> tuple[list[Sequence], list[tuple[int, int]]]:
        """The sequences that get a token now, each with a block of its own to write its last one to; and which blocks
        are to be copied onto which before."""
        rows, copies = [], []
        for sequence in list(self.running):
            if sequence.table is None or sequence.unread:  # preempted just now, or not read yet
                continue
            while sequence.table is not None:
                try:
                    sequence.table.reserve(len(sequence.tokens))
                    copy = sequence.table.own(len(sequence.tokens) - 1)
                except OutOfBlocks:
                    self._preempt()
                    continue
                copies += [copy] if copy else []
                rows.append(sequence)
                break
        return rows, copies

    def was_written(self, sequence: Sequence) -> None:
        """The last token lies in the cache."""
        sequence.held.computed(sequence.tokens, len(sequence.tokens))

    def _preempt(self) -> None:
        """The youngest waits again, before all others."""
        youngest = self.running.pop()
        self._drop(youngest)
        self.waiting.appendleft(youngest)
        self.preemptions += 1

    def _drop(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            sequence.table.drop()
            sequence.table = None
