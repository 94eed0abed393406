"""LongNet's dilated attention as modules: arXiv 2307.02486, with MAGNETO's projections, arXiv 2210.06423."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heddle.attention.attend import REFERENCE, attend, choose, score_scale
from heddle.attention.dilated import check_sequence, dilated_backward, dilated_forward
from heddle.attention.dilated_patterns import Pattern, check_patterns
from heddle.attention.mask import Mask


class DilatedAttention(nn.Module):
    """Dilated attention on heads: :func:`heddle.attention.dilated.dilated_attention` as a module.

    Args:
        segment_lengths: w of each pattern, in tokens.
        dilation_rates: r of each pattern.
        softmax_scale: of the scores; None: ``head_dim ** -0.5``.
        attention_dropout: the probability that a key is dropped from a query's sum, in each pattern, while training.
        op: an implementation of :func:`heddle.attend` by name; None: the first that serves.

    Raises:
        ValueError: lists that differ in length, are empty or hold anything but positive integers; a probability that
            isn't one.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        op: str | None = None,
    ):
        super().__init__()
        self.patterns = check_patterns(segment_lengths, dilation_rates)
        if not 0 <= attention_dropout < 1:
            raise ValueError(f"attention_dropout must be at least 0 and less than 1, got {attention_dropout}")
        self.softmax_scale, self.attention_dropout, self.op = softmax_scale, attention_dropout, op

    def forward(
        self,
        query: Float[Tensor, "batch seq heads head_dim"],
        key: Float[Tensor, "batch seq kv_heads head_dim"],
        value: Float[Tensor, "batch seq kv_heads value_dim"],
        is_causal: bool = False,
        *,
        segment_ids: Int[Tensor, "batch seq"] | None = None,
        key_padding_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq heads value_dim"]:
        """See :func:`heddle.attention.dilated.dilated_attention` for what the arguments mean and what is refused."""
        check_sequence(query, key, value, segment_ids, key_padding_mask)
        scale = score_scale(query, self.softmax_scale)
        return self._attend(query, key, value, is_causal, segment_ids, key_padding_mask, scale)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool,
        segment_ids: Tensor | None, key_padding_mask: Tensor | None, scale: float,
    ) -> Tensor:  # fmt: skip
        def one(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
            return self._one_set(query, key, value, mask, scale)

        return dilated_forward(
            query, key, value, self.patterns, is_causal, segment_ids, key_padding_mask, attend=one
        )[0]  # fmt: skip

    def _one_set(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = attend(query, key, value, mask, scale=scale, implementation=self.op, return_lse=True)
        if self.training and self.attention_dropout:
            out = _with_dropout(query, key, value, mask, scale, self.attention_dropout)
        return out, lse

    def extra_repr(self) -> str:
        lengths, rates = ([p[i] for p in self.patterns] for i in (0, 1))
        return f"segment_lengths={lengths}, dilation_rates={rates}"


def _with_dropout(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, dropout: float) -> Tensor:
    """Attention with dropout on its weights, of segments small enough for that to hold them."""
    seen: Any = mask.dense(key.shape[1])[:, None]
    seen = seen | ~seen.any(-1, keepdim=True)  # queries that see nothing: their weight in the merge is 0
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, dropout_p=dropout, scale=scale, enable_gqa=query.shape[2] != key.shape[2]
    )
    return out.transpose(1, 2)


class ImprovedDilatedAttention(DilatedAttention):
    """The same results in less memory and time: training keeps the inputs, the merged output and its lse.

    The gradient is taken from these (as FlashAttention does, arXiv 2205.14135, but through all patterns at once), and
    not through each pattern's output and their merge.
    """

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool,
        segment_ids: Tensor | None, key_padding_mask: Tensor | None, scale: float,
    ) -> Tensor:  # fmt: skip
        if self.training and self.attention_dropout:  # which keys were dropped is known to the patterns alone
            return super()._attend(query, key, value, is_causal, segment_ids, key_padding_mask, scale)
        options = self.patterns, is_causal, segment_ids, key_padding_mask, scale, self.op
        return _Improved.apply(query, key, value, *options)[0]  # type: ignore[index]


