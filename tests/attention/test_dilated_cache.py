"""Decoding with dilated attention: token by token it is what it is at once, from a cache of bounded size."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import dilated_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from heddle.attention.dilated import dilated_attention
from heddle.attention.dilated_cache import DilatedCache, dilated_cached, dilated_decode, dilated_prefill, empty_cache
from heddle.attention.dilated_patterns import cache_length

PATTERNS = {
    "three": ((4, 7, 12), (1, 2, 5)),
    "w < r, rows uncovered": ((3, 9), (5, 4)),
    "dense": ((6,), (1,)),
}
HEADS = {
    "plain": (6, 6), "fewer than r": (2, 2), "grouped": (6, 3), "groups over all offsets": (4, 1),
    "groups over some": (10, 2),
}  # fmt: skip
TO = {"numpy": np.asarray, "torch": torch.from_numpy, "jax": jnp.asarray}
SEQ = 50  # past four segments of each pattern


def arrays(heads, kv_heads, seq=SEQ, batch=2):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, seq, n, d)) for n, d in ((heads, 8), (kv_heads, 8), (kv_heads, 5))]


def steps(inputs, cache, lists, positions, decode=dilated_decode):
    """Each sequence's own next token a step, from ``positions`` on, as far as all go."""
    outs, rows = [], np.arange(len(positions))
    for step in range(inputs[0].shape[1] - max(positions)):
        at = rows, np.asarray(positions) + step
        out, cache = decode(*(x[at][:, None] for x in inputs), cache, *lists)
        outs.append(np.asarray(out))
    return np.concatenate(outs, axis=1), cache


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("patterns", "heads"),
    [*(("three", heads) for heads in HEADS), ("w < r, rows uncovered", "grouped"), ("dense", "fewer than r")],
)
def test_token_by_token_is_all_at_once(patterns, heads):
    lists, inputs = PATTERNS[patterns], arrays(*HEADS[heads])
    want, _ = oracle.dilated(*inputs, *lists, True)
    got, cache = steps(inputs, empty_cache(*inputs, *lists), lists, [0, 0])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    assert (cache.lengths == SEQ).all()


@partial(jax.jit, static_argnums=(4, 5), donate_argnums=3)
def jitted_decode(*arguments):
    TRACED.append(arguments)
    return dilated_decode(*arguments)


TRACED = []
FUNCTIONS = {name: (dilated_prefill, dilated_decode) for name in ("numpy", "torch")} | {
    "jax": (jax.jit(partial(dilated_prefill, implementation="reference"), static_argnums=(3, 4)), jitted_decode)
}


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_frameworks(framework):
    """Under jit one program serves every step."""
    lists, inputs = PATTERNS["three"], arrays(10, 2)
    want = dilated_attention(*inputs, *lists, is_causal=True)
    inputs = [TO[framework](x) for x in inputs]
    jitted_decode.clear_cache()
    TRACED.clear()
    got, cache = steps(inputs, empty_cache(*inputs, *lists), lists, [0, 0], FUNCTIONS[framework][1])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    assert len(TRACED) == (framework == "jax")
    assert {type(x) for x in (*cache.keys, *cache.values, cache.lengths)} == {type(inputs[0])}


