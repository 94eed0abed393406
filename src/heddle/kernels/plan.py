"""Which tiles, grid and arguments each kernel gets. The wings launch what this module plans, and add nothing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import backward, decode, forward


class Tile(NamedTuple):
    """One kernel's tile: queries by keys, and how many warps and pipeline stages work on it."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


Table = dict[int, dict[str, dict[int, Tile]]]

#: Starting points by compute capability (the largest not above the device's), kernel, and padded head dim (up to).
TILES: Table = {
    80: {
        "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 2)},
        "backward_kv": {64: Tile(32, 128, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 1)},
        "backward_q": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
        "decode": {256: Tile(16, 64, 4, 3)},
    },
    90: {
        "forward": {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
        "backward_kv": {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(64, 32, 8, 2)},
        "backward_q": {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        "decode": {256: Tile(16, 64, 4, 3)},
    },
}


KERNELS = ("forward", "backward_kv", "backward_q", "decode")
_overrides: dict[str, Tile] = {}


def tile(kernel: str, dim: int, value_dim: int, itemsize: int, capability: int) -> Tile:
    """The tile for a kernel: that of :func:`override`, the tuned one, or TILES's starting point.

    float32 takes half the keys of the tables' (which are for two bytes), as its elements are twice as large.
    """
    if kernel in _overrides:
        return _overrides[kernel]
    width = padded(max(dim, value_dim))
    chosen = TUNED.get(capability, {}).get(kernel, {}).get(width)
    if chosen is None:
        table = TILES[max(c for c in TILES if c <= max(capability, min(TILES)))][kernel]
        chosen = table[min(d for d in table if d >= min(width, max(table)))]
    return chosen._replace(block_k=max(16, chosen.block_k // 2)) if itemsize == 4 else chosen


@contextmanager
def override(**tiles: Tile) -> Iterator[None]:
    """``with override(forward=Tile(64, 64, 4, 2)):`` takes these tiles for what runs, or is traced, inside.

    A backward takes the tiles that were chosen at its forward. For the whole process, not for one thread.

    Raises:
        ValueError: no such kernel, or a tile that can't be.
    """
    global _overrides
    for kernel, block in tiles.items():
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
        _check(kernel, block)
    before = _overrides
    _overrides = before | tiles
    try:
        yield
    finally:
        _overrides = before


def _check(kernel: str, block: Tile) -> None:
    sizes, warps = (block.block_q, block.block_k), block.num_warps
    if any(n < 16 or n & (n - 1) for n in sizes) or warps not in (1, 2, 4, 8, 16) or block.num_stages < 1:
        raise ValueError(
            f"the tile of {kernel} must be (block_q, block_k, num_warps, num_stages): powers of two from 16 on, "
            f"a power of two up to 16, and at least 1; got {tuple(block)}"
        )


def tuned_path() -> Path:
    """Where ``heddle bench tune`` writes: ``$HEDDLE_TILES``, by default ``heddle/tiles.json`` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HEDDLE_TILES") or Path(cache) / "heddle" / "tiles.json")


def read_tuned(path: Path) -> Table:
    """A table of tuned tiles: ``{"90": {"forward": {"128": [128, 128, 8, 2]}}}`` by capability, kernel, head dim.

    Raises:
        ValueError: a file that isn't such a table.
    """
    try:
        table = {
            int(capability): {
                kernel: {int(dim): Tile(*map(int, block)) for dim, block in by_dim.items()}
                for kernel, by_dim in kernels.items()
            }
            for capability, kernels in json.loads(path.read_text()).items()
        }
        for kernels in table.values():
            for kernel, by_dim in kernels.items():
                for block in by_dim.values():
                    _check(kernel, block)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a table of tiles as heddle bench tune writes it: {error}") from error
    return table


# Read when kernels are first planned, once: torch.compile could not follow a file being read.
TUNED: Table = read_tuned(tuned_path()) if tuned_path().is_file() else {}


def padded(dim: int) -> int:
    """The power of two a head dim is padded to inside a kernel: at least 16, the smallest matrix product."""
    return max(16, 1 << (dim - 1).bit_length())


@dataclass(frozen=True)
class Problem:
    """The shapes of one attention, with the strides in elements of query, key and value over (batch, seq, head)."""

    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    mask_rows: int
    prefix: int
    scale: float
    strides: tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]
    float32: bool = False

    def _constants(self, block: Tile) -> dict[str, Any]:
        return {
            "scale": self.scale * math.log2(math.e),
            "HEADS": self.heads,
            "GROUP": self.heads // self.kv_heads,
            "PREFIX": self.prefix,
            "DIM": self.dim,
            "VALUE_DIM": self.value_dim,
            "BLOCK_DIM": padded(self.dim),
            "BLOCK_VALUE_DIM": padded(self.value_dim),
            "BLOCK_K": block.block_k,
            # Full float32 products where float32 was asked for: TF32 keeps 10 bits of the mantissa.
            "PRECISION": "ieee" if self.float32 else "tf32",
        }

    def _integers(self, tiles: dict[str, int]) -> dict[str, int]:
        names = [f"{array}_{axis}" for array in "qkv" for axis in ("batch", "stride", "head")]
        strides = [stride for array in self.strides for stride in array]
        lengths = {"q_len": self.q_len, "kv_len": self.kv_len, "mask_rows": self.mask_rows}
        return {**lengths, **tiles, **dict(zip(names, strides, strict=True))}


class Launch(NamedTuple):
    """A kernel ready to go: arguments are the caller's inputs, outputs of these shapes, then integers and constants."""

    kernel: Any
    grid: tuple[int, ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]  # ("query" | "float32", whose dtype; shape)
    integers: dict[str, int]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def arguments(self, *arrays: Any) -> dict[str, Any]:
        """The kernel's arguments by name, in its own order; ``arrays`` are the inputs, then the outputs."""
        numbers = self.integers | self.constants
        left = iter(arrays)
        named = {name: numbers[name] if name in numbers else next(left) for name in self.kernel.arg_names}
        assert len(named) == len(arrays) + len(numbers), "arrays and numbers are not the kernel's"
        return named


def plan_forward(problem: Problem, block: Tile) -> Launch:
    """Inputs: q, k, v, start, stop, schedule (of the rows). Outputs: out, lse."""
    p, q_tiles = problem, _ceil(problem.q_len, block.block_q)
    return Launch(
        forward.forward,
        (q_tiles, p.heads, p.batch),
        (("query", (p.batch, p.q_len, p.heads, p.value_dim)), ("float32", (p.batch, p.q_len, p.heads))),
        p._integers({"q_tiles": q_tiles}),
        p._constants(block) | {"BLOCK_Q": block.block_q, "PREFIX_TILES": _prefix_tiles(p, block)},
        block.num_warps,
        block.num_stages,
    )


def plan_delta(problem: Problem) -> Launch:
    """Inputs: out, d_out, d_lse, contiguous. Output: rowsum(dO * O) - dlse."""
    p, rows, block = problem, problem.batch * problem.q_len * problem.heads, 64
    constants = {"VALUE_DIM": p.value_dim, "BLOCK_VALUE_DIM": padded(p.value_dim), "BLOCK_Q": block}
    outputs = (("float32", (p.batch, p.q_len, p.heads)),)
    return Launch(backward.delta, (_ceil(rows, block),), outputs, {"rows": rows}, constants, 4, 1)


def plan_backward_kv(problem: Problem, block: Tile) -> Launch:
    """Inputs: q, k, v, start, stop, schedule (of the columns), d_out, lse, delta."""
    p, k_tiles = problem, _ceil(problem.kv_len, block.block_k)
    return Launch(
        backward.backward_kv,
        (k_tiles, p.kv_heads, p.batch),
        (("query", (p.batch, p.kv_len, p.kv_heads, p.dim)), ("query", (p.batch, p.kv_len, p.kv_heads, p.value_dim))),
        p._integers({"k_tiles": k_tiles}),
        p._constants(block) | {"BLOCK_Q": block.block_q},
        block.num_warps,
        block.num_stages,
    )


def plan_backward_q(problem: Problem, block: Tile) -> Launch:
    """Inputs: as the forward's, then d_out, lse, delta. Output: d_q."""
    p, q_tiles = problem, _ceil(problem.q_len, block.block_q)
    return Launch(
        backward.backward_q,
        (q_tiles, p.heads, p.batch),
        (("query", (p.batch, p.q_len, p.heads, p.dim)),),
        p._integers({"q_tiles": q_tiles}),
        p._constants(block) | {"BLOCK_Q": block.block_q, "PREFIX_TILES": _prefix_tiles(p, block)},
        block.num_warps,
        block.num_stages,
    )


def plan_decode(problem: Problem, block: Tile, programs: int) -> tuple[Launch, Launch]:
    """Splits of the keys so that about ``programs`` run at once, then their merge.

    Inputs of the first: q, k, v, start, stop; of the second: the first's outputs. Outputs of the second: out, lse.
    """
    p = problem
    row_tiles = _ceil(p.q_len * (p.heads // p.kv_heads), block.block_q)
    wanted = max(1, programs // (row_tiles * p.kv_heads * p.batch))
    split = _ceil(_ceil(p.kv_len, wanted), block.block_k) * block.block_k
    splits, rows = _ceil(p.kv_len, split), p.batch * p.q_len * p.heads
    part = (splits, p.batch, p.q_len, p.heads)
    first = Launch(
        decode.decode,
        (splits, row_tiles * p.kv_heads, p.batch),
        (("float32", (*part, p.value_dim)), ("float32", part)),
        p._integers({"split": split}),
        p._constants(block) | {"BLOCK_ROWS": block.block_q},
        block.num_warps,
        block.num_stages,
    )
    second = Launch(
        decode.combine,
        (rows,),
        (("query", (p.batch, p.q_len, p.heads, p.value_dim)), ("float32", (p.batch, p.q_len, p.heads))),
        {"rows": rows, "splits": splits},
        {
            "BLOCK_SPLITS": max(2, 1 << (splits - 1).bit_length()),
            "VALUE_DIM": p.value_dim,
            "BLOCK_VALUE_DIM": padded(p.value_dim),
        },
        1,
        1,
    )
    return first, second


def _prefix_tiles(problem: Problem, block: Tile) -> int:
    return _ceil(min(problem.prefix, problem.kv_len), block.block_k)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
