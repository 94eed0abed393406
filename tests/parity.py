"""The table of docs/parity.md: how far logits are from transformers', by family and rotary rule.

python tests/parity.py docs/parity.md
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import jax
import numpy as np
import tiny_models
import torch
import transformers

from heddle.bench.timing import machine
from heddle.data.tokenizers import Tokenizer
from heddle.jax import Transformer
from heddle.plot import write_beside

CUT = 29  #: tokens read before the others go through the cache one by one

HEADING = """# Parity with transformers

How far the logits of `heddle.jax.Transformer` are from those of transformers, both in float32: for a random model of
each family and rotary rule (two layers, weights fifteen times as large as usual, biases and norms that aren't trivial)
and for the real SmolLM2-135M-Instruct. The first difference is of one forward over all tokens; the second of a forward
over the first {cut} tokens and then one token at a time through the KV cache. The rule `dynamic` depends on how much is
read at once, so there is no one forward to compare that with. The tests ask for 1e-4 of the random models. SmolLM2's
logits go up to 42: there transformers' own float32 is as far from its float64, with which the quickstart compares ours.

```sh
python tests/parity.py docs/parity.md
```

On {cpu}, {cores} cores; Python {python}, {versions}; {date}.

| model | rotary rule | tokens | largest logit | largest difference | with the cache |
| --- | --- | ---: | ---: | ---: | ---: |
"""


def difference(model: transformers.PreTrainedModel, ours: Transformer, ids: np.ndarray) -> tuple[float, float, float]:
    """The largest of their logits, how far ours are, and how far those through the cache are."""
    theirs = tiny_models.logits(model, ids)
    run = jax.jit(lambda model, ids: model(ids))
    step = jax.jit(lambda model, ids, cache: model(ids, cache=cache))
    parts, cache = [], ours.empty_cache(ids.shape[0], ids.shape[1])
    for begin, end in [(0, CUT), *((i, i + 1) for i in range(CUT, ids.shape[1]))]:
        part, cache = step(ours, ids[:, begin:end], cache)
        parts.append(np.asarray(part))
    whole, cut = np.asarray(run(ours, ids)), np.concatenate(parts, axis=1)
    return (float(np.abs(theirs).max()), *(float(np.abs(found - theirs).max()) for found in (whole, cut)))


def row(name: str, model: transformers.PreTrainedModel, ours: Transformer, ids: np.ndarray) -> str:
    rule, figures = ours.config.rotary.rule, difference(model, ours, ids)
    cut = f"{figures[2]:.1e}" if rule != "dynamic" else ""
    return f"| {name} | {rule} | {ids.shape[1]} | {figures[0]:.1f} | {figures[1]:.1e} | {cut} |"


def rows() -> list[str]:
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for name in tiny_models.CASES:
            model = tiny_models.hugging_face(name)
            model.save_pretrained(folder)
            made.append(row(name, model, Transformer.from_pretrained(folder), tiny_models.tokens(2, 64)))
        ours = Transformer.from_pretrained()
        ours.save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        text = Path(__file__).read_text(encoding="utf-8")
        ids = np.asarray([Tokenizer.from_pretrained().encode(text)[:128]], np.int32)
        made.append(row("SmolLM2-135M-Instruct", model, ours, ids))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="the Markdown file")
    here = machine()
    versions = ", ".join(f"{name} {here['versions'][name]}" for name in ("jax", "numpy", "torch", "transformers"))
    text = HEADING.format(
        cut=CUT, cpu=here["processor"], cores=here["cores"], python=here["python"], versions=versions,
        date=here["date"][:10],
    )  # fmt: skip
    text += "\n".join(rows()) + "\n"
    print("wrote", write_beside(parser.parse_args().out, lambda file: file.write(text.encode())))


if __name__ == "__main__":
    main()