@pytest.mark.parametrize(
    ("framework", "heads"), [("numpy", "plain"), ("torch", "grouped"), ("jax", "groups over some")]
)
@pytest.mark.parametrize("lengths", [(1, 24), (12, 31), (0, 28), (35, 35)])
def test_from_ragged_prompts_each_sequence_is_as_alone(framework, heads, lengths):
    """Whole prompts at once, right-padded, and on from where each ends."""
    lists, inputs = PATTERNS["three"], arrays(*HEADS[heads])
    want = dilated_attention(*inputs, *lists, is_causal=True)
    inputs, (prefill, decode) = [TO[framework](x) for x in inputs], FUNCTIONS[framework]
    prompts = [x[:, :35] for x in inputs]
    out, cache = prefill(*prompts, *lists, lengths=TO[framework](np.array(lengths)))
    got, _ = steps(inputs, cache, lists, lengths, decode)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(out[row, :length], want[row, :length], rtol=0, atol=1e-10)
        assert not np.asarray(out)[row, length:].any()
        np.testing.assert_allclose(got[row], want[row, length : length + got.shape[1]], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("framework", "patterns", "heads", "parts"),
    [
        *(("numpy", "three", heads, (1, 13, 2, 9)) for heads in HEADS),
        ("numpy", "w < r, rows uncovered", "grouped", (5, 5, 5)),
        ("torch", "three", "groups over some", (30, 11)),
        ("jax", "three", "groups over some", (7, 7)),
    ],
)
def test_a_prompt_by_parts_is_it_at_once(framework, patterns, heads, parts):
    """Parts of any size, each row's ragged, on a cache that isn't empty; then token by token."""
    lists, inputs = PATTERNS[patterns], arrays(*HEADS[heads])
    want = dilated_attention(*inputs, *lists, is_causal=True)
    inputs, (prefill, decode) = [TO[framework](x) for x in inputs], FUNCTIONS[framework]
    cache, held, rng = empty_cache(*inputs, *lists), np.zeros(2, int), np.random.default_rng(1)
    for part in parts:
        lengths = np.array([part, rng.integers(part + 1)])
        at = np.arange(2)[:, None], np.minimum(held[:, None] + np.arange(part), SEQ - 1)
        out, cache = prefill(*(x[at] for x in inputs), *lists, lengths=TO[framework](lengths), cache=cache)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(out[row, :n], want[row, held[row] : held[row] + n], rtol=0, atol=1e-10)
            assert not np.asarray(out)[row, n:].any()
        held += lengths
        np.testing.assert_array_equal(cache.lengths, held)
    got, _ = steps(inputs, cache, lists, held, decode)
    for row, n in enumerate(held):
        np.testing.assert_allclose(got[row], want[row, n : n + got.shape[1]], rtol=0, atol=1e-10)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_whatever_comes_next_with_its_lse(framework):
    """Several tokens, one, or none of a row, on from where it is."""
    lists, inputs = PATTERNS["w < r, rows uncovered"], arrays(10, 2)
    want = dilated_attention(*inputs, *lists, is_causal=True, return_lse=True)
    inputs = [TO[framework](x) for x in inputs]
    cache, at = empty_cache(*inputs, *lists), np.zeros(2, int)
    for new in ([7, 3], [1, 1], [0, 1], [1, 0], [9, 6], [1, 1], [20, 0], [2, 9]):
        size = max(new)
        index = np.minimum(at[:, None] + np.arange(size), SEQ - 1)
        rows = TO[framework](np.arange(2)[:, None]), TO[framework](index)
        given = None if min(new) == size else TO[framework](np.array(new))
        (out, lse), cache = dilated_cached(*(x[rows] for x in inputs), cache, *lists, lengths=given)
        for row, n in enumerate(new):
            now = slice(at[row], at[row] + n)
            np.testing.assert_allclose(out[row, :n], want[0][row, now], rtol=0, atol=1e-10)
            np.testing.assert_allclose(lse[row, :n], want[1][row, now], rtol=0, atol=1e-10)
            assert not np.asarray(out)[row, n:].any()
            assert (np.asarray(lse)[row, n:] == -np.inf).all()
        at += new
        assert (np.asarray(cache.lengths) == at).all()


def test_a_cache_of_less_precision():
    lists, inputs = PATTERNS["three"], [jnp.asarray(x, jnp.float32) for x in arrays(6, 3, seq=30)]
    kept = [inputs[0], *(x.astype(jnp.bfloat16).astype(jnp.float32) for x in inputs[1:])]
    cache = empty_cache(*inputs, *lists)
    cache = DilatedCache(*(tuple(x.astype(jnp.bfloat16) for x in part) for part in cache[:2]), cache.lengths)
    want = jax.jit(lambda *inputs: dilated_attention(*inputs, *lists, is_causal=True))(*kept)
    step = jax.jit(lambda *arguments: dilated_cached(*arguments, *lists))
    for now in (slice(0, 11), slice(11, 12), slice(12, 30)):
        (out, _), cache = step(*(x[:, now] for x in kept), cache)
        np.testing.assert_allclose(out, want[:, now], rtol=0, atol=1e-5)
    assert {x.dtype for x in (*cache.keys, *cache.values)} == {jnp.dtype("bfloat16")}


