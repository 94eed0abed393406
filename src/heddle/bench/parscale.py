"""``heddle bench parscale``: what replicas cost in time and memory, beside the larger model that would do as well.

The replicas of a token share every weight that is read for it, so decoding with P of them is bound by the same reads
as with one until their products take longer. How large a model would reach the same loss without replicas is what the
scaling law of arXiv 2505.10475 says: ``L = (A / (N (k ln P + 1)))^α + E``, so one of ``k ln P + 1`` times the
parameters. That model is built and measured too, of more layers of the same shape.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from heddle.scaling_law import LAWS, growth, loss

from .decode import text_prompts
from .options import counts
from .tables import show
from .timing import interleave, machine

CROSS_ATTN = ("none", "joint", "sublayer")


def run(
    model: str | None = None,
    *,
    replicas: str = "1,2,4,8",
    batch: str = "1,2,4,8",
    cross_attn: str = "none",
    law: str = "stack",
    prompt_tokens: int = 128,
    tokens: int = 16,
    repeats: int = 5,
    as_json: bool = False,
    out: str | Path | None = None,
    command: Sequence[str] = ("heddle", "bench", "parscale"),
) -> dict[str, Any]:
    """Measure in float32, print a table for each batch size (or JSON); with ``out`` write JSON and a page there.

    Raises:
        ValueError: options that can't be, by the option's name.
    """
    numbers, batches = counts("replicas", replicas), counts("batch", batch)
    if numbers[0] != 1:
        raise ValueError(f"--replicas must begin with 1, which the others are compared with, got {replicas}")
    for option, value, known in (("cross-attn", cross_attn, CROSS_ATTN), ("law", law, LAWS)):
        if value not in known:
            raise ValueError(f"--{option} must be one of {', '.join(known)}, got {value}")
    for option, value in (("prompt-tokens", prompt_tokens), ("tokens", tokens), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    from heddle.data.tokenizers import Tokenizer
    from heddle.jax import decoding

    if tokens > decoding.STEPS:
        raise ValueError(f"--tokens must be at most {decoding.STEPS}, as many as one call decodes, got {tokens}")
    with Console(stderr=True).status("loading") as status:
        tokenizer = Tokenizer.from_pretrained(model)
        models = {count: _load(model, count, cross_attn) for count in numbers}
        base = models[1]
        needed, context = prompt_tokens + 1 + tokens * (repeats + 1), base.config.max_position_embeddings
        if needed > context:
            raise ValueError(
                f"--prompt-tokens and --tokens must fit in the context of {context} with all rounds, got {needed}"
            )
        scaled = {count: _deeper(base, growth(count, law)) for count in numbers if count > 1}
        results = []
        for size in batches:
            said = f"batch {size}, "
            prompts = text_prompts(tokenizer, size, prompt_tokens)
            results += measure(
                models, scaled, tokenizer, prompts, tokens, repeats, lambda m, said=said: status.update(said + m)
            )
        record = {
            "benchmark": "parscale",
            "command": shlex.join(command),
            "machine": machine(),
            "problem": {
                "model": model or "SmolLM2-135M-Instruct",
                "dtype": "float32",
                "cross_attn": cross_attn,
                "law": law,
                "prompt_tokens": prompt_tokens,
                "tokens": tokens,
                "repeats": repeats,
                "weight_bytes": _bytes(base),
                "law_loss": {str(count): loss(_layer_parameters(base), count, law) for count in numbers},
            },
            "results": results,
        }
    text = json.dumps(record, indent=2)
    print(text) if as_json else show(title(record), tables(record), notes(record))
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "parscale.json").write_text(text + "\n")
        page(record, Path(out) / "parscale.html")
    return record


# ---------------------------------------------------------------- what is measured


def measure(
    models: dict[int, Any],
    scaled: dict[int, Any],
    tokenizer: Any,
    prompts: np.ndarray,
    tokens: int,
    repeats: int,
    tell: Callable[[str], object] = lambda message: None,
) -> list[dict[str, Any]]:
    """Time each model at one batch size, all interleaved: reading the prompts, decoding, and its matrix products alone.

    Args:
        models: by number of replicas, 1 first.
        scaled: for each number above 1 the model of equal loss.
        prompts: ids ``(batch, prompt)``.
        tokens: that one round decodes; the next round goes on where it ended.
        repeats: rounds that count.
    """
    from heddle.jax.generation import Generation

    def begin(model: Any, more: int) -> Generation:
        return Generation(model, tokenizer, prompts.tolist(), max_tokens=more, stop_ids=())

    contenders = {f"P={count}": model for count, model in models.items()}
    contenders |= {f"P={count}, deeper": model for count, model in scaled.items()}
    runs = {name: begin(model, 1 + tokens * (repeats + 1)) for name, model in contenders.items()}
    steps: dict[str, Callable[[int], object]] = {}
    for name, model in contenders.items():
        steps[f"{name}: decode"] = lambda _, run=runs[name]: run.advance(tokens)
        steps[f"{name}: prefill"] = lambda _, model=model: begin(model, 1)
    for count, model in models.items():
        steps[f"P={count}: products"] = _products(model, count, len(prompts), tokens)
    timings = interleave(steps, repeats, tell=tell)

    def cost(name: str) -> dict[str, Any]:
        cache: Any = runs[name]._state.cache
        return {
            "decode_s": timings[f"{name}: decode"].median / tokens,
            "decode_quartiles_s": [q / tokens for q in timings[f"{name}: decode"].quartiles],
            "prefill_s": timings[f"{name}: prefill"].median,
            "weight_bytes": _bytes(contenders[name]),
            "cache_bytes": sum(x.nbytes for x in (*cache.keys, *cache.values)),
        }

    results = []
    for count, model in models.items():
        result = {"batch": len(prompts), "replicas": count, **cost(f"P={count}")}
        result["products_s"] = timings[f"P={count}: products"].median / tokens
        if count in scaled:
            layers = scaled[count].config.num_hidden_layers
            times = layers / model.config.num_hidden_layers
            result["deeper"] = {"layers": layers, "parameters": times, **cost(f"P={count}, deeper")}
        results.append(result)
    return results


def _products(model: Any, replicas: int, batch: int, tokens: int) -> Callable[[int], object]:
    """Only the matrix products that decoding a token takes, so many tokens over: the lower bound on this machine."""
    import jax
    import jax.numpy as jnp

    config = model.config
    leaves, structure = jax.tree.flatten(model)

    def token(model, x):
        start = x
        for layer in model.layers:
            attention, ffn = layer.attention, layer.ffn
            query = x @ attention.q.weight[...]
            out = query @ attention.o.weight[...] + ffn.down(ffn.gate(x) * ffn.up(x))
            if attention.replicas is not None and attention.replicas.cross_proj is not None:
                out += attention.replicas.cross_proj(query)
            if layer.cross is not None:
                out += layer.cross.o(layer.cross.q(x))
                out += jnp.sum(layer.cross.k(x) + layer.cross.v(x), axis=-1, keepdims=True)
            out += jnp.sum(x @ attention.k.weight[...] + x @ attention.v.weight[...], axis=-1, keepdims=True)
            x = start + 1e-6 * jnp.tanh(out)  # each depends on the last, and stays small
        rows = x[:batch]
        if model.aggregate is not None:
            features = x.reshape(replicas, batch, -1).swapaxes(0, 1).reshape(batch, -1)
            rows = rows + 1e-6 * jnp.sum(model.aggregate.up(model.aggregate.down(features)), axis=-1, keepdims=True)
        logits = model.head(rows)
        return x + 1e-6 * jnp.tanh(jnp.max(logits))

    @jax.jit
    def many(leaves, x):
        model = jax.tree.unflatten(structure, leaves)
        return jax.lax.fori_loop(0, tokens, lambda _, x: token(model, x), x)

    x = jnp.full((replicas * batch, config.hidden_size), 0.1, model.dtype)
    return lambda _: jax.block_until_ready(many(leaves, x))


def _load(name: str | None, replicas: int, cross_attn: str) -> Any:
    from flax import nnx

    from heddle.jax import Transformer

    if replicas == 1:
        return Transformer.from_pretrained(name, dtype="float32")
    mode = {} if cross_attn == "none" else {"enable_cross_attn": True, "parscale_cross_attn_mode": cross_attn}
    return Transformer.from_pretrained(name, dtype="float32", parscale_n=replicas, rngs=nnx.Rngs(0), **mode)


def _deeper(base: Any, times: float) -> Any:
    """A model with so many times the layers, which are the base's again and again: times don't depend on the values."""
    import jax
    from flax import nnx

    from heddle.jax import Transformer
    from heddle.jax.parallel import dotted

    count = base.config.num_hidden_layers
    config = replace(base.config, num_hidden_layers=round(count * times), sliding_window=None, layer_types=None)
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=base.dtype))
    paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
    held = {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(base)}

    def of_base(name: str) -> str:
        return re.sub(r"^layers\.(\d+)", lambda found: f"layers.{int(found[1]) % count}", name)

    # Copies: a small array that is read twice would come from the processor's cache.
    return jax.tree.unflatten(structure, [held[of_base(dotted(path))].copy() for path, _ in paths])


def _bytes(model: Any) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


def _layer_parameters(model: Any) -> int:
    import jax

    return sum(int(leaf.size) for leaf in jax.tree.leaves(model.layers))


# ---------------------------------------------------------------- showing a record


def title(record: dict[str, Any]) -> str:
    """The problem in a line."""
    p = record["problem"]
    across = "" if p["cross_attn"] == "none" else f", cross-attention {p['cross_attn']}"
    return f"ParScale, {p['model']}, {p['dtype']}{across}, {p['prompt_tokens']} tokens in, {p['tokens']} a round"


def tables(record: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of text, for each batch size."""
    return [_table(record, batch) for batch in _batches(record)]


