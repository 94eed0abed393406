"""Attention of and between replicas against one dense matrix over all of them, float64, with exact derivatives."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import parscale_oracle as oracle
import pytest
import torch

from heddle import Mask
from heddle.attention import replicas as core

SIZE = 8
CASES = {
    "own prefix": {"n": 3},
    "all prefixes": {"n": 3, "scope": "all"},
    "joint": {"cross": True},
    "joint, prefix": {"n": 5, "cross": True, "bias": True},
    "joint, all prefixes, replica rope": {"n": 2, "scope": "all", "cross": True, "bias": True, "theta": 50.0},
    "joint, two replicas": {"replicas": 2, "cross": True, "theta": 10.0},
    "joint, one replica": {"replicas": 1, "n": 2, "cross": True, "bias": True},
    "joint, padding by replica": {"n": 3, "cross": True, "bias": True, "padded": True},
    "joint, eight replicas, no groups": {"replicas": 8, "kv_heads": 4, "cross": True},
}


class Problem:
    """One case's arrays, by name, with the batch; what heddle computes from them; and what the oracle does."""

    def __init__(self, replicas=3, kv_heads=2, n=0, scope="own", cross=False, bias=False, theta=None, padded=False):
        self.replicas, self.scope, self.cross, self.theta = replicas, scope, cross, theta
        self.batch, self.length = 2, 5
        rng = np.random.default_rng(0)
        kv = (replicas, self.batch, self.length, kv_heads, SIZE)
        shapes = {"q": (replicas, self.batch, self.length, 4, SIZE), "k": kv, "v": kv}
        if n:
            shapes |= {"prefix_k": (replicas, kv_heads, n, SIZE), "prefix_v": (replicas, kv_heads, n, SIZE)}
        if bias:
            shapes["bias"] = (4,)
        self.arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        self.weights = rng.normal(size=(2, *shapes["q"]))  # of out and cross in the loss
        self.valid = np.ones((replicas, self.batch, self.length), bool)
        if padded:  # on the left, each replica of each sequence by another length
            for p in range(replicas):
                self.valid[p, 1, :p] = False
            self.weights = self.weights * self.valid[None, ..., None, None]
        self.sees = np.tril(np.ones((self.length, self.length), bool)) & self.valid[..., None, :]

    def rows(self, x):
        return x.reshape(-1, *x.shape[2:])

    def mask(self):
        stop = np.where(self.valid, np.arange(1, self.length + 1), 0)
        start = np.where(self.valid, self.length - self.valid.sum(-1, keepdims=True), 0)
        return Mask(self.rows(start).astype(np.int32), self.rows(stop).astype(np.int32))

    def ours(self, a, **kwargs):
        q, k, v = (self.rows(a[name]) for name in "qkv")
        return core.replica_attention(
            q, k, v, self.mask(), replicas=self.replicas,
            prefix=(a["prefix_k"], a["prefix_v"]) if "prefix_k" in a else None, prefix_scope=self.scope,
            current=(k, v) if self.cross else None, bias=a.get("bias"), replica_theta=self.theta, **kwargs,
        )  # fmt: skip

    def theirs(self, a):
        prefix = (a["prefix_k"], a["prefix_v"]) if "prefix_k" in a else None
        found = [
            oracle.attention(
                a["q"][:, b], a["k"][:, b], a["v"][:, b], self.sees[:, b], prefix=prefix, scope=self.scope,
                cross=self.cross, bias=a.get("bias"), theta=self.theta, valid=self.valid[:, b],
            )
            for b in range(self.batch)
        ]  # fmt: skip
        return [np.stack(x, 1) for x in zip(*found)]

    def loss(self, results):
        return sum((w * r).sum() for w, r in zip(self.weights, results) if r is not None)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_dense_matrix(name):
    problem = Problem(**CASES[name])
    out, apart = problem.theirs(problem.arrays)
    got, cross = problem.ours(problem.arrays)
    valid = problem.rows(problem.valid)
    np.testing.assert_allclose(got[valid], problem.rows(out)[valid], rtol=1e-10, atol=1e-12)
    assert (cross is None) == (not problem.cross)
    if cross is not None:
        np.testing.assert_allclose(cross[valid], problem.rows(apart)[valid], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if "padding" not in name])
