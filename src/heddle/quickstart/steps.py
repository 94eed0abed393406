"""The quickstart's steps; each shows its progress, adds to the report, and says in a line what came of it."""

from __future__ import annotations

import html
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import heddle
from heddle import plot
from heddle.bench.timing import interleave, memory_reader
from heddle.config import load_config

from .display import Display
from .report import Report

QUESTION = "What is the capital of France? Why is it famous?"


def answer(report: Report, display: Display, fast: bool, summary: list[str]) -> tuple[Any, Any]:
    """(a) The embedded SmolLM2 answers, greedily, a token at a time."""
    import jax

    from heddle.data.tokenizers import Tokenizer
    from heddle.jax.generation import stream
    from heddle.jax.model import Transformer

    display.show(Text("Loading SmolLM2-135M-Instruct from its GGUF file", style="dim"))
    tokenizer, model = Tokenizer.from_pretrained(), Transformer.from_pretrained()
    weights = jax.tree.leaves(model)
    parameters, size = sum(leaf.size for leaf in weights), sum(leaf.nbytes for leaf in weights)
    prompt = tokenizer.chat([{"role": "user", "content": QUESTION}])
    display.show(Text("Compiling", style="dim"))
    list(stream(model, tokenizer, prompt, max_tokens=2))

    read = memory_reader(size)
    passes = interleave({"read": read}, 3)["read"].seconds
    answer, times = "", [time.perf_counter()]
    for piece in stream(model, tokenizer, prompt, max_tokens=32 if fast else 128):
        answer += piece.text
        times.append(time.perf_counter())
        display.show(Text.assemble((f"{QUESTION}\n", "bold"), answer))
    bandwidth = size / min(passes + interleave({"read": read}, 3)["read"].seconds)

    steps = 1e3 * np.diff(times[1:])  # milliseconds a token, without the first one's prefill
    rate, roofline = 1e3 / float(np.median(steps)), bandwidth / size
    summary.append(f"{rate:.0f} tokens/s, {rate / roofline:.0%} of the memory roofline: {answer.split('. ')[0]}")
    report.numbers["answer"] = {
        "question": QUESTION, "text": answer, "tokens": len(steps) + 1, "parameters": parameters, "weight_bytes": size,
        "tokens_per_second": rate, "first_token_seconds": times[1] - times[0], "read_bytes_per_second": bandwidth,
        "roofline_tokens_per_second": roofline, "roofline_share": rate / roofline,
    }  # fmt: skip
    report.highlights += [
        (f"{rate:.0f}", "tokens/s, SmolLM2-135M"),
        (f"{rate / roofline:.0%}", "of the memory roofline"),
    ]
    report.heading(
        "a",
        "SmolLM2-135M-Instruct, read from the GGUF file that a Python package carries: weights dequantised to "
        f"{model.dtype.name}, tokenizer and chat template from the same file. Decoding is greedy, one token at a time.",
    )
    report.parts.append(f"<pre><b>{html.escape(QUESTION)}</b>\n\n{html.escape(answer)}</pre>")
    report.figures(
        (f"{rate:.1f}", "tokens/s"),
        (f"{rate / roofline:.0%}", f"of the roofline, {roofline:.0f} tokens/s"),
        (f"{times[1] - times[0]:.2f} s", "to the first token"),
        (f"{parameters / 1e6:.1f}M", f"parameters, {size / 2**20:,.0f} MiB"),
    )
    report.note(
        f"Each token reads all weights once, {size / 1e9:.2f} GB; this machine was measured to read "
        f"{bandwidth / 1e9:.1f} GB/s. That many tokens a second is the roofline: with these weights no way of decoding "
        "one sequence is faster."
    )
    count = range(2, len(steps) + 2)
    picture = plot.lines(
        {"measured": (count, steps), "roofline": ([2, len(steps) + 1], [1e3 / roofline] * 2)},
        title="Time of each token",
        x="token of the answer",
        y="milliseconds",
        dashed=["roofline"],
        markers=False,
    )
    report.picture("decoding", picture)
    return model, tokenizer


PASSAGE = (
    "A heddle is the part of a loom that picks which threads are lifted so that the weft can pass. On a simple loom "
    "one heddle lifts every second thread; with several, a weaver says for each pass of the shuttle which threads it "
    "goes under, and a pattern appears. Attention works like this: for each query, some keys are lifted and the others "
    "are not, and what passes through is a weighted sum of their values."
)


