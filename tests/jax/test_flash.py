"""kvax's API in both styles, on one device and over a mesh, beside the float64 oracle; and its known faults."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from attention_cases import Case, oracle, segments
from heddle import PADDING_SEGMENT_ID, Mask
from heddle.attention import balance
from heddle.jax import (
    FlashAttentionParamsConfig,
    attention_specs,
    create_attention_mask,
    flash,
    flash_attention,
    permute_tokens_context_parallelism,
    unpermute_tokens_context_parallelism,
)
from heddle.kernels import plan

SEQ = 64
SEGMENTS = np.concatenate([segments(20, 30, 8, padding=6), segments(41, 23, ids=(1000, 3))])
CASE = Case("packed", SEQ, SEQ, lambda: Mask.documents(SEGMENTS), batch=2, heads=4, kv_heads=2, scale=1.0)
TENSOR = ("data", None, "tensor", None), ("data", None, "tensor", None)
CONTEXT = ("data", "context", None, None), ("data", None, None, None)


@pytest.fixture(scope="module")
def case():
    arrays = CASE.arrays()
    arrays["d_lse"] *= 0  # kvax returns no lse
    return arrays, oracle(CASE, {name: a.astype(np.float64) for name, a in arrays.items()})


def mesh(kind: str, explicit: bool = False):
    names = ("data", kind)
    return jax.make_mesh((2, 2), names, axis_types=(AxisType.Explicit if explicit else AxisType.Auto,) * 2)


def places(segment_ids) -> np.ndarray:
    """Positions that begin anew with each document."""
    index = np.arange(segment_ids.shape[1])
    new = np.concatenate([np.ones((len(segment_ids), 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return (index - np.maximum.accumulate(np.where(new, index, 0), axis=1)).astype(np.int32)


def run(arrays, order=None, with_mask=True, **options):
    """Values and gradients in natural order, from arrays that were put into ``order``."""
    query, key, value, d_out = (jnp.asarray(arrays[name]) for name in ("query", "key", "value", "d_out"))
    ids, positions = jnp.asarray(SEGMENTS), jnp.asarray(places(SEGMENTS))
    if order is not None:
        query, key, value, d_out = balance.permute((query, key, value, d_out), order)
    of_queries = (positions, ids) if order is None else balance.permute((positions, ids), order)
    of_mesh = {name: options[name] for name in ("mesh", "query_spec", "kv_spec") if name in options}

    @jax.jit
    def both(query, key, value, d_out):
        mask = create_attention_mask(*of_queries, positions, ids, **of_mesh) if with_mask else None

        def forward(query, key, value):
            return flash_attention(query, key, value, *of_queries, positions, ids, mask, **options)

        out, pull = jax.vjp(forward, query, key, value)
        return out, *pull(d_out)

    results = both(query, key, value, d_out)
    results = results if order is None else balance.unpermute(tuple(results), order)
    return dict(zip(("out", "dq", "dk", "dv"), results))


def compare(got, want):
    for name, array in got.items():
        bound = 1e-5 * max(1.0, np.abs(want[name]).max())
        np.testing.assert_allclose(array, want[name], rtol=0, atol=bound, err_msg=name)


ZIGZAG = balance.zigzag(SEQ, 2)


@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no mask"])
def test_one_device(case, with_mask):
    compare(run(case[0], with_mask=with_mask), case[1])


@pytest.mark.parametrize("style", ["clean", "context"])
@pytest.mark.parametrize("kind", ["tensor", "context"])
def test_over_a_mesh(case, style, kind):
    arrays, want = case
    query_spec, kv_spec = TENSOR if kind == "tensor" else CONTEXT
    order = ZIGZAG if kind == "context" else None
    if style == "clean":
        compare(run(arrays, order, mesh=mesh(kind), query_spec=query_spec, kv_spec=kv_spec), want)
    else:
        with jax.set_mesh(mesh(kind)), attention_specs(query_specs=query_spec, kv_specs=kv_spec):
            compare(run(arrays, order), want)


def test_one_key_head_for_all(case):
    """It may be whole on all devices where the queries' heads are spread."""
    arrays = {name: a[:, :, :1] if name in ("key", "value") else a for name, a in case[0].items()}
    one = Case("one", SEQ, SEQ, CASE.mask, batch=2, heads=4, kv_heads=1, scale=1.0)
    want = oracle(one, {name: a.astype(np.float64) for name, a in arrays.items()})
    compare(run(arrays, mesh=mesh("tensor"), query_spec=TENSOR[0], kv_spec=("data", None, None, None)), want)


def test_context_parallel_without_permutation(case):
    options = {"query_spec": CONTEXT[0], "kv_spec": ("data", "context", None, None)}
    compare(run(case[0], mesh=mesh("context"), permute_tokens_for_load_balance=False, **options), case[1])


