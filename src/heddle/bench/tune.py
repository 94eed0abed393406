"""``heddle bench tune``: times candidate tiles of each Triton kernel on this CUDA device and writes the best down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from heddle.attention import Mask

from .options import counts
from .timing import Timing, interleave

SIZES = {
    "forward": ((64, 128), (32, 64, 128)),
    "backward_kv": ((32, 64, 128), (32, 64, 128)),
    "backward_q": ((64, 128), (32, 64, 128)),
    "decode": ((16,), (32, 64, 128)),
}
WORKERS = [(4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (8, 3)]  #: warps and pipeline stages


def candidates(kernel: str) -> list[Any]:
    """The tiles to try, in order of size."""
    from heddle.kernels.plan import Tile

    queries, keys = SIZES[kernel]
    return [Tile(q, k, *workers) for q in queries for k in keys for workers in WORKERS]


def best(timings: dict[Any, Timing]) -> Any:
    """The tile of the lowest median; of equals the first, which is the smallest."""
    return min(timings, key=lambda tile: timings[tile].median)


def tune(
    dims: list[int],
    seq: int = 8192,
    heads: int = 16,
    kv_heads: int = 4,
    repeats: int = 10,
    tell: Callable[[str], object] = lambda message: None,
) -> dict[str, dict[str, list[int]]]:
    """For each kernel and head dim the fastest tile, in bfloat16 on eight packed documents.

    Raises:
        NotImplementedError: no CUDA device.
    """
    import torch

    from heddle.kernels import plan

    if not torch.cuda.is_available():
        raise NotImplementedError("bench tune times kernels on a CUDA device, and torch finds none here")
    table: dict[str, dict[str, list[int]]] = {kernel: {} for kernel in plan.KERNELS}
    for dim in dims:
        for kernel in plan.KERNELS:
            steps = {}
            for tile in candidates(kernel):
                tell(f"compiling {kernel} of head dim {dim} with {tuple(tile)}")
                step = _step(kernel, tile, dim, seq, heads, kv_heads)
                try:
                    step(0)
                except Exception as error:  # Triton's and CUDA's own: too much shared memory, too many registers
                    tell(f"{kernel} of head dim {dim} does not run with {tuple(tile)}: {error}")
                else:
                    steps[tile] = step
            if steps:
                timings = interleave(steps, repeats, tell=tell)
                table[kernel][str(plan.padded(dim))] = list(best(timings))
    return table


def _step(kernel: str, tile: Any, dim: int, seq: int, heads: int, kv_heads: int) -> Callable[[int], object]:
    """Runs the kernel once with ``tile`` and waits for it; a backward's tile is timed in a whole backward."""
    import torch

    from heddle import attend
    from heddle.kernels import plan
    from heddle.torch.triton import flash_backward

    generator = torch.Generator("cuda").manual_seed(0)

    def normal(length: int, n: int) -> torch.Tensor:
        return torch.randn(1, length, n, dim, device="cuda", dtype=torch.bfloat16, generator=generator)

    query, key, value = normal(1 if kernel == "decode" else seq, heads), normal(seq, kv_heads), normal(seq, kv_heads)
    cuts = np.sort(np.random.default_rng(0).choice(np.arange(1, seq), 7, replace=False))
    segments = np.searchsorted(cuts, np.arange(seq), side="right")[None].astype(np.int32)
    mask = (Mask.full(1, seq) if kernel == "decode" else Mask.documents(segments)).on(query)
    scale = dim**-0.5

    def forward() -> Any:
        return attend(query, key, value, mask, implementation="triton", return_lse=True)

    if kernel in ("forward", "decode"):
        run = forward
    else:
        out, lse = forward()

        def run() -> Any:
            return flash_backward(query, key, value, mask, scale, out, lse, out, None)

    def step(_: int) -> None:
        with plan.override(**{kernel: tile}):
            run()
        torch.cuda.synchronize()

    return step


def run(head_dim: str, repeats: int, tiles: str | None) -> Path:
    """Tune and write the table where the kernels' plan reads it, beside what stands there for other devices.

    Raises:
        ValueError: options that can't be, by the option's name.
        NotImplementedError: no CUDA device.
    """
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}")
    dims = counts("head-dim", head_dim)
    if dims[-1] > 256:
        raise ValueError(f"--head-dim must be at most 256, got {head_dim}")
    import torch

    from heddle.kernels import plan

    path = Path(tiles) if tiles else plan.tuned_path()
    console = Console(stderr=True)
    with console.status("") as status:
        found = tune(dims, repeats=repeats, tell=lambda message: status.update(message))
    capability = str(10 * torch.cuda.get_device_capability()[0])
    held = json.loads(path.read_text()) if path.is_file() else {}
    for kernel, by_dim in found.items():
        held.setdefault(capability, {}).setdefault(kernel, {}).update(by_dim)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held, indent=1) + "\n")
    table = Table(title=f"{torch.cuda.get_device_name()}, sm_{capability}", box=box.SIMPLE)
    for column in ("kernel", "head dim", "queries", "keys", "warps", "stages"):
        table.add_column(column)
    for kernel, by_dim in found.items():
        for dim, tile in by_dim.items():
            table.add_row(kernel, dim, *map(str, tile))
    Console().print(table, f"written to {path}")
    return path
