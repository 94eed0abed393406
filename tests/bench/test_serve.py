"""The serving benchmark: its arithmetic, and a whole run of a tiny model's servers, ours and transformers'."""

import contextlib
import json
import threading
import time

import pytest
from servers import save
from typer.testing import CliRunner

from heddle.bench import serve, serve_peers
from heddle.cli import app
from heddle.data.tokenizers import Tokenizer


class Fixed:
    def __init__(self, *seconds):
        self.seconds = seconds


def rounds(steps, repeats, tell):
    """What interleave does, without the time."""
    for round_ in range(-1, repeats):
        for step in steps.values():
            step(round_)


def test_figures_follow_from_the_answers(monkeypatch):
    seconds = {"heddle, 1 clients": (2.0, 2.0), "heddle, 4 clients": (1.0, 4.0)}
    seconds |= {"peer, 1 clients": (4.0, 4.0), "peer, 4 clients": (5.0, 5.0)}

    def interleave(steps, repeats, tell):
        rounds(steps, repeats, tell)
        return {name: Fixed(*seconds[name]) for name in steps}

    monkeypatch.setattr(serve, "interleave", interleave)
    asked = {"heddle": [], "peer": []}

    def ask(name, prompt):
        number = int(prompt)
        asked[name].append(number)
        return serve.Answer(first_token=0.1 * (number % 10), seconds=1.0, tokens=10, prompt_tokens=3)

    asks = {"heddle": lambda prompt: ask("heddle", prompt), "peer": lambda prompt: ask("peer", prompt)}
    results, failed = serve.measure(asks, [1, 4], lambda count: 10, str, 2)
    assert not failed
    # The same prompts for both, and no prompt twice.
    assert sorted(asked["heddle"]) == sorted(asked["peer"]) == list(range(60))
    assert [(r["clients"], r["name"], r["requests"]) for r in results] == [
        (1, "heddle", 10), (1, "peer", 10), (4, "heddle", 10), (4, "peer", 10),
    ]  # fmt: skip
    one, other, four, _ = results
    assert one["tokens_per_s"] == pytest.approx(100 / 2)
    assert four["tokens_per_s"] == pytest.approx((100 / 1 + 100 / 4) / 2)
    assert other["tokens_per_s"] == pytest.approx(100 / 4)
    assert one["first_token_s"] == pytest.approx(0.45)
    assert one["first_token_p90_s"] == pytest.approx(0.8)
    assert (one["answer_s"], one["tokens"], one["prompt_tokens"]) == (1.0, 10, 3)
    check = {"command": "run it", "idle_cores": 0.5, "same_tokens": 9, "of_tokens": 10}
    record = {
        "results": results,
        "servers": {"heddle": check | {"same_tokens": 10}, "peer": check},
        "problem": {"model": "m", "dtype": "float32", "prompt_tokens": 3, "tokens": 12},
        "machine": {"versions": {}, "processor": "p", "cores": 2, "python": "3", "date": "d"},
        "not_run": {"other": "it isn't installed"},
    }
    [(header, rows)] = serve.tables(record)
    assert {len(row) for row in rows} == {len(header)}
    assert [row[:4] + row[-2:] for row in rows] == [
        ["heddle", "1", "50.0", "1.00×", "1.00×", "10/10"],
        ["peer", "1", "25.0", "1.00×", "2.00×", "9/10"],
        ["heddle", "4", "62.5", "1.25×", "1.00×", "10/10"],
        ["peer", "4", "20.0", "0.80×", "3.12×", "9/10"],
    ]
    notes = serve.notes(record)
    assert "peer: run it (keeps 0.50 cores busy when idle)" in notes
    assert "peer, 4 clients: 10.00 tokens on average, not 12" in notes
    assert notes[-1] == "other did not run: it isn't installed"


def test_so_many_clients_ask_at_once():
    now, most, lock = [0], [0], threading.Lock()

    def ask(prompt):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return serve.Answer(0.0, 0.05, 1)

    serve.measure({"heddle": ask}, [3], lambda count: 9, str, 1)
    assert most == [3]


