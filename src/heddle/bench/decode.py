"""``heddle bench decode``: tokens a second, beside transformers and beside the memory's speed, in one interleaved run.

Decoding one sequence reads every weight once for each token, so the time to read that many bytes is its lower bound.
"""

from __future__ import annotations

import heapq
import importlib
import inspect
import json
import shlex
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from rich.console import Console

from .model_files import gguf_file, write_folder, write_gguf
from .options import counts
from .tables import show
from .timing import cores, interleave, machine, memory_reader

PEERS = ("transformers", "llama.cpp")
ONE_BY_ONE = {"llama.cpp"}  #: contenders that are measured on one sequence alone


@runtime_checkable
class Contender(Protocol):
    """Continues prompts, greedily and without end: ``(batch, prompt)`` ids and a number to ``(batch, number)`` ids."""

    def __call__(self, prompts: np.ndarray, tokens: int) -> np.ndarray: ...


def measure(
    contenders: dict[str, Contender],
    prompts: Sequence[np.ndarray],
    tokens: int,
    weight_bytes: int,
    repeats: int,
    tell: Callable[[str], object] = lambda message: None,
) -> dict[str, Any]:
    """Time each contender on the first token and on all; the memory's read bandwidth in between.

    Args:
        contenders: by name, ours first: the others' tokens are compared with its.
        prompts: ids ``(batch, prompt)`` of each batch size to measure.
        tokens: to generate.
        weight_bytes: read for each token.
        repeats: rounds that count.

    Returns:
        ``bandwidth``, bytes a second; ``roofline``, tokens a second of one sequence; and ``results``, for each batch
        and contender its tokens a second over all (``total``) and after the first (``decode``), of the whole batch.
    """
    produced: dict[tuple[str, int], np.ndarray] = {}
    steps: dict[str, Callable[[int], object]] = {}
    pairs = [(ids, name) for ids in prompts for name in contenders if len(ids) == 1 or name not in ONE_BY_ONE]
    for ids, name in pairs:
        contender = contenders[name]

        def whole(_: int, name: str = name, contender: Contender = contender, ids: np.ndarray = ids) -> None:
            produced[name, len(ids)] = contender(ids, tokens)

        steps[f"{name}, batch {len(ids)}"] = whole
        steps[f"{name}, batch {len(ids)}, first token"] = lambda _, contender=contender, ids=ids: contender(ids, 1)
    steps["bandwidth"] = memory_reader(weight_bytes)
    timings = interleave(steps, repeats, tell=tell)

    ours = next(iter(contenders))
    bandwidth = weight_bytes / timings["bandwidth"].median
    roofline = bandwidth / weight_bytes
    results = []
    for ids, name in pairs:
        batch = len(ids)
        total = timings[f"{name}, batch {batch}"].median
        start = timings[f"{name}, batch {batch}, first token"].median
        decode = batch * (tokens - 1) / (total - start)
        results.append(
            {
                "name": name,
                "batch": batch,
                "first_token_s": start,
                "total_tokens_per_s": batch * tokens / total,
                "decode_tokens_per_s": decode,
                "roofline_share": decode / batch / roofline,
                "same_tokens": _agreement(produced[ours, batch], produced[name, batch]),
                "repeats": repeats,
            }
        )
    return {"bandwidth": bandwidth, "roofline_tokens_per_s": roofline, "results": results}


def _agreement(ours: np.ndarray, theirs: np.ndarray) -> int:
    """How many tokens are the same before the first difference, in the sequence where that comes first."""
    same = np.cumprod(ours == theirs, axis=1)
    return int(same.sum(axis=1).min())


def run(
    model: str | None = None,
    *,
    batch: str = "1",
    prompt_tokens: int = 128,
    tokens: int = 128,
    peers: str = "all",
    repeats: int = 5,
    as_json: bool = False,
    out: str | Path | None = None,
    command: Sequence[str] = ("heddle", "bench", "decode"),
) -> dict[str, Any]:
    """Load a model in float32, measure it and its peers, print a table (or JSON); with ``out`` write JSON there.

    Raises:
        ValueError: options that can't be, by the option's name.
    """
    for option, value, least in (
        ("prompt-tokens", prompt_tokens, 1), ("tokens", tokens, 2), ("repeats", repeats, 1),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"--{option} must be at least {least}, got {value}")
    chosen = PEERS if peers == "all" else () if peers == "none" else tuple(peers.split(","))
    if unknown := set(chosen) - set(PEERS):
        raise ValueError(f"--peers must be all, none or of {', '.join(PEERS)}; got {', '.join(sorted(unknown))}")
    batches = counts("batch", batch)
    from heddle.data.tokenizers import Tokenizer
    from heddle.jax import Transformer

    with Console(stderr=True).status("loading") as status:
        transformer = Transformer.from_pretrained(model, dtype="float32")
        tokenizer = Tokenizer.from_pretrained(model)
        context = transformer.config.max_position_embeddings
        if prompt_tokens + tokens > context:
            raise ValueError(
                f"--prompt-tokens and --tokens must fit in the context of {context}, got {prompt_tokens} and {tokens}"
            )
        contenders: dict[str, Contender] = {"heddle": _heddle(transformer, tokenizer)}
        absent = {}
        if "transformers" in chosen:
            contenders["transformers"] = _transformers(transformer, tokenizer)
        if "llama.cpp" in chosen:
            try:
                contenders["llama.cpp"] = _llama_cpp(gguf_file(model), prompt_tokens + tokens)
            except (ImportError, ValueError) as error:
                absent["llama.cpp"] = str(error)
        record = {
            "benchmark": "decode",
            "command": shlex.join(command),
            "machine": machine(),
            "problem": {
                "model": model or "SmolLM2-135M-Instruct",
                "dtype": "float32",
                "prompt_tokens": prompt_tokens,
                "tokens": tokens,
                "weight_bytes": weights_read(transformer),
            },
            "not_run": absent,
        }
        prompts = [text_prompts(tokenizer, size, prompt_tokens) for size in batches]
        record |= measure(contenders, prompts, tokens, weights_read(transformer), repeats, status.update)
    text = json.dumps(record, indent=2)
    print(text) if as_json else show(title(record), tables(record), notes(record))
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "decode.json").write_text(text + "\n")
    return record


