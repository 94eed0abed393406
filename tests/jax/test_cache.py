"""The cache: decoding through it, whatever it keeps, is the full forward, and a step writes into it, never copying."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import tokens

from heddle import Mask, attend
from heddle.jax import KVCache, ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
SIZES = {
    "vocab_size": 199, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.3,
}  # fmt: skip
MIXED = {"model_type": "qwen3", "sliding_window": 6, "layer_types": ("full_attention", "sliding_attention")}
PARSCALE = {"model_type": "qwen2_parscale", "parscale_n": 3, "parscale_n_tokens": 4, "enable_cross_attn": True}
MODELS = {
    "plain": {}, "window": {"model_type": "mistral", "sliding_window": 6}, "some layers a window": MIXED,
    "parscale, some layers a window": PARSCALE | MIXED | PARSCALE,
}  # fmt: skip
run = jax.jit(lambda model, *arguments, **options: model(*arguments, **options))


def tiny(name: str) -> Transformer:
    return Transformer(ModelConfig(**SIZES, **MODELS[name]), rngs=nnx.Rngs(0))


def write(cache, layer, key, value, real):
    """The cache with these keys and values in one layer."""
    return cache.attend(layer, jnp.concatenate([key, key], axis=2), key, value, cache.step(real))


def kept(cache, layer):
    """The layer's keys, as the values lie: ``(rows, kv_heads, slots, head_dim)``."""
    keys = np.asarray(cache.keys[layer]).swapaxes(3, 4)
    return keys.reshape(*keys.shape[:2], -1, keys.shape[4])


def test_it_begins_empty():
    cache = KVCache.empty(CONFIG, 3, 10, jnp.bfloat16)
    assert (cache.batch, cache.replicas, cache.max_len, cache.layers) == (3, 1, 10, 2)
    assert {(a.shape, a.dtype) for a in cache.keys} == {((3, 2, 1, 8, 64), jnp.dtype("bfloat16"))}
    assert {(a.shape, a.dtype) for a in cache.values} == {((3, 2, 64, 8), jnp.dtype("bfloat16"))}
    assert KVCache.empty(CONFIG, 3, 65).keys[0].shape == (3, 2, 2, 8, 64)
    np.testing.assert_array_equal(cache.lengths, [0, 0, 0])


def test_tokens_go_after_those_before_them_and_padding_nowhere():
    cache = KVCache.empty(CONFIG, 2, 6).advance(jnp.array([3, 1]))
    valid = jnp.array([[True, True, False], [True, True, True]])
    np.testing.assert_array_equal(cache.places(valid), [[3, 4, -1], [1, 2, 3]])
    new = jnp.arange(2 * 3 * 2 * 8, dtype=jnp.float32).reshape(2, 3, 2, 8) + 1
    written = write(cache, 1, new, -new, valid)[1].advance(valid.sum(1))
    np.testing.assert_array_equal(written.lengths, [5, 4])
    expected = np.zeros((2, 2, 64, 8), np.float32)
    expected[0, :, 3:5] = np.swapaxes(new[0, :2], 0, 1)
    expected[1, :, 1:4] = np.swapaxes(new[1], 0, 1)
    np.testing.assert_array_equal(kept(written, 1), expected)
    np.testing.assert_array_equal(written.values[1], -expected)
    np.testing.assert_array_equal(kept(written, 0), np.zeros_like(expected))


def test_each_query_sees_its_sequence_up_to_itself():
    rng, cache = np.random.default_rng(0), KVCache.empty(CONFIG, 3, 9)
    query, key, value = (jnp.asarray(rng.normal(size=(3, 5, n, 8)), jnp.float32) for n in (4, 2, 2))
    valid = np.arange(5) < np.array([5, 3, 4])[:, None]
    before, now = (slice(None), slice(0, 2)), (slice(None), slice(2, 5))
    _, cache = cache.attend(0, query[before], key[before], value[before], cache.step(jnp.asarray(valid[before])))
    cache = cache.advance(jnp.full(3, 2))
    (out, lse), _ = cache.attend(0, query[now], key[now], value[now], cache.step(jnp.asarray(valid[now])))
    mask = Mask.lengths(valid.sum(1), 3, offset=np.full(3, 2))
    want, want_lse = attend(query[now], key, value, mask, return_lse=True, implementation="reference")
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- decoding is the full forward