def transformers(report: Report, display: Display, model: Any, tokenizer: Any, summary: list[str]) -> None:
    """(b) The same weights as a Hugging Face folder, run by transformers."""
    import jax
    import torch
    import transformers

    folder = report.folder / "smollm2"
    display.show(Text(f"Writing {folder}", style="dim"))
    model.save_pretrained(folder, tokenizer)
    display.show(Text("Loading it with transformers", style="dim"))
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer.encode(PASSAGE)
    display.show(Text("Comparing logits", style="dim"))
    ours = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jax.numpy.asarray([tokens])))[0]
    with torch.inference_mode():
        logits = theirs(torch.tensor([tokens])).logits[0].numpy()

    apart = np.abs(ours.astype(np.float64) - logits).max(axis=1)
    same = int((ours.argmax(axis=1) == logits.argmax(axis=1)).sum())
    largest, scale = float(apart.max()), float(np.abs(logits).max())
    summary.append(f"largest logit difference {largest:.1e} over {len(tokens)} tokens (logits up to {scale:.0f})")
    report.numbers["transformers"] = {
        "version": transformers.__version__, "tokens": len(tokens), "largest_logit_difference": largest,
        "largest_logit": scale, "same_next_token": same, "folder": str(folder),
    }  # fmt: skip
    report.highlights.append((f"{largest:.0e}", "largest logit difference to transformers"))
    report.heading(
        "b",
        f"The weights were saved as a Hugging Face folder (<code>{html.escape(str(folder))}</code>), which "
        f"transformers {html.escape(transformers.__version__)} loaded and ran in PyTorch. Both read the same passage.",
    )
    report.figures(
        (f"{largest:.1e}", "largest difference of any logit"),
        (f"{scale:.1f}", "largest logit"),
        (f"{same} of {len(tokens)}", "places with the same likeliest next token"),
    )
    picture = plot.lines(
        {"difference": (range(len(tokens)), apart)},
        title="Largest logit difference, Heddle against transformers",
        x="position in the passage",
        y="absolute difference",
        log_y=bool((apart > 0).all()),
        markers=False,
    )
    report.picture("transformers", picture)


def pack(report: Report, display: Display, tokenizer: Any, fast: bool, summary: list[str]) -> None:
    """(c) The standard library as packed rows, and what one batch's mask looks like."""
    from heddle import Mask
    from heddle.data.corpora import open_corpus, tokenized
    from heddle.data.packing import Batch, Packer
    from heddle.mask_picture import Drawn, picture

    row_len, rows = 8192, 4
    documents: list[np.ndarray] = []
    for document, _ in tokenized(open_corpus("stdlib", seed=0), tokenizer)(0, None):
        documents.append(document)
        if len(documents) % 8 == 0:
            display.show(Text(f"{len(documents)} files read as tokens", style="dim"))
        if fast and len(documents) == 160:
            break
    display.show(Text("Packing", style="dim"))
    packer = Packer(lambda epoch, cursor: ((d, i) for i, d in enumerate(documents)), row_len, rows, epochs=1)
    batches = list(packer)
    packed = Batch(*(np.concatenate(field) for field in zip(*batches, strict=True)))
    lengths = np.array([len(document) for document in documents])
    shown = max(batches, key=lambda batch: int(batch.segment_ids.max(axis=1).sum()))
    mask = Mask.documents(packed.segment_ids)
    density = mask.visible() / (len(packed.tokens) * row_len * (row_len + 1) / 2)

    summary.append(
        f"{len(documents)} files, {lengths.sum():,} tokens in {len(packed.tokens)} rows of {row_len:,}: "
        f"{packed.used():.2%} of places used"
    )
    report.numbers["packing"] = {
        "documents": len(documents), "tokens": int(lengths.sum()), "rows": len(packed.tokens), "row_len": row_len,
        "used": packed.used(), "visible_share_of_causal": density,
    }  # fmt: skip
    report.highlights.append((f"{packed.used():.1%}", "of places used by packing"))
    report.heading(
        "c",
        "The corpus is this Python's own standard library: real files, of every length. They are packed into rows of "
        f"{row_len:,} tokens, best fit first; longer files are cut. A token sees the past of its own file only.",
    )
    report.figures(
        (f"{packed.used():.2%}", "of places used"),
        (f"{len(documents)}", f"files, {lengths.sum() / 1e6:.2f}M tokens"),
        (f"{len(packed.tokens)}", f"rows of {row_len:,}"),
        (f"{density:.0%}", "of the pairs that plain causal rows would compute"),
    )
    edges = 2 ** np.arange(int(np.log2(lengths.min())), int(np.log2(lengths.max())) + 2)
    counts, _ = np.histogram(lengths, edges)
    names = [plot.short(int(edge)) for edge in edges[:-1]]
    bars = plot.bars(
        {"files": counts}, categories=names, title="How long the files are", x="tokens, up to twice as many", y="files"
    )
    report.picture("lengths", bars)
    drawn = Drawn(Mask.documents(shown.segment_ids), row_len, "The mask of one batch", shown.segment_ids)
    report.picture("mask", picture(drawn, 256, 256))
    report.note("Of the batches, this is the one with the most files in its rows. Full tiles need no elementwise test.")