def weights_read(model: Any) -> int:
    """What one token reads: all weights, but of an embedding apart from the head one row."""
    import jax

    unread = 0 if model.embedding is None else model.embedding.nbytes
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model)) - unread


def text_prompts(tokenizer: Any, batch: int, length: int) -> np.ndarray:
    """The beginnings of one text, each a few tokens further on."""
    ids = tokenizer.encode(inspect.getsource(heapq))
    ids = np.resize(ids, length + 7 * batch)
    return np.stack([ids[7 * row : 7 * row + length] for row in range(batch)])


def _heddle(model: Any, tokenizer: Any) -> Contender:
    from heddle.jax import generate

    def contender(prompts: np.ndarray, tokens: int) -> np.ndarray:
        completions = generate(model, tokenizer, prompts.tolist(), max_tokens=tokens, stop_ids=())
        return np.asarray([completion.tokens for completion in completions])

    return contender


def _transformers(model: Any, tokenizer: Any) -> Contender:
    """transformers' ``generate`` on the same weights, through a folder, with a thread for each core."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_folder(model, tokenizer, Path(folder) / "model")
        peer: Any = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    peer.generation_config.pad_token_id = 0

    def contender(prompts: np.ndarray, tokens: int) -> np.ndarray:
        ids = torch.from_numpy(prompts)
        with torch.inference_mode():
            out = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return out[:, ids.shape[1] :].numpy()

    return contender


def _llama_cpp(path: Path, context: int) -> Contender:
    """llama.cpp through llama-cpp-python, on the same GGUF file with its tensors in float32.

    Raises:
        ImportError: it isn't installed.
    """
    try:
        llama: Any = importlib.import_module("llama_cpp")
    except ImportError:
        raise ImportError("llama-cpp-python isn't installed") from None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "float32.gguf"
        write_gguf(path, file)
        threads = {"n_threads": cores(), "n_threads_batch": cores()}
        peer = llama.Llama(str(file), n_ctx=context, use_mmap=False, verbose=False, **threads)

    def contender(prompts: np.ndarray, tokens: int) -> np.ndarray:
        peer.reset()  # else it would find the prompt in its cache
        return np.array([[*islice(peer.generate(prompts[0].tolist(), temp=0.0), tokens)]])

    return contender


def title(record: dict[str, Any]) -> str:
    """The problem in a line."""
    p = record["problem"]
    return f"{p['model']}, {p['dtype']}, {p['prompt_tokens']} tokens in, {p['tokens']} out"


def tables(record: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of text."""
    first, ours, rows = {}, {}, []
    for r in record["results"]:
        speed = r["decode_tokens_per_s"]
        row = [r["name"], str(r["batch"]), f"{r['first_token_s']:.3f}", f"{r['total_tokens_per_s']:.1f}"]
        row += [f"{speed:.1f}", f"{speed / first.setdefault(r['name'], speed):.2f}×", f"{r['roofline_share']:.2f}"]
        row += [
            f"{ours.setdefault(r['batch'], speed) / speed:.2f}×",
            f"{r['same_tokens']}/{record['problem']['tokens']}",
        ]
        rows.append(row)
    of = f"of batch {record['results'][0]['batch']}"
    header = [
        "",
        "batch",
        "first token, s",
        "tokens/s",
        "after the first",
        of,
        "of roofline",
        "heddle is",
        "same tokens",
    ]
    return [(header, rows)]


def notes(record: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know."""
    p, m = record["problem"], record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return [
        f"roofline: {p['weight_bytes'] / 1e6:.0f} MB of weights a step at {record['bandwidth'] / 1e9:.1f} GB/s, "
        f"measured in the same rounds: {record['roofline_tokens_per_s']:.1f} steps/s",
        f"medians of {record['results'][0]['repeats']} interleaved rounds; {m['processor']}, {m['cores']} cores; "
        f"Python {m['python']}, {versions}; {m['date']}",
        *(f"{name} did not run: {why}" for name, why in record["not_run"].items()),
    ]
