"""Dilated attention over processes against one. Not collected by name: test_dilated.py runs it under torchrun."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from heddle.torch.dilated import DilatedAttention, ImprovedMultiheadDilatedAttention, MultiheadDilatedAttention
from heddle.torch.dilated_distributed import DistributedDilatedAttention, DistributedMultiheadDilatedAttention
from heddle.torch.dilated_layers import FeedForward
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


IDS = torch.tensor([[0] * 9 + [1] * 38 + [-1] * 3 + [2] * 14, [4] * 20 + [5] * 1 + [7] * 43])
PADDING = torch.zeros(2, SEQ, dtype=torch.bool)
PADDING[0, :18] = PADDING[1, 30:50] = PADDING[1, 60:] = True  # whole parts of four, and holes in documents
TOKENS = {
    "documents": {"segment_ids": IDS},
    "padding": {"key_padding_mask": PADDING},
    "both": {"segment_ids": IDS, "key_padding_mask": PADDING},
}


def check(name: str, is_causal: bool, kv_heads: int, tokens: str | None = None) -> None:
    told = TOKENS.get(tokens, {})
    mine = {what: shard(x, dist.group.WORLD) for what, x in told.items()}
    generator = torch.Generator().manual_seed(0)
    query, key, value, d_out = (
        torch.randn(2, SEQ, heads, 8, generator=generator, dtype=torch.float64) for heads in (6, kv_heads, kv_heads, 6)
    )
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    out = DilatedAttention(*CASES[name])(*inputs, is_causal, **told)
    want = out, *torch.autograd.grad(out, inputs, d_out)
    inputs = [x.clone().requires_grad_() for x in shard((query, key, value), dist.group.WORLD)]
    out = DistributedDilatedAttention(*CASES[name])(*inputs, is_causal, **mine)
    grads = torch.autograd.grad(out, inputs, shard(d_out, dist.group.WORLD))
    for which, got, whole in zip(("out", "dq", "dk", "dv"), (out, *grads), want):
        alike(
            unshard(got.detach(), dist.group.WORLD), whole, f"{name}, causal {is_causal}, {kv_heads}, {tokens}, {which}"
        )


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


class Layer(nn.Module):
    """A LongNet layer whose attention is spread, in its own FSDP unit."""

    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        lists = CASES["rates that fit nothing"]
        self.norm = nn.LayerNorm(48)
        self.attention = kind(48, 6, lists[1], lists[0], **options)
        self.feed_forward = FeedForward(48, 96, 0.0, "gelu", 1e-5, 1.0, {})

    def forward(self, x, **tokens):
        y = self.norm(x)
        x = x + self.attention(y, y, y, is_causal=True, **tokens)[0]
        return x + self.feed_forward(x)


def check_fully_sharded() -> None:
    """Parameters sharded by FSDP2 over the same processes that the sequence is spread over."""
    alone = nn.ModuleList(Layer(ImprovedMultiheadDilatedAttention) for _ in range(2))
    spread = nn.ModuleList(Layer(DistributedMultiheadDilatedAttention) for _ in range(2))
    spread.load_state_dict(alone.state_dict())
    names = [name for name, _ in spread.named_parameters()]
    for layer in spread:
        fully_shard(layer)
    x, goal = torch.randn(2, 2, SEQ, 48, generator=torch.Generator().manual_seed(1))
    part, aim, ids = shard((x, goal, IDS), dist.group.WORLD)
    out = x
    for layer in alone:
        out = layer(out, segment_ids=IDS)
    real, here = (i >= 0 for i in (IDS, ids))
    loss = (out - goal)[real].square().sum()
    loss.backward()
    for layer in spread:
        part = layer(part, segment_ids=ids)
    mine = (part - aim)[here].square().sum()
    (mine * dist.get_world_size()).backward()  # sharding averages gradients over the processes
    total = mine.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, loss.detach(), rtol=1e-5, atol=1e-5)
    for name, mine, whole in zip(names, spread.parameters(), alone.parameters()):
        got = mine.grad.full_tensor()
        torch.testing.assert_close(got, whole.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in CASES:
        for is_causal in (False, True):
            check(name, is_causal, 6)
        check(name, True, 2)
        check(name, False, 6, "documents")
        for tokens in TOKENS:
            check(name, True, 2, tokens)
    check_multihead()
    check_fully_sharded()
    print("same", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
