"""Hugging Face: ``attn_implementation="heddle"``. Padding, packing, windows and caches become one :class:`heddle.Mask`.

For every model whose attention goes through transformers' interface and sees an interval of keys. The mask is made once
a forward pass and travels to the layers as integers ``(batch, 3, q_len, 1)``: start, stop, and each query's own place
among the keys. A tensor of four dimensions is what transformers hands on untouched, to compiled models too.

A configuration with ``attention = {"kind": "dilated", "segment_lengths": [...], "dilation_rates": [...]}`` gets
LongNet's dilated attention instead, of the same documents and over any cache that keeps all keys.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heddle.attention.attend import attend
from heddle.attention.dilated import dilated_attention
from heddle.attention.dilated_continue import dilated_continue
from heddle.attention.dilated_patterns import Pattern, check_patterns, patterns_of_option
from heddle.attention.mask import PADDING_SEGMENT_ID, Mask

from .dilated import ImprovedDilatedAttention

NAME = "heddle"
#: ``attn_implementation`` of our own models, to :func:`heddle.attend`'s; None: the first that serves.
IMPLEMENTATIONS = {NAME: None, "sdpa": "sdpa", "eager": "reference"}
MODULE = "transformers.modeling_utils"


# ---------------------------------------------------------------- transformers' mask function, once a forward pass


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """The mask that ``mask_function(batch, head, query, key)`` and the padding of ``attention_mask`` describe.

    The interval around each query's own place is found by bisection, whatever the pattern: O(q_length log kv_length).
    """
    if use_vmap:
        raise NotImplementedError("attn_implementation='heddle' takes no or_mask_function or and_mask_function")
    batch = torch.arange(batch_size, device=device)[:, None]
    place = (torch.arange(q_length, device=device) + q_offset).expand(batch_size, q_length)

    def sees(key: Tensor) -> Tensor:
        if mask_function is None:
            return key <= place
        seen = mask_function(batch, torch.zeros_like(batch), place, key)
        return torch.as_tensor(seen, device=device).expand_as(place)

    own = place.clamp(kv_offset, kv_offset + kv_length - 1)
    seen = sees(own)
    start = _furthest(sees, own, torch.full_like(own, kv_offset), kv_length)
    stop = _furthest(sees, own, torch.full_like(own, kv_offset + kv_length - 1), kv_length) + 1
    if attention_mask is not None:
        low, high = _padding(attention_mask.to(device=device, dtype=torch.bool))
        start, stop = torch.maximum(start, low), torch.minimum(stop, high)
    empty = ~seen | (start >= stop)
    start, stop, place = (x - kv_offset for x in (start, stop, place))
    start, stop = start.masked_fill(empty, 0), stop.masked_fill(empty, 0)
    return torch.stack([start, stop, place], dim=1).to(torch.int32)[..., None]


def _furthest(sees: Callable[[Tensor], Tensor], near: Tensor, far: Tensor, keys: int) -> Tensor:
    """The furthest key from ``near`` towards ``far`` up to which a query sees all."""
    step = torch.sign(far - near)
    low, high = torch.zeros_like(near), (far - near).abs()
    for _ in range(keys.bit_length()):
        middle = (low + high + 1) // 2
        seen = sees(near + step * middle)
        low, high = torch.where(seen, middle, low), torch.where(seen, high, (middle - 1).clamp(min=0))
        high = torch.maximum(low, high)
    return near + step * low


def _padding(valid: Tensor) -> tuple[Tensor, Tensor]:
    """The first and one past the last key of each row ``(batch, keys)`` that isn't padding, ``(batch, 1)``."""
    keys = torch.arange(valid.shape[1], device=valid.device)
    low = torch.where(valid, keys, valid.shape[1]).amin(1, keepdim=True)
    high = torch.where(valid, keys + 1, 0).amax(1, keepdim=True)
    if not torch.compiler.is_compiling() and bool((valid.sum(1, keepdim=True) != (high - low).clamp(min=0)).any()):
        raise ValueError("attention_mask must be padded on the left, on the right or on both, not in the middle")
    return low, high