def test_behind_a_cache(name):
    """The last queries over all keys: what is in front of a cache is a part of its own."""
    problem = Problem(**CASES[name])
    whole, whole_cross = problem.ours(problem.arrays)
    q, k, v = (problem.rows(problem.arrays[x]) for x in "qkv")
    for last in (1, 2):
        got, cross = core.replica_attention(
            q[:, -last:], k, v, Mask.causal(last, 5, offset=5 - last), replicas=problem.replicas,
            prefix=(problem.arrays["prefix_k"], problem.arrays["prefix_v"]) if "prefix_k" in problem.arrays else None,
            prefix_scope=problem.scope, current=(k[:, -last:], v[:, -last:]) if problem.cross else None,
            bias=problem.arrays.get("bias"), replica_theta=problem.theta,
        )  # fmt: skip
        np.testing.assert_allclose(got, whole[:, -last:], rtol=1e-12, atol=1e-13)
        if cross is not None:
            np.testing.assert_allclose(cross, whole_cross[:, -last:], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_exact(name, implementation):
    problem = Problem(**CASES[name])
    tensors = {k: torch.from_numpy(v).requires_grad_() for k, v in problem.arrays.items()}
    results = problem.ours(tensors, implementation=implementation)
    weights = torch.from_numpy(problem.weights)
    sum((problem.rows(w) * r).sum() for w, r in zip(weights, results) if r is not None).backward()
    rng = np.random.default_rng(1)
    for array, tensor in tensors.items():
        directions = {k: np.zeros(v.shape) for k, v in problem.arrays.items()}
        directions[array] = rng.normal(size=tensor.shape)
        want = oracle.slope(lambda a: problem.loss(problem.theirs(a)), problem.arrays, directions)
        got = 0.0 if tensor.grad is None else (tensor.grad.numpy() * directions[array]).sum()
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-11, err_msg=array)


@pytest.mark.parametrize("name", ["all prefixes", "joint, padding by replica", "joint, all prefixes, replica rope"])
def test_jax_under_jit(name):
    problem = Problem(**CASES[name])

    @jax.jit
    def value_and_grad(arrays):
        def loss(a):
            results = problem.ours(a)
            return sum((problem.rows(w) * r).sum() for w, r in zip(problem.weights, results) if r is not None)

        return jax.value_and_grad(loss)(arrays)

    with jax.enable_x64(True):
        value, grads = value_and_grad({k: jnp.asarray(v) for k, v in problem.arrays.items()})
    tensors = {k: torch.from_numpy(v).requires_grad_() for k, v in problem.arrays.items()}
    results, weights = problem.ours(tensors), torch.from_numpy(problem.weights)
    loss = sum((problem.rows(w) * r).sum() for w, r in zip(weights, results) if r is not None)
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-10)
    for array, tensor in tensors.items():
        want = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(grads[array], want, rtol=1e-10, atol=1e-11, err_msg=array)


def test_own_key_counts_once_and_no_other_position_is_seen():
    problem = Problem(cross=True)
    before, _ = problem.ours(problem.arrays)
    changed = dict(problem.arrays, v=problem.arrays["v"].copy())
    changed["v"][1, 0, 3] += 1.0  # replica 1 of sequence 0, position 3
    after, cross = problem.ours(changed)
    moved = np.abs(after - before).max((2, 3)).reshape(3, 2, 5) > 1e-12
    want = np.zeros((3, 2, 5), bool)
    want[:, 0, 3] = want[1, 0, 3:] = True
    np.testing.assert_array_equal(moved, want)
    _, cross_before = problem.ours(problem.arrays)
    moved = np.abs(cross - cross_before).max((2, 3)).reshape(3, 2, 5) > 1e-12
    want[1] = want[:, 0, 4] = False
    np.testing.assert_array_equal(moved, want)


