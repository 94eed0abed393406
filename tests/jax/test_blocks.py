"""The bookkeeping of a paged cache: nothing is lost, held twice or overwritten, whatever is done in whatever order."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from heddle.jax.blocks import Blocks, OutOfBlocks, Table

COUNT, SIZE = 7, 3


class Sequences(RuleBasedStateMachine):
    """Sequences that read, write, fork and end, beside a model in which each block holds the tokens written to it."""

    live = Bundle("live")

    def __init__(self):
        super().__init__()
        self.pool = Blocks(COUNT, SIZE)
        self.memory = [[None] * SIZE for _ in range(COUNT)]
        self.tables: list[tuple[Table, list[int]]] = []

    def held(self, table):
        slots = [slot for block in table.blocks for slot in self.memory[block]]
        return slots[: table.length]

    @rule(target=live, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4 * SIZE))
    def begin(self, tokens):
        entry = Table(self.pool, tokens), tokens
        assert entry[0].length < len(tokens)
        self.tables.append(entry)
        return entry

    @rule(entry=live, count=st.integers(1, 2 * SIZE), more=st.integers(0, 1))
    def write(self, entry, count, more):
        """The next tokens, past the given ones ``more`` over and over."""
        table, tokens = entry
        if not any(entry[0] is table for entry in self.tables):
            return
        end = table.length + count
        tokens.extend([more] * (end - len(tokens)))
        before, available = list(table.blocks), self.pool.available
        try:
            table.reserve(end)
        except OutOfBlocks:
            assert (table.blocks, self.pool.available) == (before, available)
            return
        for position in range(table.length, end):
            try:
                copied = table.own(position)
            except OutOfBlocks:
                assert self.pool.available == 0
                return
            if copied:
                old, new = copied
                self.memory[new] = list(self.memory[old])
            block = table.blocks[position // SIZE]
            assert self.pool.holders(block) == 1
            self.memory[block][position % SIZE] = tokens[position]
            table.computed(tokens, position + 1)

    @rule(target=live, entry=live)
    def fork(self, entry):
        table, tokens = entry
        other = table.fork(), list(tokens)
        self.tables.append(other)
        return other

    @rule(entry=consumes(live))
    def end(self, entry):
        entry[0].drop()
        self.tables = [other for other in self.tables if other[0] is not entry[0]]

    @invariant()
    def every_sequence_finds_its_own_tokens(self):
        for table, tokens in self.tables:
            assert self.held(table) == tokens[: table.length]

    @invariant()
    def every_block_is_held_by_those_who_say_so(self):
        named = [block for table, _ in self.tables for block in table.blocks]
        for block in range(COUNT):
            assert self.pool.holders(block) == named.count(block)
        assert self.pool.held == len(set(named))
        assert self.pool.available == COUNT - len(set(named))

    def teardown(self):
        for table, _ in self.tables:
            table.drop()
        assert (self.pool.held, self.pool.available) == (0, COUNT)
        taken = {self.pool.take() for _ in range(COUNT)}
        assert taken == set(range(COUNT))
        assert self.pool.idle == 0


TestSequences = Sequences.TestCase


def filled(pool: Blocks, tokens: list[int]) -> Table:
    table = Table(pool, tokens)
    table.reserve(len(tokens))
    table.computed(tokens, len(tokens))
    return table


def test_what_begins_alike_is_shared_in_full_blocks():
    pool = Blocks(10, 4)
    first = filled(pool, list(range(11)))
    other = Table(pool, [*range(8), 99, 100, 101])
    assert (other.blocks, other.length) == (first.blocks[:2], 8)
    # A block says what is before it too: the same four tokens elsewhere are others.
    assert Table(pool, [4, 5, 6, 7, 8]).blocks == []
    # The last token has to be read, so a prompt of whole blocks leaves its last one out.
    assert Table(pool, list(range(8))).length == 4


def test_the_oldest_content_goes_first_and_ends_before_beginnings():
    pool = Blocks(4, 2)
    old, new = filled(pool, [1, 2, 3, 4]), filled(pool, [5, 6, 7, 8])
    blocks = old.blocks + new.blocks
    old.drop()
    new.drop()
    assert (pool.held, pool.idle) == (0, 4)
    assert [pool.take() for _ in range(3)] == [blocks[1], blocks[0], blocks[3]]
    assert Table(pool, [1, 2, 3]).blocks == []
    assert Table(pool, [5, 6, 7, 8, 9]).blocks == [blocks[2]]


def test_using_a_block_makes_it_young_again():
    pool = Blocks(2, 2)
    for tokens in ([1, 2], [3, 4]):
        filled(pool, tokens).drop()
    Table(pool, [1, 2, 0]).drop()
    pool.take()
    assert Table(pool, [1, 2, 0]).length == 2


def test_a_shared_block_is_copied_before_it_is_written():
    pool = Blocks(3, 4)
    table = filled(pool, [1, 2, 3, 4, 5])
    fork = table.fork()
    last = table.blocks[1]
    assert fork.own(5) == (last, fork.blocks[1])
    assert fork.blocks[1] != last
    assert table.own(5) is None  # alone again
    with pytest.raises(OutOfBlocks):
        table.fork().own(5)


def test_what_nobody_holds_cannot_be_dropped():
    pool = Blocks(2, 4)
    block = pool.take()
    pool.drop(block)
    for misuse in (pool.drop, pool.share, lambda block: pool.remember(block, b"")):
        with pytest.raises(ValueError, match=f"block must be held by a sequence, got {block}, which none holds"):
            misuse(block)


@pytest.mark.parametrize(("count", "size", "name"), [(0, 4, "count"), (4, 0, "size")])
def test_sizes_are_checked(count, size, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Blocks(count, size)