#: What --fast changes of configs/quickstart.yaml.
FAST = (
    "training.max_steps=30", "training.warmup_steps=5", "training.batch_size=4", "training.eval_every=15",
    "training.eval_batches=1", "training.checkpoint_every=0", "data.window=200_000",
)  # fmt: skip


#: Over configs/quickstart.yaml's data: two replicas of SmolLM2 that see each other, of which only what is new learns.
PARSCALE = (
    "framework=torch", "data.tokenizer=null", "data.seq_len=128", "data.window=null", "training.trainable=new",
    "training.max_steps=12", "training.batch_size=2", "training.learning_rate=5e-4", "training.schedule=constant",
    "training.warmup_steps=4", "training.eval_every=3", "training.eval_first=true", "training.eval_batches=2",
    "training.checkpoint_every=0", "parscale.parscale_n=2", "parscale.enable_cross_attn=true",
)  # fmt: skip
#: Four steps, of as many tokens as the long tour's: fewer tokens a step are noise, which a high rate learns by heart.
FAST_PARSCALE = (
    "data.seq_len=64", "training.batch_size=4", "training.max_steps=4", "training.learning_rate=3e-4",
    "training.warmup_steps=2", "training.eval_every=4", "training.eval_batches=1", "data.window=20_000",
)  # fmt: skip


def parscale(report: Report, display: Display, fast: bool, summary: list[str]) -> None:
    """(e) ParScale: the same SmolLM2 twice, side by side, looking at each other; only the new parameters train."""
    from transformers.utils import logging

    from heddle.torch import run

    logging.set_verbosity_error()  # or it lists what is new in the model; the report counts it
    logging.disable_progress_bar()
    folder = report.folder / "parscale"
    if folder.exists():
        shutil.rmtree(folder)
    base = report.folder / "smollm2"
    overrides = [f"output={folder}", f"training.base_model={base}", *PARSCALE, *(FAST_PARSCALE if fast else ())]
    config = load_config(None, overrides)
    display.show(Text("Loading SmolLM2 as two replicas", style="dim"))
    losses: list[tuple[int, float]] = []
    held_out: list[tuple[int, float]] = []

    def watch(record: dict[str, Any]) -> None:
        if "eval_loss" in record:
            held_out.append((record["step"], record["eval_loss"]))
        else:
            losses.append((record["step"], record["loss"]))
        told = f"step {record['step']} of {config.training.max_steps}: held out {held_out[-1][1]:.3f}"
        display.show(Text(told + (f", loss {losses[-1][1]:.3f}" if losses else "")))

    trainer = run.run(config, watch)
    if trainer.stopped_by is not None:
        raise KeyboardInterrupt
    new = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    share = new / sum(p.numel() for p in trainer.model.parameters())
    (_, first), (steps, last) = held_out[0], held_out[-1]
    summary.append(
        f"{new / 1e6:.1f}M new parameters ({share:.0%}), held-out loss {first:.3f} to {last:.3f} nats a token in "
        f"{steps} steps"
    )
    report.numbers["parscale"] = {
        "replicas": config.parscale.parscale_n, "steps": steps, "new_parameters": new, "new_share": share,
        "held_out": held_out, "losses": losses, "folder": str(folder),
    }  # fmt: skip
    report.heading(
        "e",
        "SmolLM2 once more, in PyTorch, as two replicas side by side (ParScale): each has a learned prefix in every "
        "layer, each token looks at its twin in the other replica, and their sum, by learned weights, is the answer. "
        "The model itself is frozen; only what is new learns, on the library, with document masks.",
    )
    report.figures(
        (f"{first:.3f}", "nats a held-out token before the first step"),
        (f"{last:.3f}", f"after {steps} steps"),
        (f"{new / 1e6:.1f}M", f"new parameters, {share:.0%} of the model"),
    )
    curves = {
        name: ([step for step, _ in points], [loss for _, loss in points])
        for name, points in (("training", losses), ("held out", held_out))
    }
    report.picture("parscale", plot.lines(curves, title="Loss of two replicas", x="step", y="nats a token"))


