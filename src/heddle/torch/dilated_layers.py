"""LongNet's transformer layers, pre-LN with MAGNETO's inner norms (arXiv 2210.06423), and encoder-decoder of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .dilated import ImprovedMultiheadDilatedAttention, MultiheadDilatedAttention, magneto

Activation = Callable[[Tensor], Tensor] | str  #: a function, "relu" or "gelu"
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def _function(activation: Activation) -> Callable[[Tensor], Tensor]:
    if not isinstance(activation, str):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be a function or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation]


class FeedForward(nn.Module):
    """MAGNETO's: a norm before each of the two projections."""

    def __init__(
        self, d_model: int, dim_feedforward: int, dropout: float, activation: Activation, eps: float,
        gamma_init: float, made: dict[str, Any],
    ):  # fmt: skip
        super().__init__()
        self.activation, self.dropout = _function(activation), nn.Dropout(dropout)
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
        activation: Activation = F.relu,
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
        activation: Activation = F.relu,
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


class LongNet(nn.Module):
    """LongNet's encoder and decoder (arXiv 2307.02486; sizes as in its section 4), with MAGNETO's initialization.

    The gain of ``N`` encoder layers is ``sqrt(ln(3M) ln(2N) / 3)``, that of ``M`` decoder layers ``sqrt(ln 3M)``
    (arXiv 2210.06423, figure 2).

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation, layer_norm_eps,
        device, dtype: as of ``nn.Transformer``.
        segment_lengths, dilation_rates: of the patterns.

    Raises:
        ValueError: a number of layers below 1; others as of the layers.
    """

    def __init__(
        self,
        d_model: int = 768,
        nhead: int = 12,
        num_encoder_layers: int = 12,
        num_decoder_layers: int = 12,
        dim_feedforward: int = 3072,
        segment_lengths: Sequence[int] = (2048, 4096, 8192, 16384, 32768),
        dilation_rates: Sequence[int] = (1, 2, 4, 6, 12),
        dropout: float = 0.0,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, layers in (("num_encoder_layers", num_encoder_layers), ("num_decoder_layers", num_decoder_layers)):
            if layers < 1:
                raise ValueError(f"{name} must be at least 1, got {layers}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        decoder = math.sqrt(math.log(3 * num_decoder_layers))
        gains = decoder * math.sqrt(math.log(2 * num_encoder_layers) / 3), decoder
        sizes = d_model, nhead, segment_lengths, dilation_rates, dim_feedforward, dropout, activation, layer_norm_eps
        self.encoder = nn.ModuleList(
            DilatedTransformerEncoderLayer(*sizes, gains[0], **made) for _ in range(num_encoder_layers)
        )
        self.decoder = nn.ModuleList(
            DilatedTransformerDecoderLayer(*sizes, gains[1], **made) for _ in range(num_decoder_layers)
        )
        self.encoder_norm, self.decoder_norm = (nn.LayerNorm(d_model, layer_norm_eps, **made) for _ in range(2))

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        is_causal: bool = True,
        *,
        tgt: Float[Tensor, "batch tgt_seq d_model"] | None = None,
    ) -> Float[Tensor, "batch out_seq d_model"]:
        """What the decoder makes of ``tgt``, which sees the encoded ``x`` by position.

        Args:
            x: for the encoder.
            is_causal: whether tokens see only those at or before them, in encoder, decoder and between the two.
            tgt: for the decoder; None: ``x`` as well.
        """
        memory, out = x, x if tgt is None else tgt
        for layer in self.encoder:
            memory = layer(memory, is_causal)
        memory = self.encoder_norm(memory)
        for layer in self.decoder:
            out = layer(out, memory, is_causal, is_causal)
        return self.decoder_norm(out)