def test_explicit_axes(case):
    with jax.set_mesh(mesh("context", explicit=True)), attention_specs(*CONTEXT):
        # There a cotangent has to be spread as what it is of.
        d_out = jax.device_put(case[0]["d_out"], PartitionSpec("data", "context"))
        compare(run(case[0] | {"d_out": d_out}, permute_tokens_for_load_balance=False), case[1])


def test_assume_sequential_positions(case):
    """Positions aren't read, and may be None: they are the indices, of permuted queries too."""
    arrays, want = case
    query, key, value = (jnp.asarray(arrays[name]) for name in ("query", "key", "value"))
    wrong = jnp.zeros_like(jnp.asarray(SEGMENTS))
    for positions in (None, wrong):
        out = flash_attention(
            query, key, value, positions, jnp.asarray(SEGMENTS), positions, jnp.asarray(SEGMENTS),
            assume_sequential_positions=True,
        )  # fmt: skip
        compare({"out": out}, want)
    query, key, value, ids = balance.permute((query, key, value, SEGMENTS), ZIGZAG)
    out = flash_attention(
        query, key, value, None, ids, None, jnp.asarray(SEGMENTS),
        mesh=mesh("context"), query_spec=CONTEXT[0], kv_spec=CONTEXT[1], assume_sequential_positions=True,
    )  # fmt: skip
    compare({"out": balance.unpermute(out, ZIGZAG)}, want)


def test_memory_optimized_backward_is_the_same(case):
    got, plain = run(case[0], memory_optimized_gqa_backward=True), run(case[0])
    for name, array in got.items():
        np.testing.assert_array_equal(array, plain[name])


def test_scale_is_one_unless_given(case):
    arrays, want = case
    compare(run(arrays), want)
    other = Case("scaled", SEQ, SEQ, CASE.mask, batch=2, heads=4, kv_heads=2, scale=0.25)
    scaled = oracle(other, {name: a.astype(np.float64) for name, a in arrays.items()})
    compare(run(arrays, scale=0.25), scaled)
    compare(run(arrays, scale=1 / jnp.sqrt(16.0)), scaled)


def test_params_override_the_plan(case, monkeypatch):
    """Where the kernels run, they take these tiles, also after others were taken for the same shapes."""
    seen = []
    attend = flash.attend

    def noting(*args, **kwargs):
        seen.append({name: tuple(plan.tile(name, 16, 16, 2, 90)) for name in plan.KERNELS})
        return attend(*args, **kwargs)

    monkeypatch.setattr(flash, "attend", noting)
    own = {name: tuple(plan.tile(name, 16, 16, 2, 90)) for name in plan.KERNELS}
    run(case[0], scale=0.51)
    forward = FlashAttentionParamsConfig(query_block_size=32, kv_block_size=16, num_warps=2, num_stages=1)
    run(case[0], scale=0.51, fwd_params=forward)
    run(case[0], scale=0.51, bwd_params=FlashAttentionParamsConfig(64, 32, 8, 2))
    assert seen == [
        own,
        own | {"forward": (32, 16, 2, 1)},
        own | {"backward_kv": (64, 32, 8, 2), "backward_q": (32, 64, 8, 2)},
    ]
    assert {name: tuple(plan.tile(name, 16, 16, 2, 90)) for name in plan.KERNELS} == own


def test_by_kvaxs_names_tokens_are_permuted_and_put_back():
    x = jnp.arange(2 * SEQ).reshape(2, SEQ)
    with jax.set_mesh(mesh("context")), attention_specs(*CONTEXT):
        permuted = permute_tokens_context_parallelism((x, x[..., None]))
        np.testing.assert_array_equal(permuted[0], x[:, ZIGZAG])
        for array, want in zip(unpermute_tokens_context_parallelism(permuted), (x, x[..., None])):
            np.testing.assert_array_equal(array, want)
    with attention_specs(*CONTEXT):
        np.testing.assert_array_equal(permute_tokens_context_parallelism(x, mesh("context")), x[:, ZIGZAG])


# ---------------------------------------------------------------- kvax's known faults, of its functions


def test_a_backward_mask_without_parameters():
    """There ``calc_bwd_mask=True`` without parameters crashes."""
    ids, positions = jnp.asarray(SEGMENTS), jnp.asarray(places(SEGMENTS))
    mask = create_attention_mask(positions, ids, positions, ids, calc_bwd_mask=True)
    np.testing.assert_array_equal(mask.dense(SEQ), Mask.documents(SEGMENTS).dense(SEQ))


def test_large_ids_and_padding(case):
    """There ids above the sequence's length break the padding; 1000 is one in the case. Padding gives 0 here."""
    out = run(case[0])["out"]
    padding = SEGMENTS == PADDING_SEGMENT_ID
    np.testing.assert_array_equal(np.asarray(out)[padding], 0)
    assert np.abs(out[~padding]).min(axis=(1, 2)).min() > 0


