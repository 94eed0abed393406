"""A server on a free port of this machine, in this process, and the tiny model it serves."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from tiny_models import hugging_face

from heddle.data.tokenizers import Tokenizer
from heddle.jax import Transformer
from heddle.jax.engine import Engine
from heddle.serve.app import create_app

TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[a{% endif %}"
)
NAME = "tiny"


def save(folder: Path) -> None:
    """A model of bytes that can chat, after a fashion; nothing but length and stop strings ends its answers."""
    model = hugging_face("llama, bytes")
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (folder / "generation_config.json").unlink()
    Tokenizer(Tokenizer.bytes().backend, chat_template=TEMPLATE).save_pretrained(folder)


def load(folder: Path) -> tuple[Transformer, Tokenizer]:
    return Transformer.from_pretrained(folder), Tokenizer.from_pretrained(folder)


@contextlib.contextmanager
def serving(engine: Engine, port: int = 0, **options) -> Iterator[str]:
    """The address of a server over ``engine``, which is started, and closed in the end."""
    listener = socket.create_server(("127.0.0.1", port), backlog=256)
    config = uvicorn.Config(create_app(engine.start(), NAME, **options), log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        engine.close(timeout=0.0)
