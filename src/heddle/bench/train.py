"""``heddle bench train``: tokens a second of training on packed documents, beside Hugging Face's Trainer.

One interleaved run of the same model, weights, documents and optimiser: each step is one of everybody's, on the same
documents. The losses of the first step say whether the same was computed.
"""

from __future__ import annotations

import json
import shlex
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from heddle.flops import TrainingFlops

from .tables import show
from .timing import interleave, machine
from .train_peers import OURS, PEERS, Runner, Task, places, split, targets

PRODUCT = 2048  #: side of the matrices whose product says what the machine could do
PRODUCTS = 8  #: in a round
SPARE = 64  #: rows' worth of documents that are packed together, at least, if there are as many


def measure(
    task: Task, names: Sequence[str], flops: TrainingFlops, tell: Callable[[str], object] = lambda message: None
) -> dict[str, Any]:
    """Train by each contender, step by step in turn; the first step isn't timed.

    Args:
        task: what on.
        names: of the contenders, ours first.
        flops: of a step of the model.
        tell: is told what runs now.

    Returns:
        ``product_flops_per_second``, what float32 products reach in the best of the same rounds; ``results``, a record
        for each contender (``times``: the step's as a multiple of each of ours, the median over the rounds);
        ``not_run``, why.
    """
    batches, repeats = task.batches, task.steps - 1
    with ExitStack() as stack:
        runners = {name: stack.enter_context(Runner(name, task)) for name in names}
        steps: dict[str, Callable[[int], object]] = {name: lambda _, r=r: r.step() for name, r in runners.items()}
        timings = interleave(steps | {"products": _products()}, repeats, tell=tell)
        for runner in runners.values():
            runner.finish()
    peak = PRODUCTS * 2 * PRODUCT**3 / min(timings["products"].seconds)
    learned = [targets(batch) for batch in batches]
    work = [flops(batch.segment_ids, count) for batch, count in zip(batches, learned, strict=True)][1:]
    done = {name: runner for name, runner in runners.items() if runner.failed is None}
    ours = [name for name in done if name in OURS]
    first = next((runner.steps[0].loss for runner in done.values()), float("nan"))
    results = []
    for name, runner in done.items():
        seconds = timings[name].seconds
        results.append(
            {
                "name": name,
                "tokens_per_second": _median(np.divide(learned[1:], seconds)),
                "mfu": _median(np.divide(work, seconds) / peak),
                "seconds": timings[name].median,
                "quartiles": timings[name].quartiles,
                "cpu_seconds": _median([step.cpu_seconds for step in runner.steps[1:]]),
                "peak_bytes": runner.peak_bytes,
                "loss": runner.steps[0].loss,
                "loss_difference": abs(runner.steps[0].loss - first),
                "places_per_token": _median([places(name, b) / n for b, n in zip(batches, learned, strict=True)]),
                "times": {o.removeprefix("heddle-"): _median(np.divide(seconds, timings[o].seconds)) for o in ours},
            }
        )
    failed = {name: runner.failed for name, runner in runners.items() if runner.failed is not None}
    return {"product_flops_per_second": peak, "results": results, "not_run": failed}


def _median(values: Any) -> float:
    return float(statistics.median(map(float, values)))


def _products() -> Callable[[int], object]:
    """A step that multiplies float32 matrices with all cores."""
    import torch

    a, b, out = torch.ones(3, PRODUCT, PRODUCT).unbind()

    def step(_: int) -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=out)

    return step


def read_documents(corpus: str, tokenizer: Any, longest: int, tokens: int, seed: int) -> list[np.ndarray]:
    """A corpus's documents in an order by ``seed``, up to so many tokens, without those longer than ``longest``.

    Raises:
        ValueError: there is none, or a corpus that can't be read.
    """
    from heddle.data.corpora import open_corpus, tokenized

    found, total = [], 0
    for document, _ in tokenized(open_corpus(corpus, seed=seed), tokenizer)(0, None):
        if 2 <= len(document) <= longest:
            found.append(document)
            total += len(document)
        if total >= tokens:
            break
    if not found:
        raise ValueError(f"--corpus must hold documents of 2 to --seq {longest} tokens, got none in {corpus}")
    return found


