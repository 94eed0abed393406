"""``cudnn``: cuDNN's fused attention, for the masks that it has a word for."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from heddle.attention.arrays import Array, is_concrete, to_numpy
from heddle.attention.mask import Mask

from .triton import device_of


class Kind(NamedTuple):
    """What cuDNN can say. A padded sequence's queries and keys are its first ``lengths``."""

    causal: bool
    window: int | None  #: keys up to and with the query's own, of a causal mask
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None  #: of queries and keys, by sequence


def unsupported(query: Array, key: Array, value: Array, mask: Mask) -> str | None:
    if (platform := device_of(query).platform) != "gpu":
        return f"cuDNN runs on CUDA, the arrays are on {platform}"
    if _attention() is None:
        return "this release of JAX has no cuDNN attention that gives an lse in float32"
    if str(query.dtype) not in ("bfloat16", "float16"):
        return f"cuDNN takes bfloat16 and float16, not {query.dtype}"
    dim, value_dim = query.shape[3], value.shape[3]
    if dim != value_dim or dim % 8 or dim > 128:
        return f"cuDNN is given one head dimension, a multiple of 8 up to 128; got {dim} and {value_dim}"
    if not (is_concrete(mask.start) and is_concrete(mask.stop)):
        return "cuDNN is told a mask's kind at compilation, when this one's values are unknown: let jit close over it"
    kind = kind_of(mask, query.shape[0], key.shape[1])
    return None if isinstance(kind, Kind) else kind


def kind_of(mask: Mask, batch: int, kv_len: int) -> Kind | str:
    """The mask in cuDNN's words, or one clause saying why there are none."""
    index = np.arange(mask.q_len)
    start, stop = (np.broadcast_to(to_numpy(x), (batch, mask.q_len)).astype(np.int64) for x in (mask.start, mask.stop))
    stop = np.clip(stop, 0, kv_len)
    start = np.where(start <= mask.prefix, 0, start)
    sees = start < stop
    if mask.prefix and (start > 0).any():
        return "cuDNN has no mask with a prefix and a gap after it"
    q_lengths, kv_lengths = sees.sum(1), stop.max(1)
    if (sees != (index < q_lengths[:, None])).any() or not sees.any(1).all():
        return "cuDNN wants each sequence's queries to see something, up to where its padding begins"
    start, stop = np.where(sees, start, 0), np.where(sees, stop, 0)
    padded = (q_lengths < mask.q_len).any() or (kv_lengths < kv_len).any()

    def says(causal: bool, window: int | None) -> bool:
        ends = np.minimum(index + 1, kv_lengths[:, None]) if causal else kv_lengths[:, None] + 0 * index
        begins = np.maximum(index - window + 1, 0) + 0 * ends if window else 0 * ends
        return bool((np.where(sees, ends, 0) == stop).all() and (np.where(sees, begins, 0) == start).all())

    causal = mask.q_len == kv_len and says(True, None)
    lengths = (tuple(q_lengths.tolist()), tuple(kv_lengths.tolist())) if padded else None
    if causal:
        return Kind(True, None, lengths)
    if says(False, None):
        return Kind(False, None, lengths)
    window = int((stop - start).max())
    if mask.q_len == kv_len and not padded and says(True, window):
        return Kind(True, window, None)
    return "cuDNN has words for full, causal, padded and causal windowed masks of as many keys as queries, not this one"


def cudnn(
    query: Float[Array, "batch q_len heads dim"],
    key: Float[Array, "batch kv_len kv_heads dim"],
    value: Float[Array, "batch kv_len kv_heads value_dim"],
    mask: Mask,
    scale: float,
) -> tuple[Float[Array, "batch q_len heads value_dim"], Float[Array, "batch q_len heads"]]:
    """Attention by cuDNN, differentiable in out and in lse."""
    kind = kind_of(mask, query.shape[0], key.shape[1])
    assert isinstance(kind, Kind), kind
    return _attend(query, key, value, kind, scale)