# ---------------------------------------------------------------- transformers' attention function, in every layer


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``attend`` as transformers calls attention: heads before positions in, after them out.

    Documents packed into a row are told by ``position_ids`` that begin again at 0, or by ``segment_ids``
    ``(batch, seq)``, any that :meth:`heddle.Mask.documents` takes, which the model's call hands on as they are.
    """
    refused = [name for name in ("softcap", "s_aux", "position_bias", "head_mask") if kwargs.get(name) is not None]
    if dropout or refused:
        raise NotImplementedError(f"attn_implementation='heddle' computes no {', '.join(refused) or 'dropout'}")
    patterns = dilation(getattr(module, "config", None))
    if attention_mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if patterns is not None and not causal:
            raise NotImplementedError("attn_implementation='heddle' computes dilated attention of causal models alone")
        causal = causal and query.shape[2] > 1
        mask = Mask.causal(query.shape[2], key.shape[2], like=query) if causal else None
    else:
        mask = as_mask(attention_mask, kwargs.get("position_ids"), kwargs.get("segment_ids"), key.shape[2])
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast RoPE leaves them in float32
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if patterns is None:
        return attend(query, key, value, mask, scale=scaling), None
    if kwargs.get("sliding_window") is not None:
        raise NotImplementedError("attn_implementation='heddle' computes no dilated attention within sliding windows")
    return dilated(query, key, value, patterns, attention_mask, mask, scale=scaling)[0], None


def as_mask(bounds: Tensor, positions: Tensor | None, segments: Tensor | None, kv_len: int) -> Mask:
    if bounds.ndim != 4 or bounds.shape[1] != 3 or bounds.shape[3] != 1 or bounds.dtype != torch.int32:
        raise ValueError(
            f"attention_mask must have shape (batch, seq) for attn_implementation='heddle', got {tuple(bounds.shape)}"
        )
    if not torch.compiler.is_compiling() and hasattr(bounds, "_heddle_mask"):
        return bounds._heddle_mask  # type: ignore[attr-defined]
    start, stop, place = bounds[..., 0].unbind(1)
    if segments is None and positions is not None and positions.ndim == 2 and start.shape[1] > 1:
        # A document begins where positions do; the keys before it belong to another one.
        begins = torch.nn.functional.pad(positions[:, 1:] == 0, (1, 0)).to(place.device).expand_as(place)
        start = torch.maximum(start, torch.where(begins, place, 0).cummax(1).values)
        stop = torch.where(start < stop, stop, 0)
    mask = Mask(start, stop)
    if segments is not None:
        if segments.shape[1] != kv_len:
            raise ValueError(f"segment_ids must be of all {kv_len} keys (no cache), got shape {tuple(segments.shape)}")
        mask = mask & Mask.documents(segments.to(torch.int32))
    if not torch.compiler.is_compiling():
        bounds._heddle_mask = mask  # type: ignore[attr-defined]
    return mask


# ---------------------------------------------------------------- dilated attention, where the configuration says so


def dilation(config: Any) -> tuple[Pattern, ...] | None:
    """The patterns of ``config.attention``, or of a LongNet; None: plain attention.

    Raises:
        ValueError: a kind, field or pattern that there isn't.
    """
    if getattr(config, "model_type", None) == "longnet":
        return check_patterns(config.segment_lengths, config.dilation_rates)
    return patterns_of_option(getattr(config, "attention", None))


def dilated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patterns: tuple[Pattern, ...],
    bounds: Tensor | None,
    mask: Mask | None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``(out, lse)`` of causal dilated attention, ``(batch, seq, heads, head_dim)``, of the documents that masks tell.

    Args:
        query, key, value: of the new tokens, and of all.
        patterns: w and r of each pattern.
        bounds, mask: as :func:`make_mask` and :func:`as_mask` give them; None: a row is one document.
        scale, implementation: as of :func:`heddle.attend`.
        return_lse: whether the lse is needed; without it training keeps less.
    """
    lists: Any = tuple(zip(*patterns, strict=True))
    place: Any = None if bounds is None else bounds[:, 2, :, 0]
    options: Any = {"scale": scale, "implementation": implementation}
    if query.shape[1] == key.shape[1]:
        documents = None if bounds is None or mask is None else _documents(bounds, mask, place)
        if not return_lse:
            module = ImprovedDilatedAttention(*lists, softmax_scale=scale, op=implementation)
            return module(query, key, value, True, segment_ids=documents), None
        return dilated_attention(
            query, key, value, *lists, is_causal=True, segment_ids=documents, return_lse=True, **options
        )
    if place is None or mask is None:
        place = torch.arange(key.shape[1] - query.shape[1], key.shape[1], device=query.device)
        place = place.expand(query.shape[0], -1)
        real, start = place >= 0, torch.zeros_like(place)
    else:
        start, real = mask.start.expand_as(place), _real(mask, place)
    begin = torch.where(real, start, key.shape[1]).amin(1)
    if not torch.compiler.is_compiling() and bool((real & (start != begin[:, None])).any()):
        raise ValueError("position_ids must be of one document a row where there is a cache, got several")
    positions = torch.where(real, place - start, -1)
    return dilated_continue(
        query, key, value, *lists, positions=positions, begin=begin, return_lse=True, **options
    )  # fmt: skip


def _documents(bounds: Tensor, mask: Mask, place: Tensor) -> Tensor | None:
    """Numbers of the documents that a mask tells, -1 for padding; None for one document a row and no padding."""
    if torch.compiler.is_compiling():
        return torch.where(_real(mask, place), mask.start.expand_as(place), PADDING_SEGMENT_ID)
    if not hasattr(bounds, "_heddle_documents"):
        ids = torch.where(_real(mask, place), mask.start.expand_as(place), PADDING_SEGMENT_ID)
        bounds._heddle_documents = ids if bool(ids.any()) else None  # type: ignore[attr-defined]
    return bounds._heddle_documents  # type: ignore[attr-defined]


def _real(mask: Mask, place: Tensor) -> Tensor:
    """Which tokens see themselves: all but padding, on either side."""
    return (mask.start <= place) & (place < mask.stop)


# ---------------------------------------------------------------- registration


def register() -> None:
    """Make ``attn_implementation="heddle"`` known to transformers, which must be installed."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)


def register_when_imported() -> None:
    """:func:`register` now if transformers' models are imported, else when they are: importing them takes seconds."""
    if MODULE in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None):
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
