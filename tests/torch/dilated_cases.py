"""Dilated attention over processes against one. Not collected by name: test_dilated.py runs it under torchrun."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from heddle.torch.dilated import DilatedAttention, MultiheadDilatedAttention
from heddle.torch.dilated_distributed import DistributedDilatedAttention, DistributedMultiheadDilatedAttention
from heddle.torch.parallel import shard, unshard

SEQ = 64
#: By (segment_lengths, dilation_rates): local, over two, over all, of a length that fits no part, longer than all.
CASES = {
    "local": ((8, 16), (1, 2)),
    "two parts": ((8, 32), (1, 2)),
    "all parts": ((16, 64), (2, 4)),
    "rates that fit nothing": ((8, 32, 64), (1, 3, 5)),
    "lengths that fit nothing": ((6, 24, 100), (1, 2, 7)),
    "rows uncovered": ((32, 64), (4, 8)),
}


def alike(got, want, what):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10, msg=lambda m: f"{what}: {m}")


def check(name: str, is_causal: bool, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, d_out = (
        torch.randn(2, SEQ, heads, 8, generator=generator, dtype=torch.float64) for heads in (6, kv_heads, kv_heads, 6)
    )
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    out = DilatedAttention(*CASES[name])(*inputs, is_causal)
    want = out, *torch.autograd.grad(out, inputs, d_out)
    inputs = [x.clone().requires_grad_() for x in shard((query, key, value), dist.group.WORLD)]
    out = DistributedDilatedAttention(*CASES[name])(*inputs, is_causal)
    grads = torch.autograd.grad(out, inputs, shard(d_out, dist.group.WORLD))
    for which, got, whole in zip(("out", "dq", "dk", "dv"), (out, *grads), want):
        alike(unshard(got.detach(), dist.group.WORLD), whole, f"{name}, causal {is_causal}, {kv_heads}, {which}")


def check_multihead() -> None:
    lists = CASES["rates that fit nothing"]
    torch.manual_seed(0)
    alone = MultiheadDilatedAttention(48, 6, *lists[::-1], dtype=torch.float64)
    spread = DistributedMultiheadDilatedAttention(
        48, 6, lists[1], lists[0], dtype=torch.float64, group=dist.group.WORLD
    )
    spread.load_state_dict(alone.state_dict())
    x = torch.randn(2, SEQ, 48, dtype=torch.float64)
    out, _ = alone(x, x, x, is_causal=True)
    out.square().sum().backward()
    part = shard(x, dist.group.WORLD)
    got, _ = spread(part, part, part, is_causal=True)
    alike(unshard(got.detach(), dist.group.WORLD), out, "multihead")
    got.square().sum().backward()
    for mine, whole in zip(spread.parameters(), alone.parameters()):
        dist.all_reduce(mine.grad)
        alike(mine.grad, whole.grad, "parameters")
    with pytest.raises(NotImplementedError, match="documents and padding are not spread over processes"):
        spread(part, part, part, torch.zeros(part.shape[:2], dtype=torch.bool))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in CASES:
        for is_causal in (False, True):
            check(name, is_causal, 6)
        check(name, True, 2)
    check_multihead()
    print("same", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