def cudnn_backward(
    query: Float[Array, "batch q_len heads dim"],
    key: Float[Array, "batch kv_len kv_heads dim"],
    value: Float[Array, "batch kv_len kv_heads value_dim"],
    mask: Mask,
    scale: float,
    out: Float[Array, "batch q_len heads value_dim"],
    lse: Float[Array, "batch q_len heads"],
    d_out: Float[Array, "batch q_len heads value_dim"],
    d_lse: Float[Array, "batch q_len heads"],
) -> tuple[
    Float[Array, "batch q_len heads dim"],
    Float[Array, "batch kv_len kv_heads dim"],
    Float[Array, "batch kv_len kv_heads value_dim"],
]:
    """dq, dk, dv; out and lse may be over more keys than these.

    cuDNN's own backward knows its own out and lse alone, so these keys' are computed again and take the gradients that
    the merge of all keys hands down: weight * d_out, and weight * (d_out (part - out) + d_lse).
    """
    (part, part_lse), pull = jax.vjp(lambda q, k, v: cudnn(q, k, v, mask, scale), query, key, value)
    seen = part_lse > -jnp.inf
    weight = jnp.where(seen, jnp.exp(part_lse - jnp.where(seen, lse, 0.0)), 0.0)
    inner = jnp.sum(d_out.astype(jnp.float32) * (part.astype(jnp.float32) - out.astype(jnp.float32)), axis=-1)
    return pull(((weight[..., None] * d_out).astype(part.dtype), weight * (inner + jnp.where(seen, d_lse, 0.0))))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(query, key, value, kind, scale):
    return _fused(query, key, value, kind, scale)


def _attend_forward(query, key, value, kind, scale):
    # With symbolic_zeros the arguments come as (value, whether a gradient is asked for).
    arrays = query.value, key.value, value.value
    result, pull = jax.vjp(lambda q, k, v: _fused(q, k, v, kind, scale), *arrays)
    return result, (*arrays, pull)


def _attend_backward(kind, scale, saved, cotangents):
    query, key, value, pull = saved
    d_out, d_lse = cotangents
    shape = query.shape[:3]
    no_lse = jnp.zeros(shape, jnp.float32)
    if isinstance(d_out, jax.custom_derivatives.SymbolicZero):
        d_out = jnp.zeros((*shape, value.shape[3]), query.dtype)
    gradients = pull((d_out, no_lse))
    if isinstance(d_lse, jax.custom_derivatives.SymbolicZero):
        return gradients
    # cuDNN's backward takes no gradient of lse. With P the weights it is dq = scale * dlse * (P key) and
    # dk = scale * P^T (dlse * query): the output of attention to the keys themselves, and its gradient by "value".
    means, pull = jax.vjp(lambda keys: _fused(query, key, keys, kind, scale)[0], key)
    d_lse = scale * jnp.where(_sees(query, kind), d_lse, 0.0)[..., None]
    d_q, d_k, d_v = gradients
    d_q = d_q.astype(jnp.float32) + d_lse * means.astype(jnp.float32)
    d_k = d_k.astype(jnp.float32) + pull((d_lse * query.astype(jnp.float32)).astype(query.dtype))[0].astype(jnp.float32)
    return d_q.astype(query.dtype), d_k.astype(key.dtype), d_v


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _sees(query: Array, kind: Kind) -> Array:
    """``(batch | 1, q_len, 1)``: which queries aren't padding."""
    lengths = (query.shape[1],) if kind.lengths is None else kind.lengths[0]
    return (jnp.arange(query.shape[1]) < jnp.array(lengths)[:, None])[..., None]


def _fused(query: Array, key: Array, value: Array, kind: Kind, scale: float) -> tuple[Array, Array]:
    from jax._src.cudnn.fused_attention_stablehlo import MaskType

    mask_type = {
        (False, False): MaskType.NO_MASK,
        (True, False): MaskType.CAUSAL,
        (False, True): MaskType.PADDING,
        (True, True): MaskType.PADDING_CAUSAL,
    }[kind.causal, kind.lengths is not None]
    lengths = {}
    if kind.lengths is not None:
        lengths = {
            name: jnp.array(n, jnp.int32) for name, n in zip(("q_seqlen", "kv_seqlen"), kind.lengths, strict=True)
        }
    attention: Any = _attention()
    out, lse = attention(
        query, key, value, **lengths,
        scale=scale, mask_type=mask_type, sliding_window_length=kind.window, return_residual=True,
    )  # fmt: skip
    sees = _sees(query, kind)
    return jnp.where(sees[..., None], out, 0), jnp.where(sees, jnp.swapaxes(lse, 1, 2), -jnp.inf)


def _attention() -> Any | None:
    """What :func:`jax.nn.dot_product_attention` calls for ``implementation="cudnn"``, which has no public name.

    The public function rounds the lse to bfloat16, which is too little for :func:`heddle.merge`.
    """
    try:
        from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention
    except ImportError:
        return None
    return dot_product_attention if "return_residual" in inspect.signature(dot_product_attention).parameters else None
