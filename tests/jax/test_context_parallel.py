"""Context parallelism over 8 devices of this process and over 2 processes, against the float64 oracle of one device."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attention_cases import Case, oracle, segments
from heddle import Mask, attend
from heddle.attention import balance
from heddle.jax.parallel import context_attend, permute_tokens, shard, unpermute_tokens, unshard

METHODS = ["all_gather", "ring"]
SEQ = 64
PACKED = segments(30, 5, 17, padding=12)
ROWS = np.concatenate([PACKED, segments(64), segments(9, 40, padding=15), segments(64)])
AXES = ("context",)


def mesh_of(*sizes: int, names=AXES, kind=AxisType.Auto) -> jax.sharding.Mesh:
    count = int(np.prod(sizes))
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes), devices=jax.devices()[:count])


def values_and_gradients(forward: Callable, query, key, value, d_out, d_lse) -> dict[str, jax.Array]:
    (out, lse), backward = jax.vjp(forward, query, key, value)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *backward((d_out, d_lse)))))


def in_order(arrays: dict, order: np.ndarray | None) -> dict:
    """The rows of queries in ``order``; keys as they are."""
    if order is None:
        return arrays
    return {name: x if name in ("key", "value", "dk", "dv") else x[:, order] for name, x in arrays.items()}


def compare(got: dict, want: dict, tolerance: float = 1e-5) -> None:
    for name, array in got.items():
        bound = tolerance * max(1.0, np.abs(want[name][np.isfinite(want[name])]).max(initial=0))
        np.testing.assert_allclose(np.asarray(array, np.float64), want[name], rtol=0, atol=bound, err_msg=name)


# ---------------------------------------------------------------- equal to one device


def natural(mask, ranks):
    return None


def zigzag(mask, ranks):
    return balance.zigzag(SEQ, ranks)


def by_area(mask, ranks):
    return balance.by_area(mask, ranks, chunk=4)


CASES = [
    (Case("no mask", SEQ, SEQ, heads=4), natural),
    (Case("causal", SEQ, SEQ, lambda: Mask.causal(SEQ), heads=4, kv_heads=2), zigzag),
    (Case("packed documents and padding", SEQ, SEQ, lambda: Mask.documents(PACKED), heads=4, kv_heads=1), by_area),
    (Case("value dim", SEQ, SEQ, lambda: Mask.documents(PACKED), value_dim=24, scale=0.3), natural),
    (Case("documents differ by row", SEQ, SEQ, lambda: Mask.documents(ROWS), batch=4, heads=4, kv_heads=2), zigzag),
    (Case("short prefix and window", SEQ, SEQ, lambda: Mask.window(SEQ, 9, prefix=5), batch=2), zigzag),
    (Case("prefix of more than a part", SEQ, SEQ, lambda: Mask.window(SEQ, 9, prefix=35), heads=4), by_area),
    (Case("fewer queries than keys", 32, SEQ, lambda: Mask.causal(32, SEQ, 32), batch=2), natural),
]
IDS = [case.name.replace(" ", "-") for case, _ in CASES]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("case", "deal"), CASES, ids=IDS)
def test_equals_one_device(case, deal, method):
    check(case, deal, method, mesh_of(4))


@pytest.mark.parametrize("method", METHODS)
def test_eight_devices(method):
    check(CASES[2][0], by_area, method, mesh_of(8))


@pytest.mark.parametrize("method", METHODS)
def test_one_device(method):
    check(CASES[1][0], zigzag, method, mesh_of(1))


def check(case: Case, deal: Callable, method: str, mesh) -> None:
    mask, arrays = case.mask(), case.arrays()
    order = deal(mask, mesh.size)
    part = mask if order is None else mask.take(order)

    @jax.jit
    def run(arrays):
        def forward(query, key, value):
            return context_attend(
                query, key, value, part, "context", method, mesh=mesh, scale=case.scale, return_lse=True
            )

        return values_and_gradients(forward, **arrays)

    compare(run(in_order(arrays, order)), in_order(oracle(case, arrays), order))


@pytest.mark.parametrize("method", METHODS)
def test_reference_implementation(method):
    """Another implementation by name, not jitted by the caller."""
    case, mesh = CASES[3][0], mesh_of(2)
    arrays = case.arrays()

    def forward(query, key, value):
        return context_attend(
            query, key, value, case.mask(), "context", method, mesh=mesh, scale=case.scale,
            implementation="reference", return_lse=True,
        )  # fmt: skip

    got = values_and_gradients(forward, **{name: jnp.asarray(x) for name, x in arrays.items()})
    compare(got, oracle(case, arrays))


@pytest.mark.parametrize("rows", [1, 4])
def test_keys_in_an_order_of_their_own(rows):
    """As tokens dealt to balance the queries leave them: each row its own order, or one for all."""
    case, mesh = CASES[4][0], mesh_of(4)
    mask, arrays = case.mask().on(jnp.zeros(())), case.arrays()
    order = np.asarray(balance.snake(mask, 4, 4))[:rows]
    dealt = {name: np.stack([x[b, order[b % rows]] for b in range(4)]) for name, x in arrays.items()}
    start, stop = (np.stack([np.asarray(x)[b, order[b % rows]] for b in range(4)]) for x in (mask.start, mask.stop))

    @jax.jit
    def run(arrays, mask, order):
        forward = partial(
            context_attend, mask=mask, axis="context", mesh=mesh, kv_order=order, scale=case.scale, return_lse=True
        )
        return values_and_gradients(lambda q, k, v: forward(q, k, v), **arrays)

    got, want = run(dealt, Mask(jnp.asarray(start), jnp.asarray(stop)), jnp.asarray(order)), oracle(case, arrays)
    compare(got, {name: np.stack([x[b, order[b % rows]] for b in range(4)]) for name, x in want.items()})


# ---------------------------------------------------------------- beside other axes of the mesh

MANY = Case("rows", SEQ, SEQ, lambda: Mask.documents(ROWS), batch=4, heads=4, kv_heads=2)


DATA_TENSOR = ("data", "context", "tensor"), "data", "tensor"
FSDP = ("data", "fsdp", "context"), ("data", "fsdp"), None


@pytest.mark.parametrize(
    ("axes", "kv_heads", "kind", "method"),
    [
        (DATA_TENSOR, 2, AxisType.Auto, "all_gather"),
        (DATA_TENSOR, 2, AxisType.Auto, "ring"),
        (DATA_TENSOR, 2, AxisType.Explicit, "all_gather"),
        (DATA_TENSOR, 1, AxisType.Explicit, "ring"),
        (DATA_TENSOR, 1, AxisType.Auto, "all_gather"),
        (FSDP, 2, AxisType.Auto, "ring"),
        (FSDP, 2, AxisType.Explicit, "all_gather"),
    ],
    ids=str,
)
def test_with_other_axes(axes, kv_heads, kind, method):
    """Explicit axes say themselves what the batch and the heads are spread over."""
    names, batch, heads = axes
    mesh = mesh_of(2, 2, 2, names=names, kind=kind)
    case = Case("rows", SEQ, SEQ, lambda: Mask.documents(ROWS), batch=4, heads=4, kv_heads=kv_heads)
    spec = PartitionSpec(batch, "context", heads)
    key_spec = PartitionSpec(batch, "context", None if kv_heads == 1 else heads)
    order, arrays, want = balance.zigzag(SEQ, 2), case.arrays(), oracle(case, case.arrays())
    placed = {
        name: jax.device_put(x, NamedSharding(mesh, key_spec if name in ("key", "value") else spec))
        for name, x in in_order(arrays, order).items()
    }
    options = {"batch_axis": batch, "head_axis": heads} if kind == AxisType.Auto else {}

    @jax.jit
    def run(arrays, mask):
        def forward(query, key, value):
            return context_attend(query, key, value, mask, "context", method, mesh=mesh, return_lse=True, **options)

        return values_and_gradients(forward, **arrays)

    got = run(placed, case.mask().take(order))
    compare(got, in_order(want, order))
    for name, array in got.items():
        assert array.sharding.is_equivalent_to(
            NamedSharding(mesh, key_spec if name in ("dk", "dv") else spec), array.ndim
        ), name


def traffic(text: str) -> set[tuple[str, str]]:
    """The collectives of a compiled program, each with the types of what it moves."""
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    return {
        (kind, dtype)
        for result, kind in re.findall(rf"= (\(?[^=]*?\)?) ({kinds})(?:-start)?\(", text)
        for dtype in re.findall(r"(\w+)\[", result)
    }


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("all_gather", {("all-gather", "bf16"), ("reduce-scatter", "f32")}),
        ("ring", {("collective-permute", "bf16"), ("collective-permute", "f32")}),
    ],
)
def test_what_is_exchanged(method, expected):
    """Keys in their own dtype, their gradients in float32; what is spread over other axes stays where it is."""
    mesh = mesh_of(2, 2, 2, names=("data", "context", "tensor"))
    sharding = NamedSharding(mesh, PartitionSpec("data", "context", "tensor"))
    arrays = {name: jax.device_put(x.astype("bfloat16"), sharding) for name, x in MANY.arrays().items()}
    arrays["d_lse"] = arrays["d_lse"].astype("float32")
    mask = shard(MANY.mask(), "context", mesh=mesh, batch_axis="data")

    @jax.jit
    def run(arrays, mask):
        forward = partial(
            context_attend, mask=mask, axis="context", method=method, mesh=mesh, batch_axis="data", head_axis="tensor",
            return_lse=True,
        )  # fmt: skip
        return values_and_gradients(lambda q, k, v: forward(q, k, v), **arrays)

    lowered = run.lower(arrays, mask)
    assert traffic(lowered.as_text(dialect="hlo")) == expected
    # XLA adds nothing to it, but its compiler for CPUs widens bfloat16.
    assert {kind for kind, _ in traffic(lowered.compile().as_text())} == {kind for kind, _ in expected}


@pytest.mark.parametrize("method", METHODS)
def test_gradients_add_in_float32(method):
    """Eight devices' gradients of one key: 256 and seven times 1, of which bfloat16 sums would keep nothing."""
    ones = jnp.ones((1, 8, 1, 16), "bfloat16")
    mask = Mask(np.zeros((1, 8), np.int32), np.ones((1, 8), np.int32))  # all see the first key alone: weight 1

    def attended(value):
        return context_attend(ones, ones, value, mask, "context", method, mesh=mesh_of(8))

    d_value = jax.jit(lambda value, d_out: jax.vjp(attended, value)[1](d_out)[0])(ones, ones.at[:, 3].set(256))
    np.testing.assert_array_equal(np.asarray(d_value[0, 0, 0], np.float32), 264)  # 263, rounded once


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method):
    case = CASES[1][0]
    arrays = {name: jnp.asarray(x, "bfloat16") for name, x in case.arrays().items()}
    arrays["d_lse"] = arrays["d_lse"].astype("float32")
    forward = partial(context_attend, mask=case.mask(), axis="context", method=method, mesh=mesh_of(4), return_lse=True)
    got = jax.jit(lambda arrays: values_and_gradients(lambda q, k, v: forward(q, k, v), **arrays))(arrays)
    assert {name: x.dtype.name for name, x in got.items()} == {
        "out": "bfloat16", "lse": "float32", "dq": "bfloat16", "dk": "bfloat16", "dv": "bfloat16"
    }  # fmt: skip
    compare(got, oracle(case, {name: np.asarray(x, np.float64) for name, x in arrays.items()}), 2e-2)


