"""How much arithmetic a training step is, and how much the device could do: model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from heddle.attention.dilated_patterns import causal_pairs
from heddle.attention.mask import PADDING_SEGMENT_ID

from .huggingface import dilation

#: Dense bfloat16 FLOP/s of NVIDIA's data sheets, by a part of the device's name; the first that fits.
PEAKS = {"GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12}


def training_flops(model: Any) -> Callable[[np.ndarray], float]:
    """The floating-point operations of a forward and backward pass of a causal language model (Llama, Qwen2, ParScale).

    Matrix products alone, as PaLM counts them (arXiv 2204.02311, appendix B): 2 for each weight and token forward, 2
    for the activations' gradient and, where a weight is trained, 2 for its own; twice that for each visible pair of
    query and key and element of a head. Layers run once a replica, the head once. What is recomputed isn't counted.

    Returns:
        A function of segment ids ``(rows, row_len)`` of packed documents.
    """
    config: Any = model.config
    replicas = getattr(config, "parscale_n", 1)
    weights = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            times = replicas if ".layers." in name else 1
            weights += times * module.weight.numel() * (6 if module.weight.requires_grad else 4)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads
    pair = 12 * config.num_hidden_layers * size * replicas  # of one head
    prefix = getattr(config, "parscale_n_tokens", 0) if replicas > 1 else 0

    def flops(segment_ids: np.ndarray) -> float:
        tokens = int((segment_ids != PADDING_SEGMENT_ID).sum())
        pairs = heads * tokens * prefix
        for row in segment_ids:
            lengths = np.unique(row[row != PADDING_SEGMENT_ID], return_counts=True)[1]
            pairs += sum(_pairs(config, int(length)) for length in lengths)
        return float(weights * tokens + pair * pairs)

    return flops


def _pairs(config: Any, length: int) -> int:
    """The visible pairs of a document, of all heads of a layer. Layers with a window are taken to be all or none."""
    heads, patterns = config.num_attention_heads, dilation(config)
    if patterns is not None:
        return causal_pairs(length, patterns, heads)
    window = getattr(config, "sliding_window", None) or length
    beyond = max(0, length - window)
    return heads * (length * (length + 1) - beyond * (beyond + 1)) // 2


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s of matrix products: the data sheet's for a known GPU in bfloat16, else what this device is measured
    to reach."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return peak
    size = 8192 if device.type == "cuda" else 512  # short on a CPU, which others may share
    x = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(20):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        since = time.perf_counter()
        (x @ x)[0, 0].item()  # the value waits for the product
        best = min(best, time.perf_counter() - since)
    return 2 * size**3 / best
