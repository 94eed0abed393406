"""The plan of a run's memory beside what XLA lays out for the same program, and beside the arrays themselves."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from heddle.data.packing import Batch
from heddle.jax import decoding
from heddle.jax.lm import lm
from heddle.jax.memory import Run, plan
from heddle.jax.model import Transformer
from heddle.jax.model_config import ModelConfig
from heddle.jax.optimizer import make_optimizer, make_schedule
from heddle.jax.parallel import cache_spec, dotted, make_mesh, partition_spec, spec
from heddle.jax.sampling import Greedy
from heddle.jax.train import Trainer, TrainState
from heddle.memory.report import largest
from heddle.options import TrainingOptions

CONFIG = ModelConfig(
    vocab_size=320, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=4096,
)  # fmt: skip
shape = jax.ShapeDtypeStruct


def laid_out(stats) -> int:
    return (
        stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    )


def on(mesh, path, leaf):
    """As the trainer has it on a mesh."""
    return shape(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, partition_spec(dotted(path), leaf.ndim)))


def trained(run: Run) -> int:
    """Bytes on a device of the trainer's compiled step, for which no array is made."""
    model = nnx.eval_shape(lambda: Transformer(run.config, rngs=nnx.Rngs(0), remat=run.remat))
    mesh = model.mesh = make_mesh(**run.mesh) if run.mesh else None
    options = TrainingOptions(batch_size=run.batch, accumulation=run.accumulation, optimizer=run.optimizer)
    trainer = Trainer.__new__(Trainer)
    trainer._mesh, trainer.options, trainer._objective, trainer._trainable = mesh, options, lm, nnx.Param
    trainer._schedule, trainer._optimizer = make_schedule(options), make_optimizer(options)
    trainer._graph, variables = nnx.split(model)
    parts = Batch(*[shape((run.accumulation, run.batch // run.accumulation, run.seq), jnp.int32)] * 4)
    params = nnx.filter_state(variables, nnx.Param)
    state = TrainState(
        step=shape((), jnp.int32), model=variables, optimizer=jax.eval_shape(trainer._optimizer.init, params),
        rng=shape((2,), jnp.uint32), nonfinite=shape((), jnp.int32),
    )  # fmt: skip
    if mesh is not None:
        where = NamedSharding(mesh, spec(None, "batch", "seq"))
        parts = jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=where), parts)
        state = jax.tree_util.tree_map_with_path(partial(on, mesh), state)
        return laid_out(trainer._compile(state, parts).memory_analysis())
    # XLA's pipeline for CPUs drops the barriers of jax.checkpoint, and with them what it saves; those for accelerators
    # keep them.
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"} if run.remat else None
    lowered = jax.jit(trainer._step, donate_argnums=0).lower(state, parts)
    return laid_out(lowered.compile(compiler_options=options).memory_analysis())


@pytest.mark.parametrize(
    "run",
    [
        Run(CONFIG, batch=4, seq=256),
        Run(CONFIG, batch=4, seq=256, remat=True),
        Run(CONFIG, batch=2, seq=1024, optimizer="lion"),
        Run(CONFIG, batch=8, seq=256, accumulation=2),
        Run(dataclasses.replace(CONFIG, vocab_size=24000, tie_word_embeddings=True), batch=2, seq=512),
        Run(CONFIG, batch=16, seq=256, mesh={"fsdp": 8}),
        Run(CONFIG, batch=8, seq=256, mesh={"data": 2, "fsdp": 2, "tensor": 2}),
    ],
    ids=["plain", "remat", "lion", "accumulation", "logits in stretches", "fsdp", "all axes"],
)
def test_training(run):
    if len(jax.devices()) < run.devices:
        pytest.skip("needs 8 devices")
    assert plan(run).total == pytest.approx(trained(run), rel=0.1)


def programs(run: Run) -> list:
    """Of generation's two compiled programs, which read the prompts and decode, what XLA lays out on a device."""
    model = nnx.eval_shape(
        lambda: Transformer(run.config, rngs=nnx.Rngs(0), dtype=run.dtype, param_dtype=run.weights_dtype)
    )
    cache = jax.eval_shape(lambda: model.empty_cache(run.batch, run.seq, run.cache_dtype))
    if run.mesh:
        mesh = make_mesh(**run.mesh)
        model = jax.tree_util.tree_map_with_path(partial(on, mesh), model)
        model.mesh = mesh

        def spread(path, leaf):
            return shape(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, cache_spec(dotted(path))))

        cache = jax.tree_util.tree_map_with_path(spread, cache)
    leaves, structure = jax.tree.flatten(model)
    last, ids = shape((run.batch, run.config.hidden_size), model.dtype), shape((run.batch, 512), jnp.int32)
    reading = decoding.prefill.lower(structure, leaves, cache, last, ids)
    keys = jax.eval_shape(lambda: jax.vmap(jax.random.key)(jnp.zeros(run.batch, jnp.uint32)))
    token, count, limit, done = (shape((run.batch,), dtype) for dtype in (jnp.int32,) * 3 + (bool,))
    state = decoding.State(cache, token, count, limit, done, keys, None)
    ends, steps = shape((8,), jnp.int32), shape((), jnp.int32)
    writing = decoding.decode.lower(structure, leaves, state, Greedy(), ends, steps, None, None, 1.0)
    return [program.compile().memory_analysis() for program in (reading, writing)]


def generated(run: Run) -> int:
    return max(map(laid_out, programs(run)))


@pytest.mark.parametrize(
    "run",
    [
        Run(CONFIG, "generate", batch=4, seq=1024),
        Run(CONFIG, "generate", batch=2, seq=2048),
        Run(CONFIG, "generate", batch=4, seq=1024, cache_dtype="int8"),
        Run(CONFIG, "generate", batch=8, seq=1024, mesh={"data": 4, "tensor": 2}),
        Run(CONFIG, "generate", batch=8, seq=1024, mesh={"data": 2, "fsdp": 2, "tensor": 2}),
    ],
    ids=["some at a time", "at once", "int8", "mesh", "mesh with fsdp"],
)
def test_generation(run):
    if len(jax.devices()) < run.devices:
        pytest.skip("needs 8 devices")
    assert plan(run).total == pytest.approx(generated(run), rel=0.1)


def test_generation_in_bfloat16():
    """What is held, to a few bytes for each sequence. A CPU computes in float32, for which it lays out more."""
    run = Run(CONFIG, "generate", batch=4, seq=1024, dtype="bfloat16")
    planned = plan(run)
    reading, writing = programs(run)
    held = planned.parts["parameters"] + planned.parts["KV cache"]
    assert 0 <= writing.argument_size_in_bytes - held < 1024
    assert planned.total <= laid_out(reading) <= 1.5 * planned.total


@pytest.mark.parametrize(
    ("run", "measured"),
    [(Run(CONFIG, batch=3, seq=256), trained), (Run(CONFIG, "generate", batch=6, seq=1024), generated)],
    ids=["train", "generate"],
)
def test_one_more_than_the_largest_batch_that_fits_does_not(run, measured):
    room = int(1.02 * plan(run).total)
    assert largest(plan, dataclasses.replace(run, batch=1), "batch", room).batch == run.batch
    assert measured(run) <= 1.1 * room
    assert 1.1 * measured(dataclasses.replace(run, batch=run.batch + 1)) > room


def test_what_has_a_shape_is_counted_by_it():
    """Exactly, on each device what the mesh cuts for it."""
    config = ModelConfig.from_pretrained()
    run = Run(config, "generate", batch=2, seq=2048, cache_dtype="int8")
    parts = plan(run).parts
    assert parts["parameters"] == 4 * 134_515_008
    assert parts["KV cache"] == 2 * 30 * 2 * 3 * 2048 * (64 + 4) + 2 * 4
    halves = plan(dataclasses.replace(run, mesh={"tensor": 3})).parts
    whole = 4 * 61 * 576  # the norms
    assert halves["parameters"] == (parts["parameters"] - whole) // 3 + whole
    assert halves["KV cache"] == 30 * 2 * 2 * 2048 * (64 + 4) + 2 * 4


def test_replicas_are_rows():
    config = dataclasses.replace(CONFIG, model_type="qwen2_parscale", attention_bias=True, parscale_n=4)
    one = dataclasses.replace(config, parscale_n=1)
    many, few = (plan(Run(c, "generate", batch=2, seq=512)).parts for c in (config, one))
    assert many["KV cache"] - 4 * (2 + 8) == 4 * (few["KV cache"] - 4 * 2)
    assert plan(Run(config, batch=1, seq=64)).parts["activations"] == pytest.approx(
        4 * plan(Run(one, batch=1, seq=64)).parts["activations"]
    )


@pytest.mark.slow
def test_smollm2():
    run = Run(ModelConfig.from_pretrained(), batch=2, seq=512)
    assert plan(run).total == pytest.approx(trained(run), rel=0.1)
