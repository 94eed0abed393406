"""The servers of ``heddle bench serve``: ours, transformers' and llama.cpp's, each in a process of its own.

They hold the same weights in float32, have a thread for each core, and room for all clients' answers at once. While one
is measured the others are stopped, so that what a server does when nobody asks it costs the others nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .model_files import gguf_file, write_folder, write_gguf
from .timing import cores

SECONDS = 600  #: that a server has to start, and to answer


@dataclass
class Answer:
    """One answer: its text, seconds to its first token and to its end, and how many tokens it and its prompt have."""

    first_token: float
    seconds: float
    tokens: int
    prompt_tokens: int | None = None  #: None: the server doesn't say
    text: str = ""


@dataclass(frozen=True)
class Program:
    """A server to start, and what its requests say besides the prompt and the number of tokens.

    Args:
        command: without the address.
        body: of each request; all of them are greedy.
        environment: variables, besides this process's own.
    """

    command: Sequence[str]
    body: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """What all servers are measured with.

    Args:
        clients: that ask at once, at most.
        prompt: that each server is tried with.
        prompt_tokens: of each prompt.
        tokens: of each answer.
    """

    clients: int
    prompt: str
    prompt_tokens: int
    tokens: int

    @property
    def room(self) -> int:
        """Tokens of a prompt and its answer, in whole blocks of 256."""
        return -(-(self.prompt_tokens + self.tokens) // 256) * 256


def name_of(model: str | None) -> str:
    """A model's name in requests."""
    return Path(model).stem if model else "SmolLM2-135M-Instruct"


def heddle(model: str | None, folder: Path, load: Load) -> Program:
    """``heddle serve``, every client's answer under way at once."""
    name = name_of(model)
    command = [sys.executable, "-m", "heddle", "serve", "--name", name, "--dtype", "float32", "--warm-up"]
    command += ["--max-batch", str(load.clients), "--max-queue", str(2 * load.clients)]
    command += ["--model", model] if model else []
    return Program(command, {"model": name, "ignore_eos": True})


