"""The oracle against the formula, and the door of ``attend``; implementations: tests/torch, tests/jax."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from attention_cases import CASES, IDS, oracle
from heddle import Mask, attend, implementations
from heddle.attention.reference import reference_backward


def softmax_loops(case, arrays):
    """Attention one query at a time, by Python loops over heads: shares no code with the oracle."""
    q, k, v = (arrays[name].astype(np.float64) for name in ("query", "key", "value"))
    mask = case.mask()
    seen = np.ones((1, case.q_len, case.kv_len), bool) if mask is None else np.asarray(mask.dense(case.kv_len))
    out, lse = np.zeros((*q.shape[:3], v.shape[-1])), np.full(q.shape[:3], -np.inf)
    scale = 1 / np.sqrt(case.dim) if case.scale is None else case.scale
    for b, i, h in np.ndindex(*q.shape[:3]):
        keys = np.flatnonzero(seen[b % seen.shape[0], i])
        if keys.size:
            kv_head = h * case.kv_heads // case.heads
            weights = np.exp(scale * k[b, keys, kv_head] @ q[b, i, h])
            out[b, i, h] = weights @ v[b, keys, kv_head] / weights.sum()
            lse[b, i, h] = np.log(weights.sum())
    return out, lse


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_oracle_is_the_formula(case):
    arrays = case.arrays()
    expected, got = softmax_loops(case, arrays), oracle(case, arrays)
    np.testing.assert_allclose(got["out"], expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(got["lse"], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["grouped-query-documents", "window-with-sinks", "decode-of-an-empty-sequence"])
def test_the_oracles_gradients_are_finite_differences(name):
    case = CASES[IDS.index(name)]
    arrays = case.arrays(dtype=np.float64)

    def loss(q, k, v):
        out, lse = attend(q, k, v, case.mask(), scale=case.scale, return_lse=True)
        return (out * arrays["d_out"]).sum() + (np.where(np.isfinite(lse), lse, 0) * arrays["d_lse"]).sum()

    expected = oracle(case, arrays)
    inputs = [arrays[n] for n in ("query", "key", "value")]
    rng = np.random.default_rng(1)
    for i, gradient in enumerate(("dq", "dk", "dv")):
        direction = rng.standard_normal(inputs[i].shape)
        ends = [loss(*(x + step * direction if j == i else x for j, x in enumerate(inputs))) for step in (1e-6, -1e-6)]
        np.testing.assert_allclose((expected[gradient] * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_references_backward_is_the_oracles(case):
    arrays = case.arrays(dtype=np.float64)
    expected, mask = oracle(case, arrays), case.mask() or Mask.full(case.q_len, case.kv_len)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    inputs = [arrays[name] for name in ("query", "key", "value")]
    got = reference_backward(*inputs, mask, scale, expected["out"], expected["lse"], arrays["d_out"], arrays["d_lse"])
    for name, gradient in zip(("dq", "dk", "dv"), got):
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-11)


def qkv(**shapes):
    default = {"query": (1, 4, 2, 8), "key": (1, 6, 2, 8), "value": (1, 6, 2, 8)}
    return [np.zeros(shapes.get(name, shape), np.float32) for name, shape in default.items()]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (qkv(query=(4, 2, 8)), r"query must have shape \(batch, seq, heads, head_dim\), got \(4, 2, 8\)"),
        (qkv(key=(1, 6, 3, 8), value=(1, 6, 3, 8)), "multiple of key's, got 2 and 3"),
        (qkv(query=(2, 4, 2, 8)), "one batch size, got 2 and 1"),
        (qkv(query=(1, 4, 2, 16)), "one head_dim, got 16 and 8"),
        (qkv(value=(1, 5, 2, 8)), "key and value must agree"),
        (qkv(query=(1, 0, 2, 8)), "query must have no empty axis"),
        ([np.zeros((1, 4, 2, 8), np.int32)] * 3, "query must be floating point, got int32"),
        ([*qkv()[:2], qkv()[2].astype(np.float64)], "value must have query's dtype float32, got float64"),
        ([qkv()[0], *map(torch.as_tensor, qkv()[1:])], "key must be a numpy array as query is, got Tensor"),
        ([[[0.0]]] * 3, "expected a NumPy array, a torch tensor or a JAX array; got list"),
    ],
)
@pytest.mark.usefixtures("unhooked")
def test_arguments_are_checked_at_the_door(arrays, message):
    with pytest.raises(ValueError, match=message):
        attend(*arrays)


@pytest.mark.usefixtures("unhooked")
def test_options_are_checked_at_the_door():
    arrays = qkv()
    with pytest.raises(ValueError, match="mask must have query's q_len 4, got 5"):
        attend(*arrays, Mask.causal(5))
    with pytest.raises(ValueError, match="mask must have 1 row or query's batch size 1, got 3"):
        attend(*arrays, Mask.lengths(np.array([1, 2, 3]), 4))
    with pytest.raises(ValueError, match=r"mask must be a heddle\.Mask or None, got ndarray"):
        attend(*arrays, np.ones((4, 6)))
    with pytest.raises(ValueError, match="scale must be a finite number, got nan"):
        attend(*arrays, scale=float("nan"))
    with pytest.raises(ValueError, match="implementation must be one of reference for numpy arrays, got 'triton'"):
        attend(*arrays, implementation="triton")


def test_implementations_are_listed_in_order_with_reasons():
    for convert, first in ((np.asarray, "reference"), (torch.as_tensor, "sdpa"), (jnp.asarray, "xla")):
        table = implementations(*map(convert, qkv()))
        assert table["reference"] is None
        assert next(name for name, why in table.items() if why is None) == first


def test_a_mask_of_another_framework_is_taken_along():
    arrays, mask = qkv(), Mask.causal(4, 6)
    expected = attend(*arrays, mask)
    for convert in (torch.as_tensor, jnp.asarray):
        np.testing.assert_allclose(attend(*map(convert, arrays), mask, implementation="reference"), expected)
    on_jax = mask.on(jnp.zeros(1))
    np.testing.assert_allclose(attend(*map(torch.as_tensor, arrays), on_jax, implementation="reference"), expected)
