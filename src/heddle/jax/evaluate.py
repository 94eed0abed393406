"""How well a model predicts a corpus, by how much it has read: bits a token and a byte by context length."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from heddle.attention.arrays import Array
from heddle.data.corpora import open_corpus
from heddle.data.tokenizers import Tokenizer

from .model import LanguageModel
from .terminal import load


class Bits(NamedTuple):
    """What the tokens cost that stand after ``begin`` to ``end - 1`` others of their document's window."""

    begin: int
    end: int
    tokens: int
    bits_per_token: float
    bits_per_byte: float  #: with the bytes of a token that all windows have on average


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    seq_len: int = 1024,
    batch: int = 4,
    max_windows: int | None = None,
    report: Callable[[int], None] = lambda windows: None,
) -> list[Bits]:
    """The cost of each token given those before it in a window of one document, by the number of those.

    Documents are cut into windows of ``seq_len + 1`` tokens that follow one another and share no predicted token; a
    rest that is shorter is left out, so that every context length is measured on the same windows.

    Args:
        model: whose logits count, computed in float32.
        tokenizer: of the model.
        documents: texts.
        seq_len: tokens predicted in a window.
        batch: windows of one forward pass.
        max_windows: how many windows, at most; None: all.
        report: called with the number of windows done, after each batch.

    Returns:
        For contexts of 1, of 2 to 3, 4 to 7 ... tokens, and last for all of them.

    Raises:
        ValueError: no document of ``seq_len + 1`` tokens, sizes that aren't positive, a window longer than the model's
            context.
    """
    context = model.config.max_position_embeddings
    for name, value in (("seq_len", seq_len), ("batch", batch), ("max_windows", max_windows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if seq_len > context:
        raise ValueError(f"seq_len must be at most the model's context of {context} tokens, got {seq_len}")
    leaves, structure = jax.tree.flatten(model)

    @jax.jit
    def cost(leaves: Sequence[Array], rows: Array) -> Array:
        logits = jax.tree.unflatten(structure, leaves)(rows[:, :-1]).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - picked) / math.log(2)

    total, size, windows = np.zeros(seq_len), 0, 0
    for rows in _batches(_windows(tokenizer, documents, seq_len), batch, max_windows):
        filled = np.pad(rows, ((0, batch - len(rows)), (0, 0)))  # one compilation
        total += np.asarray(cost(leaves, filled), np.float64)[: len(rows)].sum(axis=0)
        size += sum(len(tokenizer.decode(row[1:].tolist(), skip_special=False).encode()) for row in rows)
        windows += len(rows)
        report(windows)
    if not windows:
        raise ValueError(f"documents must hold one of at least {seq_len + 1} tokens, got none")

    bounds = [1]
    while bounds[-1] <= seq_len:
        bounds.append(2 * bounds[-1])
    ranges = [(begin, min(end, seq_len + 1)) for begin, end in pairwise(bounds)]

    def bits(begin: int, end: int) -> Bits:
        count = windows * (end - begin)
        spent = float(total[begin - 1 : end - 1].sum()) / count  # the first prediction has a context of one token
        return Bits(begin, end, count, spent, spent * windows * seq_len / size)

    return [bits(*each) for each in [*ranges, (1, seq_len + 1)]]


def show(
    models: Sequence[str],
    corpus: str,
    *,
    held_out: float = 0.02,
    field: str = "text",
    seq_len: int = 1024,
    batch: int = 4,
    max_windows: int | None = None,
    dtype: str = "auto",
    as_json: bool = False,
    out: str | Path | None = None,
) -> None:
    """:func:`evaluate` models on the held-out part of a corpus, and print a table or JSON; with ``out`` draw a page."""
    text = open_corpus(corpus, part="held_out" if held_out else "all", held_out=held_out, field=field)
    names = [Path(name).parent.name if Path(name).name == "model" else name for name in models]
    found: dict[str, list[Bits]] = {}
    for name, where in zip(names, models, strict=True):
        model, tokenizer = load(where, dtype)
        with Console(stderr=True).status(f"{name}") as status:
            found[name] = evaluate(
                model, tokenizer, (document for _, document, _ in text(0, None)), seq_len=seq_len, batch=batch,
                max_windows=max_windows, report=lambda n, name=name: status.update(f"{name}: {n} windows"),
            )  # fmt: skip
    record = {"corpus": corpus, "held_out": held_out, "seq_len": seq_len}
    record |= {"models": {name: [bits._asdict() for bits in each] for name, each in found.items()}}
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        drawn = Table("tokens of context", *found, title="Bits a byte", box=box.SIMPLE_HEAD)
        for parts in zip(*found.values(), strict=True):
            label = f"{parts[0].begin} to {parts[0].end - 1}"
            drawn.add_row(label, *(f"{bits.bits_per_byte:.3f}" for bits in parts))
        Console().print(drawn)
    if out is not None:
        from heddle import plot

        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        curves = {
            name: ([b.begin for b in each[:-1]], [b.bits_per_byte for b in each[:-1]]) for name, each in found.items()
        }
        picture = plot.lines(
            curves, title="Bits a byte by context", x="tokens of context, from", y="bits a byte", log_x=True
        )
        plot.page(folder / "evaluate.html", "Evaluation", [picture])
        picture.png(folder / "evaluate.png")
        (folder / "evaluate.json").write_text(json.dumps(record, indent=2) + "\n")


def _windows(tokenizer: Tokenizer, documents: Iterable[str], seq_len: int) -> Any:
    for text in documents:
        ids = np.asarray(tokenizer.encode(text), np.int32)
        for begin in range(0, len(ids) - seq_len, seq_len):
            yield ids[begin : begin + seq_len + 1]


def _batches(windows: Iterable[np.ndarray], batch: int, at_most: int | None) -> Any:
    rows: list[np.ndarray] = []
    for number, window in enumerate(windows):
        if number == at_most:
            break
        rows.append(window)
        if len(rows) == batch:
            yield np.stack(rows)
            rows = []
    if rows:
        yield np.stack(rows)
