"""The JAX wing: attention, the transformer and its checkpoints, the KV cache, generation, training."""

from heddle.attention.mask import register_pytree

from . import attention as attention
from .cache import KVCache as KVCache
from .generate import Completion as Completion
from .generate import generate as generate
from .generate import stream as stream
from .model import Transformer as Transformer
from .model_config import ModelConfig as ModelConfig
from .sampling import sampler as sampler
from .train import Trainer as Trainer
from .train import TrainState as TrainState

register_pytree()  # also for a Mask made before JAX was imported
