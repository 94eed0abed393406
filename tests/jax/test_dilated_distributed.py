"""Dilated attention over the devices of a mesh axis is that of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dilated_oracle import dilated
from jax.sharding import AxisType, PartitionSpec

from heddle.jax import distributed_dilated_attention

AXIS = "context"
#: Of 8 tokens a device: within a device; over 2; over all, as 3 don't divide 8; longer than the sequence.
PATTERNS = {
    "four": ((4, 16, 24, 100), (1, 2, 3, 5)),
    "w < r, rows uncovered": ((3, 12), (5, 4)),
    "spread": ((16, 100), (2, 5)),
}


def mesh_of(*sizes: int, names: tuple[str, ...] = (AXIS,)) -> jax.sharding.Mesh:
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


def problem(heads=6, kv_heads=3, batch=2, seq=64):
    rng = np.random.default_rng(0)
    shapes = [(heads, 8), (kv_heads, 8), (kv_heads, 8), (heads, 8)]
    return [rng.normal(size=(batch, seq, *shape)).astype(np.float32) for shape in shapes], rng.normal(
        size=(batch, seq, heads)
    ).astype(np.float32)


def run(function, inputs, d_out, d_lse):
    @jax.jit
    def both(query, key, value, d_out, d_lse):
        results, pull = jax.vjp(function, query, key, value)
        return *results, *pull((d_out, d_lse))

    return both(*inputs, d_out, d_lse)


@pytest.mark.parametrize(
    ("patterns", "is_causal", "devices"),
    [("four", True, (8,)), ("spread", False, (8,)), ("w < r, rows uncovered", True, (2, 4))],
)
def test_it_is_one_devices(patterns, is_causal, devices):
    """Outputs, lse and gradients."""
    (*inputs, d_out), d_lse = problem()
    mesh = mesh_of(*devices, names=("data", AXIS)[-len(devices) :])
    lists, batch_axis = PATTERNS[patterns], "data" if len(devices) > 1 else None
    want = dilated(*inputs, *lists, is_causal, d_out=d_out, d_lse=d_lse)

    def function(query, key, value):
        out, lse = distributed_dilated_attention(
            query, key, value, *lists, AXIS, is_causal=is_causal, mesh=mesh, batch_axis=batch_axis, return_lse=True
        )
        return out, lse

    got = run(function, inputs, d_out, d_lse)
    for name, found, expected in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5, err_msg=name)
    assert len({str(shard.index) for shard in got[0].addressable_shards}) == 8


#: Documents that begin within a device's part of 8 tokens, reach over several, and padding between and behind.
SEGMENT_IDS = np.repeat([[0, 1, 2, -1, 3, 4, -1], [5, 1, 0, 7, -1, 2, 3]], [3, 22, 1, 5, 17, 9, 7], axis=1)
SEGMENT_IDS[1] = np.repeat([0, -1, 2, 5], [40, 2, 2, 20])


@pytest.mark.parametrize(
    ("patterns", "is_causal", "padding"),
    [("four", True, False), ("spread", False, True), ("w < r, rows uncovered", False, False)],
)
def test_documents_and_padding(patterns, is_causal, padding):
    """Outputs, lse and gradients, as of one device; on whole arrays under jit."""
    (*inputs, d_out), d_lse = problem()
    told: dict = {"segment_ids": SEGMENT_IDS}
    if padding:
        told["key_padding_mask"] = np.random.default_rng(1).random((2, 64)) < 0.2
    want = dilated(*inputs, *PATTERNS[patterns], is_causal, d_out=d_out, d_lse=d_lse, **told)

    told = {name: jnp.asarray(x) for name, x in told.items()}

    def function(query, key, value):
        return distributed_dilated_attention(
            query, key, value, *PATTERNS[patterns], AXIS, is_causal=is_causal, mesh=mesh_of(8), return_lse=True, **told
        )

    for name, found, expected in zip(
        ("out", "lse", "dq", "dk", "dv"), run(function, inputs, d_out, d_lse), want, strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5, err_msg=name)


def test_within_a_shard_map():
    (query, key, value, _), _ = problem(heads=4, kv_heads=4, batch=1)
    lists, spec = PATTERNS["four"], PartitionSpec(None, AXIS)

    def local(*parts):
        return distributed_dilated_attention(*parts, *lists, AXIS, is_causal=True)

    got = jax.jit(jax.shard_map(local, mesh=mesh_of(8), in_specs=spec, out_specs=spec))(query, key, value)
    np.testing.assert_allclose(got, dilated(query, key, value, *lists, True)[0], rtol=0, atol=1e-5)


def test_what_is_sent_goes_to_those_who_share_a_segment():
    """Segments of two devices' parts, every other token of which is kept: half a part, to one other device."""
    query = jnp.zeros((1, 64, 2, 8))

    def function(*inputs):
        return distributed_dilated_attention(*inputs, [16], [2], AXIS, mesh=mesh_of(8))

    text = jax.jit(function).lower(query, query, query).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert len(gathers) == 1
    assert "replica_groups={{0,1},{2,3},{4,5},{6,7}}" in gathers[0] or "replica_groups=[4,2]<=[8]" in gathers[0]
    assert "f32[1,10,2,16]" in gathers[0]  # of two devices, at most 5 tokens each


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: distributed_dilated_attention(x[:, :30], x[:, :30], x[:, :30], [4], [1], AXIS, mesh=mesh_of(8)),
         "query's length must be a multiple of the 8 devices of 'context', got 30"),
        (lambda x: distributed_dilated_attention(x, x, x, [4], [1, 2], AXIS, mesh=mesh_of(8)), "must be of one length"),
        (lambda x: distributed_dilated_attention(x, x, x, [4], [1], "contxt", mesh=mesh_of(8)), "axis must be one of"),
        (lambda x: distributed_dilated_attention(x, x, x, [4], [1], AXIS), "mesh must be given"),
        (lambda x: distributed_dilated_attention(
            x, x, x, [4], [1], AXIS, batch_axis="data", mesh=mesh_of(2, 4, names=("data", AXIS))),
         "query's batch must be a multiple of the 2 devices of 'data', got 1"),
    ],
)  # fmt: skip
def test_refusals(call, message, unhooked):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((1, 32, 4, 8)))