def test_a_prompt_leaves_what_its_tokens_would():
    lists, inputs = PATTERNS["three"], arrays(6, 3, seq=29)
    _, at_once = dilated_prefill(*inputs, *lists)
    _, one_by_one = steps(inputs, empty_cache(*inputs, *lists), lists, [0, 0])
    assert (at_once.lengths == one_by_one.lengths).all()
    for pattern, both in enumerate(zip(at_once.keys, one_by_one.keys)):
        visible = both[0] != 0  # in the other, slots that nobody sees any more keep what they held
        assert visible.any() == (29 % lists[0][pattern] > 0)
        np.testing.assert_array_equal(*(x[visible] for x in both))


def test_size():
    """The paper's: 11,606 keys a head where plain attention holds 32,768. Shared by heads that see the same."""
    lists = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)
    for heads, kv_heads, most in ((12, 12, 11_606), (12, 4, 11_606), (12, 1, 11_606)):
        query, key = np.empty((1, 1, heads, 1), np.float32), np.empty((1, 1, kv_heads, 1), np.float32)
        cache = empty_cache(query, key, key, *lists)
        size = sum(keys.size for keys in cache.keys)
        assert [v.shape for v in cache.values] == [k.shape for k in cache.keys]
        assert cache_length(*lists) == most
        assert size <= heads * most
        if heads == kv_heads:
            assert size == heads * most
    assert size == 2048 + 2 * 2048 + 4 * 2048 + 6 * 2731 + 12 * 2731  # one key head: a ring for each offset


def test_low_precision():
    lists, inputs = PATTERNS["three"], [torch.from_numpy(x).bfloat16() for x in arrays(6, 6, seq=26)]
    want = dilated_attention(*(x.double() for x in inputs), *lists, is_causal=True)
    outs, cache = [], empty_cache(*inputs, *lists)
    for t in range(26):
        out, cache = dilated_decode(*(x[:, t : t + 1] for x in inputs), cache, *lists)
        assert out.dtype == torch.bfloat16
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1).double(), want, rtol=0, atol=3e-2)
    assert {x.dtype for x in (*cache.keys, *cache.values)} == {torch.bfloat16}


def test_what_cannot_be(unhooked):
    lists, inputs = PATTERNS["three"], arrays(6, 6, seq=4)
    one, cache = [x[:, :1] for x in inputs], empty_cache(*inputs, *lists)
    whole = DilatedCache(*(tuple(x.astype(np.int8) for x in part) for part in cache[:2]), cache.lengths)
    for run, message in [
        (lambda: dilated_decode(*inputs, cache, *lists), "query and key must hold one token, got 4 and 4"),
        (lambda: dilated_decode(*one, cache, [4, 7], [1, 2]), r"cache must hold keys of shapes \[\(2, 6, 4, 8\), \(2"),
        (lambda: dilated_decode(*one, whole, *lists), r"floating point \(numpy\), got .* of int8 \(numpy\)"),
        (lambda: dilated_decode(*one, cache, [4], [0]), "dilation_rates must hold positive integers"),
        (lambda: dilated_decode(*one, cache, *lists, scale=float("inf")), "scale must be a finite number"),
        (lambda: dilated_prefill(*inputs, *lists, lengths=np.array([1])), r"lengths must be integers of shape \(2,\)"),
        (lambda: dilated_prefill(*inputs, *lists, lengths=np.array([1, 5])), "between 0 and query's 4 tokens, got 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            run()


@pytest.mark.slow
def test_compiled_once():
    program = """if True:
        import torch
        from heddle.attention.dilated import dilated_attention
        from heddle.attention.dilated_cache import dilated_decode, dilated_prefill

        lists = (4, 7, 12), (1, 2, 5)
        torch.manual_seed(0)
        inputs = [torch.randn(2, 40, n, 8) for n in (6, 3, 3)]
        want = dilated_attention(*inputs, *lists, is_causal=True)
        compiled = []

        def backend(module, example):
            compiled.append(1)
            return module

        step = torch.compile(lambda *x: dilated_decode(*x, *lists), fullgraph=True, backend=backend)
        with torch.no_grad():
            _, cache = dilated_prefill(*(x[:, :9] for x in inputs), *lists)
            for t in range(9, 40):
                out, cache = step(*(x[:, t : t + 1] for x in inputs), cache)
                torch.testing.assert_close(out, want[:, t : t + 1])
        print(len(compiled))
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"
