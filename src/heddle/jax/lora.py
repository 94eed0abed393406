"""Low-rank adapters (LoRA, arXiv 2106.09685) on a model's linear layers: added, merged, and as PEFT's folders.

Layers are named as in the model's Hugging Face folder, ``model.layers.0.self_attn.q_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from heddle.data.locate import read_json

from .checkpoint import hugging_face_name, replacing, write_json
from .layers import Linear, LowRank
from .model import LanguageModel
from .parallel import place, to_host

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_SAVED = re.compile(r"adapter_(config\.json|model\.safetensors)")
_PREFIX = "base_model.model."  #: PEFT's, of a causal language model's parameters
#: What of a PEFT adapter must be so, since anything else computes something else.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False,
    "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False, "use_qalora": False,
}  # fmt: skip


def add_adapters(
    model: LanguageModel, rank: int, alpha: float, targets: Sequence[str] | None = None, *, rngs: nnx.Rngs
) -> list[str]:
    """Put adapters beside linear layers, in place. Nothing changes before they are trained.

    On a mesh they are cut as their layers are.

    Args:
        model: a :class:`~heddle.jax.Transformer` or :class:`~heddle.jax.LongNetLM`.
        rank: of the adapters.
        alpha: they are scaled by ``alpha / rank``.
        targets: names, or ends of names (``"q_proj"``, ``"mlp.up_proj"``), of the layers; None: all but the head.
        rngs: where the initial values come from.

    Returns:
        The layers' names. Their adapters' parameters are ``nnx.LoRAParam``, to be trained alone.

    Raises:
        ValueError: a rank below 1; a target that no layer has; a head that is the embedding too.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    layers = linear_layers(model)
    for target in targets or ():
        if not any(_is_named(name, target) for name in layers):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ValueError(f"targets must name linear layers of the model, such as {known}; got {target!r}")
    chosen = [
        name
        for name, layer in layers.items()
        if (layer is not model.head if targets is None else any(_is_named(name, target) for target in targets))
    ]
    if any(layers[name] is model.head for name in chosen) and model.config.tie_word_embeddings:
        raise ValueError("targets must leave out the head of a model whose head is its embedding")
    for name in chosen:
        inputs, outputs = layers[name].weight.shape
        layers[name].adapter = LowRank(inputs, outputs, rank, alpha / rank, rngs=rngs, dtype=jnp.float32)
    _spread(model)
    return chosen


def merge_adapters(model: LanguageModel) -> None:
    """Add what the adapters compute to their layers' weights, in place, and take the adapters away."""
    for layer in linear_layers(model).values():
        if layer.adapter is not None:
            update = layer.adapter.scale * (layer.adapter.a[...] @ layer.adapter.b[...])
            layer.weight[...] = (layer.weight[...] + update).astype(layer.weight.dtype)
            layer.adapter = None


def save_adapter(model: LanguageModel, folder: str | Path, base_model: str | None = None) -> None:
    """Write a model's adapters as a folder that PEFT loads, all of it or nothing.

    Of a model over several processes all have to call it; process 0 writes.

    Args:
        model: with adapters, all of one rank and scale.
        folder: new, or an adapter's.
        base_model: the name or path of the model that they adapt.

    Raises:
        ValueError: a model without adapters; a folder that holds anything else.
    """
    from safetensors.numpy import save_file

    layers = linear_layers(model)
    adapters = {name: layer.adapter for name, layer in layers.items() if layer.adapter is not None}
    if not adapters:
        raise ValueError("model must have adapters, got none")
    tensors = {}
    for name, adapter in adapters.items():
        for key, parameter in (("lora_A", adapter.a), ("lora_B", adapter.b)):
            tensors[f"{_PREFIX}{name}.{key}.weight"] = np.ascontiguousarray(to_host(parameter[...]).T)
    ends = {name.rpartition(".")[2] for name in adapters}
    all_of_them = len(adapters) == sum(name.rpartition(".")[2] in ends for name in layers)
    first = next(iter(adapters.values()))
    rank = first.a.shape[1]
    config = _PLAIN | {
        "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": first.scale * rank, "lora_dropout": 0.0,
        "target_modules": sorted(ends if all_of_them else adapters), "inference_mode": True,
        "base_model_name_or_path": base_model,
    }  # fmt: skip
    if jax.process_index():
        return
    with replacing(Path(folder), _SAVED) as unfinished:
        write_json(unfinished / CONFIG, config)
        save_file(tensors, unfinished / TENSORS, metadata={"format": "pt"})


def load_adapter(model: LanguageModel, folder: str | Path) -> list[str]:
    """Put the adapters of a PEFT folder on a model, in place; returns the names of their layers.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: one of another kind than plain LoRA, or of another model.
    """
    from safetensors.numpy import load_file

    folder = Path(folder)
    config = read_json(folder / CONFIG)
    odd = [f"{name}={config[name]}" for name, plain in _PLAIN.items() if (config.get(name) or plain) != plain]
    if odd:
        raise ValueError(f"{folder}: must be a plain LoRA adapter, got one with {', '.join(odd)}")
    tensors = load_file(folder / TENSORS)
    names = sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors})
    layers, scale = linear_layers(model), config["lora_alpha"] / config["r"]
    for name in names:
        a, b = (tensors[f"{_PREFIX}{name}.lora_{key}.weight"].T for key in "AB")
        if name not in layers or (a.shape[0], b.shape[1]) != layers[name].weight.shape:
            shape = f"{a.shape[0]} to {b.shape[1]}"
            raise ValueError(f"{folder}: is an adapter of another model: this one has no layer {name} from {shape}")
        (inputs, rank), (_, outputs) = a.shape, b.shape
        adapter = LowRank(inputs, outputs, rank, scale, rngs=nnx.Rngs(0), dtype=jnp.float32)
        adapter.a[...], adapter.b[...] = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
        layers[name].adapter = adapter
    _spread(model)
    return names


def linear_layers(model: LanguageModel) -> dict[str, Linear]:
    """A model's linear layers by their names, which are those of its Hugging Face folder."""
    layers = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            ours = ".".join(map(str, (*path, "weight")))
            name = "lm_head.weight" if module is model.head else hugging_face_name(ours, model.config)
            layers[name.removesuffix(".weight")] = module
    return layers


def _spread(model: LanguageModel) -> None:
    """Move what is new of a model to where it belongs on its mesh."""
    if model.mesh is not None:
        nnx.update(model, nnx.state(place(model, model.mesh)))


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
