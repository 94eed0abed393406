"""Which blocks of a paged cache hold what, and for how many sequences: bookkeeping on the host, no arrays.

A block has room for a fixed number of tokens. Sequences that begin alike share the full blocks of what they have in
common; a block that no sequence holds any more keeps its content until its room is needed, oldest first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class OutOfBlocks(Exception):
    """Every block is held by a sequence."""


class Blocks:
    """A fixed number of blocks, each held by none, one or several sequences.

    Args:
        count: how many there are.
        size: tokens in a block.
    """

    def __init__(self, count: int, size: int):
        for name, value in (("count", count), ("size", size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.count, self.size = count, size
        self._holders = [0] * count
        self._blank = list(reversed(range(count)))  # held by none, their content worth nothing
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by none, their content known; the oldest first
        self._content: dict[int, bytes] = {}  # of a full block, the digest of all tokens up to its end
        self._where: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """How many blocks can be taken."""
        return len(self._blank) + len(self._idle)

    @property
    def held(self) -> int:
        """How many blocks some sequence holds."""
        return self.count - self.available

    @property
    def idle(self) -> int:
        """How many blocks that no sequence holds still have a known content."""
        return len(self._idle)

    def holders(self, block: int) -> int:
        return self._holders[block]

    def take(self) -> int:
        """A block for new content.

        Raises:
            OutOfBlocks: none is left.
        """
        if self._blank:
            block = self._blank.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._where[self._content.pop(block)]
        else:
            raise OutOfBlocks
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more sequence holds the block."""
        self._check(block)
        self._holders[block] += 1

    def find(self, content: bytes) -> int | None:
        """The block of this content, now held by one more sequence; None where there is none."""
        block = self._where.get(content)
        if block is not None:
            self._idle.pop(block, None)
            self._holders[block] += 1
        return block

    def remember(self, block: int, content: bytes) -> None:
        """The block is full, and what it holds can be found. Of two of the same content the first is found."""
        self._check(block)
        if content not in self._where:
            self._where[content], self._content[block] = block, content

    def drop(self, block: int) -> None:
        """One sequence less holds the block."""
        self._check(block)
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if block in self._content:
            self._idle[block] = None
        else:
            self._blank.append(block)

    def _check(self, block: int) -> None:
        if not self._holders[block]:
            raise ValueError(f"block must be held by a sequence, got {block}, which none holds")


class Table:
    """The blocks of one sequence, in order; ``length`` tokens of it are computed and lie in them.

    A new one holds what is known already of ``tokens``: full blocks, and never all tokens, since to go on the last one
    has to be read.
    """

    def __init__(self, blocks: Blocks, tokens: Sequence[int]):
        self._pool = blocks
        self._known: list[bytes] = []  # digests of the full blocks
        self.blocks: list[int] = []
        self.length = 0
        while self.length + blocks.size < len(tokens):
            content = self._digest(tokens)
            block = blocks.find(content)
            if block is None:
                break
            self.blocks.append(block)
            self._known.append(content)
            self.length += blocks.size

    def reserve(self, length: int) -> None:
        """Blocks for so many tokens, all of them or none.

        Raises:
            OutOfBlocks: there are too few.
        """
        missing = self.missing(length)
        if missing > self._pool.available:
            raise OutOfBlocks
        self.blocks += [self._pool.take() for _ in range(missing)]

    def missing(self, length: int) -> int:
        """How many blocks it lacks for so many tokens."""
        return max(0, -(-length // self._pool.size) - len(self.blocks))

    def own(self, position: int) -> tuple[int, int] | None:
        """Make the block of this position the sequence's own, so that it can be written.

        Returns:
            None, or where others hold the block too, which is to be copied onto which.

        Raises:
            OutOfBlocks: there is none for the copy.
        """
        index = position // self._pool.size
        old = self.blocks[index]
        if self._pool.holders(old) == 1:
            return None
        self.blocks[index] = new = self._pool.take()
        self._pool.drop(old)
        return old, new

    def computed(self, tokens: Sequence[int], length: int) -> None:
        """The first ``length`` of ``tokens`` lie in the blocks now, which are found by others from now on."""
        self.length = length
        while (len(self._known) + 1) * self._pool.size <= length:
            self._known.append(self._digest(tokens))
            self._pool.remember(self.blocks[len(self._known) - 1], self._known[-1])

    def fork(self) -> Table:
        """Another sequence that begins with all that this one holds."""
        other = Table(self._pool, ())
        other._known, other.blocks, other.length = list(self._known), list(self.blocks), self.length
        for block in self.blocks:
            self._pool.share(block)
        return other

    def drop(self) -> None:
        """Hold nothing any more. Later blocks go first: they are of use to fewer others."""
        for block in reversed(self.blocks):
            self._pool.drop(block)
        self.blocks, self._known, self.length = [], [], 0

    def _digest(self, tokens: Sequence[int]) -> bytes:
        """Of the tokens in the next full block, and by the digest before of all those in front of it."""
        begin = len(self._known) * self._pool.size
        block = np.asarray(tokens[begin : begin + self._pool.size], np.int64)
        return hashlib.blake2b(b"".join(self._known[-1:]) + block.tobytes(), digest_size=16).digest()
