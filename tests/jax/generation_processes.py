"""Greedy and sampled tokens of a model, on one device or over 8 of all processes; the first writes them down.

Not collected by name: test_processes.py runs it.
"""

import json
import sys
from pathlib import Path


def main(folder: str, out: str) -> None:
    from heddle.jax.parallel import initialize, make_mesh

    initialize()
    import jax  # after it has joined the others

    from heddle.data.tokenizers import Tokenizer
    from heddle.jax import Transformer, generate, sampler

    mesh = make_mesh(data=2, fsdp=2, tensor=2) if len(jax.devices()) == 8 else None
    model = Transformer.from_pretrained(folder, mesh=mesh)
    prompts = ["the cat", "a dog sat on the mat", "x", "two words"]
    options = {"max_tokens": 12, "stop_ids": (), "logprobs": 2}
    found = generate(model, Tokenizer.bytes(), prompts, **options)
    found += generate(model, Tokenizer.bytes(), prompts, sampler=sampler(0.9, top_k=20), seed=3, **options)
    if not jax.process_index():
        Path(out).write_text(json.dumps([completion.tokens for completion in found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
