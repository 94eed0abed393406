"""``heddle memory``."""

from __future__ import annotations

import typer

from heddle.data.locate import EMBEDDED, MODEL


def memory(
    model: str | None = typer.Option(None, help=MODEL, show_default=EMBEDDED),
    task: str = typer.Option("train", help="train, or generate."),
    framework: str = typer.Option("jax", help="jax, or torch: heddle train framework=torch, and transformers."),
    batch: int | None = typer.Option(None, help="Sequences at once, over all devices.",
                                     show_default="the least that the devices share"),
    seq: int | None = typer.Option(None, help="Tokens of a sequence; of generate, prompt and answer together.",
                                   show_default="1024, or the model's context"),
    mesh: str = typer.Option("", help="How many devices along each axis, as fsdp=8 or data=2,tensor=4.",
                             show_default="one device"),
    optimizer: str | None = typer.Option(None, help="adamw or lion, of train.", show_default="adamw"),
    accumulation: int = typer.Option(1, help="Parts the batch is computed in, of train."),
    remat: bool = typer.Option(False, "--remat", help="Each layer is computed again in the backward pass, of train."),
    dtype: str = typer.Option("float32", help="Of the computation: float32, bfloat16 or float16."),
    param_dtype: str | None = typer.Option(None, help="Of the weights.",
                                           show_default="float32 in training, else --dtype"),
    cache_dtype: str | None = typer.Option(None, help="Of keys and values, also int8, of generate.",
                                           show_default="--dtype"),
    find: str | None = typer.Option(None, help="batch or seq: the largest that fits in --bytes."),
    within: str | None = typer.Option(None, "--bytes", help="Memory of a device, as in 16GiB, for --find."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    out: str | None = typer.Option(None, help="A directory, a prefix, or one file that ends in .png or .html."),
) -> None:  # fmt: skip
    """How much memory a run takes on each device, by what takes it, before it runs. Loads no weights.

    Example: heddle memory --task train --batch 8 --seq 1024 --mesh fsdp=8 --remat
    """
    from heddle.memory import report

    if optimizer is not None and task == "generate":
        raise ValueError("--optimizer goes with --task train")
    report.show(
        model, task, framework=framework, batch=batch, seq=seq, mesh=mesh, optimizer=optimizer,
        accumulation=accumulation, remat=remat, dtype=dtype, param_dtype=param_dtype, cache_dtype=cache_dtype,
        find=find, within=within, as_json=json, out=out,
    )  # fmt: skip
