"""The server's process: it says where it is, finishes what is under way when told to stop, and leaves."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from servers import save

LONG = {"model": "model", "prompt": "x", "max_tokens": 90, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "model"
    save(path)
    return path


def heddle(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "heddle", "serve", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_told_to_stop_it_finishes_and_leaves(folder, tmp_path):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "HEDDLE_API_KEYS": "one two"}
    process = heddle("--model", str(folder), "--port", "0", "--max-batch", "1", env=environment)
    keyed = httpx.Client(headers={"authorization": "Bearer two"}, timeout=120)
    try:
        lines = iter(process.stderr.readline, "")
        line = next(line for line in lines if " at http://" in line)
        name, url = line.split()[0], line.split()[-1]
        assert (name, url.rpartition(":")[0]) == ("model", "http://127.0.0.1")
        keyed.base_url = url
        [expected] = keyed.post("/v1/completions", json=LONG).json()["choices"]
        assert expected["finish_reason"] == "length"
        assert httpx.post(url + "/v1/completions", json=LONG).status_code == 401

        streamed: list[str] = []
        begun = threading.Event()

        def read() -> None:
            with keyed.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
                for line in response.iter_lines():
                    streamed.append(line)
                    begun.set()

        # Behind it a dozen that wait for their turn.
        whole: list[httpx.Response] = []
        queue = threading.Thread(
            target=lambda: whole.append(keyed.post("/v1/completions", json=LONG | {"prompt": ["x"] * 12}))
        )
        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(60)
        queue.start()
        deadline = time.monotonic() + 60
        while "heddle_requests_total 14.0" not in httpx.get(url + "/metrics").text:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        reader.join()
        queue.join()
        assert [choice["text"] for choice in whole[0].json()["choices"]] == [expected["text"]] * 12
        events = [line.removeprefix("data: ") for line in streamed if line]
        assert events.pop() == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected["text"]
        assert process.wait(timeout=60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")
    finally:
        keyed.close()
        process.kill()
        process.stderr.close()


def test_without_a_drain_what_is_under_way_is_broken_off(folder, tmp_path):
    # Each step takes a while here, or the answer would be over before the signal comes.
    program = (
        "import time, heddle.jax.engine as engine, heddle.cli; step = engine.Engine.step; "
        "engine.Engine.step = lambda self: (time.sleep(0.3), step(self))[1]; heddle.cli.main()"
    )
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}
    command = [sys.executable, "-c", program, "serve", "--model", str(folder), "--port", "0", "--drain", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        url = next(line for line in iter(process.stderr.readline, "") if " at http://" in line).split()[-1]
        with httpx.stream("POST", url + "/v1/completions", json=LONG | {"stream": True}, timeout=120) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            left = []
            with contextlib.suppress(httpx.RemoteProtocolError):  # the answer's end is missing
                left += lines
        assert "data: [DONE]" not in left
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.stderr.close()


def test_what_cannot_be_is_one_line(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["--port", port], f"cannot listen at 127.0.0.1, port {port}: "),
            (["--port", "70000"], "port must be in [0, 65536), got 70000"),
            (["--port", "0", "--max-tokens", "0"], "max_tokens must be positive, got 0"),
            (
                ["--port", "0", "--model", str(folder), "--tokenizer", "./nowhere"],
                "./nowhere: no such file or folder",
            ),
            (
                ["--port", "0", "--model", str(folder), "--block-size", "5"],
                "block_size must be 16, 32, 64 or 128",
            ),
        ):
            process = heddle(*arguments)
            _, error = process.communicate(timeout=120)
            assert process.returncode == 2
            assert error.splitlines()[-1].startswith("heddle: " + message)
            assert len(error.splitlines()) <= 2  # the model may have been loaded
