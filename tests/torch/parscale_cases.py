"""A ParScale model under FSDP against one process. Not collected: test_parscale_training.py runs it under torchrun.

What must not come back: prefixes read by the root while their layers are still sharded, which with 4 replicas over 8
processes isn't even the wrong numbers but a shape that doesn't fit.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from tiny_models import SIZES, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from heddle.torch.parscale import Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM


def build(replicas: int) -> Qwen2ParScaleForCausalLM:
    torch.manual_seed(0)
    config = Qwen2ParScaleConfig(
        **SIZES | {"parscale_n": replicas, "parscale_n_tokens": 6, "enable_cross_attn": True, "num_hidden_layers": 2}
    )
    model = Qwen2ParScaleForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model.train()


def check(replicas: int, mesh) -> None:
    ids = torch.from_numpy(tokens(mesh.size(), 8)).long()
    alone = build(replicas)
    want = alone(ids, labels=ids).loss
    want.backward()
    rank, original = dist.get_rank(), build(replicas)
    for compiled in (False, True):
        model = copy.deepcopy(original)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        loss = run(ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss
        loss.backward()  # gradients are averaged over the processes, each has one row of the batch
        dist.all_reduce(loss.detach_(), dist.ReduceOp.SUM)
        torch.testing.assert_close(loss / mesh.size(), want.detach(), rtol=1e-5, atol=1e-6)
        for (name, got), parameter in zip(model.named_parameters(), alone.parameters()):
            bound = 1e-5 * float(parameter.grad.abs().max())
            torch.testing.assert_close(
                got.grad.full_tensor(), parameter.grad, rtol=0, atol=bound, msg=lambda m, name=name: f"{name}: {m}"
            )
        if rank == 0:
            print(f"same: {replicas} replicas, {'compiled' if compiled else 'eager'}", flush=True)
        torch._dynamo.reset()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for replicas in (4, 8):
        check(replicas, mesh)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