def _batches(record: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(r["batch"] for r in record["results"]))


def _of(record: dict[str, Any], batch: int) -> Iterator[dict[str, Any]]:
    return (r for r in record["results"] if r["batch"] == batch)


def _memory(cost: dict[str, Any]) -> int:
    return cost["weight_bytes"] + cost["cache_bytes"]


def _table(record: dict[str, Any], batch: int) -> tuple[list[str], list[list[str]]]:
    one, weights = next(_of(record, batch)), record["problem"]["weight_bytes"]
    header = [f"batch {batch}", "ms/token", "× P=1", "products, ms", "of it", "prefill × P=1", "MiB", "more, of model"]
    header += ["deeper: layers", "ms/token", "MiB"]
    rows = []
    for r in _of(record, batch):
        row = [f"P = {r['replicas']}", f"{1e3 * r['decode_s']:.1f}", f"{r['decode_s'] / one['decode_s']:.2f}"]
        row += [f"{1e3 * r['products_s']:.1f}", f"{r['products_s'] / r['decode_s']:.2f}"]
        row += [f"{r['prefill_s'] / one['prefill_s']:.2f}", f"{_memory(r) / 2**20:,.0f}"]
        row += [f"{100 * (_memory(r) - _memory(one)) / weights:.1f} %"]
        deeper = r.get("deeper")
        rest = ["", "", ""]
        if deeper is not None:
            rest = [str(deeper["layers"]), f"{1e3 * deeper['decode_s']:.1f}", f"{_memory(deeper) / 2**20:,.0f}"]
        rows.append(row + rest)
    return header, rows


