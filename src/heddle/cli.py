"""The ``heddle`` command. Each command parses its arguments and calls one function elsewhere."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from heddle.bench.command import bench
from heddle.data.locate import EMBEDDED, MODEL, TOKENIZER
from heddle.memory.command import memory
from heddle.serve.command import CACHE_DTYPE, serve

app = typer.Typer(name="heddle", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(bench, name="bench")
sweep = typer.Typer(no_args_is_help=True, help="Train a configuration over the values of some of its options.")
app.add_typer(sweep, name="sweep")


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


@app.command()
def quickstart(
    fast: bool = typer.Option(False, "--fast", help="A shorter answer, fewer files, few training steps."),
    out: str = typer.Option("out/quickstart", help="A folder for the report, its pictures and the models."),
) -> None:
    """Take the tour: a real model answers, runs in transformers too, and a small one is trained on packed documents.

    A few minutes on two cores, ending in one page, report.html. Needs no network.

    Example: heddle quickstart --out tour
    """
    from heddle import quickstart

    quickstart.run(out, fast)


@app.command(context_settings={"ignore_unknown_options": True})
def train(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Over the file's options.")] = None,
    config: str | None = typer.Option(None, help="A YAML file, such as configs/quickstart.yaml.", envvar="CONFIG_FILE"),
    print_config: bool = typer.Option(False, "--print-config", help="Print every option as it stands, and leave."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print what would run and its memory, and leave."),
) -> None:
    """Train a model on a corpus, or go on with a run where it stands.

    SIGTERM and Ctrl-C save and leave; the same command then goes on, with exactly the losses it would have had.

    With framework=torch also as `accelerate launch -m heddle train` or `torchrun --nproc_per_node=8 -m heddle train`.

    Example: heddle train --config configs/quickstart.yaml training.max_steps=500 output=runs/longer
    """
    from heddle.config import load_config

    settings = load_config(config, overrides or [])
    if print_config:
        print(settings.to_yaml(), end="")
        return
    if dry_run:
        from heddle.memory import report

        return report.dry_run(settings)
    if settings.framework == "torch":
        from heddle.torch import run
    else:
        from heddle.jax import run

    raise typer.Exit(run.show(settings))


SweepName = Annotated[str, typer.Argument(metavar="NAME", help="As heddle sweep list has it.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="For every run; a list of values is varied: training.seed=[0,1,2]."),
]


@sweep.command("list")
def sweep_list(json: bool = typer.Option(False, "--json", help="Print a JSON list.")) -> None:
    """List the sweeps, with how many runs each is.

    Example: heddle sweep list
    """
    from json import dumps

    from heddle import sweep

    sweeps = sweep.table()
    if json:
        print(dumps(sweeps, indent=2))
        return
    for each in sweeps:
        print(f"{each['name']:20} {each['runs']} runs  {each['about']}")
    print(f"{sum(each['runs'] for each in sweeps)} runs in all")


@sweep.command("create", context_settings={"ignore_unknown_options": True})
def sweep_create(
    name: SweepName,
    overrides: Overrides = None,
    backend: str = typer.Option("wandb", help="wandb."),
    project: str = typer.Option("heddle", help="The project on wandb."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only print what would be created, as wandb's own YAML."),
) -> None:
    """Create a sweep on wandb, for any number of machines to work at with wandb agent.

    Example: heddle sweep create parscale_scaling --backend wandb training.max_steps=1000
    """
    from heddle import sweep

    if backend != "wandb":
        raise ValueError(f"--backend must be wandb to create a sweep, got {backend!r}; heddle sweep run is for local")
    described = sweep.load(name, overrides or [])
    if dry_run:
        print(sweep.wandb_yaml(described), end="")
        return
    print(f"wandb agent {sweep.create(described, project)}")


@sweep.command("run", context_settings={"ignore_unknown_options": True})
def sweep_run(
    name: SweepName,
    overrides: Overrides = None,
    backend: str = typer.Option("local", help="local."),
    json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
) -> None:
    """Run a sweep here, one run after the other, and draw its losses. Needs no account; what is done is kept.

    Example: heddle sweep run parscale_scaling --backend local training.max_steps=5 training.base_model=embedded
    """
    from heddle import sweep

    if backend != "local":
        raise ValueError(f"--backend must be local to run a sweep, got {backend!r}; heddle sweep create is for wandb")
    raise typer.Exit(sweep.run_local(sweep.load(name, overrides or []), as_json=json))


@sweep.command("compare")
def sweep_compare(
    folders: Annotated[list[str], typer.Argument(metavar="FOLDER", help="Of sweeps over replicas that are done.")],
    out: str = typer.Option("runs/compare", help="A folder for the page, its picture and the figures."),
    law: str = typer.Option("stack", help="Whose exponent the law of ParScale is fitted with: stack or pile."),
    floor: float = typer.Option(0.0, help="The law's E: the loss that no model gets below, in nats a token."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
) -> None:
    """Draw sweeps over replicas beside each other, with the law of ParScale fitted to each.

    Example: heddle sweep compare runs/none runs/joint runs/sublayer
    """
    from heddle.sweep_compare import compare

    print(compare(folders, out, law=law, floor=floor, as_json=json))


@app.command("plot")
def plot_runs(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Folders of runs.")],
    metric: str | None = typer.Option(None, help="What to draw.", show_default="reward, or else loss"),
    out: str = typer.Option("runs.html", help="The page to write, or with the suffix .png the picture."),
) -> None:
    """Draw the losses of runs, or another of their metrics, beside each other.

    Example: heddle plot runs/quickstart runs/longer --out loss.png
    """
    from heddle.metrics import draw

    print(f"wrote {draw(runs, out, metric)}")


@app.command()
def generate(
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What to answer; may be repeated.")] = None,
    model: str | None = typer.Option(None, help=MODEL, show_default=EMBEDDED),
    tokenizer: str | None = typer.Option(None, help=TOKENIZER, show_default="the model's own"),
    max_tokens: int = typer.Option(256, help="Tokens of an answer, at most."),
    temperature: float = typer.Option(0.0, help="0: always the likeliest token."),
    top_k: int | None = typer.Option(None, help="Sample among so many likeliest tokens."),
    top_p: float | None = typer.Option(None, help="Sample among the likeliest tokens of this probability together."),
    min_p: float | None = typer.Option(None, help="Sample among tokens this many times as likely as the likeliest."),
    repetition_penalty: float | None = typer.Option(None, help="Above 1: what was said becomes less likely."),
    presence_penalty: float = typer.Option(0.0, help="Off the logit of each token of the answer so far."),
    frequency_penalty: float = typer.Option(0.0, help="The same, for each time that the token stands in it."),
    seed: int = typer.Option(0, help="Same seed, same text."),
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be repeated.")] = None,
    system: str | None = typer.Option(None, help="The system message.", show_default="the model's own"),
    speculate: int = typer.Option(0, help="Guess so many tokens ahead where the text repeats itself."),
    raw: bool = typer.Option(False, "--raw", help="Continue the text as it is, without the chat template."),
    dtype: str = typer.Option("auto", help="auto, float32, bfloat16 or float16."),
    cache_dtype: str | None = typer.Option(None, help=CACHE_DTYPE, show_default="--dtype"),
    json: bool = typer.Option(False, "--json", help="Print a JSON object for each prompt."),
) -> None:
    """Answer a prompt, or what stands on stdin, as it comes.

    Example: heddle generate --prompt "What is the capital of France?"
    """
    from heddle.jax import sampling, terminal

    terminal.answer(
        model,
        prompt or [],
        sampler=sampling.sampler(
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty or None, frequency_penalty or None
        ),
        max_tokens=max_tokens,
        seed=seed,
        stop=stop or [],
        system=system,
        speculate=speculate,
        raw=raw,
        dtype=dtype,
        cache_dtype=cache_dtype,
        tokenizer=tokenizer,
        as_json=json,
    )


@app.command()
def evaluate(
    model: Annotated[list[str], typer.Option(help=MODEL + " May be repeated.")],
    corpus: str = typer.Option("stdlib", help="As data.corpus of heddle train."),
    held_out: float = typer.Option(0.02, help="The share of it that was held out, which is read; 0: all of it."),
    field: str = typer.Option("text", help="Of a JSONL object, Parquet row or hub record."),
    seq_len: int = typer.Option(1024, help="Tokens predicted in a window."),
    batch: int = typer.Option(4, help="Windows in one forward pass."),
    max_windows: int | None = typer.Option(None, help="How many windows, at most.", show_default="all"),
    dtype: str = typer.Option("auto", help="auto, float32, bfloat16 or float16."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    out: str | None = typer.Option(None, help="A folder for a page, its picture and the figures."),
) -> None:
    """How well models predict a corpus: bits a byte by the length of the context.

    Example: heddle evaluate --model runs/dense/model --model runs/dilated/model --seq-len 1024 --out results
    """
    from heddle.jax.evaluate import show

    show(
        model, corpus, held_out=held_out, field=field, seq_len=seq_len, batch=batch, max_windows=max_windows,
        dtype=dtype, as_json=json, out=out,
    )  # fmt: skip


@app.command()
def chat(
    model: str | None = typer.Option(None, help=MODEL, show_default=EMBEDDED),
    tokenizer: str | None = typer.Option(None, help=TOKENIZER, show_default="the model's own"),
    max_tokens: int = typer.Option(1024, help="Tokens of an answer, at most."),
    temperature: float = typer.Option(0.2, help="0: always the likeliest token."),
    top_k: int | None = typer.Option(None, help="Sample among so many likeliest tokens."),
    top_p: float | None = typer.Option(0.9, help="Sample among the likeliest tokens of this probability together."),
    min_p: float | None = typer.Option(None, help="Sample among tokens this many times as likely as the likeliest."),
    repetition_penalty: float | None = typer.Option(None, help="Above 1: what was said becomes less likely."),
    presence_penalty: float = typer.Option(0.0, help="Off the logit of each token of the answer so far."),
    frequency_penalty: float = typer.Option(0.0, help="The same, for each time that the token stands in it."),
    seed: int = typer.Option(0, help="Same seed, same text."),
    system: str | None = typer.Option(None, help="The system message.", show_default="the model's own"),
    dtype: str = typer.Option("auto", help="auto, float32, bfloat16 or float16."),
    cache_dtype: str | None = typer.Option(None, help=CACHE_DTYPE, show_default="--dtype"),
) -> None:
    """Talk with a model. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.

    Example: heddle chat --system "You answer in one sentence."
    """
    from heddle.jax import sampling, terminal

    terminal.chat(
        model,
        sampler=sampling.sampler(
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty or None, frequency_penalty or None
        ),
        max_tokens=max_tokens,
        seed=seed,
        system=system,
        dtype=dtype,
        cache_dtype=cache_dtype,
        tokenizer=tokenizer,
    )


app.command()(memory)
app.command()(serve)


UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]  # typer gives it no name


def main() -> None:
    """Run the command; a user's error is one line on stderr and exit code 2."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        code = app([a for a in arguments if a != "--debug"], prog_name="heddle", standalone_mode=False)
    except UsageError as error:
        where = error.ctx.command_path if error.ctx else "heddle"  # type: ignore[attr-defined]
        if not (message := error.format_message()):  # type: ignore[attr-defined]  # its help has been shown instead
            raise SystemExit(2) from None
        message = f"{message} See {where} --help."
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        if debug:
            raise
        message = str(error)
    except typer.Abort:
        raise SystemExit(130) from None
    else:
        raise SystemExit(code or 0)
    message = " ".join(message.split())
    Console(stderr=True, soft_wrap=True).print(f"heddle: {message}", style="red", markup=False, highlight=False)
    raise SystemExit(2)
