"""``heddle bench attention``: ``attend`` beside its peers on one mask, in one interleaved run."""

from __future__ import annotations

import dataclasses
import html
import json
import multiprocessing
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from heddle import mask_picture

from . import context_parallel as ranks
from .attention_peers import FRAMEWORKS, OURS, PEERS, Contender, Problem, choose, implementation
from .tables import show
from .timing import Timing, interleave, machine, peak_memory


def measure(
    problem: Problem,
    contenders: dict[str, Contender],
    repeats: int,
    memory: bool = False,
    tell: Callable[[str], object] = lambda message: None,
) -> list[dict[str, Any]]:
    """Time the contenders on one problem and compare their outputs; with ``memory`` each again, in a new process.

    Returns:
        a record for each: ``flops_per_second`` by visible pairs; ``times`` what it took, as a multiple of each of ours;
        ``difference`` the output's largest from the first contender's, over the queries that see something.
    """
    steps, outputs = {}, {}
    for name, contender in contenders.items():
        tell(f"preparing {name}")
        steps[name] = contender.prepare(problem)
        outputs[name] = _numpy(steps[name](0))
    seen = problem.mask.counts(problem.seq) > 0
    first = next(iter(outputs.values()))
    differences = {name: float(np.abs(out - first)[seen].max()) for name, out in outputs.items()}
    timings = interleave(steps, repeats, lead_in=True, tell=tell)
    del steps, outputs, first
    records = []
    for name, contender in contenders.items():
        tell(f"memory of {name}")
        record = {
            "name": name,
            "framework": contender.framework,
            "implementation": implementation(problem, contender.framework) if name in OURS else None,
            "seq": problem.seq,
            **_figures(timings[name]),
            "times": {ours: timings[name].median / timings[ours].median for ours in OURS if ours in timings},
            "flops": problem.flops,
            "flops_per_second": problem.flops / timings[name].median,
            "difference": differences[name],
            "peak_bytes": _peak_in_a_new_process(problem, name) if memory else None,
        }
        records.append(record)
    return records


def _figures(timing: Timing) -> dict[str, Any]:
    seconds = [timing.median, *timing.quartiles]
    median, first, third = (1e3 * s for s in seconds)
    return {"median_ms": median, "quartiles_ms": [first, third], "repeats": len(timing.seconds)}


def _numpy(out: Any) -> np.ndarray:
    return np.asarray(out.float().cpu() if hasattr(out, "cpu") else out, dtype=np.float32)


def _peak(problem: Problem, name: str) -> int:
    step = (OURS | PEERS)[name].prepare(problem)
    return peak_memory(lambda: step(0))


def _peak_in_a_new_process(problem: Problem, name: str) -> int | None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_peak, problem, name).result()
        except BrokenProcessPool:  # the system killed it: more memory than there is
            return None


def run(
    problem: Problem,
    *,
    seq: Sequence[int],
    framework: str = "both",
    peers: str = "all",
    repeats: int = 10,
    memory: bool = False,
    context_parallel: int = 1,
    show_mask: bool = False,
    as_json: bool = False,
    out: str | Path | None = None,
    command: Sequence[str] = ("heddle", "bench", "attention"),
) -> dict[str, Any]:
    """Measure ``problem`` at each length of ``seq``, print tables (or JSON); with ``out`` write JSON and a page there.

    With ``context_parallel`` also ``context_attend`` over so many ranks; with ``show_mask`` also draw the first
    sequence's mask, into ``out`` or the terminal.

    Raises:
        ValueError: options that can't be, by the option's name.
    """
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}")
    if context_parallel < 1:
        raise ValueError(f"--context-parallel must be at least 1, got {context_parallel}")
    if memory and context_parallel > 1:
        raise ValueError("--memory measures one process: give it without --context-parallel")
    # Before the first minute is spent every option has been read, the documents drawn.
    problems = [dataclasses.replace(problem, seq=n) for n in seq]
    visible = {str(each.seq): each.visible for each in problems}
    chosen = [choose(each, framework, peers) for each in problems]
    if context_parallel > 1:
        spread = ranks.contenders(FRAMEWORKS if framework == "both" else (framework,), context_parallel)
        for each, (contenders, not_run) in zip(problems, chosen, strict=True):
            for name, contender in spread.items():
                why = contender.unsupported(each)
                contenders |= {name: contender} if why is None else {}
                not_run |= {name: why} if why is not None else {}
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for each in problems if show_mask else ():
        drawn = each.drawn(0, context_parallel)
        if folder is not None:
            mask_picture.write(drawn, folder / f"mask-{each.seq}")
        elif not as_json:
            mask_picture.show(drawn)
    results, absent = [], {}
    with Console(stderr=True).status("") as status:
        for each, (contenders, not_run) in zip(problems, chosen, strict=True):

            def tell(message: str, n: int = each.seq) -> None:
                status.update(f"{n:,} tokens, {message}")

            results += measure(each, contenders, repeats, memory, tell)
            absent |= not_run
    record = {
        "benchmark": "attention",
        "command": shlex.join(command),
        "machine": machine(),
        "problem": {name: value for name, value in dataclasses.asdict(problem).items() if name != "seq"},
        "visible": visible,
        "memory": memory,
        "context_parallel": context_parallel,
        "area_max_over_mean": {
            str(each.seq): ranks.areas(each, context_parallel) for each in problems if context_parallel > 1
        },
        "results": results,
        "not_run": absent,
    }
    text = json.dumps(record, indent=2)
    if as_json:
        print(text)
    else:
        show(title(record), tables(record), notes(record))
    if folder is not None:
        (folder / "attention.json").write_text(text + "\n")
        page(record, folder / "attention.html")
    return record


