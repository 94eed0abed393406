"""LongNet's dilated attention as modules: arXiv 2307.02486, in MAGNETO's transformer layers, arXiv 2210.06423."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from heddle.attention.attend import REFERENCE, attend, choose, score_scale
from heddle.attention.dilated import (
    Pattern,
    check_patterns,
    check_sequence,
    dilated_backward,
    dilated_forward,
)
from heddle.attention.mask import Mask
from heddle.attention.merge import merge

from .parallel import _gather, _process_group


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


# ---------------------------------------------------------------- over processes


class DistributedDilatedAttention(DilatedAttention):
    """Dilated attention of a sequence that is spread over processes, each holding an equal, consecutive part.

    arXiv 2307.02486, section 3.1: patterns whose segments lie within a part need nothing from elsewhere. Of the others
    each process sends the keys and values it keeps, to the processes that share a segment with it alone; gradients come
    back summed. So what is sent doesn't grow with the length if ``w / r`` doesn't.

    Args:
        group: the processes, a ProcessGroup or a one-dimensional DeviceMesh; None: all.
        segment_lengths, dilation_rates, softmax_scale, attention_dropout, op: as of :class:`DilatedAttention`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        op: str | None = None,
        group: ProcessGroup | DeviceMesh | None = None,
    ):
        super().__init__(segment_lengths, dilation_rates, softmax_scale, attention_dropout, op)
        if group is None and not dist.is_initialized():
            raise ValueError("group must be given, or torch.distributed be initialized before")
        self.group: Any = dist.group.WORLD if group is None else _process_group(group)
        self._groups: dict[range, Any] = {range(dist.get_world_size(self.group)): self.group}

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool,
        segment_ids: Tensor | None, key_padding_mask: Tensor | None, scale: float,
    ) -> Tensor:  # fmt: skip
        if segment_ids is not None or key_padding_mask is not None:
            raise NotImplementedError("documents and padding are not spread over processes: give whole sequences")

        def one(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
            return self._one_set(query, key, value, mask, scale)

        length, ranks = query.shape[1], dist.get_world_size(self.group)
        blocks = {pattern: min(math.lcm(pattern.length, length) // length, ranks) for pattern in self.patterns}
        local = [pattern for pattern in self.patterns if blocks[pattern] == 1]
        parts = []
        if local:
            out, lse = dilated_forward(query, key, value, local, is_causal, None, None, attend=one)
            parts.append((out.to(lse.dtype), lse))
        for pattern in self.patterns:
            if blocks[pattern] > 1:
                parts.append(self._across(query, key, value, pattern, blocks[pattern], is_causal, one))
        return merge(parts)[0].to(query.dtype)

    def _across(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, block: int, is_causal: bool,
        attend: Callable[[Tensor, Tensor, Tensor, Mask], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One pattern whose segments reach over ``block`` processes: ``(out, lse)`` of the local queries."""
        (batch, length, heads, _), group = query.shape, query.shape[2] // key.shape[2]
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        first = rank // block * block
        members = range(first, min(first + block, ranks))
        plan = _plan(pattern, length, heads, rank, members, is_causal)
        device = query.device

        def by_head(x: Tensor, index: np.ndarray, share: int) -> Tensor:  # (batch, heads, kept, dim)
            rows = torch.as_tensor(index, device=device)
            return torch.stack([x[:, rows[head], head // share] for head in range(heads)], dim=1)

        pairs = torch.cat([by_head(key, plan.sent, group), by_head(value, plan.sent, group)], dim=-1)
        pairs = _gather(pairs.transpose(1, 2), self._subgroup(members))
        # Heads stand in the batch: each sees keys of its own.
        pairs = by_head(pairs, plan.keys, 1).flatten(0, 1)[:, :, None]
        keys, values = pairs.split([key.shape[3], value.shape[3]], dim=-1)
        mask = Mask(np.tile(plan.start, (batch, 1)), np.tile(plan.stop, (batch, 1)))
        part = attend(by_head(query, plan.sent, 1).flatten(0, 1)[:, :, None], keys, values, mask.on(query))
        wide = part[1].dtype
        out = torch.zeros(batch, length, heads, value.shape[3], dtype=wide, device=device)
        lse = torch.full((batch, length, heads), -torch.inf, dtype=wide, device=device)
        outs, lses = ([*x.unflatten(0, (batch, heads)).squeeze(3).unbind(1)] for x in part)
        for head, count in enumerate(plan.counts):
            rows = torch.as_tensor(plan.sent[head, :count], device=device)
            outs[head] = out[:, :, head].index_copy(1, rows, outs[head][:, :count].to(wide))
            lses[head] = lse[:, :, head].index_copy(1, rows, lses[head][:, :count])
        return torch.stack(outs, dim=2), torch.stack(lses, dim=2)

    def _subgroup(self, members: range) -> ProcessGroup:
        """The processes of one block; made when first needed, by its members alone."""
        if members not in self._groups:
            ranks = [dist.get_global_rank(self.group, member) for member in members]
            self._groups[members] = dist.new_group(ranks, use_local_synchronization=True)
        return self._groups[members]


class _Plan(NamedTuple):
    """What one process sends and asks of one pattern, by head."""

    sent: Int[np.ndarray, "heads kept"]  #: places of its part it keeps; as many as any member keeps, some repeated
    counts: list[int]  #: how many of them count
    keys: Int[np.ndarray, "heads keys"]  #: places among all that was gathered, in order of position
    start: Int[np.ndarray, "heads kept"]
    stop: Int[np.ndarray, "heads kept"]


@functools.lru_cache(maxsize=64)
def _plan(pattern: Pattern, length: int, heads: int, rank: int, members: range, is_causal: bool) -> _Plan:
    (w, r), offsets = pattern, np.arange(heads) % pattern.rate
    position = np.arange(members.start * length, members.stop * length)
    is_kept = position % w % r == offsets[:, None]
    counts = is_kept.reshape(heads, len(members), length).sum(-1)
    most, mine = max(1, counts.max()), members.index(rank)
    sent, keys, start, stop = (np.zeros((heads, n), np.int64) for n in (most, max(1, counts.sum(1).max()), most, most))
    for head in range(heads):
        kept = position[is_kept[head]]
        own = position[mine * length : (mine + 1) * length][is_kept[head, mine * length : (mine + 1) * length]]
        sent[head, : len(own)] = own - rank * length
        places = [member * most + np.arange(count) for member, count in enumerate(counts[head])]
        keys[head, : len(kept)] = np.concatenate(places)
        start[head, : len(own)] = np.searchsorted(kept, own // w * w)
        end = own + 1 if is_causal else (own // w + 1) * w
        stop[head, : len(own)] = np.searchsorted(kept, end)
    return _Plan(sent, counts[:, mine].tolist(), keys, start.astype(np.int32), stop.astype(np.int32))


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
            _magneto(projection, gain)
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
        heads = [
            proj(x).unflatten(-1, (self.num_heads, self.head_dim))
            for proj, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        ]
        out = self.attention(*heads, is_causal, segment_ids=segment_ids, key_padding_mask=key_padding_mask)
        return self.out_proj(self.norm(out.flatten(2)))


class ImprovedMultiheadDilatedAttention(MultiheadDilatedAttention):
    """:class:`MultiheadDilatedAttention` over :class:`ImprovedDilatedAttention`: the same, in less memory and time."""

    attention_type = ImprovedDilatedAttention


class DistributedMultiheadDilatedAttention(MultiheadDilatedAttention):
    """:class:`MultiheadDilatedAttention` over :class:`DistributedDilatedAttention`, whose ``group`` it takes too."""

    attention_type = DistributedDilatedAttention


def _magneto(projection: nn.Linear, gain: float) -> None:
    nn.init.xavier_normal_(projection.weight, gain=gain)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)


class _FeedForward(nn.Module):
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
            _magneto(linear, gamma_init)

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
        self.self_attn = ImprovedMultiheadDilatedAttention(
            d_model, nhead, dilation_rates, segment_lengths, dropout,
            layer_norm_eps=layer_norm_eps, gamma_init=gamma_init, **made,
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = _FeedForward(
            d_model, dim_feedforward, dropout, activation, layer_norm_eps, gamma_init, made
        )

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
        self.feed_forward = _FeedForward(
            d_model, dim_feedforward, dropout, activation, layer_norm_eps, gamma_init, made
        )

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
