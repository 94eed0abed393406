"""JAX's part of gpu_cases.py: every case on a CUDA device. Not collected by name: test_cases.py runs it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from attention_cases import CASES, IDS, LARGE, LARGE_IDS, Case, oracle
from heddle import Mask, attend, implementations

#: of the largest value of each array: rounding of the inputs' dtype, times the few roundings on the way.
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def run(query, key, value, d_out, d_lse, mask, *, scale, implementation):
    def forward(query, key, value):
        return attend(query, key, value, mask, scale=scale, implementation=implementation, return_lse=True)

    (out, lse), pull = jax.vjp(forward, query, key, value)
    dq, dk, dv = pull((d_out, d_lse))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def arguments(case: Case, dtype: str) -> tuple[dict[str, jax.Array], Mask]:
    arrays = {name: jnp.asarray(array, dtype) for name, array in case.arrays().items()}
    mask = case.mask() or Mask.full(case.q_len, case.kv_len)
    return {**arrays, "d_lse": arrays["d_lse"].astype("float32")}, mask.on(arrays["query"])


def compare(case: Case, arrays: dict[str, jax.Array], got: dict[str, jax.Array]) -> None:
    want = oracle(case, {name: np.asarray(a, np.float64) for name, a in arrays.items()})
    for name, array in got.items():
        have, expected = np.asarray(array, np.float64), want[name]
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(have == -np.inf, ~finite, err_msg=name)
        bound = TOLERANCE[str(arrays["query"].dtype)] * max(1.0, np.abs(expected[finite]).max(initial=0.0))
        np.testing.assert_allclose(have[finite], expected[finite], rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=[*IDS, *LARGE_IDS])
@pytest.mark.parametrize("implementation", ["triton", "cudnn", "xla"])
def test_case(implementation, case, dtype):
    arrays, mask = arguments(case, dtype)
    inputs = [arrays[name] for name in ("query", "key", "value")]
    why = implementations(*inputs, mask)[implementation]
    if why is not None:
        assert implementation == "cudnn", why
        pytest.skip(why)
    if implementation == "xla" and case in CASES and CASES.index(case) % 4:
        pytest.skip("plain XLA: all cases pass on a CPU, a quarter is enough here")
    # The mask is closed over: cuDNN has to know it when the program is compiled.
    function = jax.jit(partial(run, mask=mask, scale=case.scale, implementation=implementation))
    got = function(**arrays)
    if implementation == "triton":  # no atomics: bit by bit
        again = function(**arrays)
        assert all((np.asarray(a) == np.asarray(again[name])).all() for name, a in got.items())
    compare(case, arrays, got)
    # Without a gradient; of few queries triton splits the keys.
    options = {"scale": case.scale, "implementation": implementation, "return_lse": True}
    alone = jax.jit(lambda *inputs: attend(*inputs, mask, **options))(*inputs)
    compare(case, arrays, dict(zip(("out", "lse"), alone)))


DOCUMENTS = CASES[IDS.index("grouped-query-documents")]


def test_triton_comes_first():
    arrays, mask = arguments(DOCUMENTS, "bfloat16")
    found = implementations(*(arrays[name] for name in ("query", "key", "value")), mask)
    assert next(name for name, why in found.items() if why is None) == "triton"


@pytest.mark.parametrize("transform", ["vmap", "shard_map", "eager"])
def test_triton_within(transform):
    arrays, mask = arguments(DOCUMENTS, "float32")
    function = partial(run, mask=mask, scale=None, implementation="triton")
    if transform == "vmap":
        apart = [a[:, None] for a in arrays.values()]
        got = {name: a[:, 0] for name, a in jax.jit(jax.vmap(function))(*apart).items()}
    elif transform == "shard_map":
        mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
        spec = PartitionSpec("data")
        got = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec))(*arrays.values())
    else:
        got = function(**arrays)
    compare(DOCUMENTS, arrays, got)
