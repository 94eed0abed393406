"""``heddle bench``."""

from __future__ import annotations

import sys

import typer

from heddle.data.locate import EMBEDDED, MODEL

bench = typer.Typer(no_args_is_help=True, help="Measure, beside peers, in one interleaved run.")


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
        "all",
        help="all, none, or of sdpa-dense, sdpa-documents, flex, cudnn, flash-attn, jax-dense, jax-causal, kvax, "
        "with commas.",
    ),
    repeats: int = typer.Option(10, help="Rounds that count; every contender runs once a round."),
    memory: bool = typer.Option(False, "--memory", help="Also the peak memory, each contender in a new process."),
    context_parallel: int = typer.Option(1, help="Also context_attend over so many ranks, by method and balance."),
    show_mask: bool = typer.Option(
        False, "--show-mask", help="Also draw the first sequence's mask, into --out if given."
    ),
    seed: int = typer.Option(0, help="For the documents' lengths and the inputs."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    out: str | None = typer.Option(None, help="A directory for attention.json and attention.html."),
) -> None:
    """Measure attend beside its peers on one mask: time, FLOP/s by visible pairs, peak memory.

    Example: heddle bench attention --seq 4096,8192 --documents 8 --backward --out results
    """
    from heddle.bench import attention
    from heddle.bench.options import counts

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
        seq=counts("seq", seq),
        framework=framework,
        peers=peers,
        repeats=repeats,
        memory=memory,
        context_parallel=context_parallel,
        show_mask=show_mask,
        as_json=json,
        out=out,
        command=["heddle", *sys.argv[1:]],
    )


