"""The layers of a ParScale model: transformers' Qwen2's, with prefixes and attention between replicas."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2RMSNorm,
    apply_rotary_pos_emb,
)

from heddle.attention.replicas import attend_replicas, replica_attention

from .huggingface import IMPLEMENTATIONS, as_mask, dilated, dilation
from .parscale_config import Qwen2ParScaleConfig


class ZeroLinear(nn.Linear):
    """A projection that starts at 0: what it adds to a pretrained model is nothing at first."""


class PrefixMLP(nn.Module):
    """Prefix keys and values, plus what an MLP makes of them: easier to train (arXiv 2101.00190, 2305.03937).

    A residual whose output starts at 0: turning it on changes nothing, and so does folding it away.
    """

    def __init__(self, config: Qwen2ParScaleConfig):
        super().__init__()
        size = math.prod((2, config.num_key_value_heads, config.head_dim))  # type: ignore[arg-type]
        self.down = nn.Linear(size, config.parscale_prefix_mlp)
        self.up = ZeroLinear(config.parscale_prefix_mlp, size)

    def forward(self, prefix_k: Tensor, prefix_v: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.stack([prefix_k, prefix_v], 1).permute(0, 3, 1, 2, 4)  # (replicas, n, 2, kv_heads, head_dim)
        change = self.up(torch.tanh(self.down(tokens.flatten(2)))).view(tokens.shape)
        keys, values = (tokens + change).permute(2, 0, 3, 1, 4)
        return keys, values


class Qwen2ParScaleAttention(Qwen2Attention):
    """Self-attention with a learned prefix and, in joint mode, the other replicas at the same position."""

    config: Qwen2ParScaleConfig

    def __init__(self, config: Qwen2ParScaleConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads: int = config.num_attention_heads
        kv_heads: Any = config.num_key_value_heads
        size: int = self.head_dim
        if not config.attention_bias:
            self.q_proj = nn.Linear(config.hidden_size, heads * size, bias=False)
            self.k_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=False)
            self.v_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=False)
        self.prefix_mlp = self.cross_attn_proj = None
        for name in ("prefix_k", "prefix_v", "cross_attn_bias"):
            self.register_parameter(name, None)
        if config.parscale_n > 1 and config.parscale_n_tokens:
            shape = (config.parscale_n, kv_heads, config.parscale_n_tokens, size)
            self.prefix_k, self.prefix_v = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
            if config.parscale_prefix_mlp:
                self.prefix_mlp = PrefixMLP(config)
        if config.cross_attn_mode(layer_idx) == "joint":
            self.cross_attn_proj = ZeroLinear(heads * size, config.hidden_size, bias=False)
            self.cross_attn_bias = nn.Parameter(torch.empty(heads))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        if config.parscale_n == 1:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        query, key, value = self.heads(hidden_states, position_embeddings)
        keys, values = key, value
        if past_key_values is not None:
            keys, values = past_key_values.update(key, value, self.layer_idx)
        query, key, value, keys, values = (x.transpose(1, 2) for x in (query, key, value, keys, values))
        assert attention_mask is not None
        mask = as_mask(attention_mask, kwargs.get("position_ids"), kwargs.get("segment_ids"), keys.shape[1])
        patterns, implementation = dilation(config), IMPLEMENTATIONS[str(config._attn_implementation)]
        options: Any = {"scale": self.scaling, "implementation": implementation}
        attend_own: Any = None
        if patterns is not None:
            attend_own = partial(
                dilated, patterns=patterns, bounds=attention_mask, mask=mask, return_lse=True, **options
            )  # fmt: skip
        out, cross = replica_attention(
            query, keys, values, mask, replicas=config.parscale_n, attend_own=attend_own,
            prefix=self._prefix(value.dtype), prefix_scope=config.parscale_prefix_scope,
            current=None if self.cross_attn_proj is None else (key, value), bias=self.cross_attn_bias,
            replica_theta=replica_theta(config), **options,
        )  # fmt: skip
        out = self.o_proj(out.flatten(2))
        if cross is not None and self.cross_attn_proj is not None:
            out = out + self.cross_attn_proj(cross.flatten(2))
        return out, None

    def heads(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value ``(rows, heads, seq, head_dim)``, turned, in one dtype (autocast would leave two)."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        return query.to(value.dtype), key.to(value.dtype), value

    def _prefix(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        # Read here, in the layer's own forward: elsewhere FSDP's parameters are shards.
        if self.prefix_k is None:
            return None
        prefix = self.prefix_k, self.prefix_v
        if self.prefix_mlp is not None:
            prefix = self.prefix_mlp(*prefix)
        return prefix[0].to(dtype), prefix[1].to(dtype)


class Qwen2ParScaleCrossAttention(nn.Module):
    """Attention over all replicas at the same position, for the sublayer mode."""

    def __init__(self, config: Qwen2ParScaleConfig):
        super().__init__()
        self.config: Any = config
        self.head_dim: Any = config.head_dim
        heads, kv_heads = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.o_proj = ZeroLinear(heads, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, visible: Tensor) -> Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (proj(hidden_states).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out, _ = attend_replicas(
            query, key, value, visible, replicas=self.config.parscale_n, replica_theta=replica_theta(self.config)
        )
        return self.o_proj(out.flatten(2))


def replica_theta(config: Qwen2ParScaleConfig) -> float | None:
    """The base of the rotation by the replica's index, the model's own; None: not enabled."""
    return config.rope_parameters["rope_theta"] if config.enable_replica_rope else None  # type: ignore[index]


class Qwen2ParScaleDecoderLayer(Qwen2DecoderLayer):
    def __init__(self, config: Qwen2ParScaleConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = Qwen2ParScaleAttention(config, layer_idx)
        self.cross_attn = None
        if config.cross_attn_mode(layer_idx) == "sublayer":
            self.cross_attn_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.cross_attn = Qwen2ParScaleCrossAttention(config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.cross_attn is not None:
            assert attention_mask is not None
            start, stop, _ = attention_mask[..., 0].unbind(1)
            hidden_states = hidden_states + self.cross_attn(self.cross_attn_layernorm(hidden_states), start < stop)
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