def test_one_server_at_a_time():
    """Whoever is asked has its turn, and nobody else."""
    turns, seen = [], set()

    @contextlib.contextmanager
    def turn(name):
        turns.append(name)
        yield
        turns.remove(name)

    def ask(name):
        seen.add((name, *turns))
        return serve.Answer(0.0, 0.0, 1)

    asks = {name: lambda prompt, name=name: ask(name) for name in ("heddle", "peer")}
    serve.measure(asks, [1, 2], lambda count: 4, str, 2, turn)
    assert seen == {("heddle", "heddle"), ("peer", "peer")}
    assert not turns


def test_a_peer_that_fails_is_left_out_and_ours_is_not():
    calls = []

    def fails(prompt):
        calls.append(prompt)
        if len(calls) > 5:
            raise OSError("the server ended (-9): Killed")
        return works(prompt)

    def works(prompt):
        return serve.Answer(0.1, 0.2, 4)

    results, failed = serve.measure({"heddle": works, "peer": fails}, [1, 2], lambda count: 2, str, 2)
    assert failed == {"peer": "the server ended (-9): Killed"}
    assert {r["name"] for r in results} == {"heddle"}
    assert len(calls) < 12  # it isn't asked again
    calls.clear()
    with pytest.raises(OSError, match="Killed"):
        serve.measure({"heddle": fails, "peer": works}, [1, 2], lambda count: 2, str, 2)


@pytest.mark.parametrize("length", [1, 9, 64, 900])
def test_prompts_have_so_many_tokens_each_with_its_own_beginning(length):
    for tokenizer in (Tokenizer.bytes(), Tokenizer.from_pretrained()):
        prompts = serve.Prompts(tokenizer, length)
        texts = [prompts(number) for number in range(40)]
        assert {len(tokenizer.encode(text)) for text in texts} == {length}
        if length >= 9:
            assert len({tuple(tokenizer.encode(text)[:9]) for text in texts}) == 40


def test_tokens_are_the_same_until_they_differ():
    assert serve.agreement([1, 2, 3, 4], [1, 2, 0, 4]) == 2
    assert serve.agreement([1, 2], [1, 2, 3]) == 2
    assert serve.agreement([1, 2], []) == 0


@pytest.mark.slow
def test_a_whole_run(tmp_path, monkeypatch):
    monkeypatch.setattr(serve_peers, "cores", lambda: 1)  # threads that spin for one another, among other tests' work
    save(tmp_path / "tiny")
    options = ["--clients", "1,3", "--prompt-tokens", "9", "--tokens", "4", "--repeats", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "serve", "--model", str(tmp_path / "tiny"), *options])
    assert result.exit_code == 0, result.output
    assert "tiny served in float32, 9 tokens in, 4 out" in result.output
    record = json.loads((tmp_path / "serve.json").read_text())
    names = ["heddle", "transformers"]
    assert [(r["clients"], r["name"]) for r in record["results"]] == [(count, who) for count in (1, 3) for who in names]
    assert all(0 < r["first_token_s"] <= r["answer_s"] for r in record["results"])
    assert {(r["prompt_tokens"], r["tokens"]) for r in record["results"]} == {(9, 4)}
    # The same weights, so greedily the same text.
    ours, theirs = (record["servers"][who] for who in names)
    assert ours["same_tokens"] == theirs["same_tokens"] == ours["of_tokens"] > 0
    assert "--continuous-batching" in theirs["command"]
    assert record["not_run"] == {"llama.cpp": "it reads GGUF files alone"}
    assert "llama.cpp did not run: it reads GGUF files alone" in result.output


@pytest.mark.slow
def test_json_alone_and_no_peers(tmp_path):
    save(tmp_path / "tiny")
    options = ["--peers", "none", "--json", "--clients", "2", "--prompt-tokens", "9", "--tokens", "4", "--repeats", "1"]
    result = CliRunner().invoke(app, ["bench", "serve", "--model", str(tmp_path / "tiny"), *options])
    assert [r["name"] for r in json.loads(result.stdout)["results"]] == ["heddle"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": "one"}, "--clients must be positive whole numbers as in 2,4, got 'one'"),
        ({"clients": "0,4"}, "--clients must be positive whole numbers as in 2,4, got '0,4'"),
        ({"tokens": 1}, "--tokens must be at least 2, got 1"),
        ({"peers": "vllm"}, "--peers must be all, none or of transformers, llama.cpp; got vllm"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
        ({"model": "./nowhere"}, "./nowhere: no such file or folder"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises((ValueError, OSError), match=message):
        serve.run(**options)
