import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heddle import Mask, attend, merge


def parts_of(rng, shape=(2, 5, 3, 4), n=3):
    return [(rng.standard_normal(shape), rng.standard_normal(shape[:-1]) * 5) for _ in range(n)]


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 12), min_size=1, max_size=3))
def test_merge_of_key_sets_is_attention_over_their_union(seed, cuts):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, 6, 2, 4)), *(rng.standard_normal((1, 12, 2, 4)) for _ in range(2)))
    edges = np.unique([0, *cuts, 12])
    zero = np.zeros((1, 6), np.int64)
    parts = [attend(q, k, v, Mask(zero + a, zero + b), return_lse=True) for a, b in zip(edges, edges[1:])]
    out, lse = merge(parts)
    expected, expected_lse = attend(q, k, v, return_lse=True)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-12)


def test_a_key_in_two_parts_counts_twice():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 4, 1, 3)) for _ in range(3))
    part = attend(q, k, v, return_lse=True)
    first = attend(q, k[:, :2], v[:, :2], return_lse=True)
    out, _ = merge([part, first])
    doubled = attend(q, np.concatenate([k, k[:, :2]], 1), np.concatenate([v, v[:, :2]], 1))
    np.testing.assert_allclose(out, doubled, rtol=0, atol=1e-12)


def test_empty_rows_take_the_other_part_and_stay_empty_in_all():
    rng = np.random.default_rng(0)
    (a, a_lse), (b, b_lse) = parts_of(rng, n=2)
    a, a_lse = a.copy(), a_lse.copy()
    a[0], a_lse[0] = 0, -np.inf
    b[0, 0], b_lse[0, 0] = 0, -np.inf
    out, lse = merge([(a, a_lse), (b, b_lse)])
    np.testing.assert_array_equal(out[0, 1:], b[0, 1:])
    np.testing.assert_array_equal(out[0, 0], 0)
    np.testing.assert_array_equal(lse[0, 0], -np.inf)
    assert np.isfinite(out).all()


def test_magnitudes_do_not_overflow():
    ones = np.ones((1, 1, 1, 2), np.float32)
    lse = np.full((1, 1, 1), 3e4, np.float32)
    out, total = merge([(ones, lse), (3 * ones, lse)])
    np.testing.assert_allclose(out, 2 * ones)
    np.testing.assert_allclose(total, lse + np.log(2), rtol=1e-6)


def test_dtypes():
    out = torch.ones(1, 2, 1, 4, dtype=torch.bfloat16)
    lse = torch.zeros(1, 2, 1)
    merged, total = merge([(out, lse), (out, lse)])
    assert merged.dtype == torch.bfloat16
    assert total.dtype == torch.float32


def test_gradients_in_both_frameworks_equal_finite_differences():
    rng = np.random.default_rng(0)
    parts = parts_of(rng, shape=(1, 2, 1, 3), n=2)
    parts[0][0][0, 0], parts[0][1][0, 0] = 0, -np.inf  # empty in one part: its lse's gradient is 0, not NaN
    cotangent, cotangent_lse = rng.standard_normal((1, 2, 1, 3)), rng.standard_normal((1, 2, 1))

    def loss(arrays, xp=np):
        out, lse = merge([(arrays[0], arrays[1]), (arrays[2], arrays[3])])
        return xp.sum(out * cotangent) + xp.sum(lse * cotangent_lse)

    arrays = [a for part in parts for a in part]
    expected = []
    for i, array in enumerate(arrays):
        gradient = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            if np.isfinite(array[index]):
                ends = []
                for step in (1e-6, -1e-6):
                    moved = [a.copy() for a in arrays]
                    moved[i][index] += step
                    ends.append(loss(moved))
                gradient[index] = (ends[0] - ends[1]) / 2e-6
        expected.append(gradient)

    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    out, lse = merge([(tensors[0], tensors[1]), (tensors[2], tensors[3])])
    ((out * torch.tensor(cotangent)).sum() + (lse * torch.tensor(cotangent_lse)).sum()).backward()
    with jax.enable_x64(True):
        jax_gradients = jax.jit(jax.grad(lambda arrays: loss(arrays, jnp)))([jnp.asarray(a) for a in arrays])
    for tensor, jax_gradient, gradient in zip(tensors, jax_gradients, expected):
        np.testing.assert_allclose(tensor.grad, gradient, rtol=0, atol=1e-8)
        np.testing.assert_allclose(jax_gradient, gradient, rtol=0, atol=1e-8)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_rows_empty_in_every_part_have_gradient_zero(framework):
    out, lse = np.zeros((1, 2, 1, 3), np.float32), np.full((1, 2, 1), -np.inf, np.float32)
    if framework == "torch":
        arrays = [torch.tensor(a, requires_grad=True) for a in (out, lse, out, lse)]
        merged, total = merge([(arrays[0], arrays[1]), (arrays[2], arrays[3])])
        (merged.sum() + torch.where(torch.isfinite(total), total, 0.0).sum()).backward()
        gradients = [a.grad for a in arrays]
    else:

        def loss(arrays):
            merged, total = merge([(arrays[0], arrays[1]), (arrays[2], arrays[3])])
            return merged.sum() + jnp.where(jnp.isfinite(total), total, 0.0).sum()

        gradients = jax.grad(loss)([jnp.asarray(a) for a in (out, lse, out, lse)])
    for gradient in gradients:
        np.testing.assert_array_equal(np.asarray(gradient), 0)


@pytest.mark.usefixtures("unhooked")
def test_errors():
    out, lse = np.zeros((1, 2, 1, 3)), np.zeros((1, 2, 1))
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    with pytest.raises(ValueError, match=r"parts\[1\] must hold out of shape \(1, 2, 1, 3\)"):
        merge([(out, lse), (out[:, :1], lse[:, :1])])
    with pytest.raises(ValueError, match=r"parts\[0\]"):
        merge([(out, lse[:, :1])])
