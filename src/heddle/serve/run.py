"""The server's process: load, listen, and on SIGTERM or Ctrl-C finish what is under way and leave."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from rich.console import Console

from heddle.jax import terminal
from heddle.jax.engine import Engine

from .app import Limits, create_app


def run(
    model: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_keys: Sequence[str] = (),
    dtype: str = "auto",
    tokenizer: str | None = None,
    engine: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    drain: float = 60.0,
    warm_up: bool = False,
) -> None:
    """Serve until told to stop.

    Args:
        model: as :meth:`heddle.jax.Transformer.from_pretrained` has it.
        host: the address to listen at.
        port: 0: any that is free.
        name: the model's name in requests; None: the last part of ``model``.
        api_keys: as :func:`heddle.serve.app.create_app` has them.
        dtype: of weights, and of the cache where ``engine`` doesn't say.
        tokenizer: as ``model``; None: the model's own.
        engine: arguments of :class:`heddle.jax.engine.Engine`.
        limits: what a request may ask for.
        drain: seconds that answers under way have once the server is told to stop.
        warm_up: compile before listening; else the first requests of each size wait for it.

    Raises:
        ValueError: an argument out of range.
        OSError: the address is taken, or isn't this machine's.
    """
    if not drain >= 0:
        raise ValueError(f"drain must be at least 0, got {drain}")
    # Before the model is loaded, so that a port that is taken is told at once.
    with _listening(host, port) as listener:
        serving = Engine(*terminal.load(model, dtype, tokenizer), **(engine or {}))
        name = name or (Path(model).stem if model else "SmolLM2-135M-Instruct")
        application = create_app(serving, name, api_keys=api_keys, limits=limits)
        if warm_up:
            with Console(stderr=True).status("compiling"):
                serving.warm_up()
        serving.start()
        address = listener.getsockname()
        where = f"[{address[0]}]" if ":" in address[0] else address[0]
        print(f"{name} at http://{where}:{address[1]}", file=sys.stderr, flush=True)
        if not api_keys and not _local(address[0]):
            print("anyone who reaches this address may use it: --api-key restricts that", file=sys.stderr, flush=True)
        try:
            asyncio.run(_serve(application, serving, listener, drain))
        finally:
            serving.close(timeout=0.0)


async def _serve(application: FastAPI, engine: Engine, listener: socket.socket, drain: float) -> None:
    config = uvicorn.Config(
        application, log_level="warning", timeout_graceful_shutdown=max(1, round(drain)), server_header=False
    )
    server = _Server(config)

    def stop() -> None:
        engine.stop()
        if server.should_exit:  # told twice
            server.force_exit = True
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await server.serve([listener])


class _Server(uvicorn.Server):
    """Without uvicorn's own signal handlers, which end the process by the signal, as if it had failed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listening(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise ValueError(f"port must be in [0, 65536), got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from None


def _local(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
