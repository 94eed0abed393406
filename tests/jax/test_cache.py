"""The cache: where tokens go, what is seen of it, and that a step writes into it instead of copying it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heddle.jax import KVCache, ModelConfig

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def test_it_begins_empty():
    cache = KVCache.empty(CONFIG, 3, 10, jnp.bfloat16)
    assert (cache.batch, cache.max_len, len(cache.keys), len(cache.values)) == (3, 10, 2, 2)
    assert {(a.shape, a.dtype) for a in (*cache.keys, *cache.values)} == {((3, 2, 10, 8), jnp.dtype("bfloat16"))}
    np.testing.assert_array_equal(cache.lengths, [0, 0, 0])


def test_tokens_go_after_those_before_them_and_padding_nowhere():
    cache = KVCache.empty(CONFIG, 2, 6).advance(jnp.array([3, 1]))
    valid = jnp.array([[True, True, False], [True, True, True]])
    slots = cache.slots(valid)
    np.testing.assert_array_equal(slots, [[3, 4, 6], [1, 2, 3]])
    new = jnp.arange(2 * 3 * 2 * 8, dtype=jnp.float32).reshape(2, 3, 2, 8) + 1
    written = cache.write(1, new, -new, slots).advance(valid.sum(1))
    np.testing.assert_array_equal(written.lengths, [5, 4])
    expected = np.zeros((2, 2, 6, 8), np.float32)
    expected[0, :, 3:5] = np.swapaxes(new[0, :2], 0, 1)
    expected[1, :, 1:4] = np.swapaxes(new[1], 0, 1)
    np.testing.assert_array_equal(written.keys[1], expected)
    np.testing.assert_array_equal(written.values[1], -expected)
    np.testing.assert_array_equal(written.keys[0], np.zeros_like(expected))


def test_each_query_sees_its_sequence_up_to_itself():
    cache = KVCache.empty(CONFIG, 3, 5).advance(jnp.array([2, 0, 3]))
    dense = np.asarray(cache.mask(jnp.array([2, 1, 0]), 2).dense(5)).astype(int)
    np.testing.assert_array_equal(dense[0], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(dense[1], [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(dense[2], np.zeros((2, 5)))


def test_writing_past_the_end_is_refused_before_and_never_wraps():
    cache = KVCache.empty(CONFIG, 2, 4).advance(jnp.array([1, 3]))
    cache.check(jnp.array([3, 1]))
    with pytest.raises(ValueError, match="room for 5 tokens of sequence 1, got max_len 4"):
        cache.check(2)
    with pytest.raises(ValueError, match="room for 5 tokens of sequence 0, got max_len 4"):
        cache.check(jnp.array([4, 0]))

    def past(cache):  # where lengths can't be read, nothing is written past the end, nor anywhere else
        new = jnp.ones((2, 2, 2, 8))
        return cache.write(0, new, new, cache.slots(jnp.ones((2, 2), bool)))

    written = jax.jit(past)(cache)
    np.testing.assert_array_equal(np.asarray(written.keys[0])[:, 0, :, 0], [[0, 1, 1, 0], [0, 0, 0, 1]])


def test_sizes_are_checked():
    for batch, max_len, name in ((0, 4, "batch"), (2, 0, "max_len")):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            KVCache.empty(CONFIG, batch, max_len)


def test_a_donated_cache_is_written_in_place():
    cache = KVCache.empty(CONFIG, 2, 64)

    def step(cache):
        new = jnp.ones((2, 1, 2, 8))
        for layer in range(2):
            cache = cache.write(layer, new, new, cache.slots(jnp.ones((2, 1), bool)))
        return cache.advance(jnp.ones(2, jnp.int32))

    where = [array.unsafe_buffer_pointer() for array in (*cache.keys, *cache.values)]
    compiled = jax.jit(step, donate_argnums=0).lower(cache).compile()
    size = str(cache.keys[0].shape).strip("()").replace(" ", "")
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line and f"[{size}]" in line]
    assert not copies
    after = compiled(cache)
    assert [array.unsafe_buffer_pointer() for array in (*after.keys, *after.values)] == where
    assert cache.keys[0].is_deleted()
