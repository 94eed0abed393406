"""JAX's implementations of ``attend`` against the float64 oracle, and ``xla`` under JAX's transformations."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attention_cases import CASES, IDS, Case, oracle, segments
from heddle import Mask, attend, implementations
from heddle.attention.attend import IMPLEMENTATIONS
from heddle.jax import xla

#: Of the largest value of each array: the rounding of the dtype's inputs and outputs, times the few on the way.
TOLERANCE = {"float64": 1e-13, "float32": 5e-6, "float16": 2e-3, "bfloat16": 2e-2}

ROWS = np.concatenate([segments(300, 300), segments(600), segments(7, 193, 390, padding=10)])

#: Several tiles a side, tails, tiles not seen, one sequence a step and all.
LONG = [
    Case("causal", 1100, 1100, lambda: Mask.causal(1100)),
    Case("documents", 1536, 1536, lambda: Mask.documents(segments(512, 100, 11, 600, 300, padding=13))),
    Case("documents by row", 600, 600, lambda: Mask.documents(ROWS), batch=3, heads=4, kv_heads=2),
    Case("one mask for a batch", 530, 700, lambda: Mask.causal(530, 700, 170), batch=2),
    Case("one mask for a large batch", 300, 300, lambda: Mask.causal(300), batch=12, heads=4, kv_heads=2, dim=8),
    Case("window with sinks", 1000, 1000, lambda: Mask.window(1000, 40, prefix=300)),
    Case("grouped queries", 300, 520, lambda: Mask.causal(300, 520, 220), heads=8, kv_heads=1, value_dim=24),
    Case("decode", 2, 1500, lambda: Mask.lengths(np.array([1500, 0, 1100]), 2), batch=3, heads=6, kv_heads=2),
    Case("prefill", 200, 1500, lambda: Mask.lengths(np.array([900, 300]), 200), batch=2, heads=6, kv_heads=2),
]
LONG_IDS = [case.name.replace(" ", "-") for case in LONG]


def arguments(case: Case, dtype="float32") -> dict[str, jax.Array]:
    """The case's arrays rounded to ``dtype``, which the oracle then takes as exact; d_lse in the lse's dtype."""
    arrays = {name: jnp.asarray(array, dtype) for name, array in case.arrays().items()}
    return arrays | {"d_lse": arrays["d_lse"].astype("float64" if dtype == "float64" else "float32")}


def mask_of(case: Case) -> Mask:
    return (case.mask() or Mask.full(case.q_len, case.kv_len)).on(jnp.zeros(()))


def values_and_gradients(query, key, value, d_out, d_lse, mask, *, implementation, scale):
    def forward(query, key, value):
        return attend(query, key, value, mask, scale=scale, implementation=implementation, return_lse=True)

    (out, lse), backward = jax.vjp(forward, query, key, value)
    dq, dk, dv = backward((d_out, d_lse))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def check(case: Case, implementation: str, dtype: str = "float32") -> None:
    arrays = arguments(case, dtype)
    got = jax.jit(partial(values_and_gradients, implementation=implementation, scale=case.scale))(
        **arrays, mask=mask_of(case)
    )
    compare(got, oracle(case, {name: np.asarray(array, np.float64) for name, array in arrays.items()}), dtype)


def compare(got, want, dtype: str = "float32") -> None:
    for name, array in got.items():
        array_dtype = "float32" if name == "lse" and dtype != "float64" else dtype
        assert array.dtype == array_dtype, name
        have, expected = np.asarray(array, np.float64), want[name]
        finite = np.isfinite(expected)  # only lse's -inf isn't
        np.testing.assert_array_equal(np.isfinite(have), finite, err_msg=name)
        np.testing.assert_array_equal(have[~finite], expected[~finite], err_msg=name)
        bound = TOLERANCE[array_dtype] * max(1.0, np.abs(expected[finite]).max(initial=0.0))
        np.testing.assert_allclose(have[finite], expected[finite], rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_case(case):
    check(case, "xla")


@pytest.mark.parametrize("case", CASES[::5], ids=IDS[::5])  # the same code passes all cases in torch
def test_case_by_reference(case):
    check(case, "reference")


@pytest.mark.parametrize("case", LONG, ids=LONG_IDS)
def test_long(case):
    check(case, "xla")


SOME = [CASES[IDS.index(name)] for name in ("documents-differ-by-row", "window-with-sinks", "value-dim-larger")]


@pytest.mark.parametrize("case", [*SOME, LONG[2]], ids=lambda case: case.name)
def test_case_in_float64(case):
    with jax.enable_x64(True):
        check(case, "xla", "float64")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_case_in_half_precision(case, dtype):
    check(case, "xla", dtype)


# ---------------------------------------------------------------- the implementation itself

DOCUMENTS = LONG[1]


def total(query, key, value, mask, implementation="xla"):
    """A number that depends on every output and every lse."""
    out, lse = attend(query, key, value, mask, implementation=implementation, return_lse=True)
    return jnp.sum(out * jnp.cos(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def assert_close(got, want, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


def test_is_the_first_choice_on_a_cpu():
    q = jnp.ones((1, 3, 2, 4))
    reasons = implementations(q, q, q)
    assert list(reasons) == ["triton", "xla", "cudnn", "reference"]
    assert [name for name, reason in reasons.items() if reason is None] == ["xla", "reference"]


def test_mask_as_constant_and_without_jit():
    case = DOCUMENTS
    arrays, mask = arguments(case), case.mask()  # NumPy integers, closed over
    run = partial(values_and_gradients, mask=mask, implementation="xla", scale=None)
    eager, jitted = run(**arrays), jax.jit(run)(**arrays)
    compare(jitted, oracle(case, {name: np.asarray(array, np.float64) for name, array in arrays.items()}))
    assert_close(eager, jitted)


def test_same_bits_again():
    arrays = arguments(DOCUMENTS)
    run = jax.jit(partial(values_and_gradients, implementation="xla", scale=None))
    first, again = (run(**arrays, mask=mask_of(DOCUMENTS)) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])


def test_does_not_trace_twice(monkeypatch):
    traces = []
    for name in ("_forward", "_backward"):
        function = getattr(xla, name)
        monkeypatch.setattr(xla, name, lambda *a, f=function, n=name, **k: (traces.append(n), f(*a, **k))[1])
    gradient = jax.grad(total, (0, 1, 2))
    for seed in range(3):
        q = random(1, 37, 2, 8, seed=seed)  # a shape of its own, so that no other test has traced it
        mask = Mask.causal(37, offset=-seed)
        attend(q, q, q, mask)
        gradient(q, q, q, mask)
    assert sorted(traces) == ["_backward", "_forward", "_forward"]  # the forward alone, and with it


def test_keys_in_tiles_nobody_sees_are_not_read():
    # If a tile of NaN were visited, its products with weights of zero would be NaN.
    q_len, kv_len = 1024, 2048
    q, k, v = random(1, q_len, 2, 8), random(1, kv_len, 2, 8, seed=1), random(1, kv_len, 2, 8, seed=2)
    index = np.arange(q_len)[None]
    start = np.where(index < q_len // 2, 256, 1536)
    mask = Mask(start, start + index % 256 + 1, prefix=5)
    seen = np.zeros((kv_len, 1, 1), bool)
    seen[:512] = seen[1536:1792] = True
    gradient = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    value, (dq, dk, dv) = gradient(q, jnp.where(seen, k, jnp.nan), jnp.where(seen, v, jnp.nan), mask)
    want, (want_dq, want_dk, want_dv) = gradient(q, k, v, mask)
    np.testing.assert_array_equal(value, want)
    for got, expected in ((dq, want_dq), (dk, want_dk), (dv, want_dv)):
        np.testing.assert_array_equal(got, expected)


def test_decoding_reads_as_far_as_the_longest_sequence():
    q, k, v = random(2, 1, 6, 8), random(2, 2048, 2, 8, seed=1), random(2, 2048, 2, 8, seed=2)
    mask = Mask.lengths(jnp.array([300, 7]), 1)
    bad_k, bad_v = (x.at[:, 512:].set(jnp.nan) for x in (k, v))
    got = attend(q, bad_k, bad_v, mask, implementation="xla")
    np.testing.assert_allclose(got, attend(q, k, v, mask, implementation="reference"), atol=1e-5)


@pytest.mark.parametrize("kv_len", [64, 192, 1024, 1088, 2048])  # at once and in tiles, in whole blocks and not
@pytest.mark.parametrize("q_len", [1, 5])
def test_few_queries_over_blocks_of_keys(kv_len, q_len):
    q, k, v = random(2, q_len, 6, 8), random(2, kv_len, 2, 8, seed=1), random(2, kv_len, 2, 8, seed=2)
    mask = Mask.lengths(jnp.array([kv_len - 3, 7]), q_len)
    mask = mask & Mask.window(q_len, kv_len // 2, offset=jnp.array([kv_len - 3 - q_len, 7 - q_len]))
    for seen in (mask, Mask(mask.start, mask.stop, prefix=3)):
        run = {
            name: jax.jit(jax.value_and_grad(partial(total, implementation=name), (0, 1, 2)))(q, k, v, seen)
            for name in ("xla", "reference")
        }
        np.testing.assert_allclose(run["xla"][0], run["reference"][0], rtol=1e-5)
        for got, want in zip(run["xla"][1], run["reference"][1], strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("max_len", [256, 1024, 2048])
def test_decoding_copies_no_cache(max_len):
    """A cache that lies as KVCache's does is written and read where it is, in a jitted loop over tokens."""

    def generate(query, keys, values, lengths):
        def step(carry):
            query, keys, values, lengths = carry
            (at,) = lengths
            keys = keys.at[:, :, at // 64, :, at % 64].set(query[:, 0, :3])
            values = values.at[:, :, at].set(query[:, 0, :3])
            lying = keys.swapaxes(3, 4).reshape(values.shape)
            mask = Mask.lengths(lengths + 1, 1)
            return attend(query, jnp.moveaxis(lying, 1, 2), jnp.moveaxis(values, 1, 2), mask), keys, values, lengths + 1

        return jax.lax.while_loop(lambda carry: carry[3][0] < max_len, step, (query, keys, values, lengths))

    keys = jax.ShapeDtypeStruct((1, 3, max_len // 64, 64, 64), jnp.float32)
    values = jax.ShapeDtypeStruct((1, 3, max_len, 64), jnp.float32)
    query, lengths = jax.ShapeDtypeStruct((1, 1, 9, 64), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = jax.jit(generate, donate_argnums=(1, 2)).lower(query, keys, values, lengths).compile()
    # Some arrays of scores, and cutting out two tiles of 256 keys, is all it may take.
    scores, tiles = 4 * 4 * 9 * min(max_len, 1024), 4 * 2 * 3 * 256 * 64
    assert compiled.memory_analysis().temp_size_in_bytes < scores + tiles * (max_len > 1024) + 50_000
    shapes = rf"(?:1,)?3,{max_len},64|(?:1,)?3,{max_len // 64},64,64"
    copies = re.findall(rf"f32\[(?:{shapes})\]\S* (copy|transpose)\(", compiled.as_text())
    assert not copies


def arrays_in(jaxpr):
    """Every intermediate of a jaxpr and of those in it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from arrays_in(inner)


def test_memory_is_linear():
    def traced(n, implementation):
        def loss(q, k, v):
            return jnp.sum(attend(q, k, v, Mask.causal(n), implementation=implementation))

        q = jax.ShapeDtypeStruct((1, n, 2, 16), jnp.float32)
        return jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, q, q)

    def largest(traced):
        return max(aval.size for aval in arrays_in(traced.jaxpr.jaxpr))

    n = 4096
    assert largest(traced(n, "reference")) >= n * n
    assert largest(traced(n, "xla")) <= 2 * 512 * 256  # the scores of a tile
    memory, of_twice = (
        traced(length, "xla").lower().compile().memory_analysis().temp_size_in_bytes for length in (n, 2 * n)
    )
    assert of_twice < 2.2 * memory < 4 * n * n


def test_backward_over_parts_of_the_keys():
    """Given out and lse over all keys, the gradients of parts add up to the whole's, as ring attention has it."""
    case = CASES[IDS.index("grouped-query-documents")]
    a, mask = arguments(case), mask_of(case)
    out, lse = attend(a["query"], a["key"], a["value"], mask, return_lse=True)
    arrays, scale = (out, lse, a["d_out"], a["d_lse"]), case.dim**-0.5
    backward = IMPLEMENTATIONS["jax"]["xla"].backward
    assert backward is not None
    want = oracle(case, {name: np.asarray(array, np.float64) for name, array in a.items()})
    dq, parts = 0, []
    for first, past in ((0, 36), (36, 96)):
        part = Mask(jnp.clip(mask.start - first, 0), jnp.clip(mask.stop - first, 0, past - first))
        d_query, *rest = backward(a["query"], a["key"][:, first:past], a["value"][:, first:past], part, scale, *arrays)
        dq += d_query
        parts.append(rest)
    dk, dv = (jnp.concatenate(pair, axis=1) for pair in zip(*parts, strict=True))
    compare({"dq": dq, "dk": dk, "dv": dv}, want)


# ---------------------------------------------------------------- JAX's transformations


def test_checkpoint_and_scan_over_layers():
    q, weights = random(1, 300, 2, 16), 0.2 * random(3, 16, 16, seed=1)
    mask = Mask.documents(segments(100, 200)).on(q)

    def loss(weights, q, wrap):
        def layer(x, w):
            x = x + attend(x @ w, x, x, mask)
            return x, None

        return jnp.sum(jax.lax.scan(wrap(layer), q, weights)[0] ** 2)

    plain = jax.jit(jax.grad(partial(loss, wrap=lambda f: f)))(weights, q)
    again = jax.jit(jax.grad(partial(loss, wrap=jax.checkpoint)))(weights, q)
    assert np.abs(plain).max() > 1
    assert_close(again, plain)


VMAPPED = {
    "mask": (None, None, None, 0),
    "arrays": (0, 0, 0, None),
    "both": (0, 0, 0, 0),
    "query": (0, None, None, None),
}


def pick(arguments, axes, i: int):
    """The ``i``-th of each argument that is mapped."""
    return [
        x if axis is None else jax.tree.map(lambda leaf: leaf[i], x) for x, axis in zip(arguments, axes, strict=True)
    ]


@pytest.mark.parametrize("mapped", VMAPPED)
def test_vmap(mapped):
    """vmap of values and gradients equals one at a time, whichever arguments are mapped."""
    n, q_len, kv_len, rows = 3, 70, 300, (1 if mapped == "both" else 2)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, kv_len, (n, rows, q_len))
    masks = [Mask(start, start + rng.integers(0, kv_len // 2, start.shape)).on(jnp.zeros(())) for start in starts]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)
    everything = [
        random(n, 2, q_len, 4, 8),
        random(n, 2, kv_len, 2, 8, seed=1),
        random(n, 2, kv_len, 2, 8, seed=2),
        stacked,
    ]
    axes = VMAPPED[mapped]
    arguments = pick(everything, [None if axis == 0 else 0 for axis in axes], 0)
    function = jax.value_and_grad(total, (0, 1, 2))
    got = jax.jit(jax.vmap(function, in_axes=axes))(*arguments)
    one = jax.jit(function)
    for i in range(n):
        assert_close(pick([got], [0], i)[0], one(*pick(arguments, axes, i)), 2e-5)


def test_nested_vmap_and_gradient_of_vmap():
    q, offsets = random(2, 2, 1, 20, 2, 8), (0, -5)
    masks = jax.vmap(lambda offset: Mask.causal(20, offset=offset[None], like=q))(jnp.array(offsets))

    def mapped(q):
        inner = jax.vmap(lambda q, mask: attend(q, q, q, mask))
        return jax.vmap(inner, in_axes=(0, None))(q, masks)

    def looped(q):
        # The mask's axis is the second of q, so the first can be attend's batch.
        rows = [attend(*[q[:, i, 0]] * 3, Mask.causal(20, offset=offset)) for i, offset in enumerate(offsets)]
        return jnp.stack(rows, axis=1)[:, :, None]

    def values_and_gradient(function):
        return jax.jit(jax.value_and_grad(lambda q: (jnp.sum(jnp.sin(out := function(q))), out), has_aux=True))(q)

    assert_close(values_and_gradient(mapped), values_and_gradient(looped))


@pytest.mark.parametrize("replicated", ["nothing", "keys and mask"])
def test_shard_map(replicated):
    """Over the batch on 8 devices, with gradients; and with keys that every device has, whose gradients add up."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = PartitionSpec("data")
    whole = PartitionSpec() if replicated != "nothing" else sharded
    keys = 1 if replicated != "nothing" else 8
    q = random(8, 40, 4, 16)
    k, v = random(keys, 300, 2, 16, seed=1), random(keys, 300, 2, 16, seed=2)
    mask = Mask.lengths(jnp.arange(8)[:keys] * 30 + 90, 40).on(q)

    def local(q, k, v, mask):
        out, lse = attend(q, k, v, mask, implementation="xla", return_lse=True)
        return jnp.sin(out), lse

    over_devices = jax.shard_map(
        local, mesh=mesh, in_specs=(sharded, whole, whole, whole), out_specs=(sharded, sharded)
    )

    def together(q, k, v, mask):
        return local(q, *(jnp.broadcast_to(x, (8, *x.shape[1:])) for x in (k, v)), mask)

    def run(function):
        def loss(q, k, v):
            out, lse = function(q, k, v, mask)
            return jnp.sum(out**2) + jnp.sum(lse), (out, lse)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    assert_close(run(over_devices), run(together), 5e-5)


@pytest.mark.parametrize("rows", [1, 4], ids=["one mask", "a mask each"])
@pytest.mark.parametrize(
    "query_spec", [("data", None, "tensor"), ("data",), (None, None, ("data", "tensor")), ()], ids=str
)
def test_sharded_under_jit(query_spec, rows):
    """Batch and heads sharded over the devices of a jitted program, also over more devices than there are key heads:
    results and gradients are those of one device, and no batch is gathered where the heads divide."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    q, k, v = random(4, 70, 8, 16), random(4, 90, 4, 16, seed=1), random(4, 90, 4, 16, seed=2)
    mask = Mask.lengths(jnp.arange(4)[:rows] * 10 + 50, 70).on(q)

    def run(q, k, v):
        def loss(q, k, v):
            out, lse = attend(q, k, v, mask, implementation="xla", return_lse=True)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0)), (out, lse)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    sharding = NamedSharding(mesh, PartitionSpec(*query_spec))
    given = [
        jax.device_put(x, sharding) if x.shape[2] % 8 == 0 or len(query_spec) < 3 or query_spec[0] else x
        for x in (q, k, v)
    ]
    assert_close(jax.jit(run)(*given), jax.jit(run)(q, k, v), 5e-5)
    if query_spec == ("data", None, "tensor"):
        assert "all-gather" not in jax.jit(run).lower(*given).compile().as_text()
