"""How much arithmetic a training step of a Hugging Face model is, and how much this device could do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from heddle.flops import TrainingFlops, data_sheet, extra_pairs, of_weight, reached

from .huggingface import dilation


def training_flops(model: Any) -> TrainingFlops:
    """The floating-point operations of a step of a causal language model: Llama, Qwen2, Mistral, ParScale, LongNet.

    Returns:
        A function of packed documents' segment ids and number of targets.
    """
    config: Any = model.config
    replicas, weights, head = getattr(config, "parscale_n", 1), 0, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            flops = module.weight.numel() * of_weight(module.weight.requires_grad)
            if module is model.get_output_embeddings():
                head = flops
            else:
                weights += flops * (replicas if ".layers." in name else 1)
    layers, extra = config.num_hidden_layers, 0
    if replicas > 1:
        prefix = config.parscale_n_tokens, config.parscale_prefix_scope
        extra = extra_pairs(layers, replicas, *prefix, config.cross_attn_mode)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return TrainingFlops(
        weights=weights,
        head=head,
        heads=config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        windows=[window if kind == "sliding_attention" else None for kind in kinds],
        patterns=dilation(config),
        replicas=replicas,
        extra=extra,
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s of matrix products: the data sheet's for a known GPU in bfloat16, else what this device is measured
    to reach."""
    cuda = device.type == "cuda"
    if cuda and dtype == torch.bfloat16 and (peak := data_sheet(torch.cuda.get_device_name(device))):
        return peak
    size = 8192 if cuda else 512  # short on a CPU, which others may share
    x = torch.ones(size, size, dtype=dtype, device=device)
    return reached(lambda: (x @ x)[0, 0].item(), size)  # the value waits for the product
