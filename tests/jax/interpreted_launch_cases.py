"""The JAX launch's numbers without a GPU. Not collected by name: test_triton.py runs it, interpreting.

Everything is the launcher's own but the custom call: in its place the same arguments go to Triton's interpreter.
"""

from __future__ import annotations

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, PartitionSpec

from attention_cases import CASES, IDS, Case, oracle, segments
from heddle import Mask, attend, implementations
from heddle.jax import triton
from heddle.kernels import plan

TOLERANCE = 5e-6  #: of the largest value of each array
TILES = {
    "forward": plan.Tile(32, 16, 4, 1),
    "backward_kv": plan.Tile(16, 32, 4, 1),
    "backward_q": plan.Tile(32, 16, 4, 1),
    "decode": plan.Tile(16, 16, 4, 1),
}
LOCK = threading.Lock()  # the interpreter is one for the process


def interpret(launch, outputs, *inputs):
    def run(*arrays):
        with LOCK:
            arrays = [torch.from_numpy(np.array(x)) for x in arrays]
            # What a kernel forgets to write shows.
            empty = [torch.full(x.shape, torch.nan, dtype=getattr(torch, str(x.dtype))) for x in outputs]
            launch.kernel[launch.grid](**launch.arguments(*arrays, *empty))
            return tuple(x.numpy() for x in empty)

    return jax.pure_callback(run, outputs, *inputs)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(triton, "_call", interpret)
    monkeypatch.setattr(triton, "_gpu", lambda: (80, 2))
    monkeypatch.setattr(triton, "device_of", lambda array: type("Device", (), {"platform": "gpu"}))
    plugin = type("Plugin", (), {"registrations": staticmethod(lambda: {triton.TARGET: None})})
    monkeypatch.setattr(triton, "_plugin", lambda: plugin)
    with plan.override(**TILES):
        yield


def run(query, key, value, d_out, d_lse, mask, *, scale):
    def forward(query, key, value):
        return attend(query, key, value, mask, scale=scale, implementation="triton", return_lse=True)

    (out, lse), backward = jax.vjp(forward, query, key, value)
    dq, dk, dv = backward((d_out, d_lse))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def compare(got, want) -> None:
    for name, array in got.items():
        have, expected = np.asarray(array, np.float64), want[name]
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(have == -np.inf, ~finite, err_msg=name)
        bound = TOLERANCE * max(1.0, np.abs(expected[finite]).max(initial=0.0))
        np.testing.assert_allclose(have[finite], expected[finite], rtol=0, atol=bound, err_msg=name)


def arguments(case: Case) -> tuple[dict[str, jax.Array], Mask]:
    mask = case.mask() or Mask.full(case.q_len, case.kv_len)
    return {name: jnp.asarray(array) for name, array in case.arrays().items()}, mask.on(jnp.zeros(()))


def names(*wanted: str) -> list[Case]:
    return [CASES[IDS.index(name)] for name in wanted]


SOME = names(
    "causal-negative-offset-has-empty-rows", "window-with-sinks", "documents-differ-by-row",
    "random-intervals-and-prefix", "value-dim-larger", "odd-head-dim",
)  # fmt: skip
FEW = names("decode", "decode-of-an-empty-sequence", "one-query-and-a-prefix", "three-queries-of-ragged-caches")


@pytest.mark.parametrize("case", [*SOME, FEW[1]], ids=lambda case: case.name.replace(" ", "-"))
def test_case(case):
    arrays, mask = arguments(case)
    want = oracle(case, {name: np.asarray(array, np.float64) for name, array in arrays.items()})
    compare(jax.jit(partial(run, scale=case.scale))(**arrays, mask=mask), want)


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name.replace(" ", "-"))
def test_decode(case, monkeypatch):
    """Without a gradient the keys are split."""
    jax.clear_caches()  # traces of test_case hold it too, but never run it
    launched = []
    monkeypatch.setattr(triton, "_call", lambda launch, *rest: launched.append(launch) or interpret(launch, *rest))
    arrays, mask = arguments(case)
    out, lse = attend(
        *(arrays[name] for name in ("query", "key", "value")),
        mask, scale=case.scale, implementation="triton", return_lse=True,
    )  # fmt: skip
    compare({"out": out, "lse": lse}, oracle(case, {name: np.asarray(a, np.float64) for name, a in arrays.items()}))
    assert [launch.kernel.fn.__name__ for launch in launched] == ["decode", "combine"]


DOCUMENTS = Case("documents", 40, 40, lambda: Mask.documents(segments(13, 20, padding=7)), batch=2, heads=2, kv_heads=2)


@pytest.fixture
def expected():
    arrays, mask = arguments(DOCUMENTS)
    return arrays, mask, oracle(DOCUMENTS, {name: np.asarray(a, np.float64) for name, a in arrays.items()})


def test_vmap(expected):
    """The mapped axis joins the batch, forward and backward: here each sequence apart, and a mask for all."""
    arrays, mask, want = expected
    apart = {name: a[:, None] for name, a in arrays.items()}
    mapped = jax.vmap(partial(run, mask=mask, scale=None))
    got = jax.jit(mapped)(*apart.values())
    compare({name: a[:, 0] for name, a in got.items()}, want)


def test_shard_map(expected):
    arrays, mask, want = expected
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    local = partial(run, scale=None)
    over = jax.shard_map(local, mesh=mesh, in_specs=(*[spec] * 5, PartitionSpec()), out_specs=spec)
    compare(jax.jit(over)(*arrays.values(), mask), want)


def test_backward_of_a_part_of_the_keys(expected):
    arrays, mask, want = expected
    query, key, value, d_out, d_lse = arrays.values()
    out, lse = attend(query, key, value, mask, implementation="triton", return_lse=True)
    dq, parts = 0, []
    for first, past in ((0, 17), (17, 40)):
        part = Mask(jnp.clip(mask.start - first, 0), jnp.clip(mask.stop - first, 0, past - first))
        rest = triton.flash_backward(
            query, key[:, first:past], value[:, first:past], part, DOCUMENTS.dim**-0.5, out, lse, d_out, d_lse
        )
        dq, parts = dq + rest[0], [*parts, rest[1:]]
    dk, dv = (jnp.concatenate(pair, axis=1) for pair in zip(*parts))
    compare({"dq": dq, "dk": dk, "dv": dv}, want)


def test_on_a_gpu_triton_comes_first():
    query = jnp.zeros((1, 4, 2, 8))
    assert next(name for name, why in implementations(query, query, query).items() if why is None) == "triton"
    wide = jnp.zeros((1, 4, 2, 300))
    assert "up to 256, got 300" in (implementations(wide, wide, wide)["triton"] or "")
