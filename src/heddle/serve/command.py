"""``heddle serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from heddle.data.locate import EMBEDDED, MODEL, TOKENIZER

CACHE_DTYPE = "What keys and values are kept in: also int8, a quarter of float32's memory."


def serve(
    model: str | None = typer.Option(None, help=MODEL, show_default=EMBEDDED),
    tokenizer: str | None = typer.Option(None, help=TOKENIZER, show_default="the model's own"),
    host: str = typer.Option("127.0.0.1", help="The address to listen at; 0.0.0.0: every network this machine is in."),
    port: int = typer.Option(8000, help="0: any that is free."),
    name: str | None = typer.Option(None, help="The model's name in requests.", show_default="from --model"),
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key that requests have to bring; may be repeated.", envvar="HEDDLE_API_KEYS"),
    ] = None,
    dtype: str = typer.Option("auto", help="auto, float32, bfloat16 or float16."),
    cache_dtype: str | None = typer.Option(None, help=CACHE_DTYPE, show_default="--dtype"),
    max_batch: int = typer.Option(32, help="Answers under way at once."),
    blocks: int | None = typer.Option(None, help="Blocks of the cache.", show_default="1024 tokens for each answer"),
    block_size: int = typer.Option(64, help="Tokens in a block: 16, 32, 64 or 128."),
    prefill_chunk: int = typer.Option(512, help="Tokens of prompts read between two steps, at most."),
    max_queue: int = typer.Option(256, help="Requests that wait; further ones are refused (429)."),
    max_tokens: int = typer.Option(4096, help="Tokens of an answer, at most."),
    max_body: int = typer.Option(2**20, help="Bytes of a request, at most."),
    timeout: float = typer.Option(600.0, help="Seconds after which a request is broken off."),
    warm_up: bool = typer.Option(False, "--warm-up", help="Compile before the first request, not with it."),
    drain: float = typer.Option(60.0, help="Seconds that answers under way have once the server is told to stop."),
) -> None:  # fmt: skip
    """Serve a model: OpenAI's API below /v1, a chat page at /, /health and /metrics. SIGTERM: finish, then leave.

    Example: heddle serve --port 8000 --api-key "$KEY"
    """
    from heddle.serve import app, run

    run.run(
        model,
        host=host,
        port=port,
        name=name,
        api_keys=api_key or (),
        dtype=dtype,
        tokenizer=tokenizer,
        engine={
            "max_batch": max_batch,
            "blocks": blocks,
            "block_size": block_size,
            "prefill_chunk": prefill_chunk,
            "max_queue": max_queue,
            "cache_dtype": cache_dtype,
        },
        limits=app.Limits(max_body, max_tokens, timeout),
        drain=drain,
        warm_up=warm_up,
    )
