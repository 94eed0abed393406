"""``heddle bench dilated``: dilated attention beside vanilla attention, by the length of the sequence.

Two sweeps: with as many tokens in all at every length, as the literature shows it, and with one sequence, whose fitted
exponent tells how time grows. FLOPs are those of LongNet's eq. 17 (arXiv 2307.02486), so none for what is wasted.
"""

from __future__ import annotations

import dataclasses
import html
import json
import multiprocessing
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from heddle.attention.dilated_patterns import Pattern, check_patterns

from .options import integers
from .tables import show
from .timing import interleave, machine, peak_memory

DTYPES = ("float32", "bfloat16", "float16")
OURS = ("dilated", "improved")
PEERS = ("vanilla",)
SWEEPS = ("tokens", "length")
SHORTEST = 1 << 13
LONGEST_STEP = 60.0  #: seconds of a step after which a contender isn't measured at greater lengths


@dataclass(frozen=True)
class Problem:
    """One size to measure: the options of ``heddle bench dilated``, which explains them."""

    seq: int
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    patterns: tuple[Pattern, ...] = check_patterns([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])
    is_causal: bool = False
    backward: bool = False
    dtype: str = "float32"
    device: str = "cpu"

    def flops(self, name: str) -> float:
        """Of one step: two products of two FLOPs for each pair, element of a head and head; backward 2.5 times more.

        A pattern has ``seq * w / r^2`` pairs a head (eq. 17), half if causal, vanilla attention ``seq^2``.
        """
        pairs = sum(self.seq * min(w, self.seq) / r**2 for w, r in self.patterns)
        pairs = (self.seq**2 if name == "vanilla" else pairs) / (2 if self.is_causal else 1)
        return 4.0 * self.batch * self.heads * self.head_dim * pairs * (3.5 if self.backward else 1)

    def prepare(self, name: str) -> Callable[[int], object]:
        """A step of a contender, on inputs of its own."""
        import torch
        import torch.nn.functional as F

        from heddle.torch.dilated import DilatedAttention, ImprovedDilatedAttention

        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.seq, self.heads, self.head_dim)
        dtype, lists = getattr(torch, self.dtype), tuple(zip(*self.patterns, strict=True))
        inputs = [torch.randn(shape, generator=generator, dtype=torch.float32).to(self.device, dtype) for _ in range(3)]
        modules = {"dilated": DilatedAttention, "improved": ImprovedDilatedAttention}
        module = modules[name](*lists) if name in modules else None

        def attention() -> torch.Tensor:
            if module is not None:
                return module(*inputs, is_causal=self.is_causal)
            q, k, v = (x.transpose(1, 2) for x in inputs)
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)

        def step(_: int) -> torch.Tensor:
            if self.backward:
                for x in inputs:
                    x.grad = None
                    x.requires_grad_()
                out = attention()
                out.backward(torch.ones_like(out))
            else:
                with torch.inference_mode():
                    out = attention()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return out

        return step

    def yardsticks(self) -> tuple[dict[str, Callable[[int], object]], dict[str, float]]:
        """What the machine can do, and the FLOPs of each: a float32 matrix product; torch's SDPA on as many segments as
        there are in 8,192 tokens of the first pattern's kept ones, laid out as the inputs are."""
        import torch

        tokens = min(self.seq, 8192)
        kept = -(-min(self.patterns[0].length, tokens) // self.patterns[0].rate)
        one = (Pattern(kept, 1),)
        segments = dataclasses.replace(self, seq=kept, batch=max(1, tokens // kept), patterns=one)
        size = 2048
        a, b = (torch.randn(size, size, device=self.device, dtype=getattr(torch, self.dtype)) for _ in range(2))

        def product(_: int) -> object:
            out = a @ b
            if self.device == "cuda":
                torch.cuda.synchronize()
            return out

        steps = {"matrix product": product, "SDPA on one segment": segments.prepare("vanilla")}
        return steps, {"matrix product": 2.0 * size**3, "SDPA on one segment": segments.flops("vanilla")}

    def peak(self, name: str) -> int:
        """Bytes above the inputs', output and gradients included; call it in a new process."""
        step = self.prepare(name)
        if self.device == "cpu":
            return peak_memory(lambda: step(0))
        import torch

        step(0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(0)
        return torch.cuda.max_memory_allocated() - before


def _peak(problem: Problem, name: str) -> int | None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(problem.peak, name).result()
        except BrokenProcessPool:  # the system killed it: more memory than there is
            return None


def sizes(problem: Problem, total: int, batch: int, seq: Sequence[int], sweep: str) -> Iterator[Problem]:
    """The problems of a sweep."""
    lengths = list(seq) or [1 << n for n in range(SHORTEST.bit_length() - 1, (total // batch).bit_length())]
    for n in lengths or [total // batch]:
        yield dataclasses.replace(problem, seq=n, batch=max(1, total // n) if sweep == "tokens" else 1)


def measure(
    problem: Problem, names: Sequence[str], repeats: int, memory: bool, tell: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Time contenders and yardsticks in the same rounds, so that a share doesn't depend on when it was measured."""
    steps, flops = problem.yardsticks()
    flops |= {name: problem.flops(name) for name in names}
    timings = interleave({name: problem.prepare(name) for name in names} | steps, repeats, tell=tell)
    speed = {name: flops[name] / timing.median for name, timing in timings.items()}
    records = []
    for name in names:
        median, quartiles = timings[name].median, timings[name].quartiles
        records.append(
            {
                "name": name,
                "seq": problem.seq,
                "batch": problem.batch,
                "median_ms": 1e3 * median,
                "quartiles_ms": [1e3 * s for s in quartiles],
                "repeats": repeats,
                "tokens_per_second": problem.batch * problem.seq / median,
                "flops": flops[name],
                "flops_per_second": speed[name],
                "of_matrix_product": speed[name] / speed["matrix product"],
                "of_sdpa": speed[name] / speed["SDPA on one segment"],
                "yardsticks": {name: speed[name] for name in steps},
                "peak_bytes": _peak(problem, name) if memory else None,
            }
        )
    return records


def exponent(results: Sequence[dict[str, Any]]) -> float | None:
    """The slope of log(time) in log(length): 1 is linear, 2 quadratic. Of two lengths at least."""
    if len(results) < 2:
        return None
    return float(np.polyfit(np.log([r["seq"] for r in results]), np.log([r["median_ms"] for r in results]), 1)[0])


def run(
    *,
    total_tokens: int = 18,
    heads: int = 8,
    head_dim: int = 64,
    batch_size: int = 1,
    segment_lengths: str = "2048,4096,8192,16384,32768",
    dilation_rates: str = "1,2,4,6,12",
    seq: str = "",
    causal: bool = False,
    backward: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    peers: str = "vanilla",
    sweep: str = "both",
    repeats: int = 5,
    memory: bool = False,
    as_json: bool = False,
    out: str | Path | None = None,
    command: Sequence[str] = ("heddle", "bench", "dilated"),
) -> dict[str, Any]:
    """Measure, print tables (or JSON); with ``out`` write ``dilated.json`` and ``dilated.html`` there.

    Raises:
        ValueError: options that can't be, by the option's name.
    """
    for option, value in (("heads", heads), ("head-dim", head_dim), ("batch-size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    if not 1 <= total_tokens <= 40:
        raise ValueError(f"--total-tokens must be the tokens' binary logarithm, 1 to 40, got {total_tokens}")
    for option, value, known in (
        ("dtype", dtype, DTYPES), ("device", device, ("cpu", "cuda")), ("sweep", sweep, (*SWEEPS, "both")),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"--{option} must be one of {', '.join(known)}, got {value!r}")
    chosen = PEERS if peers == "all" else () if peers == "none" else tuple(peers.split(","))
    if unknown := sorted(set(chosen) - set(PEERS)):
        raise ValueError(f"--peers must be all, none or of {', '.join(PEERS)}; got {', '.join(unknown)}")
    if 1 << total_tokens < batch_size:
        raise ValueError(f"--batch-size must be at most the {1 << total_tokens} tokens there are, got {batch_size}")
    patterns = check_patterns(integers("segment-lengths", segment_lengths), integers("dilation-rates", dilation_rates))
    problem = Problem(1, 1, heads, head_dim, patterns, causal, backward, dtype, device)
    lengths, results, absent = integers("seq", seq), [], {}
    with Console(stderr=True).status("") as status:
        for each_sweep in SWEEPS if sweep == "both" else (sweep,):
            names = [*OURS, *chosen]
            for each in sizes(problem, 1 << total_tokens, batch_size, lengths, each_sweep):

                def tell(message: str, n: int = each.seq) -> None:
                    status.update(f"{n:,} tokens, {message}")

                found = measure(each, names, repeats, memory, tell)
                results += [record | {"sweep": each_sweep} for record in found]
                for r in found:
                    if r["median_ms"] > 1e3 * LONGEST_STEP:
                        names.remove(r["name"])
                        absent[f"{r['name']} beyond {each.seq:,} tokens"] = "a step took over a minute"
    record = {
        "benchmark": "dilated",
        "command": shlex.join(command),
        "machine": machine(),
        "problem": dataclasses.asdict(problem) | {"total_tokens": 1 << total_tokens, "batch_size": batch_size},
        "memory": memory,
        "results": results,
        "exponents": {
            name: exponent([r for r in results if r["sweep"] == "length" and r["name"] == name])
            for name in (*OURS, *chosen)
        },
        "not_run": absent,
    }
    record["problem"] = {name: value for name, value in record["problem"].items() if name not in ("seq", "batch")}
    text = json.dumps(record, indent=2)
    print(text) if as_json else show(title(record), tables(record), notes(record))
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dilated.json").write_text(text + "\n")
        page(record, folder / "dilated.html")
    return record


# ---------------------------------------------------------------- showing a record


def title(record: dict[str, Any]) -> str:
    """The problem in a line."""
    p = record["problem"]
    lengths, rates = (",".join(str(pattern[i]) for pattern in p["patterns"]) for i in (0, 1))
    parts = [f"dilated attention, w {lengths}, r {rates}", f"{p['heads']} heads of {p['head_dim']}", p["dtype"]]
    parts += ["causal"] if p["is_causal"] else []
    return ("forward and backward: " if p["backward"] else "forward: ") + ", ".join(parts)


def tables(record: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of text, for each sweep."""
    found = []
    for sweep, heading in (("tokens", f"{record['problem']['total_tokens']:,} tokens in all"), ("length", "batch 1")):
        header = [heading, "tokens", "batch", "ms", "quartiles", "Mtokens/s", "GFLOP/s", "of matmul", "of SDPA"]
        header += ["peak MiB"] * record["memory"]
        rows = []
        for r in record["results"]:
            if r["sweep"] == sweep:
                low, high = r["quartiles_ms"]
                row = [r["name"], f"{r['seq']:,}", str(r["batch"]), f"{r['median_ms']:.1f}", f"{low:.1f}–{high:.1f}"]
                row += [f"{r['tokens_per_second'] / 1e6:.3f}", f"{r['flops_per_second'] / 1e9:.1f}"]
                row += [f"{r['of_matrix_product']:.2f}", f"{r['of_sdpa']:.2f}"]
                peak = "killed" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:,.1f}"
                rows.append(row + [peak] * record["memory"])
        if rows:
            found.append((header, rows))
    return found


def notes(record: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know."""
    m = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    lines = [
        f"{', '.join([*m['accelerators'], m['processor']])}, {m['cores']} cores; Python {m['python']}, {versions}; "
        f"{m['date']}",
        "ms: median and quartiles of interleaved rounds. GFLOP/s: by LongNet's eq. 17. of matmul, of SDPA: that rate "
        "over those of a matrix product in the same dtype and of SDPA on one segment's kept tokens, same rounds.",
    ]
    fitted = [f"{name} {slope:.3f}" for name, slope in record["exponents"].items() if slope is not None]
    if fitted:
        lines.append("fitted exponent of time in the length, batch 1: " + ", ".join(fitted))
    if record["memory"]:
        lines.append("peak: memory above the inputs', output included, each contender alone in a new process.")
    return lines + [f"{name} did not run: {why}" for name, why in record["not_run"].items()]


def page(record: dict[str, Any], path: Path) -> None:
    """Write the Plotly page: curves over the lengths, and the tables."""
    from heddle import plot

    quantities = [
        ("Time", "milliseconds", "median_ms", 1),
        ("Throughput", "tokens/s", "tokens_per_second", 1),
        ("Peak memory above the inputs", "MiB", "peak_bytes", 2**20),
    ]
    pictures = []
    for sweep, said in (("tokens", "as many tokens in all"), ("length", "one sequence")):
        results = [r for r in record["results"] if r["sweep"] == sweep]
        lengths = sorted({r["seq"] for r in results})
        for heading, unit, field, scale in quantities:
            value = {(r["name"], r["seq"]): r[field] / scale for r in results if r[field] is not None}
            if value:
                names = list(dict.fromkeys(name for name, _ in value))
                series = {name: (lengths, [value.get((name, n)) for n in lengths]) for name in names}
                drawn = plot.lines(series, title=f"{heading}, {said}", x="tokens", y=unit, log_x=True, log_y=True)
                pictures.append(drawn)
    said = [f'<p class="note">{html.escape(line)}</p>' for line in notes(record)]
    command = f"<pre>{html.escape(record['command'])}</pre>"
    written = [_html(*each) for each in tables(record)]
    plot.page(path, "Dilated attention", [f"<p>{html.escape(title(record))}</p>", *pictures, *written, *said, command])


def _html(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        first, *rest = (html.escape(cell) for cell in cells)
        return f"<tr><{tag}>{first}</{tag}>" + "".join(f'<{tag} class="number">{c}</{tag}>' for c in rest) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"