def test_replicas_that_see_nobody_give_zero_and_no_nan():
    x = torch.randn(6, 4, 2, SIZE, dtype=torch.float64, requires_grad=True)
    visible = torch.zeros(6, 4, dtype=torch.bool)
    visible[0] = True  # replica 0 of sequence 0 alone: it sees nobody else, the others see it
    out, lse = core.attend_replicas(x, x, x, visible, replicas=3, itself=False)
    assert (out[[0, 1, 3, 5]] == 0).all()
    assert (lse[[0, 1, 3, 5]] == -torch.inf).all()
    torch.testing.assert_close(out[2], x[0])
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_rows_are_replica_major(framework):
    to = {"numpy": np.asarray, "torch": torch.as_tensor, "jax": jnp.asarray}[framework]
    x = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(np.asarray(core.replicate(to(x), 2)), [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]])
    each = np.arange(12).reshape(2, 3, 2)  # two sequences, three replicas
    want = [[0, 1], [6, 7], [2, 3], [8, 9], [4, 5], [10, 11]]
    np.testing.assert_array_equal(np.asarray(core.stack_replicas(to(each))), want)
    np.testing.assert_array_equal(np.asarray(core.replica_rows(to(np.array([1, 1])), 2, 3)), [1, 1, 3, 3, 5, 5])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_aggregate(smoothing):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 2, 4, 6))
    weights = [rng.normal(size=shape) for shape in ((6, 18), (6,), (3, 6), (3,))]
    linear = [torch.nn.Linear(18, 6).double(), torch.nn.Linear(6, 3).double()]
    for parameter, value in zip([p for layer in linear for p in (layer.weight, layer.bias)], weights):
        parameter.data = torch.from_numpy(value)
    layer = torch.nn.Sequential(linear[0], torch.nn.SiLU(), linear[1])
    got = core.aggregate(torch.from_numpy(hidden.reshape(6, 4, 6)), layer, replicas=3, smoothing=smoothing)
    want = np.stack([oracle.aggregate(hidden[:, b], *weights, smoothing) for b in range(2)])
    np.testing.assert_allclose(got.detach(), want, rtol=1e-12, atol=1e-13)


def test_the_hidden_key_is_hardly_seen():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 64, 4, SIZE)) + 3 * rng.normal(size=(4, SIZE))
    for to in (np.asarray, torch.as_tensor, jnp.asarray):
        key = np.asarray(core.hidden_key(to(query), 2))
        scores = (query.reshape(-1, 2, 2, SIZE) * key[:, None]).sum(-1) * SIZE**-0.5
        assert abs(scores.mean() + 10) < 0.5
        assert scores.max() < -3


def test_refusals(unhooked):
    x = np.zeros((6, 4, 2, SIZE))
    with pytest.raises(ValueError, match="replicas must be a positive divisor of query's 6 rows, got 4"):
        core.replica_attention(x, x, x, replicas=4)
    with pytest.raises(ValueError, match="prefix_scope must be 'own' or 'all', got 'some'"):
        core.replica_attention(x, x, x, replicas=3, prefix_scope="some")
    prefix = np.zeros((2, 2, 5, SIZE))
    with pytest.raises(ValueError, match=r"prefix must be keys and values of shape \(3, 2, n, 8\)"):
        core.replica_attention(x, x, x, replicas=3, prefix=(prefix, prefix))


@pytest.mark.slow
def test_compiled_with_gradients():
    program = """if True:
        import torch
        from heddle import Mask
        from heddle.attention.replicas import aggregate, replica_attention

        def loss(q, k, v, prefix_k, prefix_v, bias, layer):
            out, cross = replica_attention(
                q, k, v, Mask.causal(q.shape[1], like=q), replicas=3, prefix=(prefix_k, prefix_v), current=(k, v),
                bias=bias, replica_theta=100.0)
            return (aggregate((out + cross).flatten(2), layer, replicas=3, smoothing=0.1) ** 2).sum()

        torch.manual_seed(0)
        arrays = [torch.randn(s) for s in [(6, 7, 4, 8), (6, 7, 2, 8), (6, 7, 2, 8), (3, 2, 5, 8), (3, 2, 5, 8), (4,)]]
        arrays = [a.requires_grad_() for a in arrays]
        layer = torch.nn.Linear(96, 3)
        want = loss(*arrays, layer)
        want.backward()
        grads = [a.grad.clone() for a in arrays]
        for a in arrays:
            a.grad = None
        got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arrays, layer)
        got.backward()
        torch.testing.assert_close(got, want)
        for a, grad in zip(arrays, grads):
            torch.testing.assert_close(a.grad, grad, rtol=1e-4, atol=1e-5)
        print("same")
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"