def through(model, cache, ids, lengths, pieces, more):
    """Logits of ragged prompts read in pieces, and of some tokens after them, through a cache: by sequence."""
    found, begin = [[] for _ in lengths], 0
    for size in pieces:
        index = np.arange(begin, begin + size)
        real = index < lengths[:, None]
        now = np.where(real, ids[:, np.minimum(index, ids.shape[1] - 1)], 0)
        out, cache = run(model, jnp.asarray(now), segment_ids=jnp.where(real, 0, -1), cache=cache)
        for row in range(len(lengths)):
            found[row] += list(np.asarray(out[row])[real[row]])
        begin += size
    for step in range(more):
        now = np.take_along_axis(ids, (lengths + step)[:, None], axis=1)
        out, cache = run(model, jnp.asarray(now), cache=cache)
        for row in range(len(lengths)):
            found[row].append(np.asarray(out[row, 0]))
    return [np.stack(rows) for rows in found], cache


@pytest.mark.parametrize("pieces", [(24,), (3, 16, 1, 4)], ids=["at once", "in pieces"])
@pytest.mark.parametrize("name", MODELS)
def test_decoding_a_ragged_batch_is_the_full_forward(name, pieces):
    """Past the window more than once, in prompts and after; pieces longer than the window, and one token."""
    model, lengths, more = tiny(name), np.array([19, 4, 24]), 9
    ids = tokens(3, 33)
    full = run(model, jnp.asarray(ids))
    found, cache = through(model, model.empty_cache(3, 40), ids, lengths, pieces, more)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row], full[row, : length + more], rtol=0, atol=5e-5)
    np.testing.assert_array_equal(cache.lengths, lengths + more)
    windows = {None if window is None else min(window, 40) for window in cache.windows}
    assert windows == {"plain": {None}, "window": {6}}.get(name, {None, 6})
    for layer, window in enumerate(cache.windows):  # a ring holds no more than its window
        held = np.abs(kept(cache, layer)).max(axis=(0, 1, 3)) > 0
        assert held.sum() == (33 if window is None else window)


def test_replicas_that_begin_within_a_ring():
    model, ids = tiny("parscale, some layers a window"), tokens(1, 3, 21)
    padding = np.zeros((1, 3, 21), np.int32)
    padding[0, 1, :9], padding[0, 2, :2] = -1, -1
    full = run(model, ids, segment_ids=padding)
    cache, outs = model.empty_cache(1, 24), []
    for begin, end in ((0, 1), (1, 7), (7, 8), (8, 16), (16, 17), (17, 21)):
        piece = slice(begin, end)
        out, cache = run(model, ids[:, :, piece], segment_ids=padding[:, :, piece], cache=cache)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1)[:, 9:], full[:, 9:], rtol=0, atol=5e-5)
    np.testing.assert_array_equal(cache.starts, [0, 9, 2])


# ---------------------------------------------------------------------- what it is kept in


@pytest.mark.parametrize("name", ["plain", "parscale, some layers a window"])
def test_int8_is_near_and_small(name):
    """Each key and value is off by 1/254 of its head's largest at most; such random weights multiply that."""
    model, lengths = tiny(name), np.array([19, 4, 24])
    ids = tokens(3, 33)
    exact, wide = through(model, model.empty_cache(3, 40), ids, lengths, (24,), 9)
    found, cache = through(model, model.empty_cache(3, 40, jnp.int8), ids, lengths, (24,), 9)
    cut, _ = through(model, model.empty_cache(3, 40, jnp.int8), ids, lengths, (3, 16, 1, 4), 9)
    for got, other, want in zip(found, cut, exact, strict=True):
        error = np.abs(got - want).max() / np.abs(want).max()
        assert 1e-4 < error < 0.1
        np.testing.assert_allclose(got, other, rtol=0, atol=0.02 * np.abs(want).max())  # however the prompt is cut
    assert {x.dtype for x in (*cache.keys, *cache.values)} == {jnp.dtype("int8")}
    slots = sum(values.size for values in cache.values) // 8  # tokens and heads, of all layers
    counters = sum(x.nbytes for x in (cache.lengths, cache.starts) if x is not None)
    assert cache.nbytes == 2 * slots * (8 + 4) + counters
    assert wide.nbytes == 2 * slots * 8 * 4 + counters


def test_scales_are_of_each_token_and_head():
    key = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 8)), jnp.float32)
    key = key * jnp.array([1e-3, 1.0, 1e3])[:, None, None] * jnp.array([1.0, 50.0])[:, None]
    key = key.at[0, 1, 0].set(0)
    (_, cache) = write(KVCache.empty(CONFIG, 1, 4, jnp.int8), 0, key, key, jnp.ones((1, 3), bool))
    back = (kept(cache, 0) * np.asarray(cache.key_scales[0])[..., None]).swapaxes(1, 2)[:, :3]
    largest = np.abs(key).max(-1, keepdims=True)
    assert (np.abs(back - key) <= largest * (0.5 / 127 + 1e-6)).all()