# ---------------------------------------------------------------- showing a record


def title(record: dict[str, Any]) -> str:
    """The problem in a line."""
    p = record["problem"]
    parts = [f"{p['documents']} documents" if p["documents"] > 1 else "causal"]
    parts += [f"window of {p['window']}"] if p["window"] else []
    parts += [f"{p['pad']} tokens of padding"] if p["pad"] else []
    heads = f"{p['heads']} heads" + (f" over {p['kv_heads']}" if p["kv_heads"] != p["heads"] else "")
    parts += [f"batch {p['batch']}, {heads} of {p['head_dim']}, {p['dtype']}"]
    return ("forward and backward" if p["backward"] else "forward") + ": " + ", ".join(parts)


def lengths(record: dict[str, Any]) -> list[int]:
    """The lengths measured, in order."""
    return list(dict.fromkeys(r["seq"] for r in record["results"]))


def table(record: dict[str, Any], seq: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text, at one length."""
    results = [r for r in record["results"] if r["seq"] == seq]
    ours, memory = list(results[0]["times"]), record["memory"]
    header = [f"{seq:,} tokens", "ms", "quartiles", "GFLOP/s"]
    header += [f"÷ {name.removeprefix('heddle-')}" for name in ours] + ["difference"] + ["peak MiB"] * memory
    rows = []
    for r in results:
        low, high = r["quartiles_ms"]
        row = [" ".join(filter(None, [r["name"], r["implementation"]]))]
        row += [f"{r['median_ms']:.2f}", f"{low:.2f}–{high:.2f}", f"{r['flops_per_second'] / 1e9:.1f}"]
        row += [f"{r['times'][name]:.2f}" for name in ours] + [f"{r['difference']:.0e}"]
        peak = "killed" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:,.1f}"
        rows.append(row + [peak] * memory)
    return header, rows


def tables(record: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of text, for each length."""
    return [table(record, seq) for seq in lengths(record)]


def notes(record: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know."""
    m = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    on = ", ".join([*m["accelerators"], m["processor"]])
    lines = [
        f"{on}, {m['cores']} cores; Python {m['python']}, {versions}; {m['date']}",
        "ms: median and quartiles of interleaved rounds. GFLOP/s: by visible pairs alone. ÷: this time over that of "
        "heddle in the framework. difference: the output's largest from the first row's.",
    ]
    if record["memory"]:
        lines.append("peak: resident memory above the inputs', each contender alone in a new process.")
    for seq, shares in record["area_max_over_mean"].items():
        said = ", ".join(f"{balanced} {share:.3f}" for balanced, share in shares.items())
        lines.append(f"visible pairs of {record['context_parallel']} ranks, max/mean at {int(seq):,} tokens: {said}")
    return lines + [f"{name} did not run: {why}" for name, why in record["not_run"].items()]


def page(record: dict[str, Any], path: Path) -> None:
    """Write the Plotly page: curves over the lengths, or bars for one length, and the tables."""
    from heddle import plot

    results, measured = record["results"], lengths(record)
    names = list(dict.fromkeys(r["name"] for r in results))
    quantities = [
        ("Time", "milliseconds", "median_ms", 1),
        ("Speed by visible pairs", "GFLOP/s", "flops_per_second", 1e9),
        ("Peak memory above the inputs", "MiB", "peak_bytes", 2**20),
    ]
    pictures = []
    for heading, unit, field, scale in quantities:
        value = {(r["name"], r["seq"]): r[field] / scale for r in results if r[field] is not None}
        if value and len(measured) > 1:
            series = {name: (measured, [value.get((name, seq)) for seq in measured]) for name in names}
            pictures.append(plot.lines(series, title=heading, x="tokens", y=unit, log_x=True, log_y=True))
        elif value:
            values = [value.get((name, measured[0])) for name in names]
            pictures.append(plot.bars({heading: values}, categories=names, title=heading, y=unit))
    written = [_html(*each) for each in tables(record)]
    said = [f'<p class="note">{html.escape(line)}</p>' for line in notes(record)]
    command = f"<pre>{html.escape(record['command'])}</pre>"
    plot.page(path, "Attention", [f"<p>{html.escape(title(record))}</p>", *pictures, *written, *said, command])


def _html(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        first, *rest = (html.escape(cell) for cell in cells)
        return f"<tr><{tag}>{first}</{tag}>" + "".join(f'<{tag} class="number">{c}</{tag}>' for c in rest) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"
