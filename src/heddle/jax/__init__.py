"""The JAX wing: attention, the transformer and its checkpoints, the KV cache, generation."""

from . import attention as attention
from .cache import KVCache as KVCache
from .generate import Completion as Completion
from .generate import generate as generate
from .generate import stream as stream
from .model import Transformer as Transformer
from .model_config import ModelConfig as ModelConfig
from .sampling import sampler as sampler
