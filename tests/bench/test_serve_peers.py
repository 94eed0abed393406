"""The benchmark's servers: how each is started, what a broken one is told by, that none runs in another's turn."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_gguf
from tiny_models import hugging_face

from heddle.bench import serve_peers
from heddle.bench.serve_peers import Load, Program, running
from heddle.data.tokenizers import Tokenizer

LOAD = Load(4, "a b c", 3, 2)

#: A server of one behaviour: tokens are words, an answer is "x" as often as it was asked for.
SERVER = """
import argparse, http.server, json, os, sys, threading
options = argparse.ArgumentParser()
for name in ("--host", "--port", "--kind"):
    options.add_argument(name)
options = options.parse_args()
print("loading")
if options.kind == "dies at once":
    sys.exit("no such model")

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        self.send_error(404)
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        words, count = len(body["prompt"].split()), body["max_tokens"]
        usage = {"prompt_tokens": words + (options.kind == "adds a token"), "completion_tokens": count}
        if body["prompt"] == "refuse":
            return self.send_error(422)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if body["stream"] else "application/json")
        self.end_headers()
        if not body["stream"]:
            choice = {"text": "x" * count, "finish_reason": "length"}
            return self.wfile.write(json.dumps({"choices": [choice], "usage": usage}).encode())
        def say(event):
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
        def piece(text, reason=None):
            say({"choices": [{"text": text, "finish_reason": reason}]})
        for number in range(count - (options.kind == "ends early")):
            piece("x")
            if options.kind == "dies on the way":
                print("out of memory", flush=True)
                os._exit(9)
            if options.kind == "breaks off":
                return
            if options.kind.startswith("tells"):
                message = "too much at once"
                return say({"error": message if options.kind == "tells plainly" else {"message": message}})
        piece("", "stop" if options.kind == "ends early" else "length")
        if options.kind == "says how many":
            say({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\\n\\n")

def spin():
    while True: pass
if options.kind == "spins":
    threading.Thread(target=spin, daemon=True).start()
http.server.ThreadingHTTPServer((options.host, int(options.port)), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path):
    """A function that makes one."""
    return lambda kind: running(Program([sys.executable, "-c", SERVER, "--kind", kind], {}), tmp_path / "log", LOAD)


def state(server) -> str:
    return psutil.Process(server.process.pid).status()


@pytest.mark.parametrize("kind", ["says how many", "says nothing"])
def test_an_answer_is_read_as_it_comes(server, kind):
    with server(kind) as it, it.turn():
        answer = it.ask("a b c d", 7)
        assert (answer.text, answer.tokens) == ("xxxxxxx", 7)
        assert answer.prompt_tokens == (4 if kind == "says how many" else None)
        assert 0 < answer.first_token <= answer.seconds
        assert it.trial == "xx"


def test_an_answer_that_ends_early_has_the_tokens_that_came(server):
    with server("ends early") as it, it.turn():
        assert it.ask("a", 7).tokens == 6


def test_it_rests_but_in_its_turn_and_is_gone_in_the_end(server):
    with server("works") as it:
        deadline = time.monotonic() + 60
        while state(it) != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline
        with it.turn():
            assert state(it) != psutil.STATUS_STOPPED
            it.ask("a", 1)
        while state(it) != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline
    assert it.process.returncode == -signal.SIGTERM


def test_one_that_spins_is_noticed(server):
    with server("spins") as busy, server("works") as calm:
        assert busy.idle_cores > calm.idle_cores


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dies at once", r"the server ended \(1\): no such model"),
        ("adds a token", "the prompt has 4 tokens for it, and must have 3"),
    ],
)
def test_one_that_cannot_serve_says_why(server, kind, message):
    with pytest.raises((OSError, ValueError), match=message), server(kind):
        pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dies on the way", r"the server ended \(9\): out of memory"),
        ("breaks off", "the server broke an answer off"),
        ("tells", "the server: too much at once"),
        ("tells plainly", "the server: too much at once"),
    ],
)
def test_one_that_fails_says_why(server, kind, message):
    with server(kind) as it, it.turn(), pytest.raises(OSError, match=message):
        it.ask("a", 7)