@bench.command("decode")
def bench_decode(
    model: str | None = typer.Option(None, help=MODEL, show_default=EMBEDDED),
    batch: str = typer.Option("1", help="Sequences at once; several with commas."),
    prompt_tokens: int = typer.Option(128, help="Tokens read before the first is generated."),
    tokens: int = typer.Option(128, help="Tokens generated."),
    peers: str = typer.Option("all", help="all, none, or of transformers, llama.cpp, with commas."),
    repeats: int = typer.Option(5, help="Rounds that count; every contender runs once a round."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    out: str | None = typer.Option(None, help="A directory for decode.json."),
) -> None:
    """Measure generation in float32 beside its peers, and beside the speed at which memory gives the weights.

    Example: heddle bench decode --batch 1,16
    """
    from heddle.bench import decode

    decode.run(
        model,
        batch=batch,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        peers=peers,
        repeats=repeats,
        as_json=json,
        out=out,
        command=["heddle", *sys.argv[1:]],
    )


@bench.command("serve")
def bench_serve(
    model: str | None = typer.Option(None, help=MODEL, show_default=EMBEDDED),
    clients: str = typer.Option("1,4,16,64", help="How many ask at once; several with commas."),
    prompt_tokens: int = typer.Option(64, help="Tokens of a prompt."),
    tokens: int = typer.Option(32, help="Tokens of an answer."),
    peers: str = typer.Option("all", help="all, none, or of transformers, llama.cpp, with commas."),
    repeats: int = typer.Option(3, help="Rounds that count; each server has one a round with each number of clients."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    out: str | None = typer.Option(None, help="A directory for serve.json."),
) -> None:
    """Measure the server beside its peers': tokens a second and the time to the first, by how many clients ask at once.

    Example: heddle bench serve --clients 1,8
    """
    from heddle.bench import serve

    serve.run(
        model,
        clients=clients,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        peers=peers,
        repeats=repeats,
        as_json=json,
        out=out,
        command=["heddle", *sys.argv[1:]],
    )


@bench.command("train")
def bench_train(
    model: str | None = typer.Option(None, help=MODEL + " Its shape alone: weights are new.", show_default=EMBEDDED),
    layers: int | None = typer.Option(None, help="Layers of it that are made; fewer are quicker.", show_default="all"),
    corpus: str = typer.Option("stdlib", help="As data.corpus of heddle train."),
    seq: int = typer.Option(2048, help="Tokens of a packed row; longer documents are left out."),
    batch: int = typer.Option(1, help="Rows of a step."),
    framework: str = typer.Option("both", help="torch, jax or both."),
    peers: str = typer.Option("all", help="all, none, or of hf-packed, hf-padded, with commas."),
    repeats: int = typer.Option(3, help="Rounds that count; every contender runs one step a round."),
    seed: int = typer.Option(0, help="For the weights and the order of documents."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    out: str | None = typer.Option(None, help="A directory for train.json."),
) -> None:
    """Measure training in float32 on packed documents beside Hugging Face's Trainer: tokens/s, MFU, peak memory.

    Example: heddle bench train --seq 4096 --peers hf-packed
    """
    from heddle.bench import train

    train.run(
        model,
        layers=layers,
        corpus=corpus,
        seq=seq,
        batch=batch,
        framework=framework,
        peers=peers,
        repeats=repeats,
        seed=seed,
        as_json=json,
        out=out,
        command=["heddle", *sys.argv[1:]],
    )


@bench.command("parscale")
def bench_parscale(
    model: str | None = typer.Option(None, help=MODEL, show_default=EMBEDDED),
    replicas: str = typer.Option("1,2,4,8", help="Numbers of replicas, 1 first."),
    batch: str = typer.Option("1,2,4,8", help="Sequences at once; each number is measured in turn."),
    cross_attn: str = typer.Option("none", help="Replicas look at each other: none, joint or sublayer."),
    law: str = typer.Option("stack", help="The scaling law's constants: of stack (Stack-V2-Python) or pile."),
    prompt_tokens: int = typer.Option(128, help="Tokens read before the first is generated."),
    tokens: int = typer.Option(16, help="Tokens generated in a round; the next goes on from there."),
    repeats: int = typer.Option(5, help="Rounds that count; every contender runs once a round."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    out: str | None = typer.Option(None, help="A directory for parscale.json and parscale.html."),
) -> None:
    """Measure decoding with replicas: time and memory, beside the larger model that has the same loss by the law.

    Example: heddle bench parscale --replicas 1,8 --batch 1
    """
    from heddle.bench import parscale

    parscale.run(
        model,
        replicas=replicas,
        batch=batch,
        cross_attn=cross_attn,
        law=law,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        repeats=repeats,
        as_json=json,
        out=out,
        command=["heddle", *sys.argv[1:]],
    )


@bench.command("dilated")
def bench_dilated(
    total_tokens: int = typer.Option(18, help="Binary logarithm of the tokens in all: 26 is 67 million."),
    heads: int = typer.Option(8, help="Heads."),
    head_dim: int = typer.Option(64, help="Elements of a head."),
    batch_size: int = typer.Option(1, help="Sequences at the greatest length; shorter ones are more."),
    segment_lengths: str = typer.Option("2048,4096,8192,16384,32768", help="Of each pattern, in tokens."),
    dilation_rates: str = typer.Option("1,2,4,6,12", help="Of each pattern."),
    seq: str = typer.Option("", help="Lengths to measure.", show_default="powers of two from 8192"),
    causal: bool = typer.Option(False, "--causal", help="Tokens see none after them."),
    backward: bool = typer.Option(False, "--backward", help="Forward and backward together."),
    dtype: str = typer.Option("float32", help="float32, bfloat16 or float16."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    peers: str = typer.Option("vanilla", help="all, none, or vanilla: torch's attention over the whole sequence."),
    sweep: str = typer.Option("both", help="tokens: as many in all at each length; length: one sequence; or both."),
    repeats: int = typer.Option(5, help="Rounds that count; every contender runs once a round."),
    memory: bool = typer.Option(False, "--memory", help="Also the peak memory, each contender in a new process."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    out: str | None = typer.Option(None, help="A directory for dilated.json and dilated.html."),
) -> None:
    """Measure LongNet's dilated attention beside vanilla attention, by the length of the sequence.

    Example: heddle bench dilated --total-tokens 18 --causal --backward --peers none --out results
    """
    from heddle.bench import dilated

    dilated.run(
        total_tokens=total_tokens,
        heads=heads,
        head_dim=head_dim,
        batch_size=batch_size,
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        seq=seq,
        causal=causal,
        backward=backward,
        dtype=dtype,
        device=device,
        peers=peers,
        sweep=sweep,
        repeats=repeats,
        memory=memory,
        as_json=json,
        out=out,
        command=["heddle", *sys.argv[1:]],
    )


@bench.command("report")
def bench_report(
    folder: str = typer.Argument(help="Where heddle bench wrote, with --out; results of tests (JUnit XML) count too."),
    out: str = typer.Option(..., help="The Markdown file."),
    title: str = typer.Option("Measurements", help="Its heading."),
) -> None:
    """Put all that was measured into one page of Markdown, with the commands, the machine and the versions.

    Example: heddle bench report out/bench --out measurements.md
    """
    from heddle.bench import report

    print(report.write(folder, out, title))


@bench.command("tune")
def bench_tune(
    head_dim: str = typer.Option("64,128,256", help="Head dims to tune for; several with commas."),
    repeats: int = typer.Option(10, help="Rounds that count; every candidate runs once a round."),
    tiles: str | None = typer.Option(
        None, help="The file to write.", show_default="$HEDDLE_TILES, or heddle/tiles.json in the user's cache"
    ),
) -> None:
    """Find the fastest tiles of the Triton kernels on this CUDA device; attend takes them from then on.

    Example: heddle bench tune --head-dim 128
    """
    from heddle.bench import tune

    tune.run(head_dim, repeats, tiles)
