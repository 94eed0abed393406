"""Small models of every family, a packed batch, and meshes of 8 devices, where nothing may differ from one device."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from attention_cases import segments
from heddle.data.packing import NO_TARGET, Batch, Packer
from heddle.jax.lm import lm
from heddle.jax.longnet import LongNetConfig, LongNetLM
from heddle.jax.lora import add_adapters
from heddle.jax.model import Transformer
from heddle.jax.model_config import Dilation, ModelConfig
from heddle.jax.parallel import create, make_mesh
from heddle.jax.train import Trainer
from heddle.metrics import read_metrics
from heddle.options import TrainingOptions

SEQ, ROWS = 32, 4
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip


def config(**options):
    return ModelConfig(**SIZES | options)


def parscale(mode):
    return config(model_type="qwen2").with_parscale(
        parscale_n=2, parscale_n_tokens=3, enable_cross_attn=True, parscale_cross_attn_mode=mode
    )


def longnet():
    sizes = {name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "initializer_range")}
    return LongNetConfig(**sizes, segment_lengths=(4, 16), dilation_rates=(1, 2))


CONFIGS = {
    "llama": config,
    "tied, biases": partial(config, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "window": partial(config, model_type="mistral", sliding_window=5),
    "dilated": partial(config, num_key_value_heads=4, attention=Dilation((4, 16), (1, 2))),
    "joint": partial(parscale, "joint"),
    "sublayer": partial(parscale, "sublayer"),
    "longnet": longnet,
}


def build(kind, **options):
    made = CONFIGS[kind]()
    return (LongNetLM if kind == "longnet" else Transformer)(made, rngs=nnx.Rngs(0), **options)


def packed():
    """Rows of documents and padding, one of them a single document."""
    rows = [segments(9, 14, padding=9), segments(SEQ), segments(3, 20, 5, padding=4), segments(1, 31)]
    ids = np.concatenate(rows)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SIZES["vocab_size"], ids.shape).astype(np.int32)
    follows = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    targets = np.pad(np.where(follows, tokens[:, 1:], NO_TARGET), ((0, 0), (0, 1)), constant_values=NO_TARGET)
    begins = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    starts = np.maximum.accumulate(np.where(begins, np.arange(SEQ), 0), axis=1)
    positions = np.where(ids < 0, 0, np.arange(SEQ) - starts)
    return Batch(tokens, ids.astype(np.int32), positions.astype(np.int32), targets.astype(np.int32))


def loss_and_gradients(model, batch, trainable=nnx.Param):
    """Of language modelling; the gradients of what is trained."""
    graph, params, others = nnx.split(model, trainable, ...)

    @jax.jit
    def run(params, others, batch):
        def loss(params):
            total, count, _ = lm(nnx.merge(graph, params, others), batch, None)
            return total / count

        return jax.value_and_grad(loss)(params)

    return run(params, others, batch)


def assert_gradients_close(got, want):
    """To the rounding of sums in another order."""
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = float(np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * max(scale, 1e-3), err_msg=str(path))


MESHES = {
    "fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "context, tensor": {"fsdp": 2, "context": 2, "tensor": 2},
    "context": {"data": 2, "context": 4},
}


def documents(epoch, cursor):
    random = np.random.default_rng(epoch)
    lengths, starts = random.integers(1, 60, 60), random.integers(0, 64, 60)
    for at in range(cursor or 0, 60):
        yield (starts[at] + np.arange(lengths[at])) % 64, at + 1


def trainer(output, sizes=None, rank=None, **changes):
    """Of 6 steps on :func:`documents`, on a mesh of these sizes; with a rank, of adapters alone."""
    options = {
        "max_steps": 6, "batch_size": 16, "accumulation": 2, "learning_rate": 1e-2, "checkpoint_every": 3, "clip": 0.5,
        "eval_every": 6,
    }  # fmt: skip
    options = TrainingOptions(**options | changes)
    made = config(num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    mesh = None if sizes is None else make_mesh(**sizes)
    model = create(lambda: Transformer(made, rngs=nnx.Rngs(0)), mesh)
    if rank is not None:
        add_adapters(model, rank, 2.0 * rank, rngs=nnx.Rngs(1))
    evaluation = [next(Packer(documents, SEQ, 8, seed=9, window=400))]
    data = Packer(documents, SEQ, 16, seed=1, window=400)
    return Trainer(model, lm, data, options, output, evaluation, trainable=nnx.Param if rank is None else nnx.LoRAParam)


def curve(output):
    times = {"seconds", "tokens_per_second", "mfu"}
    records = read_metrics(output / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in times} for record in records]


def assert_close(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6), (a, b)