def test_bfloat16_is_near():
    model, lengths, ids = tiny("window"), np.array([19, 4]), tokens(2, 30)
    exact, _ = through(model, model.empty_cache(2, 40), ids, lengths, (20,), 6)
    found, cache = through(model, model.empty_cache(2, 40, jnp.bfloat16), ids, lengths, (20,), 6)
    for got, want in zip(found, exact, strict=True):
        assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
    assert cache.keys[0].dtype == jnp.bfloat16


def test_bytes_are_known_before_there_is_a_cache():
    model = tiny("some layers a window")
    planned = jax.eval_shape(lambda: model.empty_cache(4, 64, jnp.bfloat16))
    assert planned.nbytes == model.empty_cache(4, 64, jnp.bfloat16).nbytes == 4 * 2 * 2 * (64 + 64) * 8 * 2 + 4 * 4


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_a_cache_grows(dtype):
    model, ids = tiny("some layers a window"), tokens(1, 20)
    small, wide = (model.empty_cache(1, size, dtype) for size in (4, 24))
    lengths = np.array([4])
    _, small = through(model, small, ids, lengths, (4,), 0)
    _, wide = through(model, wide, ids, lengths, (4,), 0)
    small = small.grow(24)
    assert [x.shape for x in jax.tree.leaves(small)] == [x.shape for x in jax.tree.leaves(wide)]
    for step in range(4, 20):
        got, small = run(model, jnp.asarray(ids[:, step : step + 1]), cache=small)
        want, wide = run(model, jnp.asarray(ids[:, step : step + 1]), cache=wide)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="max_len must be at least the cache's 24, got 8"):
        small.grow(8)


def test_a_cache_goes_back_as_far_as_it_can():
    model, ids = tiny("some layers a window"), tokens(1, 20)
    full = run(model, jnp.asarray(ids))

    def after(length):
        return through(model, model.empty_cache(1, 24), ids, np.array([length]), (length,), 0)[1]

    for length, fewer in ((6, 2), (13, 12), (13, 13)):
        out, _ = run(model, jnp.asarray(ids[:, fewer:]), cache=after(length).truncate(np.array([fewer])))
        np.testing.assert_allclose(out, full[:, fewer:], rtol=0, atol=5e-5)
    assert after(13).truncate(np.array([11])) is None
    assert KVCache.empty(CONFIG, 1, 24).advance(jnp.array([13])).truncate(np.array([2])).lengths == 2


def test_writing_past_the_end_is_refused_before_and_never_wraps():
    cache = KVCache.empty(CONFIG, 2, 4).advance(jnp.array([1, 3]))
    cache.check(jnp.array([3, 1]))
    with pytest.raises(ValueError, match="room for 5 tokens of sequence 1, got max_len 4"):
        cache.check(2)
    with pytest.raises(ValueError, match="room for 5 tokens of sequence 0, got max_len 4"):
        cache.check(jnp.array([4, 0]))

    def past(cache):  # where lengths can't be read, nothing is written past the end, nor anywhere else
        new = jnp.ones((2, 2, 2, 8))
        return write(cache, 0, new, new, jnp.ones((2, 2), bool))[1]

    written = jax.jit(past)(cache)
    np.testing.assert_array_equal(kept(written, 0)[:, 0, :4, 0], [[0, 1, 1, 0], [0, 0, 0, 1]])
    assert not kept(written, 0)[:, :, 4:].any()


def test_sizes_and_dtypes_are_checked():
    for batch, max_len, name in ((0, 4, "batch"), (2, 0, "max_len")):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            KVCache.empty(CONFIG, batch, max_len)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16 or int8, got int32"):
        KVCache.empty(CONFIG, 1, 4, jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("window", [None, 16])
def test_a_donated_cache_is_written_in_place(dtype, window):
    config = ModelConfig(**SIZES, model_type="mistral", sliding_window=window)
    cache = KVCache.empty(config, 2, 64, dtype)

    def steps(cache):
        def step(_, cache):
            new = jnp.ones((2, 1, 2, 8)) * cache.lengths[0]
            for layer in range(2):
                (out, _), cache = write(cache, layer, new, new, jnp.ones((2, 1), bool))
                new = new + out[:, :, :2]
            return cache.advance(jnp.ones(2, jnp.int32))

        return jax.lax.fori_loop(0, 5, step, cache)

    where = [array.unsafe_buffer_pointer() for array in (*cache.keys, *cache.values)]
    compiled = jax.jit(steps, donate_argnums=0).lower(cache).compile()
    size = str(cache.keys[0].shape).strip("()").replace(" ", "")
    kind = {"float32": "f32", "int8": "s8"}[cache.keys[0].dtype.name]
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line and f"{kind}[{size}]" in line]
    assert not copies
    after = compiled(cache)
    assert [array.unsafe_buffer_pointer() for array in (*after.keys, *after.values)] == where
    assert cache.keys[0].is_deleted()