# ---------------------------------------------------------------- random documents


@st.composite
def documents(draw):
    """Segment ids of two rows of SEQ tokens, padding anywhere between documents, and an order of the queries."""
    rows = []
    for _ in range(2):
        cuts = sorted(draw(st.lists(st.integers(1, SEQ - 1), max_size=8, unique=True)))
        lengths = np.diff([0, *cuts, SEQ])
        ids = [-1 if draw(st.booleans()) and draw(st.booleans()) else i for i in range(len(lengths))]
        rows.append(np.repeat(ids, lengths))
    chunks = draw(st.permutations(range(SEQ // 4)))
    return np.stack(rows).astype(np.int32), (4 * np.array(chunks)[:, None] + np.arange(4)).reshape(-1)


@partial(jax.jit, static_argnames="method")
def attended(arrays, mask, method):
    forward = partial(context_attend, mask=mask, axis="context", method=method, mesh=mesh_of(4), return_lse=True)
    return values_and_gradients(lambda q, k, v: forward(q, k, v), **arrays)


@pytest.mark.parametrize("method", METHODS)
@given(drawn=documents())
@settings(max_examples=25)
def test_random_documents(method, drawn):
    ids, order = drawn
    case = Case("random", SEQ, SEQ, lambda: Mask.documents(ids), batch=2, heads=2, kv_heads=1)
    arrays = case.arrays()
    got = attended(in_order(arrays, order), case.mask().take(order).on(jnp.zeros(())), method)
    compare(got, in_order(oracle(case, arrays), order))


# ---------------------------------------------------------------- within the user's shard_map


@pytest.mark.parametrize(("method", "check_vma"), [("all_gather", True), ("ring", True), ("ring", False)])
def test_within_shard_map(method, check_vma):
    """A layer and its loss, all on the devices' own parts: weights and key heads that all devices have, query heads
    spread over another axis."""
    mesh = mesh_of(2, 2, names=("context", "tensor"))
    mask = Mask.documents(PACKED).on(jnp.zeros(()))
    order = balance.by_area(mask, 2, chunk=4)
    rng = np.random.default_rng(0)
    x, w_query, w_key = (
        jnp.asarray(rng.standard_normal(shape) * size, "float32")
        for shape, size in (((1, SEQ, 8), 1), ((8, 4, 16), 8**-0.5), ((8, 1, 16), 8**-0.5))
    )

    def layer(x_query, x_key, w_query, w_key, attention):
        key = jnp.einsum("btm,mhd->bthd", x_key, w_key)
        return jnp.sin(attention(jnp.einsum("btm,mhd->bthd", x_query, w_query), key, key))

    def alone(x, w_query, w_key):
        out = layer(x, x, w_query, w_key, lambda q, k, v: attend(q, k, v, mask, implementation="reference"))
        return jnp.sum(out**3), out

    @partial(
        jax.shard_map, mesh=mesh, check_vma=check_vma,
        in_specs=(PartitionSpec(), PartitionSpec(None, "tensor"), PartitionSpec()),
        out_specs=(PartitionSpec(), PartitionSpec(None, "context", "tensor")),
    )  # fmt: skip
    def together(x, w_query, w_key):
        mine = shard(mask, "context", order)
        out = layer(
            shard(x, "context", order), shard(x, "context"), w_query, w_key,
            lambda q, k, v: context_attend(q, k, v, mine, "context", method),
        )  # fmt: skip
        return jax.lax.psum(jnp.sum(out**3), ("context", "tensor")), out

    (loss, out), gradients = jax.jit(jax.value_and_grad(together, (0, 1, 2), has_aux=True))(x, w_query, w_key)
    (want_loss, want_out), want = jax.jit(jax.value_and_grad(alone, (0, 1, 2), has_aux=True))(x, w_query, w_key)
    np.testing.assert_allclose(unpermute_tokens(out, order), want_out, atol=1e-5)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for got, expected in zip(gradients, want):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_whole_again_within_shard_map():
    """unshard gives every device the whole; the gradients of all devices' wholes add up."""
    mesh, order = mesh_of(4), balance.zigzag(SEQ, 4)
    x = jnp.arange(2.0 * SEQ).reshape(1, SEQ, 2)

    @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec("context"))
    def wholes(x):
        whole, double = unshard(shard((x, 2 * x), "context", order), "context", order)
        return (1 + jax.lax.axis_index("context")) * (whole + double)

    got = jax.jit(wholes)(x)
    np.testing.assert_array_equal(got, 3 * x * np.arange(1, 5)[:, None, None])
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: wholes(x).sum()))(x), np.full_like(x, 30))


