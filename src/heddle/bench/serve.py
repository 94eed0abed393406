"""``heddle bench serve``: tokens a second and the time to the first token, by how many clients ask at once.

Each client is a connection to a server in another process and asks for one answer after another, streamed, as a user's
program would. One client is the measure: what the engine's batches gain over answering one request at a time.
"""

from __future__ import annotations

import contextlib
import heapq
import inspect
import json
import secrets
import shlex
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .options import counts
from .tables import show
from .timing import interleave, machine


@dataclass
class Answer:
    """One streamed answer: seconds to its first token and to its end, and how many tokens it has."""

    first_token: float
    seconds: float
    tokens: int


def ask(url: str, model: str, prompt: list[int], tokens: int) -> Answer:
    """Ask for a completion and read it as it comes."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    began, first, produced = time.perf_counter(), None, 0
    with urllib.request.urlopen(request) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise OSError(f"the server: {event['error']['message']}")
            if event.get("choices") and first is None:
                first = time.perf_counter() - began
            if event.get("usage"):
                produced = event["usage"]["completion_tokens"]
    seconds = time.perf_counter() - began
    return Answer(seconds if first is None else first, seconds, produced)


def measure(
    ask: Callable[[int], Answer],
    clients: Sequence[int],
    requests: Callable[[int], int],
    repeats: int,
    tell: Callable[[str], object] = lambda message: None,
) -> list[dict[str, Any]]:
    """For each number of clients, the medians over the rounds.

    Args:
        ask: the request of this number, answered.
        clients: how many ask at once.
        requests: how many requests so many clients make in a round, together.
        repeats: rounds that count.
    """
    answered: dict[int, list[list[Answer]]] = {count: [] for count in clients}
    numbers = iter(range(2**62))

    def step(count: int) -> Callable[[int], None]:
        def together(_: int) -> None:
            with ThreadPoolExecutor(count) as pool:
                answered[count].append(list(pool.map(ask, [next(numbers) for _ in range(requests(count))])))

        return together

    timings = interleave({f"{count} clients": step(count) for count in clients}, repeats, tell=tell)
    results = []
    for count in clients:
        rounds = answered[count][-repeats:]
        seconds = timings[f"{count} clients"].seconds
        first = [answer.first_token for answers in rounds for answer in answers]
        rates = [sum(a.tokens for a in answers) / taken for answers, taken in zip(rounds, seconds, strict=True)]
        results.append(
            {
                "clients": count,
                "requests": len(rounds[0]),
                "tokens_per_s": statistics.median(rates),
                "first_token_s": statistics.median(first),
                "first_token_p90_s": sorted(first)[int(0.9 * (len(first) - 1))],
                "answer_s": statistics.median(answer.seconds for answers in rounds for answer in answers),
                "repeats": repeats,
            }
        )
    return results


@contextlib.contextmanager
def server(model: str | None, arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The address of a server in a process of its own, and its model's name."""
    command = [sys.executable, "-m", "heddle", "serve", "--port", "0", *arguments]
    command += ["--model", model] if model else []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if " at http://" in line:
                name, _, url = line.strip().rpartition(" at ")
                yield url, name
                return
        raise OSError("the server did not start: " + " ".join(said[-1:]).strip())
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()
        process.stderr.close()


def run(
    model: str | None = None,
    *,
    clients: str = "1,4,16,64",
    prompt_tokens: int = 64,
    tokens: int = 32,
    repeats: int = 3,
    as_json: bool = False,
    out: str | Path | None = None,
    command: Sequence[str] = ("heddle", "bench", "serve"),
) -> dict[str, Any]:
    """Serve a model and measure it; print a table (or JSON); with ``out`` write JSON there.

    Raises:
        ValueError: options that can't be, by the option's name.
    """
    numbers = counts("clients", clients)
    for option, value, least in (
        ("prompt-tokens", prompt_tokens, 1), ("tokens", tokens, 2), ("repeats", repeats, 1),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"--{option} must be at least {least}, got {value}")
    from heddle.data.tokenizers import Tokenizer

    tokenizer = Tokenizer.from_pretrained(model)
    text = tokenizer.encode(inspect.getsource(heapq))
    salt = secrets.randbelow(1000)

    def prompt(number: int) -> list[int]:
        """Each begins with other tokens, so that none is found in the cache."""
        digits = tokenizer.encode(f"{salt} {number} ", add_special=False)
        begin = 7 * number % len(text)
        return (digits + (text[begin:] + text) * (1 + prompt_tokens // len(text)))[:prompt_tokens]

    # Every client's answer is under way at once.
    arguments = ["--warm-up", "--max-batch", str(numbers[-1]), "--max-queue", str(2 * numbers[-1])]
    with Console(stderr=True).status("starting the server") as status, server(model, arguments) as (url, name):
        results = measure(
            lambda number: ask(url, name, prompt(number), tokens),
            numbers,
            lambda count: max(2 * count, 4) if count < 16 else count,
            repeats,
            status.update,
        )
    record = {
        "benchmark": "serve",
        "command": shlex.join(command),
        "machine": machine(),
        "problem": {"model": name, "prompt_tokens": prompt_tokens, "tokens": tokens},
        "results": results,
    }
    printed = json.dumps(record, indent=2)
    print(printed) if as_json else show(title(record), tables(record), notes(record))
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "serve.json").write_text(printed + "\n")
    return record


def title(record: dict[str, Any]) -> str:
    """The problem in a line."""
    p = record["problem"]
    return f"{p['model']} served, {p['prompt_tokens']} tokens in, {p['tokens']} out"


def tables(record: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of text."""
    first = record["results"][0]
    rows = [
        [
            str(r["clients"]), f"{r['tokens_per_s']:.1f}", f"{r['tokens_per_s'] / first['tokens_per_s']:.2f}×",
            f"{r['first_token_s']:.3f}", f"{r['first_token_p90_s']:.3f}", f"{r['answer_s']:.2f}",
        ]
        for r in record["results"]
    ]  # fmt: skip
    header = ["clients", "tokens/s", f"of {first['clients']}", "first token, s", "of 90%, s", "answer, s"]
    return [(header, rows)]


def notes(record: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know."""
    m = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return [
        "every prompt begins differently, so that none is found in the cache; clients and server share the machine",
        f"medians of {record['results'][0]['repeats']} interleaved rounds; {m['processor']}, {m['cores']} cores; "
        f"Python {m['python']}, {versions}; {m['date']}",
    ]
