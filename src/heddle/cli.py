"""The ``heddle`` command. Each command parses its arguments and calls one function elsewhere."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

app = typer.Typer(name="heddle", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bench = typer.Typer(no_args_is_help=True, help="Measure, beside peers, in one interleaved run.")
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def heddle(
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Structured attention for LLMs, in PyTorch and JAX.

    Example: heddle chat
    """
    if version:
        from heddle import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def mask(
    kind: str | None = typer.Option(None, help="causal, full, window, documents, lengths or prefix-lm."),
    seq: int | None = typer.Option(None, help="Tokens in a row.", show_default="1024, or what --lengths need"),
    documents: int | None = typer.Option(None, help="How many packed documents, cut at random.", show_default="8"),
    lengths: str | None = typer.Option(None, help="The documents' lengths, or each sequence's: 100,300,50."),
    window: int | None = typer.Option(None, help="Keys a query sees, its own among them; also within documents."),
    prefix: int | None = typer.Option(None, help="Tokens that see each other; with --kind window, that all see."),
    padding: int = typer.Option(0, help="Padding tokens at the end."),
    block_q: int | None = typer.Option(None, help="Queries in a tile.", show_default="at most 64 tiles a side"),
    block_k: int | None = typer.Option(None, help="Keys in a tile.", show_default="at most 64 tiles a side"),
    context_parallel: int = typer.Option(1, help="Ranks that share the queries."),
    balance: str = typer.Option("area", help="Which rank holds which queries: area, zigzag or none."),
    chunk: int | None = typer.Option(None, help="Queries --balance area keeps together.", show_default="up to 128"),
    seed: int = typer.Option(0, help="For the documents' lengths."),
    out: str | None = typer.Option(None, help="A directory, a prefix, or one file that ends in .png or .html."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
) -> None:
    """Draw a mask: its tiles, its documents, and who holds what under context parallelism.

    Without --out in the terminal, with it as a picture (PNG) and a page (Plotly).

    Example: heddle mask --seq 4096 --documents 8 --context-parallel 4 --out mask
    """
    from heddle import mask_options, mask_picture

    drawn = mask_options.from_options(
        kind,
        seq=seq,
        documents=documents,
        lengths=mask_options.parse_lengths(lengths),
        window=window,
        prefix=prefix,
        padding=padding,
        context_parallel=context_parallel,
        balanced=balance,
        chunk=chunk,
        seed=seed,
    )
    mask_picture.show(drawn, out, block_q, block_k, as_json=json)


@bench.command("attention")
def bench_attention(
    framework: str = typer.Option("both", help="torch, jax or both."),
    batch: int = typer.Option(1, help="Sequences."),
    seq: str = typer.Option("4096", help="Tokens of a sequence; several, as in 4096,8192, are measured in turn."),
    heads: int = typer.Option(8, help="Query heads."),
    kv_heads: int | None = typer.Option(None, help="Key and value heads.", show_default="as many as --heads"),
    head_dim: int = typer.Option(64, help="Elements of a head."),
    documents: int = typer.Option(8, help="Packed documents a sequence, cut at random; 1 is plain causal."),
    pad: int = typer.Option(0, help="Padding tokens at a sequence's end."),
    window: int | None = typer.Option(None, help="Keys a query sees, its own among them; also within documents."),
    backward: bool = typer.Option(False, "--backward", help="Forward and backward together."),
    dtype: str = typer.Option("float32", help="float32, bfloat16 or float16."),
    peers: str = typer.Option(
        "all", help="all, none, or of sdpa-dense, sdpa-documents, flex, jax-dense, jax-causal, with commas."
    ),
    repeats: int = typer.Option(10, help="Rounds that count; every contender runs once a round."),
    memory: bool = typer.Option(False, "--memory", help="Also the peak memory, each contender in a new process."),
    seed: int = typer.Option(0, help="For the documents' lengths and the inputs."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    out: str | None = typer.Option(None, help="A directory for attention.json and attention.html."),
) -> None:
    """Measure attend beside its peers on one mask: time, FLOP/s by visible pairs, peak memory.

    Example: heddle bench attention --seq 4096,8192 --documents 8 --backward --out results
    """
    from heddle.bench import attention

    problem = attention.Problem(
        batch=batch,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        documents=documents,
        pad=pad,
        window=window,
        backward=backward,
        dtype=dtype,
        seed=seed,
    )
    attention.run(
        problem,
        seq=attention.sequence_lengths(seq),
        framework=framework,
        peers=peers,
        repeats=repeats,
        memory=memory,
        as_json=json,
        out=out,
        command=["heddle", *sys.argv[1:]],
    )


def main() -> None:
    """Run the command; a user's error is one line on stderr and exit code 2."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app([a for a in arguments if a != "--debug"])
    except (ValueError, NotImplementedError, OSError) as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"heddle: {message}", style="red", markup=False, highlight=False)
        raise SystemExit(2) from None
