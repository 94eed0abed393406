"""Dilated attention against one dense softmax over a multiset of keys, float64, with exact gradients."""

from __future__ import annotations

import itertools
import subprocess
import sys

import dilated_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from heddle import Mask, attend, merge
from heddle.attention import dilated as core
from heddle.attention.dilated import dilated_attention
from heddle.attention.dilated_patterns import cache_length, causal_pairs, check_patterns, decode_slot
from heddle.attention.reference import reference_backward

PAPER = (8, 16, 24, 32, 48), (1, 2, 4, 6, 12)  # w % r != 0 in two patterns; at 12 heads, H % 5 != 0
PATTERNS = {
    "paper": PAPER,
    "one, dense": ((8,), (1,)),
    "one, dilated": ((12,), (3,)),
    "w % r": ((7, 10), (2, 3)),
    "w < r": ((3, 5), (5, 1)),
    "rows uncovered": ((9, 20), (4, 8)),
    "w > N": ((100, 8), (3, 2)),
    "same twice": ((8, 8), (2, 2)),
}


def documents(*lengths):
    return np.concatenate([np.full(abs(n), i if n > 0 else -1) for i, n in enumerate(lengths)])


PACKED = np.stack([documents(11, 3, 14, -2), documents(1, 28, 1)])
PADDED = np.zeros((2, 30), bool)
PADDED[0, 25:] = PADDED[1, :4] = PADDED[1, 17] = True
TOKENS = {
    "plain": {},
    "documents": {"segment_ids": PACKED},
    "padding": {"key_padding_mask": PADDED},
    "documents, padding": {"segment_ids": PACKED, "key_padding_mask": PADDED},
}
HEADS = {"plain": (4, 4), "grouped": (4, 2), "one key head": (3, 1)}


def problem(heads, kv_heads, seq, patterns, seed=0, **kwargs):
    """Arrays, and what the oracle makes of them, with gradients."""
    rng = np.random.default_rng(seed)
    query, d_out = rng.normal(size=(2, 2, seq, heads, 4))
    key, value = rng.normal(size=(2, 2, seq, kv_heads, 4))
    _, lse = oracle.dilated(query, key, value, *patterns, **kwargs)
    d_lse = np.where(np.isfinite(lse), rng.normal(size=lse.shape), 0.0)
    want = oracle.dilated(query, key, value, *patterns, **kwargs, d_out=d_out, d_lse=d_lse)
    return (query, key, value), (d_out, d_lse), want


def torch_gradients(arrays, d_results, patterns, **kwargs):
    tensors = [torch.from_numpy(x).requires_grad_() for x in arrays]
    kwargs = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in kwargs.items()}
    out, lse = dilated_attention(*tensors, *patterns, return_lse=True, **kwargs)
    grads = torch.autograd.grad((out, lse), tensors, [torch.from_numpy(d) for d in d_results])
    return [x.detach().numpy() for x in (out, lse, *grads)]


def alike(got, want, atol=1e-10):
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=name)


CASES = [
    *itertools.product(PATTERNS, HEADS, ["plain"], [False, True], [30]),
    *itertools.product(["paper", "w % r", "rows uncovered"], ["plain", "grouped"], TOKENS, [False, True], [30]),
    *itertools.product(["w % r", "w < r", "w > N"], ["plain"], ["plain"], [False, True], [1, 7, 20, 21, 31]),
]
CASES = list(dict.fromkeys(CASES))


@pytest.mark.parametrize(("patterns", "heads", "tokens", "is_causal", "seq"), CASES)
def test_equals_one_softmax_over_the_multiset(patterns, heads, tokens, is_causal, seq):
    patterns, kwargs = PATTERNS[patterns], dict(TOKENS[tokens], is_causal=is_causal)
    arrays, d_results, want = problem(*HEADS[heads], seq, patterns, **kwargs)
    alike(dilated_attention(*arrays, *patterns, return_lse=True, **kwargs), want)
    alike(torch_gradients(arrays, d_results, patterns, implementation="reference", **kwargs), want)


def test_there_are_cases_enough():
    assert len(CASES) >= 80


