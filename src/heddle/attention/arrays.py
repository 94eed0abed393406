"""The array API for whichever framework an array belongs to, and the few operations the standard lacks.

The core never imports a framework: an array that arrives has already imported its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import array_api_compat.numpy as numpy_namespace
import numpy as np

Array = Any  #: a NumPy array, torch tensor or JAX array; shapes are stated by jaxtyping annotations


def framework(array: Array) -> str:
    """``"numpy"``, ``"torch"`` or ``"jax"``: the framework ``array`` belongs to."""
    if isinstance(array, (np.ndarray, np.generic)):
        return "numpy"
    for name in ("torch", "jax"):
        module = sys.modules.get(name)
        if module is not None and isinstance(array, module.Tensor if name == "torch" else module.Array):
            return name
    raise ValueError(f"expected a NumPy array, a torch tensor or a JAX array; got {type(array).__name__}")


def namespace(array: Array) -> Any:
    """The array-API namespace of ``array``, chosen by type alone so that it traces under torch.compile."""
    name = framework(array)
    if name == "torch":
        import array_api_compat.torch as torch_namespace

        return torch_namespace
    return sys.modules["jax"].numpy if name == "jax" else numpy_namespace


def asarray_like(array: Array, like: Array) -> Array:
    """``array`` as an array of ``like``'s framework, on its device (JAX places arrays by itself)."""
    target = framework(like)
    if target == "torch":
        torch = sys.modules["torch"]
        if framework(array) == "torch":
            return array.to(like.device)
        return torch.as_tensor(np.array(array), device=like.device)  # a copy: the array may be read-only
    if framework(array) == target:
        return array
    return namespace(like).asarray(to_numpy(array))


def to_numpy(array: Array) -> np.ndarray:
    """A NumPy copy or view on the host. Raises under a JAX or torch trace, where values do not exist yet."""
    return array.detach().cpu().numpy() if framework(array) == "torch" else np.asarray(array)


def is_concrete(array: Array) -> bool:
    """Whether values can be read now: False under jax.jit, torch.compile and fake tensors."""
    name = framework(array)
    if name == "jax":
        return not isinstance(array, sys.modules["jax"].core.Tracer)
    if name == "torch":
        torch = sys.modules["torch"]
        # A subclass (FakeTensor, functional wrappers) has no values of its own.
        return not torch.compiler.is_compiling() and type(array) in (torch.Tensor, torch.nn.Parameter)
    return True


def arange(n: int, like: Array | None = None) -> Array:
    """``int32`` 0..n-1 of ``like``'s framework and device.

    Without ``like`` NumPy's, but torch's while torch.compile traces, which can't follow NumPy's dtypes.
    """
    torch = sys.modules.get("torch")
    if like is None:
        if torch is not None and torch.compiler.is_compiling():
            return torch.arange(n, dtype=torch.int32)
        return np.arange(n, dtype=np.int32)
    if framework(like) == "torch":
        return sys.modules["torch"].arange(n, dtype=sys.modules["torch"].int32, device=like.device)
    xp = namespace(like)
    return xp.arange(n, dtype=xp.int32)


def integers(values: Sequence[int], like: Array) -> Array:
    """``int32`` values of ``like``'s framework and device."""
    if framework(like) == "torch":
        return sys.modules["torch"].tensor(values, dtype=sys.modules["torch"].int32, device=like.device)
    xp = namespace(like)
    return xp.asarray(values, dtype=xp.int32)


def accumulator_dtype(x: Array) -> Any:
    """What sums over ``x`` are accumulated in: float64 for float64, float32 for all else."""
    xp = namespace(x)
    return xp.float64 if x.dtype == xp.float64 else xp.float32


def matmul(a: Array, b: Array) -> Array:
    """Matrix product in full precision: the default of some accelerators under JAX is less than float32."""
    if framework(a) == "jax":
        return namespace(a).matmul(a, b, precision="highest")
    return namespace(a).matmul(a, b)


def clip(x: Array, low: int | None, high: int | None) -> Array:
    """``x`` bounded on either side (array-api-compat's own does not trace quietly under torch.compile)."""
    return x.clip(low, high)


def running_sum(x: Array) -> Array:
    """Cumulative sum along the last axis (array-api-compat's own does not trace quietly under torch.compile)."""
    return x.cumsum(-1)


def pick(x: Array, index: Array) -> Array:
    """``x[..., index]`` row by row: take_along_axis on the last axis, with any integer index (torch wants int64)."""
    xp = namespace(x)
    return xp.take_along_axis(x, xp.astype(index, xp.int64) if framework(x) == "torch" else index, axis=-1)


def running_max(x: Array) -> Array:
    """Cumulative maximum along the last axis, by doubling: log2(n) elementwise steps (not in the standard)."""
    xp, n, step = namespace(x), x.shape[-1], 1
    while step < n:
        x = xp.concat([x[..., :step], xp.maximum(x[..., step:], x[..., :-step])], axis=-1)
        step *= 2
    return x


def count_at_most(sorted_values: Array, bounds: Array) -> Array:
    """For each of ``bounds`` (rows, m), how many of the row of ``sorted_values`` (rows, n) are <= it.

    A batched ``searchsorted(side="right")`` (the standard's takes one row only), by one stable sort of both.
    """
    xp, n = namespace(bounds), sorted_values.shape[-1]
    # Stable: at equal values the sorted values stand before the bounds, so a bound's rank counts them.
    order = xp.argsort(xp.concat([sorted_values, bounds], axis=-1), axis=-1, stable=True)
    is_value = xp.astype(order < n, xp.int32)
    below = running_sum(is_value)
    rank = xp.argsort(order, axis=-1, stable=True)
    return xp.astype(pick(below, rank[..., n:]), xp.int32)
