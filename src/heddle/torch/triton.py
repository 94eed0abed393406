"""``triton``: the kernels of :mod:`heddle.kernels`, launched on torch tensors as differentiable operators."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from heddle.attention.mask import Mask
from heddle.attention.tiles import schedule

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  #: kernels run on CPU tensors, slowly, for tests
DECODE_ROWS = 16  #: query rows of a KV head, at most, that are served by splitting the keys
MAX_DIM = 256


def unsupported(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> str | None:
    if importlib.util.find_spec("triton") is None:
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


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scale: float,
    tiles: dict[str, tuple[int, int, int, int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by the Triton kernels: out ``(batch, q_len, heads, value_dim)`` and lse ``(batch, q_len, heads)``.

    ``tiles`` overrides the plan for ``forward``, ``backward_kv``, ``backward_q`` or ``decode``:
    ``(block_q, block_k, num_warps, num_stages)``. Results repeat bit for bit: no kernel uses atomics.
    """
    from heddle.kernels import plan

    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    start, stop = (bound.to(torch.int32).contiguous() for bound in (mask.start, mask.stop))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.shape[1] * (query.shape[2] // key.shape[2]) <= DECODE_ROWS and not needs_grad:
        block = _tile("decode", query, value, tiles)
        return _decode(query, key, value, start, stop, mask.prefix, scale, block)
    of = {name: plan.Tile(*_tile(name, query, value, tiles)) for name in ("forward", "backward_kv", "backward_q")}
    kv_len = key.shape[1]
    schedules = [
        schedule(mask.tiles(of["forward"].block_q, of["forward"].block_k, kv_len).rows),
        schedule(mask.tiles(of["backward_kv"].block_q, of["backward_kv"].block_k, kv_len).columns),
        schedule(mask.tiles(of["backward_q"].block_q, of["backward_q"].block_k, kv_len).rows),
    ]
    blocks = [number for block in of.values() for number in block]
    return _flash(query, key, value, start, stop, *schedules, mask.prefix, scale, blocks)


def _tile(kernel: str, query: Tensor, value: Tensor, overrides: dict[str, Any] | None) -> list[int]:
    from heddle.kernels import plan

    if overrides and kernel in overrides:
        return list(plan.Tile(*overrides[kernel]))
    capability = 10 * torch.cuda.get_device_capability(query.device)[0] if query.device.type == "cuda" else 80
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
    numbers = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    with torch.cuda.device_of(like):
        launch.kernel[launch.grid](*inputs, *outputs, **launch.integers, **launch.constants, **numbers)
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
    schema="(Tensor d_out, Tensor? d_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor start, "
    "Tensor stop, Tensor kv_schedule, Tensor q_schedule, int prefix, float scale, int[] blocks) "
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