# ---------------------------------------------------------------- whole arrays


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("jitted", [False, True])
def test_shard_and_unshard(kind, jitted):
    mesh, order = mesh_of(2, 4, names=("data", "context"), kind=kind), balance.zigzag(SEQ, 4)
    tokens, x, mask = np.arange(2 * SEQ).reshape(2, SEQ), np.ones((2, SEQ, 3)).cumsum(1), Mask.window(SEQ, 9, prefix=4)
    wrap = jax.jit if jitted else lambda function: function
    spread = wrap(partial(shard, axis="context", order=order, mesh=mesh, batch_axis="data"))
    got_tokens, got_mask, got_x = spread((tokens, mask, jnp.asarray(x)))

    sharding = NamedSharding(mesh, PartitionSpec("data", "context"))
    for got, want in ((got_tokens, tokens), (got_x, jnp.asarray(x))):
        assert got.sharding.is_equivalent_to(sharding, got.ndim)
        np.testing.assert_array_equal(got, want[:, order])
    assert got_mask.start.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "context")), 2)
    np.testing.assert_array_equal(got_mask.dense(SEQ), mask.take(order).dense(SEQ))

    again = wrap(partial(unshard, axis="context", order=order))((got_tokens, got_x))
    np.testing.assert_array_equal(again[0], tokens)
    np.testing.assert_array_equal(again[1], jnp.asarray(x))
    np.testing.assert_array_equal(unshard(shard(tokens, "context", mesh=mesh), "context"), tokens)