@pytest.mark.parametrize(("q_len", "kv_len"), [(50, 50), (20, 50), (50, 20), (1, 33)])
def test_tails_and_different_lengths_have_gradients(q_len, kv_len):
    """There a tail of rows is skipped in backward, which also needs as many queries as keys."""
    offset = max(0, kv_len - q_len)
    case = Case("cross", q_len, kv_len, lambda: Mask.causal(q_len, kv_len, offset), heads=4, kv_heads=2, scale=1.0)
    arrays = case.arrays()
    arrays["d_lse"] *= 0
    want = oracle(case, {name: a.astype(np.float64) for name, a in arrays.items()})
    query, key, value, d_out = (jnp.asarray(arrays[name]) for name in ("query", "key", "value", "d_out"))
    ids = [jnp.zeros((1, n), jnp.int32) for n in (q_len, kv_len)]
    positions = [jnp.arange(q_len)[None] + offset, jnp.arange(kv_len)[None]]

    def forward(query, key, value):
        return flash_attention(query, key, value, positions[0], ids[0], positions[1], ids[1])

    out, pull = jax.vjp(forward, query, key, value)
    compare(dict(zip(("out", "dq", "dk", "dv"), (out, *pull(d_out)))), want)


def test_no_mesh_raises_where_there_are_specs():
    """There it never does."""
    ids, x = jnp.asarray(SEGMENTS), jnp.zeros((2, SEQ, 4, 16))
    with attention_specs(*CONTEXT):
        for call in (
            lambda: flash_attention(x, x, x, ids, ids, ids, ids),
            lambda: create_attention_mask(ids, ids, ids, ids),
            lambda: permute_tokens_context_parallelism(x),
            lambda: unpermute_tokens_context_parallelism(x),
        ):
            with pytest.raises(ValueError, match="mesh must be given where there are specs"):
                call()
    with pytest.raises(ValueError, match="mesh must be given where there are specs"):
        flash_attention(x, x, x, ids, ids, ids, ids, query_spec=CONTEXT[0], kv_spec=CONTEXT[1])


def test_the_clean_styles_keys_are_unpermuted(case):
    """There its unpermute does nothing: the keys of permuted tokens stand in the wrong place."""
    arrays, want = case
    options = {"mesh": mesh("context"), "query_spec": CONTEXT[0], "kv_spec": CONTEXT[1]}
    compare({"out": run(arrays, ZIGZAG, **options)["out"]}, want)
    left = run(arrays, ZIGZAG, permute_tokens_for_load_balance=False, **options)["out"]
    assert np.abs(np.asarray(left) - want["out"]).max() > 0.1


# ---------------------------------------------------------------- refusals


@pytest.mark.usefixtures("unhooked")
def test_specs_and_meshes_that_cannot_be():
    ids, x = jnp.asarray(SEGMENTS), jnp.zeros((2, SEQ, 4, 16))

    def call(**options):
        return flash_attention(x, x, x, ids, ids, ids, ids, **options)

    with pytest.raises(ValueError, match="given with a mesh, or attention_specs be around"):
        call(mesh=mesh("context"))
    with pytest.raises(ValueError, match="both or neither"):
        call(mesh=mesh("context"), query_spec=CONTEXT[0])
    with pytest.raises(ValueError, match="must name axes of the mesh, data, tensor; got 'context'"):
        call(mesh=mesh("tensor"), query_spec=CONTEXT[0], kv_spec=CONTEXT[1])
    for query_specs, kv_specs, message in (
        (("data", None, None), CONTEXT[1], "query specs must be four"),
        (CONTEXT[0], ("data", None, None, "context"), "kv specs must leave head_dim whole"),
        (CONTEXT[0], (None, None, None, None), "one batch axis"),
        (("data", None, None, None), ("data", "context", None, None), "sequence must be None or the queries' axis"),
        (("data", ("context", "tensor"), None, None), CONTEXT[1], "must be one mesh axis"),
    ):
        with pytest.raises(ValueError, match=message), attention_specs(query_specs, kv_specs):
            pass
    with pytest.raises(ValueError, match=r"one axis of heads, .* got 'tensor' and None"):
        call(mesh=mesh("tensor"), query_spec=TENSOR[0], kv_spec=("data", None, None, None))
    with pytest.raises(ValueError, match="unless assume_sequential_positions"):
        flash_attention(x, x, x, None, ids, None, ids)
    with pytest.raises(ValueError, match="over the sequence axis of attention_specs"):
        permute_tokens_context_parallelism(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_block_size": 48}, "query_block_size must be a power of two from 16 on, got 48"),
        ({"kv_block_size": 8}, "kv_block_size must be a power of two from 16 on, got 8"),
        ({"num_warps": 3}, "num_warps must be a power of two up to 16, got 3"),
        ({"num_stages": 0}, "num_stages must be at least 1, got 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_params_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        FlashAttentionParamsConfig(**options)
