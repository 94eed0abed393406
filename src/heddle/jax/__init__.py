"""The JAX wing: attention, the transformer and its checkpoints, the KV cache, generation, training."""

import importlib
from typing import TYPE_CHECKING, Any

from heddle.attention.mask import register_pytree

from . import attention as attention

if TYPE_CHECKING:
    from .cache import KVCache as KVCache
    from .context_parallel import context_attend as context_attend
    from .dilated import DilatedAttention as DilatedAttention
    from .dilated import MultiheadDilatedAttention as MultiheadDilatedAttention
    from .dilated_distributed import distributed_dilated_attention as distributed_dilated_attention
    from .dot_product import dot_product_attention as dot_product_attention
    from .dot_product import nnx_attention as nnx_attention
    from .flash import FlashAttentionParamsConfig as FlashAttentionParamsConfig
    from .flash import attention_specs as attention_specs
    from .flash import create_attention_mask as create_attention_mask
    from .flash import flash_attention as flash_attention
    from .flash import permute_tokens_context_parallelism as permute_tokens_context_parallelism
    from .flash import unpermute_tokens_context_parallelism as unpermute_tokens_context_parallelism
    from .generation import Completion as Completion
    from .generation import generate as generate
    from .generation import stream as stream
    from .longnet import LongNetConfig as LongNetConfig
    from .longnet import LongNetLM as LongNetLM
    from .model import Transformer as Transformer
    from .model_config import ModelConfig as ModelConfig
    from .sampling import sampler as sampler
    from .speculation import PromptLookup as PromptLookup
    from .train import Trainer as Trainer
    from .train import TrainState as TrainState

register_pytree()  # also for a Mask made before JAX was imported

# Attention alone needs none of flax, optax and orbax, which take seconds to import: what does is imported when named.
_HOMES = {
    "DilatedAttention": "dilated", "MultiheadDilatedAttention": "dilated",
    "distributed_dilated_attention": "dilated_distributed",
    "KVCache": "cache", "dot_product_attention": "dot_product", "nnx_attention": "dot_product",
    "FlashAttentionParamsConfig": "flash", "attention_specs": "flash",
    "create_attention_mask": "flash", "flash_attention": "flash",
    "permute_tokens_context_parallelism": "flash",
    "unpermute_tokens_context_parallelism": "flash",
    "Completion": "generation", "generate": "generation", "stream": "generation",
    "LongNetConfig": "longnet", "LongNetLM": "longnet",
    "Transformer": "model", "ModelConfig": "model_config", "context_attend": "context_parallel", "sampler": "sampling",
    "PromptLookup": "speculation",
    "Trainer": "train", "TrainState": "train",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
