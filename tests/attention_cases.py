"""The cases every implementation of ``attend`` passes, and the float64 oracle they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from heddle import Mask, attend
from heddle.attention import balance


def segments(*lengths: int, padding: int = 0, ids=None) -> np.ndarray:
    """``(1, sum)`` segment ids of documents of these lengths, then ``padding`` tokens of padding."""
    ids = range(len(lengths)) if ids is None else ids
    return np.concatenate([np.repeat(list(ids), lengths), np.full(padding, -1)])[None].astype(np.int32)


def random_intervals(q_len: int, kv_len: int, prefix: int = 0, seed: int = 0, rows: int = 1) -> Mask:
    rng = np.random.default_rng(seed)
    start = rng.integers(0, kv_len, (rows, q_len))
    return Mask(start, start + rng.integers(0, kv_len // 2, (rows, q_len)), prefix)


@dataclass(frozen=True)
class Case:
    name: str
    q_len: int
    kv_len: int
    mask: Callable[[], Mask | None] = lambda: None
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    dim: int = 16
    value_dim: int | None = None
    scale: float | None = None

    def arrays(self, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
        """query, key, value, and the cotangents of out and lse."""
        rng = np.random.default_rng(seed)
        v_dim = self.value_dim or self.dim
        shapes = {
            "query": (self.batch, self.q_len, self.heads, self.dim),
            "key": (self.batch, self.kv_len, self.kv_heads, self.dim),
            "value": (self.batch, self.kv_len, self.kv_heads, v_dim),
            "d_out": (self.batch, self.q_len, self.heads, v_dim),
            "d_lse": (self.batch, self.q_len, self.heads),
        }
        return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def oracle(case: Case, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """out, lse, dq, dk, dv in float64, the gradients by the textbook formulas on dense matrices."""
    a = {name: array.astype(np.float64) for name, array in arrays.items()}
    q, k, v = a["query"], a["key"], a["value"]
    group = case.heads // case.kv_heads
    scale = case.dim**-0.5 if case.scale is None else case.scale
    mask = case.mask() or Mask.full(case.q_len, case.kv_len)
    out, lse = attend(q, k, v, mask, scale=scale, implementation="reference", return_lse=True)
    k_h, v_h = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    seen = np.broadcast_to(mask.dense(case.kv_len), (case.batch, case.q_len, case.kv_len))[:, None]
    scores = np.einsum("bqhd,bkhd->bhqk", q, k_h) * scale
    finite_lse = np.where(np.isfinite(lse), lse, 0.0).transpose(0, 2, 1)[..., None]
    p = np.exp(np.where(seen, scores - finite_lse, -np.inf))
    d_p = np.einsum("bqhd,bkhd->bhqk", a["d_out"], v_h)
    delta = np.einsum("bqhd,bqhd->bhq", a["d_out"], out)[..., None]
    d_s = p * (d_p - delta + a["d_lse"].transpose(0, 2, 1)[..., None]) * scale

    def sum_group(d):
        return d.reshape(*d.shape[:2], case.kv_heads, group, d.shape[-1]).sum(3)

    return {
        "out": out,
        "lse": lse,
        "dq": np.einsum("bhqk,bkhd->bqhd", d_s, k_h),
        "dk": sum_group(np.einsum("bhqk,bqhd->bkhd", d_s, q)),
        "dv": sum_group(np.einsum("bhqk,bqhd->bkhd", p, a["d_out"])),
    }


def _permuted() -> Mask:
    rows = np.concatenate([np.arange(48, 64), np.arange(0, 16)])
    return Mask.documents(segments(20, 30, 14)).take(rows)


def _ragged(q_len: int, *lengths: int) -> Mask:
    return Mask.lengths(np.array(lengths, np.int32), q_len)


def _both_ways() -> Mask:
    return Mask.documents(segments(31, 14, 20, padding=10), causal=False)


def _chunk() -> Mask:
    return Mask.documents(segments(20, 50, 26)).take(np.arange(40, 70))


def _rank(rank: int, ranks: int, area: bool = False) -> Mask:
    mask = Mask.documents(segments(40, 33, 15, padding=8))
    order = balance.by_area(mask, ranks, chunk=8) if area else balance.zigzag(96, ranks)
    return mask.take(np.split(order, ranks)[rank])


def _gaps(q_len: int, prefix: int = 0) -> Mask:
    """Every third query sees nothing, and the last twenty."""
    mask = Mask.window(q_len, 10, prefix=prefix)
    sees = (np.arange(q_len) % 3 > 0) & (np.arange(q_len) < q_len - 20)
    return Mask(np.asarray(mask.start), np.where(sees, mask.stop, 0), prefix)


CASES = [
    Case("one query one key", 1, 1),
    Case("full", 33, 33),
    Case("full cross", 17, 45, batch=2),
    Case("causal", 64, 64, lambda: Mask.causal(64, 64)),
    Case("causal odd length", 131, 131, lambda: Mask.causal(131, 131)),
    Case("causal long", 300, 300, lambda: Mask.causal(300, 300), heads=4, kv_heads=2),
    Case("causal offset", 20, 70, lambda: Mask.causal(20, 70, 50)),
    Case("causal negative offset has empty rows", 24, 24, lambda: Mask.causal(24, 24, -7)),
    Case("more queries than keys", 50, 20, lambda: Mask.causal(50, 20)),
    Case("decode", 1, 77, lambda: _ragged(1, 77, 1, 40), batch=3, heads=6, kv_heads=2),
    Case("decode of an empty sequence", 1, 30, lambda: _ragged(1, 0, 30), batch=2),
    Case("right padded", 40, 40, lambda: _ragged(40, 40, 3, 17), batch=3),
    Case("chunk of a ragged prefill", 16, 60, lambda: _ragged(16, 60, 20), batch=2, heads=4, kv_heads=1),
    Case("window", 100, 100, lambda: Mask.window(100, 13)),
    Case("window of one", 30, 30, lambda: Mask.window(30, 1)),
    Case("window wider than the sequence", 40, 40, lambda: Mask.window(40, 64)),
    Case("window both ways", 90, 90, lambda: Mask.window(90, 9, causal=False)),
    Case("window with sinks", 120, 120, lambda: Mask.window(120, 16, prefix=4)),
    Case("two documents", 64, 64, lambda: Mask.documents(segments(30, 34))),
    Case("documents not in order", 90, 90, lambda: Mask.documents(segments(41, 5, 44, ids=(1000, 3, 7)))),
    Case("documents of one token", 12, 12, lambda: Mask.documents(segments(*[1] * 12))),
    Case("twelve documents", 200, 200, lambda: Mask.documents(segments(*range(5, 29, 2), padding=8)), heads=4),
    Case("documents both ways", 64, 64, lambda: Mask.documents(segments(30, 34), causal=False)),
    Case("documents and padding", 70, 70, lambda: Mask.documents(segments(33, 20, padding=17))),
    Case(
        "documents differ by row",
        50,
        50,
        lambda: Mask.documents(np.concatenate([segments(20, 30), segments(50), segments(7, 3, 33, padding=7)])),
        batch=3,
        heads=4,
        kv_heads=2,
    ),
    Case("documents and window", 80, 80, lambda: Mask.documents(segments(50, 30)) & Mask.window(80, 11)),
    Case("all padding", 20, 20, lambda: Mask.documents(segments(padding=20))),
    Case("permuted queries", 32, 64, _permuted),
    Case(
        "prefix language model",
        60,
        60,
        lambda: Mask(np.zeros((1, 60), np.int32), np.maximum(np.arange(60) + 1, 25)[None]),
    ),
    Case("learned prefix", 40, 48, lambda: Mask(np.full((1, 40), 8), (np.arange(40) + 9)[None], prefix=8)),
    Case("prefix and window", 70, 80, lambda: Mask(np.arange(70)[None] + 3, np.arange(70)[None] + 11, prefix=10)),
    Case("chunked local", 64, 64, lambda: Mask((np.arange(64) // 16 * 16)[None], np.arange(1, 65)[None])),
    Case("random intervals", 75, 90, lambda: random_intervals(75, 90, rows=2), batch=2),
    Case("random intervals and prefix", 75, 90, lambda: random_intervals(75, 90, prefix=7, seed=1)),
    Case("multi-query", 65, 65, lambda: Mask.causal(65, 65), heads=8, kv_heads=1),
    Case("grouped-query documents", 96, 96, lambda: Mask.documents(segments(40, 56)), batch=2, heads=6, kv_heads=2),
    Case("head dim 64", 64, 64, lambda: Mask.causal(64, 64), dim=64),
    Case("head dim 80", 40, 40, lambda: Mask.causal(40, 40), dim=80),
    Case("head dim 128", 64, 64, lambda: Mask.documents(segments(20, 44)), dim=128),
    Case("head dim 256", 33, 33, lambda: Mask.causal(33, 33), dim=256),
    Case("odd head dim", 40, 40, lambda: Mask.causal(40, 40), dim=13),
    Case("value dim smaller", 50, 50, lambda: Mask.causal(50, 50), dim=32, value_dim=8),
    Case("value dim larger", 50, 50, lambda: Mask.documents(segments(20, 30)), dim=16, value_dim=40, heads=4),
    Case("scale one", 40, 40, lambda: Mask.causal(40, 40), scale=1.0),
    Case("head dim 32 grouped", 45, 45, lambda: Mask.window(45, 20), dim=32, heads=6, kv_heads=2),
    Case("head dim 48", 35, 50, lambda: Mask.causal(35, 50, 15), dim=48),
    Case("head dim 96 documents", 48, 48, lambda: Mask.documents(segments(17, 20, padding=11)), dim=96),
    Case("head dim 192 value dim 128", 33, 33, lambda: Mask.causal(33), dim=192, value_dim=128),
    Case("head dim 17 value dim 33", 37, 37, lambda: Mask.window(37, 9), dim=17, value_dim=33, heads=4),
    Case("head dim 256 multi-query", 20, 30, dim=256, heads=4, kv_heads=1),
    Case("one query of a window", 1, 90, lambda: Mask.window(1, 20, 90, 70), heads=4, kv_heads=2),
    Case("one query and a prefix", 1, 80, lambda: Mask.window(1, 8, 80, 79, prefix=5), heads=4, kv_heads=1),
    Case("one query of head dim 80", 1, 65, lambda: _ragged(1, 65, 33), batch=2, dim=80, value_dim=40),
    Case("three queries of ragged caches", 3, 70, lambda: _ragged(3, 70, 2, 41), batch=3, heads=8, kv_heads=2),
    Case("many queries one key", 40, 1),
    Case("one tile and a row", 129, 65, lambda: Mask.causal(129, 65)),
    Case("one row short of a tile", 127, 127, lambda: Mask.documents(segments(63, 64)), heads=1, kv_heads=1),
    Case("one document and padding", 90, 90, lambda: Mask.documents(segments(70, padding=20)), heads=4, kv_heads=2),
    Case("left padded", 50, 50, lambda: Mask.documents(np.repeat([[-1, 0]], [13, 37], axis=1)), batch=2),
    Case("padding between documents", 66, 66, lambda: Mask.documents(np.repeat([[5, -1, 2]], [20, 16, 30], axis=1))),
    Case("three documents both ways with padding", 75, 75, _both_ways, heads=6, kv_heads=3),
    Case("chunk of packed documents", 30, 96, _chunk, heads=4, kv_heads=2),
    Case("permuted by zigzag", 48, 96, lambda: _rank(1, 2), heads=4, kv_heads=2),
    Case("permuted by area", 32, 96, lambda: _rank(2, 3, area=True)),
    Case("empty rows among others", 60, 60, lambda: _gaps(60), heads=4, kv_heads=1),
    Case("empty rows and a prefix", 60, 70, lambda: _gaps(60, prefix=6), batch=2),
    Case("keys that nobody sees", 40, 100, lambda: Mask(np.full((1, 40), 30), np.full((1, 40), 55))),
    Case("one mask for a batch", 40, 40, lambda: Mask.window(40, 12, prefix=3), batch=3),
]
IDS = [case.name.replace(" ", "-") for case in CASES]

#: For devices that are quick enough.
LARGE = [
    Case("long causal", 1500, 1500, lambda: Mask.causal(1500), heads=4, kv_heads=2, dim=128),
    Case("long documents", 2000, 2000, lambda: Mask.documents(segments(700, 41, 900, 300, padding=59)),
         heads=4, kv_heads=1, dim=64),
    Case("long window with sinks", 1300, 1300, lambda: Mask.window(1300, 200, prefix=5), dim=80),
    Case("long cache", 1, 5000, lambda: Mask.lengths(np.array([5000, 37, 4096]), 1), batch=3, heads=8, dim=128),
    Case("large heads", 600, 600, lambda: Mask.causal(600), dim=256, heads=2, kv_heads=1),
]  # fmt: skip
LARGE_IDS = [case.name.replace(" ", "-") for case in LARGE]