class _Improved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, patterns: tuple[Pattern, ...], is_causal: bool,
        segment_ids: Tensor | None, key_padding_mask: Tensor | None, scale: float, op: str | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        def run(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
            return choose(query, key, value, mask, op).run(query, key, value, mask, scale)

        out, lse = dilated_forward(
            query, key, value, patterns, is_causal, segment_ids, key_padding_mask, attend=run
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, segment_ids, key_padding_mask, out, lse)
        ctx.patterns, ctx.is_causal, ctx.scale, ctx.op = patterns, is_causal, scale, op
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, *grads: Tensor):
        query, key, value, segment_ids, key_padding_mask, out, lse = ctx.saved_tensors

        def run(query: Tensor, key: Tensor, value: Tensor, mask: Mask, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
            chosen, (*arrays, d_lse) = choose(query, key, value, mask, ctx.op), rest
            if d_lse is None and chosen is REFERENCE:
                d_lse = torch.zeros_like(arrays[1])
            return chosen.backward(query, key, value, mask, ctx.scale, *arrays, d_lse)

        d_inputs = dilated_backward(
            query, key, value, ctx.patterns, ctx.is_causal, segment_ids, key_padding_mask, out, lse, grads[0], None,
            backward=run,
        )  # fmt: skip
        return *d_inputs, None, None, None, None, None, None


# ---------------------------------------------------------------- with projections


class MultiheadDilatedAttention(nn.Module):
    """A drop-in for ``nn.MultiheadAttention(batch_first=True)`` whose attention is dilated.

    With MAGNETO's norm before the output projection and its gain on the value and output projections (arXiv 2210.06423,
    figure 2). Queries, keys and values have one length. As an ``nn.TransformerEncoderLayer.self_attn`` it works
    as it is; an ``nn.TransformerEncoder`` of such layers wants ``enable_nested_tensor=False``.

    Args:
        embed_dim, num_heads: as of ``nn.MultiheadAttention``.
        dilation_rates, segment_lengths: of the patterns, in this order.
        dropout: of the attention's weights.
        bias: of the projections.
        layer_norm: whether there is a norm before the output projection.
        layer_norm_eps: of that norm.
        gamma_init: the gain of the value and output projections.

    Raises:
        ValueError: heads that don't divide embed_dim; lists as of :class:`DilatedAttention`.
    """

    attention_type: type[DilatedAttention] = DilatedAttention
    #: What nn.TransformerEncoderLayer asks of its attention before it takes a fused path of its own: not to.
    batch_first, in_proj_bias, _qkv_same_embed_dim = True, None, False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dilation_rates: Sequence[int],
        segment_lengths: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.gamma_init = gamma_init
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(embed_dim, embed_dim, bias, **made) for _ in range(3))
        self.attention = self.attention_type(segment_lengths, dilation_rates, attention_dropout=dropout, **options)
        self.norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps, **made) if layer_norm else nn.Identity()
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """MAGNETO's: Xavier's normal distribution, with the gain on values and output; biases 0."""
        gains = {self.q_proj: 1.0, self.k_proj: 1.0, self.v_proj: self.gamma_init, self.out_proj: self.gamma_init}
        for projection, gain in gains.items():
            magneto(projection, gain)
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.reset_parameters()

    def forward(
        self,
        query: Float[Tensor, "*batch seq embed_dim"],
        key: Float[Tensor, "*batch seq embed_dim"],
        value: Float[Tensor, "*batch seq embed_dim"],
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        segment_ids: Int[Tensor, "*batch seq"] | None = None,
    ) -> tuple[Float[Tensor, "*batch seq embed_dim"], None]:
        """``(output, None)``.

        Args:
            query, key, value: ``(batch, seq, embed_dim)``, or ``(seq, embed_dim)``.
            key_padding_mask: ``(batch, seq)``: True, or -inf, for padding, whose output is the norm's of 0, projected.
            need_weights: must be False: there is no matrix of weights.
            attn_mask: must be None, unless ``is_causal`` says that it is the causal one.
            average_attn_weights: of no effect, as there are no weights.
            is_causal: whether a token sees only those at or before it.
            segment_ids: packed documents, as of :func:`heddle.attention.dilated.dilated_attention`.

        Raises:
            ValueError: arguments that disagree, or ask for what there is not.
        """
        if need_weights:
            raise ValueError("need_weights must be False, got True: dilated attention has no matrix of weights")
        if attn_mask is not None and not is_causal:
            raise ValueError(
                "attn_mask must be None, or the causal one with is_causal=True: the patterns say who sees whom"
            )
        if key_padding_mask is not None and key_padding_mask.is_floating_point():
            key_padding_mask = key_padding_mask == -torch.inf  # as nn.TransformerEncoderLayer hands it on
        if query.ndim == 2:
            whole = [None if x is None else x[None] for x in (query, key, value, key_padding_mask, segment_ids)]
            return self._forward(*whole, is_causal)[0], None  # type: ignore[arg-type]
        return self._forward(query, key, value, key_padding_mask, segment_ids, is_causal), None

    def _forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, segment_ids: Tensor | None,
        is_causal: bool,
    ) -> Tensor:  # fmt: skip
        heads = self.heads(query, key, value)
        out = self.attention(*heads, is_causal, segment_ids=segment_ids, key_padding_mask=key_padding_mask)
        return self.output(out)

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value projected, ``(batch, seq, heads, head_dim)``."""
        inputs = (self.q_proj, query), (self.k_proj, key), (self.v_proj, value)
        query, key, value = (proj(x).unflatten(-1, (self.num_heads, self.head_dim)) for proj, x in inputs)
        return query, key, value

    def output(self, heads: Tensor) -> Tensor:
        """What attention gave the heads, normed and projected."""
        return self.out_proj(self.norm(heads.flatten(2)))


class ImprovedMultiheadDilatedAttention(MultiheadDilatedAttention):
    """:class:`MultiheadDilatedAttention` over :class:`ImprovedDilatedAttention`: the same, in less memory and time."""

    attention_type = ImprovedDilatedAttention


def magneto(projection: nn.Linear, gain: float) -> None:
    """MAGNETO's initialization (arXiv 2210.06423, figure 2): Xavier's normal distribution with a gain; biases 0."""
    nn.init.xavier_normal_(projection.weight, gain=gain)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