@pytest.mark.parametrize("tokens", ["plain", "documents, padding"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (12, 4), (5, 5)])
def test_twelve_heads_and_five_patterns(heads, kv_heads, is_causal, tokens):
    """H % 5 != 0: no head is left at zero. By the implementations that torch picks by itself."""
    seq = 30 if tokens != "plain" else 70
    kwargs = dict(TOKENS[tokens], is_causal=is_causal)
    arrays, d_results, want = problem(heads, kv_heads, seq, PAPER, **kwargs)
    got = torch_gradients(arrays, d_results, PAPER, **kwargs)
    alike(got, want)
    assert np.abs(got[0]).max((0, 1, 3)).min() > 0


@pytest.mark.parametrize("limit", [1, 250, 500])
@pytest.mark.parametrize("kv_heads", [12, 6, 2])
def test_a_few_heads_at_a_time(limit, kv_heads, monkeypatch):
    monkeypatch.setattr(core, "AT_ONCE", limit)
    arrays, d_results, want = problem(12, kv_heads, 30, PAPER, is_causal=True)
    alike(torch_gradients(arrays, d_results, PAPER, is_causal=True, implementation="reference"), want)


@pytest.mark.parametrize("tokens", ["plain", "documents, padding"])
@pytest.mark.parametrize(("patterns", "is_causal"), [("w % r", True)])
def test_jax_under_jit(patterns, is_causal, tokens):
    patterns, kwargs = PATTERNS[patterns], dict(TOKENS[tokens], is_causal=is_causal)
    arrays, (d_out, d_lse), want = problem(4, 2, 30, patterns, **kwargs)
    static = {"is_causal": kwargs.pop("is_causal"), "return_lse": True, "implementation": "reference"}

    @jax.jit
    def results(arrays, tokens):
        both, pull = jax.vjp(lambda *x: dilated_attention(*x, *patterns, **tokens, **static), *arrays)
        return *both, *pull((jnp.asarray(d_out), jnp.asarray(d_lse)))

    with jax.enable_x64(True):
        alike(results([jnp.asarray(x) for x in arrays], {k: jnp.asarray(v) for k, v in kwargs.items()}), want)


@pytest.mark.parametrize(
    ("framework", "tokens", "with_d_lse"),
    [
        ("numpy", "plain", True), ("numpy", "documents, padding", False), ("torch", "documents, padding", True),
        ("torch", "plain", False),
    ],
)  # fmt: skip
def test_gradients_from_the_merged_output_alone(framework, tokens, with_d_lse):
    """``dilated_backward``, which keeps no pattern's own output."""
    lists = PATTERNS["w % r"]
    arrays, (d_out, d_lse), want = problem(4, 2, 30, lists, is_causal=True, **TOKENS[tokens])
    if not with_d_lse:
        want = oracle.dilated(*arrays, *lists, True, **TOKENS[tokens], d_out=d_out, d_lse=0 * d_lse)

    def backward(query, key, value, mask, out, lse, d_out, d_lse):
        d_lse = 0 * d_out[..., 0] if d_lse is None else d_lse
        return reference_backward(query, key, value, mask, 0.5, out, lse, d_out, d_lse)

    def gradients(arrays, places, results):
        return core.dilated_backward(*arrays, check_patterns(*lists), True, *places, *results, backward=backward)

    to = {"numpy": np.asarray, "torch": torch.from_numpy}[framework]
    places = [to(TOKENS[tokens][x]) if x in TOKENS[tokens] else None for x in ("segment_ids", "key_padding_mask")]
    results = [*map(to, (*want[:2], d_out)), to(d_lse) if with_d_lse else None]
    alike([*want[:2], *map(np.asarray, gradients([to(x) for x in arrays], places, results))], want)


# ---------------------------------------------------------------- faults of public code


@pytest.mark.parametrize("tokens", [{}, {"segment_ids": np.zeros((2, 33), int)}])
def test_nothing_leaks_from_the_future(tokens):
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(3, 2, 33, 4, 8))
    moved = arrays.copy()
    moved[:, :, -1] += 1.0
    before, after = (dilated_attention(*x, *PAPER, is_causal=True, **tokens) for x in (arrays, moved))
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
    assert (before[:, -1] != after[:, -1]).any()


