"""Context parallelism as a contender of ``heddle bench attention``: processes that wait for their turn.

In torch one process a rank; in JAX one process with as many devices. Accelerators where there are enough, else the CPU,
whose cores the ranks share. A step is from the word to the ranks until the last of them is done.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from heddle.attention import balance
from heddle.mask_options import BALANCES, rank_order

from .attention_peers import Contender, Problem, Step
from .timing import cores

METHODS = ("all_gather", "ring")


def contenders(frameworks: Sequence[str], ranks: int) -> dict[str, Contender]:
    """Each method with each balance, by name."""
    return {
        f"{framework} ×{ranks} {method} {balanced}": Contender(
            framework,  # type: ignore[arg-type]
            functools.partial(_unsupported, ranks=ranks, balanced=balanced),
            functools.partial(_prepare, framework=framework, ranks=ranks, method=method, balanced=balanced),
        )
        for framework in frameworks
        for method in METHODS
        for balanced in BALANCES
    }


def areas(problem: Problem, ranks: int) -> dict[str, float]:
    """By balance: the largest rank's visible pairs as a multiple of the mean; where the length can be dealt so."""
    return {
        balanced: float(balance.areas(problem.mask, rank_order(problem.mask, ranks, balanced), ranks).max())
        for balanced in BALANCES
        if _unsupported(problem, ranks, balanced) is None
    }


def _unsupported(problem: Problem, ranks: int, balanced: str) -> str | None:
    parts = 2 * ranks if balanced == "zigzag" else ranks
    return f"{problem.seq} tokens are no multiple of {parts}" if problem.seq % parts else None


def _prepare(problem: Problem, *, framework: str, ranks: int, method: str, balanced: str) -> Step:
    workers = _workers(problem, framework, ranks)
    return lambda index: workers.run((method, balanced, index))


class _Result:
    """The output of a step, fetched from the ranks when somebody looks at it."""

    def __init__(self, workers: _Workers, turn: tuple[str, str, int]):
        self.workers, self.turn = workers, turn

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        method, balanced, index = self.turn
        out = np.concatenate(self.workers.ask((method, balanced, index, True)), axis=1)
        order = rank_order(self.workers.problem.mask, self.workers.ranks, balanced)
        return balance.unpermute(out, order).astype(dtype or out.dtype)


class _Workers:
    """The processes of one problem in one framework; they end with the last reference to them."""

    def __init__(self, problem: Problem, framework: str, ranks: int):
        self.problem, self.ranks = problem, ranks
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        processes = ranks if framework == "torch" else 1
        for rank in range(processes):
            ours, theirs = context.Pipe()
            target, arguments = (
                (_torch_rank, (rank, str(Path(folder) / "ranks"))) if processes > 1 else (_jax_ranks, ())
            )
            context.Process(target=target, args=(theirs, problem, ranks, *arguments), daemon=True).start()
            theirs.close()  # or the end of a process would go unseen
            self.pipes.append(ours)

    def run(self, turn: tuple[str, str, int]) -> _Result:
        self.ask((*turn, False))
        return _Result(self, turn)

    def ask(self, turn: tuple[str, str, int, bool]) -> list[Any]:
        try:
            for pipe in self.pipes:
                pipe.send(turn)
            answers = [pipe.recv() for pipe in self.pipes]
        except (EOFError, OSError) as error:
            raise ChildProcessError("a rank of --context-parallel ended; its error stands above") from error
        return answers


@functools.lru_cache(maxsize=2)  # a problem's, in both frameworks
def _workers(problem: Problem, framework: str, ranks: int) -> _Workers:
    return _Workers(problem, framework, ranks)


def _serve(pipe: Connection, step: Callable[[str, str, int], Any], numpy: Callable[[Any], np.ndarray]) -> None:
    while True:
        try:
            method, balanced, index, wanted = pipe.recv()
        except EOFError:
            return
        out = step(method, balanced, index)
        pipe.send(numpy(out) if wanted else None)


def _torch_rank(pipe: Connection, problem: Problem, ranks: int, rank: int, rendezvous: str) -> None:
    import torch
    import torch.distributed as dist

    from heddle.torch.parallel import context_attend, shard

    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, cores() // ranks))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks
    )
    group = dist.group.WORLD
    assert group is not None
    like = torch.empty(0, device=device)

    @functools.cache
    def prepared(balanced: str) -> tuple[Any, list[list[Any]]]:
        order = rank_order(problem.mask, ranks, balanced)
        sets = []
        for i in range(problem.sets):
            arrays = (torch.from_numpy(a).to(device, getattr(torch, problem.dtype)) for a in problem.arrays(i))
            orders = (order, None, None, order)
            sets.append([shard(a, group, o).contiguous() for a, o in zip(arrays, orders, strict=True)])
            for x in sets[-1][:3]:
                x.requires_grad_(problem.backward)
        return shard(problem.mask.on(like), group, order), sets

    def step(method: str, balanced: str, index: int) -> Any:
        mask, sets = prepared(balanced)
        *inputs, cotangent = sets[index % len(sets)]
        out = context_attend(*inputs, mask, group, method)  # type: ignore[call-overload]
        if problem.backward:
            torch.autograd.grad(out, inputs, cotangent)
        if on_gpu:
            torch.cuda.synchronize()
        return out.detach()

    _serve(pipe, step, lambda out: out.float().cpu().numpy())
    dist.destroy_process_group()


def _jax_ranks(pipe: Connection, problem: Problem, ranks: int) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={ranks}"
    import jax
    import jax.numpy as jnp

    from heddle.jax.parallel import context_attend, shard

    devices = jax.devices() if len(jax.devices()) >= ranks else jax.devices("cpu")
    mesh = jax.sharding.Mesh(np.asarray(devices[:ranks]), ("context",))

    @functools.cache
    def prepared(method: str, balanced: str) -> tuple[Any, Any, list[list[Any]]]:
        order = rank_order(problem.mask, ranks, balanced)
        with jax.default_device(devices[0]):
            mask = shard(problem.mask.on(jnp.empty(0)), "context", order, mesh=mesh)
            sets = [
                [
                    shard(jnp.asarray(a, problem.dtype), "context", o, mesh=mesh)
                    for a, o in zip(problem.arrays(i), (order, None, None, order), strict=True)
                ]
                for i in range(problem.sets)
            ]

        @jax.jit
        def whole(q: Any, k: Any, v: Any, cotangent: Any, mask: Any) -> Any:
            def function(q: Any, k: Any, v: Any) -> Any:
                return context_attend(q, k, v, mask, "context", method, mesh=mesh)  # type: ignore[call-overload]

            if not problem.backward:
                return function(q, k, v), ()
            out, pull_back = jax.vjp(function, q, k, v)
            return out, pull_back(cotangent)

        return whole, mask, sets

    def step(method: str, balanced: str, index: int) -> Any:
        whole, mask, sets = prepared(method, balanced)
        return jax.block_until_ready(whole(*sets[index % len(sets)], mask))[0]

    _serve(pipe, step, lambda out: np.asarray(out, dtype=np.float32))
