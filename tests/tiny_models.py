"""Small random transformers models of each family that heddle.jax serves, to compare with."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
THETA = {"rope_theta": 500.0}
STRETCHED = THETA | {"factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3 = STRETCHED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = STRETCHED | {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
WINDOWS = {"use_sliding_window": True, "max_window_layers": 1}

#: By name: the model type, and what differs from SIZES.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, bytes": ("llama", {"vocab_size": 257}),
    "llama, biases, gelu": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-3, "hidden_act": "relu"}),
    "llama, head_dim": ("llama", {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "llama, theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, llama3, tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, linear": ("llama", {"rope_parameters": THETA | {"rope_type": "linear", "factor": 3.0}}),
    "llama, dynamic": (
        "llama",
        {"rope_parameters": THETA | {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 24},
    ),
    "llama, yarn": ("llama", {"rope_parameters": STRETCHED | {"rope_type": "yarn"}}),
    "llama, longrope": ("llama", {"rope_parameters": LONGROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": ("qwen2", WINDOWS | {"sliding_window": 5}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, window": ("qwen3", WINDOWS | {"sliding_window": 6, "head_dim": 8, "attention_bias": True}),
}


@cache
def hugging_face(name: str) -> transformers.PreTrainedModel:
    """The model of a case, the same each time; its biases aren't zero, its norms not one."""
    model_type, changes = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.data.normal_(0, 0.5)
            elif "norm" in parameter_name:
                parameter.data.normal_(1, 0.2)
    return model


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    """Random ids."""
    return np.random.default_rng(seed).integers(3, SIZES["vocab_size"], shape).astype(np.int32)


def logits(model: transformers.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