def test_a_document_is_as_alone():
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(3, 2, 30, 4, 8))
    out, lse = dilated_attention(*arrays, *PAPER, segment_ids=PACKED, return_lse=True)
    for row in range(2):
        for document in set(PACKED[row]) - {-1}:
            where = PACKED[row] == document
            alone = dilated_attention(*arrays[:, row : row + 1, where], *PAPER, return_lse=True)
            np.testing.assert_allclose(out[row, where], alone[0][0], rtol=0, atol=1e-12)
            np.testing.assert_allclose(lse[row, where], alone[1][0], rtol=0, atol=1e-12)
    assert (out[PACKED == -1] == 0).all()
    assert (lse[PACKED == -1] == -np.inf).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_is_as_if_it_were_not_there(is_causal):
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(3, 2, 30, 4, 8))
    out = dilated_attention(*arrays, *PAPER, is_causal=is_causal, key_padding_mask=PADDED)
    for row in range(2):
        alone = dilated_attention(*arrays[:, row : row + 1, ~PADDED[row]], *PAPER, is_causal=is_causal)
        np.testing.assert_allclose(out[row, ~PADDED[row]], alone[0], rtol=0, atol=1e-12)
    assert (out[PADDED] == 0).all()


def test_a_short_last_segment_sees_no_zeros():
    """Ragged and not causal: with values of one, every row a pattern keeps is one."""
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 29, 4, 8))
    out = dilated_attention(query, key, np.ones_like(query), *PAPER)
    np.testing.assert_allclose(out, 1.0, rtol=1e-12)


def test_lists_that_are_swapped_differ():
    """The first list is of lengths: (8, 1) is plain attention within 8, its swap keeps one token of each."""
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 1, 16, 1, 8))
    np.testing.assert_allclose(
        dilated_attention(query, key, value, [8], [1]),
        np.concatenate([attend(query[:, h], key[:, h], value[:, h]) for h in (slice(8), slice(8, 16))], axis=1),
        rtol=1e-12,
    )
    np.testing.assert_allclose(dilated_attention(query, key, value, [1], [8]), value, rtol=1e-12)