def train(report: Report, display: Display, fast: bool, summary: list[str]) -> None:
    """(d) A small Llama over bytes, trained on the packed library with document masks."""
    import jax

    from heddle.data.tokenizers import Tokenizer
    from heddle.jax import run
    from heddle.jax.generation import generate
    from heddle.jax.sampling import sampler

    folder = report.folder / "training"
    if folder.exists():  # an earlier quickstart's run, which would only be gone on with
        shutil.rmtree(folder)
    overrides = [f"output={folder}", *(FAST if fast else ())]
    config = load_config(_config(), overrides)
    steps = config.training.max_steps
    losses: list[tuple[int, float]] = []
    held_out: list[tuple[int, float]] = []
    rates: list[float] = []
    bar = Progress(
        BarColumn(40), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), auto_refresh=False
    )
    task = bar.add_task("compiling", total=steps)
    display.show(Group(Text("Reading the library and compiling the step", style="dim")))

    def watch(record: dict[str, Any]) -> None:
        if "eval_loss" in record:
            held_out.append((record["step"], record["eval_loss"]))
            return
        losses.append((record["step"], record["loss"]))
        rates.append(record["tokens_per_second"])
        told = f"loss {record['loss']:.3f}" + (f", held out {held_out[-1][1]:.3f}" if held_out else "")
        told += f", {np.median(rates[-20:]):,.0f} tokens/s"
        bar.update(task, completed=record["step"], description=told)
        display.show(Group(bar, Text(_sparkline([loss for _, loss in losses]), style="cyan")))
        if record["step"] % max(1, steps // 10) == 0:
            display.log(f"step {record['step']} of {steps}: {told}")

    trainer = run.run(config, watch)
    if trainer.stopped_by is not None:
        raise KeyboardInterrupt
    display.show(Text("Writing a sample", style="dim"))
    prompt = "def "
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    choose = sampler(temperature=0.8)
    sample = generate(trainer.model, tokenizer, prompt, max_tokens=64 if fast else 400, sampler=choose, seed=1)[0].text

    parameters = sum(leaf.size for leaf in jax.tree.leaves(trainer.model))
    final, rate = held_out[-1][1], float(np.median(rates))
    summary.append(f"{steps} steps, held-out loss {final:.3f} nats a byte, {rate:,.0f} tokens/s")
    report.numbers["training"] = {
        "steps": steps, "parameters": parameters, "first_loss": losses[0][1], "last_loss": losses[-1][1],
        "held_out_loss": final, "tokens_per_second": rate, "sample": prompt + sample, "folder": str(folder),
    }  # fmt: skip
    report.highlights.append((f"{final:.2f}", "nats a byte, trained here"))
    data, model = config.data, config.model
    report.heading(
        "d",
        f"A Llama of {model.num_hidden_layers} layers and {model.hidden_size} dimensions over bytes, from random "
        f"weights, on the same library packed into rows of {data.seq_len:,} bytes. Some of its files are held out.",
    )
    report.figures(
        (f"{final:.3f}", f"nats a held-out byte ({final / np.log(2):.2f} bits)"),
        (f"{steps}", f"steps of {config.training.batch_size * data.seq_len:,} tokens"),
        (f"{rate:,.0f}", "tokens/s"),
        (f"{parameters / 1e6:.2f}M", "parameters"),
    )
    uniform = float(np.log(tokenizer.vocab_size))
    curves = {
        "training": tuple(zip(*losses, strict=True)),
        "held out": tuple(zip(*held_out, strict=True)),
        "guessing": ([1, steps], [uniform, uniform]),
    }
    report.picture("loss", plot.lines(curves, title="Loss", x="step", y="nats a byte", dashed=["guessing"]))
    report.parts.append(f"<p>What it writes after <code>{html.escape(prompt)}</code>, sampled:</p>")
    report.parts.append(f"<pre><b>{html.escape(prompt)}</b>{html.escape(sample)}</pre>")


def _config() -> Path:
    """configs/quickstart.yaml, of the checkout or as it is packaged."""
    package = Path(heddle.__file__).parent
    places = [folder / "configs" / "quickstart.yaml" for folder in (package, package.parents[1])]
    return next((place for place in places if place.exists()), places[-1])


def _sparkline(values: list[float], width: int = 60) -> str:
    """The values as a row of blocks, averaged to ``width`` of them."""
    means = [float(np.mean(part)) for part in np.array_split(values, min(width, len(values)))]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / (high - low or 1))] for mean in means)