def run(
    model: str | None = None,
    *,
    layers: int | None = None,
    corpus: str = "stdlib",
    seq: int = 2048,
    batch: int = 1,
    framework: str = "both",
    peers: str = "all",
    repeats: int = 3,
    seed: int = 0,
    as_json: bool = False,
    out: str | Path | None = None,
    command: Sequence[str] = ("heddle", "bench", "train"),
) -> dict[str, Any]:
    """Make a model of random weights, train it by each contender, print a table (or JSON); with ``out`` write JSON.

    Raises:
        ValueError: options that can't be, by the option's name.
    """
    for option, value, least in (("seq", seq, 2), ("batch", batch, 1), ("repeats", repeats, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"--{option} must be at least {least}, got {value}")
    if framework not in ("both", "jax", "torch"):
        raise ValueError(f"--framework must be torch, jax or both, got {framework!r}")
    chosen = [*PEERS] if peers == "all" else [] if peers == "none" else peers.split(",")
    if unknown := set(chosen) - set(PEERS):
        raise ValueError(f"--peers must be all, none or of {', '.join(PEERS)}; got {', '.join(sorted(unknown))}")
    names = [name for name in OURS if framework in ("both", name.removeprefix("heddle-"))] + chosen
    from flax import nnx

    from heddle.data.locate import locate
    from heddle.data.tokenizers import Tokenizer
    from heddle.jax import ModelConfig, Transformer
    from heddle.jax.flops import training_flops

    config, tokenizer = ModelConfig.from_pretrained(locate(model)), Tokenizer.from_pretrained(model)
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"--layers must be between 1 and the model's {config.num_hidden_layers}, got {layers}")
        kinds = (config.layer_types or ())[:layers]
        config = replace(config, num_hidden_layers=layers, layer_types=kinds)
    with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status("reading") as status:
        steps = repeats + 1
        documents = read_documents(corpus, tokenizer, seq, max(SPARE, steps * batch) * seq, seed)
        task = Task(folder, documents, seq, batch, steps, seed)
        transformer = Transformer(config, rngs=nnx.Rngs(seed))
        transformer.save_pretrained(folder, tokenizer)
        flops = training_flops(transformer)
        assert flops is not None
        del transformer
        record = {
            "benchmark": "train",
            "command": shlex.join(command),
            "machine": machine(),
            "problem": {
                "model": model or "SmolLM2-135M",
                "layers": config.num_hidden_layers,
                "dtype": "float32",
                "corpus": corpus,
                "seq": seq,
                "batch": batch,
                "documents": [len(split(each)) for each in task.batches[1:]],
                "targets": [targets(each) for each in task.batches[1:]],
                "seed": seed,
            },
        }
        record |= measure(task, names, flops, status.update)
    text = json.dumps(record, indent=2)
    print(text) if as_json else show(title(record), tables(record), notes(record))
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "train.json").write_text(text + "\n")
    return record


def title(record: dict[str, Any]) -> str:
    """The problem in a line."""
    p = record["problem"]
    documents = sum(p["documents"]) / len(p["documents"]) / p["batch"]
    return (
        f"{p['model']}, {p['layers']} layers, {p['dtype']}, AdamW: steps of {p['batch']} packed rows of {p['seq']:,} "
        f"tokens, {documents:.1f} documents of {p['corpus']} in each"
    )


def tables(record: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of text."""
    results = record["results"]
    ours = list(results[0]["times"]) if results else []
    header = ["", "tokens/s", "MFU", "s a step", "quartiles", "CPU s", *(f"÷ {name}" for name in ours)]
    header += ["places a token", "peak GiB", "first loss", "difference"]
    rows = []
    for r in results:
        low, high = r["quartiles"]
        row = [r["name"], f"{r['tokens_per_second']:.1f}", f"{r['mfu']:.1%}", f"{r['seconds']:.2f}"]
        row += [f"{low:.2f}–{high:.2f}", f"{r['cpu_seconds']:.1f}", *(f"{r['times'][name]:.2f}" for name in ours)]
        row += [f"{r['places_per_token']:.2f}", "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.2f}"]
        rows.append([*row, f"{r['loss']:.5f}", f"{r['loss_difference']:.0e}"])
    return [(header, rows)]


def notes(record: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know."""
    m = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return [
        "tokens: those with a target, no padding. MFU: the model's matrix products, visible pairs alone, over the "
        f"{record['product_flops_per_second'] / 1e9:.0f} GFLOP/s of the best products in the same rounds. ÷: this time "
        "over that of heddle in the framework.",
        "Documents longer than a row are left out. peak: all memory of the process. difference: of the first step's "
        "mean loss from the first row's.",
        f"medians of {len(record['problem']['targets'])} interleaved rounds, each on other documents; "
        f"{', '.join([*m['accelerators'], m['processor']])}, {m['cores']} cores; Python {m['python']}, {versions}; "
        f"{m['date']}",
        *(f"{name} did not run: {why}" for name, why in record["not_run"].items()),
    ]