# ---------------------------------------------------------------- dtypes, frameworks, errors


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_dtypes(dtype, tolerance):
    arrays, _, want = problem(4, 2, 30, PAPER, is_causal=True)
    tensors = [torch.from_numpy(x).to(dtype) for x in arrays]
    out, lse = dilated_attention(*tensors, *PAPER, is_causal=True, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    np.testing.assert_allclose(out.float(), want[0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse, want[1], rtol=0, atol=tolerance)


def test_jax_in_float32_by_its_own_implementation():
    arrays, _, want = problem(4, 2, 24, ((8, 12), (1, 3)), is_causal=True)
    run = jax.jit(lambda *x: dilated_attention(*x, (8, 12), (1, 3), is_causal=True))
    np.testing.assert_allclose(run(*(jnp.asarray(x, jnp.float32) for x in arrays)), want[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "rates", "message"),
    [
        ([4, 8], [1], "segment_lengths and dilation_rates must be of one length, got 2 and 1"),
        ([], [], r"segment_lengths must hold positive integers, at least one, got \[\]"),
        ([4], [0], r"dilation_rates must hold positive integers, at least one, got \[0\]"),
        ([-4], [1], r"segment_lengths must hold positive integers, at least one, got \[-4\]"),
        ([4.5], [1], r"segment_lengths must be a list of positive integers, got \[4.5\]"),
        (4, [1], "segment_lengths must be a list of positive integers, got 4"),
    ],
)
def test_patterns_that_cannot_be(lengths, rates, message, unhooked):
    x = np.zeros((1, 8, 2, 4))
    with pytest.raises(ValueError, match=message):
        dilated_attention(x, x, x, lengths, rates)


def test_arrays_that_cannot_be(unhooked):
    x = np.zeros((1, 8, 2, 4))
    for arguments, kwargs, message in [
        ((x, x[:, :6], x[:, :6]), {}, "query and key must have one length, got 8 and 6"),
        ((x, x, x[..., 0]), {}, r"value must have shape \(batch, seq, heads, head_dim\)"),
        ((x.astype(int), x, x), {}, "query must be floating point, got int64"),
        ((x, x, x), {"segment_ids": np.zeros((1, 7), int)}, r"segment_ids must be integers of shape \(1, 8\)"),
        ((x, x, x), {"key_padding_mask": np.zeros((1, 8))}, r"key_padding_mask must be booleans of shape \(1, 8\)"),
        ((x, x, x), {"segment_ids": np.array([[0, 0, 1, 1, 0, 0, 2, 2]])}, "segment id 0 goes from key 1 to key 4"),
        ((x, x, x), {"scale": float("nan")}, "scale must be a finite number"),
    ]:
        with pytest.raises(ValueError, match=message):
            dilated_attention(*arguments, [4], [2], **kwargs)


@pytest.mark.slow
def test_compiled_with_gradients():
    program = """if True:
        import torch
        from heddle.attention.dilated import dilated_attention

        def loss(q, k, v, ids, padding):
            lists = (4, 9, 12), (1, 2, 5)
            plain = dilated_attention(q, k, v, *lists, is_causal=True)
            packed = dilated_attention(q, k, v, *lists, segment_ids=ids, key_padding_mask=padding)
            return (plain ** 2).sum() + (packed ** 3).sum()

        torch.manual_seed(0)
        arrays = [torch.randn(s, requires_grad=True) for s in [(2, 22, 4, 8), (2, 22, 2, 8), (2, 22, 2, 8)]]
        ids = torch.tensor([[0] * 9 + [1] * 10 + [-1] * 3, [5] * 22])
        padding = torch.arange(22)[None] < torch.tensor([[0], [3]])
        want = loss(*arrays, ids, padding)
        want.backward()
        grads = [a.grad.clone() for a in arrays]
        for a in arrays:
            a.grad = None
        got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arrays, ids, padding)
        got.backward()
        torch.testing.assert_close(got, want)
        for a, grad in zip(arrays, grads):
            torch.testing.assert_close(a.grad, grad, rtol=1e-4, atol=1e-5)
        print("same")
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"


# ---------------------------------------------------------------- decoding


def test_decoding_equals_the_whole_past_many_segments():
    """A cache of ceil(w / r) slots a pattern and head, written and read as ``decode_slot`` says."""
    lists, heads, seq = ((4, 7, 12), (1, 2, 5)), 6, 50  # at least four segments of each pattern
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 2, seq, heads, 8))
    want = dilated_attention(query, key, value, *lists, is_causal=True)
    caches = [np.zeros((2, 2, -(-w // r), heads, 8)) for w, r in zip(*lists)]
    assert sum(cache.shape[2] for cache in caches) == cache_length(*lists)
    rows = np.arange(2)
    for step in range(seq + 3):
        position = np.array([min(step, seq - 1), max(step - 3, 0)])  # the second sequence comes later; either may wait
        parts = []
        for cache, pattern in zip(caches, check_patterns(*lists)):
            kept, slot = decode_slot(position, pattern, heads)
            for b in rows:
                for kv, x in enumerate((key, value)):
                    cache[kv, b, slot[b], kept[b]] = x[b, position[b], kept[b]]
            stop = np.where(kept, slot[:, None] + 1, 0).reshape(-1, 1)  # heads in the batch: each sees slots of its own
            asked = query[rows, position][:, None]
            by_head = [x.swapaxes(1, 2).reshape(2 * heads, -1, 1, 8) for x in (asked, *cache)]
            parts.append(attend(*by_head, Mask(0 * stop, stop), return_lse=True))
        out = merge(parts)[0].reshape(2, heads, 8)
        np.testing.assert_allclose(out, want[rows, position], rtol=0, atol=1e-12)


def test_the_papers_cache():
    assert cache_length((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)) == 11_606


@pytest.mark.parametrize("length", [1, 7, 40, 61])
@pytest.mark.parametrize("heads", [2, 6])
def test_causal_pairs(length, heads):
    lists = (4, 7, 12, 50), (1, 2, 5, 3)
    count = oracle.multiplicity([(0, i) for i in range(length)], heads, *lists, True)
    assert causal_pairs(length, check_patterns(*lists), heads) == count.sum()