def test_a_refusal_is_an_error(server):
    with server("works") as it, it.turn(), pytest.raises(OSError, match="422"):
        it.ask("refuse", 7)


def test_told_to_stop_no_server_is_left_behind(tmp_path):
    """SIGTERM to the benchmark while its servers rest."""
    script = f"""
import sys, time
from pathlib import Path
from heddle.bench.serve_peers import Load, Program, running, stopping
program = Program([sys.executable, "-c", {SERVER!r}, "--kind", "works"], {{}})
with stopping(), running(program, Path({str(tmp_path / "log")!r}), Load(4, "a b c", 3, 2)) as server:
    print(server.process.pid, flush=True)
    time.sleep(600)
"""
    bench = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pid = int(bench.stdout.readline())
    bench.terminate()
    bench.wait(60)
    bench.stdout.close()
    assert not psutil.pid_exists(pid)


# ---------------------------------------------------------------------- the programs


def option(program: Program, name: str) -> str:
    return program.command[program.command.index(name) + 1]


@pytest.fixture
def gguf(tmp_path):
    """A tiny model of bytes, as llama.cpp reads it."""
    words = Tokenizer.bytes()
    letters = [words.backend.id_to_token(i) for i in range(257)]
    letters[255] = "ĠĠ"  # no byte of UTF-8; a vocabulary without merges can't be written
    fields = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": letters,
        "tokenizer.ggml.token_type": [1] * 256 + [3], "tokenizer.ggml.merges": ["Ġ Ġ"],
        "tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.eos_token_id": 256,
    }  # fmt: skip
    return str(tiny_gguf.write(tmp_path / "tiny.gguf", hugging_face("llama, bytes"), fields))


def test_llama_cpps_own_server_is_taken_if_there_is_one(gguf, tmp_path, monkeypatch):
    own = tmp_path / "bin" / "llama-server"
    own.parent.mkdir()
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", f"{own.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(serve_peers, "cores", lambda: 3)
    program = serve_peers.llama_cpp(gguf, tmp_path, Load(4, "", 200, 57))
    assert program.command[0] == str(own)
    assert (option(program, "--parallel"), option(program, "--ctx-size")) == ("4", str(4 * 512))
    assert option(program, "--threads") == option(program, "--threads-batch") == "3"
    assert Path(option(program, "--model")).is_file()
    assert program.body["ignore_eos"]


def test_else_llama_cpp_pythons_and_else_none(gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    program = serve_peers.llama_cpp(gguf, tmp_path, Load(4, "", 200, 57))
    assert program.command[1:3] == ["-m", "llama_cpp.server"]
    assert program.body["min_tokens"] == 57
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="neither llama-server nor llama-cpp-python is installed"):
        serve_peers.llama_cpp(gguf, tmp_path, LOAD)
    with pytest.raises(ImportError, match="transformers isn't installed"):
        serve_peers.transformers(gguf, tmp_path, LOAD)
    with pytest.raises(ValueError, match="it reads GGUF files alone"):
        serve_peers.llama_cpp(str(tmp_path), tmp_path, LOAD)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("llama-server") or importlib.util.find_spec("llama_cpp")), reason="llama.cpp isn't installed"
)
def test_llama_cpp_serves_the_same_tokens(gguf, tmp_path):
    load = Load(2, "a heddle", 8, 6)  # more, and float16 in llama.cpp's cache lets a random model's answers part
    with running(serve_peers.llama_cpp(gguf, tmp_path, load), tmp_path / "log", load) as theirs, theirs.turn():
        assert theirs.ask(load.prompt, load.tokens).tokens == 6
    with running(serve_peers.heddle(gguf, tmp_path, load), tmp_path / "log", load) as ours:
        # Bytes that are no character: some servers leave them out.
        assert theirs.trial.replace("\ufffd", "") == ours.trial.replace("\ufffd", "") != ""
