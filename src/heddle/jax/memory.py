"""How much memory a training step or a generation takes on each device, from shapes alone: nothing is compiled.

What has a shape (weights, the optimiser's state, gradients, the KV cache) is counted by it and by how it is spread over
the mesh. What a step keeps between its forward and its backward pass is counted by hand, in :class:`_Sizes`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from heddle.options import TrainingOptions

from .cache import DTYPES, cache_dtype
from .decoding import _at_once
from .generation import LEAST_ROOM, PREFILL
from .grpo_rollouts import ROLLOUT_BLOCK
from .logits import MAX_BYTES
from .model import Transformer
from .model_config import ModelConfig
from .optimizer import make_optimizer
from .parallel import (
    MESH_AXES,
    Layout,
    cache_spec,
    check_parameters,
    dotted,
    parameter_axes,
    partition_spec,
)
from .xla import KEYS, QUERY_ROWS, STEP

TASKS = ("train", "generate")


read_config = ModelConfig.from_pretrained


@dataclass(frozen=True)
class Run:
    """What is to be run, in the words of ``heddle memory``.

    Args:
        config: the model.
        task: ``"train"``, a step of :class:`heddle.jax.train.Trainer`; ``"generate"``, as :func:`heddle.jax.generate`.
        batch: sequences at once, over all devices.
        seq: tokens of a sequence; of generation the room of the cache.
        mesh: devices along each axis of :func:`heddle.jax.parallel.make_mesh`.
        optimizer, accumulation, remat: as ``training`` has them.
        dtype: of the computation.
        param_dtype: of the weights; None: float32 in training, ``dtype`` in generation.
        cache_dtype: of keys and values; None: ``dtype``.
        copies: of the trained parameters that are kept besides: their average, a reference.
        group: completions of a prompt, where the batch is sampled by the model itself; 0: it isn't.

    Raises:
        ValueError: a value out of range, or that the task has no use for; sizes that the devices can't share equally.
    """

    config: ModelConfig
    task: str = "train"
    batch: int = 1
    seq: int = 1024
    mesh: dict[str, int] = field(default_factory=dict)
    optimizer: str = "adamw"
    accumulation: int = 1
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str | None = None
    cache_dtype: str | None = None
    copies: int = 0
    group: int = 0

    def __post_init__(self):
        options = {
            "--task": (self.task, TASKS), "--dtype": (self.dtype, DTYPES),
            "--param-dtype": (self.param_dtype or self.dtype, DTYPES),
        }  # fmt: skip
        for name, (value, allowed) in options.items():
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        for name in ("batch", "seq", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        trains = self.task == "train"
        other = {"--cache-dtype": (self.cache_dtype is not None, "generate", not trains)}
        other["--remat"] = self.remat, "train", trains
        other["--accumulation"] = self.accumulation > 1, "train", trains
        for name, (given, task, fits) in other.items():
            if given and not fits:
                raise ValueError(f"{name} goes with --task {task}")
        if self.cache_dtype is not None:
            cache_dtype("--cache-dtype", self.cache_dtype)
        context = self.config.max_position_embeddings
        if not trains and self.seq > context:
            raise ValueError(f"--seq must be at most the model's context of {context} tokens, got {self.seq}")
        if trains and self.config.attention is not None:
            raise ValueError("--task train counts what plain attention keeps, got a model of dilated attention")
        if trains:
            TrainingOptions(batch_size=self.batch, accumulation=self.accumulation, optimizer=self.optimizer)
        check_parameters(_model(self), self.devices_by_axis)
        Layout(self.devices_by_axis, whole_rows=not trains).check(self.batch // self.accumulation, self.seq)

    @property
    def devices_by_axis(self) -> AbstractMesh:
        return AbstractMesh(tuple(self.mesh.get(axis, 1) for axis in MESH_AXES), MESH_AXES)

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def weights_dtype(self) -> str:
        return self.param_dtype or ("float32" if self.task == "train" else self.dtype)

    def least(self, what: str) -> int:
        """The smallest ``"batch"`` or ``"seq"`` that the devices can share equally; the others are multiples of it."""
        if what == "batch":
            return self.accumulation * self.mesh.get("data", 1) * self.mesh.get("fsdp", 1)
        return self.mesh.get("context", 1) if self.task == "train" else 1


@dataclass(frozen=True)
class Plan:
    """Bytes on each device.

    Args:
        run: what was planned.
        parts: by what takes them, each at its most.
    """

    run: Run
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """At the peak. The layer at work and the logits are never there at once: the larger of them counts."""
        return sum(self.parts.values()) - min(self.parts["layer at work"], self.parts["logits"])


def plan(run: Run) -> Plan:
    """What a run takes; see :class:`Run`. About a second for the first run of a model, milliseconds for the next."""
    return _training(run) if run.task == "train" else _generation(run)


def _training(run: Run) -> Plan:
    sizes, mesh, model = _Sizes.of(run), run.devices_by_axis, _model(run)
    params = nnx.state(model, nnx.Param)
    weights = _bytes(params, mesh)
    moments = _bytes(_optimizer_state(run), mesh)
    # All of them are there when the last is: they are clipped by their common norm. That is also what XLA copies of the
    # optimiser's state, which is donated and read twice: a gradient lies where a moment was that has been copied.
    gradients = weights if run.accumulation == 1 else 2 * weights
    layers, hidden = run.config.num_hidden_layers, sizes.tokens * sizes.d * sizes.itemsize
    kept = layers * (hidden if run.remat else sizes.kept())
    once = sizes.kept() - hidden if run.remat else 0  # of the layer whose backward pass it is, computed again
    return Plan(run, {
        "parameters": weights,
        "optimizer state": moments,
        "gradients": gradients,
        "activations": kept,
        "layer at work": once + max(sizes.feed_forward_backward(), sizes.attention_backward()),
        "logits": 3 * hidden + sizes.loss(),
        "gathered weights": _gathered(run),
        "KV cache": _pool(run) if run.group else 0,
        "copies of parameters": run.copies * weights + (_whole(run) if run.group else 0),
        "batch": 4 * 4 * sizes.tokens * run.accumulation,
    })  # fmt: skip


def _generation(run: Run) -> Plan:
    config, mesh, model = run.config, run.devices_by_axis, _model(run)
    room = min(1 << (max(run.seq, LEAST_ROOM) - 1).bit_length(), config.max_position_embeddings)
    piece = next((size for size in PREFILL if size >= run.seq), PREFILL[-1])
    batch, most = run.batch, max(1, _at_once() // (config.parscale_n * piece))
    few = max(n for n in range(1, min(batch, most) + 1) if batch % n == 0)
    some = few if mesh.size == 1 else batch  # devices share the sequences
    cache = jax.eval_shape(lambda: model.empty_cache(batch, room, run.cache_dtype))
    held = _bytes(cache, mesh, lambda path, _: cache_spec(path))
    sizes = _Sizes.of(dataclasses.replace(run, batch=max(some, run.least("batch"))), piece)
    # Of sequences that are read a few at a time their part of the cache is cut out and put back.
    part = held * some // batch if some < batch else 0
    layer = 2 * sizes.rows * room * sizes.kv * sizes.itemsize  # keys and values as attention reads them
    restored = 0 if config.attention is not None or run.cache_dtype != "int8" else layer * batch // some
    reading = part + max(sizes.feed_forward(), sizes.attention() + layer)
    return Plan(run, {
        "parameters": _bytes(model, mesh),
        "optimizer state": 0,
        "gradients": 0,
        "activations": 0,
        "layer at work": max(reading, 2 * restored),
        "logits": 2 * 4 * sizes.vocab * -(-batch // run.least("batch")),
        "gathered weights": _gathered(run),
        "KV cache": held,
        "batch": 4 * sizes.tokens,
    })  # fmt: skip


@dataclass(frozen=True)
class _Sizes:
    """Of what a device computes at once: ``d`` the hidden size, ``q`` and ``kv`` of all heads, ``f`` feed-forward."""

    tokens: int
    rows: int
    d: int
    q: int
    kv: int
    f: int
    heads: int
    group: int
    vocab: int
    itemsize: int
    shared: int  #: devices that share a row's tokens

    @classmethod
    def of(cls, run: Run, seq: int | None = None) -> _Sizes:
        config, mesh = run.config, {axis: run.mesh.get(axis, 1) for axis in MESH_AXES}
        rows = config.parscale_n * run.batch // run.accumulation // mesh["data"] // mesh["fsdp"]
        heads, tensor = config.num_attention_heads, mesh["tensor"]
        context = mesh["context"] if seq is None else 1
        return cls(
            tokens=rows * (run.seq if seq is None else seq) // context, rows=rows, d=config.hidden_size,
            q=heads * config.dim // tensor, kv=config.kv_heads * config.dim // tensor,
            f=config.intermediate_size // tensor, heads=heads // tensor, group=heads // config.kv_heads,
            vocab=config.vocab_size // tensor, itemsize=jnp.dtype(run.dtype).itemsize, shared=context,
        )  # fmt: skip

    def kept(self) -> int:
        """Bytes of a layer that its backward pass reads.

        x, x normalised, that times the norm's weight, before attention and again before the feed-forward part (6 d);
        the query; attention's output for its own backward pass and, in another layout, for the product behind it (3 q);
        key and value (2 kv); gate, its silu, up, and their product (4 f); in float32 the logarithms of the denominators
        (a head) and the norms' factors (2).
        """
        each = 6 * self.d + 3 * self.q + 2 * self.kv + 4 * self.f
        return self.tokens * (each * self.itemsize + 4 * (self.heads + 2))

    def feed_forward_backward(self) -> int:
        """Gradients of the product, gate and up, two of them transposed too, in place of silu and the product; of x."""
        return self.tokens * self.itemsize * (3 * self.f + self.d)

    def attention_backward(self) -> int:
        """Three tiles of scores, the gradients of the output, query and key, of x; the feed-forward part is done."""
        rest = 2 * self.q + self.kv * self.shared + self.d - 5 * self.f
        return max(0, 3 * self.tile(self.tokens // self.rows) + self.tokens * self.itemsize * rest)

    def feed_forward(self) -> int:
        """Gate, up and their product; x, normalised too."""
        return self.tokens * self.itemsize * (3 * self.f + 2 * self.d)

    def attention(self) -> int:
        """x, normalised too, query and output, key and value, two tiles of scores."""
        each = 2 * self.d + 2 * self.q + 2 * self.kv
        return self.tokens * each * self.itemsize + 2 * self.tile(self.tokens // self.rows)

    def loss(self) -> int:
        """Logits of a stretch and their gradient; where there are several, also what one adds to the gradient."""
        logits = 4 * self.tokens * self.vocab
        return 2 * logits if logits <= MAX_BYTES else 2 * MAX_BYTES + 4 * self.d * self.vocab

    def tile(self, seq: int) -> int:
        """Float32 scores of a step of :mod:`heddle.jax.xla`: of all rows where they are few."""
        block_q, block_k = min(seq, max(QUERY_ROWS // self.group, 64)), min(seq * self.shared, KEYS)
        scores = self.heads * block_q * block_k
        together = self.rows * scores <= STEP and (block_q >= seq or self.rows == 1)
        return 4 * scores * (self.rows if together else 1)


def _pool(run: Run) -> int:
    """Of the engine that samples a rollout, on a device: room for the completions that a copy of the model makes."""
    config, tensor = run.config, run.mesh.get("tensor", 1)
    rows = max(-(-run.batch * tensor // run.devices), run.group)
    tokens = rows * -(-run.seq // ROLLOUT_BLOCK) * ROLLOUT_BLOCK * config.parscale_n
    each = 2 * config.num_hidden_layers * config.kv_heads * config.dim // tensor
    return tokens * each * jnp.dtype(run.dtype).itemsize


def _whole(run: Run) -> int:
    """Of the parameters that a copy of the model samples with, where a device else holds a part of them."""
    if run.mesh.get("fsdp", 1) == 1:
        return 0
    alone = AbstractMesh(tuple(run.mesh.get(axis, 1) if axis == "tensor" else 1 for axis in MESH_AXES), MESH_AXES)
    return _bytes(nnx.state(_model(run), nnx.Param), alone)


def _gathered(run: Run) -> int:
    """Of weights that are cut along the model's width, a layer's as they are computed with; or the head's, if more."""
    if (fsdp := run.mesh.get("fsdp", 1)) == 1:
        return 0
    mesh = run.devices_by_axis
    by_layer: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(_model(run)):
        name = dotted(path)
        if "embed" in parameter_axes(name, leaf.ndim):
            whole = fsdp * math.prod(NamedSharding(mesh, partition_spec(name, leaf.ndim)).shard_shape(leaf.shape))
            owner = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
            by_layer[owner] = by_layer.get(owner, 0) + whole * jnp.dtype(run.dtype).itemsize
    return max(by_layer.values())


def _bytes(tree: Any, mesh: AbstractMesh, where: Callable[[str, int], PartitionSpec] = partition_spec) -> int:
    """On one device; ``where`` tells of a leaf's path and number of axes how it is spread."""
    return sum(
        math.prod(NamedSharding(mesh, where(dotted(path), leaf.ndim)).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    )


def _model(run: Run) -> Transformer:
    return _shapes(run.config, run.dtype, run.weights_dtype)


@functools.lru_cache(maxsize=2)
def _shapes(config: ModelConfig, dtype: str, param_dtype: str) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype))


def _optimizer_state(run: Run) -> Any:
    return _states(run.config, run.dtype, run.weights_dtype, run.optimizer)


@functools.lru_cache(maxsize=2)
def _states(config: ModelConfig, dtype: str, param_dtype: str, optimizer: str) -> Any:
    options = TrainingOptions(optimizer=optimizer)
    return jax.eval_shape(make_optimizer(options).init, nnx.state(_shapes(config, dtype, param_dtype), nnx.Param))
