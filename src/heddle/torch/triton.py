"""``triton``: the kernels of :mod:`heddle.kernels`, launched on torch tensors as differentiable operators."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from heddle.attention.mask import Mask
from heddle.attention.tiles import schedule

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  #: kernels run on CPU tensors, slowly, for tests
DECODE_ROWS = 16  #: query rows of a KV head, at most, that are served by splitting the keys
MAX_DIM = 256


def unsupported(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> str | None:
    if not INSTALLED:
        return "the triton package is not installed"
    device, dtype = query.device.type, query.dtype
    if device != "cuda" and not INTERPRETED:
        return f"its kernels run on CUDA, the arrays are on {device} (for tests, TRITON_INTERPRET=1 interprets them)"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels take float32, bfloat16 and float16, not {dtype}"
    if INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    largest = max(query.shape[3], value.shape[3])
    if largest > MAX_DIM:
        return f"its kernels take head dimensions up to {MAX_DIM}, got {largest}"
    return None


def flash(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Attention by the Triton kernels, tiles by :mod:`heddle.kernels.plan`. No atomics: results repeat bit for bit."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    start, stop = _bounds(mask)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.shape[1] * (query.shape[2] // key.shape[2]) <= DECODE_ROWS and not needs_grad:
        return _decode(query, key, value, start, stop, mask.prefix, scale, _tile("decode", query, value))
    tiles = [_tile(name, query, value) for name in ("forward", "backward_kv", "backward_q")]
    schedules = _schedules(mask, tiles, key.shape[1])
    return _flash(query, key, value, start, stop, *schedules, mask.prefix, scale, [n for tile in tiles for n in tile])


def flash_backward(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float,
    out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv; out and lse may be over more keys than these."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    tiles = [_tile(name, query, value) for name in ("forward", "backward_kv", "backward_q")]
    _, *schedules = _schedules(mask, tiles, key.shape[1])
    numbers = [n for tile in tiles for n in tile]
    arrays = (query, key, value, out.contiguous(), lse.contiguous(), *_bounds(mask), *schedules)
    return _flash_backward(d_out, d_lse, *arrays, mask.prefix, scale, numbers)


def _bounds(mask: Mask) -> tuple[Tensor, Tensor]:
    return tuple(bound.to(torch.int32).contiguous() for bound in (mask.start, mask.stop))  # type: ignore[return-value]


def _schedules(mask: Mask, tiles: list[list[int]], kv_len: int) -> list[Tensor]:
    """What the forward, dK/dV and dQ kernels visit, shared by the layers."""
    sizes = tuple((block_q, block_k) for block_q, block_k, *_ in tiles)

    def compute() -> list[Tensor]:
        forward, backward_kv, backward_q = (mask.tiles(*size, kv_len) for size in sizes)
        return [schedule(forward.rows), schedule(backward_kv.columns), schedule(backward_q.rows)]

    return mask.keep(("schedules", sizes, kv_len), compute, lambda schedules: schedules[0])


@torch.compiler.assume_constant_result
def _capability(index: int) -> int:
    return 10 * torch.cuda.get_device_capability(index)[0]


def _tile(kernel: str, query: Tensor, value: Tensor) -> list[int]:
    from heddle.kernels import plan

    device = query.device
    capability = _capability(device.index) if device.type == "cuda" else min(plan.TILES)
    return list(plan.tile(kernel, query.shape[3], value.shape[3], query.element_size(), capability))


def _problem(query: Tensor, key: Tensor, value: Tensor, start: Tensor, prefix: int, scale: float):
    from heddle.kernels import plan

    return plan.Problem(
        batch=query.shape[0],
        q_len=query.shape[1],
        kv_len=key.shape[1],
        heads=query.shape[2],
        kv_heads=key.shape[2],
        dim=query.shape[3],
        value_dim=value.shape[3],
        mask_rows=start.shape[0],
        prefix=min(prefix, key.shape[1]),
        scale=scale,
        strides=tuple(x.stride()[:3] for x in (query, key, value)),  # type: ignore[arg-type]
        float32=query.dtype == torch.float32,
    )


def _launch(launch: Any, dtype: torch.dtype, *inputs: Tensor) -> list[Tensor]:
    like, dtypes = inputs[0], {"query": dtype, "float32": torch.float32}
    outputs = [torch.empty(shape, dtype=dtypes[kind], device=like.device) for kind, shape in launch.outputs]
    numbers = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    with torch.cuda.device_of(like):
        launch.kernel[launch.grid](**launch.arguments(*inputs, *outputs), **numbers)
    return outputs


# ---------------------------------------------------------------- the operators; schemas are spelled out, as inference
# from annotations fails where a decorator (the tests' shape checks) wraps them


@torch.library.custom_op(
    "heddle::flash",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor start, Tensor stop, Tensor forward_schedule, "
    "Tensor kv_schedule, Tensor q_schedule, int prefix, float scale, int[] blocks) -> (Tensor, Tensor)",
)
def _flash(query, key, value, start, stop, forward_schedule, kv_schedule, q_schedule, prefix, scale, blocks):
    from heddle.kernels import plan

    problem = _problem(query, key, value, start, prefix, scale)
    launch = plan.plan_forward(problem, plan.Tile(*blocks[:4]))
    out, lse = _launch(launch, query.dtype, query, key, value, start, stop, forward_schedule)
    return out, lse


@_flash.register_fake
def _(query, key, value, start, stop, forward_schedule, kv_schedule, q_schedule, prefix, scale, blocks):
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "heddle::flash_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor? d_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor start, Tensor stop, Tensor kv_schedule, Tensor q_schedule, int prefix, float scale, int[] blocks) "
    "-> (Tensor, Tensor, Tensor)",
)
def _flash_backward(
    d_out, d_lse, query, key, value, out, lse, start, stop, kv_schedule, q_schedule, prefix, scale, blocks
):
    from heddle.kernels import plan

    problem = _problem(query, key, value, start, prefix, scale)
    d_out = d_out.contiguous()
    d_lse = torch.zeros_like(lse) if d_lse is None else d_lse.contiguous()
    (delta,) = _launch(plan.plan_delta(problem), out.dtype, out, d_out, d_lse)
    inputs = (query, key, value, start, stop)
    d_k, d_v = _launch(
        plan.plan_backward_kv(problem, plan.Tile(*blocks[4:8])), query.dtype, *inputs, kv_schedule, d_out, lse, delta
    )
    (d_q,) = _launch(
        plan.plan_backward_q(problem, plan.Tile(*blocks[8:])), query.dtype, *inputs, q_schedule, d_out, lse, delta
    )
    return d_q, d_k, d_v


@_flash_backward.register_fake
def _(d_out, d_lse, query, key, value, out, lse, start, stop, kv_schedule, q_schedule, prefix, scale, blocks):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))


def _save(ctx, inputs, output):
    query, key, value, start, stop, _, kv_schedule, q_schedule, ctx.prefix, ctx.scale, ctx.blocks = inputs
    ctx.save_for_backward(query, key, value, start, stop, kv_schedule, q_schedule, *output)
    ctx.set_materialize_grads(False)  # so that no gradient of lse has to be read where there is none


def _differentiate(ctx, d_out, d_lse):
    query, key, value, start, stop, kv_schedule, q_schedule, out, lse = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    grads = _flash_backward(
        d_out,
        d_lse,
        query,
        key,
        value,
        out,
        lse,
        start,
        stop,
        kv_schedule,
        q_schedule,
        ctx.prefix,
        ctx.scale,
        ctx.blocks,
    )
    return *grads, *[None] * 8


_flash.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op(
    "heddle::flash_decode",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor start, Tensor stop, int prefix, float scale, int[] block) "
    "-> (Tensor, Tensor)",
)
def _decode(query, key, value, start, stop, prefix, scale, block):
    from heddle.kernels import plan

    problem = _problem(query, key, value, start, prefix, scale)
    cuda = query.device.type == "cuda"
    programs = 2 * torch.cuda.get_device_properties(query.device).multi_processor_count if cuda else 4
    split, combine = plan.plan_decode(problem, plan.Tile(*block), programs)
    parts = _launch(split, query.dtype, query, key, value, start, stop)
    out, lse = _launch(combine, query.dtype, *parts)
    return out, lse


@_decode.register_fake
def _(query, key, value, start, stop, prefix, scale, block):
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)