def notes(record: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know."""
    p, m = record["problem"], record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    c, losses = LAWS[p["law"]], ", ".join(f"P={count} {value:.3f}" for count, value in p["law_loss"].items())
    return [
        "products: the matrix products of a token alone, in the same rounds, the head's once. MiB: the weights and the "
        "cache as they are held. more: than P = 1, as a share of its weights.",
        f"deeper: the model of equal loss without replicas, of k ln P + 1 times the layers, by the law "
        f"L = (A/(N(k ln P + 1)))^α + E with {p['law']}'s E {c['E']}, A {c['A']:.4g}, k {c['k']}, α {c['alpha']}; for "
        f"the layers of this model it says {losses}",
        f"medians of {p['repeats']} interleaved rounds; {m['processor']}, {m['cores']} cores; Python {m['python']}, "
        f"{versions}; {m['date']}",
    ]


def page(record: dict[str, Any], path: Path) -> None:
    """Write the Plotly page: time and memory against P, for each batch size, beside the deeper model."""
    import html

    from heddle import plot

    pictures = []
    for heading, unit, value in (
        ("Time of a token", "milliseconds", lambda cost: 1e3 * cost["decode_s"]),
        ("Weights and cache", "MiB", lambda cost: _memory(cost) / 2**20),
    ):
        series, dashed = {}, []
        for batch in _batches(record):
            results = list(_of(record, batch))
            counts = [r["replicas"] for r in results]
            series[f"batch {batch}"] = (counts, [value(r) for r in results])
            if any("deeper" in r for r in results):
                dashed.append(f"batch {batch}, deeper model")
                series[dashed[-1]] = (counts, [value(r.get("deeper", r)) for r in results])
        pictures.append(
            plot.lines(series, title=heading, x="replicas (or the loss of so many)", y=unit, log_x=True, dashed=dashed)
        )
    said = [f'<p class="note">{html.escape(line)}</p>' for line in notes(record)]
    command = f"<pre>{html.escape(record['command'])}</pre>"
    plot.page(path, "ParScale", [f"<p>{html.escape(title(record))}</p>", *pictures, *said, command])
