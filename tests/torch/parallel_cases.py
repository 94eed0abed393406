"""Context parallelism against one device. Not collected by name: test_parallel.py runs it under torchrun.

Every process has the whole problem, computes it alone, and compares its part of what the processes compute together.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from attention_cases import segments
from heddle import Mask, attend
from heddle.attention import balance
from heddle.torch.parallel import context_attend, shard, unshard

SEQ = 64
PACKED = segments(30, 5, 17, padding=12)
ROWS = np.concatenate([PACKED, segments(64), segments(9, 40, padding=15)])


@dataclasses.dataclass
class Case:
    name: str
    mask: Callable[[], Mask | None] = lambda: None
    order: Callable[[Mask, int], np.ndarray | None] = lambda mask, ranks: None
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    implementation: str | None = None


def zigzag(mask, ranks):
    return balance.zigzag(SEQ, ranks)


def by_area(mask, ranks):
    return balance.by_area(mask, ranks, chunk=4)


CASES = [
    Case("no mask"),
    Case("causal", lambda: Mask.causal(SEQ), zigzag),
    Case("packed documents and padding", lambda: Mask.documents(PACKED), by_area, batch=2),
    Case("documents differ by row", lambda: Mask.documents(ROWS), zigzag, batch=3, kv_heads=1),
    Case("torch mask, value dim", lambda: Mask.documents(torch.from_numpy(PACKED)), by_area, value_dim=24),
    Case("window", lambda: Mask.window(SEQ, 9), kv_heads=4, implementation="reference"),
    Case("short prefix and window", lambda: Mask.window(SEQ, 9, prefix=5), zigzag),
    Case("prefix of more than a part", lambda: Mask.window(SEQ, 9, prefix=35), by_area),
    Case("float64", lambda: Mask.documents(PACKED), zigzag, dtype=torch.float64),
]


def alike(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    tolerance = 1e-5 if got.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def check(case: Case, method: str, group) -> None:
    ranks = group.size()
    generator = torch.Generator().manual_seed(0)
    query, key, value, d_out = (
        torch.randn(case.batch, SEQ, heads, dim, generator=generator, dtype=case.dtype)
        for heads, dim in (
            (case.heads, 16), (case.kv_heads, 16), (case.kv_heads, case.value_dim), (case.heads, case.value_dim)
        )
    )  # fmt: skip
    mask = case.mask()
    seen = torch.ones(case.batch, SEQ, 1) if mask is None else mask.counts().reshape(-1, SEQ, 1)
    d_lse = torch.randn(case.batch, SEQ, case.heads, generator=generator, dtype=case.dtype) * (
        torch.as_tensor(seen) > 0
    )

    def whole():
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        out, lse = attend(*inputs, mask, scale=0.3, implementation="reference", return_lse=True)
        return out, lse, *torch.autograd.grad((out, lse), inputs, (d_out, d_lse))

    order = case.order(mask, ranks)
    query_part, d_out_part, d_lse_part = shard((query, d_out, d_lse), group, order)
    inputs = [x.clone().requires_grad_() for x in (query_part, *shard((key, value), group))]
    part = None if mask is None else shard(mask, group, order)
    out, lse = context_attend(
        *inputs, part, group, method, scale=0.3, implementation=case.implementation, return_lse=True
    )
    grads = torch.autograd.grad((out, lse), inputs, (d_out_part, d_lse_part))
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), whole()):
        by = None if name in ("dk", "dv") else order
        alike(got, shard(want, group, by), f"{case.name}, {method}, {name}")
        alike(unshard(got, group, by), want, f"{case.name}, {method}, whole {name}")


def refuses(function: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        function()


def check_refusals(mesh) -> None:
    rank = dist.get_rank()
    q = torch.zeros(1, 4, 2, 16)
    uneven = torch.zeros(1, 4 + rank, 2, 16)
    for method in ("all_gather", "ring"):
        refuses(partial(context_attend, q, uneven, uneven, Mask.full(4, 8), mesh, method), "key must have one length")
    refuses(lambda: context_attend(q, q, q, None, mesh, "rings"), "method must be 'all_gather' or 'ring', got 'rings'")
    refuses(lambda: shard(torch.zeros(1, 33), mesh), "must be a multiple of")
    refuses(lambda: shard(torch.zeros(1, 32), mesh, np.arange(16)), "order must have the 32 positions")
    square = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("data", "context"))
    refuses(lambda: context_attend(q, q, q, None, square), "group must be a mesh of one dimension")


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(8, 32, bias=False) for _ in range(3))
        self.back = torch.nn.Linear(32, 8)

    def forward(self, x, attention):
        heads = (project(x).unflatten(-1, (-1, 16)) for project in (self.query, self.key, self.value))
        return x + self.back(attention(*heads).flatten(2))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, x, attention):
        for block in self.blocks:
            x = block(x, attention)
        return x


def check_with_fsdp(method: str) -> None:
    """Sequences over one axis of the mesh, tokens of each over the other, parameters over both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    group, row = mesh["context"], mesh.get_local_rank("data")
    x = torch.randn(2, SEQ, 8, generator=torch.Generator().manual_seed(1))
    mask = Mask.documents(ROWS[::2])

    torch.manual_seed(0)
    alone = Model()
    alone(x, lambda q, k, v: attend(q, k, v, mask, implementation="reference")).square().sum().backward()

    torch.manual_seed(0)
    model = Model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    one = Mask(mask.start[row : row + 1], mask.stop[row : row + 1])
    part = shard(one, group)
    loss = model(
        shard(x[row : row + 1], group), lambda q, k, v: context_attend(q, k, v, part, group, method)
    ).square().sum()  # fmt: skip
    (4 * loss).backward()  # gradients are averaged over the four processes, the loss is a sum
    for got, want in zip(model.parameters(), alone.parameters()):
        bound = 1e-5 * float(want.grad.abs().max())
        torch.testing.assert_close(got.grad.full_tensor(), want.grad, rtol=0, atol=bound)


def check_with_tensor_parallel(method: str) -> None:
    """Tokens over one axis of the mesh, heads over the other, by torch's own column- and row-wise projections."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "tensor"))
    group = mesh["context"]
    x = torch.randn(1, SEQ, 8, generator=torch.Generator().manual_seed(1))
    mask = Mask.documents(ROWS[:1])

    torch.manual_seed(0)
    alone = Model()
    alone(x, lambda q, k, v: attend(q, k, v, mask, implementation="reference")).square().sum().backward()

    torch.manual_seed(0)
    model = Model()
    columns = dict.fromkeys(("query", "key", "value"), ColwiseParallel())
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], {**columns, "back": RowwiseParallel()})
    part = shard(mask, group)

    def attention(query, key, value):
        assert query.shape[2] == 1  # of the two heads
        return context_attend(query, key, value, part, group, method)

    model(shard(x, group), attention).square().sum().backward()
    for got, want in zip(model.parameters(), alone.parameters()):
        grad = got.grad.full_tensor()
        dist.all_reduce(grad, group=group.get_group())  # the loss is a sum over the tokens
        torch.testing.assert_close(grad, want.grad, rtol=0, atol=1e-5 * float(want.grad.abs().max()))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("context",))
    for case in CASES:
        for method in ("all_gather", "ring"):
            check(case, method, mesh)
    check_refusals(mesh)
    if ranks == 4:
        for method in ("all_gather", "ring"):
            check_with_fsdp(method)
            check_with_tensor_parallel(method)
    print("same", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
