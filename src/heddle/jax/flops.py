"""How much arithmetic a training step of a model is, and how much its devices could do."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from heddle.attention.dilated_patterns import Pattern, check_patterns
from heddle.flops import TrainingFlops, data_sheet, extra_pairs, of_weight, reached

from .layers import Linear, LowRank
from .longnet import LongNetConfig
from .model import LanguageModel


def training_flops(model: Any, trainable: Any = nnx.Param) -> TrainingFlops | None:
    """The floating-point operations of a step, of a model with its adapters; None: it isn't one of ours.

    Args:
        model: a :class:`~heddle.jax.Transformer` or :class:`~heddle.jax.LongNetLM`.
        trainable: an ``nnx`` filter, the parameters that are trained.

    Returns:
        A function of packed documents' segment ids and number of targets.
    """
    if not isinstance(model, LanguageModel):
        return None
    config, weights, head = model.config, 0, 0
    trained = {path for path, _ in nnx.to_flat_state(nnx.state(model, trainable))}
    for path, module in nnx.iter_modules(model):
        names = ("weight",) if isinstance(module, Linear) else ("a", "b") if isinstance(module, LowRank) else ()
        flops = sum(getattr(module, name).size * of_weight((*path, name) in trained) for name in names)
        if path[:1] == ("head",):
            head += flops
        else:
            weights += flops * (config.parscale_n if path[:1] == ("layers",) else 1)
    sizes = config.num_attention_heads, config.head_dim
    layers, replicas = config.num_hidden_layers, config.parscale_n
    if isinstance(config, LongNetConfig):
        return TrainingFlops(weights, head, *sizes, [None] * layers, _patterns(config))
    prefix = config.parscale_n_tokens, config.parscale_prefix_scope
    extra = extra_pairs(layers, replicas, *prefix, config.cross_attn_mode)
    return TrainingFlops(weights, head, *sizes, config.windows, _patterns(config.attention), replicas, extra)


def _patterns(dilated: Any) -> tuple[Pattern, ...] | None:
    return None if dilated is None else check_patterns(dilated.segment_lengths, dilated.dilation_rates)


def peak_flops(dtype: Any, mesh: Mesh | None = None) -> float:
    """The FLOP/s of matrix products of all devices of a mesh (None: of one): a device's by the data sheet for a known
    GPU in bfloat16, else what one is measured to reach. Devices that are one machine's CPU count once a process.
    """
    first = jax.local_devices()[0] if mesh is None else mesh.local_devices[0]
    count = 1 if mesh is None else jax.process_count() if first.platform == "cpu" else mesh.size
    return count * _peak(first, jnp.dtype(dtype))


@cache
def _peak(device: Any, dtype: Any) -> float:
    if dtype == jnp.bfloat16 and (peak := data_sheet(device.device_kind)):
        return peak
    size = 512 if device.platform == "cpu" else 8192  # short on a CPU, which others may share
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(lambda x: x @ x)
    return reached(lambda: product(x).block_until_ready(), size)
