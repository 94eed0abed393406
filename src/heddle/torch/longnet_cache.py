"""LongNet's cache for transformers: a ring of keys for each pattern, whose size doesn't grow with the sequence."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from heddle.attention.dilated_cache import DilatedCache, dilated_decode, dilated_prefill

from .longnet_config import LongNetConfig


class LongNetCacheLayer(CacheLayerMixin):
    """One layer's :class:`~heddle.attention.dilated_cache.DilatedCache`."""

    def __init__(self, config: LongNetConfig):
        super().__init__()
        self.patterns = config.segment_lengths, config.dilation_rates
        self.state: DilatedCache | None = None
        self.columns = 0  #: tokens read, padding too

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, implementation: str | None
    ) -> Tensor:
        new, self.columns = query.shape[1], self.columns + query.shape[1]
        if self.state is not None and new == 1 and lengths is None:
            with torch.no_grad():
                out, self.state = dilated_decode(
                    query, key, value, self.state, *self.patterns, implementation=implementation
                )
            return out
        out, state = dilated_prefill(
            query, key, value, *self.patterns, lengths=lengths, cache=self.state, implementation=implementation
        )
        self._keep(state)
        return out

    def _keep(self, state: DilatedCache) -> None:
        self.state, self.is_initialized = _each(state, Tensor.detach), True

    def get_seq_length(self) -> int:
        """How many tokens it has read, padding too."""
        return self.columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length and offset of what a mask would cover."""
        return self.columns + query_length, 0

    def reset(self) -> None:
        """Forget all."""
        self.state, self.columns, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` goes on as ``beam_idx[i]`` did."""
        if self.state is not None:
            self._keep(_each(self.state, lambda x: x.index_select(0, beam_idx.to(x.device))))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        if self.state is not None:
            self._keep(_each(self.state, lambda x: x.repeat_interleave(repeats, dim=0)))

    def offload(self) -> None:
        """Nothing: it is small."""

    def prefetch(self) -> None:
        """Nothing, as of :meth:`offload`."""

    def crop(self, *args: Any) -> None:
        """Refused: what a ring has overwritten can't come back."""
        raise NotImplementedError("a LongNetCache can't be cropped: what later tokens don't see is gone")

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the first tokens make it."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: it doesn't hold the keys that other attention would ask for."""
        raise NotImplementedError("a LongNetCache serves LongNet's attention alone")


class LongNetCache(Cache):
    """A cache of at most ``sum(ceil(w / r))`` keys a head and layer, however long the sequence.

    Rows may hold different numbers of tokens. For inference: no gradient comes through it.
    """

    def __init__(self, config: LongNetConfig):
        super().__init__(layers=[LongNetCacheLayer(config) for _ in range(config.num_hidden_layers)])

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch seq heads head_dim"],
        key: Float[Tensor, "batch seq heads head_dim"],
        value: Float[Tensor, "batch seq heads head_dim"],
        lengths: Int[Tensor, " batch"] | None,
        implementation: str | None = None,
    ) -> Float[Tensor, "batch seq heads head_dim"]:
        """Causal dilated attention of new tokens, which the layer's cache then holds too.

        Args:
            layer: which.
            query, key, value: of the new tokens.
            lengths: how many of each row's are tokens, before its padding; None: all.
            implementation: as of :func:`heddle.attend`.
        """
        held: Any = self.layers[layer]
        return held.attend(query, key, value, lengths, implementation)

    def lengths(self, like: Tensor) -> Int[Tensor, " batch"]:
        """How many tokens each of ``like``'s rows has had, without padding."""
        first: Any = self.layers[0]
        if first.state is None:
            return torch.zeros(like.shape[0], dtype=torch.int32, device=like.device)
        return first.state.lengths

    def nbytes(self) -> int:
        """The bytes it takes."""
        held: Any = self.layers
        return sum(
            x.nbytes for layer in held if layer.state is not None for part in layer.state[:2] for x in part
        )  # fmt: skip


def _each(state: DilatedCache, change: Any) -> DilatedCache:
    keys, values = (tuple(change(x) for x in part) for part in state[:2])
    return DilatedCache(keys, values, change(state.lengths))
