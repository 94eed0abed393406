"""Which tiles, grid and arguments each kernel gets. The wings launch what this module plans, and add nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import backward, decode, forward


class Tile(NamedTuple):
    """One kernel's tile: queries by keys, and how many warps and pipeline stages work on it."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


#: Starting points by compute capability (the largest not above the device's), kernel, and padded head dim (up to).
TILES: dict[int, dict[str, dict[int, Tile]]] = {
    80: {
        "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 4, 2)},
        "backward_kv": {64: Tile(64, 128, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 1)},
        "backward_q": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
        "decode": {256: Tile(16, 64, 4, 3)},
    },
    90: {
        "forward": {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
        "backward_kv": {64: Tile(64, 128, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 64, 8, 2)},
        "backward_q": {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 2)},
        "decode": {256: Tile(16, 64, 4, 3)},
    },
}


def tile(kernel: str, dim: int, value_dim: int, itemsize: int, capability: int) -> Tile:
    """The table's tile for a kernel; float32 takes half the keys, as its elements are twice as large."""
    table = TILES[max(c for c in TILES if c <= max(capability, min(TILES)))][kernel]
    chosen = table[min(d for d in table if d >= min(padded(max(dim, value_dim)), max(table)))]
    return chosen._replace(block_k=max(16, chosen.block_k // 2)) if itemsize == 4 else chosen


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
            "MASK_ROWS": self.mask_rows,
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
        return {"q_len": self.q_len, "kv_len": self.kv_len, **tiles, **dict(zip(names, strides, strict=True))}


class Launch(NamedTuple):
    """A kernel ready to go: arguments are the caller's inputs, outputs of these shapes, then integers and constants."""

    kernel: Any
    grid: tuple[int, ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]  # ("query" | "float32", whose dtype; shape)
    integers: dict[str, int]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


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
        p._constants(block) | {"BLOCK_ROWS": block.block_q, "SPLITS": splits},
        block.num_warps,
        block.num_stages,
    )
    second = Launch(
        decode.combine,
        (rows,),
        (("query", (p.batch, p.q_len, p.heads, p.value_dim)), ("float32", (p.batch, p.q_len, p.heads))),
        {"rows": rows},
        {
            "SPLITS": splits,
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