def test_permute_tokens():
    order = balance.zigzag(SEQ, 4)
    tokens, positions = jnp.arange(SEQ)[None], jnp.arange(SEQ)[None] * 2
    permuted = permute_tokens((tokens, positions), order)
    np.testing.assert_array_equal(permuted[0][0], order)
    np.testing.assert_array_equal(unpermute_tokens(permuted, order)[1], positions)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_where_the_mesh_comes_from(kind, jitted):
    mesh = mesh_of(4, kind=kind)
    case = CASES[1][0]
    arrays = case.arrays()
    want = oracle(case, arrays)["out"]
    wrap = jax.jit if jitted else lambda function: function
    run = wrap(lambda query, key, value: context_attend(query, key, value, case.mask(), "context"))
    query_key_value = [arrays[name] for name in ("query", "key", "value")]
    placed = shard(tuple(query_key_value), "context", mesh=mesh)
    np.testing.assert_allclose(run(*placed), want, atol=1e-5)  # the arrays'
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(run(*wrap(partial(shard, axis="context"))(placed)), want, atol=1e-5)
        if kind == AxisType.Auto:  # explicit arrays must lie where they are used
            np.testing.assert_allclose(run(*map(jnp.asarray, query_key_value)), want, atol=1e-5)


# ---------------------------------------------------------------- refusals


