"""``triton``: the kernels of :mod:`heddle.kernels`, launched by XLA as differentiable operations on JAX arrays."""

from __future__ import annotations

import functools
import importlib.util
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from heddle.attention.arrays import Array, is_concrete
from heddle.attention.mask import Mask
from heddle.attention.tiles import Intervals, schedule

from .batching import batched, vary_alike

if TYPE_CHECKING:
    from heddle.kernels.plan import Launch, Problem, Tile

INSTALLED = importlib.util.find_spec("triton") is not None
DECODE_ROWS = 16  #: query rows of a KV head, at most, that are served by splitting the keys
MAX_DIM = 256
TARGET = "triton_kernel_call_ffi"  #: the custom call that the plugin registers
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}

Tiles = tuple["Tile", "Tile", "Tile", "Tile"]  # of the forward, dK/dV, dQ and decode kernels


def unsupported(query: Array, key: Array, value: Array, mask: Mask) -> str | None:
    if not INSTALLED:
        return "the triton package is not installed"
    device = device_of(query)
    if device.platform != "gpu":
        return f"its kernels run on CUDA, the arrays are on {device.platform}"
    plugin = _plugin()
    if plugin is None or TARGET not in plugin.registrations():
        return "JAX's CUDA plugin, which launches the kernels, is not installed or too old"
    if str(query.dtype) not in ("float32", "bfloat16", "float16"):
        return f"its kernels take float32, bfloat16 and float16, not {query.dtype}"
    largest = max(query.shape[3], value.shape[3])
    if largest > MAX_DIM:
        return f"its kernels take head dimensions up to {MAX_DIM}, got {largest}"
    return None


def flash(
    query: Float[Array, "batch q_len heads dim"],
    key: Float[Array, "batch kv_len kv_heads dim"],
    value: Float[Array, "batch kv_len kv_heads value_dim"],
    mask: Mask,
    scale: float,
) -> tuple[Float[Array, "batch q_len heads value_dim"], Float[Array, "batch q_len heads"]]:
    """Attention by the Triton kernels, tiles by :mod:`heddle.kernels.plan`. No atomics: results repeat bit for bit."""
    return _flash(query, key, value, mask, scale, _tiles(query, value))


