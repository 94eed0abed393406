"""``heddle bench serve``: tokens a second and the time to the first token, by how many clients ask at once.

Each client is a connection to a server in another process and asks for one answer after another, streamed, as a user's
program would; the same requests go to transformers' server and llama.cpp's, in one interleaved run. One client is the
measure: what an engine's batches gain over answering one request at a time.
"""

from __future__ import annotations

import functools
import heapq
import inspect
import itertools
import json
import operator
import secrets
import shlex
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .options import counts
from .serve_peers import PROGRAMS, Answer, Load, Server, name_of, running, stopping, told
from .tables import show
from .timing import interleave, machine

if TYPE_CHECKING:
    from heddle.data.tokenizers import Tokenizer

OURS, *PEERS = PROGRAMS


class Prompts:
    """Texts of so many tokens, each with a beginning of its own, so that no server finds it in a cache.

    Text, since not every server takes ids; all encode it alike, if it isn't cut where tokens would merge.

    Raises:
        ValueError: from a call, if there is no such text.
    """

    def __init__(self, tokenizer: Tokenizer, length: int):
        self.tokenizer, self.length = tokenizer, length
        self.source = tokenizer.encode(inspect.getsource(heapq), add_special=False)
        self.salt = secrets.randbelow(1000)

    def __call__(self, number: int) -> str:
        around = len(self.tokenizer.encode(""))
        head = self.tokenizer.encode(f"{self.salt} {number} ", add_special=False)
        rest = self.source * (2 + self.length // len(self.source))
        for begin in range(len(self.source)):
            begin = (begin + 7 * number) % len(self.source)
            text = self.tokenizer.decode((head + rest[begin : begin + self.length])[: self.length - around])
            if len(self.tokenizer.encode(text)) == self.length:
                return text
        raise ValueError(f"--prompt-tokens must be a number of tokens that some text has, got {self.length}")


def measure(
    ask: Mapping[str, Callable[[str], Answer]],
    clients: Sequence[int],
    requests: Callable[[int], int],
    prompt: Callable[[int], str],
    repeats: int,
    turn: Callable[[str], AbstractContextManager[object]] = nullcontext,
    tell: Callable[[str], object] = lambda message: None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For each number of clients and each server, the medians over the rounds.

    Args:
        ask: by the server's name, ours first: a prompt, answered. All get the same prompts.
        clients: how many ask at once.
        requests: how many requests so many clients make in a round, together.
        prompt: of each number, from 0 on.
        repeats: rounds that count.
        turn: entered around all that a server is asked in a row.
        tell: is told what runs now.

    Returns:
        The results, and of each peer that failed on the way, and so has none, why.

    Raises:
        OSError: our server failed.
    """
    ours = next(iter(ask))
    pairs = [(count, name) for count in clients for name in ask]
    answered: dict[tuple[int, str], list[list[Answer]]] = {pair: [] for pair in pairs}
    failed: dict[str, str] = {}
    numbers = itertools.count()
    prompts = {
        (round_, count): [prompt(next(numbers)) for _ in range(requests(count))]
        for round_ in range(-1, repeats)  # the first warms up
        for count in clients
    }

    def step(count: int, name: str) -> Callable[[int], None]:
        def together(round_: int) -> None:
            if name in failed:
                return
            try:
                with turn(name), ThreadPoolExecutor(count) as pool:
                    answered[count, name].append(list(pool.map(ask[name], prompts[round_, count])))
            except OSError as error:
                if name == ours:
                    raise
                failed[name] = str(error)

        return together

    steps = {f"{name}, {count} clients": step(count, name) for count, name in pairs}
    timings = interleave(steps, repeats, tell=tell)
    results = []
    for count, name in pairs:
        if name in failed:
            continue
        rounds = answered[count, name][-repeats:]
        seconds = timings[f"{name}, {count} clients"].seconds
        answers = [answer for each in rounds for answer in each]
        first = sorted(answer.first_token for answer in answers)
        rates = [sum(a.tokens for a in each) / taken for each, taken in zip(rounds, seconds, strict=True)]
        read = [answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None]
        results.append(
            {
                "name": name,
                "clients": count,
                "requests": len(rounds[0]),
                "tokens_per_s": statistics.median(rates),
                "first_token_s": statistics.median(first),
                "first_token_p90_s": first[int(0.9 * (len(first) - 1))],
                "answer_s": statistics.median(answer.seconds for answer in answers),
                "prompt_tokens": statistics.mean(read) if read else None,
                "tokens": statistics.mean(answer.tokens for answer in answers),
                "repeats": repeats,
            }
        )
    return results, failed


def run(
    model: str | None = None,
    *,
    clients: str = "1,4,16,64",
    prompt_tokens: int = 64,
    tokens: int = 32,
    peers: str = "all",
    repeats: int = 3,
    as_json: bool = False,
    out: str | Path | None = None,
    command: Sequence[str] = ("heddle", "bench", "serve"),
) -> dict[str, Any]:
    """Serve a model, measure it and its peers; print a table (or JSON); with ``out`` write JSON there.

    Raises:
        ValueError: options that can't be, by the option's name.
        OSError: our server doesn't start, or fails.
    """
    numbers = counts("clients", clients)
    for option, value, least in (
        ("prompt-tokens", prompt_tokens, 1), ("tokens", tokens, 2), ("repeats", repeats, 1),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"--{option} must be at least {least}, got {value}")
    chosen = PEERS if peers == "all" else () if peers == "none" else tuple(peers.split(","))
    if unknown := set(chosen) - set(PEERS):
        raise ValueError(f"--peers must be all, none or of {', '.join(PEERS)}; got {', '.join(sorted(unknown))}")
    from heddle.data.tokenizers import Tokenizer

    tokenizer = Tokenizer.from_pretrained(model)
    prompts = Prompts(tokenizer, prompt_tokens)
    load = Load(numbers[-1], prompts(0), prompt_tokens, tokens)
    servers: dict[str, Server] = {}
    absent: dict[str, str] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Console(stderr=True).status("") as status,
        stopping(),
        ExitStack() as stack,
    ):
        for who in (OURS, *chosen):
            status.update(f"starting {who}")
            try:
                program = PROGRAMS[who](model, Path(folder), load)
                servers[who] = stack.enter_context(running(program, Path(folder) / f"{who}.log", load))
            except (ImportError, OSError, ValueError) as error:
                if who == OURS:
                    raise
                absent[who] = str(error)
        results, failed = measure(
            {who: functools.partial(server.ask, tokens=tokens) for who, server in servers.items()},
            numbers,
            lambda count: max(2 * count, 4) if count < 16 else count,
            lambda number: prompts(1 + number),
            repeats,
            lambda who: servers[who].turn(),
            status.update,
        )
    trials = {who: tokenizer.encode(server.trial, add_special=False) for who, server in servers.items()}
    record = {
        "benchmark": "serve",
        "command": shlex.join(command),
        "machine": machine(),
        "problem": {"model": name_of(model), "dtype": "float32", "prompt_tokens": prompt_tokens, "tokens": tokens},
        "servers": {
            who: {
                "command": told(server.program),
                "idle_cores": round(server.idle_cores, 2),
                "same_tokens": agreement(trials[OURS], trials[who]),
                "of_tokens": len(trials[OURS]),
            }
            for who, server in servers.items()
        },
        "not_run": absent | failed,
        "results": results,
    }
    printed = json.dumps(record, indent=2)
    print(printed) if as_json else show(title(record), tables(record), notes(record))
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "serve.json").write_text(printed + "\n")
    return record


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are the same before the first difference."""
    return sum(itertools.accumulate((a == b for a, b in zip(ours, theirs, strict=False)), operator.and_))


def title(record: dict[str, Any]) -> str:
    """The problem in a line."""
    p = record["problem"]
    return f"{p['model']} served in {p['dtype']}, {p['prompt_tokens']} tokens in, {p['tokens']} out"


def tables(record: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of text."""
    alone, ours, rows = {}, {}, []
    for r in record["results"]:
        name, speed = r["name"], r["tokens_per_s"]
        server = record["servers"][name]
        rows.append(
            [
                name, str(r["clients"]), f"{speed:.1f}", f"{speed / alone.setdefault(name, speed):.2f}×",
                f"{r['first_token_s']:.3f}", f"{r['first_token_p90_s']:.3f}", f"{r['answer_s']:.2f}",
                f"{ours.setdefault(r['clients'], speed) / speed:.2f}×",
                f"{server['same_tokens']}/{server['of_tokens']}",
            ]
        )  # fmt: skip
    of = f"of {record['results'][0]['clients']}"
    header = ["", "clients", "tokens/s", of, "first token, s", "of 90%, s", "answer, s", "heddle is", "same tokens"]
    return [(header, rows)]


def notes(record: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know."""
    m, p = record["machine"], record["problem"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    lines = [
        "every prompt begins differently, so that none is found in the cache; clients and server share the machine; "
        "while one server is measured the others are stopped",
        "same tokens: of the likeliest answer to one prompt, its text encoded, before the first that is not heddle's",
        f"medians of {record['results'][0]['repeats']} interleaved rounds; {m['processor']}, {m['cores']} cores; "
        f"Python {m['python']}, {versions}; {m['date']}",
    ]
    for name, server in record["servers"].items():
        lines.append(f"{name}: {server['command']} (keeps {server['idle_cores']:.2f} cores busy when idle)")
    for r in record["results"]:
        for what in ("prompt_tokens", "tokens"):
            if r[what] not in (None, p[what]):
                lines.append(f"{r['name']}, {r['clients']} clients: {r[what]:.2f} {what} on average, not {p[what]}")
    return lines + [f"{name} did not run: {why}" for name, why in record["not_run"].items()]
