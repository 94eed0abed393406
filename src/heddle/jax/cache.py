"""The KV cache: each sequence's keys and values so far, at its own length."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from heddle.attention.arrays import Array, is_concrete, to_numpy
from heddle.attention.mask import Mask
from heddle.attention.replicas import replicate, stack_replicas

from .model_config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, and how many each sequence holds.

    A tuple over layers rather than one array: XLA's CPU back end would copy a layer out of the array for each product.

    With more than one replica, rows are replica-major; a sequence's replicas share its length. Learned prefixes stay in
    their layers.

    Args:
        keys: of each layer ``(rows, kv_heads, max_len, head_dim)``, rotated.
        values: as keys.
        lengths: integers ``(batch,)``; what lies at or past a sequence's length is never seen.
        starts: with more than one replica, integers ``(rows,)``: what lies before is never seen, so that replicas whose
            prompts are shorter than another's begin later.
    """

    keys: tuple[Float[Array, "rows kv_heads max_len dim"], ...]
    values: tuple[Float[Array, "rows kv_heads max_len dim"], ...]
    lengths: Int[Array, " batch"]
    starts: Int[Array, " rows"] | None = None

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, max_len: int, dtype=jnp.float32) -> KVCache:
        """Room for ``batch`` sequences of up to ``max_len`` tokens: ``memory(config, ...)`` bytes of zeros."""
        for name, value in (("batch", batch), ("max_len", max_len)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        rows = config.parscale_n * batch
        shape = (rows, config.kv_heads, max_len, config.dim)
        layers = range(config.num_hidden_layers)
        # One buffer each: they are donated, and a buffer can be donated once.
        return cls(
            tuple(jnp.zeros(shape, dtype) for _ in layers),
            tuple(jnp.zeros(shape, dtype) for _ in layers),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros(rows, jnp.int32) if rows > batch else None,
        )

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def replicas(self) -> int:
        return self.keys[0].shape[0] // self.batch

    @property
    def max_len(self) -> int:
        return self.keys[0].shape[2]

    def positions(self, seq: int) -> Int[Array, "batch seq"]:
        """Where the next ``seq`` tokens of each sequence stand."""
        return self.lengths[:, None] + jnp.arange(seq, dtype=jnp.int32)

    def check(self, tokens: Int[Array, " batch"] | int) -> None:
        """Refuse to write so many more tokens of each sequence than there is room for.

        Raises:
            ValueError: naming the first sequence that would pass ``max_len``. Under jit, where lengths can't be read,
                it says nothing; there, what is past the end isn't written.
        """
        if not is_concrete(self.lengths) or not (isinstance(tokens, int) or is_concrete(tokens)):
            return
        after = to_numpy(self.lengths) + (tokens if isinstance(tokens, int) else to_numpy(tokens))
        if (after > self.max_len).any():
            row = int((after > self.max_len).argmax())
            raise ValueError(
                f"cache must have room for {int(after[row])} tokens of sequence {row}, got max_len {self.max_len}"
            )

    def write(
        self, layer: int, key: Float[Array, "rows seq kv_heads dim"], value: Float[Array, "rows seq kv_heads dim"],
        slots: Int[Array, "rows seq"],
    ) -> KVCache:  # fmt: skip
        """The cache with these keys and values of one layer at ``slots``; a slot of ``max_len`` writes nothing.

        Lengths stay: they advance once a forward (:meth:`advance`), so that every layer writes at the same place.
        """
        rows = jnp.arange(self.keys[layer].shape[0])[:, None]

        def put(buffers, new):
            written = buffers[layer].at[rows, :, slots].set(new.astype(buffers[layer].dtype), mode="drop")
            return (*buffers[:layer], written, *buffers[layer + 1 :])

        return replace(self, keys=put(self.keys, key), values=put(self.values, value))

    def advance(self, tokens: Int[Array, " batch"]) -> KVCache:
        """The cache with each sequence longer by ``tokens``."""
        return replace(self, lengths=self.lengths + tokens)

    def slots(self, valid: Bool[Array, "batch seq"]) -> Int[Array, "batch seq"]:
        """Where the next tokens of each sequence are written; ``max_len``, so nowhere, for those not valid."""
        return jnp.where(valid, self.positions(valid.shape[1]), self.max_len)

    def mask(self, tokens: Int[Array, " batch"], seq: int) -> Mask:
        """What the next ``seq`` queries of each row see once written, ``tokens`` of each sequence being real."""
        mask = Mask.lengths(self.lengths + tokens, seq, offset=self.lengths)
        if self.starts is None:
            return mask
        start, stop = self.starts[:, None], replicate(mask.stop, self.replicas)
        stop = jnp.where(start < stop, stop, 0)
        return Mask(jnp.minimum(start, stop), stop)

    def begin(self, later: Int[Array, "batch replicas"]) -> KVCache:
        """The cache whose replicas begin so many tokens later than now, if they haven't begun."""
        if self.starts is None:
            raise ValueError("later must be of a cache with more than one replica, got one with one")
        lengths = replicate(self.lengths, self.replicas)
        starts = jnp.where(self.starts == lengths, lengths + stack_replicas(later), self.starts)
        return replace(self, starts=starts)

    def begun(self) -> np.ndarray:
        """Whether each replica of each sequence ``(batch, replicas)`` holds a token; under jit, False."""
        if self.starts is None or not is_concrete(self.starts) or not is_concrete(self.lengths):
            return np.zeros((self.batch, self.replicas), bool)
        return to_numpy(self.lengths)[:, None] > to_numpy(self.starts).reshape(self.replicas, self.batch).T