def flash_backward(
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
    """dq, dk, dv; out and lse may be over more keys than these."""
    return _flash_backward((mask, query, key, value, out, lse, d_out, d_lse), scale, _tiles(query, value))


@partial(jax.jit, static_argnames=("scale", "tiles"))
def _flash(query, key, value, mask, scale, tiles):
    return _attend(*vary_alike(query, key, value, mask), scale, tiles)


@partial(jax.jit, static_argnames=("scale", "tiles"))
def _flash_backward(arrays, scale, tiles):
    return batched(partial(_backward, scale=scale, tiles=tiles))(*vary_alike(*arrays))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, mask, scale, tiles):
    # Where no gradient is taken; else _attend_forward is called in its place.
    few = query.shape[1] * (query.shape[2] // key.shape[2]) <= DECODE_ROWS
    return batched(partial(_decode if few else _forward, scale=scale, tiles=tiles))(mask, query, key, value)


def _attend_forward(query, key, value, mask, scale, tiles):
    out, lse = batched(partial(_forward, scale=scale, tiles=tiles))(mask, query, key, value)
    return (out, lse), (mask, query, key, value, out, lse)


def _attend_backward(scale, tiles, saved, cotangents):
    return (*batched(partial(_backward, scale=scale, tiles=tiles))(*saved, *cotangents), None)


_attend.defvjp(_attend_forward, _attend_backward)


# ---------------------------------------------------------------- what is launched


def _forward(mask, query, key, value, *, scale, tiles):
    from heddle.kernels import plan

    tile = tiles[0]
    launch = plan.plan_forward(_problem(mask, query, key, value, scale), tile)
    order = _schedule(mask.tiles(tile.block_q, tile.block_k, key.shape[1]).rows)
    return _launch(launch, query.dtype, query, key, value, *_bounds(mask), order)


def _backward(mask, query, key, value, out, lse, d_out, d_lse, *, scale, tiles):
    from heddle.kernels import plan

    problem, (_, for_kv, for_q, _) = _problem(mask, query, key, value, scale), tiles
    (delta,) = _launch(plan.plan_delta(problem), query.dtype, out, d_out, d_lse)
    columns = _schedule(mask.tiles(for_kv.block_q, for_kv.block_k, key.shape[1]).columns)
    rows = _schedule(mask.tiles(for_q.block_q, for_q.block_k, key.shape[1]).rows)
    inputs, outputs = (query, key, value, *_bounds(mask)), (d_out, lse, delta)
    d_k, d_v = _launch(plan.plan_backward_kv(problem, for_kv), query.dtype, *inputs, columns, *outputs)
    (d_q,) = _launch(plan.plan_backward_q(problem, for_q), query.dtype, *inputs, rows, *outputs)
    return d_q, d_k, d_v


def _decode(mask, query, key, value, *, scale, tiles):
    from heddle.kernels import plan

    problem, processors = _problem(mask, query, key, value, scale), _gpu()[1]
    split, combine = plan.plan_decode(problem, tiles[3], 2 * processors)
    parts = _launch(split, query.dtype, query, key, value, *_bounds(mask))
    return _launch(combine, query.dtype, *parts)


def _tiles(query: Array, value: Array) -> Tiles:
    from heddle.kernels import plan

    generation = _gpu()[0] // 10 * 10
    dims = query.shape[3], value.shape[3]
    return tuple(plan.tile(name, *dims, query.dtype.itemsize, generation) for name in plan.KERNELS)  # type: ignore


def _problem(mask: Mask, query: Array, key: Array, value: Array, scale: float) -> Problem:
    from heddle.kernels import plan

    return plan.Problem(
        batch=query.shape[0],
        q_len=query.shape[1],
        kv_len=key.shape[1],
        heads=query.shape[2],
        kv_heads=key.shape[2],
        dim=query.shape[3],
        value_dim=value.shape[3],
        mask_rows=mask.start.shape[0],
        prefix=min(mask.prefix, key.shape[1]),
        scale=scale,
        # XLA hands custom calls their arrays row by row.
        strides=tuple((x.shape[1] * x.shape[2] * x.shape[3], x.shape[2] * x.shape[3], x.shape[3])
                      for x in (query, key, value)),  # type: ignore[arg-type]
        float32=query.dtype == jnp.float32,
    )  # fmt: skip


def _bounds(mask: Mask) -> tuple[Array, Array]:
    return mask.start.astype(jnp.int32), mask.stop.astype(jnp.int32)


def _schedule(intervals: Intervals) -> Array:
    return schedule(intervals).astype(jnp.int32)


# ---------------------------------------------------------------- the launch


def _launch(launch: Launch, dtype: Any, *inputs: Array) -> tuple[Array, ...]:
    dtypes = {"query": dtype, "float32": jnp.dtype("float32")}
    outputs = tuple(jax.ShapeDtypeStruct(shape, dtypes[kind]) for kind, shape in launch.outputs)
    return vary_alike(*_call(launch, outputs, *inputs), inputs[0])[: len(outputs)]


def _call(launch: Launch, outputs: tuple[jax.ShapeDtypeStruct, ...], *inputs: Array) -> tuple[Array, ...]:
    """The kernel as a custom call of the program, compiled while JAX traces."""
    arguments = launch.arguments(*(POINTERS[str(array.dtype)] for array in (*inputs, *outputs)))
    name, program = _kernel_call(
        launch.kernel,
        launch.grid,
        tuple(arguments.items()),
        frozenset(launch.constants),
        launch.num_warps,
        launch.num_stages,
        _gpu()[0],
    )
    return jax.ffi.ffi_call(TARGET, outputs)(*inputs, name=name, opaque=program)  # type: ignore


@functools.cache
def _kernel_call(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[tuple[str, Any], ...],
    constants: frozenset[str],
    num_warps: int,
    num_stages: int,
    capability: int,
) -> tuple[str, bytes]:
    """The kernel's name and its launch, compiled, as JAX's CUDA plugin reads it.

    Our own few lines and not jax-triton: that one takes no alignment of strides, sets TRITON_CACHE_DIR, and has to fit
    the versions of Triton and of JAX at once. What is specialised is what Triton itself would: ones are constants,
    pointers and multiples of 16 are said to be aligned.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    plugin: Any = _plugin()
    signature, values, aligned, parameters = {}, {}, {}, []
    for index, (name, argument) in enumerate(arguments):
        if name in constants or argument == 1:
            signature[name], values[(index,)] = "constexpr", argument
            continue
        if isinstance(argument, str):
            signature[name] = argument
            parameters.append(plugin.create_array_parameter(0, 16))
        else:
            signature[name] = "i32" if argument < 2**31 else "i64"
            parameters.append(plugin.create_scalar_parameter(argument, signature[name]))
        if isinstance(argument, str) or argument % 16 == 0:
            aligned[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, values, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )
    metadata, code = compiled.metadata, compiled.asm
    assert not metadata.global_scratch_size, "JAX's plugin gives kernels no scratch memory"
    call = plugin.TritonKernelCall(
        plugin.TritonKernel(
            metadata.name, metadata.num_warps, 1, metadata.shared, code["ptx"], str(code["ttir"]), capability
        ),
        *grid,
        *[1] * (3 - len(grid)),
        parameters,
    )
    return metadata.name, zlib.compress(call.to_proto(metadata.name, b""))


def _plugin() -> Any | None:
    """The part of JAX's CUDA plugin that builds a kernel's launch; on import it registers with XLA what executes it."""
    from jaxlib import gpu_triton

    return gpu_triton._cuda_triton


def device_of(array: Array) -> Any:
    """The device that ``array`` is on, or while JAX traces the one that it computes on by default."""
    if is_concrete(array):
        return next(iter(array.devices()))
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is None or isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default


def _gpu() -> tuple[int, int]:
    """The compute capability (90 for 9.0) of the CUDA devices, and how many processors one has."""
    device = jax.local_devices(backend="cuda")[0]
    return int(device.compute_capability.replace(".", "")), device.core_count
