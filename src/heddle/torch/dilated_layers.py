"""LongNet's transformer layers: pre-LN with MAGNETO's inner norms (arXiv 2210.06423), their attention dilated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .dilated import ImprovedMultiheadDilatedAttention, MultiheadDilatedAttention, magneto


class FeedForward(nn.Module):
    """MAGNETO's: a norm before each of the two projections."""

    def __init__(
        self, d_model: int, dim_feedforward: int, dropout: float, activation: Callable[[Tensor], Tensor], eps: float,
        gamma_init: float, made: dict[str, Any],
    ):  # fmt: skip
        super().__init__()
        self.activation, self.dropout = activation, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(d_model, eps, **made), nn.LayerNorm(dim_feedforward, eps, **made)
        self.linear1, self.linear2 = (
            nn.Linear(*size, **made) for size in ((d_model, dim_feedforward), (dim_feedforward, d_model))
        )
        for linear in (self.linear1, self.linear2):
            magneto(linear, gamma_init)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(self.linear1(self.norm1(x))))
        return self.dropout(self.linear2(self.norm2(x)))


class DilatedTransformerEncoderLayer(nn.Module):
    """A transformer's encoder layer with dilated attention, pre-LN, and MAGNETO's norms inside (arXiv 2210.06423).

    Args:
        d_model, nhead: the size and its heads.
        segment_lengths, dilation_rates: of the patterns, in this order.
        dim_feedforward, dropout, activation, layer_norm_eps: as of ``nn.TransformerEncoderLayer``.
        gamma_init: MAGNETO's gain, which goes by the model's depth.
    """

    attention_type: type[MultiheadDilatedAttention] = ImprovedMultiheadDilatedAttention

    def __init__(
        self,
        d_model: int,
        nhead: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(d_model, layer_norm_eps, **made)
        self.self_attn = self.attention_type(
            d_model, nhead, dilation_rates, segment_lengths, dropout,
            layer_norm_eps=layer_norm_eps, gamma_init=gamma_init, **made,
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = FeedForward(d_model, dim_feedforward, dropout, activation, layer_norm_eps, gamma_init, made)

    def forward(
        self,
        src: Float[Tensor, "batch seq d_model"],
        is_causal: bool = False,
        *,
        key_padding_mask: Bool[Tensor, "batch seq"] | None = None,
        segment_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        x = self.norm(src)
        x, _ = self.self_attn(x, x, x, key_padding_mask, is_causal=is_causal, segment_ids=segment_ids)
        x = src + self.dropout(x)
        return x + self.feed_forward(x)


class DilatedTransformerDecoderLayer(nn.Module):
    """A transformer's decoder layer, whose attention to itself and to the encoder's output is dilated.

    The latter has no norm before its output projection, as in MAGNETO, and goes by position: token ``t`` of one
    sequence sees those of its segment in the other, and nothing beyond the other's end.

    Args:
        d_model, nhead, segment_lengths, dilation_rates, dim_feedforward, dropout, activation, layer_norm_eps,
        gamma_init: as of :class:`DilatedTransformerEncoderLayer`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1, self.norm2 = (nn.LayerNorm(d_model, layer_norm_eps, **made) for _ in range(2))
        self.self_attn, self.cross_attn = (
            ImprovedMultiheadDilatedAttention(
                d_model, nhead, dilation_rates, segment_lengths, dropout, layer_norm=layer_norm,
                layer_norm_eps=layer_norm_eps, gamma_init=gamma_init, **made,
            )
            for layer_norm in (True, False)
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = FeedForward(d_model, dim_feedforward, dropout, activation, layer_norm_eps, gamma_init, made)

    def forward(
        self,
        tgt: Float[Tensor, "batch tgt_seq d_model"],
        memory: Float[Tensor, "batch memory_seq d_model"],
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Float[Tensor, "batch tgt_seq d_model"]:
        x = self.norm1(tgt)
        x = tgt + self.dropout(self.self_attn(x, x, x, is_causal=tgt_is_causal)[0])
        # One length for both: surplus queries are dropped again, and of a shorter memory there is no more to see.
        length, seen = tgt.shape[1], memory.shape[1]
        asked = F.pad(self.norm2(x)[:, :seen], (0, 0, 0, max(0, seen - length)))
        found = self.cross_attn(asked, memory, memory, is_causal=memory_is_causal)[0][:, :length]
        x = x + self.dropout(F.pad(found, (0, 0, 0, length - found.shape[1])))
        return x + self.feed_forward(x)