def transformers(model: str | None, folder: Path, load: Load) -> Program:
    """``transformers serve`` with continuous batching, of a folder that names no end of text.

    Raises:
        ImportError: it isn't installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers isn't installed")
    from heddle.data.tokenizers import Tokenizer
    from heddle.jax import Transformer

    at = folder / "transformers"
    write_folder(Transformer.from_pretrained(model, dtype="float32"), Tokenizer.from_pretrained(model), at)
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(at), "--continuous-batching"]
    command += ["--device", "cpu", "--dtype", "float32", "--cb-max-batch-tokens", "512"]
    # Left to itself it takes nine tenths of the memory for its cache; a fifth of the blocks stays free.
    command += ["--cb-num-blocks", str(2 * load.clients * load.room // 256)]
    return Program(command, {"model": str(at)}, {"OMP_NUM_THREADS": str(cores()), "HF_HUB_OFFLINE": "1"})


def llama_cpp(model: str | None, folder: Path, load: Load) -> Program:
    """llama.cpp's own server if there is one, else llama-cpp-python's, which answers one request after another.

    Raises:
        ImportError: neither is installed.
        ValueError: the model isn't a GGUF file.
    """
    source, file, threads = gguf_file(model), folder / "float32.gguf", str(cores())
    environment = {"LLAMA_ARG_CACHE_RAM": "0"}  # else it copies each prompt aside, for a later one that begins like it
    if server := shutil.which("llama-server"):
        command = [server, "--ctx-size", str(load.clients * load.room), "--parallel", str(load.clients)]
        command += ["--threads", threads, "--threads-batch", threads]
        body = {"ignore_eos": True, "cache_prompt": False}
    elif importlib.util.find_spec("llama_cpp") is not None:
        command = [sys.executable, "-m", "llama_cpp.server", "--n_ctx", str(load.room)]
        command += ["--n_threads", threads, "--n_threads_batch", threads, "--logits_all", "false"]
        command += ["--interrupt_requests", "false"]  # else each request breaks off the one before
        body = {"min_tokens": load.tokens, "repeat_penalty": 1.0}
    else:
        raise ImportError("neither llama-server nor llama-cpp-python is installed")
    write_gguf(source, file)
    return Program([*command, "--model", str(file)], {"model": "any", **body}, environment)


PROGRAMS: dict[str, Callable[[str | None, Path, Load], Program]] = {
    "heddle": heddle,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
}  #: of a model as ``--model`` names it, and a folder for files that the server reads; ours first


class Server:
    """A server that runs.

    Raises:
        OSError: from all that asks it something: what went wrong, or the last that the process said if it is gone.
    """

    def __init__(self, program: Program, process: subprocess.Popen[bytes], url: str, log: Path):
        self.program, self.process, self.url, self.log = program, process, url, log
        self.trial = ""  #: its answer to the prompt that all servers are tried with
        self.idle_cores = 0.0  #: that it keeps busy while nobody asks it anything

    def ready(self) -> None:
        """Wait until it listens, its model loaded."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise OSError(self._end())
            try:
                urllib.request.urlopen(self.url + "/health", timeout=10).close()
                return
            except urllib.error.HTTPError as error:
                if error.code < 500:  # it has no such page, but answers
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise OSError(f"the server was not ready after {SECONDS} s")

    def ask(self, prompt: str, tokens: int, stream: bool = True) -> Answer:
        """Ask for the likeliest completion of so many tokens, and read it as it comes or, not streamed, whole."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream, **self.program.body}
        body |= {"stream_options": {"include_usage": True}} if stream else {}
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            return _read(request, tokens)
        except urllib.error.HTTPError as error:
            raise OSError(f"{error}: {error.read(300).decode(errors='replace')}") from error
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            raise self._failed(error) from error

    def try_out(self, load: Load) -> None:
        """See that it reads and writes as many tokens as are meant, and what it does when it has nothing to do.

        Raises:
            ValueError: other numbers of tokens.
        """
        answer = self.ask(load.prompt, load.tokens, stream=False)
        for what, wanted, found in (
            ("the prompt", load.prompt_tokens, answer.prompt_tokens), ("its answer", load.tokens, answer.tokens),
        ):  # fmt: skip
            if found != wanted:
                raise ValueError(f"{what} has {found} tokens for it, and must have {wanted}")
        self.trial, self.idle_cores = answer.text, self._idle_cores()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """It runs in here, and rests after it."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.rest()

    def rest(self) -> None:
        """Stop it, until its turn."""
        self._signal(signal.SIGSTOP)

    def _idle_cores(self, seconds: float = 1.0) -> float:
        import psutil

        def spent() -> float:
            process = psutil.Process(self.process.pid)
            return sum(sum(each.cpu_times()[:2]) for each in (process, *process.children(recursive=True)))

        try:
            before, began = spent(), time.perf_counter()
            time.sleep(seconds)
            return (spent() - before) / (time.perf_counter() - began)
        except psutil.Error as error:
            raise self._failed(error) from error

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _failed(self, error: Exception) -> OSError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)  # a process that breaks off an answer is about to be gone
        return OSError(self._end() if self.process.returncode is not None else str(error))

    def _end(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"the server ended ({self.process.returncode}): {lines[-1].strip() if lines else 'it said nothing'}"


@contextlib.contextmanager
def running(program: Program, log: Path, load: Load) -> Iterator[Server]:
    """A server on a free port of this machine, tried and at rest, ended in the end; what it says goes to ``log``.

    Raises:
        OSError: it doesn't start, or fails.
        ValueError: it reads or writes other numbers of tokens.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [*program.command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as said:
        # A group of its own: signals reach its children too, and it doesn't outlive this process while it is stopped.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=os.environ | {**program.environment},
            process_group=0,
        )  # fmt: skip
    server = Server(program, process, f"http://127.0.0.1:{port}", log)
    try:
        server.ready()
        server.try_out(load)
        server.rest()
        yield server
    finally:
        for number, seconds in ((signal.SIGTERM, 60), (signal.SIGKILL, None)):
            if process.poll() is None:
                server._signal(number)
                server._signal(signal.SIGCONT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM ends what runs in here as Ctrl-C does, so that no server is left behind."""
    if threading.current_thread() is not threading.main_thread():  # where signals can't be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def told(program: Program) -> str:
    """A program's command as a reader can use it, folders left out."""
    command = [Path(word).name if word.startswith("/") else word for word in program.command]
    variables = [f"{name}={value}" for name, value in program.environment.items()]
    return " ".join([*variables, shlex.join(command)])


def _read(request: urllib.request.Request, tokens: int) -> Answer:
    began, first, text, pieces, reason = time.perf_counter(), None, "", 0, None
    usage: dict[str, int] = {}
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        streamed = "event-stream" in response.headers["content-type"]
        for line in response if streamed else [b"data: " + response.read()]:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if error := event.get("error"):
                raise OSError(f"the server: {error['message'] if isinstance(error, dict) else error}")
            for choice in event["choices"]:
                if choice["text"]:
                    text += choice["text"]
                    pieces += 1
                    first = first or time.perf_counter() - began
                reason = choice.get("finish_reason") or reason
            usage = event.get("usage") or usage
    seconds = time.perf_counter() - began
    if reason is None:
        raise OSError("the server broke an answer off")
    produced = usage.get("completion_tokens", tokens if reason == "length" else pieces)
    return Answer(first or seconds, seconds, produced, usage.get("prompt_tokens"), text)
