"""A model over 8 devices of this process, and over 2 processes: the table, and that nothing differs from one device."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from mesh_cases import (
    CONFIGS,
    MESHES,
    ROWS,
    SEQ,
    SIZES,
    assert_close,
    assert_gradients_close,
    build,
    config,
    curve,
    loss_and_gradients,
    packed,
    trainer,
)

from heddle.data.tokenizers import Tokenizer
from heddle.jax.checkpoint import Safetensors
from heddle.jax.engine import Engine, Request
from heddle.jax.generation import generate
from heddle.jax.lm import cross_entropy, lm
from heddle.jax.model import Transformer
from heddle.jax.model_config import Dilation
from heddle.jax.parallel import (
    Layout,
    check_parameters,
    create,
    make_mesh,
    partition_spec,
    place,
    shardings,
)  # fmt: skip

# ---------------------------------------------------------------- meshes and the table


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"fsdp": 8}, (1, 8, 1, 1)),
        ({"data": 2, "tensor": -1}, (2, 1, 1, 4)),
        ({"data": 2, "fsdp": 2, "context": 2}, (2, 2, 2, 1)),
        ({"context": -1, "tensor": 8}, (1, 1, 1, 8)),
    ],
)
def test_meshes(sizes, shape):
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "context", "tensor")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, "must multiply to the 8 devices there are, got fsdp=3"),
        ({}, "must multiply to the 8 devices there are, got data=1"),
        ({"tensor": 3, "data": -1}, "must divide the 8 devices there are, got tensor=3"),
        ({"tensor": -1, "data": -1}, "one axis of the mesh may be -1, got data and tensor"),
        ({"context": 0}, "context must be a positive integer, or -1 for what is left, got 0"),
    ],
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_the_table():
    assert partition_spec("layers.0.attention.q.weight", 2) == PartitionSpec("fsdp", "tensor")
    assert partition_spec("1.0.mu.layers.1.ffn.down.weight", 2) == PartitionSpec("tensor", "fsdp")
    assert partition_spec("layers.0.attention.replicas.prefix_k", 4) == PartitionSpec(None, "tensor", None, None)
    assert partition_spec("layers.0.attention_norm.weight", 1) == PartitionSpec(None)
    assert partition_spec("v_row.layers.0.attention.q.weight", 1) == PartitionSpec(None)  # a factor of its moment
    assert partition_spec("layers.0.ffn.down.adapter.a", 2) == PartitionSpec("tensor", None)
    assert partition_spec("1.0.mu.layers.0.ffn.down.adapter.b", 2) == PartitionSpec(None, "fsdp")
    assert partition_spec("v_row.layers.0.ffn.down.adapter.b", 1) == PartitionSpec(None)
    assert partition_spec("layers.0.another.adapter.a", 2) == PartitionSpec(None, None)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_matrix_is_cut(kind):
    """Along both fsdp and tensor, but for what is small."""
    shapes, mesh = jax.eval_shape(lambda: build(kind)), make_mesh(fsdp=4, tensor=2)
    where = shardings(shapes, mesh)
    for (path, leaf), (_, sharding) in zip(*map(jax.tree_util.tree_leaves_with_path, (shapes, where)), strict=True):
        axes = {axis for axis in sharding.spec if axis}
        if leaf.ndim == 2:
            assert axes == ({"fsdp"} if "aggregate" in str(path) else {"fsdp", "tensor"}), path
    size = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    local = sum(
        np.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(where), strict=True)
    )
    assert local < 0.2 * size


@pytest.mark.parametrize(
    ("options", "sizes", "message"),
    [
        ({}, {"tensor": 4, "data": 2},
         r"kv_heads of layers.0.attention.k.weight must be a multiple of the 4 devices of mesh axis 'tensor', got 2"),
        ({"vocab_size": 63}, {"tensor": 2, "data": 4}, "vocab of embedding must be a multiple of the 2 .* got 63"),
        ({"hidden_size": 36, "num_attention_heads": 2}, {"fsdp": 8},
         "embed of embedding must be a multiple of the 8 .* 'fsdp', got 36"),
        ({"attention": Dilation((4,), (1,))}, {"context": 4, "tensor": 2},
         r"kv_heads of a model of dilated attention must be a multiple of the 8 .* \('tensor', 'context'\), got 2"),
    ],
)  # fmt: skip
def test_what_devices_cannot_share_is_refused_before_anything_is_allocated(options, sizes, message):
    mesh = make_mesh(**sizes)
    with pytest.raises(ValueError, match=message):
        create(lambda: Transformer(config(**options), rngs=nnx.Rngs(0)), mesh)
    shapes = jax.eval_shape(lambda: Transformer(config(**options), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        check_parameters(shapes, mesh)


@pytest.mark.parametrize(
    ("batch", "seq", "message"), [(3, 32, "batch .* 4 devices .* got 3"), (4, 31, "length .* 2 devices")]
)
def test_a_batch_that_devices_cannot_share(batch, seq, message):
    with pytest.raises(ValueError, match=message):
        Layout(make_mesh(data=2, fsdp=2, context=2)).check(batch, seq)
    Layout(make_mesh(data=2, fsdp=2, context=2), whole_rows=True).check(4, 31)


# ---------------------------------------------------------------- the forward and its gradients


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("llama", "fsdp, tensor"),
        ("tied, biases", "context, tensor"),
        ("window", "context"),
        pytest.param("dilated", "context, tensor", marks=pytest.mark.slow),
        ("longnet", "context, tensor"),
        ("joint", "context, tensor"),
        pytest.param("sublayer", "fsdp, tensor", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_one_devices(kind, mesh):
    options = {"remat": kind == "window"}
    batch = packed()
    alone = build(kind, **options)
    want, want_gradients = loss_and_gradients(alone, batch)
    model = create(partial(build, kind, **options), make_mesh(**MESHES[mesh]))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # created in parts, the same numbers
    loss, gradients = loss_and_gradients(model, batch)
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    assert_gradients_close(gradients, want_gradients)


def test_logits_without_documents_and_of_each_replicas_own():
    """Called as a user does, without jit; the context axis deals the tokens, logits come back in order."""
    mesh = make_mesh(data=2, context=2, tensor=2)
    tokens = packed().tokens
    alone = build("joint")
    model = place(build("joint"), mesh)
    np.testing.assert_allclose(model(tokens), alone(tokens), rtol=0, atol=2e-5)
    assert model(tokens).sharding.is_equivalent_to(
        NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context", "tensor")), 3
    )
    each = np.stack([tokens, tokens[::-1]], axis=1)
    ids = np.where(np.arange(SEQ) < np.array([[[0], [5]]]), -1, 0) * np.ones((ROWS, 1, 1), int)
    got, want = (m(each, segment_ids=ids.astype(np.int32)) for m in (model, alone))
    np.testing.assert_allclose(got[:, 5:], want[:, 5:], rtol=0, atol=2e-5)


def test_what_each_device_computes():
    """Attention is split, not repeated: no device sees more than its rows, heads and queries."""
    mesh = make_mesh(data=2, context=2, tensor=2)
    model, batch = place(build("llama"), mesh), packed()
    graph, params = nnx.split(model)
    text = jax.jit(lambda p, b: lm(nnx.merge(graph, p), b, None)[0]).lower(params, batch).compile().as_text()
    assert "all-gather" in text
    heads, dim, rows = SIZES["num_attention_heads"], 8, ROWS
    # Of queries and outputs (rows, seq, heads, dim) whole heads or whole rows never lie on one device.
    assert f"f32[{rows},{SEQ},{heads},{dim}]" not in text
    assert f"f32[{rows // 2},{SEQ // 2},{heads // 2},{dim}]" in text


def test_cross_entropy_by_stretches_of_each_share():
    mesh = make_mesh(data=2, context=4)
    head, rng = nnx.Linear(8, 64, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 24, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(-1, 64, (2, 24)), jnp.int32)
    want, count = cross_entropy(head, hidden, targets)
    # Shares of 6 tokens, 4 at a time.
    got, same = cross_entropy(head, hidden, targets, max_bytes=4 * 2 * 64 * 4 * 4 // 8, layout=Layout(mesh))
    assert int(same) == int(count)
    np.testing.assert_allclose(got, want, rtol=1e-6)


# ---------------------------------------------------------------- loading


def test_each_device_reads_its_own_part_alone(tmp_path, monkeypatch):
    build("tied, biases").save_pretrained(tmp_path / "model")
    alone, reads = Transformer.from_pretrained(tmp_path / "model"), []
    part = Safetensors.part

    def counted(self, name, index):
        found = part(self, name, index)
        reads.append((name, found.nbytes))
        return found

    def never(self, name):
        raise AssertionError(f"{name} was read whole")

    monkeypatch.setattr(Safetensors, "part", counted)
    monkeypatch.setattr(Safetensors, "tensor", never)
    mesh = make_mesh(fsdp=4, tensor=2)
    model = Transformer.from_pretrained(tmp_path / "model", mesh=mesh)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)
    for leaf, sharding in zip(*map(jax.tree.leaves, (model, shardings(alone, mesh))), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    matrices = [nbytes for name, nbytes in reads if name.endswith("gate_proj.weight")]
    assert matrices == [4 * 32 * 48 // 8] * 16  # each of 8 parts of 2 layers' once
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(alone))
    assert sum(nbytes for _, nbytes in reads) == total  # nothing twice, not even what all devices hold
    assert max(nbytes for _, nbytes in reads) <= 4 * 64 * 32 // 8


def test_from_a_base_model_and_back(tmp_path):
    """New ParScale parameters and the saved folder are one device's."""
    Transformer(config(model_type="qwen2"), rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "base")
    options = {"parscale_n": 2, "parscale_n_tokens": 3, "enable_cross_attn": True}

    def load(**more):
        return Transformer.from_pretrained(tmp_path / "base", rngs=nnx.Rngs(1), **options, **more)

    model = load(mesh=make_mesh(fsdp=4, tensor=2))
    model.save_pretrained(tmp_path / "out")
    again = Transformer.from_pretrained(tmp_path / "out")
    for a, b, c in zip(*map(jax.tree.leaves, (load(), model, again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(b, c)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("kind", ["tied, biases", pytest.param("dilated", marks=pytest.mark.slow), "joint"])
def test_generation_is_one_devices(kind):
    mesh, tokenizer = make_mesh(data=2, fsdp=2, tensor=2), Tokenizer.bytes()
    made = replace(CONFIGS[kind](), vocab_size=264)

    def model():
        return Transformer(made, rngs=nnx.Rngs(0))

    prompts = ["abc", "a longer prompt than the others", "x", "12345"]
    alone = generate(model(), tokenizer, prompts, max_tokens=12)
    spread = create(model, mesh)
    got = generate(spread, tokenizer, prompts, max_tokens=12)
    assert [c.tokens for c in got] == [c.tokens for c in alone]
    cache = spread.empty_cache(4, 64)
    keys = jax.tree.leaves(cache.keys)[0]
    assert keys.sharding.spec == PartitionSpec(("data", "fsdp"), "tensor")
    with pytest.raises(ValueError, match=r"the batch must be a multiple of the 4 devices"):
        generate(spread, tokenizer, prompts[:3], max_tokens=4)


def test_serving_over_tensor_alone():
    made, tokenizer = config(vocab_size=264), Tokenizer.bytes()
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    requests = [Request(prompt, max_tokens=10, stop_ids=()) for prompt in ("abc", "something longer to read", "x")]

    def answers(model):
        engine = Engine(model, tokenizer, max_batch=4, blocks=16, block_size=16, prefill_chunk=32)
        return engine, [answer.tokens for [answer] in engine.run(requests)]

    engine, got = answers(create(lambda: Transformer(made, rngs=nnx.Rngs(0)), mesh))
    assert engine._device._pool.keys[0].sharding.spec == PartitionSpec(None, "tensor")
    assert got == answers(Transformer(made, rngs=nnx.Rngs(0)))[1]
    with pytest.raises(ValueError, match="model must be spread over tensor alone to be served, got"):
        Engine(create(lambda: Transformer(made, rngs=nnx.Rngs(0)), make_mesh(fsdp=4, tensor=2)), tokenizer)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def one_devices(tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    trainer(output).fit()
    return curve(output)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, one_devices):
    """A run on fsdp=8 that is stopped at step 3, and the records of the same run uninterrupted."""
    folder = tmp_path_factory.mktemp("fsdp")
    whole = trainer(folder / "whole", {"fsdp": 8})
    whole.fit()
    moment = whole.state.optimizer[1][0].mu["layers"][0]["attention"]["q"]["weight"].get_value()
    assert {shard.data.shape for shard in moment.addressable_shards} == {(32 // 8, 32)}
    assert_close(curve(folder / "whole"), one_devices)
    first = trainer(folder / "cut", {"fsdp": 8}, checkpoint_every=1)

    def stop(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.fit(stop)
    return folder / "cut", curve(folder / "whole")


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "tensor": 2, "context": 2}, None], ids=str)
def test_a_run_goes_on_on_another_mesh(interrupted, tmp_path, sizes):
    """Bit for bit on the same; to float32 elsewhere."""
    folder, want = interrupted
    shutil.copytree(folder, tmp_path / "run")
    on = trainer(tmp_path / "run", sizes)
    steps = []
    on.fit(lambda record: steps.append(record["step"]))
    assert steps[0] == 3  # it went on
    if sizes == {"fsdp": 8}:
        assert curve(tmp_path / "run") == want
    else:
        assert_close(curve(tmp_path / "run"), want)


def test_batches_are_checked_when_a_trainer_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"the batch must be a multiple of the 8 devices of .* got 4"):
        trainer(tmp_path, {"fsdp": 8}, accumulation=4)