def zeros(length: int, batch: int = 1, heads: int = 4) -> jax.Array:
    return jnp.zeros((batch, length, heads, 16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: context_attend(zeros(30), zeros(32), zeros(32), None, "context", mesh=mesh_of(4)),
         "query's length must be a multiple of the 4 devices of 'context', got 30; pad the sequence"),
        (lambda: context_attend(zeros(32), zeros(30), zeros(30), None, "context", "ring", mesh=mesh_of(4)),
         "key's length must be a multiple of the 4 devices of 'context', got 30; pad the sequence"),
        (lambda: context_attend(zeros(8), zeros(8), zeros(8), None, "context", "rings", mesh=mesh_of(4)),
         "method must be 'all_gather' or 'ring', got 'rings'"),
        (lambda: context_attend(zeros(8), zeros(8), zeros(8), None, "context", "ring", mesh=mesh_of(4),
                                kv_order=jnp.arange(8)[None]),
         "method must be 'all_gather' where kv_order is given, got 'ring'"),
        (lambda: context_attend(zeros(8), zeros(8), zeros(8), None, "contxt", mesh=mesh_of(4)),
         "axis must be one of the mesh's 'context', got 'contxt'"),
        (lambda: context_attend(zeros(8), zeros(8), zeros(8), None, "context"), "mesh must be given"),
        (lambda: context_attend(zeros(8), zeros(8), zeros(8), Mask.full(4, 8), "context", mesh=mesh_of(4)),
         "mask must have query's q_len 8, got 4"),
        (lambda: context_attend(zeros(8), zeros(8), zeros(8), None, "context", mesh=mesh_of(4), batch_axis="data"),
         "query's batch can't be spread over 'data': the mesh has 'context'"),
        (lambda: context_attend(zeros(8), zeros(8), zeros(8), None, "context", batch_axis="data",
                                mesh=mesh_of(2, 4, names=("data", "context"))),
         "query's batch must be a multiple of the 2 devices of 'data', got 1"),
        (lambda: context_attend(zeros(8), zeros(8, heads=2), zeros(8, heads=2), None, "context",
                                mesh=mesh_of(2, 4, names=("context", "tensor")), head_axis="tensor"),
         "key's heads must be a multiple of the 4 devices of 'tensor', got 2"),
        (lambda: context_attend(zeros(8), zeros(8), zeros(8), None, "context", mesh=mesh_of(4), implementation="no"),
         "implementation must be one of"),
        (lambda: shard(zeros(33), "context", mesh=mesh_of(4)), "the length along axis 1 must be a multiple of the 4"),
        (lambda: shard(zeros(32), "context", mesh=mesh_of(2, 4, names=("data", "context")), batch_axis="data"),
         "the batch must be a multiple of the 2 devices of 'data', got 1"),
        (lambda: shard(zeros(32), "context", np.arange(16), mesh=mesh_of(4)), "order must have the 32 positions"),
        (lambda: within(shard)(zeros(33)), "the length along axis 1 must be a multiple of the 4 devices"),
        (lambda: within(lambda x, axis: context_attend(x, x, x, None, axis, mesh=mesh_of(4)))(zeros(8)),
         "mesh must be None within a shard_map over 'context'"),
        (lambda: within(lambda x, axis: context_attend(x, x, x, None, "data"))(zeros(8)),
         "axis must be one of the mesh's 'context', got 'data'"),
        (lambda: within(lambda x, axis: context_attend(x, x, x, None, "data"), ("data", "context"))(zeros(8)),
         "the shard_map around must be over all axes of the mesh, it leaves out ['data']"),
        (lambda: within(lambda x, axis: context_attend(x, x, x, None, axis, head_axis="tensor"))(zeros(8)),
         "head_axis must be None within a shard_map over 'context', got 'tensor'"),
        (lambda: within(lambda x, axis: context_attend(x, x, x, None, axis), ("data", "context"))(zeros(8)),
         "the shard_map around must be over all axes of the mesh, it leaves out ['data']"),
    ],
)  # fmt: skip
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def within(function, names=AXES):
    mesh, spec = mesh_of(*(2,) * (len(names) - 1), 4, names=names), PartitionSpec()
    function = partial(function, axis="context")
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"context"})


# ---------------------------------------------------------------- processes


@pytest.mark.slow
def test_two_processes():
    """Two processes of two devices, with gloo between them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parents[1]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests), "XLA_FLAGS": flags}
    running = [
        subprocess.Popen(
            [sys.executable, tests / "jax" / "context_parallel_processes.py", f"localhost:{port}", "2", str(process)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for process in running:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, out + err[-6000:]
            assert out.splitlines()[-1] == "same"  # after what gloo has to say
    finally:
        for process in running:
            process.kill()
            process.wait()
